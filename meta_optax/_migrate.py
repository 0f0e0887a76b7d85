"""States of older layouts, in the present one."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meta_optax._advanced_plateau import AdvancedPlateauState
from meta_optax._checkpoint import checkpoint_template, fresh_leaves, place
from meta_optax._control import LAYOUT_VERSION
from meta_optax._log import DecisionLog
from meta_optax._plateau import PlateauState
from meta_optax._read import check_versions
from meta_optax._smart_expert_gate import SmartExpertGateState
from meta_optax._trees import FRESH, all_fresh, children, key_name, mismatch

_VERSION = "layout_version"
# From the fields of an older layout, by name, and a state of the present one, to the next layout.
Change = Callable[[dict[str, Any], Any], dict[str, Any]]


def migrate(restored: Any, tx: Any, params: Any, mesh: Mesh | None = None) -> Any:
    """Brings an optimizer's state of an older layout into the present one.

    What a version added is as in a fresh state; what it changed is converted; all else is kept. A
    state of the present layout comes back as it is, typed and placed, so this also serves for what
    was restored without a template.

    Args:
      restored: the state, as Orbax gives it without a template (dicts and lists of arrays) or
        typed.
      tx: the transformation that it belongs to, built with the same arguments.
      params: the params, or their shapes, as for `checkpoint_template`.
      mesh: as for `checkpoint_template`.

    Returns:
      The typed state, where `checkpoint_template` has it.

    Raises:
      ValueError: if the state has a newer layout than this version of meta_optax, or none (then
        `adopt` is for it); if something in it is missing, left over or of another shape or dtype.
        The message names the path.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.5)
      >>> params = jnp.ones(2)
      >>> raw = tx.init(params)._asdict()
      >>> type(mo.migrate(raw, tx, params)).__name__
      'InjectMetaHyperparamsState'
    """
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    versions = [leaf for path, leaf in leaves if path and key_name(path[-1]) == _VERSION]
    if not versions:
        raise ValueError(
            "The state has no layout version, so this library did not make it: adopt puts the "
            "state of a plain Optax optimizer under control."
        )
    check_versions(versions, oldest=1)
    template = checkpoint_template(tx, params, mesh)
    state = _walk(template, restored, (), LAYOUT_VERSION)
    found, treedef = jax.tree.flatten(state)
    wanted = [i for i, leaf in enumerate(found) if leaf is FRESH]
    fresh = fresh_leaves(tx, params, template, wanted)
    return treedef.unflatten(
        [
            fresh[i] if i in fresh else place(leaf, like, params)
            for i, (leaf, like) in enumerate(zip(found, jax.tree.leaves(template), strict=True))
        ]
    )


def _added(*names: str) -> Change:
    """Fields that a version added."""

    def change(fields: dict[str, Any], new: Any) -> dict[str, Any]:
        # What is there already was written between two versions, and is kept.
        return {name: all_fresh(getattr(new, name)) for name in names} | fields

    return change


def _log_with_values(fields: dict[str, Any], new: Any) -> dict[str, Any]:
    """Older decisions rest on no metric that is known, so its value is none."""
    capacity = new.value.shape[0]
    made = np.arange(capacity) < int(jnp.max(fields["count"]))
    values = np.where(made, np.nan, 0.0).astype(np.float32)
    return {"value": values, "metric": all_fresh(new.metric)} | fields


# What each layout changed, against the one before. The names of states are today's: none was
# renamed so far.
_CHANGES: Mapping[int, Mapping[type, Change]] = {
    2: {
        # Held and counted since: a usage of another length than before. 0 is none seen yet.
        SmartExpertGateState: _added("num_experts"),
    },
    3: {
        PlateauState: _added("smoothed", "cooldown_count"),
        AdvancedPlateauState: _added("smoothed", "cooldown_count"),
        DecisionLog: _log_with_values,
    },
}


def _walk(new: Any, old: Any, path: tuple[Any, ...], version: int) -> Any:
    """The new state with the old one's leaves, or with what stands for fresh ones."""
    own, treedef = children(new)
    others, _ = children(old)
    is_leaf, other_is_leaf = (bool(pairs) and pairs[0][0] is None for pairs in (own, others))
    if old is FRESH or (is_leaf and other_is_leaf):
        return _leaf(new, old, path)
    if is_leaf or other_is_leaf:
        raise mismatch(path, new, old)
    fields = {key_name(key): child for key, child in others}
    if _VERSION in getattr(new, "_fields", ()) and _VERSION in fields:
        version = int(jnp.max(fields[_VERSION]))
        fields[_VERSION] = FRESH
    for layout in range(version + 1, LAYOUT_VERSION + 1):
        if change := _CHANGES[layout].get(type(new)):
            fields = change(fields, new)
    names = {key_name(key) for key, _ in own}
    if names != fields.keys():
        raise _unaccounted(path, names - fields.keys(), fields.keys() - names, version)
    return treedef.unflatten(
        [_walk(child, fields[key_name(key)], (*path, key), version) for key, child in own]
    )


def _leaf(new: Any, old: Any, path: tuple[Any, ...]) -> Any:
    if old is FRESH:
        return all_fresh(new)
    if not hasattr(old, "dtype") or (new.shape, new.dtype) != (old.shape, old.dtype):
        raise mismatch(path, new, old)
    return old


def _unaccounted(
    path: tuple[Any, ...], missing: set[str], left: set[str], version: int
) -> ValueError:
    where = jax.tree_util.keystr(path) or "the top"
    return ValueError(
        f"The state of layout {version} does not belong to this transformation and these params: "
        f"at {where} {sorted(missing)} are missing and {sorted(left)} are left over. Build the "
        "transformation with the arguments that the run had."
    )
