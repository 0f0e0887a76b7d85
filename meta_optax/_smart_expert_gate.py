"""Rates and weight decay of gates and experts apart, from the router's health."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from meta_optax import _checks
from meta_optax._checks import Flag, Scalar, Size
from meta_optax._core import (
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    hold_nonfinite,
    observe_every,
)
from meta_optax._expert_gate import check_threshold, name_entropy
from meta_optax._history import Window, empty_window, is_full, push
from meta_optax._layered import rules_by_layer, scale_groups, shape_of_layers
from meta_optax.moe._router_metrics import entropy_of

# The steps towards the sparsity target, from above and from below.
_TOO_SPARSE_FACTOR = 1.3
_TOO_DENSE_FACTOR = 0.7
# The variance of the experts' usage above which they count as specialised, in the recorded rule.
_SPECIALIZED_VARIANCE = 0.1
_GATE_DECAY_FACTOR = 1.5


class SmartExpertGateState(NamedTuple):
    """State of `smart_expert_gate`; ``num_experts`` is 0 until the first usage was seen."""

    sparsities: Window
    num_experts: Int[Array, ""]
    usage_count: Int[Array, ""]
    entropy_scale: Float[Array, "*layers"]
    sparsity_scale: Float[Array, "*layers"]
    expert_scale: Float[Array, "*layers"]
    gate_rule: Int[Array, "*layers"]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        only = jnp.zeros(self.gate_rule.shape, jnp.int32)
        causes = {name: name for name in ("gate_entropy", "gate_sparsity")}
        causes |= {"gate_entropy and gate_sparsity": "gate_entropy"}
        usage = {"expert_usage": "expert_usage"}
        return {
            **rules_by_layer("smart_expert_gate", "gate", self.gate_rule, causes),
            **rules_by_layer("smart_expert_gate", "expert", only, usage),
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
    normalized_entropy: Flag = False,
    specialization_threshold: Scalar = 0.5,
    per_layer: Flag = False,
    num_layers: Size | None = None,
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
    there.

    That is the recorded rule, and the default. Its threshold of the entropy is in nats, whatever E,
    and its measure of specialisation cannot work for many experts: the variance of E shares is at
    most :math:`(E - 1) / E^2`, below 0.1 from 9 experts on, and it is highest when all tokens go to
    one expert, which is collapse. With ``normalized_entropy=True`` the entropy and its threshold
    are shares of log E, and experts count as specialised while

    .. math:: H(u) / \log E - H / \log E > \text{specialization_threshold}

    with :math:`H(u)` the entropy of the load: what the choice of an expert tells about the token
    (their mutual information), as a share of all that it could. It is 1 where tokens are decided
    and the load is even, and 0 both where the gate is undecided and where it has collapsed.

    With ``per_layer=True`` each layer is judged by its own metrics, and layer l's rates are
    ``gate_l_learning_rate`` and ``expert_l_learning_rate``; weight decay stays the group's.

    Metrics: ``gate_entropy`` (nats, a scalar; ``gate_entropy_normalized`` if normalised),
    ``gate_sparsity`` (the share of tokens whose top probability is above 0.5, a scalar),
    ``expert_usage`` (shares, [E]); per layer, each with ``_per_layer`` behind its name: [L], and
    [L, E] for the usage. A usage of another length than before is held and counted, as what is not
    finite is.

    Args:
      gate_lr_factor: the gate's rate as a multiple of the plain one, >= 0.
      expert_lr_factor: the experts' rate as a multiple of the plain one, >= 0.
      entropy_threshold: the entropy below which the gate's rate is adjusted, in nats, >= 0; with
        ``normalized_entropy`` a share of log E, in [0, 1].
      entropy_adjustment_factor: what it is multiplied by then, >= 0.
      sparsity_target: the sparsity aimed at, in [0, 1].
      sparsity_tolerance: the distance from it that nothing is done about, in [0, 1].
      specialization_bonus: what the experts' rate is multiplied by once they specialise, >= 0.
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.
      normalized_entropy: whether entropy and specialisation are judged as shares of log E.
      specialization_threshold: the share of log E from which experts count as specialised, in
        [0, 1]; only with ``normalized_entropy``.
      per_layer: whether each layer has a state and rates of its own.
      num_layers: with ``per_layer``, how many layers there are; an integer >= 1.

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
    threshold = check_threshold(entropy_threshold, normalized_entropy)
    adjustment = _checks.real(
        "entropy_adjustment_factor", entropy_adjustment_factor, open_high=True
    )
    target = _checks.real("sparsity_target", sparsity_target, high=1.0)
    tolerance = _checks.real("sparsity_tolerance", sparsity_tolerance, high=1.0)
    bonus = _checks.real("specialization_bonus", specialization_bonus, open_high=True)
    specialized = _checks.real("specialization_threshold", specialization_threshold, high=1.0)
    frequency = _checks.integer("update_frequency", update_frequency, low=1)
    shape = shape_of_layers(per_layer, num_layers)
    suffix = "_per_layer" if shape else ""
    names = (name_entropy(normalized_entropy), "gate_sparsity", "expert_usage")
    entropy_name, sparsity_name, usage_name = (name + suffix for name in names)

    def init() -> SmartExpertGateState:
        return SmartExpertGateState(
            sparsities=empty_window(3, shape),
            num_experts=jnp.zeros([], jnp.int32),
            usage_count=jnp.zeros([], jnp.int32),
            entropy_scale=jnp.ones(shape, jnp.float32),
            sparsity_scale=jnp.ones(shape, jnp.float32),
            expert_scale=jnp.ones(shape, jnp.float32),
            gate_rule=jnp.zeros(shape, jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def needs(metrics: Metrics) -> dict[str, tuple[int | None, ...]]:
        del metrics
        return {entropy_name: shape, sparsity_name: shape, usage_name: (*shape, None)}

    def accepts(state: SmartExpertGateState, metrics: Metrics) -> Bool[Array, ""]:
        experts = metrics[usage_name].shape[-1]
        return (state.num_experts == 0) | (state.num_experts == experts)

    def is_specialized(metrics: Metrics) -> Bool[Array, "*layers"]:
        usage = metrics[usage_name]
        if not normalized_entropy:
            return jnp.var(usage, axis=-1) > _SPECIALIZED_VARIANCE
        load = entropy_of(usage) / np.log(max(usage.shape[-1], 2)).astype(np.float32)
        return load - metrics[entropy_name] > specialized

    def observe(state: SmartExpertGateState, metrics: Metrics) -> SmartExpertGateState:
        sparsities = push(state.sparsities, metrics[sparsity_name])
        usage_count = jnp.minimum(state.usage_count, 1) + 1
        new = state._replace(
            sparsities=sparsities,
            num_experts=jnp.full([], metrics[usage_name].shape[-1], jnp.int32),
            usage_count=usage_count,
            entropy_scale=_where(metrics[entropy_name] < threshold, adjustment),
            sparsity_scale=_sparsity_scale(sparsities, target, tolerance),
            expert_scale=_where((usage_count >= 2) & is_specialized(metrics), bonus),
        )
        return new._replace(gate_rule=_gate_rule(state, new))

    def apply(state: SmartExpertGateState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        rates = {
            "gate": gate_factor * state.entropy_scale * state.sparsity_scale,
            "expert": expert_factor * state.expert_scale,
        }
        decays = {"gate": _GATE_DECAY_FACTOR, "expert": 1.0}
        scales = {"learning_rate": rates, "weight_decay": decays}
        return scale_groups("smart_expert_gate", hyperparams, scales, shape)

    held = hold_nonfinite("smart_expert_gate", needs, observe, accepts)
    return MetaOptimizer(
        name="smart_expert_gate",
        init=init,
        observe=observe_every("smart_expert_gate", frequency, held),
        apply=apply,
        metrics=(entropy_name, sparsity_name, usage_name),
    )


def _where(condition: Array, factor: ArrayLike) -> Float[Array, "*layers"]:
    """The factor where the condition holds, else 1."""
    return jnp.where(condition, factor, 1.0).astype(jnp.float32)


def _sparsity_scale(
    sparsities: Window, target: ArrayLike, tolerance: Any
) -> Float[Array, "*layers"]:
    """What the gate's rate is multiplied by for the sparsities' distance from the target."""
    error = jnp.where(is_full(sparsities), jnp.mean(sparsities.values, axis=-1) - target, 0.0)
    return _where(error > tolerance, _TOO_SPARSE_FACTOR) * _where(
        error < -tolerance, _TOO_DENSE_FACTOR
    )


def _gate_rule(old: SmartExpertGateState, new: SmartExpertGateState) -> Int[Array, "*layers"]:
    """The rule that moved the gate's rate, or the one before if neither did."""
    by_entropy = new.entropy_scale != old.entropy_scale
    by_sparsity = new.sparsity_scale != old.sparsity_scale
    rule = jnp.where(by_entropy & by_sparsity, 2, jnp.where(by_sparsity, 1, 0))
    return jnp.where(by_entropy | by_sparsity, rule, old.gate_rule).astype(jnp.int32)
