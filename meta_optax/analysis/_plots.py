"""Pictures of one run: its hyperparameters with what was decided, and its routers."""

import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from meta_optax._core import any_layer, plain_name
from meta_optax.analysis import _draw
from meta_optax.analysis._draw import Axes, Curve, Figure
from meta_optax.analysis._load import Log, load_log

# The keys of a loss, the likeliest first: `value` is what strategies call it.
LOSSES = ("value", "loss")
# What MetricsWriter puts before the names of hyperparameters, and those that a log without such
# prefixes has them under.
_PREFIX = "hyperparams/"
_BARE = ("learning_rate", "weight_decay", "learning_rate_scale", "aux_loss_weight")
_MARKS = "ov^sDP*X<>"
_MOST_REASONS = 12  # that a legend names; layers have reasons of their own
# The panels of routing: title, quantities, and where the axis ends if all are shares.
_ROUTING = (
    ("Gate entropy, nats", ("gate_entropy",), None),
    (
        "Entropies over their maximum, and sparsity",
        ("gate_entropy_normalized", "load_entropy_normalized", "gate_sparsity"),
        1.05,
    ),
    ("Unevenness of the load", ("max_violation", "load_cv"), None),
    ("Shares of experts dead, of slots dropped", ("dead_experts", "drop_fraction"), None),
)

Values = Mapping[str, Float[np.ndarray, "rows ..."]]


class _Series(NamedTuple):
    """A quantity over the steps, with the least and the most over its layers or entries."""

    low: Curve
    mean: Curve
    high: Curve


def as_log(log: Log | str | os.PathLike[str]) -> Log:
    """The log itself, or the one at a path."""
    return log if isinstance(log, Log) else load_log(log)


def is_curve(log: Log, name: str) -> bool:
    """Whether the log has one number a row under that name."""
    return name in log.values and log.values[name].ndim == 1


def plot_hyperparameters(
    log: Log | str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draws each hyperparameter over the steps, and marks what was decided.

    Panels, from the top: the loss, if there is one; the learning rates of all groups, on a
    logarithmic axis; the weight decays; and each other hyperparameter that changed. Those that did
    not are named with their values beneath. Where layers differ, the mean is a line, and a band
    reaches from the least to the most. A mark is a decision, at its step and new value; the legend
    at the bottom counts them by reason.

    Args:
      log: what `load_log` gave, or the path of a log.
      path: where to write the figure, as PNG, PDF or SVG by its ending; nowhere by default.

    Returns:
      The figure, of matplotlib.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if the log has neither hyperparameters nor decisions.

    Example:
      >>> import meta_optax as mo, numpy as np, pathlib
      >>> from meta_optax import analysis
      >>> cut = mo.Decision(10, "learning_rate", 0.1, 0.05, "plateau: patience")
      >>> values = {"loss": np.array([2.0, 1.0]), "learning_rate": np.array([0.1, 0.05])}
      >>> log = analysis.Log(pathlib.Path("a run"), np.array([0, 10]), values, [cut])
      >>> figure = analysis.plot_hyperparameters(log)
      >>> print([axes.get_ylabel() for axes in figure.axes])
      ['loss', 'learning rate']
      >>> print([text.get_text() for text in figure.legends[0].get_texts()])
      ['plateau: patience (1)']
    """
    log = as_log(log)
    panels, unchanged = _hyperparam_panels(log)
    loss = next((name for name in LOSSES if is_curve(log, name)), None)
    figure, grid = _draw.make_figure(len(panels) + bool(loss), 1, _title(log))
    for axes in grid[:-1]:
        axes.sharex(grid[-1])
    if loss:
        _draw_losses(grid[0], log, loss)
    looks = _looks(log)
    for axes, (plain, members) in zip(grid[bool(loss) :], panels.items(), strict=True):
        for name, series in members.items():
            first = name == plain and len(members) > 1
            wide = {"lw": _draw.WIDE, "zorder": 1.5} if first else {}
            dashes = "--" if "_*_" in name else "-"  # A group's layers have its colour.
            _draw_series(axes, log, series, label=name, color=_color(name), ls=dashes, **wide)
            _mark_decisions(axes, log, name, looks)
        axes.set(ylabel=plain.replace("_", " "))
        lows = np.concatenate([series.low for series in members.values()])
        if plain == "learning_rate" and np.any(lows > 0):
            axes.set_yscale("log", nonpositive="mask")
        _draw.add_legend(axes)
    beneath = textwrap.wrap(unchanged, 100, break_on_hyphens=False)
    grid[-1].set_xlabel("\n".join(["step", *beneath]))
    if looks:
        reasons = _reasons(log, looks)
        figure.legend(handles=reasons, loc="outside lower left", ncols=2)
        # Panels keep their height, however many reasons there are.
        figure.set_figheight(figure.get_figheight() + 0.12 * len(reasons) + 0.2 * len(beneath))
    _draw.save(figure, path)
    return figure


def plot_routing(
    log: Log | str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draws what `router_metrics` says of the routers, as far as the log has it.

    Panels: the gate entropy; normalised entropies and sparsity; how uneven the load is; the shares
    of dead experts and of dropped slots; the load of each expert. Where the log has values per
    layer (``gate_entropy_per_layer``), a band reaches from the least layer to the most. Where it
    has the experts' least, mean and most alone (more than 16 of them), so does the load's.

    Args:
      log: what `load_log` gave, or the path of a log.
      path: where to write the figure, as PNG, PDF or SVG by its ending; nowhere by default.

    Returns:
      The figure, of matplotlib.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if the log has nothing of routing.

    Example:
      >>> import numpy as np, pathlib
      >>> from meta_optax import analysis
      >>> values = {"expert_usage": np.array([[0.5, 0.5], [0.9, 0.1]])}
      >>> log = analysis.Log(pathlib.Path("a run"), np.array([0, 10]), values, [])
      >>> print([axes.get_title() for axes in analysis.plot_routing(log).axes])
      ['Expert usage', '']
    """
    log = as_log(log)
    panels = {title: (_routing(log.values, names), top) for title, names, top in _ROUTING}
    panels = {title: panel for title, panel in panels.items() if panel[0]}
    usage = _series(log.values, "expert_usage")
    count = len(panels) + (usage is not None)
    if not count:
        names = ", ".join(name for _, names, _ in _ROUTING for name in names)
        raise ValueError(
            f"{log.path} has nothing of routing: log meta_optax.router_metrics(...), one of "
            f"{names}, expert_usage."
        )
    figure, grid = _draw.make_figure(count, min(2, count), _title(log))
    for axes, (title, (members, top)) in zip(grid, panels.items(), strict=False):
        for (name, series), color in zip(members.items(), _draw.COLORS, strict=False):
            _draw_series(axes, log, series, label=name, color=color)
        axes.set(title=title, xlabel="step")
        top = top or max(axes.get_ylim()[1], 0.01)
        axes.set_ylim(-0.03 * top, top)  # A line at 0 stays apart from the axis.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    shares = log.values.get("expert_usage")
    if shares is not None and shares.ndim > 1:
        layers = tuple(range(1, shares.ndim - 1))
        _draw.draw_usage(grid[-1], log.steps, shares.mean(axis=layers) if layers else shares)
    elif usage is not None:
        _draw_series(grid[-1], log, usage, label="mean, from least to most", color=_draw.BLUE)
        grid[-1].set(title="Expert usage", xlabel="step", ylabel="share of slots")
        grid[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    _draw.save(figure, path)
    return figure


def _title(log: Log) -> str:
    return "/".join(log.path.parts[-2:])


def _series(values: Values, name: str) -> _Series | None:
    """A quantity, over all that it has beside the steps; None if it is not there."""
    parts = [f"{name}/{part}" for part in ("min", "mean", "max")]
    keys = [name] * 3 if name in values else [part for part in parts if part in values]
    if len(keys) < 3:
        return None
    low, mean, high = (values[key].reshape(len(values[key]), -1) for key in keys)
    return _Series(low=low.min(axis=1), mean=mean.mean(axis=1), high=high.max(axis=1))


def _routing(values: Values, names: Iterable[str]) -> dict[str, _Series]:
    """The quantities that there are, each with the spread over its layers if that is known."""
    found = {}
    for name in names:
        mean, layers = _series(values, name), _series(values, f"{name}_per_layer")
        if one := mean or layers:
            spread = layers or one
            found[name] = one._replace(low=spread.low, high=spread.high)
    return found


def _hyperparams(log: Log) -> dict[str, _Series]:
    """The hyperparameters by name, layers of a group under one (``gate_*_learning_rate``)."""
    prefixed = {
        key.removeprefix(_PREFIX): array
        for key, array in log.values.items()
        if key.startswith(_PREFIX)
    }
    decided = {any_layer(decision.hyperparam) for decision in log.decisions}
    own = prefixed or {
        key: array
        for key, array in log.values.items()
        if _plain(key) in _BARE or any_layer(key) in decided
    }
    nothing = np.full(len(log.steps), np.nan)
    series = {name: _Series(nothing, nothing, nothing) for name in sorted(decided)}
    alike: dict[str, list[np.ndarray]] = {}
    for key, array in own.items():
        if key.endswith(("/min", "/mean", "/max")):
            name = key.rpartition("/")[0]
            if (found := _series(own, name)) is not None:
                series[name] = found
        else:
            alike.setdefault(any_layer(key), []).append(array)
    for name, arrays in alike.items():
        stacked = np.stack(arrays, axis=1)
        if (found := _series({name: stacked}, name)) is not None:
            series[name] = found
    return series


def _plain(name: str) -> str:
    """The name without a group's prefix and without layers."""
    return plain_name(name.replace("_*_", "_"))


def _hyperparam_panels(log: Log) -> tuple[dict[str, dict[str, _Series]], str]:
    """The groups' series by plain name, rates and decays first; and what never changed, in words.

    Raises:
      ValueError: if there are none.
    """
    series = _hyperparams(log)
    if not series:
        raise ValueError(
            f"{log.path} has no hyperparameters: give MetricsWriter.write the optimizer's state, "
            "or log them as learning_rate, gate_learning_rate, ..."
        )
    panels: dict[str, dict[str, _Series]] = {}
    for name in sorted(series, key=lambda name: (len(name), name)):
        panels.setdefault(_plain(name), {})[name] = series[name]
    first = [name for name in ("learning_rate", "weight_decay") if name in panels]
    decided = {_plain(decision.hyperparam) for decision in log.decisions}
    others = [name for name in sorted(panels) if name not in first]
    still = [name for name in others if name not in decided and not _moves(panels[name].values())]
    if len(still) == len(panels):
        still = []  # They are all that there is to see.
    kept = {name: panels[name] for name in (*first, *others) if name not in still}
    values = [
        f"{name}={np.fmax.reduce(series[name].mean):g}" for plain in still for name in panels[plain]
    ]
    return kept, f"unchanged: {', '.join(values)}" if values else ""


def _moves(members: Iterable[_Series]) -> bool:
    """Whether any value differs from another of the same quantity."""
    arrays = [np.concatenate(series) for series in members]
    return any(np.unique(array[np.isfinite(array)]).size > 1 for array in arrays)


def _color(name: str) -> str:
    """A group's colour."""
    groups = {"gate": _draw.RED, "expert": _draw.GREEN}
    return groups.get(name.split("_")[0], _draw.BLUE)


def _draw_losses(axes: Axes, log: Log, name: str) -> None:
    """Draws the loss and, if there is one, what the controller was shown instead."""
    losses = {name: log.values[name]}
    if is_curve(log, "smoothed_loss"):
        losses["smoothed_loss"] = log.values["smoothed_loss"]
    labelled = {}
    for key, values in losses.items():
        missing = int((~np.isfinite(values)).sum())
        labelled[f"{key} (not finite in {missing} rows)" if missing else key] = values
    _draw.draw_loss(axes, log.steps, labelled)
    axes.set(title="", xlabel="", ylabel=name)
    _draw.add_legend(axes)


def _draw_series(axes: Axes, log: Log, series: _Series, **style: Any) -> None:
    """Draws the mean as a line, and a band where least and most differ."""
    _draw.draw_line(axes, log.steps, series.mean, **{"lw": _draw.NARROW, **style})
    if np.any(series.high > series.low):
        color = style["color"]
        axes.fill_between(log.steps, series.low, series.high, color=color, alpha=0.2, lw=0)


def _looks(log: Log) -> dict[str, dict[str, Any]]:
    """Marker and colour of each reason, the commonest first; those past the last share one."""
    reasons = Counter(decision.reason for decision in log.decisions).most_common()
    colors = [*_draw.COLORS[3:7], *_draw.COLORS[:3]]  # Those of the lines come last.
    return {
        reason: {
            "marker": "." if index >= _MOST_REASONS else _MARKS[index % len(_MARKS)],
            "color": _draw.GREY if index >= _MOST_REASONS else colors[index % len(colors)],
        }
        for index, (reason, _) in enumerate(reasons)
    }


def _mark_decisions(axes: Axes, log: Log, name: str, looks: Mapping[str, dict[str, Any]]) -> None:
    """Marks the decisions on a hyperparameter at their new values."""
    for reason, look in looks.items():
        marked = [d for d in log.decisions if (any_layer(d.hyperparam), d.reason) == (name, reason)]
        if marked:
            steps, values = [d.step for d in marked], [d.new for d in marked]
            axes.plot(steps, values, ls="", ms=4, mec="white", mew=0.3, zorder=3, **look)


def _reasons(log: Log, looks: Mapping[str, dict[str, Any]]) -> list[Any]:
    """What the legend says of the reasons, with how often each was given."""
    from matplotlib.lines import Line2D

    counts = Counter(decision.reason for decision in log.decisions)
    named, rest = list(looks)[:_MOST_REASONS], list(looks)[_MOST_REASONS:]
    texts = {reason: f"{reason} ({counts[reason]})" for reason in named}
    if rest:
        total = sum(counts[reason] for reason in rest)
        texts[rest[0]] = f"{len(rest)} other reasons ({total})"
    return [
        Line2D([], [], ls="", ms=6, label=text, **looks[reason]) for reason, text in texts.items()
    ]
