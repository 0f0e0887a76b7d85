"""How arms are compared: the same trials for all, one configuration each, seeds in pairs.

The rules are those of AlgoPerf (Dahl et al., arXiv 2306.07179) at this scale:

1. Each arm has the same number of quasi-random trials of base rate and weight decay, the same
   points of the unit square for all, on seeds that are not used again.
2. Of these one configuration is chosen for all tasks together: that of the least mean rank over the
   tasks. A trial that diverges on any task ranks behind all that do not.
3. It is run with other seeds, at the chosen rate and at multiples of it. A seed means the same
   initial weights and the same batches for every arm.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from meta_optax.compare._arms import ARMS, BASELINE, DECAYS
from meta_optax.compare._tasks import TASKS, why_missing
from meta_optax.compare._train import Curves, Lanes

# Changed whenever numbers of one version must not stand beside those of another.
PROTOCOL_VERSION = 1
MULTIPLES = (0.03, 0.3, 1.0, 3.0, 30.0)
WELL_TUNED = MULTIPLES.index(1.0)
_FIRST_TUNING_SEED = 10_000
_TRIAL_SEED = 0


class Budget(NamedTuple):
    """How much is run.

    Attributes:
      tasks: by default.
      arms: by default.
      seeds: paired ones, of the final runs.
      trials: of each arm.
      tuning_seeds: of each trial.
      shrink: the share of a task's steps that a run has.
    """

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: int
    trials: int
    tuning_seeds: int
    shrink: float


BUDGETS: Mapping[str, Budget] = {
    "quick": Budget(
        tasks=("noisy_quadratic", "mlp_digits", "moe_digits"),
        arms=(
            "constant",
            "linear",
            "cosine",
            "reduce_on_plateau",
            "schedule_free",
            "mechanic",
            "advanced_plateau",
            "linear_trend_plateau",
        ),
        seeds=5,
        trials=8,
        tuning_seeds=3,
        shrink=1 / 3,
    ),
    "full": Budget(
        tasks=tuple(TASKS), arms=tuple(ARMS), seeds=10, trials=16, tuning_seeds=3, shrink=1.0
    ),
}


class Configuration(NamedTuple):
    """What an arm is given: a base rate, or factor, and a weight decay."""

    learning_rate: float
    weight_decay: float


class Plan(NamedTuple):
    """What one comparison runs."""

    budget: str
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: int

    @property
    def limits(self) -> Budget:
        """The budget's own numbers."""
        return BUDGETS[self.budget]

    def pairs(self) -> list[tuple[str, str]]:
        """The arms and tasks that go together, arm by arm."""
        return [(arm, task) for arm in self.arms for task in self.tasks if takes_part(arm, task)]


class PlanError(ValueError):
    """Something asked for cannot be run; the text says what can be."""


def takes_part(arm: str, task: str) -> bool:
    """Whether an arm has anything to say about a task."""
    return TASKS[task]().has_experts or not ARMS[arm].needs_experts


def make_plan(
    budget: str = "quick",
    tasks: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
) -> Plan:
    """A plan of what is asked for; what is not is the budget's.

    Args:
      budget: ``"quick"`` or ``"full"``.
      tasks: names from `TASKS`.
      arms: names from `ARMS`; the baseline is always among them.
      seeds: how many, >= 1.

    Returns:
      The plan, in the order of `TASKS` and `ARMS` whatever the order asked in.

    Raises:
      PlanError: for an unknown name, with those that are known; for a task whose data is missing.
    """
    known = _known("budget", [budget], BUDGETS)
    limits = BUDGETS[known[0]]
    chosen = _known("task", limits.tasks if tasks is None else tasks, TASKS)
    taken = _known("arm", limits.arms if arms is None else arms, ARMS)
    for name in chosen:
        if tasks is not None and (reason := why_missing(name)):
            raise PlanError(f"task {name!r} has no data: {reason}")
    count = limits.seeds if seeds is None else seeds
    if not 1 <= count < _FIRST_TUNING_SEED:
        raise PlanError(f"seeds must be from 1 to {_FIRST_TUNING_SEED - 1}, got {count}")
    return Plan(
        budget=budget,
        tasks=tuple(name for name in TASKS if name in chosen and why_missing(name) is None),
        arms=tuple(name for name in ARMS if name in taken or name == BASELINE),
        seeds=count,
    )


def _known(what: str, names: Sequence[str], known: Mapping[str, object]) -> list[str]:
    names = list(dict.fromkeys(names))
    if not names:
        raise PlanError(f"no {what} is named; known are: {', '.join(known)}")
    if unknown := [name for name in names if name not in known]:
        raise PlanError(f"unknown {what} {unknown[0]!r}; known are: {', '.join(known)}")
    return names


def trials(arm: str, count: int) -> list[Configuration]:
    """Quasi-random configurations (Halton's sequence, scrambled), log-uniform in their ranges."""
    points = scipy.stats.qmc.Halton(2, scramble=True, rng=_TRIAL_SEED).random(count)
    low, high = np.log([ARMS[arm].space, DECAYS]).T
    values = np.exp(low + points * (high - low))
    return [Configuration(float(rate), float(decay)) for rate, decay in values]


def tuning_lanes(plan: Plan, configurations: Sequence[Configuration]) -> Lanes:
    """Each configuration with each tuning seed; as many lanes as the final runs have, or more."""
    seeds = _FIRST_TUNING_SEED + np.arange(plan.limits.tuning_seeds)
    return _cross(seeds, configurations)


def final_lanes(plan: Plan, chosen: Configuration) -> Lanes:
    """The chosen configuration at each multiple of its rate, with each seed."""
    multiples = [chosen._replace(learning_rate=chosen.learning_rate * m) for m in MULTIPLES]
    return _cross(np.arange(plan.seeds), multiples)


def _cross(seeds: np.ndarray, configurations: Sequence[Configuration]) -> Lanes:
    rates, decays = np.asarray(configurations, np.float32).T
    return Lanes(
        seed=np.repeat(seeds, len(rates)).astype(np.int32),
        learning_rate=np.tile(rates, len(seeds)),
        weight_decay=np.tile(decays, len(seeds)),
    )


def by_seed(values: np.ndarray, configurations: int) -> np.ndarray:
    """Values of lanes, [seeds, configurations, ...]."""
    return values.reshape(-1, configurations, *values.shape[1:])


def has_diverged(held_out: np.ndarray) -> np.ndarray:
    """Which runs end without a finite loss, or above where they began, [lanes]."""
    last, first = held_out[:, -1], held_out[:, 0]
    return ~np.isfinite(last) | (last > first)


def choose(results: Mapping[str, Curves], count: int) -> int:
    """The trial of the least mean rank over tasks.

    Args:
      results: the trials' curves by task.
      count: how many trials there are.

    Returns:
      The number of the trial chosen; of equals, the first.
    """
    ranks, failures = [], np.zeros(count, int)
    for curves in results.values():
        diverged = by_seed(has_diverged(curves.held_out), count)
        losses = np.where(diverged, np.inf, by_seed(curves.held_out[:, -1], count))
        failures += diverged.any(axis=0)
        ranks.append(scipy.stats.rankdata(np.median(losses, axis=0)))
    # First those that diverge on fewest tasks.
    return int(np.lexsort((np.mean(ranks, axis=0), failures))[0])
