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
from meta_optax._learned import DECISIONS, SCALES, controller
from meta_optax._policy import Policy
from meta_optax.compare import _data, _models
from meta_optax.compare._arms import WARMUP
from meta_optax.compare.corpora import load_corpus

Params = Any
# The largest batch; smaller ones are the first rows of it.
_ROWS = 32
# Of the language family: bytes seen to predict the next one.
_CONTEXT = 4
# The classes are their lowest five bits, which upper and lower case share.
_CLASSES = 32
# The samples that runs learn from, log-uniform: a few are soon known by heart.
_FEWEST, _MOST = 100, 4096
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
      samples: how many it learns from, where there are as many.
      noise: the share of its labels that are drawn at random.
      spike_at: when inputs are thirty times too large, as a share of the run; above 1 never.
      shift_at: when inputs are turned over, they and those kept back; above 1 never.
      blind: whether the policy is not told the horizon.
    """

    key: Key[Array, ""]
    multiple: Float[Array, ""]
    loss_scale: Float[Array, ""]
    rows: Int[Array, ""]
    samples: Int[Array, ""]
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
      rate: AdamW's tuned rate on a linear schedule over 500 steps, of which a third costs about as
        much as three times it.
      init: from a key to params.
      sample: from random numbers in [0, 1), one a row, and the run's key, to inputs and targets;
        targets may be replaced by those of other rows.
      loss: from params, inputs and targets to each row's loss.
      held_out: what is kept back, inputs and targets, from the key of the run.
    """

    rate: float
    init: Callable[[Array], Params]
    sample: Callable[[Array, Trouble], tuple[Any, Any]]
    loss: Callable[[Params, Any, Any], Float[Array, " rows"]]
    held_out: Callable[[Array], tuple[Any, Any]]


def draw_trouble(key: Key[Array, ""], kind: Int[Array, ""]) -> Trouble:
    """A run's circumstances.

    Args:
      key: of the draws.
      kind: which of `MULTIPLES` the rate is in.
    """
    keys = iter(jax.random.split(key, 13))

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
        samples=log_uniform(float(_FEWEST), float(_MOST)).astype(jnp.int32),
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
    strategy = controller(
        policy,
        horizon=horizon,
        frequency=jnp.maximum(horizon // DECISIONS, 1),
        bounds=SCALES,
        is_told=~trouble.blind,
    )
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


def _draw_batch(family: Family, key: Array, trouble: Trouble, share: Array) -> Batch:
    drawn = jax.random.uniform(key, (2, _ROWS))
    inputs, targets = family.sample(drawn[0], trouble)
    is_noise = (drawn[1] < trouble.noise).reshape(-1, *[1] * (targets.ndim - 1))
    in_spike = (share >= trouble.spike_at) & (share < trouble.spike_at + _SPIKE_LENGTH)
    inputs = inputs * jnp.where(in_spike, _SPIKE_SCALE, 1.0)
    return Batch(
        inputs=jnp.where(share >= trouble.shift_at, -inputs, inputs),
        targets=jnp.where(is_noise, jnp.roll(targets, 1, axis=0), targets),
        weights=(jnp.arange(_ROWS) < trouble.rows).astype(jnp.float32),
    )


def _cross_entropy(forward: Callable[[Params, Any], Array]) -> Any:
    return lambda params, inputs, labels: optax.losses.softmax_cross_entropy_with_integer_labels(
        forward(params, inputs), labels
    )


def _digits() -> Family:
    """A perceptron 16-16-16-10 on scikit-learn's digits, of a quarter of the pixels' number."""

    def shrink(images: Any) -> np.ndarray:
        return np.asarray(images).reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)

    train, kept = (
        _data.Labelled(jnp.asarray(shrink(part.inputs)), jnp.asarray(part.labels))
        for part in _data.digits()
    )

    def sample(drawn: Array, trouble: Trouble) -> tuple[Array, Array]:
        rows = _pick(drawn, jnp.minimum(trouble.samples, len(train.labels)))
        return train.inputs[rows], train.labels[rows]

    return Family(
        rate=0.08,
        init=lambda key: _models.init_mlp(key, 16, 16, 16, 10),
        sample=sample,
        loss=_cross_entropy(_models.mlp),
        held_out=lambda key: (kept.inputs, kept.labels),
    )


def _bytes() -> Family:
    """The next letter of Python's language reference from four bytes, as bits; a perceptron."""
    split = load_corpus("prose", _LENGTH, _KEPT)
    train, kept = (jnp.asarray(_windows(part)) for part in (split.train[:_MOST], split.held_out))

    def bits(windows: Array) -> tuple[Array, Array]:
        numbers = windows.astype(jnp.int32)
        signs = ((numbers[:, :-1, None] >> jnp.arange(7)) & 1) * 2.0 - 1.0
        return signs.reshape(len(windows), -1), numbers[:, -1] % _CLASSES

    def sample(drawn: Array, trouble: Trouble) -> tuple[Array, Array]:
        return bits(train[_pick(drawn, jnp.minimum(8 * trouble.samples, len(train)))])

    return Family(
        rate=0.025,
        init=lambda key: _models.init_mlp(key, 7 * _CONTEXT, 16, 16, _CLASSES),
        sample=sample,
        loss=_cross_entropy(_models.mlp),
        held_out=lambda key: bits(kept),
    )


def _windows(chunks: np.ndarray) -> np.ndarray:
    """All windows of context and next byte within the chunks, a seventh of them."""
    windows = np.lib.stride_tricks.sliding_window_view(chunks, _CONTEXT + 1, axis=1)
    return np.ascontiguousarray(windows[:, ::7].reshape(-1, _CONTEXT + 1))


def _regression() -> Family:
    """Linear regression on a stream, of curvatures 1 to 1/24, with little noise or much."""
    size, pool = 24, 2**14
    generator = np.random.default_rng(0)
    features = generator.normal(size=(pool, size)) * np.sqrt(1.0 / np.arange(1.0, size + 1.0))
    features, noise = jnp.asarray(features), jnp.asarray(generator.normal(size=pool))

    def rows_of(rows: Array, key: Array) -> tuple[Array, Array]:
        truth = jax.random.normal(jax.random.fold_in(key, 1), (size,))
        level = 10.0 ** jax.random.uniform(jax.random.fold_in(key, 2), minval=-1.0, maxval=0.0)
        return features[rows], features[rows] @ truth + level * noise[rows]

    def init(key: Array) -> Params:
        # From a third of what the truth measures to all of it.
        size_key, key = jax.random.split(key)
        scale = 10.0 ** jax.random.uniform(size_key, minval=-0.5, maxval=0.0)
        return {"theta": scale * jax.random.normal(key, (size,))}

    def loss(params: Params, features: Array, targets: Array) -> Array:
        return 0.5 * jnp.square(features @ params["theta"] - targets)

    return Family(
        rate=0.15,
        init=init,
        sample=lambda drawn, trouble: rows_of(_pick(drawn, pool - 256), trouble.key),
        loss=loss,
        held_out=lambda key: rows_of(jnp.arange(pool - 256, pool), key),
    )


def _pick(drawn: Array, count: Any) -> Int[Array, " rows"]:
    """Rows below the count, of numbers in [0, 1)."""
    return jnp.minimum((drawn * count).astype(jnp.int32), count - 1)


FAMILIES: dict[str, Callable[[], Family]] = {
    "digits": _digits,
    "bytes": _bytes,
    "regression": _regression,
}
