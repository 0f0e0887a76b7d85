"""The health of routers, from their probabilities and choices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from meta_optax import _checks

AxisName = str | tuple[str, ...]
Layers = ArrayLike | Sequence[ArrayLike]

# A token counts as decided when one expert has more than this much of its probability.
_DECIDED = 0.5
# How far probabilities may be from summing to 1: a few roundings of each of the experts' shares.
_SUM_TOLERANCE = {"bfloat16": 3e-2, "float16": 5e-3}
_DEFAULT_TOLERANCE = 1e-3


class _Tally(NamedTuple):
    """What is counted and summed over the tokens of each layer, before any division."""

    tokens: Float[Array, " layers"]
    entropy: Float[Array, " layers"]
    decided: Float[Array, " layers"]
    selected: Float[Array, " layers experts"]
    dropped: Float[Array, " layers"]
    invalid: Float[Array, " layers"]


def router_metrics(
    router_probs: Layers,
    expert_index: Layers | None = None,
    num_selected: int | None = None,
    mask: Layers | None = None,
    axis_name: AxisName | None = None,
    *,
    dropped: Layers | None = None,
) -> dict[str, Array]:
    r"""Measures what routers do, ready for ``tx.update(..., **router_metrics(...))``.

    With :math:`p_{t}` a token's probabilities, T the tokens that the mask leaves, k the experts
    selected for each, and :math:`f_e` expert e's share of the T k selected slots,

    .. math::
      \text{gate_entropy} &= \tfrac1T \sum_t H(p_t), \quad
        H(p) = -\sum_e p_e \log p_e \text{ in nats} \\
      \text{gate_entropy_normalized} &= \text{gate_entropy} / \log E \\
      \text{gate_sparsity} &= \tfrac1T \, \#\{t : \max_e p_{te} > 0.5\} \\
      \text{expert_usage}_e &= f_e, \quad
      \text{load_entropy_normalized} = H(f) / \log E \\
      \text{max_violation} &= (\max_e f_e - \bar f) / \bar f, \quad
      \text{load_cv} = \operatorname{std}(f) / \bar f \\
      \text{dead_experts} &= \tfrac1E \, \#\{e : f_e = 0\}, \quad
      \text{drop_fraction} = \text{dropped slots} / (T k)

    A high token entropy (``gate_entropy_normalized``) with an even load is an undecided router; a
    low one with an even load is healthy specialisation; a low *load* entropy is collapse.

    With layers, each quantity is the mean over the layers, and the layers' own values are given as
    well, under its name and ``_per_layer``: [L], and [L, E] for the usage.

    Tokens may be sharded: under ``jit`` the metrics are those of all of them. Under ``shard_map``,
    where each device sees its own, name the axis. Nothing is differentiated through.

    Args:
      router_probs: probabilities over all experts, [T, E], or of layers [L, T, E] or a sequence of
        [T, E]. Rows sum to 1, whatever becomes of the selected ones later.
      expert_index: the experts selected, integers [T, k] (or [L, T, k], or a sequence). If it is
        not given, the most probable ones are taken, which for more than one costs a second pass.
      num_selected: k; only needed without ``expert_index``, and 1 if neither is given.
      mask: which tokens count (the others are padding), [T] or [L, T], bool or 0 and 1.
      axis_name: the mapped axis, or axes, over which tokens are spread.
      dropped: which slots an overfull expert turned away, bool, of the shape of ``expert_index``.
        They count as selected. Without it, ``drop_fraction`` is 0: nothing is known to be dropped.

    Returns:
      A dict of float32 scalars, with ``expert_usage`` [E]. If the mask leaves no token, or a
      probability is not finite, all of it is NaN; if an index is outside [0, E) while traced, what
      depends on the indices is. Every strategy holds its state on such values, and counts it.

    Raises:
      ValueError: for shapes that do not fit one another; where values are known, not traced, for
        probabilities that do not sum to 1 or an index outside [0, E). Under ``jit`` sums are not
        looked at, and the entropy of what is no distribution is a number without a meaning.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> metrics = mo.router_metrics(jnp.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]]))
      >>> print(metrics["gate_sparsity"], metrics["expert_usage"], metrics["max_violation"])
      1.0 [0.5 0.5] 0.0

    References:
      MaxVio: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
      arXiv 2408.15664.
    """
    probs, layered = stack_layers("router_probs", router_probs, ndim=2)
    layers, tokens, experts = probs.shape
    index = _index(expert_index, num_selected, (layers, tokens, experts), layered=layered)
    kept = _mask(mask, (layers, tokens))
    lost = None
    if dropped is not None:
        if index is None:
            raise ValueError("router_metrics needs expert_index to know what was dropped of it.")
        lost = _fit("dropped", dropped, index.shape, layered=layered)
    _check_values(probs, index, kept)
    tally = _count(probs, index, num_selected or 1, kept, lost)
    if axis_name is not None:
        tally = jax.lax.psum(tally, axis_name)
    slots = tally.tokens * (num_selected or 1 if index is None else index.shape[-1])
    # Probabilities that are not finite still have a highest one, and so a load: it means nothing.
    bad_probs = ~jnp.isfinite(tally.entropy)
    bad_load = bad_probs | (tally.invalid > 0)
    entropy, decided = _poison(bad_probs, tally.entropy, tally.decided)
    selected, dropped_slots = _poison(bad_load, tally.selected, tally.dropped)
    by_layer = {
        **token_metrics(entropy / tally.tokens, decided / tally.tokens, experts),
        **load_metrics(selected),
        "drop_fraction": dropped_slots / slots,
    }
    return summarise(by_layer, layered=layered)


def token_metrics(
    entropy: Float[Array, " layers"], decided: Float[Array, " layers"], experts: int
) -> dict[str, Array]:
    """What concerns each token by itself: how decided the router is."""
    # One expert leaves nothing to decide: an entropy of 0, whatever it is divided by.
    return {
        "gate_entropy": entropy,
        "gate_entropy_normalized": entropy / np.log(max(experts, 2)).astype(np.float32),
        "gate_sparsity": decided,
    }


def load_metrics(selected: Float[Array, "layers experts"]) -> dict[str, Array]:
    """What concerns the load: how evenly the slots are spread over the experts."""
    experts = selected.shape[-1]
    usage = selected / selected.sum(axis=-1, keepdims=True)
    entropy = entropy_of(usage)
    # A comparison with NaN is false, and would count as alive.
    dead = jnp.where(jnp.isnan(usage), usage, (usage <= 0).astype(jnp.float32))
    return {
        "expert_usage": usage,
        # A single expert has all the load, and that is even.
        "load_entropy_normalized": entropy / np.log(experts).astype(np.float32)
        if experts > 1
        else 1.0 + entropy,
        "max_violation": usage.max(axis=-1) * experts - 1.0,
        "load_cv": usage.std(axis=-1) * experts,
        "dead_experts": dead.mean(axis=-1),
    }


def entropy_of(shares: Float[Array, "*batch experts"]) -> Float[Array, " *batch"]:
    """The entropy of the last axis in nats."""
    return jax.scipy.special.entr(shares).sum(axis=-1)


def summarise(by_layer: Mapping[str, Array], *, layered: bool) -> dict[str, Array]:
    """The mean over the layers of each quantity, and with layers their own values too."""
    means = {name: values.mean(axis=0) for name, values in by_layer.items()}
    own = {f"{name}_per_layer": values for name, values in by_layer.items()} if layered else {}
    return {**means, **own}


def stack_layers(name: str, given: Any, *, ndim: int) -> tuple[Array, bool]:
    """One array with a leading axis of layers, and whether it had one (or was a sequence).

    Raises:
      ValueError: if it is neither of ``ndim`` dimensions nor of one more, or if layers differ.
    """
    is_rows = isinstance(given, list | tuple) and bool(given) and np.ndim(given[0]) == ndim - 1
    if isinstance(given, list | tuple) and not is_rows:
        parts = [jnp.asarray(part) for part in given]
        shapes = {part.shape for part in parts}
        if len(shapes) != 1 or parts[0].ndim != ndim:
            raise ValueError(
                f"router_metrics needs {name} of layers with {ndim} dimensions and of one shape, "
                f"got shapes {sorted(shapes)}. Measure layers that differ one by one."
            )
        return jax.lax.stop_gradient(jnp.stack(parts)), True
    array = jax.lax.stop_gradient(jnp.asarray(given))
    if array.ndim not in (ndim, ndim + 1):
        raise ValueError(
            f"router_metrics needs {name} with {ndim} dimensions, or {ndim + 1} with the layers "
            f"first, got shape {array.shape}. Batch and sequence are one axis: reshape them."
        )
    layered = array.ndim == ndim + 1
    return (array if layered else array[None]), layered


def _index(
    given: Any, num_selected: int | None, shape: tuple[int, int, int], *, layered: bool
) -> Int[Array, "layers tokens selected"] | None:
    """The indices, [L, T, k]; None where the most probable expert is all that is needed."""
    layers, tokens, experts = shape
    if num_selected is not None and not 1 <= num_selected <= experts:
        raise ValueError(f"num_selected must be in [1, {experts}], got {num_selected}.")
    if given is None:
        return None
    index, index_layered = stack_layers("expert_index", given, ndim=2)
    if index.shape[:2] != (layers, tokens) or index_layered != layered:
        raise ValueError(
            f"router_metrics needs expert_index of shape [T, k] (or [L, T, k]) with T = {tokens} "
            f"as in router_probs, got {jnp.shape(given)}."
        )
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"router_metrics needs integers as expert_index, got {index.dtype}.")
    if num_selected not in (None, index.shape[-1]):
        raise ValueError(
            f"num_selected is {num_selected}, but expert_index has {index.shape[-1]} a token."
        )
    return index


def _mask(given: Any, shape: tuple[int, int]) -> Bool[Array, "layers tokens"] | None:
    if given is None:
        return None
    mask, _ = stack_layers("mask", given, ndim=1)
    if mask.shape not in (shape, (1, shape[1])):
        raise ValueError(
            f"router_metrics needs a mask of shape [{shape[1]}] or {list(shape)}, got {mask.shape}."
        )
    return jnp.broadcast_to(mask.astype(bool), shape)


def _fit(name: str, given: Any, shape: tuple[int, ...], *, layered: bool) -> Bool[Array, "l t k"]:
    array, has_layers = stack_layers(name, given, ndim=2)
    if array.shape != shape or has_layers != layered:
        raise ValueError(
            f"router_metrics needs {name} of the shape of expert_index, got {jnp.shape(given)}."
        )
    return array.astype(bool)


def _check_values(probs: Array, index: Array | None, mask: Array | None) -> None:
    """Raises for values that cannot be, as far as they are known; padding may hold anything."""
    if not _checks.is_known(probs, index, mask):
        return
    kept = np.ones(probs.shape[:2], bool) if mask is None else np.asarray(mask)
    sums = np.asarray(probs.astype(jnp.float32).sum(axis=-1))
    tolerance = _SUM_TOLERANCE.get(probs.dtype.name, _DEFAULT_TOLERANCE)
    # What is not finite is no mistake of the caller's: the strategies hold on it.
    wrong = kept & np.isfinite(sums) & (np.abs(sums - 1.0) > tolerance)
    wrong |= kept & np.asarray((probs < 0).any(axis=-1))
    if wrong.any():
        layer, token = np.argwhere(wrong)[0]
        raise ValueError(
            f"router_metrics needs probabilities >= 0 that sum to 1 over the experts; those of "
            f"layer {layer}, token {token} sum to {sums[layer, token]:g}. Of logits, take "
            "router_metrics_from_logits."
        )
    if index is not None:
        outside = np.asarray((index < 0) | (index >= probs.shape[-1])) & kept[..., None]
        if outside.any():
            place = tuple(np.argwhere(outside)[0])
            raise ValueError(
                f"router_metrics needs expert_index in [0, {probs.shape[-1]}), got "
                f"{int(index[place])}. What was dropped is told by dropped=..."
            )


def _count(
    probs: Array, index: Array | None, num_selected: int, mask: Array | None, lost: Array | None
) -> _Tally:
    """Sums over the tokens, with one pass over the probabilities."""
    layers, tokens, experts = probs.shape
    entropy, top, best = _reduce_experts(probs.astype(jnp.float32))
    if index is None:
        index = best[..., None]
        if num_selected > 1:
            index = jax.lax.top_k(probs, num_selected)[1]
    kept = jnp.ones([layers, tokens], bool) if mask is None else mask

    def over_tokens(values: Array) -> Float[Array, " layers"]:
        return jnp.where(kept, values, 0.0).sum(axis=1)

    inside = (index >= 0) & (index < experts)
    # What is padding or out of range is counted at a place of its own, that is then cut off.
    place = jnp.where(inside & kept[..., None], index, experts).astype(jnp.int32)
    counts = _count_places(place, experts + 1)
    return _Tally(
        tokens=over_tokens(jnp.ones([layers, tokens], jnp.float32)),
        entropy=over_tokens(entropy),
        decided=over_tokens((top > _DECIDED).astype(jnp.float32)),
        selected=counts[:, :experts].astype(jnp.float32),
        dropped=jnp.zeros([layers], jnp.float32)
        if lost is None
        else over_tokens(lost.sum(axis=-1, dtype=jnp.float32)),
        invalid=over_tokens((~inside).sum(axis=-1, dtype=jnp.float32)),
    )


def _count_places(place: Int[Array, "layers tokens k"], places: int) -> Int[Array, "layers p"]:
    """How often each place occurs in each layer, on every device."""
    layer = jnp.arange(place.shape[0])[:, None, None]
    # On a mesh with explicit axes, JAX wants to be told how a scatter's result is spread.
    is_explicit = jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    replicated = jax.P(None, None) if is_explicit else None
    none = jnp.zeros([place.shape[0], places], jnp.int32)
    return none.at[layer, place].add(1, out_sharding=replicated)


def _reduce_experts(
    probs: Float[Array, "layers tokens experts"],
) -> tuple[Array, Array, Int[Array, "layers tokens"]]:
    """Entropy, highest probability and its expert, of each token.

    One reduction of three operands: as three, XLA would read the probabilities once for each, and
    write the entropies' terms out in between.
    """
    experts = jax.lax.broadcasted_iota(jnp.int32, probs.shape, 2)

    def combine(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
        (entropy, top, best), (other_entropy, other_top, other) = left, right
        # NaN is the highest, so that it is not lost.
        takes = (other_top > top) | (other_top != other_top) & (top == top)
        ties = (other_top == top) & (other < best)
        return (
            entropy + other_entropy,
            jnp.where(takes, other_top, top),
            jnp.where(takes | ties, other, best),
        )

    zero, lowest = jnp.zeros([], jnp.float32), jnp.full([], -jnp.inf, jnp.float32)
    none = jnp.full([], probs.shape[-1], jnp.int32)
    operands = (jax.scipy.special.entr(probs), probs, experts)
    return jax.lax.reduce(operands, (zero, lowest, none), combine, (2,))


def _poison(bad: Bool[Array, " layers"], *values: Array) -> list[Array]:
    """The values with NaN for the layers that are bad."""
    return [
        jnp.where(jnp.expand_dims(bad, range(1, value.ndim)), jnp.nan, value) for value in values
    ]
