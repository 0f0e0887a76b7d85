"""The picture of a run: four panels drawn from its logged records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command_line import writing
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

Records = Sequence[dict[str, Any]]

# Okabe and Ito's colours, which stay apart for colour-blind readers and in print.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"

RATES = {
    "dense": ("learning_rate", BLUE),
    "gate": ("gate_learning_rate", RED),
    "expert": ("expert_learning_rate", GREEN),
}


def column(records: Records, name: str) -> np.ndarray:
    """Returns one logged quantity over all records."""
    return np.asarray([record[name] for record in records], float)


def draw_line(axes: Axes, records: Records, name: str, **style: Any) -> Line2D:
    """Draws one logged quantity over the steps; a lone record as a point, or it would not show."""
    marker = "o" if len(records) == 1 else ""
    (line,) = axes.plot(column(records, "step"), column(records, name), marker=marker, **style)
    return line


def draw_loss(axes: Axes, records: Records) -> None:
    """Draws the loss of each logged batch, and the smoothed one that the controller was shown."""
    draw_line(axes, records, "loss", color=GREY, lw=0.8, label="one batch")
    draw_line(axes, records, "smoothed_loss", color=BLUE, lw=1.8, label="smoothed")
    # The first steps would flatten all that follows on a linear axis.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(title="Loss", ylabel="nats per byte")
    axes.legend(loc="upper right")


def draw_rates(axes: Axes, records: Records) -> None:
    """Draws the learning rate of every group on a logarithmic axis."""
    widths = (4.0, 1.8, 1.8)  # Groups may share a rate: the wider line stays visible beneath.
    for (group, (name, color)), width in zip(RATES.items(), widths, strict=True):
        draw_line(axes, records, name, color=color, lw=width, label=group)
    axes.set(title="Learning rate by group", yscale="log")
    axes.legend(loc="best")


def draw_gate(axes: Axes, records: Records) -> None:
    """Draws gate entropy, and on a second axis the share of decided tokens."""
    experts = len(records[0]["expert_usage"])
    entropy = draw_line(axes, records, "gate_entropy", color=BLUE, lw=1.8, label="entropy (left)")
    # A quarter of headroom over what is possible, so that no line ever runs behind the legend.
    axes.set(title="Router", ylabel="entropy, nats", ylim=(0, 1.25 * np.log(experts)))
    axes.yaxis.label.set_color(BLUE)
    right = axes.twinx()
    sparsity = draw_line(
        right, records, "gate_sparsity", color=RED, lw=1.8, label="sparsity (right)"
    )
    right.set(ylabel="share of tokens with top p > 0.5", ylim=(0, 1.25))
    right.yaxis.label.set_color(RED)
    axes.legend(handles=[entropy, sparsity], loc="upper center", ncols=2)


def draw_usage(axes: Axes, records: Records) -> None:
    """Draws the experts' shares of the load over time."""
    usage = np.stack([record["expert_usage"] for record in records], axis=1)
    steps, experts = column(records, "step"), len(usage)
    # A record's colour reaches half-way to its neighbours; a lone one gets a step.
    edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, [max(steps[-1], 1.0)]])
    even = 1.0 / experts
    highest = max(2 * even, float(usage.max()))
    mesh = axes.pcolormesh(edges, np.arange(experts + 1) - 0.5, usage, vmin=0.0, vmax=highest)
    axes.set(title="Expert usage", ylabel="expert", yticks=range(experts))
    axes.invert_yaxis()
    axes.figure.colorbar(mesh, ax=axes, label=f"share of slots (even: {even:.3g})")


def draw_run(records: Records, title: str, path: Path) -> None:
    """Writes the four panels of a run as a PNG.

    Args:
        records: what was logged; at least one.
        title: the heading over the panels.
        path: where to write it.
    """
    figure = Figure(figsize=(11, 7.5), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, draw in zip(panels.flat, (draw_loss, draw_rates, draw_gate, draw_usage), strict=True):
        draw(axes, records)
        axes.set_xlabel("step")
    figure.suptitle(title)
    with writing(path):
        figure.savefig(path)
