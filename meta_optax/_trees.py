"""Trees side by side: what `adopt` and `migrate` share."""

from typing import Any

import jax
import jax.numpy as jnp


class Fresh:
    """Stands for a leaf that is taken from a fresh ``init``."""


FRESH = Fresh()


def all_fresh(tree: Any) -> Any:
    """A tree of which all leaves are to be fresh."""
    return jax.tree.map(lambda _: FRESH, tree)


def children(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """The children of a node by their keys, and what the node is without them.

    A leaf has itself for a child, with None for a key.
    """
    found, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(path[0] if path else None, child) for path, child in found], treedef


def describe(node: Any) -> str:
    """What stands at a place of a tree, for an error."""
    if hasattr(node, "dtype"):
        return f"{node.dtype}{list(jnp.shape(node))}"
    own, _ = children(node)
    if own and own[0][0] is None:
        return repr(node)
    return f"{type(node).__name__}({', '.join(key_name(key) for key, _ in own)})"


def key_name(key: Any) -> str:
    """A key as a checkpoint without types has it: the field, the index or the key as a string."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def mismatch(path: tuple[Any, ...], new: Any, old: Any) -> ValueError:
    """The error for two sides that do not fit together."""
    where = jax.tree_util.keystr(path) or "the top"
    return ValueError(
        f"The state given does not fit this transformation and these params. At {where} the "
        f"transformation's has {describe(new)}, the one given {describe(old)}."
    )
