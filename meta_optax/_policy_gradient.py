"""A policy gradient on scale-free signals, that moves no further than its evidence goes."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from meta_optax import _checks
from meta_optax._checks import Actions, Scalar
from meta_optax._core import (
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    forms,
    hold_nonfinite,
    is_due,
    plain_name,
    read_arrival,
    read_step,
    rules_of,
)
from meta_optax._counts import keep_room
from meta_optax._heads import (
    Choice,
    Learner,
    Pace,
    draw,
    learn,
    new_learner,
    prior_of,
    probabilities,
)
from meta_optax._rules import copy_for_plateau
from meta_optax._signals import Reading, Signals, add_row, empty_signals, end_interval, read_signals

_NEEDS = ("value", "grad_norm", "param_norm")
_MIXTURE = ("gate_entropy_normalized", "max_violation")
# What the heads move, in the order of `Heads`: a group's rates are on top of the common.
HEADS = ("learning_rate", "weight_decay", "gate_learning_rate", "expert_learning_rate")
FEATURES = 8
# Losses count by their logarithms down to this share of the first.
_LINEAR_BELOW = 1e-12
# Logits by which the prior makes a cut of the rate likelier where the loss is flat.
_LEAN = 1.0
# The cut of the rate after a loss that was not finite.
_CUT = 0.5


class PolicyGradientState(NamedTuple):
    """State of `policy_gradient`; arrays of one value a head are in the order of the heads.

    Attributes:
      draw_key: of the next draw.
      signals: what the run has shown.
      learner: the policy, and what teaches it.
      decision_count: the decisions that were made.
      choice: the last decision.
      log_scales: the logarithms of what the bases are multiplied by.
      kept_log_scales: those before the last decision.
      first_update: the logarithm of the first interval's rate times gradient norm over param norm.
      seen_loss_count: ``loss_nonfinite_count`` when it was last looked at.
      loss_nonfinite_count: how often the loss was not finite.
      nonfinite_count: how often a needed metric was not finite.
      was_rejected: whether the last move was a rejection.
    """

    draw_key: Key[Array, ""]
    signals: Signals
    learner: Learner
    decision_count: Int[Array, ""]
    choice: Choice
    log_scales: Float[Array, " heads"]
    kept_log_scales: Float[Array, " heads"]
    first_update: Float[Array, ""]
    seen_loss_count: Int[Array, ""]
    loss_nonfinite_count: Int[Array, ""]
    nonfinite_count: Int[Array, ""]
    was_rejected: Bool[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        causes = {"action": "value", "loss not finite": "value"}
        rules = rules_of("policy_gradient", self.was_rejected.astype(jnp.int32), causes)
        return dict.fromkeys(HEADS, rules)


def policy_gradient(
    *,
    update_frequency: Scalar = 10,
    horizon: Scalar | None = None,
    lr_actions: Actions = (0.7, 1, 1.4),
    wd_actions: Actions = (0.5, 1, 2),
    gate_lr_actions: Actions = (0.8, 1, 1.25),
    expert_lr_actions: Actions = (0.8, 1, 1.25),
    policy_lr: Scalar = 0.3,
    trust_region: Scalar = 0.02,
    baseline_decay: Scalar = 0.9,
    trace_decay: Scalar = 0.5,
    min_scale: Scalar = 1e-3,
    max_scale: Scalar = 30.0,
    seed: Scalar = 0,
) -> MetaOptimizer:
    r"""Learns, while training runs, which changes of the rates make the loss fall faster.

    At the steps n, 2n, ... four heads draw a factor each: of the learning rate, of weight decay
    and, where the factory was given rates of their own (``gate_learning_rate=``), of those of gates
    and experts, on top of the common factor. With :math:`x` the features, and a head's weights W
    beside those B of its prior,

    .. math:: \pi(\cdot | x) = \operatorname{softmax}\!\left(\frac{(B + W)^T x}{\tau_k}\right),
      \quad \tau_k = 1 + \frac{20}{20 + k}

    so that it explores less and less with the decisions k. The prior gives the factor 1 a
    probability of 0.8 at :math:`\tau = 1`; for the learning rate it then adds :math:`1 + z` to the
    logits of cuts, and takes it from those of raises, with z in [-1, 1] the score of the loss's
    slope: what surely falls is left alone, what is flat or rises is cut now and then. Scales stay
    within ``min_scale`` and ``max_scale`` of the base.

    The reward of a decision is the fall of the log loss in the interval after it, beyond what a
    power law of time through the eight intervals before predicts, over its running root mean
    square, within [-3, 3]. With A the reward above the running mean of rewards,

    .. math::
      e_k = \text{trace_decay} \cdot e_{k-1} + x_k (1_{u_k} - \pi)^T, \quad g_k = A_k e_k, \quad
      W \leftarrow 0.997 W + \min\!\left(1, \sqrt{\frac{\text{trust_region} \cdot s_k}{D_k}}\right)
      \text{policy_lr} \cdot s_k \bar g_k

    with :math:`\bar g` the running mean of gradients (over some 50 decisions) and D the divergence
    that the step would cause. The share of evidence s, in [0, 1], is the positive-part James-Stein
    factor of :math:`\bar g` against three times its sampling noise: while the advantage's
    signal-to-noise is low it is 0, the trust region has no width, and the policy goes back to its
    prior.

    A loss that is not finite leaves the state as it was. The next row that is finite takes the last
    action back and halves the rate, and the interval is not credited. A gradient norm that is not
    finite is counted, and no more.

    The features, each within [-1, 1]: 1; the score of the slope of the log loss, tanh(t / 2) of its
    t statistic, and -1 before there is one; the log of the rate over its base; progress, if a
    ``horizon`` is given; the robust z-score of the gradient norm; the log of rate times gradient
    norm over params norm, since the first interval; the routers' normalized entropy and MaxVio, if
    they are passed.

    A run has tens or hundreds of decisions, and its losses are noisy: mostly there is little to
    learn from, and what acts is the prior. On a loss without slope that takes the rate to a
    thousandth in some 85 decisions: let ``update_frequency`` be about a hundredth of the run, or
    raise ``min_scale``. A rate far off is better left to `advanced_plateau`.

    Metrics, all scalars: ``value`` (the loss), ``grad_norm`` and ``param_norm``;
    ``gate_entropy_normalized`` and ``max_violation`` if they are passed.

    Args:
      update_frequency: steps from one decision to the next, an integer >= 1.
      horizon: the steps of the run, an integer >= 1, if they are known.
      lr_actions: the factors of the learning rate, each > 0; at least one. Not traced.
      wd_actions: those of weight decay.
      gate_lr_actions: those of the gates' rates.
      expert_lr_actions: those of the experts' rates.
      policy_lr: the size of the policy's steps, >= 0; 0 is a policy that never learns.
      trust_region: the most that one step may diverge, in nats, >= 0.
      baseline_decay: what the baseline keeps at each reward, in [0, 1).
      trace_decay: what a decision's eligibility keeps at each later one, in [0, 1).
      min_scale: the least that a base is multiplied by, in (0, 1].
      max_scale: the most, >= 1. A group's rate is multiplied by two scales.
      seed: of the draws, an integer >= 0, which may be traced.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.policy_gradient(update_frequency=1, lr_actions=(0.5,))  # nothing to choose
      >>> state = meta.init()
      >>> for step in range(3):
      ...     row = {"value": 1.0, "grad_norm": 1.0, "param_norm": 1.0}
      ...     state = meta.observe(state, {"step": step, **row})
      >>> print(meta.apply(state, {"learning_rate": 0.4})["learning_rate"])
      0.1

    References:
      Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
      learning", Machine Learning 8, 1992. James and Stein, "Estimation with quadratic loss", 1961.
    """
    frequency = _checks.integer("update_frequency", update_frequency, low=1)
    steps = None if horizon is None else _checks.integer("horizon", horizon, low=1)
    named = {"lr_actions": lr_actions, "wd_actions": wd_actions}
    named |= {"gate_lr_actions": gate_lr_actions, "expert_lr_actions": expert_lr_actions}
    sets = tuple(_checks.actions(name, values, are_factors=True) for name, values in named.items())
    pace = Pace(
        rate=_checks.real("policy_lr", policy_lr, open_high=True),
        trust_region=_checks.real("trust_region", trust_region, open_high=True),
        baseline_decay=_checks.real("baseline_decay", baseline_decay, high=1.0, open_high=True),
        trace_decay=_checks.real("trace_decay", trace_decay, high=1.0, open_high=True),
    )
    bounds = _checks.scale_bounds(min_scale, max_scale)
    # A traced seed may use all 32 bits: a clip to int32 would make one of many.
    seed = seed if isinstance(seed, Tracer) else _checks.integer("seed", seed, low=0)
    priors = (prior_of(sets[0], _LEAN), *map(prior_of, sets[1:]))
    moves = tuple(np.log(values).astype(np.float32) for values in sets)

    def init() -> PolicyGradientState:
        learner = new_learner(FEATURES, list(map(len, sets)))
        features = jnp.zeros([FEATURES], jnp.float32)
        start = jnp.zeros([], jnp.int32)
        return PolicyGradientState(
            draw_key=jax.random.key(seed),
            signals=empty_signals(),
            learner=learner,
            decision_count=jnp.zeros([], jnp.int32),
            choice=Choice(
                features=features,
                actions=jnp.zeros([len(HEADS)], jnp.int32),
                likely=probabilities(learner.weights, priors, features, start),
            ),
            log_scales=jnp.zeros([len(HEADS)], jnp.float32),
            kept_log_scales=jnp.zeros([len(HEADS)], jnp.float32),
            first_update=jnp.zeros([], jnp.float32),
            seen_loss_count=jnp.zeros([], jnp.int32),
            loss_nonfinite_count=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
            was_rejected=jnp.array(False),
        )

    def credit(state: PolicyGradientState, surplus: Array, active: Array) -> PolicyGradientState:
        return state._replace(learner=learn(state.learner, state.choice, surplus, active, pace))

    def decide(
        state: PolicyGradientState, step: Array, seen: Metrics, active: Array
    ) -> PolicyGradientState:
        signals = end_interval(state.signals, _LINEAR_BELOW)
        reading = read_signals(signals)
        update = _log_update(signals, seen)
        state = state._replace(
            signals=signals, first_update=jnp.where(signals.ended > 1, state.first_update, update)
        )
        can_tell = (signals.ended > 1) & (state.decision_count > 0) & ~state.was_rejected
        state = jax.lax.cond(can_tell, credit, _keep, state, reading.surplus, active)
        progress = jnp.zeros([], jnp.float32) if steps is None else _progress(step, steps)
        features = _read_features(reading, state, update, progress, seen)
        key, used = jax.random.split(state.draw_key)
        likely = probabilities(state.learner.weights, priors, features, state.decision_count)
        drawn = jax.random.uniform(used, [len(HEADS)], jnp.float32)
        actions = [draw(uniform, p) for uniform, p in zip(drawn, likely, strict=True)]
        moved = jnp.stack([jnp.asarray(m)[a] for m, a in zip(moves, actions, strict=True)])
        log_scales = state.log_scales + jnp.where(active, moved, 0.0)
        return state._replace(
            draw_key=key,
            decision_count=keep_room(state.decision_count, 1, 1) + 1,
            choice=Choice(features=features, actions=jnp.stack(actions), likely=likely),
            log_scales=jnp.clip(log_scales, *bounds),
            kept_log_scales=state.log_scales,
            was_rejected=jnp.array(False),
        )

    def reject(state: PolicyGradientState) -> PolicyGradientState:
        """Takes the last action back, and cuts the rate."""
        cut = jnp.asarray([math.log(_CUT), 0.0, 0.0, 0.0], jnp.float32)
        return state._replace(
            log_scales=jnp.clip(state.kept_log_scales + cut, *bounds),
            kept_log_scales=jnp.clip(state.kept_log_scales + cut, *bounds),
            seen_loss_count=state.loss_nonfinite_count,
            was_rejected=jnp.array(True),
        )

    def observe_finite(state: PolicyGradientState, metrics: Metrics) -> PolicyGradientState:
        step = read_step("policy_gradient", metrics)
        norms = metrics["grad_norm"], metrics["param_norm"]
        state = state._replace(signals=add_row(state.signals, metrics["value"], *norms))
        was_bad = state.loss_nonfinite_count != state.seen_loss_count
        state = jax.lax.cond(was_bad, reject, _keep, state)
        seen = {name: _float(metrics[name]) for name in _MIXTURE if name in metrics}
        seen["learning_rate"] = _float(metrics.get("learning_rate", 1.0))
        due = is_due(step, frequency) & (step > 0)
        return jax.lax.cond(due, decide, _keep, state, step, seen, _active(metrics))

    def needs(metrics: Metrics) -> dict[str, int]:
        return dict.fromkeys((*_NEEDS, *(n for n in _MIXTURE if n in metrics)), 0)

    held = hold_nonfinite("policy_gradient", needs, observe_finite)

    def observe(state: PolicyGradientState, metrics: Metrics) -> PolicyGradientState:
        after = held(state, metrics)
        is_new = read_arrival("policy_gradient", metrics, _NEEDS)
        value = metrics["value"][0] if isinstance(metrics["value"], tuple) else metrics["value"]
        is_bad = is_new & ~jnp.isfinite(jnp.asarray(value).astype(jnp.float32))
        count = state.loss_nonfinite_count
        return after._replace(
            loss_nonfinite_count=jnp.where(is_bad, keep_room(count, 1, 1) + 1, count)
        )

    def apply(state: PolicyGradientState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = copy_for_plateau("policy_gradient", hyperparams, controls_decay=True)
        scales = jnp.exp(state.log_scales)
        for key in forms(hyperparams, "learning_rate"):
            own = [scales[i] for i, head in enumerate(HEADS) if i > 1 and _is_of(key, head)]
            out[key] = _float(hyperparams[key]) * math.prod(own, start=scales[0])
        for key in forms(hyperparams, "weight_decay"):
            out[key] = _float(hyperparams[key]) * scales[1]
        return out

    return MetaOptimizer(
        name="policy_gradient", init=init, observe=observe, apply=apply, metrics=_NEEDS
    )


def _keep(state: PolicyGradientState, *_: Any) -> PolicyGradientState:
    """The other branch; one function, so that calls outside a jitted step compile once, too."""
    return state


def _float(value: Any) -> Float[Array, ""]:
    return jnp.asarray(value).astype(jnp.float32)


def _active(metrics: Metrics) -> Bool[Array, " heads"]:
    """Which heads have anything to move, as far as the current hyperparameters tell."""
    common = [bool(forms(metrics, name)) for name in HEADS[:2]]
    groups = [any(_is_of(key, head) for key in metrics) for head in HEADS[2:]]
    is_dark = not any((*common, *groups))
    return jnp.asarray([True, True, False, False] if is_dark else [*common, *groups])


def _is_of(key: str, head: str) -> bool:
    """Whether a hyperparameter is the group's form that a head moves, or one layer's part."""
    group = head.partition("_")[0]
    return key.startswith(f"{group}_") and plain_name(key) == "learning_rate"


def _progress(step: Int[Array, ""], steps: Any) -> Float[Array, ""]:
    share = step.astype(jnp.float32) / jnp.asarray(steps).astype(jnp.float32)
    return 2.0 * jnp.minimum(share, 1.0) - 1.0


def _log_update(signals: Signals, seen: Metrics) -> Float[Array, ""]:
    """The logarithm of rate times gradient norm over the params' norm, of the last interval."""
    norms = signals.grad_norms.values[-1] - signals.param_norms[-1]
    # A schedule of the user's may give anything, and a NaN would never leave the policy.
    rate = jnp.nan_to_num(seen["learning_rate"], nan=1.0)
    return jnp.log(jnp.clip(rate, 1e-30, 1e30)) + norms


def _read_features(
    reading: Reading, state: PolicyGradientState, update: Array, progress: Array, seen: Metrics
) -> Float[Array, " features"]:
    """What the policy sees, each within [-1, 1]; 0 of what was not passed."""
    entropy = 2.0 * seen["gate_entropy_normalized"] - 1.0 if _MIXTURE[0] in seen else 0.0
    violation = jnp.tanh(seen["max_violation"] / 2.0) if _MIXTURE[1] in seen else 0.0
    # Two intervals have no slope with an error: until there is one the loss is taken to fall, or
    # the prior would cut what it knows nothing of.
    slope = jnp.where(state.signals.ended > 2, jnp.tanh(reading.slope_score / 2.0), -1.0)
    features = [
        jnp.ones([], jnp.float32),
        slope,
        state.log_scales[0] / math.log(30.0),
        progress,
        jnp.tanh(reading.grad_score / 4.0),
        jnp.tanh((update - state.first_update) / 2.0),
        jnp.asarray(entropy, jnp.float32),
        jnp.asarray(violation, jnp.float32),
    ]
    return jnp.clip(jnp.stack(features), -1.0, 1.0)
