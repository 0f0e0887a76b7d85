"""What the control costs: bytes moved, compile time and step time, beside what people use.

Run:     python benchmarks/overhead.py [--params 16] [--rounds 41] [--out overhead.json]
Time:    about a minute and a half on two cores, 5 GiB of memory.
Expect:  a table with a row per optimizer. All take the same gradients on the same params in one
         process, one step each in turn, so that a noisy machine is noisy for all; times are medians
         over the rounds, and ratios are medians of the ratios within a round to AdamW under
         `optax.inject_hyperparams`. Bytes are XLA's own count for the compiled step.
"""

import argparse
import json
import math
import pathlib
import platform
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import meta_optax as mo

PEER = "AdamW, inject_hyperparams"
RATE = 1e-4


class Arm(NamedTuple):
    """An optimizer to measure and the names of the metrics to pass to it."""

    tx: optax.GradientTransformation
    metrics: tuple[str, ...] = ()


class Compiled(NamedTuple):
    """A compiled step and what is known of it."""

    step: Any
    bytes_accessed: float
    compile_seconds: float
    state_bytes: int


def make_arms(labels: dict[str, str]) -> dict[str, Arm]:
    """What people would use otherwise, and every strategy of ours."""
    inf = math.inf
    router = ("gate_entropy", "gate_sparsity", "expert_usage")
    no_norms = mo.advanced_plateau(grad_norm_threshold=inf, weight_norm_threshold=inf)
    both = mo.chain(mo.advanced_plateau(), mo.smart_expert_gate())

    def inject(meta: mo.MetaOptimizer, factory: Any = optax.adamw) -> optax.GradientTransformation:
        return mo.inject_meta_hyperparams(factory, meta)(learning_rate=RATE)

    grouped = mo.moe_partition(optax.adamw, labels)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
    return {
        "AdamW": Arm(optax.adamw(RATE)),
        PEER: Arm(optax.inject_hyperparams(optax.adamw)(learning_rate=RATE)),
        "AdamW, reduce_on_plateau": Arm(
            optax.chain(optax.adamw(RATE), optax.contrib.reduce_on_plateau()), ("value",)
        ),
        "AdamW, clip_by_global_norm": Arm(clipped),
        "plateau (gradient norm)": Arm(inject(mo.plateau()), ("value",)),
        "plateau, no norm": Arm(inject(mo.plateau(wd_increase_factor=1.0)), ("value",)),
        "advanced_plateau (both norms)": Arm(inject(mo.advanced_plateau()), ("value",)),
        "advanced_plateau, no norms": Arm(inject(no_norms), ("value",)),
        "trend_plateau": Arm(inject(mo.trend_plateau()), ("value",)),
        "greedy": Arm(inject(mo.greedy()), ("value",)),
        "hold_spikes(plateau), no norm": Arm(
            inject(mo.hold_spikes(mo.plateau(wd_increase_factor=1.0))), ("value",)
        ),
        "AdamW, apply_if_finite": Arm(optax.apply_if_finite(optax.adamw(RATE), 5)),
        "skip_spikes(AdamW)": Arm(mo.skip_spikes(optax.adamw(RATE)), ("value",)),
        "AdamW, partition, injected": Arm(
            optax.inject_hyperparams(grouped)(learning_rate=RATE, gate_learning_rate=RATE / 10)
        ),
        "expert_gate": Arm(inject(mo.expert_gate(), grouped), router[:1]),
        "smart_expert_gate": Arm(inject(mo.smart_expert_gate(), grouped), router),
        "advanced_plateau + smart_expert_gate": Arm(inject(both, grouped), ("value", *router)),
        "the same, with_decisions": Arm(
            inject(mo.with_decisions(both), grouped), ("value", *router)
        ),
        "AdamW, scale_by_plateau": Arm(
            optax.chain(optax.adamw(RATE), mo.scale_by_plateau()), ("value",)
        ),
    }


def compile_step(arm: Arm, params: Any, metrics: dict[str, jax.Array]) -> Compiled:
    """Compiles one donated step of params, state and given gradients."""
    tx = optax.with_extra_args_support(arm.tx)

    def step(params: Any, state: Any, grads: Any, metrics: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, **metrics)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params, metrics)
    start = time.perf_counter()
    compiled = lowered.compile()
    leaves = jax.tree.leaves(state)
    return Compiled(
        step=compiled,
        bytes_accessed=(compiled.cost_analysis() or {})["bytes accessed"],
        compile_seconds=time.perf_counter() - start,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    )


def measure(arms: dict[str, Arm], shapes: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Compiles every arm, then times one step of each in turn, ``rounds`` times over."""
    key = jax.random.key(0)
    grads = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape, leaf.dtype), shapes)
    values = {
        "value": jnp.float32(1.0),
        "gate_entropy": jnp.float32(1.2),
        "gate_sparsity": jnp.float32(0.7),
        "expert_usage": jnp.full([8], 0.125, jnp.float32),
    }
    chosen = {name: {k: values[k] for k in arm.metrics} for name, arm in arms.items()}
    compiled = {name: compile_step(arm, shapes, chosen[name]) for name, arm in arms.items()}
    carry = {}
    for name, arm in arms.items():
        params = jax.tree.map(jnp.ones_like, grads)
        carry[name] = (params, arm.tx.init(params))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 2):
        for name in arms:
            jax.block_until_ready(carry[name])
            start = time.perf_counter()
            carry[name] = compiled[name].step(*carry[name], grads, chosen[name])
            jax.block_until_ready(carry[name])
            seconds[name].append(time.perf_counter() - start)
    # The first two rounds touch fresh memory.
    kept = {name: np.array(times[2:]) for name, times in seconds.items()}
    return {
        name: {
            "bytes_accessed": compiled[name].bytes_accessed,
            "bytes_added": compiled[name].bytes_accessed - compiled[PEER].bytes_accessed,
            "compile_seconds": compiled[name].compile_seconds,
            "step_milliseconds": 1e3 * float(np.median(kept[name])),
            "step_ratio": float(np.median(kept[name] / kept[PEER])),
            "state_bytes": compiled[name].state_bytes,
        }
        for name in arms
    }


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Prints the table in Markdown."""
    peer = rows[PEER]
    print("| optimizer | step, ms | ratio | bytes, MiB | ratio | bytes added | compile, s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['step_milliseconds']:.1f} | {row['step_ratio']:.2f} "
            f"| {row['bytes_accessed'] / 2**20:.1f} "
            f"| {row['bytes_accessed'] / peer['bytes_accessed']:.4f} "
            f"| {row['bytes_added']:+,.0f} | {row['compile_seconds']:.2f} |"
        )


def main() -> None:
    """Reads the options, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--params", type=int, default=16, help="millions of parameters (2^20)")
    parser.add_argument("--leaves", type=int, default=16, help="arrays that they are spread over")
    parser.add_argument("--rounds", type=int, default=41, help="timed steps of each optimizer")
    parser.add_argument("--out", type=pathlib.Path, help="write the numbers as JSON here")
    args = parser.parse_args()
    if min(args.params, args.rounds) < 1 or args.leaves < 3:
        parser.error("--params and --rounds must be at least 1, --leaves at least 3")
    rows_of_leaf = args.params * 1024 // args.leaves
    shapes = {
        f"w{i}": jax.ShapeDtypeStruct((rows_of_leaf, 1024), jnp.float32) for i in range(args.leaves)
    }
    labels = dict.fromkeys(shapes, "dense") | {"w0": "gate", "w1": "expert"}
    rows = measure(make_arms(labels), shapes, args.rounds)
    device = jax.devices()[0].device_kind
    print(
        f"{args.params} x 2^20 parameters in {args.leaves} arrays, {args.rounds} rounds, "
        f"{device} ({platform.machine()}), jax {jax.__version__}, optax {optax.__version__}, "
        f"Python {sys.version.split()[0]}\n"
    )
    print_table(rows)
    if args.out is not None:
        args.out.write_text(json.dumps({"device": device, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
