"""Protection from spikes: batches that must move neither a strategy nor the params."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from meta_optax import _checks
from meta_optax._checks import Mode, Scalar, Size, Transformation
from meta_optax._control import cast_like, layout_version, measure_norm
from meta_optax._core import (
    Hyperparams,
    MetaOptimizer,
    Metrics,
    State,
    protect,
    read_arrival,
    read_metric,
    select,
)
from meta_optax._counts import add_counts
from meta_optax._devices import FLAG, check_same_everywhere, place_like
from meta_optax._spike_watch import SpikeWatch, all_of, count_if, judge, spike_rule, start_watch

_JUDGED = ("value", "grad_norm")


class HoldSpikesState(NamedTuple):
    """State of `hold_spikes`; ``spike_count`` is how many finite spikes were hidden."""

    spike_count: Int[Array, ""]
    own_nonfinite_count: Int[Array, ""]
    watch: SpikeWatch
    inner: State

    @property
    def nonfinite_count(self) -> Int[Array, ""]:
        """How often a needed metric was not finite, hidden here or held by the strategy."""
        return add_counts(self.own_nonfinite_count, self.inner.nonfinite_count)


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      layout_version: the version of this layout.
      skipped_count: the updates dropped, for a spike or for what was not finite; saturating.
      nonfinite_count: those of them whose loss, gradients or norm were not finite.
      nonfinite_streak: the losses in a row that were not finite.
      watch: the windows over the accepted losses and norms.
      inner_state: the optimizer's state.
    """

    layout_version: Int[Array, ""]
    skipped_count: Int[Array, ""]
    nonfinite_count: Int[Array, ""]
    nonfinite_streak: Int[Array, ""]
    watch: SpikeWatch
    inner_state: Any

    @property
    def hyperparams(self) -> dict[str, Any]:
        """Those of the optimizer inside, where it has any at the top of its state."""
        # Arrays, or what a framework wraps them in, as Flax NNX does.
        return self.inner_state.hyperparams


def hold_spikes(
    meta_optimizer: MetaOptimizer,
    *,
    window: Size = 64,
    threshold: Scalar = 8.0,
    max_consecutive: Scalar = 5,
) -> MetaOptimizer:
    r"""Hides a spike of the loss or of the gradient's norm from a strategy.

    Over the last ``window`` accepted values of a metric, with MAD the median of the absolute
    distances from the median,

    .. math::
      z = \frac{x - \text{median}}{\max(1.4826 \cdot \text{MAD}, 10^{-3} \cdot |\text{median}|)}

    and a step is a spike if :math:`|z| > \text{threshold}` for ``value`` or :math:`z >
    \text{threshold}` for ``grad_norm``. A loss that is far too low is one as well: a batch of
    padding, with a loss of 0, would be a plateau's best for ever. On a spike the strategy's state
    stays as it was, and ``spike_count`` rises. So it does where one of the two is not finite, and
    ``nonfinite_count`` rises once.

    Neither spikes nor what is not finite enter the windows. Before a window holds half of what it
    can, and at least 8 values, no finite value is a spike. After ``max_consecutive`` finite spikes
    in a row the next one is taken for the new normal: it is shown, and the windows start afresh
    from it. A step between them that is not finite neither counts nor ends the row. A metric that
    did not arrive (of a pair whose flag is false) is not judged, and such a step ends no row.

    Metrics: those of the strategy, of which ``value`` and ``grad_norm`` are judged; ``grad_norm``
    only where it is there.

    Args:
      meta_optimizer: the strategy, which names one of the two metrics at least.
      window: the accepted values that a new one is compared with, an integer >= 8; of Gaussian
        noise, 64 find no spike in 10,000 steps, and 8 find twenty.
      threshold: the robust z-score from which a value is a spike, > 0; ``math.inf`` leaves only
        what is not finite.
      max_consecutive: the spikes in a row that are hidden, an integer >= 1.

    Arguments that are traced are clipped to these ranges; ``window`` must not be.

    Returns:
      A `MetaOptimizer` that acts as the strategy does.

    Raises:
      ValueError: for an argument outside its range, or a strategy that names neither metric.
      TypeError: from ``observe``, while tracing, if ``value`` is needed and was not passed.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.hold_spikes(mo.plateau(wd_increase_factor=1.0), window=8)
      >>> state = meta.init()
      >>> for loss in [1.2, 1.1, 1.3, 1.2, 1.1, 1.0, 1.1, 1.2, 0.0]:
      ...     state = meta.observe(state, {"value": loss})
      >>> print(state.inner.best, state.spike_count)
      1.0 1

    References:
      Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993: the modified z-score.
    """
    meta = protect(meta_optimizer, "hold_spikes")
    rule = spike_rule(window, threshold, max_consecutive, both_sides=("value",))
    judged = tuple(name for name in _JUDGED if name in meta.metrics)
    name = f"hold_spikes({meta.name})"
    if not judged:
        raise ValueError(
            f"hold_spikes judges 'value' and 'grad_norm', of which {meta.name} needs neither (it "
            f"needs {meta.metrics}): it has no spike to be protected from."
        )

    def init() -> HoldSpikesState:
        return HoldSpikesState(
            spike_count=jnp.zeros([], jnp.int32),
            own_nonfinite_count=jnp.zeros([], jnp.int32),
            watch=start_watch(rule, judged),
            inner=meta.init(),
        )

    def observe(state: HoldSpikesState, metrics: Metrics) -> HoldSpikesState:
        # A norm is there only where something measured it: the strategy may not need it.
        shown = [metric for metric in judged if metric == "value" or metric in metrics]
        values = {metric: read_metric(name, metrics, metric, 0) for metric in shown}
        arrived = {metric: read_arrival(name, metrics, [metric]) for metric in shown}
        check_same_everywhere(name, {**values, FLAG: all_of(arrived)}, state)
        finite = jnp.array(True)
        for metric, value in values.items():
            finite &= jnp.isfinite(value) | ~arrived[metric]
        watch, verdict = judge(rule, state.watch, values, finite, arrived)
        inner = select(verdict.is_accepted, meta.observe(state.inner, metrics), state.inner)
        return HoldSpikesState(
            spike_count=count_if(state.spike_count, verdict.is_spike),
            own_nonfinite_count=count_if(state.own_nonfinite_count, ~finite),
            watch=watch,
            inner=inner,
        )

    def apply(state: HoldSpikesState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        return meta.apply(state.inner, hyperparams)

    return MetaOptimizer(name, init, observe, apply, meta.metrics)


def skip_spikes(
    inner: Transformation,
    *,
    window: Size = 64,
    threshold: Scalar = 8.0,
    max_consecutive: Scalar = 5,
    mode: Mode = "min",
) -> optax.GradientTransformationExtraArgs:
    r"""Drops the updates of steps whose loss or gradient is a spike, around any optimizer.

    Over the last ``window`` accepted losses, and over as many global norms of the gradients, with
    MAD the median of the absolute distances from the median, a step is a spike if either has

    .. math::
      z = \frac{x - \text{median}}{\max(1.4826 \cdot \text{MAD}, 10^{-3} \cdot |\text{median}|)}
      > \text{threshold}

    Then the updates are zeros, in the dtypes of the gradients, and the state of ``inner`` stays as
    it was, to the bit: moments, counts, and a strategy's state in it. Nothing of ``inner`` is
    computed in such a step, but under ``vmap``. What the gradients' norm costs is one read of
    them; it is handed on as ``grad_norm``, so that nothing inside measures it again. Where that was
    passed, the passed one is judged and handed on, and the read serves to see that all gradients
    are finite.

    A step whose loss, gradients or norm are not finite is dropped likewise. Neither such values nor
    spikes enter the windows. Before a window holds half of what it can, and at least 8 values, no
    finite value is a spike. After ``max_consecutive`` finite spikes in a row the next one is taken
    for the new normal: it is let through, and the windows start afresh from it. After as many
    losses in a row that are not finite, the next is let through too, but does not enter the
    windows; it stays so until a loss is finite. Unlike with `optax.apply_if_finite`, gradients that
    are not finite, or whose norm is not, are never let through, however many there are in a row:
    they would destroy the params. A step of the one kind between steps of the other neither counts
    nor ends their row. Nor does a step where the loss did not arrive (of a pair whose flag is
    false), which is judged by its gradients alone.

    Goes around the whole optimizer, clips and `inject_meta_hyperparams` included: a strategy
    inside sees no dropped step, and the norm before any clip.

    Args:
      inner: the optimizer.
      window: the accepted values that a new one is compared with, an integer >= 8; of Gaussian
        noise, 64 find no spike in 10,000 steps, and 8 find twenty.
      threshold: the robust z-score from which a value is a spike, > 0; ``math.inf`` leaves only
        what is not finite.
      max_consecutive: the finite spikes, or the non-finite losses, in a row that are dropped; an
        integer >= 1.
      mode: ``"max"`` where ``value`` is better when higher, so that its spikes are downward.

    Arguments that are traced are clipped to these ranges; ``window`` must not be.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its ``update`` takes the loss as ``value``, may be
      given ``grad_norm``, and hands all extra arguments on. The state counts the dropped updates as
      ``skipped_count``, and those of them that were not finite as ``nonfinite_count``.

    Raises:
      ValueError: for an argument outside its range.
      TypeError: if ``inner`` is no transformation; from ``update``, while tracing, if ``value`` was
        not passed.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> tx = mo.skip_spikes(optax.adamw(1e-3))
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> grads = jnp.array([1.0, jnp.nan])
      >>> updates, state = tx.update(grads, state, params, value=0.5)
      >>> print(updates, state.skipped_count)
      [0. 0.] 1

    References:
      Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993: the modified z-score.
      `optax.apply_if_finite` is a relative.
    """
    if not isinstance(inner, optax.GradientTransformation):
        name = getattr(inner, "__name__", None)
        hint = f": did you mean {name}(...)?" if name else "."
        raise TypeError(f"skip_spikes needs an optax.GradientTransformation, got {inner!r}{hint}")
    sign = _checks.sign_of_mode(mode)
    rule = spike_rule(window, threshold, max_consecutive, both_sides=())
    optimizer = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> SkipSpikesState:
        state = SkipSpikesState(
            layout_version=layout_version(),
            skipped_count=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
            nonfinite_streak=jnp.zeros([], jnp.int32),
            watch=start_watch(rule, _JUDGED),
            inner_state=optimizer.init(params),
        )
        return place_like(state, params)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SkipSpikesState]:
        loss = read_metric("skip_spikes", extra_args, "value", 0)
        norm, usable = _norm_and_check(updates, extra_args)
        values = {"value": sign * loss, "grad_norm": norm}
        arrived = {name: read_arrival("skip_spikes", extra_args, [name]) for name in values}
        check_same_everywhere("skip_spikes", {**values, FLAG: all_of(arrived)}, state.watch)
        is_lost = arrived["value"] & ~jnp.isfinite(loss)
        finite = usable & ~is_lost
        watch, verdict = judge(rule, state.watch, values, finite, arrived)
        without_loss = usable & is_lost
        gives_up = without_loss & (state.nonfinite_streak >= rule.max_consecutive)
        taken = verdict.is_accepted | gives_up
        streak = count_if(state.nonfinite_streak, without_loss)

        def take() -> tuple[Any, Any]:
            metrics = {"grad_norm": norm, **extra_args}
            new_updates, inner_state = optimizer.update(
                updates, state.inner_state, params, **metrics
            )
            # Both branches must have the same dtypes, and a state those that it came with.
            return cast_like(new_updates, updates), cast_like(inner_state, state.inner_state)

        def drop() -> tuple[Any, Any]:
            return optax.tree.zeros_like(updates), state.inner_state

        new_updates, inner_state = jax.lax.cond(taken, take, drop)
        return new_updates, state._replace(
            skipped_count=count_if(state.skipped_count, ~taken),
            nonfinite_count=count_if(state.nonfinite_count, ~taken & ~finite),
            nonfinite_streak=jnp.where(verdict.is_accepted & arrived["value"], 0, streak),
            watch=watch,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _norm_and_check(grads: Any, extra_args: Metrics) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """The norm to judge by, and whether it and all gradients are finite, at one read."""
    measured = measure_norm(grads)
    norm = measured
    if "grad_norm" in extra_args:
        norm = read_metric("skip_spikes", extra_args, "grad_norm", 0)
    unusable = read_arrival("skip_spikes", extra_args, ["grad_norm"]) & ~jnp.isfinite(norm)
    # The sum of squares is finite only if each of them is, and costs less than testing each.
    return norm, jnp.isfinite(measured) & ~unusable
