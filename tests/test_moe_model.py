"""The example's model: exact routing, causality, labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    labels = moe_model.label_params(params)
    counts = {label: jax.tree.leaves(labels).count(label) for label in ("gate", "expert", "dense")}
    assert counts == {"gate": 2, "expert": 4, "dense": 2 * 4 + 3}
    masked = jax.tree.map(lambda leaf: optax.MaskedNode() if leaf.ndim == 3 else leaf, params)
    again = moe_model.label_params(masked)
    assert jax.tree.leaves(again) == jax.tree.leaves(labels)


def test_statistics_of_routing_by_hand():
    probs = jnp.array([[[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]]])
    routing = moe_model.Routing(probs, jnp.array([[[0, 1], [0, 2]]]))
    got = moe_model.router_statistics(routing, jnp.array([0, 1]), corpora=2)
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1))
    assert float(got["gate_entropy"]) == pytest.approx((entropy + np.log(4)) / 2, rel=1e-5)
    assert float(got["gate_sparsity"]) == 0.5
    np.testing.assert_allclose(got["expert_usage"], [0.5, 0.25, 0.25, 0.0])
    np.testing.assert_allclose(got["corpus_usage"][0, 1], [0.5, 0.0, 0.5, 0.0])
