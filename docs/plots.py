"""Draws the plot on each strategy's page, from real training under that strategy.

Run:     python docs/plots.py [--out docs/strategies] [--only guard_collapse ...]
         (needs scikit-learn and matplotlib: pip install ".[examples]")
Time:    about four minutes on two cores.
Expect:  a PNG per strategy, and a line per run: its held-out loss and accuracy, and the numbers
         that the pages quote. The model and the data are those of `benchmarks/tiny_moe.py`, sixteen
         tiny experts on scikit-learn's digits; every run is one seed, 0.
"""

import argparse
import functools
import io
import pathlib

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from plot_tools import (
    BLUE,
    EXPERTS,
    GREEN,
    GREY,
    LEARNING_RATE,
    RED,
    Run,
    add_legend,
    draw_marks,
    draw_threshold,
    grouped,
    make_panels,
    moved,
    report,
    smoothed,
    train,
)
from plots_of_plateaus import (
    plot_advanced_plateau,
    plot_greedy,
    plot_plateau,
    plot_skip_spikes,
    plot_trend_plateau,
)
from plots_of_policies import plot_learned, plot_policy_gradient, plot_reinforce

import meta_optax as mo

COLLAPSING_GATE_RATE = 3e-2


def plot_expert_gate() -> Figure:
    """The entropy falls below the threshold: at once or every 20 steps looked at."""
    steps, settings = 1000, {"entropy_threshold": 0.75, "normalized_entropy": True}
    make = functools.partial(mo.expert_gate, gate_lr_factor=1.0, **settings)
    often, seldom = (
        train(grouped(mo.with_decisions(make(update_frequency=n))), steps) for n in (1, 20)
    )
    alone = train(grouped(mo.log_only(make()), gate_learning_rate=LEARNING_RATE), steps)
    report("expert_gate, every step", often, 1, last=moved(often, "gate_learning_rate")[-1])
    report("expert_gate, every 20 steps", seldom, 24)
    report("expert_gate, left alone", alone)
    title = "expert_gate(gate_lr_factor=1, entropy_threshold=0.75, normalized_entropy=True, …)"
    labels = ("gate entropy / log 16", "gate rate,\na look a step", "gate rate,\na look in 20")
    figure, (entropy, first, second) = make_panels(title, labels)
    entropy_of = "gate_entropy_normalized"
    entropy.plot(alone.history[entropy_of], color=GREY, lw=1.0, label="left alone")
    entropy.plot(often.history[entropy_of], color=RED, lw=0.8, label="update_frequency=1")
    entropy.plot(seldom.history[entropy_of], color=BLUE, lw=1.2, label="update_frequency=20")
    draw_threshold(entropy, 0.75, "threshold")
    draw_threshold(entropy, 0.8 / np.log(EXPERTS), "0.8 nats", GREEN)
    entropy.set_ylim(0.2, 1.03)
    for axes, run, color in ((first, often, RED), (second, seldom, BLUE)):
        axes.plot(run.history["gate_learning_rate"], color=color, lw=1.0)
        axes.set_ylim(0.0, 1.2 * LEARNING_RATE)
    draw_marks((entropy, second), moved(seldom, "gate_learning_rate"), BLUE)
    add_legend(entropy)
    return figure


def plot_smart_expert_gate() -> Figure:
    """Sparsity crosses its band; entropy and specialisation their thresholds."""
    meta = mo.smart_expert_gate(
        gate_lr_factor=1.0,
        entropy_threshold=0.5,
        sparsity_target=0.5,
        normalized_entropy=True,
        specialization_threshold=0.05,
        update_frequency=20,
    )
    run = train(grouped(mo.with_decisions(meta), rate=1e-2), 1000)
    alone = train(grouped(mo.log_only(meta), rate=1e-2, gate_learning_rate=1e-2), 1000)
    labels = ("gate sparsity", "shares of log 16", "learning rate")
    title = "smart_expert_gate(gate_lr_factor=1, normalized_entropy=True, update_frequency=20, …)"
    figure, (sparsity, shares, rates) = make_panels(title, labels)
    report("smart_expert_gate", run, 24)
    report("smart_expert_gate, left alone", alone)
    sparsity.plot(alone.history["gate_sparsity"], color=GREY, lw=0.8, label="left alone")
    sparsity.plot(run.history["gate_sparsity"], color=BLUE, lw=0.9, label="with the strategy")
    draw_threshold(sparsity, 0.4, "target - 0.1")
    draw_threshold(sparsity, 0.6, "target + 0.1")
    entropy = run.history["gate_entropy_normalized"]
    special = run.history["load_entropy_normalized"] - entropy
    shares.plot(entropy, color=RED, lw=1.0, label="gate entropy")
    shares.plot(special, color=GREEN, lw=1.0, label="specialisation: load entropy - gate entropy")
    draw_threshold(shares, 0.5, "entropy_\nthreshold", RED)
    draw_threshold(shares, 0.05, "specialization_\nthreshold", GREEN)
    rates.plot(run.history["gate_learning_rate"], color=RED, lw=1.6, label="gate")
    rates.plot(run.history["expert_learning_rate"], color=GREEN, lw=1.6, label="experts")
    rates.set_ylim(0.0, 1.5e-2)
    draw_marks(figure.axes, sorted({d.step for d in mo.read_decisions(run.state)}))
    for axes in figure.axes:
        add_legend(axes)
    return figure


def plot_adapt_aux_loss() -> Figure:
    """The weight rises to its bound while the load is uneven, and falls once it is even."""
    drop_band, violation_band = (0.01, 0.05), (0.4, 0.8)
    meta = mo.adapt_aux_loss(drop_band=drop_band, violation_band=violation_band, factor=1.02)
    tx = grouped(meta, free={"aux_loss_weight": 1e-3}, gate_learning_rate=1e-3)
    run = train(tx, 1500, capacity=2.0)
    weight = run.history["aux_loss_weight"]
    begin, end = np.flatnonzero(weight > 0.0999)[[0, -1]]
    report("adapt_aux_loss", run, last=weight[-1], bound_from=begin, bound_until=end)
    labels = ("drop fraction", "MaxVio", "aux_loss_weight")
    title = "adapt_aux_loss(violation_band=(0.4, 0.8), factor=1.02), from a weight of 1e-3"
    figure, panels = make_panels(title, labels)
    bands = {"drop_fraction": drop_band, "max_violation": violation_band}
    for axes, (name, band) in zip(panels, bands.items(), strict=False):
        axes.plot(run.history[name], color=GREY, lw=0.6, label="one batch")
        axes.plot(smoothed(run.history[name], 0.9), color=BLUE, lw=1.4, label="smoothed")
        draw_threshold(axes, band[0], f"falls below {band[0]}", GREEN)
        draw_threshold(axes, band[1], f"rises above {band[1]}", RED)
    panels[0].set_yscale("symlog", linthresh=0.1)
    panels[2].plot(weight, color=BLUE, lw=1.6)
    panels[2].set_yscale("log")
    draw_threshold(panels[2], 0.1, "max_weight")
    add_legend(panels[0])
    return figure


def plot_guard_collapse() -> Figure:
    """A gate rate thirty times too high, guarded and left alone."""
    meta, steps, free = mo.guard_collapse(), 1000, {"aux_loss_weight": 0.0}
    make = functools.partial(grouped, free=free, gate_learning_rate=COLLAPSING_GATE_RATE)
    run, alone = (train(make(m), steps) for m in (mo.with_decisions(meta), mo.log_only(meta)))
    acting = run.history["aux_loss_weight"] > 0
    report("guard_collapse", run, 24, idle=run.history["max_violation"][~acting].mean())
    report("guard_collapse, left alone", alone)
    labels = ("MaxVio", "load entropy / log 16", "gate rate")
    figure, panels = make_panels("guard_collapse(), a gate rate of 3e-2, no auxiliary loss", labels)
    thresholds = ((1.0, 0.5), (0.7, 0.9))
    names = ("max_violation", "load_entropy_normalized")
    for axes, name, (bad, good) in zip(panels, names, thresholds, strict=False):
        axes.plot(alone.history[name], color=GREY, lw=0.8, label="left alone")
        axes.plot(run.history[name], color=BLUE, lw=1.0, label="guarded")
        draw_threshold(axes, bad, "collapse", RED)
        draw_threshold(axes, good, "health", GREEN)
    for one, color in ((alone, GREY), (run, BLUE)):
        panels[2].plot(one.history["gate_learning_rate"], color=color, lw=1.4)
    panels[2].set_yscale("log")
    panels[2].set_yticks((3e-3, 1e-2, 3e-2), ("0.003", "0.01", "0.03"))
    panels[2].minorticks_off()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], acting, [False]])))
    for axes in panels:
        for span in edges.reshape(-1, 2):
            axes.axvspan(*span, color=BLUE, alpha=0.15, lw=0)
    panels[0].fill_between([], [], color=BLUE, alpha=0.15, label="acts: aux_loss_weight 0.3, not 0")
    add_legend(panels[0])
    return figure


def plot_balance_router_bias() -> Figure:
    """The load with the bias rule at two rates, and without; and the biases at the better one."""

    def balanced(gate_rate: float = 1e-3, **rates: float) -> Run:
        idle = mo.log_only(mo.expert_gate())
        return train(grouped(idle, gate_learning_rate=gate_rate, **rates), 1000)

    off, on, fast = balanced(), *(balanced(balance_update_rate=r) for r in (1e-3, 1e-2))
    high = balanced(COLLAPSING_GATE_RATE, balance_update_rate=1e-3)
    runs = {"off": off, "1e-3": on, "1e-2": fast, "1e-3, gate at 3e-2": high}
    for name, run in runs.items():
        report(f"balance_router_bias, {name}", run, least=run.history["bias"].min())
    title = 'balance_update_rate, rule "sign"; no auxiliary loss'
    figure, (load, bias) = make_panels(title, ("MaxVio", "bias at 1e-3, by expert"))
    for run, color, label in (
        (off, GREY, "no balance rule"),
        (fast, RED, "balance_update_rate=1e-2"),
        (on, BLUE, "balance_update_rate=1e-3"),
    ):
        violation = run.history["max_violation"]
        load.plot(violation, color=color, lw=0.5, alpha=0.4)
        load.plot(smoothed(violation, 0.95), color=color, lw=1.8, label=f"{label}, smoothed")
    draw_threshold(load, 0.0, "even")
    bias.plot(on.history["bias"], color=BLUE, lw=0.8, alpha=0.7)
    draw_threshold(bias, 1 / EXPERTS, "1 / 16, the\nmean probability")
    add_legend(load)
    return figure


ALL = (
    *(plot_plateau, plot_advanced_plateau, plot_trend_plateau, plot_greedy, plot_skip_spikes),
    *(plot_reinforce, plot_policy_gradient, plot_learned),
    *(plot_expert_gate, plot_smart_expert_gate),
    *(plot_adapt_aux_loss, plot_guard_collapse, plot_balance_router_bias),
)
PLOTS = {plot.__name__.removeprefix("plot_"): plot for plot in ALL}


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a PNG of few colours, a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def main() -> None:
    """Trains and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/strategies"))
    parser.add_argument("--only", nargs="+", choices=PLOTS, default=list(PLOTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        save(PLOTS[name](), arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
