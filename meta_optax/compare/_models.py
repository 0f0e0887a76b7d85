"""The models of the tasks: params as plain dicts, and pure functions of them.

Models are small, and the runs of many seeds and rates are one batched computation; so convolutions
are sums over shifted images, which batch as matrix products do, and every expert runs on every
token, which costs less at this size than sorting tokens.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Params = dict[str, Any]

# Of the initial router weights, so that the router begins undecided.
_ROUTER_SCALE = 0.1
# Python's own corpora are ASCII but for a few characters.
ALPHABET = 128


class Routing(NamedTuple):
    """Router probabilities [N, E], and the experts selected [N, k]."""

    probs: Float[Array, "tokens experts"]
    selected: Int[Array, "tokens selected"]


def normal(key: Array, *shape: int, fan_in: int | None = None) -> Float[Array, "..."]:
    """Weights of variance 1 / fan_in, by default the last axis but one."""
    return jax.random.normal(key, shape) * (fan_in or shape[-2]) ** -0.5


def linear(key: Array, inputs: int, outputs: int) -> Params:
    """A layer of weights and a bias of zeros."""
    return {"kernel": normal(key, inputs, outputs), "bias": jnp.zeros(outputs)}


def apply_linear(params: Params, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
    """The layer's outputs."""
    return x @ params["kernel"] + params["bias"]


def init_mlp(key: Array, *sizes: int) -> Params:
    """Layers from each size to the next."""
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = itertools.pairwise(sizes)
    return {
        f"layer_{i}": linear(k, *pair) for i, (k, pair) in enumerate(zip(keys, pairs, strict=True))
    }


def mlp(params: Params, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
    """A perceptron with GELUs between its layers."""
    for i in range(len(params)):
        x = apply_linear(params[f"layer_{i}"], jax.nn.gelu(x) if i else x)
    return x


def init_cnn(key: Array, classes: int, width: int = 8) -> Params:
    """Two convolutions of 3 x 3 and a readout, for images of 8 x 8."""
    keys = jax.random.split(key, 3)
    return {
        "conv_0": linear(keys[0], 9, width),
        "conv_1": linear(keys[1], 9 * width, 2 * width),
        "readout": linear(keys[2], 2 * 2 * 2 * width, classes),
    }


def cnn(params: Params, x: Float[Array, "batch 64"]) -> Float[Array, "batch classes"]:
    """Convolution, GELU and a maximum over 2 x 2, twice; then the readout."""
    x = x.reshape(-1, 8, 8, 1)
    for name in ("conv_0", "conv_1"):
        x = jax.nn.gelu(apply_linear(params[name], _patches(x)))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
    return apply_linear(params["readout"], x.reshape(len(x), -1))


def _patches(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c9"]:
    """Each place's neighbourhood of 3 x 3, zeros beyond the border."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1)


def init_gru(key: Array, width: int) -> Params:
    """An embedding, a gated recurrent unit and a readout."""
    keys = jax.random.split(key, 4)
    return {
        "embedding": normal(keys[0], ALPHABET, width, fan_in=1) * 0.5,
        "input": linear(keys[1], width, 3 * width),
        "hidden": linear(keys[2], width, 3 * width),
        "readout": linear(keys[3], width, ALPHABET),
    }


def gru(params: Params, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
    """The logits of each next byte (Cho et al., 2014)."""
    inputs = apply_linear(params["input"], params["embedding"][tokens])

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        xr, xz, xn = jnp.split(x, 3, axis=-1)
        hr, hz, hn = jnp.split(apply_linear(params["hidden"], h), 3, axis=-1)
        gate = jax.nn.sigmoid(xz + hz)
        candidate = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
        h = gate * h + (1.0 - gate) * candidate
        return h, h

    start = jnp.zeros((tokens.shape[0], inputs.shape[-1] // 3))
    _, states = jax.lax.scan(step, start, inputs.swapaxes(0, 1))
    return apply_linear(params["readout"], states.swapaxes(0, 1))


def init_transformer(key: Array, width: int, length: int, experts: int = 0) -> Params:
    """One block of attention and a perceptron, or a mixture of experts in its place."""
    keys = jax.random.split(key, 6)
    rest = (
        {"moe": init_moe(keys[4], width, width, width, experts)}
        if experts
        else {"mlp": init_mlp(keys[4], width, 4 * width, width)}
    )
    return {
        "embedding": normal(keys[0], ALPHABET, width, fan_in=1) * 0.5,
        "positions": normal(keys[1], length, width, fan_in=1) * 0.5,
        "attention": linear(keys[2], width, 3 * width),
        "attention_out": linear(keys[3], width, width),
        **rest,
        "readout": linear(keys[5], width, ALPHABET),
    }


def transformer(
    params: Params, tokens: Int[Array, "batch length"], heads: int, selected: int = 0
) -> tuple[Float[Array, "batch length vocab"], Routing | None]:
    """The logits of each next byte, and the routing if there are experts."""
    x = params["embedding"][tokens] + params["positions"][None, : tokens.shape[1]]
    x = x + _attend(params, _normalise(x), heads)
    y, routing = _normalise(x), None
    if "moe" in params:
        flat, routing = moe(params["moe"], y.reshape(-1, y.shape[-1]), selected)
        x = x + flat.reshape(x.shape)
    else:
        x = x + mlp(params["mlp"], y)
    return apply_linear(params["readout"], _normalise(x)), routing


def _normalise(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """To a mean square of 1, without weights of its own (RMSNorm)."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def _attend(params: Params, x: Float[Array, "b l d"], heads: int) -> Float[Array, "b l d"]:
    batch, length, width = x.shape
    parts = apply_linear(params["attention"], x).reshape(batch, length, 3, heads, width // heads)
    out = jax.nn.dot_product_attention(*jnp.moveaxis(parts, 2, 0), is_causal=True)
    return apply_linear(params["attention_out"], out.reshape(x.shape))


def init_moe(key: Array, inputs: int, hidden: int, outputs: int, experts: int) -> Params:
    """A linear router and stacked two-layer perceptrons."""
    keys = jax.random.split(key, 3)
    return {
        "router": {"kernel": _ROUTER_SCALE * normal(keys[0], inputs, experts)},
        "experts": {
            "w_in": normal(keys[1], experts, inputs, hidden),
            "w_out": normal(keys[2], experts, hidden, outputs),
        },
    }


def moe(
    params: Params, x: Float[Array, "tokens inputs"], selected: int
) -> tuple[Float[Array, "tokens outputs"], Routing]:
    """The most probable experts' outputs, weighted by their probabilities made to sum to 1."""
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    weights, index = jax.lax.top_k(probs, selected)
    weights = weights / weights.sum(axis=1, keepdims=True)
    share = jnp.einsum("nk,nke->ne", weights, jax.nn.one_hot(index, probs.shape[1]))
    hidden = jax.nn.gelu(jnp.einsum("nd,edf->nef", x, params["experts"]["w_in"]))
    outputs = jnp.einsum("nef,efo,ne->no", hidden, params["experts"]["w_out"], share)
    return outputs, Routing(probs, index)


def balance_loss(routing: Routing) -> Float[Array, ""]:
    """The Switch Transformer's E sum f P, which is 1 when the load is even."""
    experts = routing.probs.shape[1]
    share = jax.nn.one_hot(routing.selected, experts).mean(axis=(0, 1))
    return experts * jnp.sum(share * routing.probs.mean(axis=0))


def init_graph(key: Array, inputs: int, width: int, classes: int, experts: int) -> Params:
    """A mixture whose experts speak for one another through a graph, at first without edges."""
    keys = jax.random.split(key, 2)
    return {
        "moe": init_moe(keys[0], inputs, width, width, experts),
        "adjacency": jnp.zeros((experts, experts)),
        "readout": linear(keys[1], width, classes),
    }


def expert_graph(
    params: Params, x: Float[Array, "batch inputs"], selected: int
) -> tuple[Float[Array, "batch classes"], Routing]:
    r"""The example's expert graph, without messages.

    A picked expert's weight is :math:`w_i \propto p_i \sigma(a_i)`, with :math:`a_i` the mean of
    the edges :math:`A_{ji}` from the other picked experts.
    """
    probs = jax.nn.softmax(x @ params["moe"]["router"]["kernel"])
    gate, index = jax.lax.top_k(probs, selected)
    edges = params["adjacency"][index[:, :, None], index[:, None, :]]
    influence = (edges * (1.0 - jnp.eye(selected))).sum(axis=1) / (selected - 1)
    weights = gate * jax.nn.sigmoid(influence)
    weights = weights / weights.sum(axis=1, keepdims=True)
    experts = params["moe"]["experts"]
    hidden = jax.nn.gelu(jnp.einsum("bd,edf->bef", x, experts["w_in"]))
    outputs = jnp.einsum("bef,efw->bew", hidden, experts["w_out"])
    picked = jnp.take_along_axis(outputs, index[..., None], axis=1)
    mixed = jnp.einsum("bk,bkw->bw", weights, picked)
    return apply_linear(params["readout"], mixed), Routing(probs, index)
