"""What each arm costs beside plain AdamW: step time, compile time and bytes of state."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import meta_optax as mo
from meta_optax.compare._arms import ARMS, Setting
from meta_optax.compare._models import init_moe

PLAIN = "AdamW"
_ROUNDS, _WARM = 21, 2
# About a million weights: a mixture of 8 experts, 128 wide.
_WIDTH, _HIDDEN, _EXPERTS = 128, 512, 8


class Cost(NamedTuple):
    """Of one arm's update alone, without the gradients' computation.

    Attributes:
      step_milliseconds: median over rounds.
      step_ratio: median over rounds of the ratio to plain AdamW in the same round.
      compile_seconds: of the update.
      state_bytes: of the optimizer's state.
      state_bytes_added: beyond plain AdamW's.
    """

    step_milliseconds: float
    step_ratio: float
    compile_seconds: float
    state_bytes: int
    state_bytes_added: int


class _Compiled(NamedTuple):
    step: Any
    state: Any
    metrics: Any
    seconds: float


def measure_overhead(arms: Sequence[str]) -> dict[str, Cost]:
    """Times one donated update of each arm in turn, round by round, in this process.

    Args:
      arms: names from `ARMS`.

    Returns:
      The costs by name, plain AdamW first.
    """
    params = init_moe(jax.random.key(0), _WIDTH, _HIDDEN, _WIDTH, _EXPERTS)
    grads = jax.tree.map(lambda leaf: 1e-2 * leaf, params)
    compiled = {PLAIN: _compile(optax.adamw(1e-3), params, grads)}
    for name in arms:
        setting = Setting(
            learning_rate=jnp.float32(1e-3),
            weight_decay=jnp.float32(1e-2),
            seed=jnp.int32(0),
            steps=1000,
            interval=20,
            has_experts=True,
        )
        compiled[name] = _compile(ARMS[name].make(setting), params, grads)
    carry = {name: (jax.tree.map(jnp.copy, params), c.state) for name, c in compiled.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(_ROUNDS + _WARM):
        for name, made in compiled.items():
            jax.block_until_ready(carry[name])
            start = time.perf_counter()
            carry[name] = made.step(*carry[name], grads, made.metrics)
            jax.block_until_ready(carry[name])
            seconds[name].append(time.perf_counter() - start)
    kept = {name: np.array(times[_WARM:]) for name, times in seconds.items()}
    sizes = {name: _bytes(state) for name, (_, state) in carry.items()}
    return {
        name: Cost(
            step_milliseconds=1e3 * float(np.median(kept[name])),
            step_ratio=float(np.median(kept[name] / kept[PLAIN])),
            compile_seconds=made.seconds,
            state_bytes=sizes[name],
            state_bytes_added=sizes[name] - sizes[PLAIN],
        )
        for name, made in compiled.items()
    }


def _compile(tx: optax.GradientTransformation, params: Any, grads: Any) -> _Compiled:
    update = optax.with_extra_args_support(tx).update
    probs = jnp.full((16, _EXPERTS), 1.0 / _EXPERTS)
    metrics = {"value": jnp.float32(1.0), **mo.router_metrics(probs, num_selected=2)}
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any, metrics: Any) -> Any:
        updates, state = update(grads, state, params, **metrics)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads, metrics)
    start = time.perf_counter()
    compiled = lowered.compile()
    # Donation takes each buffer once: what an init shares between leaves is copied.
    return _Compiled(compiled, jax.tree.map(jnp.copy, state), metrics, time.perf_counter() - start)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
