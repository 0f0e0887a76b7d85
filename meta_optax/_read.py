"""Reading a state from the host, and starting its strategies afresh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from meta_optax._control import LAYOUT_VERSION
from meta_optax._inject import InjectMetaHyperparamsState
from meta_optax._multi_steps import MetaMultiStepsState
from meta_optax._scale import ScaleByMetaState
from meta_optax._schedule import MetaScheduleState
from meta_optax._spikes import SkipSpikesState
from meta_optax.moe._balance import BalanceRouterBiasState

_STRATEGY_STATES = (InjectMetaHyperparamsState, ScaleByMetaState, MetaScheduleState)
_OWN_STATES = (
    *_STRATEGY_STATES,
    SkipSpikesState,
    BalanceRouterBiasState,
    MetaMultiStepsState,
)


def read_hyperparams(opt_state: Any) -> dict[str, float]:
    """What the last update used, as Python numbers, with one transfer from the device.

    Args:
      opt_state: an optimizer's state, with `inject_meta_hyperparams`, `scale_by_meta` or
        `optax.inject_hyperparams` anywhere in it.

    Returns:
      The hyperparameters by name; `scale_by_meta` reports its factors, as
      ``learning_rate_scale``.

    Raises:
      ValueError: if there are none, or if a name stands in two places with different values, or
        if a state has a layout that this version does not know.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.5)
      >>> mo.read_hyperparams(tx.init(jnp.ones(2)))
      {'learning_rate': 0.5}
    """
    found = gather_hyperparams(opt_state)
    if not found.values:
        raise ValueError(
            "The state holds no hyperparameters: the optimizer is built without "
            "inject_meta_hyperparams, scale_by_meta or optax.inject_hyperparams."
        )
    return hyperparams_of(jax.device_get(found))


class FoundHyperparams(NamedTuple):
    """The hyperparameters of each state that has any, and the layout versions."""

    values: list[dict[str, Any]]
    versions: list[Any]


def gather_hyperparams(opt_state: Any) -> FoundHyperparams:
    """The hyperparameters in a state, wherever its arrays are."""
    return FoundHyperparams(
        values=[node.hyperparams for node in _nodes(opt_state, _has_hyperparams)],
        versions=[node.layout_version for node in own_nodes(opt_state)],
    )


def hyperparams_of(found: FoundHyperparams) -> dict[str, float]:
    """The hyperparameters on the host by name, each name once; see `read_hyperparams`."""
    check_versions(found.versions)
    merged: dict[str, float] = {}
    for hyperparams in found.values:
        for name, leaf in hyperparams.items():
            value = _only_leaf(leaf)
            if value.ndim:
                raise ValueError(f"{name!r} has shape {value.shape}: read one of the states.")
            number = value.tolist()
            if merged.setdefault(name, number) != number:
                raise ValueError(
                    f"{name!r} stands in the state twice, as {merged[name]} and {number}: "
                    "read the part of the state that you mean."
                )
    return merged


def reset(opt_state: Any, tx: Any, params: Any) -> Any:
    """Starts the strategies afresh; the optimizer's moments and all step counts stay.

    What the strategies start from (base values, changed in flight or not), what the last update
    used, the log of decisions and what `hold_spikes` and `skip_spikes` have seen stay too. Can be
    called under `jax.jit`.

    Args:
      opt_state: the optimizer's state.
      tx: the transformation that it belongs to.
      params: the params.

    Returns:
      The state with fresh strategies.

    Raises:
      ValueError: if there is no strategy in the state, or if it does not belong to ``tx``.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau(patience=1))(learning_rate=0.1)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for loss in (1.0, 1.0, 0.9):
      ...     updates, state = tx.update(params, state, params, value=loss)
      >>> updates, state = tx.update(params, mo.reset(state, tx, params), params, value=5.0)
      >>> print(state.hyperparams["learning_rate"], state.count)
      0.1 4
    """
    shapes = jax.eval_shape(tx.init, params)
    if not has_strategy(opt_state):
        raise ValueError("The state holds no strategy of this library: there is nothing to reset.")
    check_versions([node.layout_version for node in own_nodes(opt_state)])
    if _layout(shapes) != _layout(opt_state):
        raise ValueError(
            "The state does not belong to this transformation and these params: structures, shapes "
            "or dtypes differ. Of an nnx.Optimizer, pass nnx.as_pure(optimizer.opt_state) and "
            "nnx.as_pure(nnx.state(model, nnx.Param))."
        )
    # Only the strategies' states leave the computation, so XLA makes no second set of moments.
    fresh = jax.jit(lambda: [n.meta_state for n in _nodes(tx.init(params), _has_strategy)])()
    remaining = iter(fresh)

    def renew(node: Any) -> Any:
        if not _has_strategy(node):
            return node
        meta_state = _carry_over(node.meta_state, next(remaining))
        rest = {name: walk(getattr(node, name)) for name in _rest(node)}
        return node._replace(**rest, meta_state=meta_state)

    def walk(tree: Any) -> Any:
        return jax.tree.map(renew, tree, is_leaf=_has_strategy)

    return walk(opt_state)


def _carry_over(old: Any, fresh: Any) -> Any:
    """The fresh state with those fields of the old one that a reset is to keep."""

    def has_kept(node: Any) -> bool:
        return hasattr(type(node), "kept_on_reset")

    def carry(a: Any, b: Any) -> Any:
        return b._replace(**{k: getattr(a, k) for k in a.kept_on_reset}) if has_kept(a) else b

    return jax.tree.map(carry, old, fresh, is_leaf=has_kept)


def _layout(tree: Any) -> Any:
    """The structure of a tree, and the shapes and dtypes of its leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _only_leaf(tree: Any) -> np.ndarray:
    """An array on the host, also where a framework wraps it, as Flax NNX does."""
    return np.asarray(jax.tree.leaves(tree)[0])


def own_nodes(tree: Any) -> list[Any]:
    """The states of this library in a tree that have a version."""
    return _nodes(tree, lambda node: isinstance(node, _OWN_STATES))


def has_strategy(tree: Any) -> bool:
    """Whether a strategy of this library is anywhere in a state."""
    return bool(_nodes(tree, _has_strategy))


def _has_strategy(node: Any) -> bool:
    return isinstance(node, _STRATEGY_STATES)


def _has_hyperparams(node: Any) -> bool:
    return isinstance(getattr(node, "hyperparams", None), dict)


def _rest(node: Any) -> list[str]:
    """The fields of a state that may hold other states with hyperparameters."""
    return [name for name in node._fields if name not in ("hyperparams", "meta_state")]


def _nodes(tree: Any, is_wanted: Callable[[Any], bool]) -> list[Any]:
    """The wanted nodes of a tree, outer before inner, those inside of others too."""
    found = []
    for leaf in jax.tree.leaves(tree, is_leaf=is_wanted):
        if is_wanted(leaf):
            found += [leaf, *_nodes([getattr(leaf, name) for name in _rest(leaf)], is_wanted)]
    return found


def check_versions(versions: list[Any], *, oldest: int = LAYOUT_VERSION) -> None:
    """Raises if a state has a layout that is not known, as far as can be seen.

    Args:
      versions: the versions found.
      oldest: the oldest layout that will do.
    """
    for leaf in jax.tree.leaves(versions):
        if isinstance(leaf, Tracer):
            continue
        for version in np.unique(np.asarray(leaf)).tolist():
            known = f"The state has layout version {version}, and this version of meta_optax "
            if version > LAYOUT_VERSION:
                raise ValueError(
                    f"{known}knows {LAYOUT_VERSION}: the state is newer, so it needs a newer "
                    "meta_optax."
                )
            if version < oldest:
                remedy = "migrate(state, tx, params) brings it there"
                remedy = remedy if version >= 1 else "no version of it ever wrote that"
                raise ValueError(f"{known}has layout {LAYOUT_VERSION}: {remedy}.")
