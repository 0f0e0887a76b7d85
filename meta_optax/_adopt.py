"""Control for a run that was begun without it: its optimizer's state, in the state of a new one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meta_optax._checkpoint import checkpoint_template, fresh_leaves, place
from meta_optax._groups import UNCONTROLLED
from meta_optax._inject import InjectMetaHyperparamsState
from meta_optax._multi_steps import MetaMultiStepsState
from meta_optax._read import check_versions, has_strategy, own_nodes
from meta_optax._scale import ScaleByMetaState
from meta_optax._schedule import MetaScheduleState
from meta_optax._spikes import SkipSpikesState
from meta_optax._trees import FRESH, all_fresh, children, mismatch
from meta_optax.moe._balance import BalanceRouterBiasState

_INJECTED = (
    optax.schedules.InjectStatefulHyperparamsState,
    optax.schedules.InjectHyperparamsState,
)
# Wrappers that a run may get or have had, and where each keeps the state inside.
_WRAPPERS = {
    SkipSpikesState: "inner_state",
    MetaMultiStepsState: "multi_steps_state",
    optax.MultiStepsState: "inner_opt_state",
    optax.ApplyIfFiniteState: "inner_state",
}
# What counts steps, and knows no better than the old run's count where it is new to it.
_COUNTED = (
    InjectMetaHyperparamsState,
    ScaleByMetaState,
    MetaScheduleState,
    BalanceRouterBiasState,
    optax.schedules.InjectStatefulHyperparamsState,
    optax.MultiStepsState,
)
# The fields that say how many updates were made, as a schedule reads them.
_STEP_FIELDS = ("count", "gradient_step")


class _Count:
    """Stands for a leaf that becomes the old run's step count."""


_COUNT = _Count()


def adopt(opt_state: Any, tx: Any, params: Any) -> Any:
    r"""Puts the optimizer of a run that was begun without this library under control.

    With :math:`s_0` the fresh state of ``tx``, :math:`a` the old optimizer's own state (moments,
    accumulators) and :math:`c` the highest step count in it, 0 if there is none,

    .. math:: s = s_0 \text{ with } a \text{ in the place of its own, and every step count } c

    so that schedules go on where they were, and a warm-up that is long past does not start again.
    Hyperparameters are those given to ``tx``, also where the old state had some in it; the rate and
    weight decay of the old run's schedules have to be given to ``tx`` again.

    Takes the state of ``f(...)`` or of ``optax.inject_hyperparams(f)(...)`` for
    ``inject_meta_hyperparams(f, ...)(...)``, for ``optax.inject_hyperparams(f)`` with `as_schedule`
    and for ``moe_partition(f, labels)`` in either (the moments are split by group; those of leaves
    labelled ``balance_bias`` go); the state of a chain for that chain with `scale_by_meta` in it.
    `skip_spikes`, `multi_steps`, `optax.MultiSteps` and `optax.apply_if_finite` around may be new,
    or on both sides: then their own state is kept too.

    Nothing is copied but what the new state would hold twice: donate either the old state to a
    step or the new one. Not for use under `jax.jit`.

    Args:
      opt_state: the old optimizer's state, typed: restore it into
        ``checkpoint_template(old_tx, params)``.
      tx: the new transformation.
      params: the params.

    Returns:
      The state of ``tx``, whose new leaves are where `checkpoint_template` has them.

    Raises:
      ValueError: if the state is already under control, or if something of it does not fit
        ``tx``; the message names the path and both sides.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> params, old = jnp.ones(2), optax.adamw(0.1)
      >>> state = old.init(params)
      >>> for _ in range(3):
      ...     updates, state = old.update(params, state, params)
      >>> tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(learning_rate=0.1)
      >>> adopted = mo.adopt(state, tx, params)
      >>> print(adopted.count, adopted.inner_state[0].mu is state[0].mu)
      3 True
    """
    if has_strategy(opt_state):
        raise ValueError(
            "The state is already under control: use migrate where its layout is an older one, "
            "and reset to start its strategies afresh."
        )
    check_versions([node.layout_version for node in own_nodes(opt_state)])
    template = checkpoint_template(tx, params)
    adopted = _walk(template, opt_state, (), in_group=False)
    leaves, treedef = jax.tree.flatten(adopted)
    likes = jax.tree.leaves(template)
    fresh = fresh_leaves(tx, params, template, [i for i, x in enumerate(leaves) if x is FRESH])
    count = _highest_count(opt_state)
    seen: set[int] = set()

    def finish(i: int, leaf: Any) -> Any:
        if leaf is FRESH:
            return fresh[i]
        if leaf is _COUNT:
            return place(np.full(likes[i].shape, count, np.int32), likes[i], params)
        # A buffer that stood in a state twice could not be donated.
        again, _ = id(leaf) in seen, seen.add(id(leaf))
        return jnp.copy(leaf) if again else leaf

    return treedef.unflatten([finish(i, leaf) for i, leaf in enumerate(leaves)])


def _highest_count(opt_state: Any) -> int:
    """The most updates that a part of the state counts."""

    def is_count(path: Any, leaf: Any) -> bool:
        names = [getattr(key, "name", None) for key in path]
        # What `skip_spikes` has seen is counted in losses, up to its window.
        of_steps = bool(names) and names[-1] in _STEP_FIELDS and "watch" not in names
        return of_steps and jnp.shape(leaf) == () and jnp.result_type(leaf) == jnp.int32

    found = jax.tree_util.tree_leaves_with_path(opt_state)
    counts = jax.device_get([leaf for path, leaf in found if is_count(path, leaf)])
    return max(map(int, counts), default=0)


def _walk(new: Any, old: Any, path: tuple[Any, ...], *, in_group: bool) -> Any:
    """The new state with the old one's leaves, or with what stands for them."""

    def go(name: str, other: Any) -> Any:
        key = jax.tree_util.GetAttrKey(name)
        return _walk(getattr(new, name), other, (*path, key), in_group=in_group)

    if isinstance(new, InjectMetaHyperparamsState):
        kept = _schedule_states(new.schedule_states, old, prefix="schedule_")
        inner = go("inner_state", _uninjected(old))
        return _started(new)._replace(schedule_states=kept, inner_state=inner)
    if isinstance(new, optax.schedules.InjectStatefulHyperparamsState) and (
        has_strategy(new.hyperparams_states) or not isinstance(old, _INJECTED)
    ):
        kept = _schedule_states(new.hyperparams_states, old)
        inner = go("inner_state", _uninjected(old))
        return _started(new)._replace(hyperparams_states=kept, inner_state=inner)
    if isinstance(new, ScaleByMetaState) and jax.tree.leaves(old) == []:
        return _started(new)
    if type(new) in _WRAPPERS and type(old) is not type(new):
        name = _WRAPPERS[type(new)]
        return _started(new)._replace(**{name: go(name, old)})
    if isinstance(new, optax.PartitionState) and not isinstance(old, optax.PartitionState):
        return _split(new, old, path)
    if isinstance(new, optax.MaskedNode) and in_group:
        return new
    if isinstance(new, optax.EmptyState) and _is_step_count(old):
        return new
    if _is_step_count(new) and isinstance(old, optax.EmptyState):
        return _started(new)
    if type(new) is tuple or isinstance(new, dict):
        return _walk_chain(new, old, path, in_group=in_group)
    return _walk_children(new, old, path, in_group=in_group)


def _walk_children(new: Any, old: Any, path: tuple[Any, ...], *, in_group: bool) -> Any:
    """Two nodes of one kind, child by child, or two leaves."""
    own, treedef = children(new)
    others, other_treedef = children(old)
    if treedef != other_treedef:
        raise mismatch(path, new, old)
    if own and own[0][0] is None:
        if not hasattr(old, "dtype") or (new.shape, new.dtype) != (old.shape, old.dtype):
            raise mismatch(path, new, old)
        return old
    return treedef.unflatten(
        [
            _walk(child, other, (*path, key), in_group=in_group)
            for (key, child), (_, other) in zip(own, others, strict=True)
        ]
    )


def _walk_chain(new: Any, old: Any, path: tuple[Any, ...], *, in_group: bool) -> Any:
    """A chain, named or not, some of whose links the old one did not have."""
    own, treedef = children(new)
    links = [(key, child) for key, child in own if _is_link(child)]
    rest = [(key, child) for key, child in own if not _is_link(child)]
    if not links:
        return _walk_children(new, old, path, in_group=in_group)

    def pair(others: list[Any]) -> Any:
        found = {
            key: _walk(child, other, (*path, key), in_group=in_group)
            for (key, child), other in zip(rest, others, strict=True)
        }
        found |= {key: _started(child) for key, child in links}
        return treedef.unflatten([found[key] for key, _ in own])

    choices: list[list[Any]] = []
    if type(old) is type(new) and [k for k, _ in children(old)[0]] == _keys(new, rest):
        choices.append([other for _, other in children(old)[0]])
    if len(rest) == 1:
        choices.append([old])
    errors = []
    for others in choices:
        try:
            return pair(others)
        except ValueError as error:
            errors.append(error)
    raise errors[0] if errors else mismatch(path, new, old)


def _keys(new: Any, rest: list[tuple[Any, Any]]) -> list[Any]:
    """The keys that the chain would have without its new links."""
    if isinstance(new, tuple):
        return [jax.tree_util.SequenceKey(i) for i in range(len(rest))]
    return [key for key, _ in rest]


def _split(new: Any, old: Any, path: tuple[Any, ...]) -> Any:
    """The state of groups from the state of one optimizer over all params."""
    key = jax.tree_util.GetAttrKey("inner_states")

    def part(group: Any, masked: Any) -> Any:
        if group == UNCONTROLLED:
            return _started(masked)
        where = (*path, key, jax.tree_util.DictKey(group), jax.tree_util.GetAttrKey("inner_state"))
        return masked._replace(inner_state=_walk(masked.inner_state, old, where, in_group=True))

    return new._replace(inner_states={g: part(g, m) for g, m in new.inner_states.items()})


def _schedule_states(new: dict[str, Any], old: Any, prefix: str = "") -> dict[str, Any]:
    """The states of stateful schedules: the old ones' where they are of the same layout."""
    states = getattr(old, "hyperparams_states", {})

    def of(name: str, fresh: Any) -> Any:
        given = states.get(name.removeprefix(prefix), fresh)
        try:
            return _walk(fresh, given, (), in_group=False) if given is not fresh else None
        except ValueError:
            return None

    carried = {name: of(name, fresh) for name, fresh in new.items()}
    return {name: _started(new[name]) if got is None else got for name, got in carried.items()}


def _started(tree: Any) -> Any:
    """What stands for a fresh state whose step counts go on from the old run's."""

    def is_counted(node: Any) -> bool:
        return isinstance(node, _COUNTED) or _is_step_count(node)

    def start(node: Any) -> Any:
        if not is_counted(node):
            return FRESH
        counts = {name: _COUNT for name in _STEP_FIELDS if name in node._fields}
        # The counts in a strategy's state, as of its windows, are not of steps.
        inner = {name: all_fresh(value) for name, value in node._asdict().items()}
        states = [name for name in ("inner_state", "hyperparams_states") if name in node._fields]
        inner |= {name: _started(getattr(node, name)) for name in states}
        return node._replace(**(inner | counts))

    return jax.tree.map(start, tree, is_leaf=is_counted)


def _is_link(node: Any) -> bool:
    """Whether there is nothing in a state but `scale_by_meta`, masked or not."""

    def is_scale(leaf: Any) -> bool:
        return isinstance(leaf, ScaleByMetaState)

    found = jax.tree.leaves(node, is_leaf=is_scale)
    return bool(found) and all(map(is_scale, found))


def _is_step_count(node: Any) -> bool:
    """Whether a state is no more than a schedule's count, as where a rate was a schedule."""
    return getattr(node, "_fields", ()) == ("count",)


def _uninjected(old: Any) -> Any:
    return old.inner_state if isinstance(old, _INJECTED) else old
