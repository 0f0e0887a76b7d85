"""Accumulation of gradients over micro-batches, with the metrics of all of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from meta_optax import _checks
from meta_optax._checks import Flag, Transformation
from meta_optax._control import layout_version
from meta_optax._core import is_pair, read_arrival, read_metric
from meta_optax._devices import place_like

if TYPE_CHECKING:
    Metrics = Iterable[str] | Mapping[str, Any]
else:
    # What has another type must reach the checks here, also where types are checked at run time.
    Metrics = Any

# The metrics of which the last micro-batch's alone would be a mistake.
_KNOWN = frozenset(
    name + suffix
    for name in (
        "value",
        "grad_norm",
        "param_norm",
        "gate_entropy",
        "gate_entropy_normalized",
        "gate_sparsity",
        "expert_usage",
        "load_entropy_normalized",
        "max_violation",
        "load_cv",
        "dead_experts",
        "drop_fraction",
    )
    for suffix in ("", "_per_layer")
)
_CALLER = "multi_steps"
# What the strategies inside measure for themselves, unless they are told.
_MEASURED = "grad_norm"


class MetaMultiStepsState(NamedTuple):
    """State of `multi_steps`.

    Attributes:
      layout_version: the version of this layout.
      sums: each metric's sum over the micro-batches so far in which it arrived, float32.
      weights: how many those are, for each metric.
      multi_steps_state: the state of `optax.MultiSteps`, with the gradients so far, and the inner
        transformation's state as ``inner_opt_state``.
    """

    layout_version: Int[Array, ""]
    sums: dict[str, Float[Array, "..."]]
    weights: dict[str, Float[Array, ""]]
    multi_steps_state: Any

    @property
    def hyperparams(self) -> dict[str, Array]:
        """Those of the transformation inside, where it has any at the top of its state."""
        return self.multi_steps_state.inner_opt_state.hyperparams


def multi_steps(
    tx: Transformation,
    every_k_schedule: Any,
    *,
    metrics: Metrics = ("value",),
    use_grad_mean: Flag = True,
    should_skip_update_fn: Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates gradients over k micro-batches, and shows the mean of each metric over them.

    .. math::
      g = \frac1k \sum_{i=1}^{k} g_i, \qquad m = \frac{\sum_i w_i m_i}{\sum_i w_i}

    with :math:`w_i` 1 where the metric of micro-batch i arrived (always, unless it is a pair
    ``(value, flag)`` whose flag is false). At every k-th call the transformation inside sees
    :math:`g` and the means, as if it were called once on the whole batch; at the others the
    updates are zeros and its state stays. A pair goes on as a pair, whose flag says whether the
    metric arrived at all. A metric that is not finite in one micro-batch makes its mean so, which
    the strategies hold and count.

    It is `optax.MultiSteps`, whose traps it is without:

    - The transformation inside would see the last micro-batch's metrics alone, so a plateau would
      judge by 1 / k of the batch. Here a metric that this library knows is averaged or is an error.
    - ``optax.MultiSteps(...)``, or its ``gradient_transformation()``, does not say that it takes
      extra arguments, so `optax.chain` and others drop them, and no metric arrives. This is an
      `optax.GradientTransformationExtraArgs`.
    - The accumulated gradients are set back by a product with 0, which leaves NaN as it is: after
      one NaN, no gradients would ever be finite again. Here they are zeros after each k-th call, so
      that `skip_spikes` inside drops that one update.

    What stays: the transformation inside is computed at every call, k - 1 times for nothing, and
    the micro-batches count alike, so they should be of one size. ``grad_norm`` need not be passed,
    and unless ``metrics`` names it, what is passed (by `skip_spikes` around this) stays outside: a
    strategy that needs it measures that of the mean, which is lower than the mean of the norms.

    Args:
      tx: the transformation inside: the whole optimizer.
      every_k_schedule: the micro-batches of an update, an integer >= 1, or a function from the
        updates made so far to it.
      metrics: the names of the metrics that are averaged, all of them scalars; or a mapping from
        names to shapes, or to anything that has a shape, as ``{"value": (), "expert_usage": (8,)}``
        or ``jax.eval_shape(...)`` of a dict of metrics. Of those that are not passed, nothing is
        shown. Extra arguments not named here are the last micro-batch's, but none that this
        library knows may be among them.
      use_grad_mean: whether gradients are averaged, rather than summed; metrics always are.
      should_skip_update_fn: as for `optax.MultiSteps`, `optax.skip_not_finite` for one; the metrics
        of a micro-batch that it skips are not averaged in.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its state has the ``hyperparams`` of the state
      inside, where that has any.

    Raises:
      ValueError: for a period below 1, or a shape that is none; from ``update``, while tracing, for
        a metric of another shape, or one that this library knows and that ``metrics`` does not
        name.
      TypeError: if ``tx`` is no transformation, or ``metrics`` no collection of names.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> inner = mo.inject_meta_hyperparams(optax.sgd, mo.plateau(patience=1))(learning_rate=0.5)
      >>> tx = mo.multi_steps(inner, 2)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for loss in (1.0, 3.0, 2.0, 1.0):  # means: 2.0 and 1.5, which is better
      ...     updates, state = tx.update(params, state, params, value=loss)
      >>> print(updates, state.hyperparams["learning_rate"])
      [-0.5 -0.5] 0.5
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"multi_steps needs an optax.GradientTransformation, got {tx!r}.")
    shapes = _shapes_of(metrics)
    period: Any = every_k_schedule
    if not callable(every_k_schedule):
        period = _checks.size("every_k_schedule", every_k_schedule, low=1)
    multi = optax.MultiSteps(
        tx,
        period,
        use_grad_mean=_checks.flag("use_grad_mean", use_grad_mean),
        should_skip_update_fn=should_skip_update_fn,
    )

    def init_fn(params: Any) -> MetaMultiStepsState:
        state = MetaMultiStepsState(
            layout_version=layout_version(),
            sums={name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()},
            weights={name: jnp.zeros([], jnp.float32) for name in shapes},
            multi_steps_state=multi.init(params),
        )
        return place_like(state, params)

    def is_skipped(updates: Any, state: optax.MultiStepsState, params: Any) -> Bool[Array, ""]:
        if should_skip_update_fn is None:
            return jnp.array(False)
        return jnp.asarray(should_skip_update_fn(updates, state.gradient_step, params)[0])

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MetaMultiStepsState]:
        if _MEASURED not in shapes:
            extra_args.pop(_MEASURED, None)
        _check_names(extra_args, shapes)
        sums, weights = _add(state, extra_args, shapes)
        old = state.multi_steps_state
        shown = extra_args | _means(sums, weights, extra_args)
        new_updates, new = multi.update(updates, old, params, **shown)
        skips = is_skipped(updates, old, params)
        k: Any = period(old.gradient_step) if callable(period) else period
        emits = ~skips & (old.mini_step == k - 1)

        def keep_or_clear(before: Array, after: Array) -> Array:
            return jnp.where(skips, before, jnp.where(emits, jnp.zeros_like(after), after))

        # Zeros also where something was not finite, which a product with 0 would keep.
        new_updates = jax.tree.map(
            lambda update: jnp.where(emits, update, jnp.zeros_like(update)), new_updates
        )
        return new_updates, MetaMultiStepsState(
            layout_version=state.layout_version,
            sums=jax.tree.map(keep_or_clear, state.sums, sums),
            weights=jax.tree.map(keep_or_clear, state.weights, weights),
            multi_steps_state=new._replace(
                acc_grads=jax.tree.map(keep_or_clear, old.acc_grads, new.acc_grads)
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _add(
    state: MetaMultiStepsState, extra_args: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The sums and the weights with one more micro-batch."""
    sums, weights = dict(state.sums), dict(state.weights)
    for name in shapes.keys() & extra_args.keys():
        value = read_metric(_CALLER, extra_args, name, None)
        if value.shape != shapes[name]:
            raise ValueError(
                f"multi_steps averages the metric {name!r} of shape {shapes[name]}, got shape "
                f"{value.shape}. Write metrics={{{name!r}: {value.shape}}} with the others, or "
                "take its mean first."
            )
        arrived = read_arrival(_CALLER, extra_args, [name])
        sums[name] += jnp.where(arrived, value, 0.0)
        weights[name] += arrived.astype(jnp.float32)
    return sums, weights


def _means(
    sums: Mapping[str, Array], weights: Mapping[str, Array], extra_args: Mapping[str, Any]
) -> dict[str, Any]:
    """What the transformation inside is shown of the metrics that were passed."""
    means = {}
    for name in sums.keys() & extra_args.keys():
        mean = sums[name] / jnp.maximum(weights[name], 1.0)
        means[name] = (mean, weights[name] > 0) if is_pair(extra_args[name]) else mean
    return means


def _shapes_of(metrics: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each metric that is averaged."""
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        raise TypeError(
            "multi_steps needs names as metrics, as ('value',), or a mapping of names to shapes; "
            f"got {metrics!r}."
        )
    shapes = dict(metrics) if isinstance(metrics, Mapping) else dict.fromkeys(metrics, ())
    if strange := [name for name in shapes if not isinstance(name, str)]:
        raise TypeError(f"multi_steps needs names as metrics, got {strange[0]!r} among them.")
    return {name: _shape_of(name, shape) for name, shape in shapes.items()}


def _shape_of(name: str, given: Any) -> tuple[int, ...]:
    # Of a pair, what counts is the value.
    value = given[0] if is_pair(given) and hasattr(given[0], "shape") else given
    shape = getattr(value, "shape", value)
    if not isinstance(shape, tuple | list):
        raise ValueError(
            f"multi_steps needs the shape of the metric {name!r}, as () for a scalar or (8,) for "
            f"eight numbers, got {given!r}."
        )
    return tuple(_checks.size(f"the shape of {name!r}", size, low=0) for size in shape)


def _check_names(extra_args: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises for a known metric of which the last micro-batch's alone would be shown."""
    left = sorted((extra_args.keys() & _KNOWN) - shapes.keys())
    if left:
        name = left[0]
        named = ", ".join(f"{known!r}: {shape}" for known, shape in shapes.items())
        raise ValueError(
            f"multi_steps got the metric {name!r}, which it is not told to average: of all "
            f"micro-batches the last one's would be shown. Write multi_steps(..., metrics={{{named}"
            f"{', ' * bool(named)}{name!r}: {_shape_for_error(extra_args[name])}}})."
        )


def _shape_for_error(metric: Any) -> tuple[int, ...]:
    return jnp.shape(metric[0] if is_pair(metric) else metric)
