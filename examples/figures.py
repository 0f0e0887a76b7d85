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

from meta_optax import analysis
from meta_optax.analysis import BLUE, GREEN, GREY, RED

Records = Sequence[dict[str, Any]]
Draw = Callable[[Axes, Records], None]

# The scripts that draw pages take these from here.
__all__ = ["BLUE", "GREEN", "GREY", "RED"]


def column(records: Records, name: str) -> np.ndarray:
    """Returns one logged quantity over all records."""
    return np.asarray([record[name] for record in records], float)


def draw_line(axes: Axes, records: Records, name: str, **style: Any) -> Line2D:
    """Draws one logged quantity over the steps; a lone record as a point, or it would not show."""
    return analysis.draw_line(axes, column(records, "step"), column(records, name), **style)


def draw_loss(axes: Axes, records: Records, *, unit: str) -> None:
    """Draws the loss of each logged batch, and the smoothed one that the controller was shown."""
    losses = {"one batch": "loss", "smoothed": "smoothed_loss"}
    curves = {label: column(records, name) for label, name in losses.items()}
    analysis.draw_loss(axes, column(records, "step"), curves)
    axes.set_ylabel(unit)


def draw_rates(axes: Axes, records: Records, *, dense: str = "dense") -> None:
    """Draws the learning rate of every group on a logarithmic axis; `dense` names the plain one."""
    names = {dense: "", "gate": "gate_", "expert": "expert_"}
    rates = {label: column(records, f"{form}learning_rate") for label, form in names.items()}
    analysis.draw_rates(axes, column(records, "step"), rates)


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
    analysis.draw_usage(axes, column(records, "step"), column(records, "expert_usage"))


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
