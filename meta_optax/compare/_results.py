"""What a comparison found, as plain data: ``results.json`` and ``timings.json``."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meta_optax.compare._arms import ARMS, BASELINE
from meta_optax.compare._profiles import (
    Steps,
    performance_profile,
    profile_score,
    steps_to_target,
)
from meta_optax.compare._protocol import MULTIPLES, WELL_TUNED, Plan, by_seed, has_diverged
from meta_optax.compare._run import ArmResult, Results
from meta_optax.compare._runs import Runs, at_rates, divergence, make_runs
from meta_optax.compare._statistics import (
    holm_pvalues,
    probability_of_improvement,
    ratio_to_peer,
    worst_task,
)
from meta_optax.compare._tasks import TASKS
from meta_optax.compare._train import EVALUATIONS, Curves, schedule_of

# A target is this much above what the tuned baseline reaches, on the seeds it was tuned on.
SLACK = 1.05
# The ratios that we set out to reach, and the arms that the claims are about.
MOST_MIS_SET, MOST_TUNED, MOST_ON_A_TASK = 0.9, 1.01, 1.05
# The multiples that are reported together.
GROUPS = {
    "well_tuned": (WELL_TUNED,),
    "mis_set": tuple(i for i in range(len(MULTIPLES)) if i != WELL_TUNED),
}
# How far performance profiles go, AlgoPerf's.
LARGEST_RATIO = 4.0

Json = dict[str, Any]


def summarise(plan: Plan, about: Mapping[str, Any], results: Results) -> Json:
    """All that was found, without a time: the same seeds on the same machine give the same bytes.

    Args:
      plan: what was run.
      about: what the store says of protocol, machine and versions.
      results: by arm.

    Returns:
      A tree for strict JSON: what is infinite or no number is null.
    """
    references = {task: _reference(results[BASELINE], task) for task in plan.tasks}
    targets = {task: SLACK * value for task, value in references.items()}
    steps = {arm: _steps(plan, result, targets) for arm, result in results.items()}
    runs = {arm: runs_of(result) for arm, result in results.items()}
    return plain(
        {
            "protocol": {**about, "baseline": BASELINE, "evaluations": EVALUATIONS},
            "tasks": {
                name: _describe_task(plan, name, references[name], targets[name])
                for name in plan.tasks
            },
            "arms": {
                name: _describe_arm(name, result, steps[name]) for name, result in results.items()
            },
            **{name: _compare(runs, columns) for name, columns in GROUPS.items()},
            "profile": _profile(plan, steps),
        }
    )


def runs_of(result: ArmResult) -> Runs:
    """An arm's final losses, by task, seed and multiple of the rate."""
    tasks = list(result.runs)
    count = len(MULTIPLES)
    losses = [by_seed(result.runs[task].held_out[:, -1], count) for task in tasks]
    diverged = [by_seed(has_diverged(result.runs[task].held_out), count) for task in tasks]
    return make_runs(tasks, np.stack(losses), np.stack(diverged))


def _reference(baseline: ArmResult, task: str) -> float:
    """The median final loss of the tuned baseline, on the seeds it was tuned on."""
    curves, count = baseline.trials[task], len(baseline.configurations)
    number = baseline.configurations.index(baseline.chosen)
    return float(np.median(by_seed(curves.held_out[:, -1], count)[:, number]))


def _describe_task(plan: Plan, name: str, reference: float, target: float) -> Json:
    task = TASKS[name]()
    return {
        "about": task.about,
        "loss": task.loss_name,
        "steps": schedule_of(round(task.steps * plan.limits.shrink)).steps,
        "reference": reference,
        "target": target,
    }


def _describe_arm(name: str, result: ArmResult, steps: Steps) -> Json:
    tasks = {}
    for (task, curves), taken in zip(result.runs.items(), steps.steps, strict=True):
        diverged = by_seed(has_diverged(curves.held_out), len(MULTIPLES))
        losses = by_seed(curves.held_out[:, -1], len(MULTIPLES))
        tasks[task] = {
            "final_losses": np.where(diverged, np.nan, losses),
            "diverged": diverged,
            "steps_to_target": taken,
            "decisions": _decisions(curves),
        }
    return {
        "about": ARMS[name].about,
        "kind": ARMS[name].kind,
        "chosen": result.chosen._asdict(),
        "tasks": tasks,
    }


def _steps(plan: Plan, result: ArmResult, targets: Mapping[str, float]) -> Steps:
    """When each run of an arm came down to the targets; each task has steps of its own."""
    parts = []
    for task, curves in result.runs.items():
        made = schedule_of(round(TASKS[task]().steps * plan.limits.shrink))
        parts.append(
            steps_to_target(
                [task],
                by_seed(curves.held_out, len(MULTIPLES))[None],
                by_seed(has_diverged(curves.held_out), len(MULTIPLES))[None],
                targets={task: targets[task]},
                steps=made.part * np.arange(EVALUATIONS + 1),
            )
        )
    return Steps(tuple(result.runs), np.concatenate([part.steps for part in parts]))


def _decisions(curves: Curves) -> Json:
    """How many a run made in the mean, at each multiple, and why, of those that were kept."""
    reasons = Counter(decision.reason for run in curves.decisions for decision in run)
    return {
        "mean_by_multiple": by_seed(curves.decision_counts, len(MULTIPLES)).mean(axis=0),
        "reasons": dict(reasons),
    }


def _compare(runs: Mapping[str, Runs], columns: Sequence[int]) -> Json:
    """Each arm against the baseline and, of ours, against the best peer, at some multiples."""
    here = {name: at_rates(arm, columns) for name, arm in runs.items()}
    baseline = here[BASELINE]
    ratios = {name: ratio_to_peer(arm, baseline) for name, arm in here.items()}
    peers = {name: ratios[name].value for name in here if ARMS[name].kind != "ours"}
    best = min(peers, key=lambda name: peers[name])
    others = {name: arm for name, arm in here.items() if name != BASELINE}
    pvalues = holm_pvalues(others, baseline) if others else {}
    table = {}
    for name, arm in here.items():
        lost, worst = divergence(arm), worst_task(arm, baseline)
        table[name] = {
            "ratio_to_baseline": ratios[name]._asdict(),
            "ratio_to_best_peer": ratio_to_peer(arm, here[best])._asdict(),
            "probability_of_improvement": probability_of_improvement(arm, baseline)._asdict(),
            "worst_task": {"task": worst.task, **worst.ratio._asdict()},
            "worst_task_to_best_peer": _worst(arm, here[best]),
            "diverged": {"count": lost.count, "total": lost.total, "by_task": lost.by_task},
            "p_value": pvalues[name]._asdict() if name in pvalues else None,
        }
    return {"multiples": [MULTIPLES[i] for i in columns], "best_peer": best, "arms": table}


def _worst(arm: Runs, peer: Runs) -> Json:
    worst = worst_task(arm, peer)
    return {"task": worst.task, **worst.ratio._asdict()}


def _profile(plan: Plan, steps: Mapping[str, Steps]) -> Json:
    """Of the arms that ran on every task: shares of runs at the target by steps over the fewest."""
    whole = {name: taken for name, taken in steps.items() if len(taken.tasks) == len(plan.tasks)}
    taus = np.geomspace(1.0, LARGEST_RATIO, 49)
    out: Json = {"taus": taus}
    for group, columns in GROUPS.items():
        part = {
            name: taken._replace(steps=taken.steps[..., list(columns)])
            for name, taken in whole.items()
        }
        scores = profile_score(part, largest_ratio=LARGEST_RATIO)
        out[group] = {
            name: {"shares": shares, "score": scores[name]}
            for name, shares in performance_profile(part, taus.tolist()).items()
        }
    return out


def timings(results: Results) -> Json:
    """Seconds of each cell, which differ from run to run."""
    return {
        arm: {
            phase: {
                task: {"compile_seconds": c.compile_seconds, "run_seconds": c.run_seconds}
                for task, c in cells.items()
            }
            for phase, cells in (("trials", result.trials), ("runs", result.runs))
        }
        for arm, result in results.items()
    }


def plain(value: Any) -> Any:
    """Arrays as lists, tuples as lists, and null for what is no finite number."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        # Float32 carries no more digits; what NumPy's own threads may sum otherwise goes with them.
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
