"""Control of the updates' scale, to be chained behind any optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from meta_optax._advanced_plateau import advanced_plateau
from meta_optax._control import apply_safely, controlled, gather_metrics, layout_version
from meta_optax._core import (
    CONTROLLED_GROUPS,
    MetaOptimizer,
    State,
    group_name,
    layer_form,
    plain_name,
    protect,
)
from meta_optax._devices import place_like
from meta_optax._expert_gate import expert_gate
from meta_optax._groups import (
    UNCONTROLLED,
    GroupLayers,
    Labels,
    check_groups,
    group_fn,
    layers_of_groups,
    scale_layers,
    scale_leaf,
)
from meta_optax._plateau import plateau
from meta_optax._smart_expert_gate import smart_expert_gate

_RATE = "learning_rate"


class ScaleByMetaState(NamedTuple):
    """State of `scale_by_meta`.

    Attributes:
      layout_version: the version of this layout.
      count: the updates made, saturating.
      hyperparams: the factors of the last update, float32, under ``learning_rate_scale`` and,
        with labels, ``gate_learning_rate_scale`` and ``expert_learning_rate_scale`` (by layer,
        ``gate_0_learning_rate_scale``): those that the strategy controls. The names differ from
        the rates' own, so that a rate injected in the same chain stays readable.
      meta_state: the strategy's state.
    """

    layout_version: Int[Array, ""]
    count: Int[Array, ""]
    hyperparams: dict[str, Array]
    meta_state: State

    @property
    def nonfinite_count(self) -> Int[Array, ""]:
        """How often a needed metric was not finite."""
        return self.meta_state.nonfinite_count


def scale_by_meta(
    meta_optimizer: MetaOptimizer,
    labels: Labels | None = None,
    *,
    layer_axis: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by what a strategy makes of a learning rate of 1.

    .. math:: u_i \leftarrow u_i \cdot \text{apply}(s_{t+1}, \{\text{learning_rate}: 1\})_{g(i)}

    with :math:`g(i)` the group's form of the rate, or the plain one where the strategy sets none.
    Goes behind the optimizer: before Adam a common factor cancels. A strategy's ``min_lr`` is a
    factor here. Leaves labelled ``balance_bias`` are left alone. The products are taken in float32
    at least and cast back.

    The incoming updates are the optimizer's, not the gradients: where a strategy needs
    ``grad_norm`` to judge by gradients, pass it.

    Args:
      meta_optimizer: the strategy.
      labels: as for `moe_partition`; needed by strategies that set rates of groups.
      layer_axis: as for `moe_partition`, for strategies that set rates of layers.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if the strategy sets a rate of a group and there are no labels, or if it sets
        anything but rates; from ``init``, if no parameter has the label of a group with a rate.
      TypeError: from ``update``, while tracing, if a needed metric was not passed.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> tx = optax.chain(optax.sgd(1.0), mo.scale_by_meta(mo.plateau(patience=1)))
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for loss in (1.0, 1.0):
      ...     updates, state = tx.update(params, state, params, value=loss)
      >>> print(updates)
      [-0.5 -0.5]
    """
    meta = protect(meta_optimizer, "scale_by_meta")
    one = {_RATE: jnp.ones([], jnp.float32)}
    names = controlled(meta, one)
    groups = None if labels is None else group_fn(labels)
    _check_names(meta, names, has_labels=labels is not None)
    own = tuple(
        group
        for group in CONTROLLED_GROUPS
        if any(group_name(name) == f"{group}_{_RATE}" for name in names)
    )
    counts = {
        group: sum(layer_form(group, layer, _RATE) in names for layer in range(len(names)))
        for group in own
    }
    # A strategy may set rates of layers for one group alone.
    layered = [group for group in own if counts[group]]
    num_layers = max(counts.values(), default=0)

    def layers_in(tree: Any) -> GroupLayers:
        if groups is None or not num_layers:
            return {}
        caller = f"scale_by_meta({meta.name})"
        return layers_of_groups(
            caller, groups(tree), tree, num_layers=num_layers, layer_axis=layer_axis
        )

    def scales(state: State, last: dict[str, Array]) -> dict[str, Array]:
        rates = {name.removesuffix("_scale"): scale for name, scale in last.items()}
        used = apply_safely(meta, state, dict(one), rates, names)
        return {f"{name}_scale": used[name] for name in names}

    def init_fn(params: Any) -> ScaleByMetaState:
        if groups is not None and jax.tree.leaves(params):
            check_groups(f"scale_by_meta({meta.name})", groups(params), params, own)
            layers_in(params)
        meta_state = meta.init()
        start = {f"{name}_scale": jnp.ones([], jnp.float32) for name in names}
        state = ScaleByMetaState(
            layout_version=layout_version(),
            count=jnp.zeros([], jnp.int32),
            hyperparams=scales(meta_state, start),
            meta_state=meta_state,
        )
        return place_like(state, params)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ScaleByMetaState]:
        metrics = gather_metrics(
            meta,
            extra_args,
            step=state.count,
            current=meta.apply(state.meta_state, dict(one)),
            base=one,
            grads=updates,
            params=params,
        )
        meta_state = meta.observe(state.meta_state, metrics)
        new = scales(meta_state, state.hyperparams)
        plain = new.get(f"{_RATE}_scale")
        layers = layers_in(updates)
        by_layer = {
            group: jnp.stack(
                [new[f"{layer_form(group, layer, _RATE)}_scale"] for layer in range(num_layers)]
            )
            for group in layered
        }

        def scale(group: str, part: Any) -> Any:
            factor = new.get(f"{group}_{_RATE}_scale", plain)
            if factor is None or group == UNCONTROLLED or group in by_layer:
                return part
            return jax.tree.map(lambda leaf: scale_leaf(leaf, factor), part)

        scaled = (
            jax.tree.map(scale, groups(updates), updates) if groups else scale("dense", updates)
        )
        updates = scale_layers(scaled, layers, by_layer)
        return updates, state._replace(
            count=optax.safe_increment(state.count), hyperparams=new, meta_state=meta_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_plateau(**arguments: Any) -> optax.GradientTransformationExtraArgs:
    """`scale_by_meta` of `plateau`, whose arguments it takes.

    There is no weight decay to control here, so the arguments about it do nothing and no norm is
    needed. Metrics: ``value``.

    Args:
      **arguments: the arguments of `plateau`; ``min_lr`` is a factor here.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Example:
      >>> import meta_optax as mo, optax
      >>> tx = optax.chain(optax.adamw(1e-3), mo.scale_by_plateau(patience=10))
    """
    return scale_by_meta(plateau(**arguments))


def scale_by_advanced_plateau(**arguments: Any) -> optax.GradientTransformationExtraArgs:
    """`scale_by_meta` of `advanced_plateau`, whose arguments it takes.

    There is no weight decay to control here, so the arguments about it do nothing and no norm is
    needed. Metrics: ``value``.

    Args:
      **arguments: the arguments of `advanced_plateau`; ``min_lr`` is a factor here.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Example:
      >>> import meta_optax as mo, optax
      >>> tx = optax.chain(optax.adamw(1e-3), mo.scale_by_advanced_plateau(warmup_steps=100))
    """
    return scale_by_meta(advanced_plateau(**arguments))


def scale_by_expert_gate(labels: Labels, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """`scale_by_meta` of `expert_gate`, whose arguments it takes.

    Metrics: ``gate_entropy``.

    Args:
      labels: as for `moe_partition`.
      **arguments: the arguments of `expert_gate`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> labels = {"router": "gate", "experts": "expert"}
      >>> tx = optax.chain(optax.sgd(1.0), mo.scale_by_expert_gate(labels))
      >>> params = {"router": jnp.ones([]), "experts": jnp.ones([])}
      >>> updates, _ = tx.update(params, tx.init(params), params, gate_entropy=1.2)
      >>> print(updates["router"], updates["experts"])
      -0.1 -1.0
    """
    return scale_by_meta(expert_gate(**arguments), labels)


def scale_by_smart_expert_gate(
    labels: Labels, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_meta` of `smart_expert_gate`, whose arguments it takes.

    Metrics: ``gate_entropy``, ``gate_sparsity``, ``expert_usage``.

    Args:
      labels: as for `moe_partition`.
      **arguments: the arguments of `smart_expert_gate`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Example:
      >>> import meta_optax as mo, optax
      >>> labels = {"router": "gate", "experts": "expert"}
      >>> tx = optax.chain(optax.adamw(1e-3), mo.scale_by_smart_expert_gate(labels))
    """
    return scale_by_meta(smart_expert_gate(**arguments), labels)


def _check_names(meta: MetaOptimizer, names: tuple[str, ...], *, has_labels: bool) -> None:
    """Raises unless what the strategy sets is a rate of a group that labels are there for."""
    strange = [name for name in names if plain_name(name) != _RATE]
    grouped = [name for name in names if name != _RATE]
    if strange:
        raise ValueError(
            f"{meta.name} sets {strange}, which no scale of updates can stand for: use "
            "inject_meta_hyperparams with a factory that takes it."
        )
    if grouped and not has_labels:
        raise ValueError(
            f"{meta.name} sets {grouped}, so scale_by_meta has to know the groups: pass labels "
            "(a tree of 'gate', 'expert' and 'dense', or a function that makes one)."
        )
