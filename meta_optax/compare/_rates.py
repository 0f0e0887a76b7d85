"""What the rules of others share: a rate of their own in the state, and blocks of rows."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from meta_optax._core import BASE_PREFIX, Hyperparams, Metrics
from meta_optax._history import Smoothed

# Stands for the rate before the first row that was judged: that of the base.
NO_RATE = -1.0


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a `ValueError` if the value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def needs_value(metrics: Metrics) -> dict[str, int]:
    """What these rules need of any metrics: a scalar loss."""
    del metrics
    return {"value": 0}


def empty_block() -> Smoothed:
    """The mean of no rows."""
    return Smoothed(average=jnp.zeros([], jnp.float32), count=jnp.zeros([], jnp.int32))


def is_better(
    value: Float[Array, ""], best: Float[Array, ""], threshold: Any, mode: str
) -> Bool[Array, ""]:
    """Whether a value is better than the best, as the originals have it."""
    # Below zero a relative threshold takes a little more for better.
    return value < (best * (1.0 - threshold) if mode == "rel" else best - threshold)


def base_rate(metrics: Metrics) -> Float[Array, ""]:
    """The base of the rate, which every way to act shows."""
    return jnp.asarray(metrics[f"{BASE_PREFIX}learning_rate"]).astype(jnp.float32)


def current_rate(rate: Float[Array, ""], metrics: Metrics) -> Float[Array, ""]:
    """The rate in force: that of the state, or the base while there is none."""
    return jnp.where(rate < 0, base_rate(metrics), rate)


def apply_rate(state: Any, hyperparams: Mapping[str, Any]) -> Hyperparams:
    """The hyperparameters with the state's rate for theirs, once it has one."""
    base = jnp.asarray(hyperparams["learning_rate"]).astype(jnp.float32)
    rate = state.rate
    return {**hyperparams, "learning_rate": jnp.where(rate < 0, base, rate)}
