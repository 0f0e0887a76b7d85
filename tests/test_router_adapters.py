"""`router_metrics` of logits, of counts, and of what models record."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing import LOAD_NAMES, NAMES, assert_close, routing

import meta_optax as mo


class TestAdapters:
    def test_logits(self):
        probs, index, mask, _ = routing(9, 2, 16, 4, 2)
        logits = np.log(probs) + 3.0
        got = mo.router_metrics_from_logits(logits, index, mask=mask)
        expected = mo.router_metrics(probs, index, mask=mask)
        assert_close(got, {k: np.asarray(v) for k, v in expected.items()})
        one = mo.router_metrics_from_logits(logits[0], num_selected=2)
        assert set(one) == NAMES

    def test_counts_alone(self):
        probs, index, _, _ = routing(10, 2, 16, 4, 2)
        full = mo.router_metrics(probs, index)
        counts = np.stack([np.bincount(layer.reshape(-1), minlength=4) for layer in index])
        expected = {
            name: np.asarray(full[name])
            for base in LOAD_NAMES
            for name in (base, f"{base}_per_layer")
        }
        for given_counts in (counts, list(counts), {"l_10": counts[1], "l_9": counts[0]}):
            assert_close(mo.router_metrics_from_counts(given_counts), expected)
        assert_close(mo.router_metrics_from_counts({"encoder": counts}), expected)
        one = mo.router_metrics_from_counts(counts[0])
        assert set(one) == LOAD_NAMES
        with pytest.raises(TypeError, match="'gate_entropy'"):
            mo.expert_gate().observe(mo.expert_gate().init(), {"step": 0, **one})

    def test_layers_of_stacks_are_numbered_as_control_by_layer_numbers_them(self):
        """Stacks that differ in a number alternate: each bias has to meet its own layer's load."""
        first = np.tile([6.0, 0, 0, 0], (3, 1))
        last = np.tile([0.0, 0, 0, 6], (3, 1))
        counts = {"layers_0": {"load": first}, "layers_1": {"load": last}}
        for metrics in (
            mo.router_metrics_from_counts({k: v["load"] for k, v in counts.items()}),
            mo.router_metrics_from_collection(counts, counts="load", stacked=True),
        ):
            biases = {f"layers_{i}": {"bias": jnp.zeros([3, 4])} for i in range(2)}
            tx = mo.balance_router_bias(1.0)
            updates, _ = tx.update(biases, tx.init(biases), **metrics)
            np.testing.assert_allclose(updates["layers_0"]["bias"], [[-1.5, 0.5, 0.5, 0.5]] * 3)
            np.testing.assert_allclose(updates["layers_1"]["bias"], [[0.5, 0.5, 0.5, -1.5]] * 3)

    def test_dropped_counts(self):
        counts = jnp.array([[4, 4], [6, 2]])
        by_layer = mo.router_metrics_from_counts(counts, jnp.array([2, 4]))
        np.testing.assert_allclose(by_layer["drop_fraction_per_layer"], [0.25, 0.5])
        total = mo.router_metrics_from_counts(counts, 4)
        assert float(total["drop_fraction"]) == 0.25
        with pytest.raises(ValueError, match="num_dropped"):
            mo.router_metrics_from_counts(counts, jnp.ones(3))

    def test_no_counts_are_held(self):
        metrics = mo.router_metrics_from_counts(jnp.zeros(4))
        assert all(np.isnan(value).all() for value in metrics.values())
        with pytest.raises(ValueError, match="counts >= 0"):
            mo.router_metrics_from_counts(jnp.array([1, -1]))

    @pytest.mark.parametrize("scanned", [False, True])
    def test_what_linen_sows(self, scanned):
        nn = pytest.importorskip("flax.linen", exc_type=Exception)

        class Moe(nn.Module):
            @nn.compact
            def __call__(self, x, _=None):
                logits = nn.Dense(4, name="router")(x)
                probs = nn.softmax(logits)
                self.sow("intermediates", "router_probs", probs)
                self.sow("intermediates", "router_logits", logits)
                self.sow("intermediates", "expert_index", jax.lax.top_k(probs, 2)[1])
                self.sow("intermediates", "load", probs.sum((0, 1)))
                return x + probs.sum(-1, keepdims=True), None

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                if scanned:
                    axes = {"params": 0, "intermediates": 0}
                    return nn.scan(Moe, axes, split_rngs={"params": True}, length=11)()(x)[0]
                for i in range(11):
                    x, _ = Moe(name=f"block_{i}")(x)
                return x

        x = jax.random.normal(jax.random.key(0), (2, 5, 6))
        params = Model().init(jax.random.key(1), x)["params"]
        _, sown = Model().apply({"params": params}, x, mutable="intermediates")
        collect = functools.partial(
            mo.router_metrics_from_collection, sown["intermediates"], stacked=scanned
        )
        if scanned:
            probs = sown["intermediates"]["ScanMoe_0"]["router_probs"][0].reshape(11, 10, 4)
        else:
            layers = [sown["intermediates"][f"block_{i}"]["router_probs"][0] for i in range(11)]
            probs = jnp.stack(layers).reshape(11, 10, 4)
        expected = {k: np.asarray(v) for k, v in mo.router_metrics(probs, num_selected=2).items()}
        assert_close(collect(probs="router_probs", index="expert_index"), expected)
        assert_close(collect(logits="router_logits", num_selected=2), expected)
        assert collect(counts="load")["expert_usage_per_layer"].shape == (11, 4)

    @pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
    def test_what_nnx_sows(self):
        nnx = pytest.importorskip("flax.nnx", exc_type=Exception)

        class Moe(nnx.Module):
            def __init__(self, rngs):
                self.router = nnx.Linear(6, 4, rngs=rngs)

            def __call__(self, x):
                probs = jax.nn.softmax(self.router(x))
                self.sow(nnx.Intermediate, "router_probs", probs)
                return probs

        class Model(nnx.Module):
            def __init__(self, rngs):
                self.blocks = nnx.List([Moe(rngs) for _ in range(2)])

        model = Model(nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (5, 6))
        probs = jnp.stack([block(x) for block in model.blocks])
        sown = nnx.pop(model, nnx.Intermediate)
        got = mo.router_metrics_from_collection(sown, probs="router_probs")
        assert_close(got, {k: np.asarray(v) for k, v in mo.router_metrics(probs).items()})

    def test_collections_that_do_not_fit(self):
        collect = mo.router_metrics_from_collection
        with pytest.raises(ValueError, match=r"one of probs=, logits= and counts="):
            collect({}, probs="a", counts="b")
        with pytest.raises(ValueError, match=r"under 'probs'; there is \['layer/loss'\]"):
            collect({"layer": {"loss": 1.0}}, probs="probs")
        layers = {f"l{i}": {"p": jnp.full([2, i], 1 / i)} for i in (2, 4)}
        with pytest.raises(ValueError, match="differ in shape"):
            collect(layers, probs="p")
