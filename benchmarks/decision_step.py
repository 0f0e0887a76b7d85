"""What one decision of a policy costs, beside one training step of `examples/train_moe.py`.

Run:     python benchmarks/decision_step.py [--strategies policy_gradient ...] [--rounds 201]
         (needs the example's packages: pip install ".[examples]")
Time:    about two minutes on two cores, most of it compiling and training steps.
Expect:  a row per strategy, with a decision at every step: the time of what is decided and applied
         when the norms are given, one of fifty in a compiled loop; the same as a compiled call by
         itself, which hands its state over; and such a call that also measures the norms of the
         example's gradients and params. Each as a share of the example's training step under AdamW.
         All take turns in one process, one call each a round, so that a noisy machine is noisy for
         all; times are medians.
"""

import argparse
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import meta_optax as mo

# Examples are scripts, and no package: what they hold is found by its folder.
sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
from corpora import CORPORA
from moe_model import BYTES, ModelConfig, MoeTransformer
from train_moe import BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, loss_and_statistics

METRICS = ("value", "grad_norm", "param_norm", "gate_entropy_normalized", "max_violation")
RATES = ("learning_rate", "gate_learning_rate", "expert_learning_rate")
# Each decides at every step; `reinforce` then also updates its policy at every one.
STRATEGIES: dict[str, Callable[[], mo.MetaOptimizer]] = {
    "policy_gradient": lambda: mo.policy_gradient(update_frequency=1),
    "reinforce": lambda: mo.reinforce(update_frequency=1, batch_size=1),
    "learned": lambda: mo.learned(update_frequency=1),
}
IN_A_LOOP = 50
Call = Callable[[], None]


def compiled(advance: Callable[..., Any], carry: Any, *given: Any) -> Call:
    """A call that advances what the last one left, which is donated, and waits for its end."""
    run = jax.jit(advance, donate_argnums=0).lower(carry, *given).compile()
    # Copies: what is donated may be one array under two names, or the caller's own.
    held = [jax.tree.map(jnp.copy, carry)]

    def call() -> None:
        held[0] = jax.block_until_ready(run(held[0], *given))

    return call


def training_step(graphdef: nnx.GraphDef, params: Any) -> Call:
    """The example's model and loss on random bytes, under plain AdamW."""
    shape = (BATCH_SIZE, ModelConfig().length + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, BYTES)
    batch = {"tokens": tokens, "corpus": jnp.arange(BATCH_SIZE) % len(CORPORA)}
    inject = optax.inject_hyperparams(optax.adamw)
    tx = inject(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        grads = jax.grad(lambda params: loss_and_statistics(graphdef, params, batch)[0])(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return compiled(step, (params, tx.init(params)), batch)


def decision(strategy: mo.MetaOptimizer, times: int) -> Call:
    """What is observed and applied so many times, from metrics that are there."""
    rates = dict.fromkeys(RATES, jnp.float32(LEARNING_RATE))
    base = {**rates, "weight_decay": jnp.float32(WEIGHT_DECAY)}
    metrics = dict.fromkeys(METRICS, jnp.float32(0.5))

    def decide(carry: Any, base: Any, metrics: Any) -> Any:
        state, step, used = carry
        state = strategy.observe(state, {**metrics, **used, "step": step})
        return state, step + 1, strategy.apply(state, base)

    def several(carry: Any, base: Any, metrics: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda i, carry: decide(carry, base, metrics), carry)

    return compiled(several, (strategy.init(), jnp.int32(1), base), base, metrics)


def decision_with_norms(strategy: mo.MetaOptimizer, params: Any) -> Call:
    """The same around an optimizer that does nothing, so that what is left is the norms."""

    def nothing(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
        del learning_rate, weight_decay
        return optax.identity()

    inject = mo.inject_meta_hyperparams(nothing, strategy)
    tx = inject(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def decide(state: Any, params: Any) -> Any:
        return tx.update(params, state, params, value=jnp.float32(0.5))[1]

    return compiled(decide, tx.init(params), params)


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Seconds of one call of each, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    # The first two rounds touch fresh memory.
    return {name: float(np.median(times[2:])) for name, times in seconds.items()}


def main() -> None:
    """Compiles, measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=201, help="timed calls of each")
    arguments = parser.parse_args()
    graphdef, params = nnx.split(MoeTransformer(ModelConfig(), nnx.Rngs(0)), nnx.Param)
    calls = {"step": training_step(graphdef, params)}
    for name in arguments.strategies:
        calls[f"{name} in a loop"] = decision(STRATEGIES[name](), IN_A_LOOP)
        calls[f"{name} by itself"] = decision(STRATEGIES[name](), 1)
        calls[f"{name} with norms"] = decision_with_norms(STRATEGIES[name](), params)
    found = medians(calls, arguments.rounds)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{jax.devices()[0].device_kind} ({platform.machine()}), jax {jax.__version__}; "
        f"{size:,} params; training step {1e3 * found['step']:.1f} ms, {arguments.rounds} rounds\n"
    )
    print("| strategy | a decision, ms | as a call by itself, ms | with the norms, ms |")
    print("|---|---:|---:|---:|")
    for name in arguments.strategies:
        loop, alone, norms = (
            found[f"{name} {how}"] for how in ("in a loop", "by itself", "with norms")
        )
        times = (loop / IN_A_LOOP, alone, norms)
        cells = (f"{1e3 * t:.3f} ({100 * t / found['step']:.2f} %)" for t in times)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
