"""Router metrics from whatever a model exposes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from meta_optax import _checks
from meta_optax.moe._layers import number_layers
from meta_optax.moe._paths import Path, leaves_with_paths
from meta_optax.moe._router_metrics import (
    AxisName,
    Layers,
    load_metrics,
    router_metrics,
    stack_layers,
    summarise,
)


def router_metrics_from_logits(
    router_logits: Layers,
    expert_index: Layers | None = None,
    num_selected: int | None = None,
    mask: Layers | None = None,
    axis_name: AxisName | None = None,
    *,
    dropped: Layers | None = None,
) -> dict[str, Array]:
    """`router_metrics` of the softmax of the logits, taken in float32.

    For routers whose scores are not a softmax over all experts (a sigmoid of each, a softmax of the
    selected ones alone) this is what the scores would be as probabilities.

    Args:
      router_logits: as ``router_probs`` of `router_metrics`, before the softmax.
      expert_index: as of `router_metrics`, and so are the others.
      num_selected: k.
      mask: which tokens count.
      axis_name: the mapped axis over which tokens are spread.
      dropped: which slots an overfull expert turned away.

    Returns:
      What `router_metrics` returns.

    Raises:
      ValueError: as `router_metrics`.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> metrics = mo.router_metrics_from_logits(jnp.zeros([4, 8]))
      >>> print(f"{metrics['gate_entropy_normalized']:.3f}")
      1.000
    """
    logits, layered = stack_layers("router_logits", router_logits, ndim=2)
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    given = probs if layered else probs[0]
    return router_metrics(
        given, expert_index, num_selected, mask, axis_name=axis_name, dropped=dropped
    )


def router_metrics_from_counts(
    expert_counts: Layers | Mapping[str, ArrayLike],
    num_dropped: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, Array]:
    """The part of `router_metrics` that the load alone tells.

    Nothing is said of the tokens' entropy and sparsity: a strategy that needs those says so.

    Args:
      expert_counts: slots (or tokens, or shares) by expert: [E], or of layers [L, E], a sequence
        of [E], or a mapping of names to either, whose layers are taken in natural order.
      num_dropped: how many of the counted slots were turned away: a scalar, or [L] with layers.
      axis_name: the mapped axis, or axes, over which tokens are spread.

    Returns:
      ``expert_usage``, ``load_entropy_normalized``, ``max_violation``, ``load_cv`` and
      ``dead_experts``, with ``num_dropped`` also ``drop_fraction``; with layers, each also by
      layer. Without any count, all of it is NaN, which every strategy holds on.

    Raises:
      ValueError: for shapes that do not fit, or a count that is negative, as far as it is known.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> print(mo.router_metrics_from_counts(jnp.array([6, 2, 0, 0]))["max_violation"])
      2.0
    """
    if isinstance(expert_counts, Mapping):
        expert_counts = _layers_of(expert_counts, ndim=1)
    counts, layered = stack_layers("expert_counts", expert_counts, ndim=1)
    if _checks.is_known(counts) and (np.asarray(counts) < 0).any():
        raise ValueError(f"router_metrics_from_counts needs counts >= 0, got {counts}.")
    counts = counts.astype(jnp.float32)
    lost = jnp.zeros([], jnp.float32)
    if num_dropped is not None:
        lost, _ = stack_layers("num_dropped", num_dropped, ndim=0)
        if lost.shape not in ((1,), counts.shape[:1]):
            raise ValueError(
                f"router_metrics_from_counts needs num_dropped as a scalar or one a layer, "
                f"{counts.shape[0]} of them, got shape {lost.shape}."
            )
        # A single number is that of all layers together, so each has its part of it.
        lost = jnp.broadcast_to(lost / (counts.shape[0] // lost.shape[0]), counts.shape[:1])
    if axis_name is not None:
        counts, lost = jax.lax.psum((counts, lost), axis_name)
    by_layer = load_metrics(counts)
    if num_dropped is not None:
        by_layer["drop_fraction"] = lost.astype(jnp.float32) / counts.sum(axis=-1)
    return summarise(by_layer, layered=layered)


def router_metrics_from_collection(
    collection: Any,
    *,
    probs: str | None = None,
    logits: str | None = None,
    counts: str | None = None,
    index: str | None = None,
    num_selected: int | None = None,
    mask: Layers | None = None,
    axis_name: AxisName | None = None,
    stacked: bool = False,
) -> dict[str, Array]:
    """`router_metrics` of what the layers of a model recorded under one name each.

    Takes the collection that Flax Linen's ``sow`` fills (``mutable=["intermediates"]``), the state
    of `nnx.Intermediate` variables, or any nested dict: every array whose path holds the name is a
    layer's, in the natural order of the paths (``layers_2`` before ``layers_10``). Stacks whose
    paths differ in numbers alone alternate, as `moe_partition` numbers layers too.

    Args:
      collection: the tree of recorded arrays.
      probs: the name of the probabilities, [..., E] a layer; or
      logits: the name of the logits, [..., E] a layer; or
      counts: the name of the counts, [E] a layer. One of the three.
      index: the name of the selected experts, [..., k] a layer.
      num_selected: k, where there is no index.
      mask: which tokens count, [T] or [L, T].
      axis_name: the mapped axis, or axes, over which tokens are spread.
      stacked: whether the arrays' first axis is that of layers, as ``scan`` leaves it.

    Returns:
      What `router_metrics`, or with counts `router_metrics_from_counts`, returns of layers.

    Raises:
      ValueError: if not one of the three names is given, if nothing is recorded under a name (with
        the paths that there are), or if the layers' shapes differ.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> probs = jnp.full([2, 3, 4], 0.25)  # batch, sequence, experts
      >>> sown = {"layer_0": {"router_probs": (probs,)}, "layer_1": {"router_probs": (probs,)}}
      >>> metrics = mo.router_metrics_from_collection(sown, probs="router_probs")
      >>> print(metrics["gate_entropy_normalized_per_layer"])
      [1. 1.]
    """
    named = {
        name: value
        for name, value in (("probs", probs), ("logits", logits), ("counts", counts))
        if value is not None
    }
    if len(named) != 1:
        raise ValueError(
            f"router_metrics_from_collection needs one of probs=, logits= and counts=, got {named}."
        )
    ((kind, name),) = named.items()
    values = _recorded(collection, name, ndim=1 if kind == "counts" else 2, stacked=stacked)
    if kind == "counts":
        return router_metrics_from_counts(values, axis_name=axis_name)
    chosen = None if index is None else _recorded(collection, index, ndim=2, stacked=stacked)
    measure = router_metrics if kind == "probs" else router_metrics_from_logits
    return measure(values, chosen, num_selected, mask, axis_name)


def _recorded(collection: Any, name: str, *, ndim: int, stacked: bool) -> Array:
    """What is recorded under a name, [L, ...] with ``ndim`` more dimensions."""
    flat, _ = leaves_with_paths(collection)
    found = {path: leaf for path, leaf in flat if name in path}
    if not found:
        seen = ["/".join(path) for path, _ in flat]
        raise ValueError(f"Nothing is recorded under {name!r}; there is {seen or 'nothing'}.")

    def layers(leaf: Any) -> Array:
        array = jnp.asarray(leaf)
        lead = array.shape[:1] if stacked else (1,)
        tail = array.shape[len(array.shape) - 1 :]
        # Batch and sequence become one axis of tokens.
        return array.reshape(*lead, *([-1] if ndim == 2 else []), *tail)

    return _joined({path: layers(leaf) for path, leaf in found.items()}, name)


def _layers_of(mapping: Mapping[str, Any], *, ndim: int) -> Array:
    """The layers of a mapping, [L, ...], each value being of one or of several."""
    flat, _ = leaves_with_paths(dict(mapping))
    arrays = {path: jnp.asarray(leaf) for path, leaf in flat}
    layered = {path: a if a.ndim == ndim + 1 else a[None] for path, a in arrays.items()}
    return _joined(layered, "expert_counts")


def _joined(parts: dict[Path, Array], name: str) -> Array:
    """All layers, in the order in which control by layer numbers them."""
    shapes = [part.shape for part in parts.values()]
    if len({shape[1:] for shape in shapes}) != 1:
        raise ValueError(f"The layers of {name!r} differ in shape, {shapes}: measure them apart.")
    numbers = number_layers({path: part.shape[0] for path, part in parts.items()})
    order = np.argsort(np.concatenate([numbers[path] for path in parts]))
    return jnp.concatenate(list(parts.values()))[order]
