"""A window over the last values of a metric, of a fixed shape so that it can be a state."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


class Window(NamedTuple):
    """The last ``n`` values pushed, oldest first, and how many of them there are."""

    values: Float[Array, " n"]
    count: Int[Array, ""]


def empty_window(size: int) -> Window:
    """A window for ``size`` values that holds none."""
    return Window(values=jnp.zeros([size], jnp.float32), count=jnp.zeros([], jnp.int32))


def push(window: Window, value: Float[Array, ""]) -> Window:
    """Appends ``value``; the oldest value goes once the window is full."""
    size = window.values.shape[0]
    return Window(
        values=jnp.concatenate([window.values[1:], value[None]]),
        count=jnp.minimum(optax.safe_increment(window.count), size),
    )


def is_full(window: Window) -> Bool[Array, ""]:
    """Whether the window holds as many values as it can."""
    return window.count >= window.values.shape[0]


def clear_where(condition: Bool[Array, ""], window: Window) -> Window:
    """The window with nothing in it where ``condition`` holds, else as it was."""
    return window._replace(count=jnp.where(condition, 0, window.count))


def has_stalled(window: Window, *, tolerance: float = 1e-3) -> Bool[Array, ""]:
    r"""Whether a full window shows no fall: no later value is clearly below its first.

    .. math:: \forall i > 0: \; x_i \ge x_0 - \text{tolerance} \cdot |x_0|

    For positive values and the default tolerance this is ``x_i >= 0.999 * x_0``; taking the
    absolute value keeps the test right for metrics below zero.

    Args:
      window: the window over the metric.
      tolerance: the fall, as a share of the first value, that counts as one.
    """
    first = window.values[0]
    bar = first - tolerance * jnp.abs(first)
    return is_full(window) & jnp.all(window.values[1:] >= bar)
