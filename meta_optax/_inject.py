"""Control of the hyperparameters of any Optax factory."""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Int

from meta_optax import _checks
from meta_optax._control import (
    apply_safely,
    cast_like,
    controlled,
    gather_metrics,
    layout_version,
    start_from,
)
from meta_optax._core import (
    BASE_PREFIX,
    Hyperparams,
    MetaOptimizer,
    State,
    group_name,
    plain_name,
    protect,
)
from meta_optax._devices import place_like

Factory = Callable[..., optax.GradientTransformation]
# What `optax.inject_hyperparams` takes for a number.
_NUMBERS = (int, float, jax.Array, np.ndarray, np.generic)


class InjectMetaHyperparamsState(NamedTuple):
    """State of `inject_meta_hyperparams`.

    Attributes:
      layout_version: the version of this layout.
      count: the updates made, saturating.
      hyperparams: what the last update used (before the first, what it would use if it saw
        nothing), as strong float32 scalars; int32 where the factory's default is an integer. Those
        that no strategy controls and no schedule gives may be written to, as with Optax.
      base_hyperparams: the constants that the strategies start from, under ``base_`` and their
        names; to change one in flight, write a strong array here:
        ``optax.tree.set(state, base_learning_rate=jnp.float32(1e-4))``.
      schedule_states: the states of Optax's stateful schedules, under ``schedule_`` and the name.
      meta_state: the strategy's state.
      inner_state: the optimizer's state.
    """

    layout_version: Int[Array, ""]
    count: Int[Array, ""]
    hyperparams: dict[str, Array]
    base_hyperparams: dict[str, Array]
    schedule_states: dict[str, Any]
    meta_state: State
    inner_state: optax.OptState

    @property
    def nonfinite_count(self) -> Int[Array, ""]:
        """How often a needed metric was not finite."""
        return self.meta_state.nonfinite_count


def inject_meta_hyperparams(
    inner_factory: Factory,
    meta_optimizer: MetaOptimizer,
    static_args: str | Iterable[str] = (),
    *,
    free_hyperparams: Mapping[str, Any] | None = None,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    r"""Puts the hyperparameters of an Optax factory under the control of a strategy.

    With :math:`h_t` the base values (constants, or schedules at the step count) and :math:`s_t` the
    strategy's state, each update computes

    .. math::
      s_{t+1} = \text{observe}(s_t, m_t), \quad
      u_t = \text{inner_factory}(\text{apply}(s_{t+1}, h_t)).\text{update}(g_t)

    so the metrics of a step act on its own update. What ``apply`` makes non-finite or negative is
    replaced by what the last update used. Updates leave in the dtype of the gradients, and the
    inner state in the dtypes that it came with.

    Args:
      inner_factory: an optimizer's factory, such as `optax.adamw`. Its numeric arguments are
        hyperparameters, those with a numeric default too.
      meta_optimizer: the strategy.
      static_args: the names of the arguments that are not hyperparameters. A callable argument
        that is not a schedule (a mask) has to be named here, as with `optax.inject_hyperparams`.
      free_hyperparams: hyperparameters that something else than the optimizer needs, such as
        ``{"aux_loss_weight": 1e-2}`` for the loss: each a number, a scalar array or an Optax
        schedule. Strategies change them like any other, and the loss reads them with
        ``optax.tree.get(opt_state, "aux_loss_weight")``, inside the jitted step. The loss comes
        before the update: what a step's metrics make of one is in force at the next step, and a
        schedule's value is always that of the step that reads it.

    Returns:
      A function that takes the factory's arguments, each a number, a scalar array or an Optax
      schedule, and returns an `optax.GradientTransformationExtraArgs`. Its ``update`` takes the
      metrics that the strategy needs as extra arguments and hands all extra arguments on.

    Raises:
      ValueError: from that function, if the strategy sets a hyperparameter that the factory does
        not take and that is not free, or if a base value is no scalar; if a free hyperparameter
        has the name of an argument, or is no number.
      TypeError: from ``update``, while tracing, if a needed metric was not passed.

    Example:
      >>> import jax.numpy as jnp, optax, meta_optax as mo
      >>> tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau(patience=1))(learning_rate=0.1)
      >>> params = {"w": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> for loss in (1.0, 1.0):
      ...     updates, state = tx.update(params, state, params, value=loss)
      >>> print(optax.tree.get(state, "learning_rate"))
      0.05

    References:
      `optax.inject_hyperparams`, which this builds on.
    """
    meta = protect(meta_optimizer, "inject_meta_hyperparams")
    if not callable(inner_factory):
        raise TypeError(
            f"inject_meta_hyperparams needs an optimizer's factory, got {inner_factory!r}."
        )
    static = {static_args} if isinstance(static_args, str) else set(static_args)
    signature = inspect.signature(inner_factory)
    if unknown := static - set(signature.parameters):
        raise ValueError(
            f"static_args must name arguments of the factory, which takes "
            f"{list(signature.parameters)}; got {sorted(unknown)}."
        )

    free = dict(free_hyperparams or {})
    _check_free(free, signature, meta)

    @functools.wraps(inner_factory)
    def wrapped_factory(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        arguments = _sort_arguments(signature, static, args, kwargs, free)
        names = _controlled_keys(inner_factory, meta, signature, arguments)
        kept = [name for name in arguments.constants if name in names]
        for name in kept:
            _checks.real(name, arguments.constants[name], open_high=True)
        inject = optax.inject_hyperparams(inner_factory, static, hyperparam_dtype=jnp.float32)

        def taken(used: Hyperparams) -> Hyperparams:
            return {name: value for name, value in used.items() if name not in free}

        def free_of(values: Hyperparams) -> Hyperparams:
            return {name: value for name, value in values.items() if name in free}

        def inner(used: Hyperparams) -> optax.GradientTransformationExtraArgs:
            # A new set of arguments: values of one trace must not outlive it.
            values = OrderedDict(arguments.bound.arguments) | used
            bound = inspect.BoundArguments(signature, values)
            return inject(*bound.args, **bound.kwargs)

        def base_values(state: InjectMetaHyperparamsState, extra_args: Any) -> Hyperparams:
            values = {name: state.hyperparams[name] for name in arguments.constants}
            values |= {name: state.base_hyperparams[BASE_PREFIX + name] for name in kept}
            return values | _scheduled(arguments, state.count, state.schedule_states, extra_args)

        def init_fn(params: Any) -> InjectMetaHyperparamsState:
            count = jnp.zeros([], jnp.int32)
            states = {key: schedule.init() for key, schedule in arguments.stateful.items()}
            base = _constants(signature, arguments, names)
            base |= _scheduled(arguments, count, states, {})
            _check_start(base, names)
            meta_state = meta.init()
            start = {name: start_from(base, name) for name in names}
            used = apply_safely(meta, meta_state, base, start, names)
            state = InjectMetaHyperparamsState(
                layout_version=layout_version(),
                count=count,
                hyperparams=used,
                base_hyperparams={BASE_PREFIX + name: base[name] for name in kept},
                schedule_states=states,
                meta_state=meta_state,
                inner_state=_inner_state(inner(taken(used)).init(params)),
            )
            return place_like(state, params)

        def update_fn(
            updates: Any, state: Any, params: Any = None, **extra_args: Any
        ) -> tuple[Any, InjectMetaHyperparamsState]:
            base = base_values(state, extra_args)
            metrics = gather_metrics(
                meta,
                extra_args,
                step=state.count,
                current=meta.apply(state.meta_state, dict(base)),
                base=base,
                grads=updates,
                params=params,
            )
            meta_state = meta.observe(state.meta_state, metrics)
            used = apply_safely(meta, meta_state, base, state.hyperparams, names)
            # Optax's own state, made for this call: a rate must stand once only in ours.
            injected = optax.schedules.InjectStatefulHyperparamsState(
                state.count, taken(used), {}, state.inner_state
            )
            new_updates, injected = inner(taken(used)).update(
                updates, injected, params, **extra_args
            )
            states = {
                key: schedule.update(state.schedule_states[key], **extra_args)
                for key, schedule in arguments.stateful.items()
            }
            count = jnp.asarray(optax.safe_increment(state.count))
            if free.keys() & arguments.schedules.keys():
                # The loss reads them before the next update does: theirs is the next step.
                ahead = base | free_of(_scheduled(arguments, count, states, extra_args))
                used |= free_of(apply_safely(meta, meta_state, ahead, state.hyperparams, names))
            return cast_like(new_updates, updates), state._replace(
                count=count,
                hyperparams=used,
                schedule_states=states,
                meta_state=meta_state,
                inner_state=cast_like(_inner_state(injected), state.inner_state),
            )

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return wrapped_factory


class _Arguments(NamedTuple):
    """A factory's arguments, by what becomes of them."""

    bound: inspect.BoundArguments
    constants: Mapping[str, Any]
    schedules: Mapping[str, Callable[..., Any]]
    stateful: Mapping[str, optax.schedules.StatefulSchedule]


def _sort_arguments(
    signature: inspect.Signature,
    static: set[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free: Mapping[str, Any],
) -> _Arguments:
    """Sorts the arguments as `optax.inject_hyperparams` does, and the free ones with them."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    numeric = {
        name: value
        for name, value in (*bound.arguments.items(), *free.items())
        if name not in static and not isinstance(value, bool)
    }
    schedules = {name: value for name, value in numeric.items() if callable(value)}
    return _Arguments(
        bound=bound,
        constants={k: v for k, v in numeric.items() if _is_number(v)},
        schedules=schedules,
        stateful={
            f"schedule_{name}": schedule
            for name, schedule in schedules.items()
            if isinstance(schedule, optax.schedules.StatefulSchedule)
        },
    )


def _controlled_keys(
    factory: Factory, meta: MetaOptimizer, signature: inspect.Signature, arguments: _Arguments
) -> tuple[str, ...]:
    """The hyperparameters that the strategy changes, all of which the factory must take."""
    base = _constants(signature, arguments, ())
    base |= dict.fromkeys(arguments.schedules, jnp.zeros([], jnp.float32))
    names = controlled(meta, base)
    for name in names:
        if name not in signature.parameters and name not in base:
            factory_name = getattr(factory, "__name__", "the factory")
            form, plain = group_name(name), plain_name(name)
            remedy = (
                f"give {factory_name} an argument of that name or, if it is the loss that needs "
                f"it, pass free_hyperparams={{{name!r}: ...}}"
            )
            if plain != name and plain in signature.parameters:
                layers = "" if form == name else ", num_layers=..."
                remedy = f"wrap it: moe_partition({factory_name}, labels{layers})"
            raise ValueError(
                f"{meta.name} sets the hyperparameter {name!r}, which {factory_name} does not "
                f"take (it takes {sorted(base)}). To let it act, {remedy}."
            )
    return names


def _check_free(free: Mapping[str, Any], signature: inspect.Signature, meta: MetaOptimizer) -> None:
    for name, value in free.items():
        if name in ("step", *meta.metrics):
            raise ValueError(f"free_hyperparams has {name!r}, which is the name of a metric.")
        if name in signature.parameters:
            raise ValueError(
                f"free_hyperparams has {name!r}, which is an argument of the factory: give it to "
                "that."
            )
        if isinstance(value, bool) or not (callable(value) or _is_number(value)):
            raise ValueError(
                f"free_hyperparams needs a number or a schedule as {name!r}, got {value!r}."
            )


def _is_number(value: Any) -> bool:
    """What Optax takes for one, but for typed PRNG keys, which have no value to control."""
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return isinstance(value, _NUMBERS) and not is_key


def _constants(
    signature: inspect.Signature, arguments: _Arguments, names: tuple[str, ...]
) -> Hyperparams:
    """The base values that are constants; those that a strategy controls are float32."""
    return {
        name: _strong(signature, name, value, is_controlled=name in names)
        for name, value in arguments.constants.items()
    }


def _check_start(base: Hyperparams, names: tuple[str, ...]) -> None:
    """Raises if a controlled hyperparameter starts below zero, as far as can be seen."""
    for name in names:
        value = base.get(name, jnp.zeros([]))
        if not isinstance(value, Tracer) and value < 0:
            raise ValueError(f"The schedule given for {name!r} starts at {value}; it must be >= 0.")


def _strong(signature: inspect.Signature, name: str, value: Any, *, is_controlled: bool) -> Array:
    """A base value as a strongly typed scalar of its own buffer."""
    if np.ndim(value) != 0:
        raise ValueError(
            f"The hyperparameter {name!r} must be a scalar, got shape {np.shape(value)}. If it is "
            f"no hyperparameter, write static_args={name!r}."
        )
    if not isinstance(value, Tracer) and np.isnan(value):
        raise ValueError(f"The hyperparameter {name!r} must be a number, got {value!r}.")
    # An integer stays one where the factory has an integer, or nothing, for its default: a seed or
    # a number of steps. A rate of 1 is a rate.
    parameters = signature.parameters
    owner = parameters.get(plain_name(name)) or parameters.get(name)
    default = owner.default if owner else 0.0
    allowed = default is None or (isinstance(default, int) and not isinstance(default, bool))
    is_integer = jnp.issubdtype(jnp.result_type(value), jnp.integer)
    keeps = is_integer and allowed and not is_controlled
    return jnp.array(value, jnp.int32 if keeps else jnp.float32)


def _scheduled(
    arguments: _Arguments, count: Int[Array, ""], states: Mapping[str, Any], extra_args: Any
) -> Hyperparams:
    """What the schedules give at this step."""
    values = {}
    for name, schedule in arguments.schedules.items():
        key = f"schedule_{name}"
        value = schedule(states[key], **extra_args) if key in states else schedule(count)
        is_leaf = jax.tree.structure(value) == jax.tree.structure(0)
        if not is_leaf or jnp.ndim(value) != 0 or jnp.result_type(value) == jnp.bool_:
            raise TypeError(
                f"The schedule given for {name!r} must return a real scalar, got {value!r}. If it "
                f"is no schedule, write static_args={name!r}."
            )
        values[name] = jnp.asarray(value).astype(jnp.float32)
    return values


def _inner_state(injected: Any) -> optax.OptState:
    """The optimizer's own part of the state of `optax.inject_hyperparams`."""
    return injected.inner_state
