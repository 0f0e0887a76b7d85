"""What a run has shown a controller: its intervals' losses and norms, in units that no scale moves.

Rows are averaged over the interval between two decisions. Losses are then compared on a log scale,
so that a loss in other units, or of another task, reads the same.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meta_optax._core import select
from meta_optax._counts import keep_room
from meta_optax._history import MAD_TO_DEVIATION, Window, empty_window, push

# The intervals that are kept, and those whose line is the slope.
_KEPT, _LINE = 16, 8
# The least deviation of logarithms, of losses and of norms: float32 tells no less apart.
_LEAST = 1e-6
# What losses are kept within, so that no square of one overflows, and norms.
_LARGEST_LOSS, _LARGEST_NORM = 1e18, 1e30


class Interval(NamedTuple):
    """Running means of the rows of one interval: of the loss, its square and the norms' logs."""

    count: Int[Array, ""]
    loss: Float[Array, ""]
    squares: Float[Array, ""]
    log_grad_norm: Float[Array, ""]
    log_param_norm: Float[Array, ""]


class Signals(NamedTuple):
    """What is kept of a run.

    Attributes:
      interval: the rows since the last decision.
      ended: how many intervals have ended.
      unit: below this size of the loss the log scale is linear.
      losses: the last intervals' log losses.
      grad_norms: the last intervals' log gradient norms.
      noise: the variance of an interval's log loss, from its own rows, averaged over intervals.
      best: the lowest log loss of an interval.
      first_loss: the first interval's log loss.
      first_grad_norm: the first interval's log gradient norm.
      first_param_norm: the first row's log norm of the params.
      param_norms: the last two intervals' log norms of the params.
    """

    interval: Interval
    ended: Int[Array, ""]
    unit: Float[Array, ""]
    losses: Window
    grad_norms: Window
    noise: Float[Array, ""]
    best: Float[Array, ""]
    first_loss: Float[Array, ""]
    first_grad_norm: Float[Array, ""]
    first_param_norm: Float[Array, ""]
    param_norms: Float[Array, " two"]


class Reading(NamedTuple):
    """What the intervals say; all are 0 before there is anything to say.

    Attributes:
      slope_score: the t statistic of the slope of the last eight log losses; below 0 they fall.
      fall: by how much the log loss fell in the last interval.
      fall_score: that fall over its standard error.
      surplus: the fall beyond what a power law through the intervals before predicts.
      excess: the log loss above the lowest one.
      progress: the log loss below the first one.
      noise: the standard deviation of an interval's log loss.
      grad_score: the robust z-score of the last log gradient norm among those kept.
      grad_change: the log gradient norm above the first one.
      param_change: the log norm of the params above the first one.
      param_move: by how much the log norm of the params rose in the last interval.
    """

    slope_score: Float[Array, ""]
    fall: Float[Array, ""]
    fall_score: Float[Array, ""]
    surplus: Float[Array, ""]
    excess: Float[Array, ""]
    progress: Float[Array, ""]
    noise: Float[Array, ""]
    grad_score: Float[Array, ""]
    grad_change: Float[Array, ""]
    param_change: Float[Array, ""]
    param_move: Float[Array, ""]


def empty_signals() -> Signals:
    """The state before the first row."""
    return Signals(
        interval=_empty_interval(),
        ended=jnp.zeros([], jnp.int32),
        unit=jnp.ones([], jnp.float32),
        losses=empty_window(_KEPT),
        grad_norms=empty_window(_KEPT),
        noise=jnp.zeros([], jnp.float32),
        best=jnp.zeros([], jnp.float32),
        first_loss=jnp.zeros([], jnp.float32),
        first_grad_norm=jnp.zeros([], jnp.float32),
        first_param_norm=jnp.zeros([], jnp.float32),
        param_norms=jnp.zeros([2], jnp.float32),
    )


def add_row(
    state: Signals,
    value: Float[Array, ""],
    grad_norm: Float[Array, ""],
    param_norm: Float[Array, ""],
) -> Signals:
    """The state with one more row in the interval; the loss is kept within 1e18 either way."""
    old = state.interval
    count = keep_room(old.count, 1, 1) + 1
    share = 1.0 / count.astype(jnp.float32)
    value = jnp.clip(value, -_LARGEST_LOSS, _LARGEST_LOSS)
    # Welford's update: a sum of squares would lose what differs.
    loss = old.loss + (value - old.loss) * share
    squares = old.squares + ((value - old.loss) * (value - loss) - old.squares) * share
    interval = Interval(
        count=count,
        loss=loss,
        squares=jnp.maximum(squares, 0.0),
        log_grad_norm=old.log_grad_norm + (_log(grad_norm) - old.log_grad_norm) * share,
        log_param_norm=old.log_param_norm + (_log(param_norm) - old.log_param_norm) * share,
    )
    is_first = (state.ended == 0) & (old.count == 0)
    first = jnp.where(is_first, _log(param_norm), state.first_param_norm)
    return state._replace(interval=interval, first_param_norm=first)


def end_interval(state: Signals, linear_below: float) -> Signals:
    """The state with the interval's means among those kept, and a new interval begun.

    Args:
      state: what is kept.
      linear_below: where the log scale becomes a linear one, which goes on below zero, as a share
        of the first interval's loss.
    """
    interval = state.interval
    is_first = state.ended == 0
    unit = jnp.maximum(linear_below * jnp.abs(interval.loss), 1.0 / _LARGEST_LOSS)
    unit = jnp.where(is_first, unit, state.unit)
    log_loss = _log_scale(interval.loss / unit)
    # By the slope of the log scale there.
    rows = interval.count.astype(jnp.float32)
    deviation = jnp.sqrt(interval.squares / rows) / jnp.hypot(interval.loss, 2.0 * unit)
    noise = jnp.minimum(deviation, 1.0) ** 2
    # A single row says nothing of its noise.
    seen = (jnp.minimum(state.ended, 7) + 1).astype(jnp.float32)
    share = jnp.where(interval.count > 1, 1.0 / seen, 0.0)
    ended = Signals(
        interval=_empty_interval(),
        ended=keep_room(state.ended, 1, 1) + 1,
        unit=unit,
        losses=push(state.losses, log_loss),
        grad_norms=push(state.grad_norms, interval.log_grad_norm),
        noise=state.noise + (noise - state.noise) * share,
        best=jnp.where(is_first, log_loss, jnp.minimum(state.best, log_loss)),
        first_loss=jnp.where(is_first, log_loss, state.first_loss),
        first_grad_norm=jnp.where(is_first, interval.log_grad_norm, state.first_grad_norm),
        first_param_norm=state.first_param_norm,
        param_norms=jnp.stack(
            [
                jnp.where(is_first, interval.log_param_norm, state.param_norms[1]),
                interval.log_param_norm,
            ]
        ),
    )
    return select(interval.count > 0, ended, state)


def read_signals(state: Signals) -> Reading:
    """What the intervals that have ended say."""
    losses, last = state.losses.values, state.losses.values[-1]
    several = state.ended > 1
    noise = jnp.sqrt(state.noise)
    fall = jnp.where(several, losses[-2] - last, 0.0)
    return Reading(
        slope_score=_slope_score(state.losses, noise),
        fall=fall,
        fall_score=fall / (math.sqrt(2.0) * jnp.maximum(noise, _LEAST)),
        surplus=jnp.where(several, _predict(state) - last, 0.0),
        excess=last - state.best,
        progress=state.first_loss - last,
        noise=noise,
        grad_score=_robust_score(state.grad_norms),
        grad_change=state.grad_norms.values[-1] - state.first_grad_norm,
        param_change=state.param_norms[1] - state.first_param_norm,
        param_move=state.param_norms[1] - state.param_norms[0],
    )


def _empty_interval() -> Interval:
    return Interval(
        count=jnp.zeros([], jnp.int32),
        loss=jnp.zeros([], jnp.float32),
        squares=jnp.zeros([], jnp.float32),
        log_grad_norm=jnp.zeros([], jnp.float32),
        log_param_norm=jnp.zeros([], jnp.float32),
    )


def _log_scale(ratio: Float[Array, ""]) -> Float[Array, ""]:
    """The logarithm of what is large, either way, and linear below 1; arcsinh(x / 2)."""
    size = jnp.abs(ratio)
    # XLA's own, compiled for a CPU, can be NaN beyond 2^63.
    near = jnp.arcsinh(jnp.clip(ratio, -1e15, 1e15) / 2.0)
    return jnp.where(size > 1e15, jnp.sign(ratio) * jnp.log(jnp.maximum(size, 1.0)), near)


def _log(norm: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.log(jnp.clip(norm, 1.0 / _LARGEST_NORM, _LARGEST_NORM))


def _line(
    times: Float[Array, " n"], values: Float[Array, " n"], used: Bool[Array, " n"]
) -> tuple[Array, Array, Array, Array]:
    """The line of least squares: its slope, the means of both, and the sum of squared times."""
    weights = used.astype(jnp.float32)
    total = jnp.maximum(weights.sum(), 1.0)
    time, value = (weights * times).sum() / total, (weights * values).sum() / total
    centred = weights * (times - time)
    spread = (centred**2).sum()
    slope = (centred * (values - value)).sum() / jnp.maximum(spread, _LEAST)
    return slope, time, value, spread


def _slope_score(losses: Window, noise: Float[Array, ""]) -> Float[Array, ""]:
    """The slope of the last intervals over its standard error, from their own residuals."""
    values = losses.values[-_LINE:]
    times = jnp.arange(_LINE, dtype=jnp.float32)
    count = jnp.minimum(losses.count, _LINE).astype(jnp.float32)
    used = times >= _LINE - count
    slope, time, value, spread = _line(times, values, used)
    residuals = jnp.where(used, values - value - slope * (times - time), 0.0)
    freedom = count - 2.0
    variance = (residuals**2).sum() / jnp.maximum(freedom, 1.0)
    # Three points may lie on a line by chance: no less than the noise within intervals.
    error = jnp.sqrt(jnp.maximum(variance, noise**2) / jnp.maximum(spread, _LEAST))
    return jnp.where(freedom > 0, slope / jnp.maximum(error, _LEAST), 0.0)


def _predict(state: Signals) -> Float[Array, ""]:
    """The last interval's log loss, by a power law of time through the eight before it.

    A power law is a line over the logarithm of time; of one interval only, it is flat. A loss that
    rose is not predicted to rise on.
    """
    values = state.losses.values[-_LINE - 1 : -1]
    back = jnp.arange(_LINE, 0, -1, dtype=jnp.float32)
    now = state.ended.astype(jnp.float32)
    used = back < state.losses.count.astype(jnp.float32)
    times = jnp.log(jnp.maximum(now - back, 1.0))
    slope, time, value, _ = _line(times, values, used)
    return value + jnp.minimum(slope, 0.0) * (jnp.log(jnp.maximum(now, 1.0)) - time)


def _robust_score(window: Window) -> Float[Array, ""]:
    """The newest value's distance from the median, over the robust deviation of all."""
    held = jnp.arange(_KEPT, dtype=jnp.int32) >= _KEPT - window.count
    values = jnp.where(held, window.values, jnp.nan)
    median = jnp.nanmedian(values)
    deviation = MAD_TO_DEVIATION * jnp.nanmedian(jnp.abs(values - median))
    score = (window.values[-1] - median) / jnp.maximum(deviation, 1e-2)
    return jnp.where(window.count > 2, score, 0.0)
