"""Paths of leaves, the same whatever framework made the tree."""

import re
from typing import Any

import jax
import optax

PyTree = Any
Path = tuple[str, ...]

_SEPARATORS = re.compile(r"[/.]")
_DIGITS = re.compile(r"(\d+)")


def leaves_with_paths(tree: PyTree) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves with their normalised paths, and the tree's structure.

    Optax's placeholders for leaves that belong to somebody else count as leaves.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
    return [(normalise(path), leaf) for path, leaf in flat], treedef


def normalise(path: tuple[Any, ...]) -> Path:
    """The path's parts as strings.

    Names that hold whole paths (``"model.layers.0.mlp"``, ``"decoder/layers"``) are split. What a
    wrapper adds behind the leaf's own name is dropped: ``.value`` of Flax, there when a state is
    initialised and not when it is updated, and the index under an array of Haliax, that carries
    no name.
    """
    keys = list(path)
    while len(keys) > 1 and _is_of_wrapper(keys[-1]):
        keys.pop()
    parts = [part for key in keys for part in _SEPARATORS.split(_text(key))]
    return tuple(part for part in parts if part)


def natural(path: Path) -> tuple[Any, ...]:
    """A key to sort paths by, with ``layers_2`` before ``layers_10``."""
    return tuple(
        tuple((0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces)
        for pieces in map(_DIGITS.split, path)
    )


def _is_of_wrapper(key: Any) -> bool:
    is_value = isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"
    return is_value or isinstance(key, jax.tree_util.FlattenedIndexKey)


def _text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
