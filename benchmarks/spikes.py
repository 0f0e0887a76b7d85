"""How often does `skip_spikes` drop a step that is none, and does it drop those that are?

Run:     python benchmarks/spikes.py [--seeds 8] [--steps 10000] [--out spikes.json]
Time:    under a minute on two cores.
Expect:  a table with a row per kind of training, beside two peers written in NumPy from their
         descriptions: Levanter's rule (a loss or norm above the mean plus six standard deviations
         of the last 128, skipped and non-finite ones among them, once half of those are there) and
         `optax.apply_if_finite` (what is not finite). False skips are those of clean steps per
         10,000. "Found" is the share of planted spikes, one every 500 steps, that are dropped: a
         loss 12 standard deviations too high. "After a NaN" is how many of the 140 clean steps
         behind one are dropped. The exit code is 1 if a claim that the table is there for does not
         hold.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import meta_optax as mo

NOISE = 0.1
EVERY, HEIGHT, AFTER = 500, 12.0, 140
PEER_WINDOW, PEER_DEVIATIONS = 128, 6.0
OURS, LEVANTER, OPTAX = "skip_spikes", "Levanter's rule", "apply_if_finite"


class Series(NamedTuple):
    """Losses and gradient norms of several seeds, [seeds, steps]."""

    loss: np.ndarray
    norm: np.ndarray


def make_series(kind: str, seeds: int, steps: int) -> Series:
    """Clean training of a kind; noise has the standard deviation `NOISE`."""
    rng = np.random.default_rng(0)
    time = np.arange(steps) / steps
    noise, other = NOISE * rng.standard_normal((2, seeds, steps))
    if kind == "Student t(3)":
        noise, other = NOISE * rng.standard_t(3, (2, seeds, steps))
    if kind == "autocorrelated, 0.9":
        for i in range(1, steps):
            noise[:, i] = 0.9 * noise[:, i - 1] + np.sqrt(0.19) * noise[:, i]
    level = np.ones_like(time)
    if kind == "steady fall":
        level = 5.0 - 4.0 * time
    if kind == "power law":
        level = 1.0 + 9.0 / np.sqrt(1.0 + np.arange(steps))
    rise = np.ones_like(time)
    if kind == "warm-up":  # the norm grows a thousandfold in 500 steps
        rise = 1e3 ** np.minimum(np.arange(steps) / 500, 1.0)
    return Series(loss=2.0 + level + noise, norm=rise * np.exp(other))


KINDS = (
    "Gaussian",
    "Student t(3)",
    "autocorrelated, 0.9",
    "steady fall",
    "power law",
    "warm-up",
)


def ours(series: Series) -> np.ndarray:
    """Which steps `skip_spikes` drops."""
    tx = mo.skip_spikes(optax.identity())
    grads = jnp.ones([])

    def step(state: Any, row: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        loss, norm = row
        updates, state = tx.update(grads, state, value=loss, grad_norm=norm)
        return state, jnp.asarray(updates) == 0

    def run(loss: jax.Array, norm: jax.Array) -> jax.Array:
        return jax.lax.scan(step, tx.init(grads), (loss, norm))[1]

    rows = (jnp.asarray(x, jnp.float32) for x in series)
    return np.asarray(jax.jit(jax.vmap(run))(*rows))


def levanter(series: Series) -> np.ndarray:
    """Which steps a rule of mean and standard deviation drops, as its description has it."""
    dropped = np.zeros(series.loss.shape, bool)
    for values in series:
        for i in range(PEER_WINDOW // 2, values.shape[1]):
            last = values[:, max(0, i - PEER_WINDOW) : i]
            limit = last.mean(axis=1) + PEER_DEVIATIONS * last.std(axis=1)
            # A NaN in the window makes the limit NaN, below which nothing is.
            dropped[:, i] |= ~(values[:, i] <= limit)
    return dropped


def apply_if_finite(series: Series) -> np.ndarray:
    """Which steps are dropped because something is not finite."""
    return ~(np.isfinite(series.loss) & np.isfinite(series.norm))


RULES: dict[str, Callable[[Series], np.ndarray]] = {
    OURS: ours,
    LEVANTER: levanter,
    OPTAX: apply_if_finite,
}


def measure(rule: Callable[[Series], np.ndarray], series: Series) -> dict[str, float]:
    """False skips per 10,000 steps, the share of planted spikes found, and those after a NaN."""
    steps = series.loss.shape[1]
    planted, broken = series.loss.copy(), series.loss.copy()
    at = np.arange(EVERY, steps, EVERY)
    planted[:, at] += HEIGHT * NOISE
    middle = steps // 2
    broken[:, middle] = np.nan
    clean = rule(series)
    behind = rule(series._replace(loss=broken))[:, middle + 1 : middle + 1 + AFTER]
    return {
        "false_skips": 1e4 * float(clean.mean()),
        "found": float(rule(series._replace(loss=planted))[:, at].mean()),
        "after_nan": float(behind.sum(axis=1).mean()),
    }


def print_table(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints the table in Markdown: each cell is false skips, found, after a NaN."""
    print("False skips per 10,000 / spikes found / dropped after a NaN\n")
    print(f"| training | {' | '.join(RULES)} |")
    print(f"|---|{'---:|' * len(RULES)}")
    for kind, row in rows.items():
        cells = [
            f"{m['false_skips']:.1f} / {m['found']:.0%} / {m['after_nan']:.0f}"
            for m in row.values()
        ]
        print(f"| {kind} | {' | '.join(cells)} |")


def failures(rows: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What was claimed and did not come out."""
    light = [kind for kind in KINDS if kind != "Student t(3)"]
    claims = {
        "no false skip under Gaussian noise": rows["Gaussian"][OURS]["false_skips"] == 0,
        "at most one in 10,000 where tails are light": all(
            rows[kind][OURS]["false_skips"] <= 1 for kind in light
        ),
        "none is dropped after a NaN that would not be without it": all(
            rows[kind][OURS]["after_nan"] == 0 for kind in light
        ),
        "every planted spike is found in Gaussian noise": rows["Gaussian"][OURS]["found"] == 1,
    }
    return [claim for claim, holds in claims.items() if not holds]


def main() -> int:
    """Reads the options, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.steps < 2 * EVERY:
        parser.error(f"--seeds must be at least 1, --steps at least {2 * EVERY}")
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        series = make_series(kind, arguments.seeds, arguments.steps)
        rows[kind] = {name: measure(rule, series) for name, rule in RULES.items()}
    print_table(rows)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    failed = failures(rows)
    print(f"\nDoes not hold: {'; '.join(failed)}." if failed else "\nAll claims hold.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
