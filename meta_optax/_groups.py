"""Groups of parameters: from labels to the optimizers and rates that serve them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meta_optax._core import CONTROLLED_GROUPS
from meta_optax.moe._layers import LeafLayers, find_layers
from meta_optax.moe._paths import Path, leaves_with_paths

PyTree = Any
Labels = PyTree | Callable[[PyTree], PyTree]

# Which group serves a label; a balance bias follows a rule of its own and no optimizer.
UNCONTROLLED = "balance_bias"
GROUP_OF_LABEL = {
    "gate": "gate",
    "gate_bias": "gate",
    "expert": "expert",
    "shared_expert": "dense",
    "dense": "dense",
    "balance_bias": UNCONTROLLED,
}


def group_fn(labels: Labels) -> Callable[[PyTree], PyTree]:
    """A function from a tree of params or updates to the same tree (or a prefix) of groups.

    Args:
      labels: a tree of labels, the params' structure or a prefix of it, or a function that makes
        one of the params. A tree that can itself be called (a model's, say) counts as a tree.

    Raises:
      ValueError: from the returned function, if a label is unknown.
    """
    leaves = jax.tree.leaves(labels)
    is_tree = bool(leaves) and all(isinstance(leaf, str) for leaf in leaves)

    def groups(tree: PyTree) -> PyTree:
        labelled = labels if is_tree or not callable(labels) else labels(tree)
        return jax.tree_util.tree_map_with_path(_group, labelled)

    return groups


def check_groups(caller: str, groups: PyTree, params: PyTree, wanted: tuple[str, ...]) -> None:
    """Raises unless the groups fit the params and each wanted group has some.

    Raises:
      ValueError: naming the labels without parameters and those that were seen.
    """
    present = set(_spread(caller, groups, params))
    missing = [group for group in wanted if group not in present]
    if missing:
        raise ValueError(
            f"{caller} was given no parameters labelled {' or '.join(map(repr, missing))}; the "
            f"labels lead to the groups {sorted(present)}. Check what `labels` gives for your "
            "params, or use a strategy and a factory without that group."
        )


GroupLayers = Mapping[Path, tuple[str, LeafLayers]]


def layers_of_groups(
    caller: str, groups: PyTree, tree: PyTree, *, num_layers: int, layer_axis: int | None
) -> GroupLayers:
    """The layers of each leaf of gates and experts, by path; see `find_layers`.

    Raises:
      ValueError: if there are not as many layers, or if a leaf is of none of them.
    """
    leaves = [(path, leaf) for path, leaf in leaves_with_paths(tree)[0] if hasattr(leaf, "shape")]
    named = zip(leaves, _spread(caller, groups, tree), strict=True)
    own = {path: (group, leaf.shape) for (path, leaf), group in named if group in CONTROLLED_GROUPS}
    shapes = {path: shape for path, (_, shape) in own.items()}
    gates = {path: shape for path, (group, shape) in own.items() if group == "gate"}
    if not gates:
        return {}
    found = find_layers(
        caller, shapes, gates, num_layers=num_layers, layer_axis=layer_axis, plain_ndim=2
    )
    return {path: (own[path][0], layers) for path, layers in found.items()}


def scale_layers(
    updates: PyTree, layers: GroupLayers, factors: Mapping[str, Float[Array, " layers"]]
) -> PyTree:
    """The updates of each group that has factors, times those of their layers."""
    flat, treedef = leaves_with_paths(updates)

    def scale(path: Path, leaf: Any) -> Any:
        if path not in layers or layers[path][0] not in factors:
            return leaf
        group, own = layers[path]
        return scale_leaf(leaf, own.spread(factors[group], leaf.ndim))

    return jax.tree.unflatten(treedef, [scale(path, leaf) for path, leaf in flat])


def scale_leaf(leaf: Array, factor: Float[Array, "..."]) -> Array:
    """The product, taken in float32 at least, in the leaf's dtype."""
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    return (leaf.astype(dtype) * factor.astype(dtype)).astype(leaf.dtype)


def _spread(caller: str, groups: PyTree, tree: PyTree) -> list[str]:
    """The group of each leaf, where groups may be given for whole parts of the tree."""
    try:
        spread = jax.tree.map(lambda g, part: jax.tree.map(lambda _: g, part), groups, tree)
    except ValueError as error:
        raise ValueError(
            f"{caller} was given labels that do not fit the params: {error}"
        ) from error
    return jax.tree.leaves(spread)


def _group(path: tuple[Any, ...], label: Any) -> str:
    if label not in GROUP_OF_LABEL:
        raise ValueError(
            f"The label {label!r} at {jax.tree_util.keystr(path)!r} is unknown: no optimizer "
            f"serves it. Labels are {sorted(GROUP_OF_LABEL)}."
        )
    return GROUP_OF_LABEL[label]
