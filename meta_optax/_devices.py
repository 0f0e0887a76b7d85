"""Many devices: metrics and decisions are the same on all of them, and the state lies there."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import Array

# What stands for the flags of metrics that were passed as pairs.
FLAG = "flag"
# What to write for a metric that each device has measured for itself.
_HOW_TO_SHARE = {
    "grad_norm": "Update by gradients that are the same on all devices, jax.lax.pmean(grads, ...), "
    "or pass the norm over all of them as grad_norm.",
    "param_norm": "Pass the norm over all devices as param_norm.",
    FLAG: "Let a metric that is passed as (value, flag) arrive on all devices or on none.",
}


def replicate(value: Array) -> Array:
    """The value with a type that is whole on every device, where types tell of shardings.

    With explicit axes a state would take over the sharding of a metric, and change its type from
    one step to the next. Automatic axes are XLA's business, and types say nothing of them.
    """
    sharding = jax.typeof(value).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return value
    whole = jax.NamedSharding(sharding.mesh, jax.P(*[None] * value.ndim))
    return jax.sharding.reshard(value, whole)


def reshard_like(value: Array, like: Any) -> Array:
    """The value with the sharding that the type of another array of its shape has, if any."""
    sharding = jax.typeof(like).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return value
    return jax.sharding.reshard(value, sharding)


def check_same_everywhere(strategy: str, metrics: Mapping[str, Any], state: Any) -> None:
    """Raises if each device of a `jax.shard_map` would decide by a metric of its own.

    Where the state varies over a mesh axis too, its devices hold independent runs, and may.
    JAX knows what varies unless it is told ``check_vma=False``.

    Raises:
      ValueError: naming the metric, the axes, and what to write.
    """
    own = frozenset().union(*map(_varies_over, jax.tree.leaves(state)))
    for name, value in metrics.items():
        axes = tuple(sorted(_varies_over(value) - own, key=str))
        if not axes:
            continue
        axis_name = repr(axes[0] if len(axes) == 1 else axes)
        cure = _HOW_TO_SHARE.get(name, f"Pass {name}=jax.lax.pmean({name}, {axis_name}).")
        raise ValueError(
            f"{strategy} is shown a metric {name!r} that varies over the mesh axis {axis_name} of "
            f"a shard_map, and each of its devices would take decisions of its own. {cure} If each "
            "device is to have a run of its own, the state must vary as well: "
            f"jax.lax.pcast(state, {axis_name}, to='varying')."
        )


def place_like(state: Any, params: Any) -> Any:
    """The state on the mesh of the params, whole on every device, where it lies nowhere yet.

    What an ``init`` makes eagerly outside of `jax.set_mesh` is on the first device and would move
    at the first step, which costs a second compile. What is traced, or follows the params' own
    sharding as moments do, stays as it is.
    """
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(params) if _is_on_mesh(leaf)}
    if len(meshes) != 1:
        return state
    whole = jax.NamedSharding(meshes.pop(), jax.P())
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, whole) if _is_nowhere(leaf) else leaf, state
    )


def _varies_over(value: Any) -> frozenset[Any]:
    """The axes of a `jax.shard_map` over which a value may differ, as far as JAX keeps track."""
    kind = getattr(jax.typeof(value), "manual_axis_type", None)
    return getattr(kind, "varying", frozenset())


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)


def _is_on_mesh(leaf: Any) -> bool:
    return _is_concrete(leaf) and isinstance(leaf.sharding, jax.NamedSharding)


def _is_nowhere(leaf: Any) -> bool:
    return _is_concrete(leaf) and not leaf.committed
