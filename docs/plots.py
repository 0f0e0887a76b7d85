"""Draws the plot on each strategy's page, from real training under that strategy.

Run:     python docs/plots.py [--out docs/strategies] [--only guard_collapse ...]
         (needs scikit-learn and matplotlib: pip install ".[examples]")
Time:    under two minutes on two cores.
Expect:  a PNG per strategy, and a line per run: its held-out loss and accuracy, and the numbers
         that the pages quote. The model and the data are those of `benchmarks/tiny_moe.py`, sixteen
         tiny experts on scikit-learn's digits; every run is one seed, 0.
"""

import argparse
import functools
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import meta_optax as mo

# Benchmarks and examples are scripts, and no packages: what they hold is found by its folder.
sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
from figures import BLUE, GREEN, GREY, RED
from tiny_moe import BATCH_SIZE, EXPERTS, SPLIT, WEIGHT_DECAY, forward, init_params, loss_fn

SEED = 0
LEARNING_RATE, HIGH_RATE, LOWEST_RATE = 3e-3, 1e-1, 1e-4
COLLAPSING_GATE_RATE, PATIENCE = 3e-2, 20
TAIL = 200  # steps at the end over which a metric's mean is quoted


class Run(NamedTuple):
    """One run's metrics and hyperparameters by step, and what it led to."""

    history: dict[str, np.ndarray]
    state: Any
    test_loss: float
    test_accuracy: float


def overflow(selected: Int[Array, "batch selected"], capacity: float) -> Array:
    """Which slots an expert would turn away that takes `capacity` times the even load."""
    chosen = jax.nn.one_hot(selected.ravel(), EXPERTS, dtype=jnp.int32)
    place = (jnp.cumsum(chosen, axis=0) * chosen).sum(axis=1)
    return (place > capacity * selected.size / EXPERTS).reshape(selected.shape)


def train(
    tx: optax.GradientTransformationExtraArgs, steps: int, capacity: float | None = None
) -> Run:
    """Trains as `tiny_moe.train` does, one seed, and keeps the gradient's norm and biases too."""

    def step(carry: Any, key: Array) -> tuple[Any, dict[str, Array]]:
        params, state = carry
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(SPLIT.train["digit"]))
        batch = jax.tree.map(lambda x: x[rows], SPLIT.train)
        weight = optax.tree.get(state, "hyperparams").get("aux_loss_weight", 0.0)
        grads, (loss, routing) = jax.grad(loss_fn, has_aux=True)(params, batch, weight)
        dropped = None if capacity is None else overflow(routing.selected, capacity)
        metrics = mo.router_metrics(routing.probs, routing.selected, dropped=dropped)
        updates, state = tx.update(grads, state, params, value=loss, **metrics)
        history = {**metrics, **optax.tree.get(state, "hyperparams"), "value": loss}
        history |= {"grad_norm": optax.tree.norm(grads), "bias": params["balance_bias"]}
        plateaus = {name: optax.tree.get(state, name) for name in ("best", "bad_count")}
        history |= {name: value for name, value in plateaus.items() if value is not None}
        return (optax.apply_updates(params, updates), state), history

    @jax.jit
    def run(seed: Int[Array, ""]) -> Any:
        key, data_key = jax.random.split(jax.random.key(seed))
        params = init_params(key)
        carry = (params, tx.init(params))
        (params, state), history = jax.lax.scan(step, carry, jax.random.split(data_key, steps))
        guesses = forward(params, SPLIT.test["pixels"])[0].argmax(axis=1)
        accuracy = (guesses == SPLIT.test["digit"]).mean()
        return state, history, loss_fn(params, SPLIT.test, 0.0)[0], accuracy

    state, history, loss, accuracy = run(jnp.int32(SEED))
    history = {name: np.asarray(values) for name, values in history.items()}
    return Run(history, state, float(loss), float(accuracy))


def plain(strategy: mo.MetaOptimizer, rate: Any = HIGH_RATE) -> Any:
    """AdamW of all parameters alike."""
    inject = mo.inject_meta_hyperparams(optax.adamw, strategy)
    return inject(learning_rate=rate, weight_decay=WEIGHT_DECAY)


def grouped(
    strategy: mo.MetaOptimizer, rate: float = LEARNING_RATE, free: Any = None, **hyperparams: float
) -> Any:
    """AdamW in groups; `hyperparams` are group forms."""
    factory = mo.moe_partition(optax.adamw, mo.label_moe_params)
    inject = mo.inject_meta_hyperparams(factory, strategy, free_hyperparams=free or {})
    return inject(learning_rate=rate, weight_decay=WEIGHT_DECAY, **hyperparams)


def report(name: str, run: Run, decisions: int = 0, **numbers: Any) -> None:
    """Prints what the pages quote of a run, and its first decisions beyond the warm-up's."""
    history = run.history
    print(
        f"{name}: held out {run.test_loss:.3f}, accuracy {run.test_accuracy:.3f}; "
        f"last {TAIL} batches: loss {history['value'][-TAIL:].mean():.3g}, "
        f"MaxVio {history['max_violation'][-TAIL:].mean():.2f}; "
        f"sparsity {history['gate_sparsity'][-TAIL:].mean():.3f}, "
        f"entropy {history['gate_entropy_normalized'][-TAIL:].mean():.3f}",
        *(f"{key} {value:.3g}" for key, value in numbers.items()),
        sep="; ",
    )
    if decisions:
        made = [d for d in mo.read_decisions(run.state) if "warm-up" not in d.reason]
        print(f"{len(made)} decisions:", mo.format_decisions(made[:decisions]), sep="\n")


def make_panels(title: str, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Stacked panels over the steps, with the names of their vertical axes."""
    figure = Figure((10.0, 2.2 * len(labels) + 0.6), dpi=110, layout="constrained")
    panels = list(figure.subplots(len(labels), sharex=True))
    for axes, label in zip(panels, labels, strict=True):
        axes.set(ylabel=label, xmargin=0.005)
    panels[-1].set_xlabel("step")
    figure.suptitle(title)
    return figure, panels


def add_legend(axes: Axes, columns: int = 4) -> None:
    """The legend above the panel, where there is no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=columns, frameon=False)


def draw_threshold(axes: Axes, value: float, text: str, color: str = "black") -> None:
    """A horizontal line, named in the margin on the right."""
    axes.axhline(value, color=color, ls="--", lw=1.0)
    place = axes.get_yaxis_transform()
    axes.text(1.01, value, text, color=color, transform=place, va="center", fontsize=9)


def draw_marks(panels: Sequence[Axes], steps: Sequence[int], color: str = "black") -> None:
    """A vertical line through all panels at each of the steps."""
    for axes in panels:
        for step in steps:
            axes.axvline(step, color=color, ls=":", lw=1.2)


def moved(run: Run, hyperparam: str, rule: str = "") -> list[int]:
    """The steps at which a rule changed a hyperparameter."""
    decisions = mo.read_decisions(run.state)
    return [d.step for d in decisions if d.hyperparam == hyperparam and rule in d.reason]


def smoothed(values: np.ndarray, kept: float) -> np.ndarray:
    """The average that strategies keep: the first value, then `kept` of it and the rest new."""
    out = np.array(values, float)
    for i in range(1, len(out)):
        out[i] = kept * out[i - 1] + (1 - kept) * out[i]
    return out


def draw_plateau_run(title: str, run: Run, alone: Run, warmup: int = 0) -> Figure:
    """Loss, the count that patience bounds, and the rate, with a mark at each cut."""
    rules = {"patience": RED, "trend": GREEN} if warmup else {"patience": RED}
    cuts = {rule: moved(run, "learning_rate", rule) for rule in rules}
    labels = ("loss of a batch", "steps since the best", "learning rate")
    figure, (loss, steps, rate) = make_panels(title, labels)
    loss.plot(alone.history["value"], color=GREY, lw=0.8, label="same start, rate left alone")
    loss.plot(run.history["value"], color=BLUE, lw=1.0, label="with the strategy")
    loss.plot(run.history["best"], color="black", lw=1.0, label="its best so far")
    for axes in (loss, rate):
        axes.set_yscale("log")
    steps.plot(run.history["bad_count"], color=BLUE, lw=1.2)
    steps.set_ylim(0, 1.2 * PATIENCE)
    draw_threshold(steps, PATIENCE, f"patience\n= {PATIENCE}")
    for one, color in ((alone, GREY), (run, BLUE)):
        rate.plot(one.history["learning_rate"], color=color, lw=1.4)
    draw_threshold(rate, LOWEST_RATE, "min_lr")
    for rule, color in rules.items():
        draw_marks((loss, steps, rate), cuts[rule], color)
        loss.plot([], [], color=color, ls=":", label=f"cut by {rule}")
    if warmup:
        for axes in figure.axes:
            axes.axvspan(0, warmup, color=GREY, alpha=0.2, lw=0)
        steps.text(warmup / 2, 1, "warm-up", ha="center", fontsize=9)
    add_legend(loss, columns=5)
    return figure


def plot_plateau() -> Figure:
    """Patience on a rate thirty times too high."""
    meta, steps = mo.plateau(patience=PATIENCE, min_lr=LOWEST_RATE), 600
    run = train(plain(mo.with_decisions(meta)), steps)
    alone = train(plain(mo.log_only(meta)), steps)
    report("plateau", run, 24, grad_norm=run.history["grad_norm"].max())
    report("plateau, left alone", alone, grad_norm=alone.history["grad_norm"].max())
    return draw_plateau_run("plateau(patience=20, min_lr=1e-4)", run, alone)


def plot_advanced_plateau() -> Figure:
    """Warm-up, patience and trend on the same rate."""
    warmup, steps = 50, 600
    meta = mo.advanced_plateau(patience=PATIENCE, trend_window=20, min_lr=LOWEST_RATE)
    run = train(plain(mo.with_decisions(meta)), steps)
    ramp = optax.linear_schedule(HIGH_RATE / warmup, HIGH_RATE, warmup - 1)
    alone = train(plain(mo.log_only(meta), ramp), steps)
    report("advanced_plateau", run, 24, grad_norm=run.history["grad_norm"].max())
    report("advanced_plateau, warm-up alone", alone, grad_norm=alone.history["grad_norm"].max())
    title = "advanced_plateau(patience=20, trend_window=20, min_lr=1e-4)"
    return draw_plateau_run(title, run, alone, warmup=warmup)


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
    *(plot_plateau, plot_advanced_plateau, plot_expert_gate, plot_smart_expert_gate),
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
