"""A factory that builds one inner optimizer per group of parameters."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from meta_optax import _checks
from meta_optax._checks import Size
from meta_optax._core import CONTROLLED_GROUPS, layer_form
from meta_optax._groups import (
    UNCONTROLLED,
    GroupLayers,
    Labels,
    check_groups,
    group_fn,
    layers_of_groups,
    scale_layers,
)
from meta_optax.moe._balance import balance_router_bias

_RATE = "learning_rate"
_BALANCE_RATE = "balance_update_rate"
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def moe_partition(
    inner_factory: Callable[..., optax.GradientTransformation],
    labels: Labels,
    *,
    num_layers: Size | None = None,
    layer_axis: int | None = None,
    balance_rule: str = "sign",
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    r"""A factory with one inner optimizer each for gates, experts and all the rest.

    It takes the inner factory's arguments and, for each of them, a ``gate_`` and an ``expert_``
    form (``gate_learning_rate``, ``expert_weight_decay``). A group for which no form is given gets
    the plain one. Leaves labelled ``gate_bias`` count as gate, ``shared_expert`` as dense.

    ``balance_bias`` leaves follow a rule of their own, that neither decay nor moments may disturb:
    `balance_router_bias` if the factory is given ``balance_update_rate``, else they get no update.
    A clip inside the inner factory sees one group's gradients alone, and never theirs.

    With ``num_layers``, the factory also takes a learning rate for each layer's part of a group
    (``gate_0_learning_rate``), as strategies with ``per_layer=True`` set it. The group's optimizer
    then runs at the highest of its layers' rates, and what it gives is scaled for each layer by

    .. math:: u_l \leftarrow u_l \cdot \text{lr}_l / \max_j \text{lr}_j

    Args:
      inner_factory: an optimizer's factory, such as `optax.adamw`.
      labels: a tree of labels, of the params' structure or a prefix of it, or a function that
        makes one of the params or the updates, such as `label_moe_params`. Labels are ``"gate"``,
        ``"gate_bias"``, ``"balance_bias"``, ``"expert"``, ``"shared_expert"`` and ``"dense"``.
      num_layers: how many layers of experts there are, if they are to have rates of their own:
        separate subtrees, in the natural order of their paths, or slices along an axis.
      layer_axis: the axis along which layers are stacked; if it is not given, it is found from the
        sizes, or is that of the code base that the paths are of.
      balance_rule: the ``rule`` of `balance_router_bias`.

    Returns:
      A factory for use by itself or inside `inject_meta_hyperparams`.

    Raises:
      ValueError: if the inner factory has an argument that looks like a group's form; from
        ``init``, if a label is unknown, if no parameter is labelled as gate, or none as expert, if
        the layers are not as many, or if there is a rate for a balance bias that is not there.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> labels = {"router": "gate", "experts": "expert", "attention": "dense"}
      >>> tx = mo.moe_partition(optax.sgd, labels)(1.0, gate_learning_rate=0.1)
      >>> params = {name: jnp.ones([]) for name in labels}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> print(updates["router"], updates["experts"])
      -0.1 -1.0

    References:
      `optax.partition`, which this builds.
    """
    if not callable(inner_factory):
        raise TypeError(f"moe_partition needs an optimizer's factory, got {inner_factory!r}.")
    layers = 0 if num_layers is None else _checks.size("num_layers", num_layers, low=1)
    balance_router_bias(rule=balance_rule)  # checks the rule before there is a rate
    plain = inspect.signature(inner_factory)
    signature = _with_group_forms(plain, layers)
    groups = group_fn(labels)

    def layers_in(tree: Any) -> GroupLayers:
        return layers_of_groups(
            "moe_partition", groups(tree), tree, num_layers=layers, layer_axis=layer_axis
        )

    def factory(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if value is not None}
        rates = {group: _layer_rates(given, group, layers) for group in CONTROLLED_GROUPS}
        highest = {group: own.max() for group, own in rates.items() if own is not None}
        factors = {
            group: own / jnp.where(highest[group] > 0, highest[group], 1.0)
            for group, own in rates.items()
            if own is not None
        }

        def inner(group: str) -> optax.GradientTransformation:
            own = plain.bind_partial()
            for name in plain.parameters:
                if name == _RATE and group in highest:
                    own.arguments[name] = highest[group]
                elif f"{group}_{name}" in given:
                    own.arguments[name] = given[f"{group}_{name}"]
                elif name in bound.arguments:
                    own.arguments[name] = bound.arguments[name]
            return inner_factory(*own.args, **own.kwargs)

        balance = optax.set_to_zero()
        if _BALANCE_RATE in given:
            balance = balance_router_bias(
                given[_BALANCE_RATE], rule=balance_rule, layer_axis=layer_axis
            )
        transforms = {group: inner(group) for group in (*CONTROLLED_GROUPS, "dense")}
        tx = optax.partition({**transforms, UNCONTROLLED: balance}, groups)

        def init_fn(params: Any) -> optax.OptState:
            # Optax's placeholder for params has no leaves, and so nothing to be labelled.
            if jax.tree.leaves(params):
                wanted = (UNCONTROLLED,) if _BALANCE_RATE in given else ()
                check_groups("moe_partition", groups(params), params, (*CONTROLLED_GROUPS, *wanted))
                if layers:
                    layers_in(params)
            return tx.init(params)

        def update_fn(
            updates: Any, state: Any, params: Any = None, **extra_args: Any
        ) -> tuple[Any, Any]:
            updates, state = tx.update(updates, state, params, **extra_args)
            return scale_layers(updates, layers_in(updates), factors) if factors else updates, state

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    factory.__name__ = f"moe_partition({getattr(inner_factory, '__name__', 'factory')})"
    # `inspect.signature`, and so Optax, reads this attribute; pyright does not know it.
    factory.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return factory


def _layer_rates(
    given: Mapping[str, Any], group: str, layers: int
) -> Float[Array, " layers"] | None:
    """The learning rate of each layer's part of a group; None if none is given one of its own."""
    forms = [layer_form(group, layer, _RATE) for layer in range(layers)]
    if not any(form in given for form in forms):
        return None
    fallback = given.get(f"{group}_{_RATE}", given.get(_RATE))
    values = [given.get(form, fallback) for form in forms]
    if any(value is None or callable(value) for value in values):
        raise ValueError(
            f"moe_partition needs numbers as the rates of layers, got {values} for the {group}s. "
            "Schedules become numbers in inject_meta_hyperparams."
        )
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in values])


def _with_group_forms(signature: inspect.Signature, layers: int) -> inspect.Signature:
    """The signature with a keyword of each group for each of its arguments."""
    parameters = list(signature.parameters.values())
    named = [parameter.name for parameter in parameters if parameter.kind in _NAMED]
    added = [f"{group}_{name}" for group in CONTROLLED_GROUPS for name in named]
    if _RATE in named:
        added += [layer_form(g, layer, _RATE) for g in CONTROLLED_GROUPS for layer in range(layers)]
    elif layers:
        raise ValueError(
            f"moe_partition with num_layers needs a factory with the argument {_RATE!r}, got one "
            f"with {named}."
        )
    added.append(_BALANCE_RATE)
    if taken := set(added) & set(named):
        raise ValueError(
            f"moe_partition needs a factory without groups of its own, got one with the arguments "
            f"{sorted(taken)}."
        )
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in added
    ]
    is_rest = [parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters]
    end = is_rest.index(True) if any(is_rest) else len(parameters)
    return signature.replace(parameters=parameters[:end] + keywords + parameters[end:])
