"""Control as an Optax stateful schedule, for an existing `optax.inject_hyperparams`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from meta_optax import _checks
from meta_optax._checks import Scalar
from meta_optax._control import (
    apply_safely,
    controlled,
    gather_metrics,
    layout_version,
    start_from,
)
from meta_optax._core import Hyperparams, MetaOptimizer, State, plain_name, protect


class MetaScheduleState(NamedTuple):
    """State of `as_schedule`.

    Attributes:
      layout_version: the version of this layout.
      count: the updates made, saturating.
      last: what the last update used.
      meta_state: the strategy's state.
    """

    layout_version: Int[Array, ""]
    count: Int[Array, ""]
    last: Float[Array, ""]
    meta_state: State


@dataclasses.dataclass(frozen=True)
class MetaSchedule:
    """An Optax stateful schedule; see `as_schedule`."""

    meta: MetaOptimizer
    base: Scalar | Callable[..., Any]
    hyperparam: str

    def init(self) -> MetaScheduleState:
        """The state before anything was observed."""
        count, meta_state = jnp.zeros([], jnp.int32), self.meta.init()
        base = self._base(count)
        return MetaScheduleState(
            layout_version=layout_version(),
            count=count,
            last=self._value(meta_state, base, start_from(base, plain_name(self.hyperparam))),
            meta_state=meta_state,
        )

    def update(self, state: MetaScheduleState, **extra_args: Any) -> MetaScheduleState:
        """The state after the metrics of this step."""
        meta_state = self._observe(state, extra_args)
        return state._replace(
            count=optax.safe_increment(state.count),
            last=self._value(meta_state, self._base(state.count), state.last),
            meta_state=meta_state,
        )

    def __call__(self, state: MetaScheduleState, **extra_args: Any) -> Float[Array, ""]:
        """The value for this step's update, which its metrics act on already.

        Optax calls `update` and this with the same old state, so both observe; XLA does it once.
        Without extra arguments, as Optax calls it when it initialises, nothing is observed.
        """
        meta_state = self._observe(state, extra_args) if extra_args else state.meta_state
        return self._value(meta_state, self._base(state.count), state.last)

    def _observe(self, state: MetaScheduleState, extra_args: Any) -> State:
        base = self._base(state.count)
        metrics = gather_metrics(
            self.meta,
            extra_args,
            step=state.count,
            current=self.meta.apply(state.meta_state, dict(base)),
            base=base,
        )
        return self.meta.observe(state.meta_state, metrics)

    def _base(self, count: Int[Array, ""]) -> Hyperparams:
        value = self.base(count) if callable(self.base) else self.base
        return {plain_name(self.hyperparam): jnp.asarray(value).astype(jnp.float32)}

    def _value(
        self, meta_state: State, base: Hyperparams, last: Float[Array, ""]
    ) -> Float[Array, ""]:
        names = (self.hyperparam,)
        return apply_safely(self.meta, meta_state, base, {self.hyperparam: last}, names)[
            self.hyperparam
        ]


def as_schedule(
    meta_optimizer: MetaOptimizer,
    base: Scalar | Callable[..., Any],
    hyperparam: str = "learning_rate",
) -> MetaSchedule:
    r"""What a strategy makes of one hyperparameter, as an Optax stateful schedule.

    For those who already have an `optax.inject_hyperparams`. A stateful schedule sees its own
    state and the extra arguments only, so a norm that the strategy needs has to be passed.

    Args:
      meta_optimizer: the strategy.
      base: the base value, >= 0, or an Optax schedule of it.
      hyperparam: the hyperparameter that the schedule is for. A group's form
        (``gate_learning_rate``) is what the strategy makes of the plain one with this base.

    Returns:
      A schedule with ``init()``, ``update(state, **extra_args)`` and ``__call__(state,
      **extra_args)``, to be given to `optax.inject_hyperparams` as that argument.

    Raises:
      ValueError: if the strategy does not control that hyperparameter, or if the base is
        negative or NaN.
      TypeError: from ``update``, while tracing, if a needed metric was not passed.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, optax
      >>> rate = mo.as_schedule(mo.plateau(patience=1), 0.1)
      >>> tx = optax.inject_hyperparams(optax.adamw)(learning_rate=rate)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for loss in (1.0, 1.0):
      ...     updates, state = tx.update(params, state, params, value=loss)
      >>> print(state.hyperparams["learning_rate"])
      0.05
    """
    meta = protect(meta_optimizer, "as_schedule")
    if not callable(base):
        base = _checks.real(f"the base of {hyperparam!r}", base, open_high=True)
    plain = plain_name(hyperparam)
    names = controlled(meta, {plain: jnp.zeros([], jnp.float32)})
    # What only looks on (`log_only`) controls nothing, and leaves the plain one as it is.
    if hyperparam not in names and (names or hyperparam != plain):
        raise ValueError(
            f"{meta.name} does not control {hyperparam!r}; of a schedule for it, it would set "
            f"{sorted(names)}."
        )
    return MetaSchedule(meta=meta, base=base, hyperparam=hyperparam)
