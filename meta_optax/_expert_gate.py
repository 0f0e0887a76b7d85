"""Rates of gates and experts apart, from the gate's entropy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
from meta_optax._layered import rules_by_layer, scale_groups, shape_of_layers

# What a gate's rate is multiplied by while its entropy is low, in the plain strategy.
_LOW_ENTROPY_FACTOR = 0.5


class ExpertGateState(NamedTuple):
    """State of `expert_gate`."""

    gate_scale: Float[Array, "*layers"]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        only = jnp.zeros(self.gate_scale.shape, jnp.int32)
        return rules_by_layer("expert_gate", "gate", only, {"gate_entropy": "gate_entropy"})


def expert_gate(
    *,
    gate_lr_factor: Scalar = 0.1,
    expert_lr_factor: Scalar = 1.0,
    entropy_threshold: Scalar = 0.8,
    update_frequency: Scalar = 1,
    normalized_entropy: Flag = False,
    per_layer: Flag = False,
    num_layers: Size | None = None,
) -> MetaOptimizer:
    r"""Learning rates of gates and experts apart, the gate's halved while its entropy is low.

    .. math::
      \text{lr}_\text{gate} &= \text{lr} \cdot \text{gate_lr_factor} \cdot
        (\tfrac12 \text{ if } \text{gate_entropy} < \text{entropy_threshold} \text{ else } 1) \\
      \text{lr}_\text{expert} &= \text{lr} \cdot \text{expert_lr_factor}

    A base value given for a group (``gate_learning_rate=...``) takes the place of ``lr`` there.

    The recorded rule, and the default, compares nats whatever the number of experts E: 0.8 nats are
    38 % of what 8 experts can have, and 19 % of 64. ``normalized_entropy=True`` compares shares of
    log E instead. With ``per_layer=True`` each layer's gate is judged by its own entropy, and
    layer l's rates are ``gate_l_learning_rate`` and ``expert_l_learning_rate``, which
    `moe_partition` (told ``num_layers`` too) and `scale_by_meta` act on.

    Metrics: ``gate_entropy`` (mean entropy of the tokens' router probabilities in nats, a scalar),
    or ``gate_entropy_normalized`` (the same by log E); per layer ``gate_entropy_per_layer``, or
    ``gate_entropy_normalized_per_layer``, [L]. `router_metrics` gives all of them.

    Args:
      gate_lr_factor: the gate's rate as a multiple of the plain one, >= 0.
      expert_lr_factor: the experts' rate as a multiple of the plain one, >= 0.
      entropy_threshold: the entropy below which the gate's rate is halved, in nats, >= 0; with
        ``normalized_entropy`` a share of log E, in [0, 1].
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.
      normalized_entropy: whether the threshold is a share of log E.
      per_layer: whether each layer has a state and rates of its own.
      num_layers: with ``per_layer``, how many layers there are; an integer >= 1.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer` that adds ``gate_learning_rate`` and ``expert_learning_rate``, or those of
      each layer.

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
    threshold = check_threshold(entropy_threshold, normalized_entropy)
    frequency = _checks.integer("update_frequency", update_frequency, low=1)
    shape = shape_of_layers(per_layer, num_layers)
    entropy = name_entropy(normalized_entropy) + ("_per_layer" if shape else "")

    def init() -> ExpertGateState:
        return ExpertGateState(
            gate_scale=jnp.ones(shape, jnp.float32), nonfinite_count=jnp.zeros([], jnp.int32)
        )

    def needs(metrics: Metrics) -> dict[str, tuple[int, ...]]:
        del metrics
        return {entropy: shape}

    def observe(state: ExpertGateState, metrics: Metrics) -> ExpertGateState:
        scale = jnp.where(metrics[entropy] < threshold, _LOW_ENTROPY_FACTOR, 1.0)
        return state._replace(gate_scale=scale.astype(jnp.float32))

    def apply(state: ExpertGateState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        scales = {"gate": gate_factor * state.gate_scale, "expert": expert_factor}
        return scale_groups("expert_gate", hyperparams, {"learning_rate": scales}, shape)

    return MetaOptimizer(
        name="expert_gate",
        init=init,
        observe=observe_every(
            "expert_gate", frequency, hold_nonfinite("expert_gate", needs, observe)
        ),
        apply=apply,
        metrics=(entropy,),
    )


def name_entropy(normalized: Flag) -> str:
    """The metric that the threshold of the entropy is compared with."""
    return "gate_entropy_normalized" if normalized else "gate_entropy"


def check_threshold(threshold: Scalar, normalized: Flag) -> Any:
    """The threshold, in nats or as a share of log E."""
    if _checks.flag("normalized_entropy", normalized):
        return _checks.real("entropy_threshold", threshold, high=1.0)
    return _checks.real("entropy_threshold", threshold, open_high=True)
