"""The pictures of a report."""

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from meta_optax.compare._arms import ARMS, BASELINE
from meta_optax.compare._protocol import MULTIPLES, WELL_TUNED, Plan, by_seed
from meta_optax.compare._results import Json
from meta_optax.compare._run import Results
from meta_optax.compare._tasks import TASKS
from meta_optax.compare._train import EVALUATIONS, schedule_of

# Okabe and Ito's colours, which stay apart for colour-blind readers and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#999999"
_SHOWN = (0, WELL_TUNED, len(MULTIPLES) - 1)


def highlights(found: Json) -> dict[str, str]:
    """Colours for the arms that a picture is about: baseline, best peers, and best of ours."""
    names = [BASELINE]
    for group in ("well_tuned", "mis_set"):
        names.append(found[group]["best_peer"])
        # Of those alone that ran on all tasks: ratios over fewer are no match.
        table = {
            name: row["ratio_to_baseline"]["value"]
            for name, row in found[group]["arms"].items()
            if ARMS[name].kind == "ours"
            and len(found["arms"][name]["tasks"]) == len(found["tasks"])
        }
        ranked = sorted(table, key=lambda name: (table[name] is None, table[name]))
        names += ranked[:2]
    return dict(zip(dict.fromkeys(names), _COLOURS, strict=False))


def draw_all(plan: Plan, found: Json, results: Results, folder: pathlib.Path) -> dict[str, str]:
    """Writes every picture.

    Args:
      plan: what was run.
      found: the tree of ``results.json``.
      results: the curves.
      folder: where to.

    Returns:
      The captions, by the files' names.
    """
    made = {
        "forest.png": (
            forest(found),
            "Final held-out loss over that of the linear schedule at the same multiple of the base "
            "rate: interquartile mean over tasks and seeds, and its 95 % interval, clustered by "
            "seed. Left of 1 is better.",
        ),
        "loss_curves.png": (
            loss_curves(plan, found, results),
            "Held-out loss over the steps, median and middle half over seeds, at three multiples "
            "of each arm's own best rate. Grey: the arms that are not named.",
        ),
        "profile.png": (
            profile(found),
            "The share of runs that reach the target within so many times the fewest steps that "
            "any arm took with the same task, seed and multiple. Higher is better.",
        ),
    }
    if figure := hyperparameters(plan, results):
        made["hyperparameters.png"] = (
            figure,
            "What each controlled hyperparameter was, by group: median and middle half over seeds. "
            "Solid: at the best rate. Dashed: at 30 times that.",
        )
    for name, (figure, _) in made.items():
        figure.savefig(folder / name, metadata={"Software": None})
    return {name: caption for name, (_, caption) in made.items()}


def forest(found: Json) -> Figure:
    """Ratios to the baseline with their intervals, well-tuned and mis-set."""
    names = [name for name in found["arms"] if name != BASELINE]
    figure = Figure((11.0, 1.6 + 0.28 * len(names)), dpi=110, layout="constrained")
    titles = {"well_tuned": "Well tuned", "mis_set": "Base rate x 0.03, 0.3, 3 and 30"}
    table = found["well_tuned"]["arms"]
    rows = sorted(names, key=lambda name: _value(table[name], math.inf), reverse=True)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (group, title) in zip(panels, titles.items(), strict=True):
        for place, name in enumerate(rows):
            ratio = found[group]["arms"][name]["ratio_to_baseline"]
            _draw_estimate(axes, place, ratio, _colour(name))
        axes.axvline(1.0, color="black", lw=0.8)
        axes.set(title=title, xscale="log", xlabel="loss / loss of the linear schedule")
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0))
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", lw=0.3)
    marks = [f"{name} *" if len(found["arms"][name]["tasks"]) < len(found["tasks"]) else name
             for name in rows]  # fmt: skip
    first = figure.axes[0]
    first.set_yticks(range(len(rows)), marks)
    for label, name in zip(first.get_yticklabels(), rows, strict=True):
        label.set_color(_colour(name))
    some = any(mark.endswith("*") for mark in marks)
    figure.supxlabel(
        "blue: ours; grey: peers" + ("; *: on the tasks with experts alone" if some else ""),
        fontsize=9,
    )
    return figure


def _value(row: Json, missing: float) -> float:
    value = row["ratio_to_baseline"]["value"]
    return missing if value is None else value


def _colour(name: str) -> str:
    return _COLOURS[0] if ARMS[name].kind == "ours" else "#555555"


def _draw_estimate(axes: Axes, place: int, ratio: Json, colour: str) -> None:
    if ratio["value"] is None:
        axes.text(0.98, place, "diverges", transform=axes.get_yaxis_transform(), ha="right",
                  va="center", color=colour, fontsize=8)  # fmt: skip
        return
    axes.plot(ratio["value"], place, "o", color=colour, ms=5)
    if ratio["low"] is not None:
        # An interval that goes on to infinity is drawn to ten times the value.
        high = 10.0 * ratio["value"] if ratio["high"] is None else ratio["high"]
        axes.plot([max(ratio["low"], 1e-3), high], [place, place], color=colour, lw=1.8)


def loss_curves(plan: Plan, found: Json, results: Results) -> Figure:
    """A row a task, a column a multiple."""
    colours = highlights(found)
    size = (13.0, 2.5 * len(plan.tasks) + 0.8)
    figure = Figure(size, dpi=100, layout="constrained")
    grid = figure.subplots(len(plan.tasks), len(_SHOWN), squeeze=False)
    for row, task in zip(grid, plan.tasks, strict=True):
        made = schedule_of(round(TASKS[task]().steps * plan.limits.shrink))
        steps = made.part * np.arange(EVALUATIONS + 1)
        for axes, column in zip(row, _SHOWN, strict=True):
            for name, result in results.items():
                if task in result.runs:
                    losses = by_seed(result.runs[task].held_out, len(MULTIPLES))[:, column]
                    _draw_band(axes, steps, losses, colours.get(name), name)
            _limit(axes, results, task, column)
            axes.set(title=f"{task}, rate x {MULTIPLES[column]:g}", yscale="log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        row[0].set_ylabel(TASKS[task]().loss_name, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    lines = {
        line.get_label(): line
        for axes in grid.flat
        for line in axes.lines
        if line.get_label() in colours
    }
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines))
    return figure


def _draw_band(
    axes: Axes, steps: np.ndarray, losses: np.ndarray, colour: str | None, name: str
) -> None:
    shown = np.where(np.isfinite(losses), losses, np.inf)
    low, middle, high = np.quantile(shown, [0.25, 0.5, 0.75], axis=0, method="nearest")
    middle = np.where(np.isfinite(middle), middle, np.nan)
    if colour is None:
        axes.plot(steps, middle, color=_GREY, lw=0.5, alpha=0.6, zorder=1)
        return
    axes.plot(steps, middle, color=colour, lw=1.6, label=name, zorder=3)
    axes.fill_between(steps, low, np.minimum(high, 1e6), color=colour, alpha=0.15, lw=0, zorder=2)


def _limit(axes: Axes, results: Results, task: str, column: int) -> None:
    """Up to a little above the start: what diverges leaves by the top."""
    count = len(MULTIPLES)
    runs = [result.runs[task].held_out for result in results.values() if task in result.runs]
    first = np.median([run[:, 0] for run in runs])
    lasts = [by_seed(run, count)[:, column] for run in runs]
    lowest = min(float(np.nanmin(np.where(np.isfinite(last), last, np.nan))) for last in lasts)
    axes.set_ylim(lowest / 1.15, 1.5 * first)


def profile(found: Json) -> Figure:
    """Performance profiles, well-tuned and mis-set."""
    colours = highlights(found)
    figure = Figure((11.0, 4.6), dpi=110, layout="constrained")
    titles = {"well_tuned": "Well tuned", "mis_set": "Base rate x 0.03, 0.3, 3 and 30"}
    for axes, (group, title) in zip(
        figure.subplots(1, 2, sharey=True), titles.items(), strict=True
    ):
        for name, entry in found["profile"][group].items():
            style = {"color": colours[name], "lw": 2.0, "label": name} if name in colours else {
                "color": _GREY, "lw": 0.6, "alpha": 0.7
            }  # fmt: skip
            axes.step(found["profile"]["taus"], entry["shares"], where="post", **style)
        axes.set(title=title, xlabel="times the fewest steps of any arm", ylim=(-0.02, 1.02))
        axes.set(xscale="log", xticks=[1, 1.5, 2, 3, 4], xticklabels=["1", "1.5", "2", "3", "4"])
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_ylabel("share of runs at the target")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    return figure


def hyperparameters(plan: Plan, results: Results) -> Figure | None:
    """A panel an arm: what was moved while training ran, on a task with experts if there is one."""
    task = next((name for name in plan.tasks if TASKS[name]().has_experts), plan.tasks[0])
    moved = {
        name: keys
        for name, result in results.items()
        if task in result.runs and (keys := _moved(result.runs[task].hyperparams))
    }
    if not moved:
        return None
    rows = -(-len(moved) // 3)
    figure = Figure((14.0, 2.9 * rows + 0.6), dpi=100, layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False, sharex=True).ravel()
    made = schedule_of(round(TASKS[task]().steps * plan.limits.shrink))
    steps = made.part * np.arange(1, EVALUATIONS + 1)
    for axes, (name, keys) in zip(grid, moved.items(), strict=False):
        _draw_timelines(axes, steps, results[name].runs[task].hyperparams, keys)
        axes.set_title(name, fontsize=10)
    for axes in grid[len(moved) :]:
        axes.axis("off")
    for axes in grid[max(0, len(moved) - 3) : len(moved)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    figure.suptitle(f"Hyperparameters on {task}")
    return figure


def _moved(values: Mapping[str, np.ndarray]) -> list[str]:
    """What does not stand still in any run, learning rates first."""
    keys = [key for key, by_step in values.items() if np.ptp(by_step, axis=1).any()]
    return sorted(keys, key=lambda key: (not key.endswith("learning_rate"), key))


def _draw_timelines(
    axes: Axes, steps: np.ndarray, values: Mapping[str, np.ndarray], keys: Sequence[str]
) -> None:
    for key, colour in zip(keys, _COLOURS, strict=False):
        by_multiple = by_seed(values[key], len(MULTIPLES))
        for column, style in ((WELL_TUNED, "-"), (len(MULTIPLES) - 1, "--")):
            low, middle, high = np.quantile(by_multiple[:, column], [0.25, 0.5, 0.75], axis=0)
            label = key if style == "-" else None
            axes.plot(steps, middle, color=colour, ls=style, lw=1.4, label=label)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axes.set_yscale("log")
    # Room for the legend beneath the lines.
    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** (0.12 * len(keys)), high)
    axes.legend(loc="lower left", fontsize=8, frameon=False)
