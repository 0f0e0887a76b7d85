"""A factory that builds one inner optimizer per group of parameters."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from meta_optax._core import CONTROLLED_GROUPS
from meta_optax._groups import UNCONTROLLED, Labels, check_groups, group_fn

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def moe_partition(
    inner_factory: Callable[..., optax.GradientTransformation], labels: Labels
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """A factory with one inner optimizer each for gates, experts and all the rest.

    It takes the inner factory's arguments and, for each of them, a ``gate_`` and an ``expert_``
    form (``gate_learning_rate``, ``expert_weight_decay``). A group for which no form is given gets
    the plain one. Leaves labelled ``gate_bias`` count as gate, ``shared_expert`` as dense;
    ``balance_bias`` leaves get no update at all, for they follow a rule of their own that neither
    decay nor moments may disturb.

    Args:
      inner_factory: an optimizer's factory, such as `optax.adamw`.
      labels: a tree of labels, of the params' structure or a prefix of it, or a function that
        makes one of the params or the updates. Labels are ``"gate"``, ``"gate_bias"``,
        ``"balance_bias"``, ``"expert"``, ``"shared_expert"`` and ``"dense"``.

    Returns:
      A factory for use by itself or inside `inject_meta_hyperparams`.

    Raises:
      ValueError: if the inner factory has an argument that looks like a group's form; from
        ``init``, if a label is unknown or if no parameter is labelled as gate, or none as expert.

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
    plain = inspect.signature(inner_factory)
    signature = _with_group_forms(plain)
    groups = group_fn(labels)

    def factory(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)

        def inner(group: str) -> optax.GradientTransformation:
            own = plain.bind_partial()
            for name in plain.parameters:
                value = bound.arguments.get(f"{group}_{name}")
                if value is not None:
                    own.arguments[name] = value
                elif name in bound.arguments:
                    own.arguments[name] = bound.arguments[name]
            return inner_factory(*own.args, **own.kwargs)

        transforms = {group: inner(group) for group in (*CONTROLLED_GROUPS, "dense")}
        tx = optax.partition({**transforms, UNCONTROLLED: optax.set_to_zero()}, groups)

        def init_fn(params: Any) -> optax.OptState:
            # Optax's placeholder for params has no leaves, and so nothing to be labelled.
            if jax.tree.leaves(params):
                check_groups("moe_partition", groups(params), params, CONTROLLED_GROUPS)
            return tx.init(params)

        return optax.GradientTransformationExtraArgs(init_fn, tx.update)

    factory.__name__ = f"moe_partition({getattr(inner_factory, '__name__', 'factory')})"
    # `inspect.signature`, and so Optax, reads this attribute; pyright does not know it.
    factory.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return factory


def _with_group_forms(signature: inspect.Signature) -> inspect.Signature:
    """The signature with a keyword of each group for each of its arguments."""
    parameters = list(signature.parameters.values())
    named = [parameter.name for parameter in parameters if parameter.kind in _NAMED]
    added = [f"{group}_{name}" for group in CONTROLLED_GROUPS for name in named]
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
