"""The file that a trained policy is kept in.

JSON, of these keys: ``format`` ("meta_optax policy"), ``version`` (1), ``features`` (what the
policy sees, by name and in order), ``weights`` (the arrays of `Policy` as nested lists of decimal
float32), ``made`` (how it was trained: for people), and ``sha256``, the checksum of all the other
keys as JSON with sorted keys, ASCII alone and no white space.
"""

import functools
import hashlib
import importlib.resources
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meta_optax._policy import Policy

FORMAT, VERSION = "meta_optax policy", 1
SHIPPED = "learned_policy.json"


def policy_content(
    policy: Policy, features: Sequence[str], made: Mapping[str, Any]
) -> dict[str, Any]:
    """What the file holds.

    Args:
      policy: the weights.
      features: the names of what it sees.
      made: how it was trained, of what JSON can hold.
    """
    weights = {
        name: np.asarray(values, np.float32).tolist() for name, values in policy._asdict().items()
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "features": list(features),
        # Nine digits give back every float32.
        "weights": jax.tree.map(lambda x: float(f"{x:.9g}"), weights),
        "made": dict(made),
    }
    return content | {"sha256": _checksum(content)}


def load_policy(path: str | os.PathLike[str], features: Sequence[str]) -> Policy:
    """Reads weights for these features.

    Args:
      path: a file of what `policy_content` gives.
      features: the names that it must be for.

    Returns:
      The weights, in float32, on the host, so that no device is bound to them.

    Raises:
      ValueError: naming the file, if it is no such file, is of another version, was changed since
        it was written, or is for other features.
      OSError: if it cannot be read.
    """
    content = _read(path)
    policy = _weights(path, content.get("weights"))
    if content.get("features") != list(features):
        raise ValueError(
            f"{path}: this policy sees {content.get('features')}, where {list(features)} are shown "
            "to it. Train one with: python -m meta_optax.metatrain"
        )
    if policy.hidden_kernel.shape[0] != len(features):
        raise ValueError(f"{path}: {policy.hidden_kernel.shape[0]} rows of weights for "
                         f"{len(features)} features.")  # fmt: skip
    return policy


@functools.cache
def shipped_policy(features: tuple[str, ...]) -> Policy:
    """The weights that come with the package."""
    with importlib.resources.as_file(importlib.resources.files("meta_optax") / SHIPPED) as path:
        return load_policy(path, features)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no file of policy weights: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: no file of policy weights: its format is not {FORMAT!r}.")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: policy weights of version {content.get('version')}, where this meta_optax "
            f"reads version {VERSION}."
        )
    found = content.pop("sha256", None)
    if found != _checksum(content):
        raise ValueError(f"{path}: wrong checksum: the file was changed since it was written.")
    return content


def _weights(path: str | os.PathLike[str], weights: Any) -> Policy:
    """The arrays, of shapes that fit together."""
    try:
        arrays: dict[str, Any] = {k: np.asarray(w, np.float32) for k, w in weights.items()}
        policy = Policy(**arrays)
        inputs, hidden = policy.hidden_kernel.shape
        shapes = [(inputs, hidden), (hidden,), (hidden, 1), (1,)]
        fits = [w.shape for w in policy] == shapes and all(np.isfinite(w).all() for w in policy)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no weights of a policy: {error}") from error
    if not fits:
        raise ValueError(f"{path}: no weights of a policy: shapes {[w.shape for w in policy]}.")
    return policy


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
