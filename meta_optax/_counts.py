"""Counts in int32 that never overflow."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def add_counts(first: Int[Array, ""], *others: Int[Array, ""]) -> Int[Array, ""]:
    """The sum of counts that are not negative, saturating."""
    total, most = first, jnp.iinfo(jnp.int32).max
    for count in others:
        total += jnp.minimum(count, most - total)
    return total


def keep_room(count: Int[Array, ""], room: int, period: int) -> Int[Array, ""]:
    """A count that ``room`` can be added to, and that is the same modulo the period.

    Where it would overflow, it goes back by whole periods. So a count that something turns by stays
    within a few periods of the largest int32 for good, and what turns goes on turning.
    """
    back = -(-room // period) * period
    return jnp.where(count > jnp.iinfo(jnp.int32).max - room, count - back, count)
