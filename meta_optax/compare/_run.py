"""Running a comparison: arm by arm, first the trials on all tasks, then the chosen one's seeds."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from meta_optax.compare._arms import ARMS
from meta_optax.compare._protocol import (
    Configuration,
    Plan,
    choose,
    final_lanes,
    takes_part,
    trials,
    tuning_lanes,
)
from meta_optax.compare._store import Store
from meta_optax.compare._tasks import TASKS
from meta_optax.compare._train import Curves, Lanes, Trainer

# Told after each cell: the arm, the task, the phase, and whether it was there already.
Report = Callable[[str, str, str, bool], None]


class ArmResult(NamedTuple):
    """What an arm came to: what was tried, what was chosen, and the runs of both by task."""

    configurations: list[Configuration]
    chosen: Configuration
    trials: dict[str, Curves]
    runs: dict[str, Curves]


def run_plan(plan: Plan, store: Store, report: Report) -> dict[str, ArmResult]:
    """Runs what is not in the store yet.

    Args:
      plan: what to run.
      store: where finished cells are kept.
      report: told after each cell.

    Returns:
      The results by arm.
    """
    return {arm: _run_arm(plan, store, report, arm) for arm in plan.arms if _tasks_of(plan, arm)}


def _tasks_of(plan: Plan, arm: str) -> list[str]:
    return [task for task in plan.tasks if takes_part(arm, task)]


def _run_arm(plan: Plan, store: Store, report: Report, arm: str) -> ArmResult:
    trainers: dict[str, Trainer] = {}

    def cell(phase: str, task: str, lanes: Lanes) -> Curves:
        curves = store.load(phase, arm, task, lanes)
        is_there = curves is not None
        if curves is None:
            if task not in trainers:
                made = TASKS[task]()
                trainers[task] = Trainer(made, ARMS[arm], round(made.steps * plan.limits.shrink))
            curves = trainers[task](lanes, _lanes_at_once(plan))
            store.save(phase, arm, task, lanes, curves)
        report(arm, task, phase, is_there)
        return curves

    tasks = _tasks_of(plan, arm)
    configurations = trials(arm, plan.limits.trials)
    lanes = tuning_lanes(plan, configurations)
    tried = {task: cell("trials", task, lanes) for task in tasks}
    chosen = configurations[choose(tried, len(configurations))]
    lanes = final_lanes(plan, chosen)
    runs = {task: cell("runs", task, lanes) for task in tasks}
    return ArmResult(configurations, chosen, tried, runs)


def _lanes_at_once(plan: Plan) -> int:
    """Trials and final runs are batched alike, so that each arm compiles once a task."""
    return len(final_lanes(plan, Configuration(1.0, 1.0)).seed)


def count_cells(plan: Plan) -> int:
    """How many cells there are: trials and final runs of each arm on each of its tasks."""
    return 2 * len(plan.pairs())


Results = Mapping[str, ArmResult]
