r"""A mixture of experts whose picked experts influence one another through a learned graph.

A linear router gives each sample x probabilities p = softmax(W x) over E experts and picks the k
most probable, S. The adjacency A [E, E] says how much expert j speaks for expert i, A[j, i]. With
h_i the output of expert i, a picked expert's influence a_i and weight w_i are

    a_i = mean of A[j, i] over the picked j other than i
    w_i = p_i sigmoid(a_i) / sum over l in S of p_l sigmoid(a_l)

and the logits are a linear readout of sum_i w_i h'_i. Without messages h'_i is h_i; with them, the
picked experts first exchange one round over the edges between them, normalised over the senders:

    h'_i = h_i + gelu(sum over picked j other than i of M[i, j] h_j)
    M[i, j] = exp A[j, i] / sum over picked l other than i of exp A[l, i]

The diagonal is never read: an expert's word for itself would be a bias of that expert, not an edge.
A starts at zero, where this is a plain mixture of experts, and its diagonal stays there.

Every expert runs on every sample and what was not picked is left out afterwards: experts this small
cost less to run than to sort the samples for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from moe_model import Routing

LEAST_NORM = 1e-6  # Under an output's length, so that an output of zeros has a finite cosine.


class GraphConfig(NamedTuple):
    """The sizes of a model; the defaults are for the 8 x 8 digits."""

    features: int = 64
    classes: int = 10
    experts: int = 8
    selected: int = 3
    hidden: int = 64
    width: int = 32
    messages: bool = False


class Experts(nnx.Module):
    """Stacked two-layer perceptrons, one per expert, and the readout of the space they share.

    The readout is kept here so that it trains at the experts' rate and the graph has its own.
    """

    def __init__(self, config: GraphConfig, rngs: nnx.Rngs) -> None:
        """Draws the weights of all experts with the fan-in of one."""
        initialise = nnx.initializers.lecun_normal(batch_axis=0)
        inward = (config.experts, config.features, config.hidden)
        outward = (config.experts, config.hidden, config.width)
        self.w_in = nnx.Param(initialise(rngs.params(), inward))
        self.b_in = nnx.Param(jnp.zeros((config.experts, config.hidden)))
        self.w_out = nnx.Param(initialise(rngs.params(), outward))
        self.b_out = nnx.Param(jnp.zeros((config.experts, config.width)))
        self.readout = nnx.Linear(config.width, config.classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch experts width"]:
        """Returns what every expert has to say on every sample."""
        hidden = jax.nn.gelu(jnp.einsum("bd,edf->bef", x, self.w_in[...]) + self.b_in[...][None])
        return jnp.einsum("bef,efw->bew", hidden, self.w_out[...]) + self.b_out[...][None]


class Output(NamedTuple):
    """What the model says, and how it came to it.

    Attributes:
        logits: of the classes.
        routing: the router's probabilities and its picks, the most probable first.
        weights: of the picked experts, modulated by the graph; they sum to 1.
        outputs: of the picked experts, before any messages.
    """

    logits: Float[Array, "batch classes"]
    routing: Routing
    weights: Float[Array, "batch selected"]
    outputs: Float[Array, "batch selected width"]


class ExpertGraph(nnx.Module):
    """Classifies by the experts that a router picks, weighted by a graph between them."""

    def __init__(self, config: GraphConfig, rngs: nnx.Rngs) -> None:
        """Builds router, experts and a graph without edges."""
        self.config = config
        self.router = nnx.Linear(config.features, config.experts, use_bias=False, rngs=rngs)
        self.experts = Experts(config, rngs)
        self.adjacency = nnx.Param(jnp.zeros((config.experts, config.experts)))

    def __call__(self, x: Float[Array, "batch features"]) -> Output:
        """Returns the logits, and what led to them."""
        probs = jax.nn.softmax(self.router(x))
        gate, index = jax.lax.top_k(probs, self.config.selected)
        edges = picked_edges(self.adjacency[...], index)
        weights = modulate(gate, edges)
        outputs = jnp.take_along_axis(self.experts(x), index[..., None], axis=1)
        told = exchange(outputs, edges) if self.config.messages else outputs
        logits = self.experts.readout(jnp.einsum("bk,bkw->bw", weights, told))
        return Output(logits, Routing(probs, index), weights, outputs)


def picked_edges(
    adjacency: Float[Array, "experts experts"], index: Int[Array, "batch selected"]
) -> Float[Array, "batch selected selected"]:
    """Returns the edges between each sample's picked experts, [b, j, i] from j to i."""
    return adjacency[index[:, :, None], index[:, None, :]]


def others(selected: int) -> Float[Array, "selected selected"]:
    """Returns 1 for each pair of different picks and 0 on the diagonal; picks are distinct."""
    return 1.0 - jnp.eye(selected)


def modulate(
    gate: Float[Array, "batch selected"], edges: Float[Array, "batch selected selected"]
) -> Float[Array, "batch selected"]:
    """Weights the picked experts by the router and by what the others' edges say of them."""
    selected = gate.shape[-1]
    # A lone expert is spoken for by nobody: its influence is 0 and its weight 1.
    influence = (edges * others(selected)[None]).sum(axis=1) / max(selected - 1, 1)
    weights = gate * jax.nn.sigmoid(influence)
    return weights / weights.sum(axis=-1, keepdims=True)


def exchange(
    outputs: Float[Array, "batch selected width"], edges: Float[Array, "batch selected selected"]
) -> Float[Array, "batch selected width"]:
    """Lets the picked experts hear one another once."""
    selected = outputs.shape[1]
    if selected == 1:
        return outputs
    heard = jnp.where(others(selected)[None] > 0, edges, -jnp.inf)
    messages = jnp.einsum("bji,bjw->biw", jax.nn.softmax(heard, axis=1), outputs)
    return outputs + jax.nn.gelu(messages)


def sparsity_loss(adjacency: Float[Array, "experts experts"]) -> Float[Array, ""]:
    """Returns the L1 norm of the graph per edge, the mean of |A[j, i]| over j other than i."""
    experts = len(adjacency)
    return jnp.sum(jnp.abs(adjacency) * others(experts)) / max(experts * (experts - 1), 1)


def diversity_loss(outputs: Float[Array, "batch selected width"]) -> Float[Array, ""]:
    """Returns how alike the picked experts' outputs are, between 0 and 1.

    It is the mean over samples and pairs i, j of different picks of the squared cosine
    (h_i . h_j)^2 / (|h_i|^2 |h_j|^2): 0 where a sample's outputs are orthogonal, 1 where they are
    parallel.
    """
    selected = outputs.shape[1]
    lengths = jnp.sqrt(jnp.square(outputs).sum(axis=-1, keepdims=True) + LEAST_NORM**2)
    directions = outputs / lengths
    cosines = jnp.einsum("biw,bjw->bij", directions, directions)
    pairs = max(selected * (selected - 1), 1)
    return jnp.mean(jnp.sum(jnp.square(cosines) * others(selected)[None], axis=(1, 2))) / pairs
