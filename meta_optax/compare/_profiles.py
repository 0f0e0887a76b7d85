"""Steps to a target, and performance profiles over them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


class Steps(NamedTuple):
    """Steps that one arm's runs took to the target, built by `steps_to_target`.

    Attributes:
      tasks: the names of the tasks, along the first axis.
      steps: of the first evaluation at or below the target, +inf where it was missed.
    """

    tasks: tuple[str, ...]
    steps: Float[np.ndarray, "tasks seeds rates"]


def steps_to_target(
    tasks: Sequence[str],
    losses_by_step: ArrayLike,
    diverged: ArrayLike,
    *,
    targets: Mapping[str, float],
    steps: ArrayLike,
) -> Steps:
    """When each run first came down to its task's target.

    A run that diverges is a miss, also where it reached the target before: the arm did not finish
    the training it was given.

    Args:
      tasks: the names of the tasks that the arm ran.
      losses_by_step: [tasks, seeds, rates, evaluations], held-out losses; NaN reaches no target.
      diverged: [tasks, seeds, rates].
      targets: a loss for each of the tasks.
      steps: [evaluations], the steps of the evaluations, rising.

    Returns:
      The `Steps`.

    Raises:
      ValueError: for shapes that do not fit, steps that do not rise, or a task without a target.

    Example:
      >>> losses = [[[[3.0, 2.0, 1.0]], [[3.0, 2.5, 2.4]]]]  # one task, two seeds, one rate
      >>> reached = steps_to_target(
      ...     ["digits"], losses, [[[False], [False]]], targets={"digits": 2.0}, steps=[10, 20, 30]
      ... )
      >>> reached.steps.tolist()
      [[[20.0], [inf]]]
    """
    losses, steps = np.asarray(losses_by_step, np.float64), np.asarray(steps, np.float64)
    diverged = np.asarray(diverged, bool)
    shape = (len(tasks), *diverged.shape[1:], *steps.shape)
    if losses.ndim != 4 or losses.shape != shape or len(diverged) != len(tasks):
        raise ValueError(
            "losses_by_step, diverged and steps must be [tasks, seeds, rates, evaluations], "
            f"[tasks, seeds, rates] and [evaluations], with {len(tasks)} tasks; "
            f"got {losses.shape}, {diverged.shape} and {steps.shape}"
        )
    if not (np.diff(steps) > 0).all():
        raise ValueError(f"steps must rise, got {steps.tolist()}")
    missing = [task for task in tasks if not np.isfinite(targets.get(task, np.nan))]
    if missing:
        raise ValueError(f"targets must have a finite loss for each task, not so for {missing}")
    target = np.array([targets[task] for task in tasks])[:, None, None, None]
    # A last evaluation that never comes.
    reached = np.append(losses <= target, np.ones([*diverged.shape, 1], bool), axis=-1)
    first = np.append(steps, np.inf)[reached.argmax(axis=-1)]
    return Steps(tasks=tuple(tasks), steps=np.where(diverged, np.inf, first))


def performance_profile(
    arms: Mapping[str, Steps], ratios: Sequence[float]
) -> dict[str, Float[np.ndarray, " ratios"]]:
    r"""The share of an arm's runs that took at most so many times the steps of the fastest arm.

    .. math:: \rho(\tau) = \frac{1}{n} \#\{i : t_i \le \tau \min_{arms} t_i\}

    over all tasks, seeds and rates that the arm ran. The fastest is taken for each of them by
    itself, among the arms that ran it. A miss is never counted as reached, and stays in
    :math:`n` where all arms missed. An arm that lacks a task is not judged by it, so that its
    profile is over other runs than the others' are.

    Args:
      arms: by name, with the same seeds and rates.
      ratios: the :math:`\tau` of the profile's points, each at least 1.

    Returns:
      The shares, in [0, 1], for each arm.

    Raises:
      ValueError: for a ratio below 1, or arms that differ in seeds or rates.

    Example:
      >>> fast = Steps(tasks=("digits",), steps=np.array([[[10.0, 30.0]]]))
      >>> slow = Steps(tasks=("digits",), steps=np.array([[[20.0, np.inf]]]))
      >>> shares = performance_profile({"fast": fast, "slow": slow}, [1.0, 2.0, 100.0])
      >>> shares["slow"].tolist()
      [0.0, 0.5, 0.5]

    References:
      Dolan and Moré, 2002, "Benchmarking Optimization Software with Performance Profiles",
      arXiv:cs/0102001.
    """
    if not min(ratios, default=1.0) >= 1.0:
        raise ValueError(f"ratios must each be at least 1, got {ratios}")
    relative = _over_fastest(arms)
    points = np.asarray(ratios, np.float64)
    return {
        name: (times[:, None] <= np.minimum(points, np.finfo(float).max)).mean(axis=0)
        for name, times in relative.items()
    }


def profile_score(arms: Mapping[str, Steps], *, largest_ratio: float = 4.0) -> dict[str, float]:
    r"""The mean height of each arm's `performance_profile` up to a largest ratio.

    .. math:: \frac{1}{r - 1} \int_1^r \rho(\tau) \, d\tau

    with ``largest_ratio`` for :math:`r`, exact: the profile is a step function. It is 1 for an arm
    that is the fastest everywhere and 0 for one that is never within that ratio of the fastest.

    Args:
      arms: by name, with the same seeds and rates.
      largest_ratio: above 1; 4 is AlgoPerf's.

    Returns:
      The score, in [0, 1], of each arm.

    Raises:
      ValueError: for a largest ratio out of range, or arms that differ in seeds or rates.

    References:
      Dahl et al., 2023, "Benchmarking Neural Network Training Algorithms", arXiv:2306.07179.
    """
    if not 1 < largest_ratio < np.inf:
        raise ValueError(f"largest_ratio must be finite and above 1, got {largest_ratio}")
    return {
        name: float(np.clip((largest_ratio - times) / (largest_ratio - 1), 0.0, 1.0).mean())
        for name, times in _over_fastest(arms).items()
    }


def _over_fastest(arms: Mapping[str, Steps]) -> dict[str, Float[np.ndarray, " runs"]]:
    """Each arm's steps over those of the fastest arm that ran the same, +inf for a miss."""
    shapes = {arm.steps.shape[1:] for arm in arms.values()}
    if len(shapes) > 1:
        raise ValueError(f"arms must have the same seeds and rates, got {sorted(shapes)}")
    fastest = {}
    for arm in arms.values():
        for task, steps in zip(arm.tasks, arm.steps, strict=True):
            fastest[task] = np.minimum(steps, fastest.get(task, np.inf))
    relative = {}
    for name, arm in arms.items():
        best = np.stack([fastest[task] for task in arm.tasks])
        # The target may be reached at step 0, before any training.
        with np.errstate(divide="ignore", invalid="ignore"):
            times = np.where(arm.steps == best, 1.0, arm.steps / best)
        relative[name] = np.where(np.isinf(arm.steps), np.inf, times).ravel()
    return relative
