"""The log of decisions inside a state: a ring of what a strategy changed, when, and why."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from meta_optax import _checks
from meta_optax._checks import Scalar
from meta_optax._core import (
    ANY_HYPERPARAM,
    BASE_PREFIX,
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    State,
    forms,
    group_name,
    plain_name,
    protect,
    read_step,
    split_pair,
)
from meta_optax._counts import keep_room
from meta_optax._devices import replicate

# Texts are kept as bytes beside the numbers, so that a log can be read without the strategies.
_NAME_BYTES = 32
_TEXT_BYTES = 64
# Two float32 computations of one value may differ by this much, relatively, without a decision.
_ROUNDING = 1e-6


class DecisionLog(NamedTuple):
    """A ring of the last decisions; ``count`` is how many were ever made, while int32 holds it."""

    kept_on_reset = ("count", "step", "old", "new", "value", "hyperparam", "reason", "metric")

    count: Int[Array, ""]
    step: Int[Array, " capacity"]
    old: Float[Array, " capacity"]
    new: Float[Array, " capacity"]
    value: Float[Array, " capacity"]
    hyperparam: UInt8[Array, "capacity name_bytes"]
    reason: UInt8[Array, "capacity text_bytes"]
    metric: UInt8[Array, "capacity text_bytes"]


class WithDecisionsState(NamedTuple):
    """State of `with_decisions`."""

    log: DecisionLog
    inner: State

    @property
    def nonfinite_count(self) -> Int[Array, ""]:
        """How often a needed metric was not finite."""
        return self.inner.nonfinite_count


class _Candidate(NamedTuple):
    """What is a decision if the two values differ."""

    old: Float[Array, ""]
    new: Float[Array, ""]
    value: Float[Array, ""]
    hyperparam: UInt8[Array, " name_bytes"]
    reason: UInt8[Array, " text_bytes"]
    metric: UInt8[Array, " text_bytes"]


def with_decisions(meta_optimizer: MetaOptimizer, capacity: Scalar = 64) -> MetaOptimizer:
    """Records what a strategy changes and by which rule, in a ring inside its state.

    A decision is a difference between what the state before a step's metrics and the state after
    them make of the same base values; so a base schedule's own movement is none, and a warm-up's
    is one a step. In a chain, each strategy's share of a change is recorded by itself. Values are
    those before what lies outside this (`bounded`, or the hold on non-finite values).

    Args:
      meta_optimizer: the strategy, which may be a chain.
      capacity: the decisions kept, an integer >= 1; of older ones only the count remains.

    Returns:
      A `MetaOptimizer` that acts as the strategy does.

    Raises:
      ValueError: if the capacity is below 1; from ``update``, if the strategy changes nothing.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> strategy = mo.with_decisions(mo.plateau(patience=1))
      >>> tx = mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=0.5)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for loss in (1.0, 1.0):
      ...     updates, state = tx.update(params, state, params, value=loss)
      >>> mo.read_decisions(state)
      [Decision(step=1, hyperparam='learning_rate', old=0.5, new=0.25, reason='plateau: patience')]
    """
    meta = protect(meta_optimizer, "with_decisions")
    capacity = _checks.size("capacity", capacity, low=1)

    def init() -> WithDecisionsState:
        log = DecisionLog(
            count=jnp.zeros([], jnp.int32),
            step=jnp.zeros([capacity], jnp.int32),
            old=jnp.zeros([capacity], jnp.float32),
            new=jnp.zeros([capacity], jnp.float32),
            value=jnp.zeros([capacity], jnp.float32),
            hyperparam=jnp.zeros([capacity, _NAME_BYTES], jnp.uint8),
            reason=jnp.zeros([capacity, _TEXT_BYTES], jnp.uint8),
            metric=jnp.zeros([capacity, _TEXT_BYTES], jnp.uint8),
        )
        return WithDecisionsState(log=log, inner=meta.init())

    def observe(state: WithDecisionsState, metrics: Metrics) -> WithDecisionsState:
        inner = meta.observe(state.inner, metrics)
        candidates = _candidates(meta, state.inner, inner, metrics)
        log = state.log
        if candidates:
            log = _record(log, read_step(meta.name, metrics), candidates)
        return WithDecisionsState(log=log, inner=inner)

    def apply(state: WithDecisionsState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        return meta.apply(state.inner, hyperparams)

    return MetaOptimizer(f"with_decisions({meta.name})", init, observe, apply, meta.metrics)


def _base_of(metrics: Metrics) -> tuple[Hyperparams, bool]:
    """The base values, and whether they are that rather than the current values.

    Every way to act shows base values. Whoever calls ``observe`` without them gets the current
    ones in their place: what a strategy multiplies them by is the same.
    """
    prefixed = {k.removeprefix(BASE_PREFIX): k for k in metrics if k.startswith(BASE_PREFIX)}
    current = forms(metrics, "learning_rate") + forms(metrics, "weight_decay")
    keys = prefixed or dict(zip(current, current, strict=True))
    base = {name: jnp.asarray(metrics[key]).astype(jnp.float32) for name, key in keys.items()}
    return base, bool(prefixed)


def _has_rules(node: Any) -> bool:
    return hasattr(node, "decision_rules")


def _candidates(meta: MetaOptimizer, old: State, new: State, metrics: Metrics) -> list[_Candidate]:
    """What each strategy in the state may have changed of each hyperparameter.

    The strategies' states are replaced one after the other, old by new: what a hyperparameter
    moves by at one replacement is that strategy's doing. States that name no rules go last,
    together, under the name of the whole.
    """
    base, is_base = _base_of(metrics)
    if not base:
        return []
    old_leaves, treedef = jax.tree.flatten(old, is_leaf=_has_rules)
    new_leaves = jax.tree.leaves(new, is_leaf=_has_rules)
    with_rules = [i for i, leaf in enumerate(old_leaves) if _has_rules(leaf)]
    others = [i for i, leaf in enumerate(old_leaves) if not _has_rules(leaf)]
    mixed = list(old_leaves)
    start = before = meta.apply(old, dict(base))
    candidates = []

    def value(out: Hyperparams, name: str) -> Float[Array, ""]:
        given = jnp.asarray(out[name]).astype(jnp.float32)
        if is_base or name not in base:
            return given
        return given * jnp.where(start[name] > 0, base[name] / start[name], 1.0)

    for indices in [[i] for i in with_rules] + ([others] if others else []):
        for i in indices:
            mixed[i] = new_leaves[i]
        after = meta.apply(jax.tree.unflatten(treedef, mixed), dict(base))
        rules = new_leaves[indices[0]].decision_rules() if indices != others else {}
        candidates += [
            _candidate(meta, name, value(before, name), value(after, name), rules, metrics)
            for name in after
            if name not in base or after[name] is not base[name]
        ]
        before = after
    if not candidates:
        raise ValueError(
            f"with_decisions has nothing to record: {meta.name} changes no hyperparameter. For a "
            "dry run write log_only(with_decisions(...)), not the reverse."
        )
    return candidates


def _candidate(
    meta: MetaOptimizer,
    hyperparam: str,
    old: Float[Array, ""],
    new: Float[Array, ""],
    rules: Mapping[str, Rules],
    metrics: Metrics,
) -> _Candidate:
    """What may be a decision, by the rule of the hyperparameter, of its plain form, or of any."""
    names = (hyperparam, group_name(hyperparam), plain_name(hyperparam), ANY_HYPERPARAM)
    unknown = Rules(index=jnp.zeros([], jnp.int32), texts=(meta.name,), metrics=("",))
    rule = next((rules[key] for key in names if key in rules), unknown)
    shown = [_shown_name(name, meta.metrics) for name in rule.metrics]
    values = [_scalar_of(meta.name, name, metrics.get(name), rule.layer) for name in shown]

    def text(texts: Iterable[str]) -> UInt8[Array, " text_bytes"]:
        return jnp.asarray(np.stack([_encode(text, _TEXT_BYTES) for text in texts]))[rule.index]

    return _Candidate(
        old=old,
        new=new,
        value=jnp.stack(values)[rule.index],
        hyperparam=jnp.asarray(_encode(hyperparam, _NAME_BYTES)),
        reason=text(rule.texts),
        metric=text(shown),
    )


def _shown_name(metric: str, needed: tuple[str, ...]) -> str:
    """A rule's metric as the strategy is shown it: normalised, where it asks for that."""
    first, layers, _ = metric.partition("_per_layer")
    normalized = f"{first}_normalized{layers}"
    return normalized if metric not in needed and normalized in needed else metric


def _scalar_of(strategy: str, name: str, metric: Any, layer: int | None) -> Float[Array, ""]:
    """A metric's value for the log: the layer's own where there is one, NaN for other arrays.

    It is NaN, too, where the metric did not arrive.
    """
    metric, arrived = split_pair(strategy, name, metric)
    value = replicate(jnp.asarray(jnp.nan if metric is None else metric).astype(jnp.float32))
    value = jnp.where(arrived, value, jnp.nan)
    if layer is not None and value.ndim == 1:
        value = value[layer]
    return value if value.ndim == 0 else jnp.full([], jnp.nan, jnp.float32)


def _record(log: DecisionLog, step: Int[Array, ""], candidates: list[_Candidate]) -> DecisionLog:
    """Appends those candidates whose values differ."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
    changed = _differ(stacked.old, stacked.new)
    capacity = log.step.shape[0]
    log = log._replace(count=keep_room(log.count, len(candidates), capacity))
    position = log.count + jnp.cumsum(changed, dtype=jnp.int32) - 1
    total = log.count + jnp.sum(changed, dtype=jnp.int32)
    # More decisions in one step than the ring holds would fall on one another: keep the last.
    kept = changed & (position >= total - capacity)
    index = jnp.where(kept, position % capacity, capacity)
    return DecisionLog(
        count=total,
        step=log.step.at[index].set(step, mode="drop"),
        old=log.old.at[index].set(stacked.old, mode="drop"),
        new=log.new.at[index].set(stacked.new, mode="drop"),
        value=log.value.at[index].set(stacked.value, mode="drop"),
        hyperparam=log.hyperparam.at[index].set(stacked.hyperparam, mode="drop"),
        reason=log.reason.at[index].set(stacked.reason, mode="drop"),
        metric=log.metric.at[index].set(stacked.metric, mode="drop"),
    )


def _differ(old: Float[Array, " n"], new: Float[Array, " n"]) -> Bool[Array, " n"]:
    return jnp.abs(new - old) > _ROUNDING * jnp.maximum(jnp.abs(old), jnp.abs(new))


def _encode(text: str, size: int) -> np.ndarray:
    data = text.encode()[:size]
    return np.frombuffer(data.ljust(size, b"\0"), np.uint8)
