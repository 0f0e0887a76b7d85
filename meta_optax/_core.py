"""The core type, `MetaOptimizer`, and what every strategy shares."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from meta_optax._devices import FLAG, check_same_everywhere, replicate

State = Any
Metrics = Mapping[str, Any]
# Values are arrays wherever this library calls; people may try a strategy on Python numbers.
Hyperparams = dict[str, Any]
ObserveFn = Callable[[State, Metrics], State]

# What the base value of a hyperparameter is called among metrics and in states.
BASE_PREFIX = "base_"
# The key under which `decision_rules` of a state tells of all hyperparameters not named there.
ANY_HYPERPARAM = "*"
# The groups of parameters that have forms of their own of the hyperparameters.
CONTROLLED_GROUPS = ("gate", "expert")
# A group's form of a hyperparameter, or that of one layer's part of the group.
_FORM = re.compile(rf"(?:{'|'.join(CONTROLLED_GROUPS)})_(?:\d+_)?(.+)")
# What a metric must look like: a number of dimensions, or sizes, None for any.
Shape = int | tuple[int | None, ...] | None
# How a caller hands a metric over, where that is not `name=name`.
_HOW_TO_PASS = {
    "value": "value=loss",
    "grad_norm": "grad_norm=optax.tree.norm(grads)",
    "param_norm": "param_norm=optax.tree.norm(params)",
}


class Rules(NamedTuple):
    """The rules that may have changed a hyperparameter, and which one it was last.

    A state that has a method ``decision_rules() -> dict[str, Rules]`` tells `with_decisions` why.

    Attributes:
      index: the place of the rule among the others.
      texts: each rule's text, as ``"plateau: patience"``.
      metrics: the name of the metric that each rule fires on.
      layer: the layer, where the metrics have a value for each.
    """

    index: Int[Array, ""]
    texts: tuple[str, ...]
    metrics: tuple[str, ...]
    layer: int | None = None


class _MetaOptimizerFields(NamedTuple):
    name: str
    init: Callable[[], State]
    observe: ObserveFn
    apply: Callable[[State, Mapping[str, Any]], Hyperparams]
    metrics: tuple[str, ...] = ()


class MetaOptimizer(_MetaOptimizerFields):
    r"""A pure transformation of hyperparameters, as Optax's are of gradients.

    With :math:`s_t` the state, :math:`m_t` the metrics of step :math:`t` and :math:`h_t` the base
    hyperparameters (constants, or a schedule's values),

    .. math:: s_{t+1} = \text{observe}(s_t, m_t), \quad \text{used}_t = \text{apply}(s_{t+1}, h_t)

    so that the metrics of a step act on that same step's update.

    Attributes:
      name: the strategy's own name, used in errors and in decisions.
      init: ``init() -> state``: strongly typed arrays of fixed shapes.
      observe: ``observe(state, metrics) -> state``: one transition. ``metrics`` maps names to
        arrays: what the caller passed to ``update``, ``step`` (int32, updates made before this
        one), ``grad_norm`` and ``param_norm`` where named in ``metrics``, every current
        hyperparameter under its own name and every base value under ``base_`` and its name. The
        caller may pass any metric as a pair ``(value, flag)`` with a boolean scalar: where the
        flag of one named in ``metrics`` is false, it did not arrive at that step, and the state
        stays as it was; the value may be anything then.
      apply: ``apply(state, hyperparams) -> hyperparams``: a pure function of the state and the
        base values. It may add keys, and leaves those that it does not control as they are.
      metrics: the names of the metrics that ``observe`` needs.

    Raises:
      TypeError: if one of the functions is missing or cannot be called, if ``name`` is not a
        string, or if ``metrics`` is not a tuple of strings.

    Example:
      A strategy of one's own, that halves the learning rate while the loss is above 2:

      >>> import jax.numpy as jnp, meta_optax as mo
      >>> def apply(state, hyperparams):
      ...     rate = hyperparams["learning_rate"] * jnp.where(state > 2.0, 0.5, 1.0)
      ...     return {**hyperparams, "learning_rate": rate}
      >>> halve = mo.MetaOptimizer(
      ...     name="halve",
      ...     init=lambda: jnp.zeros([], jnp.float32),
      ...     observe=lambda state, metrics: jnp.asarray(metrics["value"], jnp.float32),
      ...     apply=apply,
      ...     metrics=("value",),
      ... )
      >>> state = halve.observe(halve.init(), {"value": jnp.float32(3.0)})
      >>> float(halve.apply(state, {"learning_rate": 0.5})["learning_rate"])
      0.25
    """

    __slots__ = ()

    def __new__(
        cls,
        name: str,
        init: Callable[[], State],
        observe: ObserveFn,
        apply: Callable[[State, Mapping[str, Any]], Hyperparams],
        metrics: tuple[str, ...] = (),
    ) -> "MetaOptimizer":
        """Checks the five fields and builds the tuple."""
        if not isinstance(name, str):
            raise TypeError(f"MetaOptimizer needs a name that is a string, got {name!r}.")
        for field, function in (("init", init), ("observe", observe), ("apply", apply)):
            if not callable(function):
                raise TypeError(f"MetaOptimizer {name!r} needs a function {field}: {function!r}.")
        if isinstance(metrics, str) or not all(isinstance(metric, str) for metric in metrics):
            raise TypeError(f"MetaOptimizer {name!r} needs a tuple of names as metrics: {metrics}.")
        return super().__new__(cls, name, init, observe, apply, tuple(metrics))


def split_pair(strategy: str, name: str, metric: Any) -> tuple[Any, Bool[Array, ""]]:
    """A metric's value, and whether it arrived: the flag of a pair ``(value, flag)``, else true.

    Raises:
      TypeError: if the flag of a pair is no boolean scalar.
    """
    if not is_pair(metric):
        return metric, jnp.array(True)
    value, flag = metric
    if not is_boolean_scalar(flag):
        raise TypeError(
            f"{strategy} got the metric {name!r} as a pair whose flag is {describe_kind(flag)}. "
            f"Write {name}=(value, flag) with a boolean scalar, true where the value is new; an "
            f"array of two numbers is {name}=jnp.array([...])."
        )
    return value, jnp.asarray(flag)


def is_pair(metric: Any) -> bool:
    """Whether a metric was passed as a value and a flag."""
    return isinstance(metric, tuple) and len(metric) == 2


def is_boolean_scalar(value: Any) -> bool:
    """Whether it is true or false, traced or not."""
    is_bool = isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == jnp.bool_
    return is_bool and jnp.ndim(value) == 0


def describe_kind(value: Any) -> str:
    """What a value is, for an error: its dtype and shape, else its type."""
    if hasattr(value, "dtype"):
        return f"{value.dtype} of shape {value.shape}"
    return f"of type {type(value).__name__}"


def read_arrival(strategy: str, metrics: Metrics, names: Iterable[str]) -> Bool[Array, ""]:
    """Whether all of the metrics arrived at this step; those that were not passed count as so."""
    arrived = jnp.array(True)
    for name in names:
        arrived &= split_pair(strategy, name, metrics.get(name))[1]
    return arrived


def read_metric(strategy: str, metrics: Metrics, name: str, shape: Shape) -> Array:
    """The metric ``name`` as float32, whole on all devices, of the shape asked for if any is.

    Of a pair it is the value, which means nothing unless `read_arrival` is true.

    Raises:
      TypeError: if it was not passed or is not numeric; the message says what call to write.
      ValueError: if it has another shape.
    """
    call = f"tx.update(grads, state, params, {_HOW_TO_PASS.get(name, f'{name}={name}')})"
    if name not in metrics:
        cause = "was not passed"
        if name == "param_norm":
            cause += " and cannot be measured without params: pass those to update, or the norm"
        raise TypeError(f"{strategy} needs the metric {name!r}, which {cause}. Write {call}.")
    metric, _ = split_pair(strategy, name, metrics[name])
    try:
        value = replicate(jnp.asarray(metric).astype(jnp.float32))
    except (TypeError, ValueError) as error:
        given = type(metric).__name__
        raise TypeError(
            f"{strategy} needs the metric {name!r} as an array, got {given}. Write {call}."
        ) from error
    sizes = (None,) * shape if isinstance(shape, int) else shape
    if sizes is not None and not (
        value.ndim == len(sizes)
        and all(want in (None, got) for want, got in zip(sizes, value.shape, strict=True))
    ):
        wanted = "a scalar (take its mean first)" if not sizes else _describe(sizes)
        raise ValueError(
            f"{strategy} needs the metric {name!r} as {wanted}, got shape {value.shape}."
        )
    return value


def _describe(sizes: tuple[int | None, ...]) -> str:
    if sizes == (None,):
        return "an array of 1 dimension"
    return f"an array of shape [{', '.join('n' if n is None else str(n) for n in sizes)}]"


def read_step(strategy: str, metrics: Metrics) -> Int[Array, ""]:
    """The number of updates made before this one.

    Raises:
      TypeError: if ``metrics`` has no ``step``, which every way to act puts there.
    """
    if "step" not in metrics:
        raise TypeError(f"{strategy} needs 'step' among the metrics: the updates made before.")
    return jnp.asarray(metrics["step"]).astype(jnp.int32)


def hold_nonfinite(
    strategy: str,
    needs: Callable[[Metrics], Mapping[str, Shape]],
    observe: ObserveFn,
    accepts: Callable[[State, Metrics], Bool[Array, ""]] | None = None,
) -> ObserveFn:
    """Makes ``observe`` leave the state as it was when a needed metric is not finite.

    The wrapped function finds the metrics it needs checked, in float32; the others are passed on.
    What was held is counted in ``state.nonfinite_count``, which saturates. Where a needed metric
    did not arrive, the state stays too, and nothing is counted.

    Args:
      strategy: the strategy's name, for the errors.
      needs: what is needed of the metrics at hand: names, and the shape of each.
      observe: the transition for finite metrics.
      accepts: whether finite metrics fit the state; those that do not are held and counted too.

    Returns:
      The transition for all metrics.
    """

    def observe_fn(state: State, metrics: Metrics) -> State:
        needed = {k: read_metric(strategy, metrics, k, n) for k, n in needs(metrics).items()}
        arrived = read_arrival(strategy, metrics, needed)
        check_same_everywhere(strategy, {**needed, FLAG: arrived}, state)
        finite = jnp.array(True)
        for value in needed.values():
            finite &= jnp.all(jnp.isfinite(value))
        if accepts is not None:
            finite &= accepts(state, needed)
        held = select(finite & arrived, observe(state, {**metrics, **needed}), state)
        count = state.nonfinite_count
        counts = arrived & ~finite
        return held._replace(nonfinite_count=jnp.where(counts, optax.safe_increment(count), count))

    return observe_fn


class ProtectedState(NamedTuple):
    """The state of somebody's own strategy, and how often it was held."""

    nonfinite_count: Int[Array, ""]
    inner: State


def protect(meta: Any, caller: str) -> MetaOptimizer:
    """Gives a strategy whose state does not count held metrics the rule and the count.

    Raises:
      TypeError: if it is no strategy at all.
    """
    if not isinstance(meta, MetaOptimizer):
        name = getattr(meta, "__name__", None)
        hint = f": did you mean {name}()?" if name else "."
        raise TypeError(f"{caller} needs a MetaOptimizer, got {meta!r}{hint}")
    if hasattr(type(jax.eval_shape(meta.init)), "nonfinite_count"):
        return meta

    def init() -> ProtectedState:
        # Copies, strongly typed: the user's own array must survive donation, and no weak type
        # may cost a second trace.
        inner = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), meta.init())
        return ProtectedState(nonfinite_count=jnp.zeros([], jnp.int32), inner=inner)

    def observe(state: ProtectedState, metrics: Metrics) -> ProtectedState:
        return state._replace(inner=meta.observe(state.inner, metrics))

    def needs(metrics: Metrics) -> Mapping[str, None]:
        del metrics
        return dict.fromkeys(meta.metrics)

    def apply(state: ProtectedState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        return meta.apply(state.inner, hyperparams)

    return MetaOptimizer(
        meta.name, init, hold_nonfinite(meta.name, needs, observe), apply, meta.metrics
    )


def select(condition: Bool[Array, ""], new: State, old: State) -> State:
    """``new`` where the condition holds, else ``old``, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def is_due(step: Int[Array, ""], frequency: ArrayLike) -> Bool[Array, ""]:
    """Whether a strategy with this ``update_frequency`` sees the metrics of this step."""
    return step % jnp.asarray(frequency, jnp.int32) == 0


def observe_every(strategy: str, frequency: ArrayLike, observe: ObserveFn) -> ObserveFn:
    """Shows ``observe`` the metrics of steps 0, n, 2n, … only."""

    def observe_fn(state: State, metrics: Metrics) -> State:
        due = is_due(read_step(strategy, metrics), frequency)
        return select(due, observe(state, metrics), state)

    # Step numbers need not be there for a strategy that looks at every one.
    return observe if isinstance(frequency, int) and frequency == 1 else observe_fn


def observe_where(strategy: str, signal: str, observe: ObserveFn) -> ObserveFn:
    """Shows ``observe`` the metrics of those steps where the signal is true."""

    def observe_fn(state: State, metrics: Metrics) -> State:
        call = f"Write tx.update(grads, state, params, {signal}={signal}) with a boolean scalar."
        if signal not in metrics:
            raise TypeError(f"{strategy} needs the signal {signal!r}, which was not passed. {call}")
        flag = metrics[signal]
        if not is_boolean_scalar(flag):
            raise TypeError(
                f"{strategy} needs the signal {signal!r} as true or false, but it is "
                f"{describe_kind(flag)}. {call}"
            )
        return select(jnp.asarray(flag), observe(state, metrics), state)

    return observe_fn


def rules_of(
    strategy: str, index: Int[Array, ""], causes: Mapping[str, str], layer: int | None = None
) -> Rules:
    """The rules of a strategy, from the metric that each fires on by the rule's name."""
    texts = tuple(f"{strategy}: {cause}" for cause in causes)
    return Rules(index=index, texts=texts, metrics=tuple(causes.values()), layer=layer)


def forms(hyperparams: Mapping[str, Any], name: str) -> list[str]:
    """The keys that are ``name`` or a group's form of it, as ``gate_learning_rate`` is."""
    return [key for key in hyperparams if plain_name(key) == name]


def group_name(hyperparam: str) -> str:
    """The name of the group's form where this is that of one layer's part (``gate_3_...``)."""
    return re.sub(rf"^({'|'.join(CONTROLLED_GROUPS)})_\d+_", r"\1_", hyperparam)


def any_layer(hyperparam: str) -> str:
    """``gate_*_learning_rate`` where this is that of one layer's part, else the name itself."""
    group = group_name(hyperparam)
    return hyperparam if group == hyperparam else group.replace("_", "_*_", 1)


def layer_form(group: str, layer: int, hyperparam: str) -> str:
    """What a hyperparameter is called for the part of a group that is of one layer."""
    return f"{group}_{layer}_{hyperparam}"


def plain_name(hyperparam: str) -> str:
    """The hyperparameter's name without the prefix of a group, or of a layer's part of one."""
    form = _FORM.fullmatch(hyperparam)
    return form.group(1) if form else hyperparam


def sees(metrics: Metrics, name: str) -> bool:
    """Whether ``name`` is under control, as far as the metrics tell.

    Every way to act shows a strategy the current hyperparameters. Where it shows some and none
    is a form of ``name``, there is nothing to control, so nothing has to be measured for it.
    """
    current = forms(metrics, "learning_rate") + forms(metrics, "weight_decay")
    return not current or bool(forms(metrics, name))
