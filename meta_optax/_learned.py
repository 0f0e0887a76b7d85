"""A policy that was trained beforehand, on thousands of short runs, to move the learning rate."""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

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
DECISIONS = 50
_FREQUENCY = 10
# The largest move of the rate's logarithm, a factor of 2, and the share of it that is no move.
MAX_MOVE = math.log(2.0)
_DEAD_ZONE = 0.1
# Below this share of the first loss the policy takes it for flat: nothing is left to gain.
_LINEAR_BELOW = 1e-3
# Raises are at most so much of a cut: to go up too far costs more than to go up late.
_RAISE_SHARE = 0.5
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
    weights: Policy | str | os.PathLike[str] | None = None,
    min_scale: Scalar = 1e-3,
    max_scale: Scalar = 30.0,
) -> MetaOptimizer:
    frequency = _frequency(horizon, update_frequency)
    steps = None if horizon is None else _checks.integer("horizon", horizon, low=1)
    bounds = _checks.scale_bounds(min_scale, max_scale)
    policy = _policy(weights)

    def init() -> LearnedState:
        return LearnedState(
            signals=empty_signals(),
            log_scale=jnp.zeros([], jnp.float32),
            last_move=jnp.zeros([], jnp.float32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def decide(state: LearnedState, step: Int[Array, ""]) -> LearnedState:
        signals = end_interval(state.signals, _LINEAR_BELOW)
        progress = None if steps is None else _progress(step, steps)
        features = read_features(read_signals(signals), state, progress)
        move = move_of(policy, features)
        if progress is not None:
            # It was never shown what comes after the horizon.
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
    reading: Reading, state: LearnedState, progress: Float[Array, ""] | None
) -> Float[Array, " features"]:
    """What the policy sees, each within [-1, 1]; of a horizon that is not known, zeros."""
    known = jnp.asarray(0.0 if progress is None else 1.0, jnp.float32)
    share = jnp.zeros([], jnp.float32) if progress is None else progress
    noise = jnp.maximum(reading.noise, 1e-4)
    fall_score = jnp.tanh(reading.fall_score / 4.0)
    last_move = state.last_move / MAX_MOVE
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
    most = jnp.where(wish > 0, _RAISE_SHARE * MAX_MOVE, MAX_MOVE)
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
    return jnp.maximum(steps // DECISIONS, 1) if isinstance(steps, Tracer) else max(steps // 50, 1)


def _policy(weights: Any) -> Policy:
    if weights is None:
        return shipped_policy(FEATURES)
    if isinstance(weights, str | os.PathLike):
        return load_policy(weights, FEATURES)
    if isinstance(weights, Policy):
        return weights
    raise ValueError(f"weights must be a path or None, got {weights!r}.")
