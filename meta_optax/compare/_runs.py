"""Final losses of an arm's runs, and their ratios to a peer's.

A run that diverged has no loss. It counts as a rank, behind every run that ended, and never as a
number in an average: how large a loss was when it was last finite says nothing, and one such
number would decide a mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


class Runs(NamedTuple):
    """Final held-out losses of one arm, built by `make_runs`; a task it lacks is not named.

    Attributes:
      tasks: the names of the tasks, along the first axis.
      losses: finite, or +inf where the run diverged.
    """

    tasks: tuple[str, ...]
    losses: Float[np.ndarray, "tasks seeds rates"]


class Divergence(NamedTuple):
    """How many of ``total`` runs diverged; ``by_task`` has the counts of each task."""

    share: float
    count: int
    total: int
    by_task: dict[str, int]


def make_runs(tasks: Sequence[str], losses: ArrayLike, diverged: ArrayLike) -> Runs:
    """Runs of one arm, checked, with +inf as the loss of those that diverged.

    Args:
      tasks: the names of the tasks that the arm ran, each once.
      losses: [tasks, seeds, rates], final held-out losses. What stands where a run diverged, NaN
        and infinities included, is not looked at.
      diverged: [tasks, seeds, rates]. A run whose loss is not finite has diverged in any case.

    Returns:
      The `Runs`, in float64.

    Raises:
      ValueError: for shapes that do not fit, no run at all, or a task named twice.
    """
    losses, diverged = np.asarray(losses, np.float64), np.asarray(diverged, bool)
    if losses.ndim != 3 or losses.shape != diverged.shape or len(losses) != len(tasks):
        raise ValueError(
            f"losses and diverged must both be [{len(tasks)} tasks, seeds, rates], "
            f"got {losses.shape} and {diverged.shape}"
        )
    if not losses.size:
        raise ValueError(f"losses must hold at least one run, got the shape {losses.shape}")
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks must each be named once, got {list(tasks)}")
    lost = diverged | ~np.isfinite(losses)
    return Runs(tasks=tuple(tasks), losses=np.where(lost, np.inf, losses))


def at_rates(runs: Runs, columns: Sequence[int]) -> Runs:
    """The runs at some of the base rates, such as the well-tuned one or all but it.

    Args:
      runs: of one arm.
      columns: indices along the last axis, at least one.

    Returns:
      `Runs` with only these rates.

    Raises:
      ValueError: if there is no column.
    """
    if not len(columns):
        raise ValueError("columns must name at least one rate, got none")
    return runs._replace(losses=runs.losses[:, :, list(columns)])


def paired_ratios(arm: Runs, peer: Runs) -> Float[np.ndarray, "tasks seeds rates"]:
    r"""Each run's loss over the peer's with the same task, seed and rate.

    .. math:: q_{tsr} = \ell^{arm}_{tsr} / \ell^{peer}_{tsr}

    It is :math:`+\infty` where only the arm diverged (the worst rank), 0 where only the peer did
    (the best) and 1 where both did (a tie). So a run that diverges costs its arm exactly one rank,
    whatever number it ended with.

    Args:
      arm: the runs that are judged; losses positive where they did not diverge.
      peer: the runs they are held against, with the same seeds and rates.

    Returns:
      Ratios for the tasks that both have, in the arm's order.

    Raises:
      ValueError: if they share no task or differ in seeds or rates, or for a loss that is not
        positive, with its task.

    Example:
      >>> arm = make_runs(["digits"], [[[1.0, 2.0, 9.0, 9.0]]], [[[False, False, True, True]]])
      >>> peer = make_runs(["digits"], [[[2.0, 9.0, 2.0, 9.0]]], [[[False, True, False, True]]])
      >>> paired_ratios(arm, peer)
      array([[[0.5, 0. , inf, 1. ]]])
    """
    tasks, ours, theirs = pair_up(arm, peer)
    check_positive(tasks, ours)
    check_positive(tasks, theirs)
    # A ratio beyond the range of floats is a rank too: infinite, or zero.
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return np.where(np.isinf(ours) & np.isinf(theirs), 1.0, ours / theirs)


def divergence(runs: Runs) -> Divergence:
    """How many runs diverged, in all and by task."""
    lost = np.isinf(runs.losses)
    counts = lost.sum(axis=(1, 2)).tolist()
    return Divergence(
        share=float(lost.mean()),
        count=sum(counts),
        total=lost.size,
        by_task=dict(zip(runs.tasks, counts, strict=True)),
    )


def pair_up(arm: Runs, peer: Runs):
    """The tasks that both have, and both arms' losses on them."""
    tasks = [task for task in arm.tasks if task in peer.tasks]
    if not tasks:
        raise ValueError(f"arm and peer must share a task, got {arm.tasks} and {peer.tasks}")
    if arm.losses.shape[1:] != peer.losses.shape[1:]:
        raise ValueError(
            "arm and peer must have the same seeds and rates, "
            f"got {arm.losses.shape[1:]} and {peer.losses.shape[1:]} of them"
        )
    ours = arm.losses[[arm.tasks.index(task) for task in tasks]]
    return tasks, ours, peer.losses[[peer.tasks.index(task) for task in tasks]]


def check_positive(tasks: Sequence[str], losses: Float[np.ndarray, "tasks seeds rates"]) -> None:
    lowest = losses.min(axis=(1, 2))
    for task, loss in zip(tasks, lowest, strict=True):
        if loss <= 0:
            raise ValueError(f"losses of {task!r} must be positive to form ratios, got {loss}")
