"""Where a noisy metric is heading: slopes of spans of its past, tested with what noise allows.

What is kept are means of blocks of 1, 2, 4, ... rows, the last 64 of each size: sufficient
statistics for lines through spans of all lengths up to ``window``, in a state that grows with the
logarithm of the window.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from meta_optax._counts import keep_room
from meta_optax._history import MAD_TO_DEVIATION

# Blocks kept of each size: twice the longest span.
_BLOCKS = 64
# The lengths, in blocks, of the spans that are compared with as long a span before them.
_SPANS = (16, 23, 32)
SHORTEST_SPAN = min(_SPANS)
# A row is drawn to within so many robust deviations of the median of the rows before it; rows in
# a row that had to be drawn to the same side are a new level.
_RECENT = 9
_MOST_DEVIATIONS = 6.0
_NEW_LEVEL = 5
# A fall was there from this z-score, and has ended when less than this share of it is left.
_CERTAIN = 5.0
_REMAINDER = 0.25
# A slope is taken to be below zero at this z-score already, more readily than in a usual test: the
# doubt is the fall's. A shorter span that falls at this other one speaks against a stall.
_BELOW = -0.5
_STILL_FALLING = -1.645
# From this z-score on, the signs of the changes from block to block count too.
_MONOTONE = 3.0
_MOST_AUTOCORRELATION = 0.95
# Rows beyond this are drawn to it, so that no sum of them overflows.
_LARGEST = 1e30
_TINY = float(np.finfo(np.float32).tiny)


class TrendState(NamedTuple):
    """What is kept of a metric's past; ``outliers`` counts those in a row, signed by their side."""

    recent: Float[Array, " recent"]
    recent_count: Int[Array, ""]
    outliers: Int[Array, ""]
    means: Float[Array, "sizes blocks"]
    partial: Float[Array, " sizes"]
    count: Int[Array, ""]


class Trend(NamedTuple):
    """What a metric's past says of its direction; z-scores are negative where it falls.

    Attributes:
      has_stalled: whether a fall that was there is shown to have ended.
      stalled_score: the z-score of the slope of the span that shows it.
      is_flat: whether the last ``window`` rows show no fall, and no part that ends now does.
      flat_score: the z-score of their slope.
      is_falling: whether a span that ends now falls, at the level of significance.
      is_certain: whether one falls beyond doubt.
      is_rising: whether one rises, at that level.
    """

    has_stalled: Bool[Array, ""]
    stalled_score: Float[Array, ""]
    is_flat: Bool[Array, ""]
    flat_score: Float[Array, ""]
    is_falling: Bool[Array, ""]
    is_certain: Bool[Array, ""]
    is_rising: Bool[Array, ""]


class _Fit(NamedTuple):
    """Lines through spans: slopes, sums of squared residuals and of products of neighbours."""

    slope: Float[Array, "sizes spans"]
    squares: Float[Array, "sizes spans"]
    products: Float[Array, "sizes spans"]


def empty_trend(window: int) -> TrendState:
    """The state before the first row."""
    sizes = _num_sizes(window)
    return TrendState(
        recent=jnp.zeros([_RECENT], jnp.float32),
        recent_count=jnp.zeros([], jnp.int32),
        outliers=jnp.zeros([], jnp.int32),
        means=jnp.zeros([sizes, _BLOCKS], jnp.float32),
        partial=jnp.zeros([sizes], jnp.float32),
        count=jnp.zeros([], jnp.int32),
    )


def clear_trend_where(condition: Bool[Array, ""], state: TrendState) -> TrendState:
    """The state with the evidence gone where ``condition`` holds; what a spike is stays known."""
    return state._replace(count=jnp.where(condition, 0, state.count))


def advance_trend(state: TrendState, value: Float[Array, ""]) -> TrendState:
    """The state with one more row.

    The row is drawn to within six robust deviations of the median of the nine before it (Huber's
    function, applied once), so that a spike weighs little. Five rows in a row that had to be
    drawn to the same side are no spikes but a new level, at which the evidence starts afresh.
    """
    value = jnp.clip(value, -_LARGEST, _LARGEST)
    drawn, side = _draw_in(state, value)
    # A value that is only carried on, as an evaluation's between two of them, is no new evidence.
    is_new = jnp.where(value != state.recent[-1], side, 0)
    run = jnp.where(jnp.sign(state.outliers) == side, state.outliers + is_new, side)
    is_new_level = jnp.abs(run) >= _NEW_LEVEL
    value_kept = jnp.where(is_new_level, value, drawn)
    largest = 2 ** (len(state.partial) - 1)
    before = keep_room(jnp.where(is_new_level, 0, state.count), 1, largest)
    sizes = jnp.asarray(2 ** np.arange(len(state.partial)), jnp.int32)
    # A mean that is updated does not overflow where a sum would.
    place = before % sizes
    partial = jnp.where(place == 0, 0.0, state.partial)
    partial += (value_kept - partial) / (place + 1).astype(jnp.float32)
    is_whole = place + 1 == sizes
    pushed = jnp.concatenate([state.means[:, 1:], partial[:, None]], axis=1)
    return TrendState(
        recent=jnp.concatenate([state.recent[1:], value[None]]),
        recent_count=jnp.minimum(state.recent_count, _RECENT - 1) + 1,
        outliers=jnp.where(is_new_level, 0, run),
        means=jnp.where(is_whole[:, None], pushed, state.means),
        partial=partial,
        count=before + 1,
    )


def read_trend(
    state: TrendState,
    window: int,
    significance: jax.typing.ArrayLike,
    min_evidence: jax.typing.ArrayLike = 2 * SHORTEST_SPAN,
) -> Trend:
    r"""Tests the slopes of the spans that end now.

    A line is fitted to each span of :math:`m` blocks and to the :math:`m` blocks before it. With
    :math:`\hat\phi` the autocorrelation of the residuals, a slope's standard error is that of
    least squares times :math:`\sqrt{(1 + \hat\phi) / (1 - \hat\phi)}`, as if there were
    :math:`m (1 - \hat\phi) / (1 + \hat\phi)` blocks, which the degrees of freedom are taken from.
    A smooth curve's residuals are as correlated as can be, whatever it does; so the signs of the
    changes within a span are counted as well, whose sum is at most :math:`\sqrt{m - 1}` wide under
    noise of any correlation, and which rule where they are nearly all the same.
    """
    sizes, spans = state.means.shape[0], (*_SPANS, _whole_span(window))
    lengths = jnp.asarray([spans], jnp.float32)
    rows = np.outer(2 ** np.arange(sizes), spans)
    is_asked = rows <= window
    is_asked[:, -1] = np.arange(sizes) == sizes - 1
    blocks = (state.count // jnp.asarray(2 ** np.arange(sizes), jnp.int32))[:, None]
    pieces = blocks // jnp.asarray([spans], jnp.int32)
    asked = jnp.asarray(is_asked)
    held, paired = asked & (pieces >= 1), asked & (pieces >= 2)

    scaled = _scaled(state.means, blocks)
    fits = [_fit(scaled, spans, back) for back in range(_BLOCKS // min(spans))]
    inflation = _inflation(fits, pieces, lengths)
    error = jnp.sqrt(12.0 / (lengths**3 - lengths) / (lengths - 2.0) * inflation)
    score = _score(fits[0].slope, error * jnp.sqrt(fits[0].squares), lengths / inflation - 2.0)
    signs = _sign_score(state.means, spans)
    score = jnp.where(jnp.abs(signs) > jnp.maximum(jnp.abs(score), _MONOTONE), signs, score)

    has_ended = _has_ended(fits[0], fits[1], error, 2.0 * lengths / inflation - 4.0, significance)
    length = jnp.asarray(rows, jnp.float32)
    enough = 2.0 * length >= jnp.asarray(min_evidence, jnp.float32)
    stalls = paired & enough & has_ended & (score > _BELOW)
    shortest = jnp.where(stalls, length, jnp.inf)
    falls = held & (score < _STILL_FALLING)
    whole = score[-1, -1]
    return Trend(
        has_stalled=stalls.any() & ~(falls & (length <= shortest.min())).any(),
        stalled_score=score.ravel()[jnp.argmin(shortest)],
        is_flat=held[-1, -1] & (whole > _BELOW) & ~falls.any(),
        flat_score=whole,
        is_falling=(held & (_tail(-score) < significance)).any(),
        is_certain=(held & (score < -_CERTAIN)).any(),
        is_rising=(held & (_tail(score) < significance)).any(),
    )


def probability_not_falling(score: Float[Array, ""]) -> Float[Array, ""]:
    """What a slope's z-score says of the chance that the metric does not fall, in [0, 1]."""
    return _tail(-score)


def _num_sizes(window: int) -> int:
    """So many sizes of blocks that the longest span of the largest is at least the window."""
    return 1 + max(0, math.ceil(math.log2(window / max(_SPANS))))


def _whole_span(window: int) -> int:
    """The window in blocks of the largest size."""
    return window // 2 ** (_num_sizes(window) - 1)


def _draw_in(state: TrendState, value: Float[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The value within its limits, and on which side of them it was, as -1, 0 or 1."""
    middle = jnp.sort(state.recent)[_RECENT // 2]
    distances = jnp.sort(jnp.abs(state.recent - middle))
    # Where most rows are the same, as those of a metric in few digits are, the mean stands in.
    middling = MAD_TO_DEVIATION * distances[_RECENT // 2]
    deviation = jnp.where(middling > 0, middling, 1.2533 * distances.mean())
    limit = _MOST_DEVIATIONS * deviation + 1e-6 * jnp.abs(middle)
    is_known = state.recent_count >= _RECENT
    drawn = jnp.where(is_known, jnp.clip(value, middle - limit, middle + limit), value)
    return drawn, jnp.sign(value - drawn).astype(jnp.int32)


def _scaled(means: Float[Array, "sizes blocks"], held: Int[Array, "sizes 1"]) -> Array:
    """The blocks from the last one's value, as shares of their range; 0 where there are none."""
    is_held = jnp.arange(_BLOCKS, dtype=jnp.int32)[None] >= _BLOCKS - held
    centred = jnp.where(is_held, means - means[:, -1:], 0.0)
    return centred / jnp.maximum(jnp.abs(centred).max(axis=1, keepdims=True), _TINY)


@functools.cache
def _weights(spans: tuple[int, ...], back: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each span, so many spans before the end: its members, their times, the slope's weights.

    All are 0 where the ring is too short for one.
    """
    members, times = np.zeros([2, len(spans), _BLOCKS], np.float32)
    for row, length in enumerate(spans):
        if (back + 1) * length > _BLOCKS:
            continue
        place = slice(_BLOCKS - (back + 1) * length, _BLOCKS - back * length)
        members[row, place] = 1.0
        times[row, place] = np.arange(length) - (length - 1) / 2
    return members, times, times / np.maximum((times**2).sum(axis=1, keepdims=True), 1.0)


def _sign_score(means: Float[Array, "sizes blocks"], spans: tuple[int, ...]) -> Array:
    """The z-score of the signs of changes from block to block within each span."""
    signs = jnp.sign(jnp.diff(means, axis=1))
    sums = [signs[:, _BLOCKS - length :].sum(axis=1) / math.sqrt(length - 1) for length in spans]
    return jnp.stack(sums, axis=1)


def _has_ended(
    now: _Fit,
    before: _Fit,
    error: Float[Array, "sizes spans"],
    freedom: Float[Array, "sizes spans"],
    significance: jax.typing.ArrayLike,
) -> Bool[Array, "sizes spans"]:
    """Whether a fall was there before, and less than a quarter of it is left.

    The larger of the two residuals is the noise: a stretch that happens to be exactly flat, as that
    of a loss in few bits is, is no proof by itself.
    """
    pooled = error * jnp.sqrt(jnp.maximum(now.squares, before.squares))
    fell = _score(before.slope, pooled, freedom) < -_CERTAIN
    left = now.slope - _REMAINDER * before.slope
    ended = _score(left, pooled * math.sqrt(1.0 + _REMAINDER**2), freedom)
    return fell & (_tail(ended) < significance)


def _fit(blocks: Float[Array, "sizes blocks"], spans: tuple[int, ...], back: int) -> _Fit:
    """Lines of least squares through each span, that many spans before the end."""
    members, times, weights = _weights(spans, back)
    # Products of matrices are taken in reduced precision on accelerators unless asked not to.
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    slope = exact(blocks, weights.T)
    mean = exact(blocks, members.T) / np.maximum(members.sum(axis=1), 1.0)[None]
    line = mean[..., None] + slope[..., None] * times[None]
    residuals = (blocks[:, None, :] - line) * members[None]
    return _Fit(
        slope=slope,
        squares=(residuals**2).sum(axis=-1),
        products=(residuals[..., 1:] * residuals[..., :-1]).sum(axis=-1),
    )


def _inflation(
    fits: list[_Fit], pieces: Int[Array, "sizes spans"], lengths: Float[Array, "1 spans"]
) -> Float[Array, "sizes spans"]:
    """How many blocks are worth one independent one, by the autocorrelation of residuals.

    What counts is the higher of two estimates: from all spans of the length, which see where a fall
    ends as none of them has its end inside; and from the longest span but the last, which does not
    take a slow drift of the noise for a slope.
    """
    backs = jnp.arange(len(fits), dtype=jnp.int32)[:, None, None]
    squares, products = (
        jnp.where(pieces[None] > backs, jnp.stack(parts), 0.0).sum(axis=0)
        for parts in ([fit.squares for fit in fits], [fit.products for fit in fits])
    )
    longest = jnp.argmax(
        jnp.minimum(pieces, 2).astype(jnp.float32) * lengths, axis=1, keepdims=True
    )

    def of_longest(last: Array, before: Array) -> Array:
        return jnp.take_along_axis(jnp.where(pieces > 1, before, last), longest, axis=1)

    own = _autocorrelation(products, squares, lengths)
    long = _autocorrelation(
        of_longest(fits[0].products, fits[1].products),
        of_longest(fits[0].squares, fits[1].squares),
        lengths[0][longest],
    )
    correlation = jnp.maximum(own, long)
    return (1.0 + correlation) / (1.0 - correlation)


def _autocorrelation(products: Array, squares: Array, length: Array) -> Array:
    """That of the noise, from a line's residuals, which are less correlated than the noise is."""
    raw = products / jnp.maximum(squares, _TINY)
    bias = (2.0 + 4.0 * jnp.maximum(raw, 0.0)) / length
    return jnp.clip(raw + bias, 0.0, _MOST_AUTOCORRELATION)


def _score(slope: Array, error: Array, freedom: Array) -> Array:
    """The z-score with the tail of a t statistic (Wallace's approximation); 0 for 0 / 0."""
    freedom = jnp.maximum(freedom, 1.0)
    statistic = jnp.where(slope == 0, 0.0, slope / jnp.maximum(error, _TINY))
    size = jnp.sqrt(freedom * jnp.log1p(statistic**2 / freedom))
    return jnp.sign(statistic) * size * (8.0 * freedom + 1.0) / (8.0 * freedom + 3.0)


def _tail(score: Array) -> Array:
    """The chance that a standard normal value is above this."""
    return 0.5 * jax.lax.erfc(score / math.sqrt(2.0))
