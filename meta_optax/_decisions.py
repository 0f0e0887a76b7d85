"""The log of decisions: what a strategy changed, when, from what to what, and why."""

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
    State,
    forms,
    group_name,
    plain_name,
    protect,
    read_step,
)

# Texts are kept as bytes beside the numbers, so that a log can be read without the strategies.
_NAME_BYTES = 32
_REASON_BYTES = 64
# Two float32 computations of one value may differ by this much, relatively, without a decision.
_ROUNDING = 1e-6


class Decision(NamedTuple):
    """One change of one hyperparameter.

    Attributes:
      step: the updates made before the one that it first acted on.
      hyperparam: the hyperparameter's name.
      old: what it would have been without the change.
      new: what it became.
      reason: the strategy's name and the rule that fired, as ``"advanced_plateau: patience"``.
    """

    step: int
    hyperparam: str
    old: float
    new: float
    reason: str


class DecisionLog(NamedTuple):
    """A ring of the last decisions; ``count`` is how many were ever made."""

    kept_on_reset = ("count", "step", "old", "new", "hyperparam", "reason")

    count: Int[Array, ""]
    step: Int[Array, " capacity"]
    old: Float[Array, " capacity"]
    new: Float[Array, " capacity"]
    hyperparam: UInt8[Array, "capacity name_bytes"]
    reason: UInt8[Array, "capacity reason_bytes"]


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
    hyperparam: UInt8[Array, " name_bytes"]
    reason: UInt8[Array, " reason_bytes"]


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
            hyperparam=jnp.zeros([capacity, _NAME_BYTES], jnp.uint8),
            reason=jnp.zeros([capacity, _REASON_BYTES], jnp.uint8),
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


def read_decisions(opt_state: Any) -> list[Decision]:
    """The decisions that a state remembers, oldest first, with one transfer from the device.

    Args:
      opt_state: a state with `with_decisions` anywhere in it, not batched.

    Returns:
      The decisions of all logs in the state, by step; an empty list if nothing was decided.

    Raises:
      ValueError: if there is no log in the state, or if it is batched (by `jax.vmap`).
    """
    logs = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_log) if _is_log(node)]
    if not logs:
        raise ValueError("The state holds no log: wrap the strategy in with_decisions(...).")
    decisions = [entry for log in jax.device_get(logs) for entry in _entries(log)]
    return sorted(decisions, key=lambda decision: decision.step)


def _is_log(node: Any) -> bool:
    return isinstance(node, DecisionLog)


def format_decisions(decisions: Iterable[Decision]) -> str:
    """Decisions as lines for people; a rule that fires at each step, or look, is one line.

    So is one that changes several layers' rates alike at one step (``gate_*_learning_rate``).

    Args:
      decisions: what `read_decisions` gave, or a part of it.

    Returns:
      A line a run of decisions: steps, hyperparameter, old and new value, reason.

    Example:
      >>> import meta_optax as mo
      >>> cut = mo.Decision(7, "learning_rate", 0.01, 0.008, "advanced_plateau: patience")
      >>> print(mo.format_decisions([cut]))
      step 7: learning_rate 0.01 -> 0.008 (advanced_plateau: patience)
    """
    runs: list[list[Decision]] = []
    latest: dict[tuple[str, str], list[Decision]] = {}
    for decision in _merge_layers(decisions):
        key = (decision.hyperparam, decision.reason)
        run = latest.get(key)
        if run is not None and _continues(run, decision):
            run.append(decision)
        else:
            latest[key] = [decision]
            runs.append(latest[key])
    # Two decisions some steps apart are two, and no rule that fires at regular looks.
    parts = [part for run in runs for part in ([run] if _is_regular(run) else [[d] for d in run])]
    lines = map(_format_run, sorted(parts, key=lambda part: part[0].step))
    return "\n".join(lines) or "no decisions"


def _merge_layers(decisions: Iterable[Decision]) -> list[Decision]:
    """One decision for all those that differ in the layer alone."""
    alike: dict[Decision, list[Decision]] = {}
    for decision in decisions:
        group = group_name(decision.hyperparam)
        kind = group.replace("_", "_*_", 1) if group != decision.hyperparam else group
        alike.setdefault(decision._replace(hyperparam=kind), []).append(decision)
    return [own[0] if len(own) == 1 else merged for merged, own in alike.items()]


def _continues(run: list[Decision], decision: Decision) -> bool:
    """Whether a decision goes the way of those before it, and as long after as they did."""
    gap = decision.step - run[-1].step
    same_way = (decision.new > decision.old) == (run[-1].new > run[-1].old)
    return same_way and gap > 0 and (len(run) == 1 or gap == run[1].step - run[0].step)


def _is_regular(run: list[Decision]) -> bool:
    return len(run) != 2 or run[1].step == run[0].step + 1


def _format_run(run: list[Decision]) -> str:
    first, last = run[0], run[-1]
    when = f"step {first.step}"
    if len(run) > 1:
        gap = run[1].step - first.step
        when = f"steps {first.step}-{last.step}" + (f" by {gap}" if gap > 1 else "")
    return f"{when}: {first.hyperparam} {first.old:.4g} -> {last.new:.4g} ({first.reason})"


def _entries(log: DecisionLog) -> list[Decision]:
    """A log's decisions on the host, oldest first."""
    if log.count.ndim:
        raise ValueError(f"The log is batched, with shape {log.count.shape}: read one of them.")
    count, capacity = int(log.count), len(log.step)
    order = [index % capacity for index in range(max(0, count - capacity), count)]
    return [
        Decision(
            step=int(log.step[i]),
            hyperparam=_decode(log.hyperparam[i]),
            old=float(log.old[i]),
            new=float(log.new[i]),
            reason=_decode(log.reason[i]),
        )
        for i in order
    ]


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
            _Candidate(
                old=value(before, name),
                new=value(after, name),
                hyperparam=jnp.asarray(_encode(name, _NAME_BYTES)),
                reason=_reason(meta.name, rules, name),
            )
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


def _reason(
    name: str, rules: Mapping[str, tuple[Int[Array, ""], tuple[str, ...]]], hyperparam: str
) -> UInt8[Array, " reason_bytes"]:
    """The text of the rule behind a hyperparameter, behind the plain one of its form, or any."""
    names = (hyperparam, group_name(hyperparam), plain_name(hyperparam), ANY_HYPERPARAM)
    rule = next((rules[key] for key in names if key in rules), None)
    index, texts = rule or (jnp.zeros([], jnp.int32), (name,))
    return jnp.asarray(np.stack([_encode(text, _REASON_BYTES) for text in texts]))[index]


def _record(log: DecisionLog, step: Int[Array, ""], candidates: list[_Candidate]) -> DecisionLog:
    """Appends those candidates whose values differ."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
    changed = _differ(stacked.old, stacked.new)
    capacity = log.step.shape[0]
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
        hyperparam=log.hyperparam.at[index].set(stacked.hyperparam, mode="drop"),
        reason=log.reason.at[index].set(stacked.reason, mode="drop"),
    )


def _differ(old: Float[Array, " n"], new: Float[Array, " n"]) -> Bool[Array, " n"]:
    return jnp.abs(new - old) > _ROUNDING * jnp.maximum(jnp.abs(old), jnp.abs(new))


def _encode(text: str, size: int) -> np.ndarray:
    data = text.encode()[:size]
    return np.frombuffer(data.ljust(size, b"\0"), np.uint8)


def _decode(data: Any) -> str:
    return bytes(data).rstrip(b"\0").decode(errors="replace")
