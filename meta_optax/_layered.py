"""What strategies share that can judge each layer by itself."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from meta_optax import _checks
from meta_optax._core import Hyperparams, Rules, group_name, layer_form, rules_of


def shape_of_layers(per_layer: Any, num_layers: Any) -> tuple[int, ...]:
    """The shape of a layered strategy's state and metrics: [L], or a scalar's.

    Raises:
      ValueError: if only one of the two arguments is given, or either is out of range.
    """
    if not _checks.flag("per_layer", per_layer):
        if num_layers is not None:
            raise ValueError(f"num_layers={num_layers!r} needs per_layer=True.")
        return ()
    if num_layers is None:
        raise ValueError(
            "per_layer=True needs num_layers=: the state has a row for each layer, and so its "
            "shape must be known. num_layers must be an integer >= 1, got None."
        )
    return (_checks.size("num_layers", num_layers, low=1),)


def rules_by_layer(
    strategy: str, group: str, rule: Int[Array, "*layers"], causes: Mapping[str, str]
) -> dict[str, Rules]:
    """What ``decision_rules`` says of a group's rate, or of each layer's."""
    if rule.ndim == 0:
        return {f"{group}_learning_rate": rules_of(strategy, rule, causes)}
    by_layer = {cause: f"{metric}_per_layer" for cause, metric in causes.items()}
    return {
        layer_form(group, layer, "learning_rate"): rules_of(strategy, rule[layer], by_layer, layer)
        for layer in range(rule.shape[0])
    }


def scale_groups(
    strategy: str,
    hyperparams: Mapping[str, Any],
    scales: Mapping[str, Mapping[str, ArrayLike]],
    layers: tuple[int, ...] = (),
) -> Hyperparams:
    """Adds each group's form of each hyperparameter: its base, else the plain one, scaled.

    With layers, the learning rate gets a form for each layer's part of a group instead; its base is
    that form's, else the group's, else the plain one.
    """
    if not any(name in hyperparams for name in scales):
        raise ValueError(
            f"{strategy} derives the groups' values from {' and '.join(map(repr, scales))}, but "
            f"the hyperparameters are {sorted(hyperparams)}. Give the factory one of that name."
        )
    out = dict(hyperparams)
    for name, groups in scales.items():
        for group, scale in groups.items() if name in hyperparams else ():
            base = hyperparams.get(f"{group}_{name}", hyperparams[name])
            if layers and name == "learning_rate":
                each = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), layers)
                for layer in range(*layers):
                    form = layer_form(group, layer, name)
                    own = jnp.asarray(hyperparams.get(form, base)).astype(jnp.float32)
                    out[form] = own * each[layer]
                continue
            form = f"{group}_{name}"
            # Where somebody before has set rates of layers, those are the ones in force.
            of_layers = [key for key in hyperparams if key != form and group_name(key) == form]
            for key in (form, *of_layers):
                own = jnp.asarray(hyperparams.get(key, base)).astype(jnp.float32)
                out[key] = own * scale
    return out
