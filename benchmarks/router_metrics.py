"""What measuring routers costs: passes over the probabilities, and time, beside the plain way.

Run:     python benchmarks/router_metrics.py [--layers 32] [--tokens 8192] [--experts 64]
Time:    half a minute on two cores, 1 GiB of memory.
Expect:  a table with a row per call. Bytes are XLA's own count for the compiled computation, as
         multiples of the bytes of the probabilities; what a custom call (XLA's top-k on CPU) reads
         is not in that count, and is said. Times are medians over rounds in which every call is
         made once in turn.
"""

import argparse
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import meta_optax as mo


def plainly(
    probs: Float[Array, "layers tokens experts"], index: Int[Array, "layers tokens selected"]
) -> dict[str, Array]:
    """The same quantities as one writes them down: a reduction each, and one-hot counts."""
    experts = probs.shape[-1]
    usage = jax.nn.one_hot(index, experts).mean(axis=(1, 2))
    return {
        "gate_entropy": -(probs * jnp.log(probs + 1e-9)).sum(axis=-1).mean(),
        "gate_sparsity": (probs.max(axis=-1) > 0.5).mean(),
        "expert_usage": usage.mean(axis=0),
        "max_violation": (usage.max(axis=-1) * experts - 1).mean(),
        "load_cv": (usage.std(axis=-1) * experts).mean(),
        "dead_experts": (usage == 0).mean(),
    }


def main() -> None:
    """Compiles every call, takes their times in turn and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    shape = (arguments.layers, arguments.tokens, arguments.experts)
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), shape))
    index = jax.lax.top_k(probs, 2)[1]
    mask = jnp.arange(arguments.tokens) % 8 > 0
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "written plainly, with two indices": (plainly, (probs, index)),
        "router_metrics, with two indices": (mo.router_metrics, (probs, index)),
        "the same, masked": (lambda p, i, m: mo.router_metrics(p, i, mask=m), (probs, index, mask)),
        "the most probable expert alone": (mo.router_metrics, (probs,)),
        "the two most probable (and one pass of top-k)": (
            lambda p: mo.router_metrics(p, num_selected=2),
            (probs,),
        ),
    }
    compiled = {name: jax.jit(call).lower(*args).compile() for name, (call, args) in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(arguments.rounds + 1):
        for name, (_, args) in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            if round_:
                times[name].append(time.perf_counter() - begin)
    one_pass = 4 * math.prod(shape)
    print(f"[{', '.join(map(str, shape))}] float32: {one_pass / 2**20:.0f} MiB\n")
    print("| call | bytes, as passes over the probabilities | ms |")
    print("|---|---:|---:|")
    for name in calls:
        cost = compiled[name].cost_analysis() or {}
        passes = cost["bytes accessed"] / one_pass
        print(f"| {name} | {passes:.2f} | {1e3 * statistics.median(times[name]):.0f} |")


if __name__ == "__main__":
    main()
