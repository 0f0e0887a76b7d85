"""The plots of the strategies whose policy draws, or was learned."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from plot_tools import (
    BLUE,
    GREEN,
    GREY,
    HIGH_RATE,
    LEARNING_RATE,
    RED,
    Run,
    Watch,
    add_legend,
    make_panels,
    plain,
    report,
    smoothed,
    train,
)

import meta_optax as mo
from meta_optax._policy import logits_of

# `reinforce` decides at step 0 too, but every action is as likely then as it is at 10.
STEPS, FIRST_DECISION = 1000, 10
SEEDS = {0: BLUE, 1: RED, 2: GREEN}


def _chances_of_reinforce(state: Any) -> dict[str, jax.Array]:
    """How likely the last look's policy found it to halve the rate, to keep it, to double it."""
    (meta,) = [leaf for leaf in _nodes(state) if hasattr(leaf, "policy")]
    chances = jax.nn.softmax(logits_of(meta.policy, meta.features))
    # Pairs of a factor and a step of weight decay, in rows of one factor.
    return {"chances": chances.reshape(3, -1).sum(axis=1)}


def _chances_of_policy_gradient(state: Any) -> dict[str, jax.Array]:
    """How likely the last decision was to cut the rate, to keep it, to raise it."""
    (meta,) = [leaf for leaf in _nodes(state) if hasattr(leaf, "choice")]
    return {"chances": meta.choice.likely.rate_head}


def _nodes(state: Any) -> list[Any]:
    """The tuples with named fields in a state, all of them."""
    found = [state] if hasattr(state, "_fields") else []
    parts = state.values() if isinstance(state, dict) else state
    return found + [
        node for part in parts if isinstance(part, tuple | dict) for node in _nodes(part)
    ]


def _draw_run(panels: Sequence[Axes], run: Run, color: str, name: str) -> None:
    """The loss, smoothed so that arms can be told apart, and the rate."""
    loss, rate = panels
    loss.plot(smoothed(run.history["value"], 0.95), color=color, lw=1.3, label=name)
    rate.plot(run.history["learning_rate"], color=color, lw=1.3)
    for axes in panels:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_chances(axes: Axes, run: Run, names: Sequence[str]) -> None:
    """How likely each of the three moves of the rate was, stacked, over the steps."""
    steps = np.arange(FIRST_DECISION, STEPS)
    chances = run.history["chances"][FIRST_DECISION:].T
    axes.stackplot(steps, chances, labels=names, colors=(RED, GREY, BLUE), alpha=0.5, lw=0)
    axes.set_ylim(0.0, 1.0)


def _train_seeds(
    make: Callable[..., mo.MetaOptimizer], base: float, watch: Watch, panels: Sequence[Axes]
) -> Run:
    """Draws the run left alone and one for each seed of the draws; returns the first of those."""
    runs = {"left alone": (mo.log_only(make()), GREY)}
    runs |= {f"seed {n}": (mo.with_decisions(make(seed=n), 256), c) for n, c in SEEDS.items()}
    watched = []
    for name, (strategy, color) in runs.items():
        run = train(plain(strategy, base), STEPS, watch=watch)
        rate = run.history["learning_rate"][-1]
        report(f"{make.__name__} from {base:g}, {name}", run, 3 * (color != GREY), rate=rate)
        _draw_run(panels, run, color, name)
        watched.append(run)
    print("chances of seed 0 at the end:", watched[1].history["chances"][-1])
    return watched[1]


def plot_reinforce() -> Figure:
    """A rate that is right, under three seeds of the draws."""
    labels = ("loss, smoothed", "learning rate", "chances,\nseed 0")
    figure, panels = make_panels("reinforce(), from a good rate of 3e-3", labels)
    run = _train_seeds(mo.reinforce, LEARNING_RATE, _chances_of_reinforce, panels[:2])
    _draw_chances(panels[2], run, ("halve", "keep", "double"))
    add_legend(panels[0])
    add_legend(panels[2])
    return figure


def plot_policy_gradient() -> Figure:
    """From a rate ten times too low, and from one thirty times too high."""
    low = LEARNING_RATE / 10
    bases = ("3e-4", "0.1")
    labels = [f"{name}\nfrom {base}" for base in bases for name in ("loss, smoothed,", "rate")]
    title = "policy_gradient(), at a rate ten times too low and at one thirty times too high"
    figure, panels = make_panels(title, [*labels, "chances,\nseed 0\nfrom 0.1"])
    watch = _chances_of_policy_gradient
    _train_seeds(mo.policy_gradient, low, watch, panels[:2])
    run = _train_seeds(mo.policy_gradient, HIGH_RATE, watch, panels[2:4])
    _draw_chances(panels[4], run, ("cut", "keep", "raise"))
    add_legend(panels[0])
    add_legend(panels[4])
    return figure


def plot_learned() -> Figure:
    """From rates ten times too low, right and thirty times too high, each on a linear schedule."""
    title = "learned(horizon=1000) on a linear schedule, and (dashed) the schedule alone"
    figure, panels = make_panels(title, ("loss, smoothed", "learning rate", "scale"))
    for base, color in ((LEARNING_RATE / 10, GREEN), (LEARNING_RATE, BLUE), (HIGH_RATE, RED)):
        schedule = optax.linear_schedule(base, 0.0, STEPS)
        strategy = mo.learned(horizon=STEPS)
        run = train(plain(mo.with_decisions(strategy, 256), schedule), STEPS)
        alone = train(plain(mo.log_only(strategy), schedule), STEPS)
        report(
            f"learned from {base:g}",
            run,
            3,
            scale=run.history["learning_rate"][-2] / alone.history["learning_rate"][-2],
        )
        report(f"the schedule alone from {base:g}", alone)
        _draw_run(panels[:2], run, color, f"from {base:g}")
        panels[0].plot(smoothed(alone.history["value"], 0.95), color=color, lw=1.0, ls="--")
        panels[1].plot(alone.history["learning_rate"], color=color, lw=1.0, ls="--")
        rates = run.history["learning_rate"], alone.history["learning_rate"]
        panels[2].plot(rates[0] / rates[1], color=color, lw=1.3)
    # The schedule ends at 0, which has no logarithm.
    panels[1].set_ylim(bottom=1e-6)
    panels[2].set_yscale("log")
    panels[2].axhline(1.0, color="black", lw=0.8, ls=":")
    add_legend(panels[0])
    return figure
