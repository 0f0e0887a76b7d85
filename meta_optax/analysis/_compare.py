"""Runs side by side: a table of where each ended, and their curves in one picture."""

import importlib.util
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from meta_optax import _checks
from meta_optax._checks import Mode
from meta_optax.analysis import _draw
from meta_optax.analysis._draw import Curve, Figure, Steps
from meta_optax.analysis._load import Log
from meta_optax.analysis._plots import LOSSES, as_log, is_curve

_LEAST_SEEDS = 3  # for an interval: two values say next to nothing of their spread
_HEADINGS = ("run", "seeds", "final", "95 % interval", "ratio", "best", "at step", "decisions")

Source = Log | str | os.PathLike[str]


class RunSummary(NamedTuple):
    """What one run, or one run's seeds, came to.

    Attributes:
      name: what the run is called.
      seeds: how many logs there are of it.
      final: the median over seeds of each seed's mean over the last tenth of its rows.
      interval: where that median is, with 95 %; None for fewer than three seeds.
      ratio: ``final`` over that of the first run; NaN if that is not above 0.
      best: the best of the median curve over seeds.
      best_step: its step; None if no value is finite.
      decisions: the decisions, of all seeds together.
      nonfinite: the rows whose value is not finite, of all seeds together.
      lost: the seeds without a finite value in the last tenth of their rows.
      target_step: the first step at which the median curve is at the target or better; None
        without a target, or if it never is.
    """

    name: str
    seeds: int
    final: float
    interval: tuple[float, float] | None
    ratio: float
    best: float
    best_step: int | None
    decisions: int
    nonfinite: int
    lost: int
    target_step: int | None = None


class Comparison(NamedTuple):
    """Runs side by side; `str` of it is a table.

    Attributes:
      metric: what is compared.
      runs: a summary a run, in the order given.
      figure: the curves, of matplotlib; None where that is missing and no ``path`` was given.
      target: the value whose first step was asked for; None if none was.
    """

    metric: str
    runs: tuple[RunSummary, ...]
    figure: Any
    target: float | None = None

    def __str__(self) -> str:
        """The table, with the rule by which it was made."""
        rows = [(*_HEADINGS, "not finite", "lost seeds"), *map(_cells, self.runs)]
        if self.target is not None:
            told = [run.target_step for run in self.runs]
            ends = [f"to {self.target:.4g}", *("-" if step is None else str(step) for step in told)]
            rows = [(*row, end) for row, end in zip(rows, ends, strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if index else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        note = (
            f"{self.metric}. final: mean over the last tenth of the rows, without what is not "
            "finite; median over seeds."
        )
        if any(run.interval is None for run in self.runs):
            note += f" No interval: fewer than {_LEAST_SEEDS} seeds with a final value."
        return "\n".join([*lines, note])


def compare_runs(
    logs: Mapping[str, Source | Sequence[Source]],
    metric: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    mode: Mode = "min",
    target: float | None = None,
) -> Comparison:
    r"""Compares runs by one logged metric, each of one seed or of several.

    With :math:`x_{si}` the metric of seed s in row i of the n that have it, and the sum over the
    finite ones among the last :math:`\lceil n / 10 \rceil` rows,

    .. math::
      \text{final} = \operatorname{median}_s \operatorname{mean}_{i > n - \lceil n/10 \rceil}
      x_{si}.

    The interval is the bootstrap's over seeds (`scipy.stats.bootstrap`, 9,999 resamples, always
    the same ones), by percentiles that are widened for few seeds, as those of ``meta-optax
    compare`` are. Rows that are not finite are counted, and averaged nowhere: a seed whose last
    tenth has nothing else is *lost*, and no part of ``final``. Curves are medians over seeds at the
    steps at which all seeds have the metric, with a band of the middle half.

    Args:
      logs: the runs by name, the first of which the others are divided by; each a log or its path,
        or a list of these, one a seed.
      metric: a key with one number a row; by default the first of ``value`` and ``loss`` that all
        logs have.
      path: where to write the figure; nowhere by default.
      mode: whether the best is the least (``"min"``) or the most (``"max"``).
      target: a finite value; each run is told the first step at which its median curve is there.

    Returns:
      The summaries and the figure.

    Raises:
      ImportError: if matplotlib is missing and a ``path`` is given.
      ValueError: if the target is not finite, if there is no run, if a run has no log, if a log
        lacks the metric (it names the
        keys there are), or if the seeds of a run have no step in common.

    Example:
      >>> import numpy as np, pathlib
      >>> from meta_optax import analysis
      >>> def log(*losses):
      ...     values = {"loss": np.array(losses)}
      ...     return analysis.Log(pathlib.Path("log"), np.arange(len(losses)), values, [])
      >>> runs = {"fixed": log(2.0, 1.0), "ours": log(2.0, 0.9)}
      >>> comparison = analysis.compare_runs(runs, target=0.95)
      >>> print(comparison.metric, [(run.ratio, run.target_step) for run in comparison.runs])
      loss [(1.0, None), (0.9, 1)]

    References:
      Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
      Hesterberg, 2015, "What Teachers Should Know About the Bootstrap", arXiv:1411.5279.
    """
    sign = _checks.sign_of_mode(mode)
    if target is not None and not math.isfinite(target):
        raise ValueError(f"target must be finite, got {target}.")
    runs = {name: _seeds(name, sources) for name, sources in logs.items()}
    if not runs:
        raise ValueError("compare_runs needs a run: pass {'a name': 'a/folder'}.")
    metric = _metric(runs, metric)
    curves = {name: _common(name, metric, seeds) for name, seeds in runs.items()}
    summaries = []
    for name, seeds in runs.items():
        first = summaries[0].final if summaries else None
        summary = _summarise(name, metric, seeds, curves[name], first, sign)
        if target is not None:
            steps, values = curves[name]
            is_there = sign * _quantile(values, 0.5) <= sign * target  # NaN is not.
            reached = int(steps[np.argmax(is_there)]) if is_there.any() else None
            summary = summary._replace(target_step=reached)
        summaries.append(summary)
    figure = None
    if path is not None or importlib.util.find_spec("matplotlib"):
        figure = _plot(metric, curves)
        _draw.save(figure, path)
    return Comparison(metric=metric, runs=tuple(summaries), figure=figure, target=target)


def _seeds(name: str, sources: Source | Sequence[Source]) -> list[Log]:
    """The logs of a run."""
    # A log is a tuple, and so a sequence too.
    alone = isinstance(sources, Log | str | os.PathLike)
    seeds = [as_log(source) for source in ([sources] if alone else sources)]
    if not seeds:
        raise ValueError(f"The run {name!r} has no log: give a path, a Log, or a list of them.")
    return seeds


def _metric(runs: Mapping[str, Sequence[Log]], metric: str | None) -> str:
    """The metric's name, which every log has with one number a row."""
    logs = [log for seeds in runs.values() for log in seeds]
    wanted = LOSSES if metric is None else (metric,)
    found = [name for name in wanted if all(is_curve(log, name) for log in logs)]
    if found:
        return found[0]
    lacking = next(log for log in logs if not all(is_curve(log, name) for name in wanted))
    there = ", ".join(name for name in sorted(lacking.values) if is_curve(lacking, name))
    raise ValueError(
        f"metric must be in every log: {lacking.path} has no {' and no '.join(wanted)} with a "
        f"number a row, but {there or 'nothing'}."
    )


def _common(
    name: str, metric: str, seeds: Sequence[Log]
) -> tuple[Steps, Float[np.ndarray, "seeds rows"]]:
    """The metric of all seeds at the steps at which they all have it."""
    curves = [_logged(log, metric) for log in seeds]
    steps = curves[0][0]
    for there, _ in curves[1:]:
        steps = np.intersect1d(steps, there)
    if not steps.size:
        raise ValueError(
            f"The seeds of {name!r} have {metric} at no step in common: log it at the same steps."
        )
    return steps, np.stack([values[np.isin(there, steps)] for there, values in curves])


def _logged(log: Log, metric: str) -> tuple[Steps, Curve]:
    """The rows that have the metric."""
    has_it = ~np.isin(log.steps, log.absent.get(metric, ()))
    return log.steps[has_it], log.values[metric][has_it]


def _quantile(values: Float[np.ndarray, "seeds rows"], share: float) -> Curve:
    """A quantile over the seeds with a finite value; NaN where none has one."""
    finite = np.where(np.isfinite(values), values, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanquantile(finite, share, axis=0)


def _final(values: Curve) -> float:
    """The mean over what is finite in the last tenth of the rows; NaN if nothing is."""
    last = values[-math.ceil(len(values) / 10) :]
    last = last[np.isfinite(last)]
    return float(last.mean()) if last.size else np.nan


def _interval(finals: Float[np.ndarray, " seeds"]) -> tuple[float, float] | None:
    """Where the median is, by the bootstrap; None for too few seeds."""
    if len(finals) < _LEAST_SEEDS:
        return None
    from scipy import stats

    from meta_optax.analysis._intervals import expanded_tail

    result = stats.bootstrap(
        (finals,),
        np.median,
        confidence_level=1 - 2 * expanded_tail(len(finals)),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _summarise(
    name: str,
    metric: str,
    seeds: Sequence[Log],
    curve: tuple[Steps, Float[np.ndarray, "seeds rows"]],
    first: float | None,
    sign: float,
) -> RunSummary:
    """A run in numbers; `first` is the final value that it is divided by, None for its own."""
    values = [_logged(log, metric)[1] for log in seeds]
    finals = np.array([_final(one) for one in values])
    kept = finals[np.isfinite(finals)]
    final = float(np.median(kept)) if kept.size else np.nan
    steps, median = curve[0], _quantile(curve[1], 0.5)
    best = int(np.nanargmin(sign * median)) if np.isfinite(median).any() else None
    base = final if first is None else first
    return RunSummary(
        name=name,
        seeds=len(seeds),
        final=final,
        interval=_interval(kept),
        ratio=final / base if base > 0 else np.nan,
        best=np.nan if best is None else float(median[best]),
        best_step=None if best is None else int(steps[best]),
        decisions=sum(len(log.decisions) for log in seeds),
        nonfinite=int(sum((~np.isfinite(one)).sum() for one in values)),
        lost=int((~np.isfinite(finals)).sum()),
    )


def _cells(run: RunSummary) -> tuple[str, ...]:
    """A row of the table."""
    interval = f"[{run.interval[0]:.4g}, {run.interval[1]:.4g}]" if run.interval else "none"
    step = "-" if run.best_step is None else str(run.best_step)
    counts = (run.decisions, run.nonfinite, run.lost)
    numbers = (f"{run.final:.4g}", interval, f"{run.ratio:.3f}", f"{run.best:.4g}", step)
    return (run.name, str(run.seeds), *numbers, *map(str, counts))


def _plot(
    metric: str, curves: Mapping[str, tuple[Steps, Float[np.ndarray, "seeds rows"]]]
) -> Figure:
    """The median of each run over the steps, with a band of the middle half of its seeds."""
    seeds = max(len(values) for _, values in curves.values())
    over = "" if seeds == 1 else ": median and middle half of the seeds"
    figure, (axes,) = _draw.make_figure(1, 1)
    figure.set_figheight(max(4.5, 0.25 * len(curves) + 1.0))  # as high as the legend
    middles = []
    for index, (name, (steps, values)) in enumerate(curves.items()):
        color = _draw.COLORS[index % len(_draw.COLORS)]
        style = ("-", "--", ":", "-.")[index // len(_draw.COLORS) % 4]
        middles.append(_quantile(values, 0.5))
        label = name if len(values) == 1 else f"{name} ({len(values)} seeds)"
        _draw.draw_line(axes, steps, middles[-1], color=color, ls=style, lw=1.6, label=label)
        if len(values) > 1:
            low, high = _quantile(values, 0.25), _quantile(values, 0.75)
            axes.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
    _draw.set_log_axis(axes, np.concatenate(middles))
    axes.set(title=f"{metric}{over}", xlabel="step", ylabel=metric)
    _draw.add_legend(axes)
    return figure
