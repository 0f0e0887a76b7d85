"""What is trained in a comparison: real data, small models, and one step's loss."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from meta_optax.compare import _data, _models
from meta_optax.compare._models import Params, Routing
from meta_optax.compare.corpora import CORPORA, load_corpus

Batch = Any
Loss = Float[Array, ""]
Forward = Callable[[Params, Any], tuple[Any, Routing | None]]

_BATCH_SIZE = 64
# Of most tasks, and of those whose steps cost most.
_STEPS, _FEWER_STEPS = 1500, 500
# Of the language models: bytes predicted at once, chunks in a batch, and chunks kept back.
_LENGTH, _CHUNKS, _HELD_OUT_CHUNKS = 32, 9, 48
_QUADRATIC_SIZE, _QUADRATIC_BATCH = 64, 8
# Of the planted trouble: when, as shares of the run, and by how much inputs are multiplied.
_SPIKE_BEGINS, _SPIKE_ENDS, _SPIKE_SCALE, _SHIFT_AT = 0.3, 0.31, 30.0, 0.5


class Task(NamedTuple):
    """One thing to train.

    Attributes:
      about: one line for people.
      steps: of a run.
      init: from a key to params.
      sample: from a key and the share of the run that is done to a batch.
      loss: from params and a batch to the loss and, for a mixture of experts, its routing.
      held_out: from params to the loss on what is never trained on.
      has_experts: whether `meta_optax.label_moe_params` finds gates and experts in the params.
      loss_name: what the loss is, with its unit.
    """

    about: str
    steps: int
    init: Callable[[Array], Params]
    sample: Callable[[Array, Float[Array, ""]], Batch]
    loss: Callable[[Params, Batch], tuple[Loss, Routing | None]]
    held_out: Callable[[Params], Loss]
    has_experts: bool = False
    loss_name: str = "cross-entropy, nats"


def _without_routing(forward: Callable[..., Any], *args: Any) -> Forward:
    return lambda params, inputs: (forward(params, inputs, *args), None)


def _cross_entropy(logits: Any, labels: Any) -> Loss:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _supervised(
    split: _data.Split,
    forward: Forward,
    loss_fn: Callable[[Any, Any], Loss] = _cross_entropy,
    **rest: Any,
) -> Task:
    """Batches drawn with replacement, by the seed; the loss on all that is kept back."""
    train, held_out = jax.tree.map(jnp.asarray, split)

    def sample(key: Array, progress: Float[Array, ""]) -> Batch:
        del progress
        rows = jax.random.randint(key, (_BATCH_SIZE,), 0, len(train.labels))
        return _data.Labelled(train.inputs[rows], train.labels[rows])

    def loss(params: Params, batch: Any) -> tuple[Loss, Routing | None]:
        outputs, routing = forward(params, batch.inputs)
        return loss_fn(outputs, batch.labels), routing

    return Task(sample=sample, loss=loss, held_out=lambda params: loss(params, held_out)[0], **rest)


def _noisy_quadratic() -> Task:
    curvature = 1.0 / jnp.arange(1, _QUADRATIC_SIZE + 1)

    def sample(key: Array, progress: Float[Array, ""]) -> Batch:
        del progress
        features_key, noise_key = jax.random.split(key)
        shape = (_QUADRATIC_BATCH, _QUADRATIC_SIZE)
        features = jax.random.normal(features_key, shape) * jnp.sqrt(curvature)
        return features, features.sum(axis=1) + jax.random.normal(noise_key, shape[:1])

    def loss(params: Params, batch: Batch) -> tuple[Loss, None]:
        features, target = batch
        return 0.5 * jnp.square(features @ params["theta"] - target).mean(), None

    return Task(
        about="linear regression on a stream: curvature 1/i in 64 directions, noise of variance 1",
        steps=_STEPS,
        init=lambda key: {"theta": jax.random.normal(key, (_QUADRATIC_SIZE,))},
        sample=sample,
        loss=loss,
        held_out=lambda params: 0.5 * (curvature @ jnp.square(params["theta"] - 1.0) + 1.0),
        loss_name="expected loss; 0.5 is noise",
    )


def _logistic_digits() -> Task:
    return _supervised(
        _data.digits(),
        _without_routing(_models.apply_linear),
        about="logistic regression on scikit-learn's digits",
        steps=_STEPS,
        init=lambda key: _models.linear(key, 64, 10),
    )


def _mlp_digits() -> Task:
    return _supervised(
        _data.digits(),
        _without_routing(_models.mlp),
        about="a perceptron 64-64-64-10 on scikit-learn's digits",
        steps=_STEPS,
        init=lambda key: _models.init_mlp(key, 64, 64, 64, 10),
    )


def _cnn_digits() -> Task:
    return _supervised(
        _data.digits(),
        _without_routing(_models.cnn),
        about="two convolutions of 8 and 16 channels on scikit-learn's digits",
        steps=_FEWER_STEPS,
        init=lambda key: _models.init_cnn(key, 10),
    )


def _mlp_fashion() -> Task:
    return _supervised(
        _data.fashion(),
        _without_routing(_models.mlp),
        about="a perceptron 784-64-10 on 10,000 images of Fashion-MNIST",
        steps=_STEPS,
        init=lambda key: _models.init_mlp(key, 784, 64, 10),
    )


def _language(corpora: tuple[str, ...], forward: Forward, **rest: Any) -> Task:
    """Next bytes of corpora in equal shares, those beyond ASCII as one."""
    parts = [load_corpus(name, _LENGTH, _HELD_OUT_CHUNKS) for name in corpora]
    least = min(len(part.train) for part in parts)
    # A shorter corpus sets the size, so that one index draws from all.
    train = jnp.asarray(np.stack([part.train[:least] for part in parts]))
    held_out = jnp.asarray(np.concatenate([part.held_out for part in parts]))

    def sample(key: Array, progress: Float[Array, ""]) -> Batch:
        del progress
        corpus = jnp.arange(_CHUNKS) % len(parts)
        return train[corpus, jax.random.randint(key, (_CHUNKS,), 0, least)]

    def loss(params: Params, chunks: UInt8[Array, "batch length"]) -> tuple[Loss, Routing | None]:
        tokens = jnp.minimum(chunks.astype(jnp.int32), _models.ALPHABET - 1)
        logits, routing = forward(params, tokens[:, :-1])
        return _cross_entropy(logits, tokens[:, 1:]), routing

    return Task(
        sample=sample,
        loss=loss,
        held_out=lambda params: loss(params, held_out)[0],
        loss_name="nats a byte",
        **rest,
    )


def _gru_prose() -> Task:
    return _language(
        ("prose",),
        _without_routing(_models.gru),
        about="a recurrent model (GRU of 48) of the bytes of Python's language reference",
        steps=_FEWER_STEPS,
        init=lambda key: _models.init_gru(key, 48),
    )


def _transformer_code() -> Task:
    return _language(
        ("code",),
        lambda params, tokens: _models.transformer(params, tokens, heads=2),
        about="one block of a transformer, 32 wide, on the bytes of Python's standard library",
        steps=_FEWER_STEPS,
        init=lambda key: _models.init_transformer(key, 32, _LENGTH),
    )


def _moe_language() -> Task:
    return _language(
        CORPORA,
        lambda params, tokens: _models.transformer(params, tokens, heads=2, selected=2),
        about="a transformer block with 8 experts, 2 a byte, on code, prose and names",
        steps=_FEWER_STEPS,
        init=lambda key: _models.init_transformer(key, 32, _LENGTH, experts=8),
        has_experts=True,
    )


def _moe_digits() -> Task:
    return _supervised(
        _data.digits(),
        functools.partial(_models.moe, selected=2),
        about="4 experts of 16 hidden units, 2 an image, on scikit-learn's digits",
        steps=_STEPS,
        init=lambda key: _models.init_moe(key, 64, 16, 10, experts=4),
        has_experts=True,
    )


def _expert_graph() -> Task:
    return _supervised(
        _data.digits(),
        functools.partial(_models.expert_graph, selected=3),
        about="8 experts, 3 an image, who speak for one another through a graph, on the digits",
        steps=_STEPS,
        init=lambda key: _models.init_graph(key, 64, 32, 10, experts=8),
        has_experts=True,
    )


def _moe_trouble() -> Task:
    """Half-way the digits are turned over, and what is kept back with them."""
    plain = _supervised(
        jax.tree.map(np.asarray, _data.digits()),
        functools.partial(_models.moe, selected=2),
        about="4 experts on digits; inputs x 30 for 1 % of the run, all digits inverted half-way",
        steps=_STEPS,
        init=lambda key: _models.init_moe(key, 64, 16, 10, experts=4),
        has_experts=True,
    )

    def invert(inputs: Array) -> Array:
        # Pixels lie between -0.6 and 1.4.
        return 0.8 - inputs

    def sample(key: Array, progress: Float[Array, ""]) -> Batch:
        batch = plain.sample(key, progress)
        in_spike = (progress >= _SPIKE_BEGINS) & (progress < _SPIKE_ENDS)
        inputs = jnp.where(progress >= _SHIFT_AT, invert(batch.inputs), batch.inputs)
        return batch._replace(inputs=inputs * jnp.where(in_spike, _SPIKE_SCALE, 1.0))

    kept = jax.tree.map(jnp.asarray, _data.digits().held_out)
    kept = kept._replace(inputs=invert(kept.inputs))
    return plain._replace(sample=sample, held_out=lambda params: plain.loss(params, kept)[0])


def _photo() -> Task:
    frequencies = 2.0 ** jnp.arange(6) * jnp.pi

    def forward(params: Params, places: Float[Array, "batch 2"]) -> Float[Array, "batch 3"]:
        angles = (places[:, :, None] * frequencies).reshape(len(places), -1)
        return _models.mlp(params, jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1))

    return _supervised(
        _data.photo(),
        _without_routing(forward),
        lambda outputs, colours: jnp.square(outputs - colours).mean(),
        about="colours of a photograph by place, a perceptron of Fourier features; never tuned on",
        steps=_STEPS,
        init=lambda key: _models.init_mlp(key, 24, 64, 64, 3),
        loss_name="mean squared error",
    )


TASKS: Mapping[str, Callable[[], Task]] = {
    name: functools.cache(make)
    for name, make in {
        "noisy_quadratic": _noisy_quadratic,
        "logistic_digits": _logistic_digits,
        "mlp_digits": _mlp_digits,
        "cnn_digits": _cnn_digits,
        "mlp_fashion": _mlp_fashion,
        "gru_prose": _gru_prose,
        "transformer_code": _transformer_code,
        "moe_digits": _moe_digits,
        "moe_language": _moe_language,
        "expert_graph": _expert_graph,
        "moe_trouble": _moe_trouble,
        "photo": _photo,
    }.items()
}


def why_missing(name: str) -> str | None:
    """Why a task cannot be run on this machine, None if it can."""
    if name == "mlp_fashion" and not _data.has_fashion():
        return "no files of Fashion-MNIST; on Debian: apt install dataset-fashion-mnist"
    return None
