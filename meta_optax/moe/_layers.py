"""Which layer a leaf is of: one of many subtrees, or a slice along a stacked axis."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from meta_optax.moe._paths import Path, natural
from meta_optax.moe._rules import is_router


class LeafLayers(NamedTuple):
    """The layers that a leaf holds.

    Attributes:
      layers: the layer's number, or those of the slices along ``axis``.
      axis: the stacked axis; None for a leaf of one layer.
    """

    layers: np.ndarray
    axis: int | None

    def spread(self, values: Float[Array, " layers"], ndim: int) -> Float[Array, "..."]:
        """The layers' values, shaped to be multiplied with the leaf."""
        if self.axis is None:
            return values[int(self.layers)]
        axes = [i for i in range(ndim) if i != self.axis % ndim]
        return jnp.expand_dims(values[self.layers], axes)


def find_layers(
    caller: str,
    shapes: Mapping[Path, tuple[int, ...]],
    anchors: Mapping[Path, tuple[int, ...]],
    *,
    num_layers: int,
    layer_axis: int | None,
    plain_ndim: int,
) -> dict[Path, LeafLayers]:
    """Finds the layers of leaves from their paths, and from the shapes of one leaf a layer.

    Anchors whose paths part at some depth are of different layers. An anchor with more dimensions
    than it has in one layer is stacked, along the axis that is given, that its code base is known
    for, or that alone makes up the number of layers. Where parts of a path differ in numbers alone
    (``layers_0`` and ``layers_1``) and are stacked, they alternate, as in a scan over blocks of
    unlike layers; other parts follow one another. The order is the natural one of the paths.

    Args:
      caller: who asks, for the errors.
      shapes: the leaves, by path.
      anchors: the leaves that tell the layers, by path: routers, or biases.
      num_layers: how many layers there are.
      layer_axis: the stacked axis, where it is given.
      plain_ndim: how many dimensions an anchor of one layer has.

    Returns:
      The layers of each leaf.

    Raises:
      ValueError: if the layers found are not as many, or if a leaf is of none of them.
    """
    for depth in range(max(map(len, anchors)) + 1):
        clusters: dict[Path, list[Path]] = {}
        for path in anchors:
            clusters.setdefault(path[:depth], []).append(path)
        if any(map(_mixes_layers, clusters.values())):
            continue
        axes = [
            axis
            for axis in _axes(anchors, layer_axis)
            if sum(_sizes(clusters, anchors, axis, plain_ndim).values()) == num_layers
        ]
        # Without a stack, all axes say the same.
        sizes = [_sizes(clusters, anchors, axis, plain_ndim) for axis in axes]
        if len(axes) > 1 and any(size > 1 for size in sizes[0].values()):
            raise ValueError(
                f"{caller} cannot tell which axis is that of the {num_layers} layers: {axes} all "
                f"fit {_show(anchors)}. Pass layer_axis=."
            )
        if axes:
            return _assign(caller, shapes, sizes[0], axes[0], depth)
    raise ValueError(
        f"{caller} looks for num_layers={num_layers} layers, which is not what there is: "
        f"{_show(anchors)}. Correct it, or, if layers are stacked along an axis, pass layer_axis= "
        "(negative ones count from the end)."
    )


def stacked_axis(path: Path) -> int | None:
    """The axis along which a code base is known to stack the layers that it scans."""
    parts = [part.lower() for part in path]
    if any(part in ("stacked", "repeat") for part in parts):
        return 0  # Levanter, Marin, axlearn
    if any(map(_STACKS_AT_1.fullmatch, parts)):
        return 1
    return None


# MaxText (`param_scan_axis`) and Flaxformer.
_STACKS_AT_1 = re.compile(r"\w*moe_?block(_\d+)?|routed_experts|gptossmlp|router_weights")


def _mixes_layers(paths: list[Path]) -> bool:
    """Whether anchors differ in a number that stands before the router: in that of their layer."""
    seen: dict[Path, Path] = {}
    for path in paths:
        other = seen.setdefault(tuple(re.sub(r"\d+", "#", part) for part in path), path)
        depth = next((i for i, (a, b) in enumerate(zip(path, other, strict=True)) if a != b), None)
        if depth is not None and not any(map(is_router, path[:depth])):
            return True
    return False


def _axes(anchors: Mapping[Path, tuple[int, ...]], given: int | None) -> list[int]:
    """The axes that may be the stacked one."""
    if given is not None:
        return [given]
    known = {stacked_axis(path) for path in anchors} - {None}
    if len(known) == 1:
        return [axis for axis in known if axis is not None]
    return list(range(max(map(len, anchors.values()))))


def _sizes(
    clusters: Mapping[Path, list[Path]],
    anchors: Mapping[Path, tuple[int, ...]],
    axis: int,
    plain_ndim: int,
) -> dict[Path, int]:
    """How many layers each cluster would hold if that were the stacked axis."""

    def size(paths: list[Path]) -> int:
        shape = max((anchors[path] for path in paths), key=len)
        if len(shape) <= plain_ndim:
            return 1
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    return {prefix: size(paths) for prefix, paths in clusters.items()}


def _assign(
    caller: str,
    shapes: Mapping[Path, tuple[int, ...]],
    sizes: Mapping[Path, int],
    axis: int,
    depth: int,
) -> dict[Path, LeafLayers]:
    numbers = number_layers(sizes)
    found = {}
    for path, shape in shapes.items():
        layers = numbers.get(path[:depth])
        if layers is None:
            raise ValueError(
                f"{caller} cannot tell which layer {'/'.join(path)!r} is of: the layers found are "
                f"{['/'.join(prefix) for prefix in sorted(numbers, key=natural)]}."
            )
        if len(layers) == 1:
            found[path] = LeafLayers(np.asarray(layers[0]), None)
            continue
        if not -len(shape) <= axis < len(shape) or shape[axis] != len(layers):
            raise ValueError(
                f"{caller} expects {len(layers)} layers stacked along axis {axis} of "
                f"{'/'.join(path)!r}, got shape {shape}. Pass the right layer_axis=, which counts "
                "from the end if it is negative."
            )
        found[path] = LeafLayers(np.asarray(layers), axis)
    return found


def number_layers(sizes: Mapping[Path, int]) -> dict[Path, list[int]]:
    """Numbers layers by the path and the size of each stack of them.

    Stacks of one size whose paths differ in numbers alone alternate, others follow one another, in
    the natural order of the paths.
    """
    alike: dict[tuple[Path, int], list[Path]] = {}
    for prefix in sorted(sizes, key=natural):
        template = tuple(re.sub(r"\d+", "#", part) for part in prefix)
        alike.setdefault((template, sizes[prefix]), []).append(prefix)
    numbers, start = {}, 0
    for (_, size), prefixes in alike.items():
        for i, prefix in enumerate(prefixes):
            numbers[prefix] = [start + i + j * len(prefixes) for j in range(size)]
        start += size * len(prefixes)
    return numbers


def _show(anchors: Mapping[Path, tuple[int, ...]]) -> str:
    shown = [f"{'/'.join(path)} {list(shape)}" for path, shape in anchors.items()]
    return f"{shown[:12]}{' and more' if len(shown) > 12 else ''}"
