"""A window over the last values of a metric, of a fixed shape so that it can be a state."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

# The median absolute deviation of a normal distribution times this is its standard deviation.
MAD_TO_DEVIATION = 1.4826
# A deviation is never taken for smaller than this share of the median.
_LEAST_DEVIATION = 1e-3


class Window(NamedTuple):
    """The last ``n`` values pushed, oldest first, and how many of them there are."""

    values: Float[Array, "*layers n"]
    count: Int[Array, ""]


def empty_window(size: int, shape: tuple[int, ...] = ()) -> Window:
    """A window for ``size`` values, each of a shape, that holds none."""
    return Window(values=jnp.zeros([*shape, size], jnp.float32), count=jnp.zeros([], jnp.int32))


def push(window: Window, value: Float[Array, "*layers"]) -> Window:
    """Appends ``value``; the oldest value goes once the window is full."""
    size = window.values.shape[-1]
    return Window(
        values=jnp.concatenate([window.values[..., 1:], value[..., None]], axis=-1),
        count=jnp.minimum(optax.safe_increment(window.count), size),
    )


def smooth(
    average: Float[Array, "*layers"],
    value: Float[Array, "*layers"],
    count: Int[Array, ""],
    smoothing: Any,
) -> Float[Array, "*layers"]:
    """The exponential moving average with a new value; the first value is the first average."""
    return jnp.where(count > 0, smoothing * average + (1.0 - smoothing) * value, value)


class Smoothed(NamedTuple):
    """An average, and how many rows are in it."""

    average: Float[Array, ""]
    count: Int[Array, ""]


def empty_average(smoothing: int | float) -> Smoothed | None:
    """The average of no rows; None where the rows themselves are judged."""
    if smoothing == 1:
        return None
    return Smoothed(average=jnp.zeros([], jnp.float32), count=jnp.zeros([], jnp.int32))


def average_rows(
    state: Smoothed | None, value: Float[Array, ""], smoothing: int | float | Array
) -> tuple[Smoothed | None, Float[Array, ""], Bool[Array, ""]]:
    """The average with one more row, what is to be judged, and whether there is anything to.

    Args:
      state: the average so far.
      value: the row.
      smoothing: what an exponential moving average keeps, where that is below 1, which is judged
        at each row; else the rows of a block, whose mean is judged at its end; 1 is none.
    """
    if state is None:
        return state, value, jnp.array(True)
    if isinstance(smoothing, float):
        average = smooth(state.average, value, state.count, smoothing)
        count = jnp.ones_like(state.count)
        return Smoothed(average, count), average, jnp.array(True)
    count = jnp.where(state.count >= smoothing, 0, state.count) + 1
    # A mean that is updated does not overflow where a sum would.
    share = 1.0 / count.astype(jnp.float32)
    average = jnp.where(count == 1, value, state.average * (1.0 - share) + value * share)
    return Smoothed(average, count), average, count >= smoothing


def is_full(window: Window) -> Bool[Array, ""]:
    """Whether the window holds as many values as it can."""
    return window.count >= window.values.shape[-1]


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


def stands_out(
    window: Window, value: Float[Array, ""], threshold: ArrayLike, *, both_sides: bool = False
) -> Bool[Array, ""]:
    r"""Whether a value lies far above the window's values, or below them where both sides count.

    .. math::
      x - \text{median} > \text{threshold} \cdot
        \max(1.4826 \cdot \text{MAD}, 10^{-3} \cdot |\text{median}|)

    with MAD the median of the absolute distances from the median. Nothing stands out of a window
    that holds no value; an infinite threshold lets nothing stand out.

    Args:
      window: the window over the metric.
      value: the value to judge, which is not in the window yet.
      threshold: the distance in robust standard deviations.
      both_sides: whether a value far below stands out too.

    References:
      Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993: the modified z-score.
    """
    size = window.values.shape[-1]
    values = jnp.where(
        jnp.arange(size, dtype=jnp.int32) >= size - window.count, window.values, jnp.nan
    )
    median = jnp.nanmedian(values)
    deviation = MAD_TO_DEVIATION * jnp.nanmedian(jnp.abs(values - median))
    distance = jnp.abs(value - median) if both_sides else value - median
    # Multiplied, not divided: no deviation of zero makes this NaN, and NaN is no spike.
    return distance > threshold * jnp.maximum(deviation, _LEAST_DEVIATION * jnp.abs(median))
