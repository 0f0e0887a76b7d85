"""Protection from a router's collapse, with hysteresis."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from meta_optax import _checks
from meta_optax._checks import Flag, Pair, Scalar, Size
from meta_optax._core import (
    ANY_HYPERPARAM,
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    group_name,
    hold_nonfinite,
    layer_form,
    observe_every,
    rules_of,
)
from meta_optax._history import smooth
from meta_optax._layered import rules_by_layer, shape_of_layers
from meta_optax._rules import is_exactly

_METRICS = ("load_entropy_normalized", "dead_experts", "max_violation", "gate_entropy_normalized")
_RULES = {
    "load_entropy": "load_entropy_normalized",
    "dead_experts": "dead_experts",
    "max_violation": "max_violation",
    "health returned": "load_entropy_normalized",
}
_RELEASED = 3
# Each intervention lasts this many times as long as the one before: whoever falls back into
# collapse once let go has a cause that lasts, and every relapse costs.
_HOLD_GROWTH = 4.0
_MOST_LOOKS = 1e9


class GuardCollapseState(NamedTuple):
    """State of `guard_collapse`; ``interventions`` is how often it began to act."""

    seen: Int[Array, ""]
    load_entropy: Float[Array, "*layers"]
    dead_experts: Float[Array, "*layers"]
    max_violation: Float[Array, "*layers"]
    gate_entropy: Float[Array, "*layers"]
    bad_count: Int[Array, "*layers"]
    good_count: Int[Array, "*layers"]
    is_acting: Bool[Array, "*layers"]
    interventions: Int[Array, "*layers"]
    rule: Int[Array, "*layers"]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        by_layer = rules_by_layer("guard_collapse", "gate", self.rule, _RULES)
        # What all layers share is moved by the first that acts, and let go by the last.
        acting = jnp.where(self.is_acting, self.rule, _RELEASED)
        rule = self.rule if self.rule.ndim == 0 else acting.min()
        return {**by_layer, ANY_HYPERPARAM: rules_of("guard_collapse", rule, _RULES)}


def guard_collapse(
    *,
    load_entropy: Pair = (0.7, 0.9),
    dead_experts: Pair = (0.3, 0.15),
    max_violation: Pair = (1.0, 0.5),
    undecided_entropy: Scalar = 0.7,
    smoothing: Scalar = 0.8,
    patience: Scalar = 3,
    release_patience: Scalar = 100,
    gate_lr_factor: Scalar = 0.1,
    aux_loss_weight: Scalar = 0.3,
    balance_update_rate: Scalar = 1e-3,
    update_frequency: Scalar = 1,
    per_layer: Flag = False,
    num_layers: Size | None = None,
) -> MetaOptimizer:
    r"""Acts while a router collapses: slows the gate, and raises what balances the load.

    Each quantity is smoothed, :math:`\bar x \leftarrow \text{smoothing} \cdot \bar x + (1 -
    \text{smoothing}) \cdot x`. With H the load's entropy, D the share of dead experts, V MaxVio and
    G the tokens' entropy, H and G as shares of log E, a look finds

    .. math::
      \text{collapse} &\iff (H < \text{load_entropy}_0 \lor D > \text{dead_experts}_0 \lor
        V > \text{max_violation}_0) \land G < \text{undecided_entropy} \\
      \text{health} &\iff H > \text{load_entropy}_1 \land D < \text{dead_experts}_1 \land
        V < \text{max_violation}_1

    ``patience`` looks of collapse in a row make it act, ``release_patience`` looks of health in a
    row make it let go; what lies in between resets both counts, and changes nothing. With each
    further intervention it holds four times as long, :math:`\text{release_patience} \cdot
    4^{n - 1}` looks in the n-th: where collapse returns, its cause is still there. An uneven load
    under a router that is undecided (G high, as at the start of training) is no collapse: which of
    nearly equal probabilities is the highest is chance. While it acts,

    .. math::
      \text{gate lr} &\leftarrow \text{gate lr} \cdot \text{gate_lr_factor} \\
      \text{aux_loss_weight} &\leftarrow \max(\text{base}, \text{aux_loss_weight}), \quad
      \text{balance_update_rate} \leftarrow \max(\text{base}, \text{balance_update_rate})

    of which it does what there are hyperparameters for: the gate's rate needs `moe_partition` or
    labels, the others are ``free_hyperparams`` of `inject_meta_hyperparams`, or arguments of the
    factory. With ``per_layer=True`` each layer is judged by its own metrics, so that one layer's
    collapse is not lost in the mean of many; its gate alone is slowed
    (``gate_l_learning_rate``), and the other two are raised while any layer acts.

    Metrics: ``load_entropy_normalized``, ``dead_experts``, ``max_violation`` and
    ``gate_entropy_normalized`` (scalars), or each with ``_per_layer`` ([L]); `router_metrics` gives
    all of them.

    Args:
      load_entropy: the load entropies below which it is collapse and above which it is health, a
        pair in [0, 1], the first at most the second.
      dead_experts: the shares of dead experts above which it is collapse and below which it is
        health, a pair in [0, 1], the first at least the second.
      max_violation: the same for MaxVio, a pair >= 0. With m = T k / E slots an expert in a batch,
        chance alone makes MaxVio about :math:`\sqrt{2 \log E / m}` where the load is even: for
        small batches keep both above that. MaxVio is at most E / k - 1.
      undecided_entropy: the token entropy from which a router counts as undecided, in [0, 1].
      smoothing: how much of the averages a look keeps, in [0, 1).
      patience: looks of collapse before it acts, an integer >= 1.
      release_patience: looks of health before it first lets go, an integer >= 1.
      gate_lr_factor: what the gate's rate is multiplied by while it acts, in [0, 1]; exactly 1
        leaves the gate's rate alone, for optimizers without groups.
      aux_loss_weight: the least weight of the auxiliary loss while it acts, >= 0, for a loss that
        is 1 when the load is even (Switch's; MaxText's is k then, Levanter's 1 / k).
      balance_update_rate: the least rate of the balance bias while it acts, >= 0.
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.
      per_layer: whether each layer is judged by itself.
      num_layers: with ``per_layer``, how many layers there are; an integer >= 1.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range; when applied, if there is none of the
        hyperparameters that it controls.

    Example:
      >>> import meta_optax as mo
      >>> meta = mo.guard_collapse(patience=1)
      >>> collapsed = {"load_entropy_normalized": 0.1, "dead_experts": 0.9, "max_violation": 6.0}
      >>> row = {"step": 0, "gate_entropy_normalized": 0.05, **collapsed}
      >>> state = meta.observe(meta.init(), row)
      >>> used = meta.apply(state, {"learning_rate": 1.0, "aux_loss_weight": 0.0})
      >>> print(used["gate_learning_rate"], used["aux_loss_weight"])
      0.1 0.3
    """
    entropy_low, entropy_high = _thresholds("load_entropy", load_entropy, most=1.0, rises=True)
    dead_high, dead_low = _thresholds("dead_experts", dead_experts, most=1.0, rises=False)
    worst, fine = _thresholds("max_violation", max_violation, most=math.inf, rises=False)
    undecided = _checks.real("undecided_entropy", undecided_entropy, high=1.0)
    kept = _checks.real("smoothing", smoothing, high=1.0, open_high=True)
    patience = _checks.integer("patience", patience, low=1)
    release = _checks.integer("release_patience", release_patience, low=1)
    gate_factor = _checks.real("gate_lr_factor", gate_lr_factor, high=1.0)
    least = {
        "aux_loss_weight": _checks.real("aux_loss_weight", aux_loss_weight, open_high=True),
        "balance_update_rate": _checks.real(
            "balance_update_rate", balance_update_rate, open_high=True
        ),
    }
    frequency = _checks.integer("update_frequency", update_frequency, low=1)
    shape = shape_of_layers(per_layer, num_layers)
    names = tuple(name + ("_per_layer" if shape else "") for name in _METRICS)

    def init() -> GuardCollapseState:
        return GuardCollapseState(
            seen=jnp.zeros([], jnp.int32),
            load_entropy=jnp.ones(shape, jnp.float32),
            dead_experts=jnp.zeros(shape, jnp.float32),
            max_violation=jnp.zeros(shape, jnp.float32),
            gate_entropy=jnp.ones(shape, jnp.float32),
            bad_count=jnp.zeros(shape, jnp.int32),
            good_count=jnp.zeros(shape, jnp.int32),
            is_acting=jnp.zeros(shape, bool),
            interventions=jnp.zeros(shape, jnp.int32),
            rule=jnp.zeros(shape, jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def needs(metrics: Metrics) -> dict[str, tuple[int, ...]]:
        del metrics
        return dict.fromkeys(names, shape)

    def observe(state: GuardCollapseState, metrics: Metrics) -> GuardCollapseState:
        averages = (state.load_entropy, state.dead_experts, state.max_violation, state.gate_entropy)
        load, dead, violation, gate = (
            smooth(average, metrics[name], state.seen, kept)
            for average, name in zip(averages, names, strict=True)
        )
        causes = jnp.stack([load < entropy_low, dead > dead_high, violation > worst])
        is_bad = causes.any(axis=0) & (gate < undecided)
        is_good = (load > entropy_high) & (dead < dead_low) & (violation < fine)
        bad = jnp.where(is_bad, optax.safe_increment(state.bad_count), 0)
        good = jnp.where(is_good, optax.safe_increment(state.good_count), 0)
        begins = ~state.is_acting & (bad >= patience)
        ends = state.is_acting & (good >= _hold(release, state.interventions))
        count = optax.safe_increment(state.interventions)
        cause = jnp.argmax(causes, axis=0).astype(jnp.int32)
        rule = jnp.where(begins, cause, jnp.where(ends, _RELEASED, state.rule))
        return GuardCollapseState(
            seen=jnp.ones_like(state.seen),
            load_entropy=load,
            dead_experts=dead,
            max_violation=violation,
            gate_entropy=gate,
            bad_count=bad,
            good_count=good,
            is_acting=(state.is_acting | begins) & ~ends,
            interventions=jnp.where(begins, count, state.interventions),
            rule=rule.astype(jnp.int32),
            nonfinite_count=state.nonfinite_count,
        )

    def apply(state: GuardCollapseState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = dict(hyperparams)
        if not is_exactly(gate_factor, 1.0):
            out = _slow_gates(hyperparams, jnp.where(state.is_acting, gate_factor, 1.0))
        for name, value in least.items():
            if name in hyperparams:
                base = jnp.asarray(hyperparams[name]).astype(jnp.float32)
                raised = jnp.maximum(base, value)
                out[name] = jnp.where(state.is_acting.any(), raised, base)
        if out.keys() <= hyperparams.keys() and all(out[k] is hyperparams[k] for k in out):
            raise ValueError(
                "guard_collapse has nothing to control: it acts on gates' learning rates, "
                f"{' and '.join(least)}, but the hyperparameters are {sorted(hyperparams)}."
            )
        return out

    return MetaOptimizer(
        name="guard_collapse",
        init=init,
        observe=observe_every(
            "guard_collapse", frequency, hold_nonfinite("guard_collapse", needs, observe)
        ),
        apply=apply,
        metrics=names,
    )


def _hold(release: Any, interventions: Int[Array, "*layers"]) -> Int[Array, "*layers"]:
    """The looks of health that end an intervention: more of them each time, within int32."""
    again = jnp.maximum(interventions - 1, 0).astype(jnp.float32)
    looks = jnp.asarray(release, jnp.float32) * _HOLD_GROWTH**again
    return jnp.minimum(looks, _MOST_LOOKS).astype(jnp.int32)


def _slow_gates(hyperparams: Mapping[str, Any], factor: Float[Array, "*layers"]) -> Hyperparams:
    """The hyperparameters with the gate's learning rates, by layer or not, times the factor."""
    out = dict(hyperparams)
    gate = "gate_learning_rate"
    plain = hyperparams.get(gate, hyperparams.get("learning_rate"))
    of_layers = [key for key in hyperparams if key != gate and group_name(key) == gate]
    if factor.ndim:
        for layer in range(factor.shape[0]) if plain is not None else ():
            key = layer_form("gate", layer, "learning_rate")
            base = jnp.asarray(hyperparams.get(key, plain)).astype(jnp.float32)
            out[key] = base * factor[layer]
        return out
    for key in ([gate] if plain is not None else []) + of_layers:
        out[key] = jnp.asarray(hyperparams.get(key, plain)).astype(jnp.float32) * factor
    return out


def _thresholds(name: str, pair: Any, *, most: float, rises: bool) -> tuple[Any, Any]:
    """The thresholds of collapse and of health, which must lie in that order."""
    bad, good = _checks.pair(name, pair, what="(collapse, health)", high=most)
    if _checks.is_known(bad, good) and (bad > good if rises else bad < good):
        order = "at most" if rises else "at least"
        raise ValueError(f"{name} must be a pair with the first {order} the second, got {pair!r}.")
    return bad, good
