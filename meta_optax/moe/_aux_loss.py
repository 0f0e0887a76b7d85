"""The auxiliary loss's weight, from dropped tokens and uneven load."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meta_optax import _checks
from meta_optax._checks import Pair, Scalar
from meta_optax._core import (
    ANY_HYPERPARAM,
    BASE_PREFIX,
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    hold_nonfinite,
    observe_every,
    rules_of,
)
from meta_optax._history import smooth

# How far the factor may go where the base value, and so the bounds' meaning, is not known.
_FACTOR_RANGE = (1e-6, 1e6)


class AdaptAuxLossState(NamedTuple):
    """State of `adapt_aux_loss`."""

    seen: Int[Array, ""]
    drop_fraction: Float[Array, ""]
    max_violation: Float[Array, ""]
    weight_scale: Float[Array, ""]
    rule: Int[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        causes = {name: name for name in ("drop_fraction", "max_violation")}
        causes |= {"drop_fraction and max_violation": "drop_fraction", "balanced": "max_violation"}
        return {ANY_HYPERPARAM: rules_of("adapt_aux_loss", self.rule, causes)}


def adapt_aux_loss(
    *,
    drop_band: Pair = (0.01, 0.05),
    violation_band: Pair = (0.5, 1.0),
    factor: Scalar = 1.05,
    smoothing: Scalar = 0.9,
    min_weight: Scalar = 1e-4,
    max_weight: Scalar = 1e-1,
    hyperparam: str = "aux_loss_weight",
    update_frequency: Scalar = 1,
) -> MetaOptimizer:
    r"""Raises the auxiliary loss's weight while tokens are dropped or the load is uneven.

    With :math:`\bar d` and :math:`\bar v` the smoothed drop fraction and MaxVio, each look does

    .. math::
      \bar x &\leftarrow \text{smoothing} \cdot \bar x + (1 - \text{smoothing}) \cdot x \\
      w &\leftarrow \begin{cases}
        \min(w \cdot \text{factor}, \text{max_weight}) &
          \bar d > \text{drop_band}_1 \text{ or } \bar v > \text{violation_band}_1 \\
        \max(w / \text{factor}, \text{min_weight}) &
          \bar d < \text{drop_band}_0 \text{ and } \bar v < \text{violation_band}_0 \\
        w & \text{otherwise}
      \end{cases}

    so that in between nothing happens. The weight is a free hyperparameter: give it to
    `inject_meta_hyperparams` as ``free_hyperparams={"aux_loss_weight": 1e-2}`` and read it in the
    loss with ``optax.tree.get(opt_state, "aux_loss_weight")``. The factor multiplies the base, so
    a schedule keeps its shape; a base outside the bounds is left alone, but not moved further out.
    A weight of 0 stays 0.

    Metrics: ``drop_fraction`` and ``max_violation`` (scalars), as `router_metrics` gives them.

    Args:
      drop_band: the drop fractions below which the weight falls and above which it rises, a pair
        (low, high) in [0, 1].
      violation_band: the same for MaxVio, a pair (low, high) >= 0. With m = T k / E slots an expert
        in a batch, chance alone makes MaxVio about :math:`\sqrt{2 \log E / m}` where the load is
        even: keep ``low`` above that, or the weight never falls.
      factor: what a look multiplies or divides the weight by, > 1.
      smoothing: how much of the averages a look keeps, in [0, 1).
      min_weight: the weight below which it does not fall, >= 0.
      max_weight: the weight above which it does not rise, >= ``min_weight``.
      hyperparam: the name of the weight.
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range; when applied, if there is no such
        hyperparameter.

    Example:
      >>> import meta_optax as mo
      >>> meta = mo.adapt_aux_loss(smoothing=0.0, factor=2.0)
      >>> uneven = {"step": 0, "drop_fraction": 0.0, "max_violation": 1.5}
      >>> state = meta.observe(meta.init(), uneven)
      >>> print(meta.apply(state, {"aux_loss_weight": 0.01})["aux_loss_weight"])
      0.02

    References:
      Wei et al., "Skywork-MoE", arXiv 2406.06563, section 3.3, sets the weight to a moving average
      of the drop rate, times a constant; axlearn's ``AdaptiveLoadBalanceLoss`` steps it by a fixed
      factor while a moving average is outside a range, which is the rule here.
    """
    drop_low, drop_high = _band("drop_band", drop_band, most=1.0)
    violation_low, violation_high = _band("violation_band", violation_band, most=math.inf)
    step = _checks.real("factor", factor, low=1.0, open_low=True, open_high=True)
    kept = _checks.real("smoothing", smoothing, high=1.0, open_high=True)
    least = _checks.real("min_weight", min_weight, open_high=True)
    most = _checks.real("max_weight", max_weight, open_high=True)
    if _checks.is_known(least, most) and most < least:
        raise ValueError(f"max_weight must be at least min_weight ({least}), got {max_weight!r}.")
    frequency = _checks.integer("update_frequency", update_frequency, low=1)

    def init() -> AdaptAuxLossState:
        return AdaptAuxLossState(
            seen=jnp.zeros([], jnp.int32),
            drop_fraction=jnp.zeros([], jnp.float32),
            max_violation=jnp.zeros([], jnp.float32),
            weight_scale=jnp.ones([], jnp.float32),
            rule=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def needs(metrics: Metrics) -> dict[str, int]:
        del metrics
        return {"drop_fraction": 0, "max_violation": 0}

    def observe(state: AdaptAuxLossState, metrics: Metrics) -> AdaptAuxLossState:
        drop = smooth(state.drop_fraction, metrics["drop_fraction"], state.seen, kept)
        violation = smooth(state.max_violation, metrics["max_violation"], state.seen, kept)
        drops, violates = drop > drop_high, violation > violation_high
        rises = drops | violates
        falls = (drop < drop_low) & (violation < violation_low)
        low, high = _scale_range(metrics)
        # At a bound the factor waits there, so that the weight turns at once when the load does.
        scale = jnp.clip(state.weight_scale, low, high)
        scale *= jnp.where(rises, step, jnp.where(falls, 1.0 / step, 1.0))
        scale = jnp.clip(scale, low, high)
        rule = jnp.where(drops & violates, 2, jnp.where(violates, 1, jnp.where(drops, 0, 3)))
        return state._replace(
            seen=jnp.ones_like(state.seen),
            drop_fraction=drop,
            max_violation=violation,
            weight_scale=scale,
            rule=jnp.where(rises | falls, rule, state.rule).astype(jnp.int32),
        )

    def _scale_range(metrics: Metrics) -> tuple[Any, Any]:
        """The factors at which the weight is at its bounds."""
        if BASE_PREFIX + hyperparam not in metrics:
            return _FACTOR_RANGE
        base = jnp.asarray(metrics[BASE_PREFIX + hyperparam]).astype(jnp.float32)
        # A base of 0 stays 0 whatever the factor, which then stays 1.
        is_zero = base <= 0
        divisor = jnp.where(is_zero, 1.0, base)
        low = jnp.where(is_zero, 1.0, jnp.minimum(least / divisor, 1.0))
        high = jnp.where(is_zero, 1.0, jnp.maximum(most / divisor, 1.0))
        return jnp.clip(low, *_FACTOR_RANGE), jnp.clip(high, *_FACTOR_RANGE)

    def apply(state: AdaptAuxLossState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        base = read_free("adapt_aux_loss", hyperparams, hyperparam)
        weight = base * state.weight_scale
        low, high = jnp.minimum(least, base), jnp.maximum(most, base)
        return {**hyperparams, hyperparam: jnp.clip(weight, low, high)}

    return MetaOptimizer(
        name="adapt_aux_loss",
        init=init,
        observe=observe_every(
            "adapt_aux_loss", frequency, hold_nonfinite("adapt_aux_loss", needs, observe)
        ),
        apply=apply,
        metrics=("drop_fraction", "max_violation"),
    )


def read_free(strategy: str, hyperparams: Mapping[str, Any], name: str) -> Float[Array, ""]:
    """A free hyperparameter's base value.

    Raises:
      ValueError: if there is none of that name, with the remedy.
    """
    if name not in hyperparams:
        raise ValueError(
            f"{strategy} controls {name!r}, but the hyperparameters are {sorted(hyperparams)}. "
            f"Pass free_hyperparams={{{name!r}: ...}} to inject_meta_hyperparams."
        )
    return jnp.asarray(hyperparams[name]).astype(jnp.float32)


def _band(name: str, band: Any, *, most: float) -> tuple[Any, Any]:
    low, high = _checks.pair(name, band, what="(low, high)", high=most)
    if _checks.is_known(low, high) and low > high:
        raise ValueError(f"{name} must be a pair (low, high) with low <= high, got {band!r}.")
    return low, high
