"""The learned policy beside the linear schedule that it acts on: well tuned, mis-set, and longer.

Run:     python benchmarks/learned.py [--tasks A,B] [--seeds 10] [--first-seed 0] [--weights FILE]
         (needs the comparison: pip install ".[compare]")
Time:    about 20 minutes on two cores for all tasks and 10 seeds; as many times that as --lengthen
         says.
Expect:  two tables: the final held-out loss of AdamW under `meta_optax.learned` on the linear
         schedule, over that of the same schedule alone, at multiples of the one base rate that was
         best for the linear schedule over all tasks of the full comparison. First over all tasks,
         then a task a row. Tasks and statistics are those of the comparison: interquartile means,
         with 95 % intervals clustered by seed. With --lengthen 4 runs are four times as long.
"""

import argparse
from typing import NamedTuple

import numpy as np

import meta_optax as mo
from meta_optax.compare import _arms
from meta_optax.compare._arms import ARMS, Arm
from meta_optax.compare._protocol import MULTIPLES, WELL_TUNED, has_diverged
from meta_optax.compare._runs import Runs, make_runs
from meta_optax.compare._statistics import ratio_to_peer, task_ratios
from meta_optax.compare._tasks import TASKS, why_missing
from meta_optax.compare._train import Lanes, Trainer

# What the full comparison's trials chose for the linear schedule.
RATE, WEIGHT_DECAY = 0.02037861, 1.764774e-05


class Losses(NamedTuple):
    """Final held-out losses of one arm on one task, and which runs diverged, [seeds, rates]."""

    final: np.ndarray
    diverged: np.ndarray


def learned_arm(weights: str | None) -> Arm:
    """AdamW under the policy on the linear schedule; with the package's weights, or a file's."""
    return _arms._strategy(
        "", lambda s: mo.learned(horizon=s.steps, weights=weights), base=_arms.linear
    )


def train(task: str, arm: Arm, seeds: int, lengthen: float, first: int = 0) -> Losses:
    """All seeds, from the first on, and all multiples of the rate."""
    made = TASKS[task]()
    trainer = Trainer(made, arm, round(made.steps * lengthen))
    lanes = Lanes(
        seed=np.repeat(np.arange(seeds) + first, len(MULTIPLES)),
        learning_rate=np.tile(RATE * np.asarray(MULTIPLES), seeds),
        weight_decay=np.full(seeds * len(MULTIPLES), WEIGHT_DECAY),
    )
    curves = trainer(lanes, at_once=len(lanes.seed))
    shape = seeds, len(MULTIPLES)
    return Losses(
        curves.held_out[:, -1].reshape(shape), has_diverged(curves.held_out).reshape(shape)
    )


def collect(losses: dict[str, Losses], columns: np.ndarray) -> Runs:
    """The runs at some of the multiples."""
    return make_runs(
        tuple(losses),
        np.stack([item.final[:, columns] for item in losses.values()]),
        np.stack([item.diverged[:, columns] for item in losses.values()]),
    )


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = [name for name in TASKS if why_missing(name) is None]
    parser.add_argument("--tasks", default=",".join(known))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lengthen", type=float, default=1.0)
    parser.add_argument("--weights", help="a file of weights; those of the package by default")
    arguments = parser.parse_args()
    learned = learned_arm(arguments.weights)
    ours, peers = {}, {}
    for task in arguments.tasks.split(","):
        how = arguments.seeds, arguments.lengthen, arguments.first_seed
        ours[task] = train(task, learned, *how)
        peers[task] = train(task, ARMS["linear"], *how)
        ratios = np.median(ours[task].final / peers[task].final, axis=0)
        print(f"{task}: medians at {MULTIPLES}: {np.round(ratios, 3)}", flush=True)
    every = np.arange(len(MULTIPLES))
    kinds = {"well tuned": every[[WELL_TUNED]], "mis-set": np.delete(every, WELL_TUNED)}
    kinds |= {f"x {multiple:g}": every[[i]] for i, multiple in enumerate(MULTIPLES)}
    print("\nover all tasks | ratio [95 % interval]")
    for kind, columns in kinds.items():
        ratio = ratio_to_peer(collect(ours, columns), collect(peers, columns))
        print(f"{kind} | {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    print("\ntask | well tuned | mis-set")
    tables = [
        task_ratios(collect(ours, columns), collect(peers, columns))
        for columns in list(kinds.values())[:2]
    ]
    for task in ours:
        row = (f"{t[task].value:.3f} [{t[task].low:.3f}, {t[task].high:.3f}]" for t in tables)
        print(f"{task} | {' | '.join(row)}")


if __name__ == "__main__":
    main()
