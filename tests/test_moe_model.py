"""The example's model: exact routing, causality, labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meta_optax as mo

nnx = pytest.importorskip("flax.nnx", exc_type=Exception)
moe_model = pytest.importorskip("moe_model", exc_type=ImportError)

CONFIG = moe_model.ModelConfig(length=16, width=16, heads=2, layers=2, expert_width=8, block=4)


def _dense(layer, tokens):
    """Every expert on every token, weighted by the renormalised probabilities of the chosen."""
    probs = jax.nn.softmax(layer.router(tokens))
    weight, index = jax.lax.top_k(probs, CONFIG.selected)
    weight = weight / weight.sum(axis=-1, keepdims=True)
    weights = jnp.zeros_like(probs).at[jnp.arange(len(tokens))[:, None], index].set(weight)
    hidden = jax.nn.gelu(jnp.einsum("td,edf->tef", tokens, layer.experts.w_in[...]))
    return jnp.einsum("tef,efd,te->td", hidden, layer.experts.w_out[...], weights)


@pytest.mark.parametrize("bias", [0.0, 100.0])
def test_blocks_give_what_every_expert_on_every_token_gives(bias):
    """Also where every token goes to the same two experts: nothing is dropped."""
    layer = moe_model.MoeLayer(CONFIG, nnx.Rngs(0))
    tokens = jax.random.normal(jax.random.key(1), (33, CONFIG.width))
    tokens = tokens.at[:, 0].set(1.0)
    kernel = layer.router.kernel[...]
    layer.router.kernel[...] = kernel.at[0].add(bias * (jnp.arange(CONFIG.experts) < 2))
    outputs, routing = layer(tokens)
    np.testing.assert_allclose(outputs, _dense(layer, tokens), atol=1e-5)
    if bias:
        assert set(np.unique(routing.selected)) == {0, 1}


def test_no_output_hangs_on_later_tokens():
    model = moe_model.MoeTransformer(CONFIG, nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(2), (3, 16), 0, 256)
    changed = tokens.at[:, 9:].set(7)
    np.testing.assert_allclose(model(tokens)[0][:, :9], model(changed)[0][:, :9], atol=1e-5)


def test_labels_of_params_of_updates_and_of_masked_trees():
    params = nnx.split(moe_model.MoeTransformer(CONFIG, nnx.Rngs(0)), nnx.Param)[1]
    labels = mo.label_moe_params(params)
    counts = {label: jax.tree.leaves(labels).count(label) for label in ("gate", "expert", "dense")}
    assert counts == {"gate": 2, "expert": 4, "dense": 2 * 4 + 3}
    masked = jax.tree.map(lambda leaf: optax.MaskedNode() if leaf.ndim == 3 else leaf, params)
    again = mo.label_moe_params(masked)
    assert jax.tree.leaves(again) == jax.tree.leaves(labels)


def test_who_serves_which_kind_by_hand():
    probs = jnp.full([1, 4, 4], 0.25)
    selected = jnp.array([[[0, 1], [0, 2], [3, 2], [3, 2]]])
    routing = moe_model.Routing(probs, selected)
    usage = moe_model.usage_by_kind(routing, jnp.array([2, 0]), kinds=3)  # Two tokens a row.
    np.testing.assert_allclose(
        usage, [[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0]]]
    )


def test_the_models_own_routing_is_what_router_metrics_measures():
    model = moe_model.MoeTransformer(CONFIG, nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(2), (3, 16), 0, 256)
    routing = model(tokens)[1]
    metrics = mo.router_metrics(*routing)
    usage = moe_model.usage_by_kind(routing, jnp.zeros(3, jnp.int32), kinds=1)
    np.testing.assert_allclose(metrics["expert_usage_per_layer"], usage[:, 0], rtol=1e-5)
    entropy = -(routing.probs * jnp.log(routing.probs)).sum(axis=-1).mean()
    assert float(metrics["gate_entropy"]) == pytest.approx(float(entropy), rel=1e-5)
