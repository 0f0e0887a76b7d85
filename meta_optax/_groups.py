"""Groups of parameters: from labels to the optimizers and rates that serve them."""

from collections.abc import Callable
from typing import Any

import jax

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
    try:
        spread = jax.tree.map(lambda g, part: jax.tree.map(lambda _: g, part), groups, params)
    except ValueError as error:
        raise ValueError(
            f"{caller} was given labels that do not fit the params: {error}"
        ) from error
    present = set(jax.tree.leaves(spread))
    missing = [group for group in wanted if group not in present]
    if missing:
        raise ValueError(
            f"{caller} was given no parameters labelled {' or '.join(map(repr, missing))}; the "
            f"labels lead to the groups {sorted(present)}. Check what `labels` gives for your "
            "params, or use a strategy and a factory without that group."
        )


def _group(path: tuple[Any, ...], label: Any) -> str:
    if label not in GROUP_OF_LABEL:
        raise ValueError(
            f"The label {label!r} at {jax.tree_util.keystr(path)!r} is unknown: no optimizer "
            f"serves it. Labels are {sorted(GROUP_OF_LABEL)}."
        )
    return GROUP_OF_LABEL[label]
