"""A mixture of experts small enough to train ten seeds of in seconds, on real data.

Sixteen experts of four hidden units each, two per image, classify scikit-learn's handwritten
digits; no expert can do it alone, so a router that collapses costs accuracy.
"""

import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

import meta_optax as mo

# The examples are scripts, and no package: their loader of the data is found by its folder.
sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
from digits import CLASSES, load_split

EXPERTS, SELECTED, HIDDEN, PIXELS = 16, 2, 4, 64
ROUTER_SCALE = 0.1  # of the initial weights, so that the router begins undecided
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-4
BATCH_SIZE = 256
TEST_SHARE = 0.2

SPLIT = jax.tree.map(jnp.asarray, load_split(TEST_SHARE))

Params = dict[str, Any]


class Routing(NamedTuple):
    """Router probabilities [B, E] and the experts selected [B, k]."""

    probs: Float[Array, "batch experts"]
    selected: Int[Array, "batch selected"]


class Arm(NamedTuple):
    """A way to train: hyperparameters, and the strategy that may change them."""

    strategy: mo.MetaOptimizer
    gate_learning_rate: float
    aux_loss_weight: float = 0.0
    balance_update_rate: float | None = None


class Result(NamedTuple):
    """What training led to, of one seed or stacked over seeds."""

    params: Params
    opt_state: mo.InjectMetaHyperparamsState
    history: dict[str, Array]
    test_loss: Float[Array, "..."]
    test_accuracy: Float[Array, "..."]
    max_violation: Float[Array, "..."]


def init_params(key: Array) -> Params:
    """Draws the weights of a router and of all experts; the balance bias is zero."""
    keys = jax.random.split(key, 3)

    def normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
        return jax.random.normal(key, shape) * fan_in**-0.5

    return {
        "router": {"kernel": ROUTER_SCALE * normal(keys[0], (PIXELS, EXPERTS), PIXELS)},
        "balance_bias": jnp.zeros(EXPERTS),
        "experts": {
            "w_in": normal(keys[1], (EXPERTS, PIXELS, HIDDEN), PIXELS),
            "w_out": normal(keys[2], (EXPERTS, HIDDEN, CLASSES), HIDDEN),
        },
    }


def forward(
    params: Params, pixels: Float[Array, "batch 64"]
) -> tuple[Float[Array, "batch 10"], Routing]:
    """Class logits and routing; the bias has a say in who is selected, and in nothing else."""
    inputs = 2.0 * pixels - 0.6  # centred: the mean pixel is 0.3
    probs = jax.nn.softmax(inputs @ params["router"]["kernel"])
    scores = jax.lax.stop_gradient(probs + params["balance_bias"])
    selected = jax.lax.top_k(scores, SELECTED)[1]
    weights = jnp.take_along_axis(probs, selected, axis=1)
    # A bias may select experts whose probabilities are all zero in float32.
    weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-9)
    hidden = jax.nn.gelu(jnp.einsum("bp,eph->beh", inputs, params["experts"]["w_in"]))
    outputs = jnp.einsum("beh,ehc->bec", hidden, params["experts"]["w_out"])
    chosen = jnp.take_along_axis(outputs, selected[..., None], axis=1)
    return (chosen * weights[..., None]).sum(axis=1), Routing(probs, selected)


def loss_fn(
    params: Params, samples: Any, aux_loss_weight: Float[Array, ""] | float
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Routing]]:
    """Cross-entropy, plus the weighted Switch loss E sum f P, which is 1 when the load is even."""
    logits, routing = forward(params, samples["pixels"])
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, samples["digit"]).mean()
    share = jax.nn.one_hot(routing.selected, EXPERTS).mean(axis=(0, 1))
    balance = EXPERTS * jnp.sum(share * routing.probs.mean(axis=0))
    return loss + aux_loss_weight * balance, (loss, routing)


def make_optimizer(arm: Arm) -> optax.GradientTransformationExtraArgs:
    """AdamW in groups under the arm's strategy."""
    factory = mo.moe_partition(optax.adamw, mo.label_moe_params)
    free = {"aux_loss_weight": arm.aux_loss_weight}
    return mo.inject_meta_hyperparams(factory, arm.strategy, free_hyperparams=free)(
        learning_rate=LEARNING_RATE,
        gate_learning_rate=arm.gate_learning_rate,
        weight_decay=WEIGHT_DECAY,
        balance_update_rate=arm.balance_update_rate,
    )


def train(arm: Arm, seeds: Int[Array, " seeds"], steps: int) -> Result:
    """Trains all seeds at once, in one compiled computation."""
    tx = make_optimizer(arm)

    def step(carry: Any, key: Array) -> tuple[Any, dict[str, Array]]:
        params, state = carry
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(SPLIT.train["digit"]))
        batch = jax.tree.map(lambda x: x[rows], SPLIT.train)
        weight = optax.tree.get(state, "aux_loss_weight")
        differentiate = jax.grad(loss_fn, has_aux=True)
        grads, (loss, routing) = differentiate(params, batch, weight)
        metrics = mo.router_metrics(routing.probs, routing.selected)
        updates, state = tx.update(grads, state, params, value=loss, **metrics)
        history = {**metrics, **optax.tree.get(state, "hyperparams"), "value": loss}
        return (optax.apply_updates(params, updates), state), history

    def run(seed: Int[Array, ""]) -> Result:
        key, data_key = jax.random.split(jax.random.key(seed))
        params = init_params(key)
        carry = (params, tx.init(params))
        (params, state), history = jax.lax.scan(step, carry, jax.random.split(data_key, steps))
        test_loss = loss_fn(params, SPLIT.test, 0.0)[0]
        guesses = forward(params, SPLIT.test["pixels"])[0].argmax(axis=1)
        routing = forward(params, SPLIT.train["pixels"])[1]
        return Result(
            params=params,
            opt_state=state,
            history=history,
            test_loss=test_loss,
            test_accuracy=(guesses == SPLIT.test["digit"]).mean(),
            max_violation=mo.router_metrics(*routing)["max_violation"],
        )

    return jax.jit(jax.vmap(run))(seeds)
