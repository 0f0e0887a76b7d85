"""Pieces of pictures: curves, bands, heat maps and their axes, drawn on axes that are given."""

import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Real

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    # Matplotlib is imported where a figure is made, so that logs can be read without it.
    Axes = Figure = Any

# Okabe and Ito's colours, which stay apart for colour-blind readers and in print.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
COLORS = (BLUE, RED, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", GREY)
# Groups may share a value: the wider line, of the plain one, stays visible beneath the others.
WIDE, NARROW = 4.0, 1.8

Curve = Float[np.ndarray, " rows"]
Steps = Real[np.ndarray, " rows"]


def make_figure(panels: int, columns: int, title: str = "") -> tuple[Figure, list[Axes]]:
    """A figure of panels in so many columns, the first of each row leftmost, and its axes.

    Raises:
      ImportError: if matplotlib is missing; the message says what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'meta_optax.analysis needs matplotlib to draw: pip install "meta-optax[compare]".'
        ) from error
    rows = -(-panels // columns)
    size = (10.0, 2.6 * rows + 0.9) if columns == 1 else (6.2 * columns, 3.4 * rows + 0.5)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[panels:]:
        axes.remove()
    if title:
        figure.suptitle(title)
    return figure, grid[:panels]


def save(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    """Writes the figure where it is wanted; the format is that of the name's ending."""
    if path is not None:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def draw_line(axes: Axes, steps: Steps, values: Curve, **style: Any) -> Any:
    """Draws values over steps, without those that are not finite; a lone one as a point.

    Args:
      axes: what to draw on, of matplotlib.
      steps: the steps.
      values: one a step.
      **style: what ``axes.plot`` takes.

    Returns:
      The line.

    Example:
      >>> import matplotlib.figure, numpy as np
      >>> from meta_optax import analysis
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> line = analysis.draw_line(axes, np.array([0, 10, 20]), np.array([2.0, np.nan, 1.0]))
      >>> print(line.get_xdata())
      [ 0 20]
    """
    shown = np.isfinite(values)
    # A point between two that are not finite has no line; it would not show.
    style = {"marker": "o" if shown.sum() == 1 else "", **style}
    (line,) = axes.plot(steps[shown], values[shown], **style)
    return line


def draw_loss(axes: Axes, steps: Steps, losses: Mapping[str, Curve]) -> None:
    """Draws a loss, on a logarithmic axis where it is above 0 and spans a factor of 3.

    Args:
      axes: what to draw on, of matplotlib.
      steps: the steps.
      losses: by label, one loss; or the loss of each batch and then a smoothed one.

    Example:
      >>> import matplotlib.figure, numpy as np
      >>> from meta_optax import analysis
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> analysis.draw_loss(axes, np.array([0, 10]), {"loss": np.array([2.0, 0.1])})
      >>> print(axes.get_yscale())
      log
    """
    styles = ({"color": GREY, "lw": 0.8}, {"color": BLUE, "lw": 1.8})
    for (label, values), style in zip(losses.items(), styles[-len(losses) :], strict=True):
        draw_line(axes, steps, values, label=label, **style)
    set_log_axis(axes, np.concatenate([*losses.values()]))
    axes.set(title="Loss", xlabel="step")
    if len(losses) > 1:
        axes.legend(loc="upper right")


def draw_rates(axes: Axes, steps: Steps, rates: Mapping[str, Curve]) -> None:
    """Draws learning rates by label, the plain group's first, on a logarithmic axis.

    Args:
      axes: what to draw on, of matplotlib.
      steps: the steps.
      rates: the values of up to eight groups.

    Example:
      >>> import matplotlib.figure, numpy as np
      >>> from meta_optax import analysis
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> rates = {"dense": np.array([0.1, 0.05]), "gate": np.array([0.01, 0.01])}
      >>> analysis.draw_rates(axes, np.array([0, 10]), rates)
      >>> print([text.get_text() for text in axes.get_legend().get_texts()])
      ['dense', 'gate']
    """
    widths = (WIDE, *(NARROW for _ in rates))
    for (label, values), color, width in zip(rates.items(), COLORS, widths, strict=False):
        draw_line(axes, steps, values, color=color, lw=width, label=label)
    axes.set(title="Learning rate by group", xlabel="step", yscale="log")
    # Room above the lines, so that none runs behind the legend.
    axes.set_ylim(top=3 * axes.get_ylim()[1])
    axes.legend(loc="upper center", ncols=3)


def draw_usage(axes: Axes, steps: Steps, usage: Float[np.ndarray, "rows experts"]) -> None:
    """Draws the experts' shares of the load over time, a row an expert; what is NaN stays grey.

    Args:
      axes: what to draw on, of matplotlib; a scale of colours goes beside it.
      steps: the steps, at least one.
      usage: the shares, [steps, experts].

    Example:
      >>> import matplotlib.figure, numpy as np
      >>> from meta_optax import analysis
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> analysis.draw_usage(axes, np.array([0, 10]), np.array([[0.5, 0.5], [0.9, 0.1]]))
      >>> print(axes.yaxis_inverted(), axes.get_title())
      True Expert usage
    """
    experts = usage.shape[1]
    # A row's colour reaches half-way to its neighbours; a lone one gets a step.
    last = max(steps[-1], steps[0] + 1.0)
    edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, [last]])
    even = 1.0 / experts
    highest = max(2 * even, float(np.nanmax(usage, initial=0.0)))
    shares = np.ma.masked_invalid(usage.T)
    mesh = axes.pcolormesh(edges, np.arange(experts + 1) - 0.5, shares, vmin=0.0, vmax=highest)
    axes.set_facecolor(GREY)
    # Of many experts each so-manieth is named: sixteen labels stand apart, more would not.
    ticks = range(0, experts, -(-experts // 16))
    axes.set(title="Expert usage", xlabel="step", ylabel="expert", yticks=ticks)
    axes.invert_yaxis()
    axes.figure.colorbar(mesh, ax=axes, label=f"share of slots (even: {even:.3g})")


def set_log_axis(axes: Axes, drawn: Float[np.ndarray, " values"]) -> None:
    """Makes the y axis logarithmic, labelled in plain numbers, where values span a factor of 3.

    The first steps of a loss would flatten all that follows on a linear axis. What is not above 0
    everywhere, or spans less, stays linear.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    values = drawn[np.isfinite(drawn)]
    if not values.size or values.min() <= 0 or values.max() < 3 * values.min():
        return
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    if highest > 1e4 * lowest:
        return  # Powers of ten are all there is room for.
    narrow = highest < 30 * lowest  # A wider range has room for fewer labels a decade.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def add_legend(axes: Axes) -> None:
    """The legend on the right of a panel, where nothing is drawn."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
