"""Softmax heads of linear policies, and a policy gradient no bolder than what it has seen.

One head picks one action. All share the features and the advantage; each has a prior, so that a
policy of zeros is one that mostly leaves things alone.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from meta_optax._counts import keep_room

# How likely it is, at first and without extra exploration, that a head leaves things alone.
_STILL = 0.8
# The extra temperature of the first decision, and the decisions after which half of it is left.
_HEAT, _COOLING = 1.0, 20.0
# Logits stay this near to the prior's, so that no action ever becomes impossible.
_MOST_LOGIT = 5.0
_MOST_REWARD = 3.0
# After so many rewards, one counts for at most so many deviations in their deviation.
_SEVERAL, _OUTLIER = 10, 5.0
# Of the running means of squared surpluses, and of gradients.
_SQUARES_DECAY, _GRADIENT_DECAY = 0.99, 0.98
# How many times what noise alone would leave of a mean gradient is taken for noise, and what heads
# keep of their weights at each step: without both, noise would carry them away in the end.
_CAUTION, _KEPT = 3.0, 0.997
_TINY = 1e-12


class Heads(NamedTuple):
    """An array a head, [features, actions] or [actions].

    No field has a hyperparameter's name: `optax.tree.get` would find it in place of the value.
    """

    rate_head: Float[Array, "..."]
    decay_head: Float[Array, "..."]
    gate_head: Float[Array, "..."]
    expert_head: Float[Array, "..."]


class Learner(NamedTuple):
    """What heads have learned.

    Attributes:
      weights: each head's, added to the prior of its logits.
      trace: the eligibility of past decisions.
      gradient: the running mean of gradients, not debiased.
      gradient_squares: the running mean of their squared norms, a head each.
      baseline: the running mean of rewards.
      surplus_squares: the running mean of squared surpluses.
      count: the rewards that were credited.
    """

    weights: Heads
    trace: Heads
    gradient: Heads
    gradient_squares: Float[Array, " heads"]
    baseline: Float[Array, ""]
    surplus_squares: Float[Array, ""]
    count: Int[Array, ""]


class Choice(NamedTuple):
    """A decision: what was seen, an action a head, and how likely each action was."""

    features: Float[Array, " features"]
    actions: Int[Array, " heads"]
    likely: Heads


class Pace(NamedTuple):
    """How fast to learn: the step's size, the bound on divergence, and what is kept of means."""

    rate: Any
    trust_region: Any
    baseline_decay: Any
    trace_decay: Any


def new_learner(features: int, actions: Sequence[int]) -> Learner:
    """Heads that add nothing to their priors."""

    def heads() -> Heads:
        return Heads(*(jnp.zeros([features, count], jnp.float32) for count in actions))

    # An array of its own for each: two names for one could not be donated.
    return Learner(
        weights=heads(),
        trace=heads(),
        gradient=heads(),
        gradient_squares=jnp.zeros([len(actions)], jnp.float32),
        baseline=jnp.zeros([], jnp.float32),
        surplus_squares=jnp.zeros([], jnp.float32),
        count=jnp.zeros([], jnp.int32),
    )


def prior_of(factors: Sequence[float], lean: float = 0.0) -> np.ndarray:
    """Weights [2, actions] of 1 and of the slope's score, whose logits prefer the factor 1.

    Args:
      factors: what the actions do.
      lean: by how many logits a cut is likelier, and a raise less likely, where the loss is flat:
        by twice as many where it surely rises, and by none where it surely falls.
    """
    values = np.asarray(factors, np.float32)
    still = values == 1.0
    bias = np.zeros(len(values), np.float32)
    if still.any() and not still.all():
        odds = _STILL / still.sum() / ((1.0 - _STILL) / (~still).sum())
        bias = np.where(still, math.log(odds), 0.0)
    down = lean * np.sign(1.0 - values)
    return np.stack([bias + down, down]).astype(np.float32)


def probabilities(
    weights: Heads,
    priors: Sequence[np.ndarray],
    features: Float[Array, " features"],
    decisions: Int[Array, ""],
) -> Heads:
    """How likely each action of each head is; early decisions explore more."""
    heat = 1.0 + _HEAT / (1.0 + decisions.astype(jnp.float32) / _COOLING)

    def likely(prior: Any, head: Array) -> Float[Array, " actions"]:
        added = jnp.clip(_product(features, head), -_MOST_LOGIT, _MOST_LOGIT)
        return jax.nn.softmax((_product(features[:2], prior) + added) / heat)

    return Heads(*map(likely, priors, weights))


def draw(uniform: Float[Array, ""], likely: Float[Array, " actions"]) -> Int[Array, ""]:
    """The action whose share of [0, 1) a uniform draw is in."""
    return (jnp.cumsum(likely[:-1]) <= uniform).sum().astype(jnp.int32)


def learn(
    learner: Learner,
    choice: Choice,
    surplus: Float[Array, ""],
    active: Bool[Array, " heads"],
    pace: Pace,
) -> Learner:
    """Credits a surplus to the last choice and those before, and moves the heads if they add up."""
    count = keep_room(learner.count, 1, 1) + 1
    squares, spread = _spread(learner, surplus, count)
    reward = jnp.clip(surplus / jnp.maximum(spread, _TINY), -_MOST_REWARD, _MOST_REWARD)

    def followed(old: Array, action: Array, likely: Array, is_active: Array) -> Array:
        eligible = _eligibility(choice.features, action, likely)
        return pace.trace_decay * old + jnp.where(is_active, eligible, 0.0)

    trace = Heads(*map(followed, learner.trace, choice.actions, choice.likely, active))
    now = [(reward - learner.baseline) * part for part in trace]
    gradient = Heads(
        *(_average(*pair, _GRADIENT_DECAY) for pair in zip(learner.gradient, now, strict=True))
    )
    norms = _average(
        learner.gradient_squares,
        jnp.stack([jnp.square(part).sum() for part in now]),
        _GRADIENT_DECAY,
    )
    weight = _weight(count, _GRADIENT_DECAY)

    def moved(head: Array, average: Array, squares: Array, likely: Array) -> Array:
        mean = average / weight
        share = evidence(mean, squares / weight, weight)
        move = pace.rate * share * mean
        trusted = within_trust(move, choice.features, likely, pace.trust_region * share)
        return _KEPT * head + trusted * move

    return Learner(
        weights=Heads(*map(moved, learner.weights, gradient, norms, choice.likely)),
        trace=trace,
        gradient=gradient,
        gradient_squares=norms,
        baseline=_average(learner.baseline, reward, pace.baseline_decay),
        surplus_squares=squares,
        count=count,
    )


def evidence(
    mean: Float[Array, "features actions"], squares: Float[Array, ""], weight: Float[Array, ""]
) -> Float[Array, ""]:
    r"""The positive-part James-Stein factor of a running mean: how much of it is no noise.

    .. math:: \max\left(0, 1 - \frac{c q E\|g\|^2}{\|\bar g\|^2}\right), \quad
      q = \frac{1 - \beta}{1 + \beta} \cdot \frac{2 - w}{w}

    with q the share of one gradient's variance that is left in the mean of weight w, and c = 3.
    """
    left = _CAUTION * (1.0 - _GRADIENT_DECAY) / (1.0 + _GRADIENT_DECAY) * (2.0 - weight) / weight
    return jnp.maximum(0.0, 1.0 - left * squares / jnp.maximum(jnp.square(mean).sum(), _TINY))


def within_trust(
    move: Float[Array, "features actions"],
    features: Float[Array, " features"],
    likely: Float[Array, " actions"],
    trust_region: Array,
) -> Float[Array, ""]:
    """What a move is multiplied by, at most 1, so that its divergence stays in the trust region.

    To second order, that of two softmaxes is half the variance of the difference of their logits.
    """
    logits = _product(features, move)
    variance = (likely * jnp.square(logits - (likely * logits).sum())).sum()
    return jnp.minimum(1.0, jnp.sqrt(2.0 * trust_region / jnp.maximum(variance, _TINY)))


def _spread(learner: Learner, surplus: Array, count: Array) -> tuple[Array, Array]:
    """The running mean of squared surpluses, and its root; one outlier is not let dominate it."""
    before = learner.surplus_squares / jnp.maximum(_weight(learner.count, _SQUARES_DECAY), _TINY)
    bound = jnp.where(learner.count >= _SEVERAL, _OUTLIER**2 * before, jnp.inf)
    squares = _average(learner.surplus_squares, jnp.minimum(surplus**2, bound), _SQUARES_DECAY)
    return squares, jnp.sqrt(squares / _weight(count, _SQUARES_DECAY))


def _eligibility(features: Array, action: Array, likely: Array) -> Float[Array, "features actions"]:
    """The gradient of the logarithm of an action's probability, at a temperature of 1."""
    chosen = jnp.arange(len(likely), dtype=jnp.int32) == action
    return features[:, None] * (chosen.astype(jnp.float32) - likely)[None]


def _product(features: Array, head: Any) -> Float[Array, " actions"]:
    # Products of matrices are taken in reduced precision on accelerators unless asked not to.
    return jnp.matmul(features, head, precision=jax.lax.Precision.HIGHEST)


def _average(old: Array, new: Array, kept: Any) -> Array:
    return kept * old + (1.0 - kept) * new


def _weight(count: Int[Array, ""], kept: float) -> Float[Array, ""]:
    """The weight of all that is in a running mean that began at 0."""
    return 1.0 - kept ** jnp.minimum(count, 10_000).astype(jnp.float32)
