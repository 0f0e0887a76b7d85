"""The short runs that a policy is trained on: three families of tasks, and what goes wrong in them.

All is real training of small models on data that comes with scikit-learn and Python, but for the
streams of regression, whose data is drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

import meta_optax as mo
from meta_optax._learned import LearnedState
from meta_optax._policy import Policy
from meta_optax.compare import _data, _models
from meta_optax.compare._arms import WARMUP
from meta_optax.compare.corpora import load_corpus

Params = Any
# The largest batch; smaller ones are the first rows of it.
_ROWS = 64
# Of the language family: bytes seen to predict the next one.
_CONTEXT = 6
_LENGTH, _KEPT = 32, 24
# Multiples of the tuned rate, log-uniform within each: near it, too low and too high.
MULTIPLES = {"near": (0.5, 2.0), "low": (0.02, 0.5), "high": (2.0, 40.0)}
_LOSS_SCALES = (1e-2, 1e2)
_SPIKE_SCALE, _SPIKE_LENGTH = 30.0, 0.01


class Trouble(NamedTuple):
    """What is special about a run; all but the key scalars.

    Attributes:
      key: of its weights and batches.
      multiple: its base rate, as a multiple of the family's tuned one.
      loss_scale: what its loss, and so its gradients, are multiplied by.
      rows: of its batches.
      noise: the share of its labels that are drawn at random.
      spike_at: when inputs are thirty times too large, as a share of the run; above 1 never.
      shift_at: when inputs are turned over, they and those kept back; above 1 never.
      blind: whether the policy is not told the horizon.
    """

    key: Key[Array, ""]
    multiple: Float[Array, ""]
    loss_scale: Float[Array, ""]
    rows: Int[Array, ""]
    noise: Float[Array, ""]
    spike_at: Float[Array, ""]
    shift_at: Float[Array, ""]
    blind: Array


class Batch(NamedTuple):
    """Inputs and targets, and the weight of each row."""

    inputs: Any
    targets: Any
    weights: Float[Array, " rows"]


class Family(NamedTuple):
    """A kind of task.

    Attributes:
      rate: AdamW's best rate on a linear schedule over 400 steps, from quasi-random trials.
      init: from a key to params.
      sample: from a key to inputs and targets; targets may be replaced by those of other rows.
      loss: from params, inputs and targets to each row's loss.
      held_out: what is kept back, inputs and targets, from the key of the run.
    """

    rate: float
    init: Callable[[Array], Params]
    sample: Callable[[Array, Array], tuple[Any, Any]]
    loss: Callable[[Params, Any, Any], Float[Array, " rows"]]
    held_out: Callable[[Array], tuple[Any, Any]]


def draw_trouble(key: Key[Array, ""], kind: Int[Array, ""]) -> Trouble:
    """A run's circumstances.

    Args:
      key: of the draws.
      kind: which of `MULTIPLES` the rate is in.
    """
    keys = iter(jax.random.split(key, 12))

    def log_uniform(low: Any, high: Any) -> Array:
        low, high = jnp.log(low), jnp.log(high)
        return jnp.exp(jax.random.uniform(next(keys), (), minval=low, maxval=high))

    def at_times(share: float) -> Array:
        happens = jax.random.bernoulli(next(keys), share)
        return jnp.where(happens, jax.random.uniform(next(keys), minval=0.1, maxval=0.8), 2.0)

    return Trouble(
        key=next(keys),
        multiple=log_uniform(*jnp.asarray(list(MULTIPLES.values()))[kind]),
        loss_scale=log_uniform(*_LOSS_SCALES),
        rows=log_uniform(4.0, _ROWS + 0.999).astype(jnp.int32),
        noise=jnp.maximum(jax.random.uniform(next(keys), minval=-0.6, maxval=0.3), 0.0),
        spike_at=at_times(0.15),
        shift_at=at_times(0.15),
        blind=jax.random.bernoulli(next(keys), 0.1),
    )


def run(family: Family, policy: Policy, trouble: Trouble, horizon: Int[Array, ""]) -> Array:
    """Trains to the end, and gives the log of the loss on what was kept back.

    Args:
      family: what is trained.
      policy: the weights of `meta_optax.learned`; those of zeros leave the linear schedule alone.
      trouble: the circumstances.
      horizon: the steps, the same for all runs that are trained at once.

    Returns:
      The log of the final loss; of a run that diverged, that of twice the loss at the start.
    """
    init_key, data_key = jax.random.split(trouble.key)
    strategy = _sometimes_blind(policy, trouble.blind, horizon)
    inject = mo.inject_meta_hyperparams(optax.adamw, strategy)
    rate = family.rate * trouble.multiple
    tx = inject(learning_rate=lambda count: rate * linear(count, horizon), weight_decay=1e-4)
    params = family.init(init_key)

    def loss_fn(params: Params, batch: Batch) -> Array:
        losses = family.loss(params, batch.inputs, batch.targets)
        return trouble.loss_scale * (losses * batch.weights).sum() / batch.weights.sum()

    def step(count: Array, carry: tuple[Params, Any]) -> tuple[Params, Any]:
        params, state = carry
        batch = _draw_batch(family, jax.random.fold_in(data_key, count), trouble, count / horizon)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    def measure(params: Params, is_turned: Array) -> Array:
        inputs, targets = family.held_out(trouble.key)
        inputs = jnp.where(is_turned, -inputs, inputs)
        return family.loss(params, inputs, targets).mean()

    first = measure(params, jnp.array(False))
    params, _ = jax.lax.fori_loop(0, horizon, step, (params, tx.init(params)))
    last = measure(params, trouble.shift_at <= 1.0)
    worst = 2.0 * first
    return jnp.log(jnp.where(jnp.isfinite(last), jnp.minimum(last, worst), worst))


def linear(count: Array, horizon: Array) -> Array:
    """The comparison's linear schedule, of a horizon that may be traced, as a share of the rate."""
    rise = jnp.maximum(jnp.round(WARMUP * horizon), 1.0)
    return jnp.minimum((count + 1.0) / rise, (horizon - count) / (horizon - rise))


def _sometimes_blind(policy: Policy, blind: Array, horizon: Array) -> mo.MetaOptimizer:
    """The strategy, of which some lanes are not told how long they run."""
    frequency = jnp.maximum(horizon // 50, 1)
    sighted = mo.learned(weights=policy, horizon=horizon, update_frequency=frequency)
    unsighted = mo.learned(weights=policy, update_frequency=frequency)

    def observe(state: LearnedState, metrics: Any) -> LearnedState:
        told, untold = sighted.observe(state, metrics), unsighted.observe(state, metrics)
        return jax.tree.map(lambda a, b: jnp.where(blind, b, a), told, untold)

    return sighted._replace(observe=observe)


def _draw_batch(family: Family, key: Array, trouble: Trouble, share: Array) -> Batch:
    keys = jax.random.split(key, 3)
    inputs, targets = family.sample(keys[0], trouble.key)
    others = jax.random.permutation(keys[1], targets)
    is_noise = jax.random.bernoulli(keys[2], trouble.noise, (_ROWS,))
    is_noise = is_noise.reshape(-1, *[1] * (targets.ndim - 1))
    in_spike = (share >= trouble.spike_at) & (share < trouble.spike_at + _SPIKE_LENGTH)
    inputs = inputs * jnp.where(in_spike, _SPIKE_SCALE, 1.0)
    return Batch(
        inputs=jnp.where(share >= trouble.shift_at, -inputs, inputs),
        targets=jnp.where(is_noise, others, targets),
        weights=(jnp.arange(_ROWS) < trouble.rows).astype(jnp.float32),
    )


def _cross_entropy(forward: Callable[[Params, Any], Array]) -> Any:
    return lambda params, inputs, labels: optax.losses.softmax_cross_entropy_with_integer_labels(
        forward(params, inputs), labels
    )


def _digits() -> Family:
    """A perceptron 64-24-10 on scikit-learn's digits."""
    train, kept = jax.tree.map(jnp.asarray, _data.digits())

    def sample(key: Array, run_key: Array) -> tuple[Array, Array]:
        del run_key
        rows = jax.random.randint(key, (_ROWS,), 0, len(train.labels))
        return train.inputs[rows], train.labels[rows]

    return Family(
        rate=0.02,
        init=lambda key: _models.init_mlp(key, 64, 24, 10),
        sample=sample,
        loss=_cross_entropy(_models.mlp),
        held_out=lambda key: (kept.inputs, kept.labels),
    )


def _bytes() -> Family:
    """The next byte of Python's language reference from six before it, as bits, by a perceptron."""
    split = load_corpus("prose", _LENGTH, _KEPT)
    train, kept = (jnp.asarray(_windows(part)) for part in (split.train[:4096], split.held_out))

    def bits(windows: Array) -> tuple[Array, Array]:
        numbers = jnp.minimum(windows.astype(jnp.int32), _models.ALPHABET - 1)
        signs = ((numbers[:, :-1, None] >> jnp.arange(7)) & 1) * 2.0 - 1.0
        return signs.reshape(len(windows), -1), numbers[:, -1]

    def sample(key: Array, run_key: Array) -> tuple[Array, Array]:
        del run_key
        return bits(train[jax.random.randint(key, (_ROWS,), 0, len(train))])

    return Family(
        rate=0.02,
        init=lambda key: _models.init_mlp(key, 7 * _CONTEXT, 32, _models.ALPHABET),
        sample=sample,
        loss=_cross_entropy(_models.mlp),
        held_out=lambda key: bits(kept),
    )


def _windows(chunks: np.ndarray) -> np.ndarray:
    """All windows of context and next byte within the chunks, a fifth of them."""
    windows = np.lib.stride_tricks.sliding_window_view(chunks, _CONTEXT + 1, axis=1)
    return np.ascontiguousarray(windows[:, ::5].reshape(-1, _CONTEXT + 1))


def _regression() -> Family:
    """Linear regression on a stream, of curvatures 1 to 1/24, with noise of variance 0.1."""
    size = 24
    roots = jnp.sqrt(1.0 / jnp.arange(1.0, size + 1.0))

    def draw(key: Array, run_key: Array, rows: int) -> tuple[Array, Array]:
        features_key, noise_key = jax.random.split(key)
        truth = jax.random.normal(jax.random.fold_in(run_key, 1), (size,))
        features = jax.random.normal(features_key, (rows, size)) * roots
        return features, features @ truth + 0.3 * jax.random.normal(noise_key, (rows,))

    def loss(params: Params, features: Array, targets: Array) -> Array:
        return 0.5 * jnp.square(features @ params["theta"] - targets)

    return Family(
        rate=0.06,
        init=lambda key: {"theta": jnp.zeros(size)},
        sample=lambda key, run_key: draw(key, run_key, _ROWS),
        loss=loss,
        held_out=lambda key: draw(jax.random.fold_in(key, 2), key, 256),
    )


FAMILIES: dict[str, Callable[[], Family]] = {
    "digits": _digits,
    "bytes": _bytes,
    "regression": _regression,
}
