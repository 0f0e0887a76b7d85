"""Sequences of losses through a strategy, and where it cuts."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import meta_optax as mo


class Watched(NamedTuple):
    """The learning rate after each row, from 1, and the strategy's last state."""

    rates: np.ndarray
    state: Any

    @property
    def cuts(self) -> list[int]:
        """The rows at which the rate fell."""
        return np.flatnonzero(np.diff(self.rates, prepend=1.0) < 0).tolist()


@functools.cache
def _runner(meta: mo.MetaOptimizer) -> Any:
    """A strategy's own compiled scan: of one object, sequences of one length compile once."""

    def step(state, row):
        count, loss = row
        seen = {"value": loss, "step": count, "grad_norm": jnp.float32(1.0)}
        state = meta.observe(state, {**seen, "param_norm": jnp.float32(1.0)})
        return state, meta.apply(state, {"learning_rate": jnp.float32(1.0)})["learning_rate"]

    return jax.jit(lambda steps, rows: jax.lax.scan(step, meta.init(), (steps, rows)))


def watch(meta: mo.MetaOptimizer, losses: Any, first_step: int = 0) -> Watched:
    """What a strategy makes of a rate of 1, row by row."""
    rows = jnp.asarray(losses)
    steps = first_step + jnp.arange(len(rows), dtype=jnp.int32)
    state, rates = _runner(meta)(steps, rows)
    return Watched(np.asarray(rates), state)
