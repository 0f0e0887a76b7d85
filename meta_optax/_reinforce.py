"""A policy gradient that learns, while training runs, which change of the rates pays."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from meta_optax import _checks
from meta_optax._checks import Actions, Scalar, Size
from meta_optax._core import (
    BASE_PREFIX,
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    forms,
    hold_nonfinite,
    is_due,
    observe_every,
    read_step,
    rules_of,
    select,
)
from meta_optax._history import Window, empty_window, push
from meta_optax._policy import Policy, Samples, logits_of, new_policy, policy_loss
from meta_optax._rules import copy_for_plateau

# The bounds within which actions keep the learning rate and weight decay.
RATES, DECAYS = (1e-7, 1.0), (0.0, 1e-2)
FEATURES = 8
# The weight of the cost's fall in the reward.
_COST_WEIGHT = 0.1
# Adam's epsilon: rounding errors of a gradient that is 0 must not become whole steps.
_EPSILON = 1e-5
# Of the running mean of squared advantages, and the least that they are divided by.
_SQUARES_DECAY = 0.99
_TINY = 1e-12


class ReinforceState(NamedTuple):
    """State of `reinforce`.

    Attributes:
      draw_key: of the next draw.
      policy: the policy's weights.
      opt_state: of the policy's Adam.
      samples: the batch that the next policy update is made of.
      baseline: the running mean of scaled rewards.
      squares: the running mean of squared advantages.
      reward_count: the rewards that were credited.
      losses: the last three losses.
      grad_norms: the last three gradient norms.
      cost: the last row's cost.
      features: what the last decision saw.
      reward: what the last row paid, 0 at the first.
      action: the last decision, as its index among all pairs of a factor and a step.
      rate_scale: the product of the factors.
      added_decay: the sum of the steps.
      nonfinite_at_decision: ``nonfinite_count`` when the action was chosen.
      nonfinite_count: how often a needed metric was not finite.
    """

    draw_key: Key[Array, ""]
    policy: Policy
    opt_state: optax.OptState
    samples: Samples
    baseline: Float[Array, ""]
    squares: Float[Array, ""]
    reward_count: Int[Array, ""]
    losses: Window
    grad_norms: Window
    cost: Float[Array, ""]
    features: Float[Array, " features"]
    reward: Float[Array, ""]
    action: Int[Array, ""]
    rate_scale: Float[Array, ""]
    added_decay: Float[Array, ""]
    nonfinite_at_decision: Int[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        rules = rules_of("reinforce", jnp.zeros([], jnp.int32), {"action": "value"})
        return {"learning_rate": rules, "weight_decay": rules}


def reinforce(
    *,
    update_frequency: Scalar = 10,
    hidden_dim: Size = 32,
    lr_actions: Actions = (0.5, 1, 2),
    wd_actions: Actions = (-1e-5, 0, 1e-5),
    policy_lr: Scalar = 1e-4,
    baseline_decay: Scalar = 0.9,
    entropy_weight: Scalar = 0.01,
    reward_scale: Scalar = 1.0,
    batch_size: Size = 5,
    seed: Scalar = 0,
) -> MetaOptimizer:
    r"""Draws a change of learning rate and weight decay from a policy that learns by REINFORCE.

    At the steps 0, n, 2n, ... the policy :math:`\pi`, a perceptron of eight features of training,
    draws a pair of a factor :math:`a` and a step :math:`b`:

    .. math::
      \text{lr} \leftarrow \min(\max(a \cdot \text{lr}, 10^{-7}), 1), \quad
      \text{wd} \leftarrow \min(\max(\text{wd} + b, 0), 10^{-2})

    The action :math:`u_k` that is drawn at look k acts on the updates up to look k + 1, so the
    reward of k + 1 is what it earned, after one interval in which it can show:

    .. math::
      r_{k+1} = (\text{loss}_k - \text{loss}_{k+1}) + 0.1 (\text{cost}_k - \text{cost}_{k+1}),
      \quad A_k = \text{reward_scale} \cdot r_{k+1} - \text{baseline}

    The baseline is the mean of the scaled rewards before, with ``baseline_decay``. Advantages are
    divided by their root mean square (never re-centred, which would cancel the baseline), so that
    the weight of the entropy means the same whatever the loss. Each ``batch_size`` of them make one
    step of Adam down

    .. math:: -\operatorname{mean}_k A_k \log \pi(u_k | \text{features}_k)
      - \text{entropy_weight} \cdot \operatorname{mean}_k H(\pi(\cdot | \text{features}_k))

    The features, each kept within [-1, 1]: loss / 10; 1000 lr; grad_norm / 50; 10000 wd; cost;
    10 (loss - loss two looks ago) / 3; (grad_norm - that two looks ago) / 30; step / 1000.

    It begins with every action as likely as every other, and it takes hundreds of decisions to
    learn anything: it is the recorded strategy with its defects mended, and no advice. A rate that
    may go wrong is better left to `advanced_plateau`.

    A row that is not finite changes nothing; the reward of the next row then does not tell what the
    action did, and is dropped with its decision. The bounds limit actions, and move no base that
    is outside them. Every group's form of a hyperparameter is changed alike.

    Metrics: ``value`` (the loss) and ``grad_norm``, scalars; ``cost`` (a scalar) if it is passed.

    Args:
      update_frequency: steps from one look, and decision, to the next; an integer >= 1.
      hidden_dim: the policy's hidden units, an integer >= 1.
      lr_actions: the factors of the learning rate, each > 0; at least one. Not traced.
      wd_actions: the steps of weight decay, finite; at least one. Not traced.
      policy_lr: Adam's rate for the policy, >= 0.
      baseline_decay: what the baseline keeps at each reward, in [0, 1).
      entropy_weight: the weight of the policy's entropy, >= 0.
      reward_scale: what rewards, and so advantages beside the entropy, are multiplied by, >= 0.
      batch_size: rewards for one step of the policy, an integer >= 1.
      seed: of the policy's weights and of the draws, an integer >= 0, which may be traced.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.reinforce(lr_actions=(0.5,), wd_actions=(0,))  # nothing to choose
      >>> state = meta.observe(meta.init(), {"step": 0, "value": 1.0, "grad_norm": 1.0})
      >>> print(meta.apply(state, {"learning_rate": 0.1})["learning_rate"])
      0.05

    References:
      Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
      learning", Machine Learning 8, 1992.
    """
    frequency = _checks.integer("update_frequency", update_frequency, low=1)
    hidden = _checks.size("hidden_dim", hidden_dim, low=1)
    factors = _checks.actions("lr_actions", lr_actions, are_factors=True)
    steps = _checks.actions("wd_actions", wd_actions, are_factors=False)
    rate = _checks.real("policy_lr", policy_lr, open_high=True)
    decay = _checks.real("baseline_decay", baseline_decay, high=1.0, open_high=True)
    entropy = _checks.real("entropy_weight", entropy_weight, open_high=True)
    scale = _checks.real("reward_scale", reward_scale, open_high=True)
    batch = _checks.size("batch_size", batch_size, low=1)
    # A traced seed may use all 32 bits: a clip to int32 would make one of many.
    seed = seed if isinstance(seed, Tracer) else _checks.integer("seed", seed, low=0)
    adam = optax.adam(rate, eps=_EPSILON)

    def init() -> ReinforceState:
        key, policy_key = jax.random.split(jax.random.key(seed))
        policy = new_policy(policy_key, FEATURES, hidden, len(factors) * len(steps))
        return ReinforceState(
            draw_key=key,
            policy=policy,
            opt_state=adam.init(policy),
            samples=Samples(
                features=jnp.zeros([batch, FEATURES], jnp.float32),
                actions=jnp.zeros([batch], jnp.int32),
                advantages=jnp.zeros([batch], jnp.float32),
                count=jnp.zeros([], jnp.int32),
            ),
            baseline=jnp.zeros([], jnp.float32),
            squares=jnp.zeros([], jnp.float32),
            reward_count=jnp.zeros([], jnp.int32),
            losses=empty_window(3),
            grad_norms=empty_window(3),
            cost=jnp.zeros([], jnp.float32),
            features=jnp.zeros([FEATURES], jnp.float32),
            reward=jnp.zeros([], jnp.float32),
            action=jnp.zeros([], jnp.int32),
            rate_scale=jnp.ones([], jnp.float32),
            added_decay=jnp.zeros([], jnp.float32),
            nonfinite_at_decision=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def needs(metrics: Metrics) -> dict[str, int]:
        cost = {"cost": 0} if "cost" in metrics else {}
        return {"value": 0, "grad_norm": 0} | cost

    def learn(state: ReinforceState, reward: Float[Array, ""]) -> ReinforceState:
        """Credits the reward to the decision before; a full batch updates the policy."""
        scaled = scale * reward
        is_first = state.reward_count == 0
        baseline = jnp.where(is_first, scaled, state.baseline)
        advantage = scaled - baseline
        squares = _SQUARES_DECAY * state.squares + (1.0 - _SQUARES_DECAY) * advantage**2
        # The running mean starts at 0: what is missing of its weight is made up for.
        count = jnp.minimum(state.reward_count, 10_000) + 1
        whole = 1.0 - _SQUARES_DECAY ** count.astype(jnp.float32)
        relative = scale * advantage / jnp.maximum(jnp.sqrt(squares / whole), _TINY)
        place = jnp.minimum(state.samples.count, batch - 1)
        samples = Samples(
            features=state.samples.features.at[place].set(state.features),
            actions=state.samples.actions.at[place].set(state.action),
            advantages=state.samples.advantages.at[place].set(relative),
            count=place + 1,
        )
        learned = state._replace(
            baseline=decay * baseline + (1.0 - decay) * scaled,
            squares=squares,
            reward_count=count,
            samples=samples,
        )
        tells = jnp.isfinite(reward) & jnp.isfinite(squares)
        learned = select(tells, learned, state)
        return jax.lax.cond(learned.samples.count >= batch, update_policy, _keep, learned)

    def update_policy(state: ReinforceState) -> ReinforceState:
        grads = jax.grad(policy_loss)(state.policy, state.samples, entropy)
        # Adam's own count is an integer beside a float, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt_state = adam.update(grads, state.opt_state)
        policy = optax.apply_updates(state.policy, updates)
        new = (policy, opt_state)
        sound = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new)]).all()
        policy, opt_state = select(sound, new, (state.policy, state.opt_state))
        samples = state.samples._replace(count=jnp.zeros([], jnp.int32))
        return state._replace(policy=policy, opt_state=opt_state, samples=samples)

    def decide(state: ReinforceState, metrics: Metrics) -> ReinforceState:
        cost = metrics.get("cost", jnp.zeros([], jnp.float32))
        losses = push(state.losses, metrics["value"])
        reward = _reward(losses, state.cost, cost)
        is_credited = (losses.count > 1) & (state.nonfinite_count == state.nonfinite_at_decision)
        state = jax.lax.cond(is_credited, learn, _keep, state, reward)
        grad_norms = push(state.grad_norms, metrics["grad_norm"])
        features = _read_features(losses, grad_norms, cost, metrics)
        key, used = jax.random.split(state.draw_key)
        action = jax.random.categorical(used, logits_of(state.policy, features)).astype(jnp.int32)
        factor = jnp.asarray(factors, jnp.float32)[action // len(steps)]
        step = jnp.asarray(steps, jnp.float32)[action % len(steps)]
        return state._replace(
            draw_key=key,
            losses=losses,
            grad_norms=grad_norms,
            cost=cost,
            features=features,
            reward=jnp.where(jnp.isfinite(reward), reward, 0.0),
            action=action,
            rate_scale=_bounded_scale(state.rate_scale, factor, metrics),
            added_decay=_bounded_offset(state.added_decay, step, metrics),
            nonfinite_at_decision=state.nonfinite_count,
        )

    def observe(state: ReinforceState, metrics: Metrics) -> ReinforceState:
        names = ("learning_rate", "weight_decay")
        seen = {k: v for k, v in metrics.items() if k in (*needs(metrics), "step")}
        seen |= {k: _float(v) for k, v in metrics.items() if k.removeprefix(BASE_PREFIX) in names}
        due = is_due(read_step("reinforce", metrics), frequency)
        return jax.lax.cond(due, decide, _keep, state, seen)

    def apply(state: ReinforceState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = copy_for_plateau("reinforce", hyperparams, controls_decay=True)
        for key in forms(hyperparams, "learning_rate"):
            base = _float(hyperparams[key])
            out[key] = _within(base * state.rate_scale, base, RATES)
        for key in forms(hyperparams, "weight_decay"):
            base = _float(hyperparams[key])
            out[key] = _within(base + state.added_decay, base, DECAYS)
        return out

    return MetaOptimizer(
        name="reinforce",
        init=init,
        observe=observe_every("reinforce", frequency, hold_nonfinite("reinforce", needs, observe)),
        apply=apply,
        metrics=("value", "grad_norm"),
    )


def _keep(state: ReinforceState, *_: Any) -> ReinforceState:
    """The other branch; one function, so that calls outside a jitted step compile once, too."""
    return state


def _float(value: Any) -> Float[Array, ""]:
    return jnp.asarray(value).astype(jnp.float32)


def _read_features(
    losses: Window, grad_norms: Window, cost: Float[Array, ""], metrics: Metrics
) -> Float[Array, " features"]:
    """The eight features; a trend is 0 until three looks are held."""
    loss, grad_norm = losses.values[-1], grad_norms.values[-1]
    has_trend = losses.count >= 3
    loss_trend = jnp.where(has_trend, 10.0 * ((loss - losses.values[0]) / 3.0), 0.0)
    grad_trend = jnp.where(has_trend, (grad_norm - grad_norms.values[0]) / 3.0 / 10.0, 0.0)
    features = [
        loss / 10.0,
        1e3 * _float(metrics.get("learning_rate", 0.0)),
        grad_norm / 50.0,
        1e4 * _float(metrics.get("weight_decay", 0.0)),
        cost,
        loss_trend,
        grad_trend,
        read_step("reinforce", metrics).astype(jnp.float32) / 1e3,
    ]
    return jnp.clip(jnp.stack(features), -1.0, 1.0)


def _reward(
    losses: Window, last_cost: Float[Array, ""], cost: Float[Array, ""]
) -> Float[Array, ""]:
    fall = losses.values[-2] - losses.values[-1]
    return jnp.where(losses.count > 1, fall + _COST_WEIGHT * (last_cost - cost), 0.0)


def _within(value: Array, base: Float[Array, ""], bounds: tuple[float, float]) -> Array:
    """The value within the bounds, or no further outside than its base is."""
    low, high = bounds
    return jnp.clip(value, jnp.minimum(base, low), jnp.maximum(base, high))


def _bounded_scale(
    old: Float[Array, ""], factor: Float[Array, ""], metrics: Metrics
) -> Float[Array, ""]:
    """The scale that gives the bounded rate, so that no action is owed for what had no effect."""
    current = _float(metrics.get("learning_rate", 0.0))
    base = _float(metrics.get(f"{BASE_PREFIX}learning_rate", current / old))
    bounded = _within(base * old * factor, base, RATES) / base
    # A base of 0 has no scale: then what is kept is that of a base of 1.
    return jnp.where(base > 0, bounded, jnp.clip(old * factor, *RATES))


def _bounded_offset(
    old: Float[Array, ""], step: Float[Array, ""], metrics: Metrics
) -> Float[Array, ""]:
    current = _float(metrics.get("weight_decay", old))
    base = _float(metrics.get(f"{BASE_PREFIX}weight_decay", current - old))
    return _within(base + old + step, base, DECAYS) - base
