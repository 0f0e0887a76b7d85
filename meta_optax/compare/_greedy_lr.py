"""The rule of Transformers' GreedyLR, as it is, for the comparison alone."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from meta_optax import _checks
from meta_optax._checks import Flag, Scalar, Size
from meta_optax._core import MetaOptimizer, Metrics, Rules, hold_nonfinite, rules_of, select
from meta_optax._history import Smoothed, Window, average_rows, clear_where, empty_window, push
from meta_optax.compare._rates import (
    NO_RATE,
    apply_rate,
    base_rate,
    check_choice,
    current_rate,
    empty_block,
    is_better,
    needs_value,
)

_RULES = ("improves", "does not improve", "reset")
_IMPROVES, _DOES_NOT, _RESET = range(3)


class GreedyLRState(NamedTuple):
    """State of `greedy_lr`; ``waiting`` is the blocks of warm-up or cooldown left."""

    block: Smoothed
    window: Window | None
    best: Float[Array, ""]
    good_count: Int[Array, ""]
    bad_count: Int[Array, ""]
    waiting: Int[Array, ""]
    floor_count: Int[Array, ""]
    rate: Float[Array, ""]
    rule: Int[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        return {"learning_rate": rules_of("greedy_lr", self.rule, dict.fromkeys(_RULES, "value"))}


class _GreedyLR(NamedTuple):
    """The checked arguments of `greedy_lr`."""

    factor: Any
    patience: Any
    threshold: Any
    threshold_mode: str
    cooldown: Any
    warmup: Any
    min_lr: Any
    max_lr: Any
    eps: Any
    reset_start: Any


def greedy_lr(
    *,
    factor: Scalar = 0.95,
    patience: Scalar = 10,
    threshold: Scalar = 1e-6,
    threshold_mode: str = "abs",
    cooldown: Scalar = 0,
    warmup: Scalar = 0,
    min_lr: Scalar = 1e-3,
    max_lr: Scalar = 1.0,
    eps: Scalar = 1e-8,
    smooth: Flag = False,
    window_size: Size = 50,
    reset_start: Scalar = 500,
    accumulation: Scalar = 1,
) -> MetaOptimizer:
    r"""The rule of Transformers' ``GreedyLR`` with ``mode="min"``, float32 for float64.

    With :math:`x` the mean of a block of rows (of the last ``window_size`` of them if ``smooth``)
    and :math:`b` the best so far, a block is good if :math:`x < b - \text{threshold}` (abs) or
    :math:`x < b (1 - \text{threshold})` (rel), else bad. More than ``patience`` in a row that are

    .. math::
      \text{good:} \quad & \text{new} = \min(\text{lr} / \text{factor}, \text{max_lr}) \\
      \text{bad:} \quad & \text{new} = \max(\text{lr} \cdot \text{factor}, \text{min_lr})

    and the rate becomes ``new`` if it rises, or falls, by more than ``eps``. The next ``warmup``
    blocks after the one and ``cooldown`` after the other are not judged. A rate that is at
    ``min_lr`` or below it at ``reset_start`` cuts with no raise between them starts again from its
    first value, with nothing remembered. A base below ``min_lr``, as 1e-4 by default, is not cut.

    It departs from the original in two things. A row that is not finite is counted, and changes
    nothing: there NaN and inf are bad rows, -inf is the best for ever, and with ``smooth`` none
    after one of them is good until a reset. A base that is a schedule is followed up to the first
    block only.

    Metrics: ``value`` (the loss, a scalar).

    Args:
      factor: what a cut multiplies the rate by, and a raise divides it by, in (0, 1).
      patience: good or bad blocks in a row that are let pass, an integer >= 0.
      threshold: the improvement that counts as one, >= 0.
      threshold_mode: ``"rel"`` or ``"abs"``. Not traced.
      cooldown: blocks after a cut that are not judged, an integer >= 0.
      warmup: blocks after a raise that are not judged, an integer >= 0.
      min_lr: the rate below which no cut leads, >= 0.
      max_lr: the rate above which no raise leads, >= 0.
      eps: a change by no more than this is none, >= 0.
      smooth: whether means over ``window_size`` blocks are judged.
      window_size: blocks in a mean, an integer >= 1, not traced.
      reset_start: cuts at the floor after which it starts again, an integer >= 0.
      accumulation: rows whose mean is judged as one, an integer >= 1: the original is shown one
        row an evaluation.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range.

    References:
      Hugging Face, ``transformers.optimization.GreedyLR``; "GreedyLR", arXiv 2512.14527.
    """
    check_choice("threshold_mode", threshold_mode, ("rel", "abs"))
    rule = _GreedyLR(
        factor=_checks.real("factor", factor, high=1.0, open_low=True, open_high=True),
        patience=_checks.integer("patience", patience, low=0),
        threshold=_checks.real("threshold", threshold, open_high=True),
        threshold_mode=threshold_mode,
        cooldown=_checks.integer("cooldown", cooldown, low=0),
        warmup=_checks.integer("warmup", warmup, low=0),
        min_lr=_checks.real("min_lr", min_lr, open_high=True),
        max_lr=_checks.real("max_lr", max_lr, open_high=True),
        eps=_checks.real("eps", eps, open_high=True),
        reset_start=_checks.integer("reset_start", reset_start, low=0),
    )
    rows = _checks.size("window_size", window_size, low=1)
    is_smooth = _checks.flag("smooth", smooth)
    accumulation = _checks.integer("accumulation", accumulation, low=1)

    def init() -> GreedyLRState:
        return GreedyLRState(
            block=empty_block(),
            window=empty_window(rows) if is_smooth else None,
            best=jnp.full([], jnp.inf, jnp.float32),
            good_count=jnp.zeros([], jnp.int32),
            bad_count=jnp.zeros([], jnp.int32),
            waiting=jnp.zeros([], jnp.int32),
            floor_count=jnp.zeros([], jnp.int32),
            rate=jnp.full([], NO_RATE, jnp.float32),
            rule=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def observe(state: GreedyLRState, metrics: Metrics) -> GreedyLRState:
        block, value, is_judged = average_rows(state.block, metrics["value"], accumulation)
        rate = current_rate(state.rate, metrics)
        judged = _judge_greedily(rule, state, value, rate, base_rate(metrics))
        return select(is_judged, judged, state)._replace(block=block)

    return MetaOptimizer(
        name="greedy_lr",
        init=init,
        observe=hold_nonfinite("greedy_lr", needs_value, observe),
        apply=apply_rate,
        metrics=("value",),
    )


def _judge_greedily(
    rule: _GreedyLR,
    state: GreedyLRState,
    value: Float[Array, ""],
    rate: Float[Array, ""],
    first_rate: Float[Array, ""],
) -> GreedyLRState:
    """The state of GreedyLR after one block."""
    window = state.window
    if window is not None:
        window = push(window, value)
        value = _mean(window)
    waits = state.waiting > 0
    better = is_better(value, state.best, rule.threshold, rule.threshold_mode) & ~waits
    good = jnp.where(better, optax.safe_increment(state.good_count), 0)
    bad = jnp.where(better | waits, 0, optax.safe_increment(state.bad_count))
    raises, cuts = good > rule.patience, bad > rule.patience
    higher = jnp.minimum(rate / rule.factor, rule.max_lr)
    lower = jnp.maximum(rate * rule.factor, rule.min_lr)
    rate = jnp.where(
        raises & (higher - rate > rule.eps),
        higher,
        jnp.where(cuts & (rate - lower > rule.eps), lower, rate),
    )
    at_floor = cuts & (rate <= rule.min_lr)
    floor_count = jnp.where(at_floor, optax.safe_increment(state.floor_count), state.floor_count)
    resets = at_floor & (floor_count >= rule.reset_start)
    waiting = jnp.where(cuts, rule.cooldown, jnp.maximum(state.waiting - 1, 0))
    last_rule = jnp.where(cuts, _DOES_NOT, jnp.where(raises, _IMPROVES, state.rule))
    return state._replace(
        window=None if window is None else clear_where(resets, window),
        best=jnp.where(resets, jnp.inf, jnp.where(better, value, state.best)),
        good_count=jnp.where(raises, 0, good),
        bad_count=jnp.where(cuts, 0, bad),
        waiting=jnp.where(raises, rule.warmup, waiting).astype(jnp.int32),
        floor_count=jnp.where(raises | resets, 0, floor_count),
        rate=jnp.where(resets, first_rate, rate),
        rule=jnp.where(resets, _RESET, last_rule).astype(jnp.int32),
    )


def _mean(window: Window) -> Float[Array, ""]:
    """The mean of the values that the window holds."""
    size = window.values.shape[-1]
    held = jnp.arange(size, dtype=jnp.int32) >= size - window.count
    return jnp.sum(jnp.where(held, window.values, 0.0)) / window.count.astype(jnp.float32)
