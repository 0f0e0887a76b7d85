"""Rates and weight decay of gates and experts apart, from the router's health."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from meta_optax import _checks
from meta_optax._checks import Scalar
from meta_optax._core import (
    Hyperparams,
    MetaOptimizer,
    Metrics,
    hold_nonfinite,
    observe_every,
)
from meta_optax._history import Window, empty_window, is_full, push

# What a gate's rate is multiplied by while its entropy is low, in the plain strategy.
_LOW_ENTROPY_FACTOR = 0.5
# The smart strategy's steps towards the sparsity target, from above and from below.
_TOO_SPARSE_FACTOR = 1.3
_TOO_DENSE_FACTOR = 0.7
# The variance of the experts' usage above which they count as specialised.
_SPECIALIZED_VARIANCE = 0.1
_GATE_DECAY_FACTOR = 1.5


class ExpertGateState(NamedTuple):
    """State of `expert_gate`."""

    gate_scale: Float[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, tuple[Int[Array, ""], tuple[str, ...]]]:
        """The rule behind the last change of each hyperparameter, as an index and the names."""
        return {"gate_learning_rate": (jnp.zeros([], jnp.int32), ("expert_gate: gate_entropy",))}


def expert_gate(
    *,
    gate_lr_factor: Scalar = 0.1,
    expert_lr_factor: Scalar = 1.0,
    entropy_threshold: Scalar = 0.8,
    update_frequency: Scalar = 1,
) -> MetaOptimizer:
    r"""Learning rates of gates and experts apart, the gate's halved while its entropy is low.

    .. math::
      \text{lr}_\text{gate} &= \text{lr} \cdot \text{gate_lr_factor} \cdot
        (\tfrac12 \text{ if } \text{gate_entropy} < \text{entropy_threshold} \text{ else } 1) \\
      \text{lr}_\text{expert} &= \text{lr} \cdot \text{expert_lr_factor}

    A base value given for a group (``gate_learning_rate=...``) takes the place of ``lr`` there.

    Metrics: ``gate_entropy`` (mean entropy of the tokens' router probabilities in nats, a scalar).

    Args:
      gate_lr_factor: the gate's rate as a multiple of the plain one, >= 0.
      expert_lr_factor: the experts' rate as a multiple of the plain one, >= 0.
      entropy_threshold: the entropy in nats below which the gate's rate is halved, >= 0.
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer` that adds ``gate_learning_rate`` and ``expert_learning_rate``.

    Raises:
      ValueError: for an argument outside its range.

    Example:
      >>> import meta_optax as mo
      >>> meta = mo.expert_gate()
      >>> state = meta.observe(meta.init(), {"step": 0, "gate_entropy": 0.3})
      >>> print(meta.apply(state, {"learning_rate": 1.0})["gate_learning_rate"])
      0.05
    """
    gate_factor = _checks.real("gate_lr_factor", gate_lr_factor, open_high=True)
    expert_factor = _checks.real("expert_lr_factor", expert_lr_factor, open_high=True)
    threshold = _checks.real("entropy_threshold", entropy_threshold, open_high=True)
    frequency = _checks.integer("update_frequency", update_frequency, low=1)

    def init() -> ExpertGateState:
        return ExpertGateState(
            gate_scale=jnp.ones([], jnp.float32), nonfinite_count=jnp.zeros([], jnp.int32)
        )

    def needs(metrics: Metrics) -> dict[str, int]:
        del metrics
        return {"gate_entropy": 0}

    def observe(state: ExpertGateState, metrics: Metrics) -> ExpertGateState:
        scale = jnp.where(metrics["gate_entropy"] < threshold, _LOW_ENTROPY_FACTOR, 1.0)
        return state._replace(gate_scale=scale.astype(jnp.float32))

    def apply(state: ExpertGateState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        scales = {"gate": gate_factor * state.gate_scale, "expert": expert_factor}
        return _scale_groups("expert_gate", hyperparams, {"learning_rate": scales})

    return MetaOptimizer(
        name="expert_gate",
        init=init,
        observe=observe_every(
            "expert_gate", frequency, hold_nonfinite("expert_gate", needs, observe)
        ),
        apply=apply,
        metrics=("gate_entropy",),
    )


class SmartExpertGateState(NamedTuple):
    """State of `smart_expert_gate`."""

    sparsities: Window
    usage_count: Int[Array, ""]
    entropy_scale: Float[Array, ""]
    sparsity_scale: Float[Array, ""]
    expert_scale: Float[Array, ""]
    gate_rule: Int[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, tuple[Int[Array, ""], tuple[str, ...]]]:
        """The rule behind the last change of each hyperparameter, as an index and the names."""
        only = jnp.zeros([], jnp.int32)
        causes = ("gate_entropy", "gate_sparsity", "gate_entropy and gate_sparsity")
        return {
            "gate_learning_rate": (
                self.gate_rule,
                tuple(f"smart_expert_gate: {cause}" for cause in causes),
            ),
            "expert_learning_rate": (only, ("smart_expert_gate: expert_usage",)),
        }


def smart_expert_gate(
    *,
    gate_lr_factor: Scalar = 0.1,
    expert_lr_factor: Scalar = 1.0,
    entropy_threshold: Scalar = 0.8,
    entropy_adjustment_factor: Scalar = 0.5,
    sparsity_target: Scalar = 0.7,
    sparsity_tolerance: Scalar = 0.1,
    specialization_bonus: Scalar = 1.2,
    update_frequency: Scalar = 1,
) -> MetaOptimizer:
    r"""Rates and decay of gates and experts from entropy, sparsity and the experts' usage.

    With :math:`H` the gate's entropy, :math:`e` the mean of the last three sparsities less the
    target (0 until there are three), and :math:`u` the experts' usage (:math:`E` shares),

    .. math::
      \text{lr}_\text{gate} &= \text{lr} \cdot \text{gate_lr_factor} \cdot
        (\text{entropy_adjustment_factor} \text{ if } H < \text{entropy_threshold})
        \cdot (1.3 \text{ if } e > \text{sparsity_tolerance},
        \; 0.7 \text{ if } e < -\text{sparsity_tolerance}) \\
      \text{lr}_\text{expert} &= \text{lr} \cdot \text{expert_lr_factor} \cdot
        (\text{specialization_bonus} \text{ from the second } u \text{ on, if }
        \operatorname{Var}(u) > 0.1) \\
      \text{wd}_\text{gate} &= 1.5 \cdot \text{wd}, \quad \text{wd}_\text{expert} = \text{wd}

    A base value given for a group (``gate_learning_rate=...``) takes the place of the plain one
    there. The variance of shares is at most (E - 1) / E^2, so with 9 experts or more it cannot
    exceed 0.1 and the bonus never comes; the threshold of the entropy is in nats, whatever E.

    Metrics: ``gate_entropy`` (nats, a scalar), ``gate_sparsity`` (the share of tokens whose top
    probability is above 0.5, a scalar), ``expert_usage`` (shares, [E]).

    Args:
      gate_lr_factor: the gate's rate as a multiple of the plain one, >= 0.
      expert_lr_factor: the experts' rate as a multiple of the plain one, >= 0.
      entropy_threshold: the entropy in nats below which the gate's rate is adjusted, >= 0.
      entropy_adjustment_factor: what it is multiplied by then, >= 0.
      sparsity_target: the sparsity aimed at, in [0, 1].
      sparsity_tolerance: the distance from it that nothing is done about, in [0, 1].
      specialization_bonus: what the experts' rate is multiplied by once they specialise, >= 0.
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer` that adds ``gate_`` and ``expert_`` forms of ``learning_rate`` and, where
      there is one, of ``weight_decay``.

    Raises:
      ValueError: for an argument outside its range.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.smart_expert_gate()
      >>> row = {"step": 0, "gate_entropy": 1.2, "gate_sparsity": 0.7}
      >>> state = meta.observe(meta.init(), row | {"expert_usage": jnp.array([0.5, 0.5])})
      >>> rates = meta.apply(state, {"learning_rate": 1.0, "weight_decay": 0.1})
      >>> print(rates["gate_learning_rate"], f"{rates['gate_weight_decay']:.2f}")
      0.1 0.15
    """
    gate_factor = _checks.real("gate_lr_factor", gate_lr_factor, open_high=True)
    expert_factor = _checks.real("expert_lr_factor", expert_lr_factor, open_high=True)
    threshold = _checks.real("entropy_threshold", entropy_threshold, open_high=True)
    adjustment = _checks.real(
        "entropy_adjustment_factor", entropy_adjustment_factor, open_high=True
    )
    target = _checks.real("sparsity_target", sparsity_target, high=1.0)
    tolerance = _checks.real("sparsity_tolerance", sparsity_tolerance, high=1.0)
    bonus = _checks.real("specialization_bonus", specialization_bonus, open_high=True)
    frequency = _checks.integer("update_frequency", update_frequency, low=1)

    def init() -> SmartExpertGateState:
        return SmartExpertGateState(
            sparsities=empty_window(3),
            usage_count=jnp.zeros([], jnp.int32),
            entropy_scale=jnp.ones([], jnp.float32),
            sparsity_scale=jnp.ones([], jnp.float32),
            expert_scale=jnp.ones([], jnp.float32),
            gate_rule=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def needs(metrics: Metrics) -> dict[str, int]:
        del metrics
        return {"gate_entropy": 0, "gate_sparsity": 0, "expert_usage": 1}

    def observe(state: SmartExpertGateState, metrics: Metrics) -> SmartExpertGateState:
        sparsities = push(state.sparsities, metrics["gate_sparsity"])
        usage_count = jnp.minimum(state.usage_count + 1, 2)
        new = state._replace(
            sparsities=sparsities,
            usage_count=usage_count,
            entropy_scale=_where(metrics["gate_entropy"] < threshold, adjustment),
            sparsity_scale=_sparsity_scale(sparsities, target, tolerance),
            expert_scale=_where(
                (usage_count >= 2) & (jnp.var(metrics["expert_usage"]) > _SPECIALIZED_VARIANCE),
                bonus,
            ),
        )
        return new._replace(gate_rule=_gate_rule(state, new))

    def apply(state: SmartExpertGateState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        rates = {
            "gate": gate_factor * state.entropy_scale * state.sparsity_scale,
            "expert": expert_factor * state.expert_scale,
        }
        decays = {"gate": _GATE_DECAY_FACTOR, "expert": 1.0}
        scales = {"learning_rate": rates, "weight_decay": decays}
        return _scale_groups("smart_expert_gate", hyperparams, scales)

    return MetaOptimizer(
        name="smart_expert_gate",
        init=init,
        observe=observe_every(
            "smart_expert_gate", frequency, hold_nonfinite("smart_expert_gate", needs, observe)
        ),
        apply=apply,
        metrics=("gate_entropy", "gate_sparsity", "expert_usage"),
    )


def _where(condition: Array, factor: ArrayLike) -> Float[Array, ""]:
    """The factor where the condition holds, else 1."""
    return jnp.where(condition, factor, 1.0).astype(jnp.float32)


def _sparsity_scale(sparsities: Window, target: ArrayLike, tolerance: Any) -> Float[Array, ""]:
    """What the gate's rate is multiplied by for the sparsities' distance from the target."""
    error = jnp.where(is_full(sparsities), jnp.mean(sparsities.values) - target, 0.0)
    return _where(error > tolerance, _TOO_SPARSE_FACTOR) * _where(
        error < -tolerance, _TOO_DENSE_FACTOR
    )


def _gate_rule(old: SmartExpertGateState, new: SmartExpertGateState) -> Int[Array, ""]:
    """The rule that moved the gate's rate, or the one before if neither did."""
    by_entropy = new.entropy_scale != old.entropy_scale
    by_sparsity = new.sparsity_scale != old.sparsity_scale
    rule = jnp.where(by_entropy & by_sparsity, 2, jnp.where(by_sparsity, 1, 0))
    return jnp.where(by_entropy | by_sparsity, rule, old.gate_rule).astype(jnp.int32)


def _scale_groups(
    strategy: str,
    hyperparams: Mapping[str, Any],
    scales: Mapping[str, Mapping[str, ArrayLike]],
) -> Hyperparams:
    """Adds each group's form of each hyperparameter: its base, else the plain one, scaled."""
    if not any(name in hyperparams for name in scales):
        raise ValueError(
            f"{strategy} derives the groups' values from {' and '.join(map(repr, scales))}, but "
            f"the hyperparameters are {sorted(hyperparams)}. Give the factory one of that name."
        )
    out = dict(hyperparams)
    for name, groups in scales.items():
        for group, scale in groups.items() if name in hyperparams else ():
            base = hyperparams.get(f"{group}_{name}", hyperparams[name])
            out[f"{group}_{name}"] = jnp.asarray(base).astype(jnp.float32) * scale
    return out
