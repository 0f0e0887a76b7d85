"""What the plateau strategies decide by, as pure functions on arrays."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from meta_optax._core import BASE_PREFIX, Hyperparams, Metrics, forms

# What counts as no weight decay at all, where a bound relative to the base needs a base.
LEAST_WEIGHT_DECAY = 1e-6
# A scale of zero could never come back, an infinite growth would be one of zero's multiples.
_LEAST_SCALE = float(jnp.finfo(jnp.float32).tiny)
_MOST_GROWTH = 1e30


def count_bad(
    best: Float[Array, ""],
    bad: Int[Array, ""],
    value: Float[Array, ""],
    *,
    rtol: ArrayLike = 0.0,
    atol: ArrayLike = 0.0,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The best value so far, and how many were no better since.

    Better means ``value < best - (rtol * |best| + atol)``, which is right below zero too.
    """
    size = jnp.where(jnp.isfinite(best), jnp.abs(best), 0.0)
    better = value < best - (rtol * size + atol)
    return jnp.where(better, value, best), jnp.where(better, 0, optax.safe_increment(bad))


def is_cooling(left: Int[Array, ""], cooldown: ArrayLike) -> Bool[Array, ""]:
    """Whether a row is of a cooldown, of which there may be none."""
    return jnp.array(False) if isinstance(cooldown, int) and cooldown == 0 else left > 0


def cool_down(
    bad: Int[Array, ""], left: Int[Array, ""], fires: Bool[Array, ""], cooldown: ArrayLike
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The bad rows and the rows of cooldown left, after a row at which a cut fires or does not.

    Bad rows of a cooldown do not count.
    """
    if isinstance(cooldown, int) and cooldown == 0:
        return jnp.where(fires, 0, bad), left
    after = jnp.where(fires, cooldown, jnp.maximum(left - 1, 0)).astype(jnp.int32)
    return jnp.where(fires | is_cooling(left, cooldown), 0, bad), after


def cut(scale: Float[Array, ""], factor: ArrayLike, fires: Bool[Array, ""]) -> Float[Array, ""]:
    """The scale of the rate after a cut where one fires, never quite zero."""
    return jnp.where(fires, jnp.maximum(scale * factor, _LEAST_SCALE), scale)


def grow(growth: Float[Array, ""], factor: ArrayLike, fires: Bool[Array, ""]) -> Float[Array, ""]:
    """The growth of weight decay after one more where it fires, never infinite."""
    return jnp.where(fires, jnp.minimum(growth * factor, _MOST_GROWTH), growth)


def has_room(metrics: Metrics, scale: Float[Array, ""], min_lr: ArrayLike) -> Bool[Array, ""]:
    """Whether the cuts so far leave room for one more; yes where no rate is shown.

    What counts is the highest base, of all groups, under this strategy's own cuts: a rate that
    others bound, or a dry run that acts on none, must not let the scale fall without end.
    """
    rate = jnp.asarray(metrics.get("learning_rate", jnp.inf)).astype(jnp.float32)
    based = {
        k.removeprefix(BASE_PREFIX): v for k, v in metrics.items() if k.startswith(BASE_PREFIX)
    }
    if bases := forms(based, "learning_rate"):
        rate = jnp.stack([cut_rate(based[name], scale, min_lr) for name in bases]).max()
    return rate > jnp.asarray(min_lr, jnp.float32)


def cut_rate(base: Any, scale: Float[Array, ""], min_lr: ArrayLike) -> Float[Array, ""]:
    """The base rate under the cuts, which lead to ``min_lr`` at the lowest but lift nothing."""
    base = jnp.asarray(base).astype(jnp.float32)
    return jnp.maximum(base * scale, jnp.minimum(base, jnp.asarray(min_lr, jnp.float32)))


def grown_decay(
    base: Any, growth: Float[Array, ""], floor: ArrayLike, most: ArrayLike
) -> Float[Array, ""]:
    """Weight decay after its growth: ``base * growth``, at least ``floor * growth`` once grown.

    Repeating ``wd = max(wd * factor, least)`` from ``base`` gives, after n times,
    ``max(base * factor**n, least * factor**(n - 1))``: with ``growth = factor**n`` and
    ``floor = least / factor`` that is this, which needs no state but the growth. It stays below
    ``most`` times the base (or ``LEAST_WEIGHT_DECAY``, where that is more).
    """
    base = jnp.asarray(base).astype(jnp.float32)
    highest = float(jnp.finfo(jnp.float32).max)
    cap = jnp.minimum(most * jnp.maximum(base, LEAST_WEIGHT_DECAY), highest)
    grown = jnp.minimum(jnp.maximum(base * growth, floor * growth), cap)
    return jnp.where(growth > 1, grown, base)


def warmup_share(step: Int[Array, ""], warmup_steps: ArrayLike) -> Float[Array, ""]:
    """The share of the rate that a linear warm-up gives at this step, in (0, 1]."""
    whole = jnp.maximum(jnp.asarray(warmup_steps).astype(jnp.float32), 1.0)
    return jnp.minimum((step.astype(jnp.float32) + 1.0) / whole, 1.0)


def copy_for_plateau(
    strategy: str, hyperparams: Mapping[str, Any], *, controls_decay: bool = False
) -> Hyperparams:
    """A copy of the hyperparameters, among which must be one that a plateau controls.

    Raises:
      ValueError: if there is none, naming those that there are.
    """
    # A schedule for weight decay shows that alone; an optimizer without a rate is a mistake.
    is_decay = controls_decay and set(hyperparams) == {"weight_decay"}
    if not forms(hyperparams, "learning_rate") and not is_decay:
        raise ValueError(
            f"{strategy} controls 'learning_rate', which the optimizer does not take: its "
            f"hyperparameters are {sorted(hyperparams)}. Give the factory an argument of that name."
        )
    return dict(hyperparams)


def is_exactly(value: ArrayLike, number: float) -> bool:
    """Whether an argument is this number for certain, which a traced one never is."""
    return isinstance(value, float) and value == number
