"""The picture of a run: panels drawn from its logged records."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command_line import writing
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

Records = Sequence[dict[str, Any]]
Draw = Callable[[Axes, Records], None]

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


def draw_loss(axes: Axes, records: Records, *, unit: str) -> None:
    """Draws the loss of each logged batch, and the smoothed one that the controller was shown."""
    draw_line(axes, records, "loss", color=GREY, lw=0.8, label="one batch")
    draw_line(axes, records, "smoothed_loss", color=BLUE, lw=1.8, label="smoothed")
    # The first steps would flatten all that follows on a linear axis.
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    narrow = highest < 30 * lowest  # A wider range has room for fewer labels a decade.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(title="Loss", xlabel="step", ylabel=unit)
    axes.legend(loc="upper right")


def draw_rates(axes: Axes, records: Records, *, dense: str = "dense") -> None:
    """Draws the learning rate of every group on a logarithmic axis; `dense` names the plain one."""
    names = {"dense": dense}
    widths = (4.0, 1.8, 1.8)  # Groups may share a rate: the wider line stays visible beneath.
    for (group, (name, color)), width in zip(RATES.items(), widths, strict=True):
        draw_line(axes, records, name, color=color, lw=width, label=names.get(group, group))
    axes.set(title="Learning rate by group", xlabel="step", yscale="log")
    # Room above the lines, so that none runs behind the legend.
    axes.set_ylim(top=3 * axes.get_ylim()[1])
    axes.legend(loc="upper center", ncols=3)


def draw_gate(axes: Axes, records: Records, *, unit: str = "tokens") -> None:
    """Draws gate entropy, and on a second axis the share of tokens, or the like, decided."""
    experts = len(records[0]["expert_usage"])
    entropy = draw_line(axes, records, "gate_entropy", color=BLUE, lw=1.8, label="entropy (left)")
    # A quarter of headroom over what is possible, so that no line ever runs behind the legend.
    axes.set(title="Router", xlabel="step", ylabel="entropy, nats")
    axes.set_ylim(0, 1.25 * np.log(experts))
    axes.yaxis.label.set_color(BLUE)
    right = axes.twinx()
    sparsity = draw_line(
        right, records, "gate_sparsity", color=RED, lw=1.8, label="sparsity (right)"
    )
    right.set(ylabel=f"share of {unit} with top p > 0.5", ylim=(0, 1.25))
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
    axes.set(title="Expert usage", xlabel="step", ylabel="expert", yticks=range(experts))
    axes.invert_yaxis()
    axes.figure.colorbar(mesh, ax=axes, label=f"share of slots (even: {even:.3g})")


def draw_accuracy(axes: Axes, records: Records) -> None:
    """Draws how many of each logged batch, and of the test's samples, are told right."""
    draw_line(axes, records, "accuracy", color=GREY, lw=0.8, label="one batch")
    draw_line(axes, records, "test_accuracy", color=BLUE, lw=1.8, label="test")
    # The first steps would flatten all that follows.
    lowest = float(np.quantile(column(records, "test_accuracy"), 0.1)) - 0.02
    axes.set(title="Accuracy", xlabel="step", ylabel="share told right", ylim=(lowest, 1.005))
    axes.legend(loc="lower right")


def draw_graph(axes: Axes, records: Records, *, adjacency: np.ndarray) -> None:
    """Draws how much each expert speaks for, or against, each other one at the end of the run."""
    del records
    experts = len(adjacency)
    # Nobody reads the diagonal, so it is left blank. Zero is white, whatever the extremes.
    edges = np.ma.masked_array(adjacency, mask=np.eye(experts, dtype=bool))
    highest = max(float(np.abs(edges).max()), 1e-3)
    image = axes.imshow(edges, cmap="RdBu_r", vmin=-highest, vmax=highest)
    axes.set_facecolor(GREY)
    ticks = range(experts)
    axes.set(title="Adjacency at the end", xlabel="expert spoken for, i", xticks=ticks)
    axes.set(ylabel="expert that speaks, j", yticks=ticks)
    axes.figure.colorbar(image, ax=axes, label="A[j, i]")


def draw_run(records: Records, panels: Sequence[Draw], title: str, path: Path) -> None:
    """Writes the panels of a run as a PNG, in two rows.

    Args:
        records: what was logged; at least one.
        panels: draw one panel each, given its axes and the records.
        title: the heading over the panels.
        path: where to write it.
    """
    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(5.5 * columns, 7.5), dpi=120, layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for axes, draw in zip(grid.flat, panels, strict=True):
        draw(axes, records)
    figure.suptitle(title)
    with writing(path):
        figure.savefig(path)
