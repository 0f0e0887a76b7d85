"""Does `guard_collapse` keep a router from collapsing, and leave a healthy one alone?

Run:     python benchmarks/collapse.py [--seeds 10] [--first-seed 0] [--steps 1000] [--out c.json]
         (needs scikit-learn: pip install ".[examples]")
Time:    about three minutes on two cores.
Expect:  a table with a row per way to train, all of them on the same seeds: the model and the data
         are those of `tiny_moe`, the collapse comes of a gate rate thirty times too high and no
         auxiliary loss. MaxVio is that of the trained model on all training images (0 is even, 7 is
         every image to the same two experts); "collapsed" is MaxVio above 2. Differences of the
         held-out loss are paired by seed, with a 95 % bootstrap interval of the median. The exit
         code is 1 if a claim that the table is there for does not hold.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from tiny_moe import Arm, Result, train

import meta_optax as mo

COLLAPSED, EVEN = 2.0, 0.5
GATE_RATE, HEALTHY_GATE_RATE, HEALTHY_WEIGHT = 3e-2, 1e-3, 0.1
ALONE, GUARDED = "left alone", "guard_collapse()"
HEALTHY = "healthy: "


def make_arms() -> dict[str, Arm]:
    """The ways to train, the guard's beside what people use."""
    watch = mo.log_only(mo.guard_collapse())
    healthy = {"gate_learning_rate": HEALTHY_GATE_RATE, "aux_loss_weight": HEALTHY_WEIGHT}
    return {
        ALONE: Arm(watch, GATE_RATE),
        GUARDED: Arm(mo.guard_collapse(), GATE_RATE),
        "guard_collapse(aux_loss_weight=0.1)": Arm(
            mo.guard_collapse(aux_loss_weight=0.1), GATE_RATE
        ),
        "guard_collapse(), balance bias too": Arm(
            mo.guard_collapse(), GATE_RATE, balance_update_rate=0.0
        ),
        "Switch loss, weight 0.01": Arm(watch, GATE_RATE, aux_loss_weight=0.01),
        "Switch loss, weight 0.1": Arm(watch, GATE_RATE, aux_loss_weight=0.1),
        "loss-free bias, rate 1e-3": Arm(watch, GATE_RATE, balance_update_rate=1e-3),
        "adapt_aux_loss from 0.01": Arm(mo.adapt_aux_loss(), GATE_RATE, aux_loss_weight=0.01),
        "gate rate set right by hand": Arm(watch, HEALTHY_GATE_RATE),
        HEALTHY + ALONE: Arm(watch, **healthy),
        HEALTHY + GUARDED: Arm(mo.guard_collapse(), **healthy),
    }


def interventions(result: Result) -> np.ndarray:
    """How often the guard began to act, by seed; it only looks on where it is in `log_only`."""
    return np.asarray(getattr(result.opt_state.meta_state, "interventions", np.zeros(1, int)))


def paired(result: Result, reference: Result) -> tuple[float, float, float]:
    """The median difference of held-out losses by seed, with its 95 % bootstrap interval."""
    differences = np.asarray(result.test_loss - reference.test_loss)
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0]), float(differences[0])
    interval = stats.bootstrap(
        (differences,), np.median, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(np.median(differences)), float(interval.low), float(interval.high)


def summarise(name: str, result: Result, reference: Result) -> dict[str, Any]:
    """A row of the table."""
    violation = np.asarray(result.max_violation)
    return {
        "arm": name,
        "max_violation": violation.tolist(),
        "collapsed": int((violation > COLLAPSED).sum()),
        "even": int((violation < EVEN).sum()),
        "test_loss": np.asarray(result.test_loss).tolist(),
        "test_accuracy": np.asarray(result.test_accuracy).tolist(),
        "loss_difference": paired(result, reference),
        "interventions": interventions(result).tolist(),
    }


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        "| | MaxVio, median (range) | above 2 | below 0.5 | held-out loss | against left alone "
        "(95 %) | accuracy | interventions |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        violation, seeds = row["max_violation"], len(row["max_violation"])
        middle, low, high = row["loss_difference"]
        began = row["interventions"]
        lines.append(
            f"| {row['arm']} | {np.median(violation):.2f} ({min(violation):.2f} to "
            f"{max(violation):.2f}) | {row['collapsed']}/{seeds} | {row['even']}/{seeds} | "
            f"{np.median(row['test_loss']):.3f} | {middle:+.3f} ({low:+.3f} to {high:+.3f}) | "
            f"{np.mean(row['test_accuracy']):.3f} | {min(began)} to {max(began)} |"
        )
    return "\n".join(lines)


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What was claimed and did not come out."""
    by_name = {row["arm"]: row for row in rows}
    most = 0.9 * len(rows[0]["max_violation"])
    claims = {
        "left alone, nine in ten collapse": by_name[ALONE]["collapsed"] >= most,
        "guarded, nine in ten end even": by_name[GUARDED]["even"] >= most,
        "guarded, a lower held-out loss": by_name[GUARDED]["loss_difference"][0] < 0,
        "healthy, the guard never acts": not sum(by_name[HEALTHY + GUARDED]["interventions"]),
    }
    return [claim for claim, holds in claims.items() if not holds]


def main() -> int:
    """Trains all arms, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    seeds = arguments.first_seed + jnp.arange(arguments.seeds)
    rows: list[dict[str, Any]] = []
    references: dict[bool, Result] = {}
    for name, arm in make_arms().items():
        begin = time.perf_counter()
        result = jax.block_until_ready(train(arm, seeds, arguments.steps))
        reference = references.setdefault(name.startswith(HEALTHY), result)
        rows.append(summarise(name, result, reference))
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    print(format_rows(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    failed = failures(rows)
    print(f"\nDoes not hold: {'; '.join(failed)}." if failed else "\nAll claims hold.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
