"""One step of control, which every way to act takes: observe, apply, keep what is safe."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from meta_optax._core import BASE_PREFIX, Hyperparams, MetaOptimizer, Metrics, State

# The version of the layout of all states; a change of any state's fields needs a new one.
LAYOUT_VERSION = 3


def layout_version() -> Int[Array, ""]:
    """The version to keep in a state."""
    return jnp.full([], LAYOUT_VERSION, jnp.int32)


def measure_norm(tree: Any) -> Float[Array, ""]:
    """The global L2 norm, in float32, at the price of one read.

    The barrier keeps XLA from sharing the square with the second moment of Adam, which it would
    write out and read twice.
    """
    tree = jax.lax.optimization_barrier(tree)
    return optax.tree.norm(jax.tree.map(_at_least_float32, tree)).astype(jnp.float32)


def gather_metrics(
    meta: MetaOptimizer,
    extra_args: Metrics,
    *,
    step: Int[Array, ""],
    current: Hyperparams,
    base: Hyperparams,
    grads: Any = None,
    params: Any = None,
) -> Metrics:
    """What a strategy is shown: see `MetaOptimizer.observe`.

    A norm is measured only if the strategy names it, it was not passed, and there is a tree to
    measure. What no strategy reads after all costs nothing: XLA drops it.
    """
    metrics = dict(extra_args)
    for name, tree in (("grad_norm", grads), ("param_norm", params)):
        if name in meta.metrics and name not in metrics and tree is not None:
            metrics[name] = measure_norm(tree)
    prefixed = {BASE_PREFIX + name: value for name, value in base.items()}
    return {**metrics, **current, **prefixed, "step": step}


def controlled(meta: MetaOptimizer, base: Hyperparams) -> tuple[str, ...]:
    """The hyperparameters that ``apply`` changes or adds, in its order.

    Raises:
      ValueError: if ``apply`` drops a hyperparameter or gives one another shape.
    """
    names: list[str] = []

    def probe(state: State, values: Hyperparams) -> Hyperparams:
        out = meta.apply(state, dict(values))
        if dropped := set(values) - set(out):
            raise ValueError(f"apply of {meta.name} drops the hyperparameters {sorted(dropped)}.")
        names.extend(key for key in out if key not in values or out[key] is not values[key])
        return {key: jnp.asarray(value) for key, value in out.items()}

    shapes = jax.eval_shape(probe, jax.eval_shape(meta.init), base)
    for name in names:
        if shapes[name].shape != ():
            raise ValueError(
                f"{meta.name} sets {name!r} to shape {shapes[name].shape}; it must be a scalar."
            )
    return tuple(names)


def apply_safely(
    meta: MetaOptimizer, state: State, base: Hyperparams, last: Hyperparams, names: tuple[str, ...]
) -> Hyperparams:
    """What ``apply`` makes of the base; what is not finite or negative stays at its last value."""
    out = meta.apply(state, dict(base))
    for name in names:
        value = jnp.asarray(out[name]).astype(jnp.float32)
        # Comparisons with NaN are false, so this is all that finite and not negative means.
        safe = (value >= 0) & (value < jnp.inf)
        out[name] = jnp.where(safe, value, last[name])
    return out


def start_from(base: Hyperparams, name: str) -> Float[Array, ""]:
    """What stands for the last value before there is one: the base, or 0 where that is unsafe."""
    value = jnp.asarray(base.get(name, 0.0)).astype(jnp.float32)
    return jnp.where((value >= 0) & (value < jnp.inf), value, 0.0).astype(jnp.float32)


def cast_like(new: Any, old: Any) -> Any:
    """The new tree in the dtypes of the old one, where they have the same structure."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        return new
    return jax.tree.map(lambda a, b: a if a.dtype == b.dtype else a.astype(b.dtype), new, old)


def _at_least_float32(leaf: Array) -> Array:
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32) if narrow else leaf
