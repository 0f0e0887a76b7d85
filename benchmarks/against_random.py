"""The online policy gradients beside a policy that draws at random, at rates ten times off.

Run:     python benchmarks/against_random.py [--task mlp_digits] [--seeds 20] [--first-seed 0]
         (needs the comparison: pip install ".[compare]")
Time:    about four minutes on two cores.
Expect:  a table: the final held-out loss of each arm over that of the comparison's `random_policy`
         (the rate halved, kept or doubled with equal chances at each fiftieth of the run), at a
         tenth and ten times the base rate that was best for the linear schedule over all tasks of
         the full comparison, together and apart, and at that rate itself. Seeds are paired: the
         same initial weights and batches. Ratios are interquartile means, with 95 % intervals
         clustered by seed. "Prior alone" is the policy that never learns.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

import meta_optax as mo
from meta_optax.compare import _arms
from meta_optax.compare._arms import ARMS
from meta_optax.compare._protocol import has_diverged
from meta_optax.compare._runs import Runs, make_runs
from meta_optax.compare._statistics import ratio_to_peer
from meta_optax.compare._tasks import TASKS
from meta_optax.compare._train import Lanes, Trainer

# What the full comparison's trials chose for the linear schedule.
RATE, WEIGHT_DECAY = 0.02037861, 1.764774e-05
MULTIPLES = (0.1, 1.0, 10.0)
MIS_SET = (0, 2)


def online(make: Callable[..., mo.MetaOptimizer], **arguments: Any) -> _arms.Arm:
    """An arm that does all the rest as `random_policy` does, the draws by the run's seed too."""
    return _arms._strategy(
        "",
        lambda s: make(seed=s.seed, **arguments),
        base=_arms.bare,
        wrap=_arms._warm_outside,
    )


def train(task: str, arm: _arms.Arm, seeds: np.ndarray) -> Runs:
    """All seeds at all rates."""
    made = TASKS[task]()
    lanes = Lanes(
        seed=np.repeat(seeds, len(MULTIPLES)),
        learning_rate=np.tile(RATE * np.asarray(MULTIPLES), len(seeds)),
        weight_decay=np.full(len(seeds) * len(MULTIPLES), WEIGHT_DECAY),
    )
    held_out = Trainer(made, arm, made.steps)(lanes, at_once=len(lanes.seed)).held_out
    shape = 1, len(seeds), len(MULTIPLES)
    return make_runs((task,), held_out[:, -1].reshape(shape), has_diverged(held_out).reshape(shape))


def at(runs: Runs, *indices: int) -> Runs:
    """The runs at some of the rates."""
    return runs._replace(losses=runs.losses[:, :, indices])


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="mlp_digits", choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    seeds = np.arange(arguments.seeds) + arguments.first_seed
    steps = TASKS[arguments.task]().steps
    arms = {
        "policy_gradient": online(mo.policy_gradient),
        "policy_gradient, horizon known": online(mo.policy_gradient, horizon=steps),
        "policy_gradient, prior alone": online(mo.policy_gradient, policy_lr=0.0),
        "reinforce": online(mo.reinforce),
        "constant": ARMS["constant"],
        "linear": ARMS["linear"],
    }
    peer = train(arguments.task, ARMS["random_policy"], seeds)
    losses = ", ".join(f"{loss:.4f}" for loss in np.median(peer.losses[0], axis=0))
    print(f"median held-out loss of random_policy at {MULTIPLES}: {losses}")
    print("| arm | median losses | both mis-set | x 0.1 | x 10 | x 1 |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, arm in arms.items():
        runs = train(arguments.task, arm, seeds)
        ratios = [ratio_to_peer(at(runs, *i), at(peer, *i)) for i in (MIS_SET, (0,), (2,), (1,))]
        medians = ", ".join(f"{loss:.4f}" for loss in np.median(runs.losses[0], axis=0))
        texts = (f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})" for r in ratios)
        print(f"| {name} | {medians} | {' | '.join(texts)} |", flush=True)


if __name__ == "__main__":
    main()
