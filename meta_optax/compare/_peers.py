"""The rules of others that have no code in Optax, as they are, for the comparison alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from meta_optax import _checks
from meta_optax._checks import Scalar
from meta_optax._core import (
    MetaOptimizer,
    Metrics,
    Rules,
    hold_nonfinite,
    observe_every,
    rules_of,
    select,
)
from meta_optax._history import Smoothed, average_rows
from meta_optax._rules import cool_down, is_cooling
from meta_optax.compare._greedy_lr import greedy_lr
from meta_optax.compare._hypergradient import adamw_with_hypergradient
from meta_optax.compare._rates import (
    NO_RATE,
    apply_rate,
    check_choice,
    current_rate,
    empty_block,
    is_better,
    needs_value,
)

__all__ = ["adamw_with_hypergradient", "greedy_lr", "random_policy", "torch_plateau"]

# The factors of the recorded policy's actions.
_FACTORS = (0.5, 1.0, 2.0)


class TorchPlateauState(NamedTuple):
    """State of `torch_plateau`."""

    block: Smoothed
    best: Float[Array, ""]
    bad_count: Int[Array, ""]
    cooldown_count: Int[Array, ""]
    rate: Float[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        only = jnp.zeros([], jnp.int32)
        return {"learning_rate": rules_of("torch_plateau", only, {"patience": "value"})}


def torch_plateau(
    *,
    factor: Scalar = 0.1,
    patience: Scalar = 10,
    threshold: Scalar = 1e-4,
    threshold_mode: str = "rel",
    cooldown: Scalar = 0,
    min_lr: Scalar = 0.0,
    eps: Scalar = 1e-8,
    accumulation: Scalar = 1,
) -> MetaOptimizer:
    r"""The rule of PyTorch's ``ReduceLROnPlateau`` with ``mode="min"``, float32 for float64.

    With :math:`x` the mean of a block of rows, :math:`b` the best so far and :math:`n` the blocks
    since that were no better and of no cooldown,

    .. math::
      \text{better} &\iff x < b (1 - \text{threshold})
        \text{ (rel)}, \quad x < b - \text{threshold} \text{ (abs)} \\
      n > \text{patience} &\Rightarrow \text{new} = \max(\text{lr} \cdot \text{factor},
        \text{min_lr}), \; n \leftarrow 0

    and the rate becomes ``new`` if it falls by more than ``eps``. Below zero the relative test
    takes a little more for better, as the original does.

    It departs from the original in two things. A row that is not finite is counted, and changes
    nothing: there NaN and inf are bad rows, and -inf is the best for ever. A base that is a
    schedule is followed up to the first block only.

    Metrics: ``value`` (the loss, a scalar).

    Args:
      factor: what a cut multiplies the rate by, in (0, 1).
      patience: blocks without a better mean that are let pass, an integer >= 0.
      threshold: the improvement that counts as one, >= 0.
      threshold_mode: ``"rel"`` or ``"abs"``. Not traced.
      cooldown: blocks after a cut that do not count as bad, an integer >= 0.
      min_lr: the lowest rate, >= 0.
      eps: a cut by no more than this is none, >= 0.
      accumulation: rows whose mean is judged as one, an integer >= 1: the original is shown one
        row an epoch.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range.

    References:
      PyTorch, ``torch.optim.lr_scheduler.ReduceLROnPlateau``.
    """
    factor = _checks.real("factor", factor, high=1.0, open_low=True, open_high=True)
    patience = _checks.integer("patience", patience, low=0)
    threshold = _checks.real("threshold", threshold, open_high=True)
    check_choice("threshold_mode", threshold_mode, ("rel", "abs"))
    cooldown = _checks.integer("cooldown", cooldown, low=0)
    min_lr = _checks.real("min_lr", min_lr, open_high=True)
    eps = _checks.real("eps", eps, open_high=True)
    accumulation = _checks.integer("accumulation", accumulation, low=1)

    def init() -> TorchPlateauState:
        return TorchPlateauState(
            block=empty_block(),
            best=jnp.full([], jnp.inf, jnp.float32),
            bad_count=jnp.zeros([], jnp.int32),
            cooldown_count=jnp.zeros([], jnp.int32),
            rate=jnp.full([], NO_RATE, jnp.float32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def observe(state: TorchPlateauState, metrics: Metrics) -> TorchPlateauState:
        block, value, is_judged = average_rows(state.block, metrics["value"], accumulation)
        better = is_better(value, state.best, threshold, threshold_mode)
        bad = jnp.where(better, 0, optax.safe_increment(state.bad_count))
        fires = (bad > patience) & ~is_cooling(state.cooldown_count, cooldown)
        bad, left = cool_down(bad, state.cooldown_count, fires, cooldown)
        rate = current_rate(state.rate, metrics)
        lower = jnp.maximum(rate * factor, min_lr)
        judged = state._replace(
            best=jnp.where(better, value, state.best),
            bad_count=bad,
            cooldown_count=left,
            rate=jnp.where(fires & (rate - lower > eps), lower, rate),
        )
        return select(is_judged, judged, state)._replace(block=block)

    return MetaOptimizer(
        name="torch_plateau",
        init=init,
        observe=hold_nonfinite("torch_plateau", needs_value, observe),
        apply=apply_rate,
        metrics=("value",),
    )


class RandomPolicyState(NamedTuple):
    """State of `random_policy`; it needs no metric, so its ``nonfinite_count`` stays at 0."""

    key: Key[Array, ""]
    rate: Float[Array, ""]
    nonfinite_count: Int[Array, ""]


def random_policy(
    seed: Scalar = 0,
    *,
    update_frequency: Scalar = 1,
    min_lr: Scalar = 1e-7,
    max_lr: Scalar = 1.0,
) -> MetaOptimizer:
    r"""Multiplies the rate by a factor drawn from (0.5, 1, 2), each as likely as the others.

    .. math:: \text{lr} \leftarrow \min(\max(a \cdot \text{lr}, \text{min_lr}), \text{max_lr}),
      \quad a \sim \text{uniform}(0.5, 1, 2)

    at the steps 0, n, 2n, …: the learning-rate actions of the recorded ``reinforce``, unlearned.

    Args:
      seed: of the draws, an integer >= 0, which may be traced.
      update_frequency: the steps from one draw to the next, an integer >= 1.
      min_lr: the lowest rate that a draw leads to, >= 0.
      max_lr: the highest, >= 0.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range.
    """
    # A traced seed may use all 32 bits: a clip to int32 would make one of many.
    seed = seed if isinstance(seed, Tracer) else _checks.integer("seed", seed, low=0)
    frequency = _checks.integer("update_frequency", update_frequency, low=1)
    least = _checks.real("min_lr", min_lr, open_high=True)
    most = _checks.real("max_lr", max_lr, open_high=True)

    def init() -> RandomPolicyState:
        return RandomPolicyState(
            key=jax.random.key(seed),
            rate=jnp.full([], NO_RATE, jnp.float32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def observe(state: RandomPolicyState, metrics: Metrics) -> RandomPolicyState:
        key, used = jax.random.split(state.key)
        factor = jax.random.choice(used, jnp.asarray(_FACTORS, jnp.float32))
        rate = current_rate(state.rate, metrics) * factor
        return state._replace(key=key, rate=jnp.clip(rate, least, most))

    return MetaOptimizer(
        name="random_policy",
        init=init,
        observe=observe_every("random_policy", frequency, observe),
        apply=apply_rate,
    )
