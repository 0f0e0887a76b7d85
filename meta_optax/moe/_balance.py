"""Loss-free balancing: the bias on the router's choice, moved against the load."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from meta_optax import _checks
from meta_optax._checks import Scalar
from meta_optax._control import layout_version
from meta_optax._core import read_arrival, read_metric
from meta_optax._devices import FLAG, check_same_everywhere, place_like, reshard_like
from meta_optax.moe._layers import LeafLayers, find_layers
from meta_optax.moe._paths import Path, leaves_with_paths

_RULES = ("sign", "proportional")


class BalanceRouterBiasState(NamedTuple):
    """State of `balance_router_bias`.

    Attributes:
      layout_version: the version of this layout.
      count: the updates made, saturating; held ones too.
      nonfinite_count: how often the load or the rate was not finite, and nothing was done.
        Nothing is done where the load did not arrive either, and nothing counted.
    """

    layout_version: Int[Array, ""]
    count: Int[Array, ""]
    nonfinite_count: Int[Array, ""]


def balance_router_bias(
    update_rate: Scalar | Callable[..., Any] = 1e-3,
    *,
    rule: str = "sign",
    layer_axis: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Moves the balance bias of routers against their load, whatever the gradients are.

    With :math:`f_e` expert e's share of a layer's load and :math:`\bar f = 1 / E`, the update is

    .. math::
      d_e = \begin{cases} \operatorname{sign}(\bar f - f_e) & \text{rule "sign"} \\
        (\bar f - f_e) / \bar f & \text{rule "proportional"} \end{cases}, \qquad
      \Delta b_e = \text{update_rate} \cdot (d_e - \bar d)

    The mean :math:`\bar d` is taken out because only differences choose: the biases keep the mean
    that they have, and do not drift. No moments, no decay. For leaves labelled ``balance_bias``
    alone: `moe_partition` puts it there when its ``balance_update_rate`` is given, where no clip,
    no decay and no norm of other parameters meets them; or name it in an `optax.partition`.

    Metrics: ``expert_usage_per_layer`` (shares [L, E], as `router_metrics` gives them of layers),
    or for a single layer ``expert_usage`` ([E]).

    Args:
      update_rate: the step, >= 0 (1e-3 in the papers; 0 towards the end), or an Optax schedule.
        Traced, as `inject_meta_hyperparams` passes it, and of a schedule, it is clipped to that.
      rule: ``"sign"`` or ``"proportional"``.
      layer_axis: the axis along which layers are stacked in a bias, [L, E] or [E, L]; found from
        the sizes, or from the path where they are equal, if not given.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates are to be added, as Optax's are, in
      the dtype of the incoming ones. A bfloat16 bias cannot hold steps of 1e-3 beyond about 0.25:
      keep it in float32.

    Raises:
      ValueError: for an argument out of range; from ``update``, if biases and load do not fit.
      TypeError: from ``update``, while tracing, if the load was not passed.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> tx = mo.balance_router_bias(1e-3)
      >>> bias = jnp.zeros(4)
      >>> usage = jnp.array([0.7, 0.1, 0.1, 0.1])
      >>> updates, _ = tx.update(jnp.zeros(4), tx.init(bias), expert_usage=usage)
      >>> print(1e3 * updates)
      [-1.5  0.5  0.5  0.5]

    References:
      Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
      arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437.
    """
    if rule not in _RULES:
        raise ValueError(f"rule must be one of {_RULES}, got {rule!r}.")
    if not callable(update_rate):
        update_rate = _checks.real("update_rate", update_rate, open_high=True)

    def init_fn(params: Any) -> BalanceRouterBiasState:
        zero = jnp.zeros([], jnp.int32)
        state = BalanceRouterBiasState(
            layout_version=layout_version(), count=zero, nonfinite_count=jnp.copy(zero)
        )
        return place_like(state, params)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, BalanceRouterBiasState]:
        del params
        flat, treedef = leaves_with_paths(updates)
        shapes = {path: leaf.shape for path, leaf in flat if hasattr(leaf, "shape")}
        if not shapes:
            return updates, state
        usage, arrived = _read_usage(extra_args)
        shown = {"expert_usage": usage, FLAG: arrived}
        check_same_everywhere("balance_router_bias", shown, state)
        rate = update_rate(state.count) if callable(update_rate) else update_rate
        steps = jnp.maximum(rate, 0.0) * _directions(usage, rule)
        is_finite = jnp.all(jnp.isfinite(usage)) & jnp.all(jnp.isfinite(steps))
        steps = jnp.where(is_finite & arrived, steps, 0.0)
        layers = _layers_of(shapes, usage.shape, layer_axis)
        moved = [
            _place(steps, layers[path], leaf) if path in layers else leaf for path, leaf in flat
        ]
        held = optax.safe_increment(state.nonfinite_count)
        return jax.tree.unflatten(treedef, moved), state._replace(
            count=optax.safe_increment(state.count),
            nonfinite_count=jnp.where(is_finite | ~arrived, state.nonfinite_count, held),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _read_usage(
    extra_args: Any,
) -> tuple[Float[Array, "layers experts"], Bool[Array, ""]]:
    """The load, and whether it arrived."""
    caller, name = "balance_router_bias", "expert_usage_per_layer"
    if name in extra_args or "expert_usage" not in extra_args:
        usage = read_metric(caller, extra_args, name, (None, None))
    else:
        name = "expert_usage"
        usage = read_metric(caller, extra_args, name, 1)[None]
    return usage, read_arrival(caller, extra_args, [name])


def _directions(usage: Float[Array, "layers experts"], rule: str) -> Float[Array, "layers experts"]:
    mean = usage.mean(axis=-1, keepdims=True)
    direction = jnp.sign(mean - usage) if rule == "sign" else 1.0 - usage / mean
    return direction - direction.mean(axis=-1, keepdims=True)


def _layers_of(
    shapes: dict[Path, tuple[int, ...]], usage: tuple[int, ...], layer_axis: int | None
) -> dict[Path, LeafLayers]:
    """Which rows of the load each bias follows."""
    num_layers, experts = usage
    # A bias [E] of one layer may come with an axis of size 1.
    plain = {
        path: (experts,) if sorted(shape) == [1] * (len(shape) - 1) + [experts] else shape
        for path, shape in shapes.items()
    }
    for path, shape in plain.items():
        if experts not in shape:
            raise ValueError(
                f"balance_router_bias got the load of {experts} experts, but the bias "
                f"{'/'.join(path)!r} has shape {shape}."
            )
    if layer_axis is None and all(len(shape) == 2 for shape in plain.values()):
        free = {1 - shape.index(experts) for shape in plain.values() if len(set(shape)) > 1}
        layer_axis = free.pop() if len(free) == 1 else None
    try:
        return find_layers(
            "balance_router_bias",
            plain,
            plain,
            num_layers=num_layers,
            layer_axis=layer_axis,
            plain_ndim=1,
        )
    except ValueError as error:
        hint = "" if num_layers > 1 else " Pass expert_usage_per_layer, [L, E], for many layers."
        raise ValueError(f"{error}{hint}") from error


def _place(
    steps: Float[Array, "layers experts"], layers: LeafLayers, leaf: Array
) -> Float[Array, "..."]:
    """The steps of the leaf's layers, in its shape, dtype and sharding."""
    rows = steps[layers.layers]
    placed = rows.reshape(leaf.shape) if layers.axis is None else jnp.moveaxis(rows, 0, layers.axis)
    return reshard_like(placed.astype(leaf.dtype), leaf)
