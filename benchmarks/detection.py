"""How often do plateau rules cut a rate while the loss still falls, and how late once it does not?

Run:     python benchmarks/detection.py [--per-kind 38] [--seed 2026] [--out detection.json]
Time:    about four minutes on two cores.
Expect:  a table with a row per rule, all of them on the same simulated losses, 1,026 curves of the
         27 kinds of `loss_curves.py`. "False cuts" are those per 1,000 steps at which the loss
         without noise falls, of all curves and of those at each level of noise (in multiples of the
         mean fall a step). The delay is that from a fall's true end to the first cut after it, and
         600 where there is none within the stall's 600 steps ("missed"). Rules do not act on the
         losses. The exit code is 1 if `trend_plateau()` has more than a tenth of the false cuts of
         the best peer, or a longer mean delay. The best peer is the rule, at any of the settings
         here, with the fewest false cuts of those that miss at most one stall in twenty.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from loss_curves import LEVELS, STALL_STEPS, Curves, make_curves
from peers import greedy_lr_cuts, optax_cuts, torch_cuts

import meta_optax as mo

OURS = "trend_plateau()"
MOST_MISSED, SHARE = 0.05, 0.1
Rule = Callable[[np.ndarray], np.ndarray]


def cuts_of(meta: mo.MetaOptimizer, losses: np.ndarray) -> np.ndarray:
    """Where a strategy cuts; its scale starts at 1 after each step, which no rule looks at."""

    def step(state: Any, row: tuple[Any, Any]) -> tuple[Any, Any]:
        count, loss = row
        state = meta.observe(state, {"step": count, "value": loss})
        fires = state.rate_scale < 1.0
        return state._replace(rate_scale=jnp.ones([], jnp.float32)), fires

    def run(one: jax.Array) -> jax.Array:
        steps = jnp.arange(one.shape[0], dtype=jnp.int32)
        return jax.lax.scan(step, meta.init(), (steps, one))[1]

    return np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(losses)))


def make_rules() -> tuple[dict[str, Rule], dict[str, Rule]]:
    """The peers, at their defaults and slower, and ours."""
    peers: dict[str, Rule] = {
        "optax: reduce_on_plateau()": optax_cuts,
        "torch: ReduceLROnPlateau()": torch_cuts,
        "GreedyLR()": greedy_lr_cuts,
        "GreedyLR(smooth=True)": functools.partial(greedy_lr_cuts, window_size=50),
    }
    for patience in (30, 100, 300):
        peers[f"torch: patience={patience}"] = functools.partial(torch_cuts, patience=patience)
    for size in (5, 10, 25):
        peers[f"optax: accumulation_size={size}"] = functools.partial(
            optax_cuts, accumulation_size=size
        )
    peers["GreedyLR(patience=100)"] = functools.partial(greedy_lr_cuts, patience=100)
    # What weight decay would be grown by is not there; a warm-up would hide the first steps.
    plateau = functools.partial(mo.plateau, wd_increase_factor=1.0)
    advanced_plateau = functools.partial(
        mo.advanced_plateau, weight_decay_factor=1.0, warmup_steps=0
    )
    ours = {
        "plateau()": plateau(),
        "plateau(patience=100)": plateau(patience=100),
        "plateau(patience=10, smoothing=10)": plateau(patience=10, smoothing=10),
        "plateau(patience=50, smoothing=0.95)": plateau(patience=50, smoothing=0.95),
        "advanced_plateau()": advanced_plateau(),
        "advanced_plateau(patience=10, trend_window=10, smoothing=10)": advanced_plateau(
            patience=10, trend_window=10, smoothing=10
        ),
        OURS: mo.trend_plateau(),
        "trend_plateau(significance=1e-2)": mo.trend_plateau(significance=1e-2),
        "trend_plateau(significance=1e-6)": mo.trend_plateau(significance=1e-6),
        "trend_plateau(window=64)": mo.trend_plateau(window=64),
        "trend_plateau(window=512)": mo.trend_plateau(window=512),
        "greedy()": mo.greedy(),
    }
    return peers, {name: functools.partial(cuts_of, meta) for name, meta in ours.items()}


def summarise(name: str, is_peer: bool, cuts: np.ndarray, curves: Curves) -> dict[str, Any]:
    """A row of the table."""
    false = cuts & curves.is_falling
    levels = np.array([level for _, _, level in curves.kinds])
    of_level = {level: levels == level for level in LEVELS}
    offsets = curves.stalls[..., None] + np.arange(STALL_STEPS)
    after = np.take_along_axis(cuts[:, None, :], offsets, axis=2)
    is_found = after.any(axis=2)
    delays = np.where(is_found, after.argmax(axis=2) + 1, STALL_STEPS)
    return {
        "rule": name,
        "is_peer": is_peer,
        "false_cuts": 1e3 * false.sum() / curves.is_falling.sum(),
        "false_cuts_by_level": {
            level: 1e3 * false[rows].sum() / curves.is_falling[rows].sum()
            for level, rows in of_level.items()
        },
        "mean_delay": float(delays.mean()),
        "median_delay_by_level": {
            level: float(np.median(delays[rows])) for level, rows in of_level.items()
        },
        "missed": float(1.0 - is_found.mean()),
    }


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| rule | false cuts | noise 1 | noise 10 | noise 100 | mean delay "
        "| median delay by noise | missed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        by_level = " | ".join(f"{row['false_cuts_by_level'][level]:.3g}" for level in LEVELS)
        delays = ", ".join(f"{row['median_delay_by_level'][level]:.0f}" for level in LEVELS)
        lines.append(
            f"| {row['rule']} | {row['false_cuts']:.3g} | {by_level} | {row['mean_delay']:.0f} "
            f"| {delays} | {row['missed']:.1%} |"
        )
    return "\n".join(lines)


def best_peer(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The peer with the fewest false cuts, of those that find stalls at all."""
    able = [row for row in rows if row["is_peer"] and row["missed"] <= MOST_MISSED]
    return min(able, key=lambda row: row["false_cuts"])


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What was claimed and did not come out."""
    best, ours = best_peer(rows), next(row for row in rows if row["rule"] == OURS)
    claims = {
        "a tenth of the best peer's false cuts": ours["false_cuts"] <= SHARE * best["false_cuts"],
        "no more than its delay": ours["mean_delay"] <= best["mean_delay"],
        "as able to find stalls": ours["missed"] <= MOST_MISSED,
    }
    return [claim for claim, holds in claims.items() if not holds]


def main() -> int:
    """Measures all rules, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--per-kind", type=int, default=38)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    if arguments.per_kind < 1:
        parser.error("--per-kind must be at least 1")
    curves = make_curves(arguments.per_kind, arguments.seed)
    rows = []
    for is_peer, rules in zip((True, False), make_rules(), strict=True):
        for name, rule in rules.items():
            begin = time.perf_counter()
            rows.append(summarise(name, is_peer, rule(curves.values), curves))
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    print(format_rows(rows))
    print(f"\n{len(curves.values)} curves; the best peer is {best_peer(rows)['rule']}.")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    failed = failures(rows)
    print(f"Does not hold: {'; '.join(failed)}." if failed else "All claims hold.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
