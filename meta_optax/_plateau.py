"""Plateau control of the learning rate by patience."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meta_optax import _checks
from meta_optax._checks import Mode, Scalar
from meta_optax._core import (
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    forms,
    hold_nonfinite,
    observe_every,
    rules_of,
    sees,
    select,
)
from meta_optax._history import Smoothed, average_rows, empty_average
from meta_optax._rules import (
    cool_down,
    copy_for_plateau,
    count_bad,
    cut,
    cut_rate,
    grow,
    grown_decay,
    has_room,
    is_cooling,
    is_exactly,
)

# The gradient norm from which weight decay grows; the recorded rule has it fixed.
_GRAD_NORM_THRESHOLD = 10.0


class PlateauState(NamedTuple):
    """State of `plateau`."""

    smoothed: Smoothed | None
    best: Float[Array, ""]
    bad_count: Int[Array, ""]
    cooldown_count: Int[Array, ""]
    rate_scale: Float[Array, ""]
    decay_growth: Float[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        only = jnp.zeros([], jnp.int32)
        return {
            "learning_rate": rules_of("plateau", only, {"patience": "value"}),
            "weight_decay": rules_of("plateau", only, {"grad_norm": "grad_norm"}),
        }


def plateau(
    *,
    patience: Scalar = 3,
    lr_factor: Scalar = 0.5,
    min_lr: Scalar = 1e-6,
    wd_increase_factor: Scalar = 1.1,
    max_weight_decay_growth: Scalar = 10.0,
    update_frequency: Scalar = 1,
    mode: Mode = "min",
    rtol: Scalar = 0.0,
    atol: Scalar = 0.0,
    cooldown: Scalar = 0,
    smoothing: Scalar = 0,
) -> MetaOptimizer:
    r"""Cuts the learning rate after a number of steps without a better loss.

    With :math:`x` the loss, :math:`b` the best so far and :math:`n` the rows since that were no
    better,

    .. math::
      \text{better} &\iff x < b - (\text{rtol} \cdot |b| + \text{atol}) \\
      n \ge \text{patience} &\Rightarrow \text{lr} \leftarrow
        \max(\text{lr} \cdot \text{lr_factor}, \text{min_lr}), \; n \leftarrow 0 \\
      \text{grad_norm} > 10 &\Rightarrow \text{wd} \leftarrow
        \min(\text{wd} \cdot \text{wd_increase_factor},
        \text{max_weight_decay_growth} \cdot \max(\text{wd}_0, 10^{-6}))

    The cuts multiply the base value, so a base schedule keeps its shape, and every group's form
    of a rate (``gate_learning_rate``) is cut with it. ``min_lr`` is a floor on the cuts alone: a
    base that lies below it is left alone. Where the optimizer has no weight decay, the gradient's
    norm is neither needed nor measured.

    The best of a noisy loss is a lucky minibatch's, which later ones do not better for long:
    ``smoothing``, or `trend_plateau`, is for those.

    Metrics: ``value`` (the loss, a scalar) and ``grad_norm`` (a scalar).

    Args:
      patience: rows without a better loss before a cut; an integer >= 1. Of blocks, where
        ``smoothing`` makes some.
      lr_factor: what a cut multiplies the rate by, in (0, 1).
      min_lr: the rate below which no cut leads, >= 0, in units of the base rate.
      wd_increase_factor: what weight decay is multiplied by, >= 1; exactly 1 switches the rule,
        and the measuring of the norm, off.
      max_weight_decay_growth: the most that weight decay becomes, as a multiple of its base,
        >= 1; ``math.inf`` for the recorded behaviour.
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.
      mode: ``"min"`` for a metric to be lowered, ``"max"`` for one to be raised (better is then
        :math:`x > b + \dots`).
      rtol: the improvement that counts as one, as a share of the best, >= 0.
      atol: the improvement that counts as one, >= 0; the two are added.
      cooldown: judged rows after a cut that do not count as bad, an integer >= 0.
      smoothing: what is judged in place of the loss. In (0, 1): its exponential moving average,
        which keeps that share at each row. An integer >= 2: the means of so many rows, each judged
        once. 0: the loss itself. Not traced.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.plateau(patience=2)
      >>> state = meta.init()
      >>> for step, loss in enumerate([1.0, 1.0, 1.0]):
      ...     state = meta.observe(state, {"step": step, "value": loss, "grad_norm": 1.0})
      >>> print(meta.apply(state, {"learning_rate": 0.1})["learning_rate"])
      0.05

    References:
      ``ReduceLROnPlateau`` of PyTorch and `optax.contrib.reduce_on_plateau` are relatives; see
      the field guide in the documentation for where they differ.
    """
    patience = _checks.integer("patience", patience, low=1)
    cut_factor = _checks.real("lr_factor", lr_factor, high=1.0, open_low=True, open_high=True)
    min_lr = _checks.real("min_lr", min_lr, open_high=True)
    factor = _checks.real("wd_increase_factor", wd_increase_factor, low=1.0, open_high=True)
    most = _checks.real("max_weight_decay_growth", max_weight_decay_growth, low=1.0)
    frequency = _checks.integer("update_frequency", update_frequency, low=1)
    sign = _checks.sign_of_mode(mode)
    margins = {
        "rtol": _checks.real("rtol", rtol, open_high=True),
        "atol": _checks.real("atol", atol, open_high=True),
    }
    cooldown = _checks.integer("cooldown", cooldown, low=0)
    kept = _checks.smoothing(smoothing)
    grows = not is_exactly(factor, 1.0)

    def init() -> PlateauState:
        return PlateauState(
            smoothed=empty_average(kept),
            best=jnp.full([], sign * jnp.inf, jnp.float32),
            bad_count=jnp.zeros([], jnp.int32),
            cooldown_count=jnp.zeros([], jnp.int32),
            rate_scale=jnp.ones([], jnp.float32),
            decay_growth=jnp.ones([], jnp.float32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def needs(metrics: Metrics) -> dict[str, int]:
        return {"value": 0} | ({"grad_norm": 0} if grows and sees(metrics, "weight_decay") else {})

    def observe_rate(state: PlateauState, metrics: Metrics) -> PlateauState:
        smoothed, value, is_judged = average_rows(state.smoothed, metrics["value"], kept)
        best, bad = count_bad(sign * state.best, state.bad_count, sign * value, **margins)
        fires = (bad >= patience) & ~is_cooling(state.cooldown_count, cooldown)
        bad, left = cool_down(bad, state.cooldown_count, fires, cooldown)
        acts = fires & has_room(metrics, state.rate_scale, min_lr)
        judged = state._replace(
            best=sign * best,
            bad_count=bad,
            cooldown_count=left,
            rate_scale=cut(state.rate_scale, cut_factor, acts),
        )
        return select(is_judged, judged, state)._replace(smoothed=smoothed)

    def observe(state: PlateauState, metrics: Metrics) -> PlateauState:
        high = jnp.array(False)
        if "grad_norm" in needs(metrics):
            high = metrics["grad_norm"] > _GRAD_NORM_THRESHOLD
        seen = observe_rate(state, metrics)
        return seen._replace(decay_growth=grow(state.decay_growth, factor, high))

    def apply(state: PlateauState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = copy_for_plateau("plateau", hyperparams, controls_decay=True)
        for key in forms(hyperparams, "learning_rate"):
            out[key] = cut_rate(hyperparams[key], state.rate_scale, min_lr)
        for key in forms(hyperparams, "weight_decay") if grows else ():
            out[key] = grown_decay(hyperparams[key], state.decay_growth, 0.0, most)
        return out

    return MetaOptimizer(
        name="plateau",
        init=init,
        observe=observe_every("plateau", frequency, hold_nonfinite("plateau", needs, observe)),
        apply=apply,
        metrics=("value", "grad_norm") if grows else ("value",),
    )
