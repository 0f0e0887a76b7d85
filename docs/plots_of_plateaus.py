"""The plots of the strategies that watch the loss alone, and of the protection from spikes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from plot_tools import (
    BLUE,
    GREEN,
    GREY,
    HIGH_RATE,
    LEARNING_RATE,
    LOWEST_RATE,
    RED,
    SEED,
    Run,
    add_legend,
    draw_marks,
    draw_threshold,
    make_panels,
    moved,
    plain,
    report,
    smoothed,
    train,
)

import meta_optax as mo

PATIENCE = 20
WILD_STEP, BROKEN_STEP = 200, 350
_LOSS_AND_RATE = ("loss, smoothed,", "learning rate")


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


def plot_trend_plateau() -> Figure:
    """At a rate that is right, and at one thirty times too high, beside `plateau`."""
    by_patience = mo.plateau(patience=PATIENCE, min_lr=LOWEST_RATE)
    arms = {
        "left alone": (mo.log_only(by_patience), GREY),
        "plateau(patience=20)": (mo.with_decisions(by_patience), RED),
        "trend_plateau(window=64)": (
            mo.with_decisions(mo.trend_plateau(window=64, min_lr=LOWEST_RATE)),
            GREEN,
        ),
        "trend_plateau()": (mo.with_decisions(mo.trend_plateau(min_lr=LOWEST_RATE)), BLUE),
    }
    labels = [f"{name}\nfrom {base}" for base in ("3e-3", "0.1") for name in _LOSS_AND_RATE]
    title = "plateau and trend_plateau, min_lr=1e-4: a good rate and one thirty times too high"
    figure, panels = make_panels(title, labels)
    for base, (loss, rate) in zip(
        (LEARNING_RATE, HIGH_RATE), (panels[:2], panels[2:]), strict=True
    ):
        for name, (strategy, color) in arms.items():
            run = train(plain(strategy, base), 1000)
            decisions = 0 if name == "left alone" else 12
            report(f"{name} from {base}", run, decisions, rate=run.history["learning_rate"][-1])
            _draw_loss_and_rate(loss, rate, run, color, name)
        draw_threshold(rate, LOWEST_RATE, "min_lr")
    add_legend(panels[0])
    return figure


def _draw_loss_and_rate(loss: Axes, rate: Axes, run: Run, color: str, name: str) -> None:
    """The loss, smoothed so that arms can be told apart, and the rate."""
    # What equals the run left alone is drawn over it and must leave it visible.
    width = 3.0 if color == GREY else 1.3
    loss.plot(smoothed(run.history["value"], 0.95), color=color, lw=width, label=name)
    rate.plot(run.history["learning_rate"], color=color, lw=width)
    for axes in (loss, rate):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def plot_greedy() -> Figure:
    """From a rate ten times too low, and from one thirty times too high."""
    eager = {"patience": 0, "window": 64, "significance": 1e-3}
    arms = {
        "left alone": (mo.log_only(mo.greedy()), GREY),
        "greedy()": (mo.with_decisions(mo.greedy()), BLUE),
        "greedy(window=64, significance=1e-3)": (
            mo.with_decisions(mo.greedy(**eager)),
            RED,
        ),
    }
    labels = [f"{name}\nfrom {base}" for base in ("3e-4", "0.1") for name in _LOSS_AND_RATE]
    low = LEARNING_RATE / 10
    title = "greedy, at a rate ten times too low and at one thirty times too high"
    figure, panels = make_panels(title, labels)
    for base, (loss, rate) in zip((low, HIGH_RATE), (panels[:2], panels[2:]), strict=True):
        for name, (strategy, color) in arms.items():
            run = train(plain(strategy, base), 1000)
            decisions = 0 if name == "left alone" else 24
            report(f"{name} from {base:g}", run, decisions, rate=run.history["learning_rate"][-1])
            _draw_loss_and_rate(loss, rate, run, color, name)
        draw_threshold(rate, 3.0 * base, "max_scale")
        draw_threshold(rate, 0.1 * base, "min_scale")
    add_legend(panels[0])
    return figure


def spoil(step: Array, batch: dict[str, Array]) -> dict[str, Array]:
    """One batch with shuffled labels and inputs a hundred times too large, and one of NaN."""
    wild = step == WILD_STEP
    size = jnp.where(wild, 100.0, jnp.where(step == BROKEN_STEP, jnp.nan, 1.0))
    shuffled = jax.random.permutation(jax.random.key(SEED), batch["digit"])
    return {
        "pixels": size * batch["pixels"],
        "digit": jnp.where(wild, shuffled, batch["digit"]),
    }


def plot_skip_spikes() -> Figure:
    """Two spoilt batches, with their updates made and dropped, and training without them."""
    idle = mo.log_only(mo.plateau())
    tx = plain(idle, LEARNING_RATE)
    runs = {
        "no batch spoilt": (train(tx, 600), GREY),
        "update made": (train(tx, 600, spoil=spoil), RED),
        "skip_spikes": (train(mo.skip_spikes(tx), 600, spoil=spoil), BLUE),
    }
    title = "One wild batch and one of NaN, under skip_spikes(adamw) and under AdamW alone"
    figure, (loss, norm) = make_panels(title, ("loss of a batch", "gradient norm"))
    for name, (run, color) in runs.items():
        values = run.history["value"]
        before, after = values[WILD_STEP - 50 : WILD_STEP], values[WILD_STEP + 1 : BROKEN_STEP]
        report(
            name,
            run,
            wild=values[WILD_STEP],
            before=before.mean(),
            between=after.mean(),
            peak=after.max(),
            norm=run.history["grad_norm"][WILD_STEP],
            nonfinite=(~np.isfinite(values)).sum(),
        )
        for axes, metric in ((loss, "value"), (norm, "grad_norm")):
            # The run that it is to equal lies beneath, and must stay visible.
            width = 3.0 if color == GREY else 0.9
            axes.plot(run.history[metric], color=color, lw=width, label=name)
            axes.set_yscale("log")
    # The wild batch leaves the panels: on the axis that it needs nothing else is to be seen.
    for axes, metric, limits in ((loss, "value", (0.01, 4)), (norm, "grad_norm", (0.05, 4))):
        axes.set_ylim(*limits)
        axes.yaxis.set_major_formatter("{x:g}")
        height = runs["skip_spikes"][0].history[metric][WILD_STEP]
        axes.text(WILD_STEP + 4, 0.6 * limits[1], f"wild batch: {height:.0f}", fontsize=9)
        axes.text(BROKEN_STEP + 4, 0.6 * limits[1], "NaN batch", fontsize=9)
    state = runs["skip_spikes"][0].state
    print(f"skipped {state.skipped_count}, of which not finite {state.nonfinite_count}")
    add_legend(loss)
    draw_marks((loss, norm), (WILD_STEP, BROKEN_STEP))
    return figure
