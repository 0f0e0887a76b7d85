"""A policy that was trained beforehand, on thousands of short runs, to move the learning rate."""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from meta_optax import _checks
from meta_optax._checks import Scalar
from meta_optax._core import (
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    forms,
    hold_nonfinite,
    is_due,
    read_step,
    rules_of,
)
from meta_optax._policy import Policy
from meta_optax._policy_file import load_policy, shipped_policy
from meta_optax._rules import copy_for_plateau
from meta_optax._signals import Reading, Signals, add_row, empty_signals, end_interval, read_signals

# Of a run whose horizon is given; and the steps from one to the next where none is.
DECISIONS = 100
_FREQUENCY = 10
# The largest moves of the rate's logarithm: what is far too high does its harm within a few steps,
# and to go up too far costs more than to go up late. And the share of them that is no move.
MAX_CUT, MAX_RAISE = math.log(4.0), math.log(1.5)
_DEAD_ZONE = 0.1
# Raises begin after as many intervals.
_LEAST_INTERVALS = 8
# Below this share of the first loss the policy takes it for flat: nothing is left to gain.
_LINEAR_BELOW = 1e-3
# Within which the rate is kept, as a multiple of the base: as logarithms.
SCALES = (math.log(1e-3), math.log(30.0))
# What the policy sees, in this order; a file of weights for others is refused.
FEATURES = (
    "horizon is known",
    "progress",
    "remaining",
    "scale",
    "slope score",
    "fall score",
    "surplus score",
    "excess",
    "excess score",
    "total fall",
    "noise",
    "grad score",
    "grad change",
    "param change",
    "param move",
    "blow-up",
    "last move",
    "last move times fall score",
)


class LearnedState(NamedTuple):
    """State of `learned`.

    Attributes:
      signals: what the run has shown.
      log_scale: the logarithm of what the base rate is multiplied by.
      last_move: by how much the last decision moved it.
      nonfinite_count: how often a needed metric was not finite.
    """

    signals: Signals
    log_scale: Float[Array, ""]
    last_move: Float[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of the learning rate."""
        rule = rules_of("learned", jnp.zeros([], jnp.int32), {"policy": "value"})
        return {"learning_rate": rule}


def learned(
    *,
    horizon: Scalar | None = None,
    update_frequency: Scalar | None = None,
    weights: Any = None,
    min_scale: Scalar = 1e-3,
    max_scale: Scalar = 30.0,
) -> MetaOptimizer:
    r"""Moves the learning rate by a policy that was trained beforehand on thousands of short runs.

    At every hundredth of the ``horizon`` (or each ``update_frequency`` steps) a perceptron of eight
    hidden units looks at eighteen features x of the run, each within [-1, 1], and says by how much
    the logarithm of the rate moves:

    .. math::
      w = \tanh(b_2 + W_2^T \tanh(b_1 + W_1^T x)), \qquad
      m = \operatorname{sign}(w) \max(|w| - 0.1, 0) \cdot
        \begin{cases} \log 4 & w < 0 \\ \log 1.5 \cdot (1 - p)^2 & w > 0\end{cases}

    .. math:: \text{lr} = \text{base} \cdot e^z, \quad
      z \leftarrow \min(\max(z + m, \log \text{min_scale}), \log \text{max_scale})

    with p the share of the horizon that has passed (0 if none is given); no raise is made at the
    first eight decisions, and no move after the horizon. The policy draws nothing: the same run
    gives the same decisions.

    The features are of rows averaged over the interval between two decisions, on a log scale, so
    that no unit of the loss moves them: whether a horizon is known, and where in it; z; the t
    statistic of the loss's slope over eight intervals; its last fall, and the fall beyond what a
    power law predicts, over their noise; how far it is above its best and below its first; the
    noise itself; the gradient norm's robust z-score and its change since the start; the change of
    the norm of the params since the first step, in the last interval, and beyond what the loss fell
    for it; the last move, and whether the loss fell after it.

    Made for AdamW on a schedule that ends near zero, which it is trained on: with a rate that is
    far off it finds a better one within a few decisions; with a tuned one it costs what the
    page in the documentation says. It knows nothing of validation losses: where a model learns its
    data by heart, the rate that is best for the training loss may not be.

    Metrics, all scalars: ``value`` (the training loss of each step), ``grad_norm``, ``param_norm``.

    Args:
      horizon: the steps of the run, an integer >= 1, if they are known: say so where you can.
      update_frequency: steps from one decision to the next, an integer >= 1; by default a hundredth
        of the horizon, or 10 where there is none.
      weights: a file that ``python -m meta_optax.metatrain`` wrote; by default what comes with the
        package.
      min_scale: the least that a base is multiplied by, in (0, 1].
      max_scale: the most, >= 1.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range, or naming the file if it holds no such weights,
        is of another version, or was changed since it was written.
      OSError: if the file cannot be read.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.learned(update_frequency=1)
      >>> state = meta.init()
      >>> for step, loss in enumerate([2.0, 9.0, 30.0, 80.0]):  # it runs away
      ...     row = {"value": loss, "grad_norm": 5.0 * loss, "param_norm": 10.0 * (step + 1)}
      ...     state = meta.observe(state, {"step": step, **row})
      >>> bool(meta.apply(state, {"learning_rate": 0.1})["learning_rate"] < 0.03)
      True

    References:
      Metz et al., "VeLO: training versatile learned optimizers by scaling up", arXiv 2211.09760.
      Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning",
      arXiv 1703.03864.
    """
    steps = None if horizon is None else _checks.integer("horizon", horizon, low=1)
    return controller(
        _policy(weights),
        horizon=steps,
        frequency=_frequency(horizon, update_frequency),
        bounds=_checks.scale_bounds(min_scale, max_scale),
    )


def controller(
    policy: Policy, *, horizon: Any, frequency: Any, bounds: Any, is_told: Any = True
) -> MetaOptimizer:
    """The strategy of checked arguments; training does not tell every run its horizon."""

    def init() -> LearnedState:
        return LearnedState(
            signals=empty_signals(),
            log_scale=jnp.zeros([], jnp.float32),
            last_move=jnp.zeros([], jnp.float32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def decide(state: LearnedState, step: Int[Array, ""]) -> LearnedState:
        signals = end_interval(state.signals, _LINEAR_BELOW)
        known = jnp.asarray(False if horizon is None else is_told)
        progress = jnp.where(known, _progress(step, 1 if horizon is None else horizon), 0.0)
        move = move_of(policy, read_features(read_signals(signals), state, known, progress))
        # What goes wrong is cut at once. A raise waits for a window's evidence (the schedule's own
        # warm-up falls in it), and one late in the run would undo the schedule's end.
        raised = jnp.where(signals.ended > _LEAST_INTERVALS, move * (1.0 - progress) ** 2, 0.0)
        move = jnp.where(move > 0.0, raised, move)
        # What comes after the horizon, the policy was never shown.
        move = jnp.where(progress < 1.0, move, 0.0)
        log_scale = jnp.clip(state.log_scale + move, *bounds)
        last_move = log_scale - state.log_scale
        return state._replace(signals=signals, log_scale=log_scale, last_move=last_move)

    def observe(state: LearnedState, metrics: Metrics) -> LearnedState:
        step = read_step("learned", metrics)
        norms = metrics["grad_norm"], metrics["param_norm"]
        state = state._replace(signals=add_row(state.signals, metrics["value"], *norms))
        due = is_due(step, frequency) & (step > 0)
        return jax.lax.cond(due, decide, _keep, state, step)

    def apply(state: LearnedState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = copy_for_plateau("learned", hyperparams)
        scale = jnp.exp(state.log_scale)
        for key in forms(hyperparams, "learning_rate"):
            out[key] = jnp.asarray(hyperparams[key]).astype(jnp.float32) * scale
        return out

    return MetaOptimizer(
        name="learned",
        init=init,
        observe=hold_nonfinite("learned", lambda metrics: dict.fromkeys(_NEEDS, 0), observe),
        apply=apply,
        metrics=_NEEDS,
    )


_NEEDS = ("value", "grad_norm", "param_norm")


def read_features(
    reading: Reading, state: LearnedState, is_known: Bool[Array, ""], share: Float[Array, ""]
) -> Float[Array, " features"]:
    """What the policy sees, each within [-1, 1]; of a horizon that is not known, zeros."""
    known = is_known.astype(jnp.float32)
    noise = jnp.maximum(reading.noise, 1e-4)
    fall_score = jnp.tanh(reading.fall_score / 4.0)
    last_move = jnp.tanh(2.0 * state.last_move)
    features = [
        known,
        known * (2.0 * share - 1.0),
        known * jnp.log(1.02 - share) / math.log(50.0),
        state.log_scale / math.log(30.0) / 2.0,
        jnp.tanh(reading.slope_score / 4.0),
        fall_score,
        jnp.tanh(reading.surplus / noise / 4.0),
        jnp.tanh(2.0 * reading.excess),
        jnp.tanh(reading.excess / noise / 8.0),
        jnp.tanh(reading.progress / 2.0),
        jnp.tanh((jnp.log(noise) + 4.0) / 3.0),
        jnp.tanh(reading.grad_score / 4.0),
        jnp.tanh(reading.grad_change / 2.0),
        jnp.tanh(reading.param_change),
        jnp.tanh(10.0 * reading.param_move),
        # Params that grow and a loss that does not fall for it.
        jnp.tanh(reading.param_change - reading.progress),
        last_move,
        last_move * fall_score,
    ]
    return jnp.clip(jnp.stack(features), -1.0, 1.0)


def move_of(policy: Policy, features: Float[Array, " features"]) -> Float[Array, ""]:
    """By how much the policy moves the logarithm of the rate; small moves are none."""
    # Products of matrices are taken in reduced precision on accelerators unless asked not to.
    highest = jax.lax.Precision.HIGHEST
    hidden = jnp.matmul(features, policy.hidden_kernel, precision=highest) + policy.hidden_bias
    output = jnp.matmul(jnp.tanh(hidden), policy.kernel, precision=highest) + policy.bias
    wish = jnp.tanh(output[0])
    most = jnp.where(wish > 0, MAX_RAISE, MAX_CUT)
    return most * jnp.sign(wish) * jnp.maximum(jnp.abs(wish) - _DEAD_ZONE, 0.0)


def _keep(state: LearnedState, *_: Any) -> LearnedState:
    """The other branch; one function, so that calls outside a jitted step compile once, too."""
    return state


def _progress(step: Int[Array, ""], steps: Any) -> Float[Array, ""]:
    whole = jnp.asarray(steps).astype(jnp.float32)
    return jnp.minimum(step.astype(jnp.float32) / whole, 1.0)


def _frequency(horizon: Any, update_frequency: Any) -> Any:
    """The steps from one decision to the next."""
    if update_frequency is not None:
        return _checks.integer("update_frequency", update_frequency, low=1)
    if horizon is None:
        return _FREQUENCY
    steps = _checks.integer("horizon", horizon, low=1)
    share = steps // DECISIONS
    return jnp.maximum(share, 1) if isinstance(share, Tracer) else max(share, 1)


def _policy(weights: Any) -> Policy:
    if weights is None:
        return shipped_policy(FEATURES)
    if isinstance(weights, str | os.PathLike):
        return load_policy(weights, FEATURES)
    if isinstance(weights, Policy):
        return weights
    raise ValueError(f"weights must be a path or None, got {weights!r}.")
