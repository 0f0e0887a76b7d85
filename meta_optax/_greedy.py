"""A rate that follows the metric: up while it improves, down when it does not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from meta_optax import _checks
from meta_optax._checks import Mode, Scalar, Size
from meta_optax._core import (
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    forms,
    hold_nonfinite,
    observe_every,
    rules_of,
    select,
)
from meta_optax._rules import copy_for_plateau
from meta_optax._trend import (
    SHORTEST_SPAN,
    TrendState,
    advance_trend,
    empty_trend,
    read_trend,
)

_RULES = ("improves", "stalls or worsens")
_IMPROVES, _DOES_NOT = range(2)


class GreedyState(NamedTuple):
    """State of `greedy`; ``waiting`` is the rows of warm-up or cooldown left."""

    trend: TrendState
    good_count: Int[Array, ""]
    bad_count: Int[Array, ""]
    waiting: Int[Array, ""]
    rate_scale: Float[Array, ""]
    rule: Int[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        return {"learning_rate": rules_of("greedy", self.rule, dict.fromkeys(_RULES, "value"))}


def greedy(
    *,
    factor: Scalar = 0.9,
    patience: Scalar = 0,
    warmup: Scalar = 0,
    cooldown: Scalar = 0,
    min_scale: Scalar = 0.1,
    max_scale: Scalar = 3.0,
    window: Size = 256,
    significance: Scalar = 1e-5,
    mode: Mode = "min",
    update_frequency: Scalar = 1,
) -> MetaOptimizer:
    r"""Raises the learning rate while the loss improves, and cuts it when it does not.

    With :math:`c` the product of all steps so far, which starts at 1,

    .. math::
      \text{it improves for more than patience rows in a row} &\Rightarrow
        c \leftarrow \min(c / \text{factor}, \text{max_scale}) \\
      \text{it stalls or worsens for more than patience rows in a row} &\Rightarrow
        c \leftarrow \max(c \cdot \text{factor}, \text{min_scale}) \\
      \text{lr} &= c \cdot \text{base}

    GreedyLR compares a row with the best so far, so that noise alone looks like no improvement, and
    leads to its floor. Here a row improves if a line through a span of the last ``window`` rows
    falls, and worsens if one rises, both at the level ``significance`` by the tests of
    `trend_plateau` (robust to spikes, corrected for autocorrelation); it stalls if a fall is shown
    to have ended. Noise about a level is none of these but by chance, which may move the rate a
    step or a few, either way. A fall that ends is cut as long as the window holds its end, which
    about gives back what its rows raised: to go on down a plateau, use `trend_plateau`. After a
    step the next 16 rows move nothing, so that none moves the rate twice.

    The bounds are relative to the base value, which may be a schedule. Every group's form of a rate
    is moved alike.

    A rate that is too high may raise itself: each fall after a burst is an improvement. Choose a
    ``max_scale`` that is safe.

    Metrics: ``value`` (the loss, a scalar).

    Args:
      factor: what a cut multiplies the rate by, and a raise divides it by, in (0, 1).
      patience: rows in a row before a step, an integer >= 0: the step is at the next.
      warmup: rows after a raise that do not count, an integer >= 0; they are 16 at the least.
      cooldown: rows after a cut that do not count, an integer >= 0; they are 16 at the least.
      min_scale: the least share of the base rate, in (0, 1].
      max_scale: the largest multiple of the base rate, >= 1.
      window: rows that the tests look back on, an integer >= 8, not traced.
      significance: the level of the tests, in (0, 1).
      mode: ``"min"`` for a metric to be lowered, ``"max"`` for one to be raised.
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.greedy(patience=0, factor=0.5)
      >>> state = meta.init()
      >>> for step in range(20):
      ...     state = meta.observe(state, {"step": step, "value": 2.0 - 0.05 * step})
      >>> print(meta.apply(state, {"learning_rate": 0.1})["learning_rate"])
      0.2

    References:
      Subramanian and Ganapathiraman, "Zeroth order GreedyLR: an adaptive learning rate scheduler
      for deep neural network training", 2023; "GreedyLR", arXiv 2512.14527.
    """
    factor = _checks.real("factor", factor, high=1.0, open_low=True, open_high=True)
    patience = _checks.integer("patience", patience, low=0)
    warmup = _checks.integer("warmup", warmup, low=0)
    cooldown = _checks.integer("cooldown", cooldown, low=0)
    least = _checks.real("min_scale", min_scale, high=1.0, open_low=True)
    most = _checks.real("max_scale", max_scale, low=1.0, open_high=True)
    window = _checks.size("window", window, low=8)
    level = _checks.real("significance", significance, high=1.0, open_low=True, open_high=True)
    sign = _checks.sign_of_mode(mode)
    frequency = _checks.integer("update_frequency", update_frequency, low=1)

    def init() -> GreedyState:
        return GreedyState(
            trend=empty_trend(window),
            good_count=jnp.zeros([], jnp.int32),
            bad_count=jnp.zeros([], jnp.int32),
            waiting=jnp.zeros([], jnp.int32),
            rate_scale=jnp.ones([], jnp.float32),
            rule=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def needs(metrics: Metrics) -> dict[str, int]:
        del metrics
        return {"value": 0}

    def decide(
        state: GreedyState, trend: TrendState, good: Bool[Array, ""], bad: Bool[Array, ""]
    ) -> GreedyState:
        good_count = jnp.where(good, optax.safe_increment(state.good_count), 0)
        bad_count = jnp.where(bad, optax.safe_increment(state.bad_count), 0)
        raises, cuts = good_count > patience, bad_count > patience
        moves = raises | cuts
        scale = state.rate_scale * jnp.where(raises, 1.0 / factor, jnp.where(cuts, factor, 1.0))
        waiting = jnp.where(raises, warmup, jnp.where(cuts, cooldown, 0))
        # The rows that moved it must not move it again.
        waiting = jnp.where(moves, jnp.maximum(waiting, SHORTEST_SPAN), 0)
        return state._replace(
            trend=trend,
            good_count=jnp.where(moves, 0, good_count),
            bad_count=jnp.where(moves, 0, bad_count),
            waiting=waiting.astype(jnp.int32),
            rate_scale=jnp.clip(scale, least, most),
            rule=jnp.where(moves, jnp.where(raises, _IMPROVES, _DOES_NOT), state.rule).astype(
                jnp.int32
            ),
        )

    def observe(state: GreedyState, metrics: Metrics) -> GreedyState:
        trend = advance_trend(state.trend, sign * metrics["value"])
        seen = read_trend(trend, window, level)
        bad = seen.has_stalled | (seen.is_rising & ~seen.is_falling)
        good = seen.is_falling & ~seen.is_rising & ~seen.has_stalled
        decided = decide(state, trend, good, bad)
        waiting = state._replace(trend=trend, waiting=state.waiting - 1)
        return select(state.waiting > 0, waiting, decided)

    def apply(state: GreedyState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = copy_for_plateau("greedy", hyperparams)
        for key in forms(hyperparams, "learning_rate"):
            out[key] = jnp.asarray(hyperparams[key]).astype(jnp.float32) * state.rate_scale
        return out

    return MetaOptimizer(
        name="greedy",
        init=init,
        observe=observe_every("greedy", frequency, hold_nonfinite("greedy", needs, observe)),
        apply=apply,
        metrics=("value",),
    )
