"""`router_metrics` and its adapters: a NumPy oracle, closed forms, meshes, bad input."""

import functools
import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from routing import LOAD_NAMES, NAMES, assert_close, routing

import meta_optax as mo

_measure = jax.jit(mo.router_metrics)


def _oracle(probs, index, mask=None, dropped=None):
    """One layer, token by token, in float64."""
    tokens, experts = probs.shape
    kept = [t for t in range(tokens) if mask is None or mask[t]]
    entropies, decided, counts, lost = [], [], np.zeros(experts), 0
    for t in kept:
        p = np.float64(probs[t])
        entropies.append(-sum(x * math.log(x) for x in p if x > 0))
        decided.append(p.max() > 0.5)
        for slot, expert in enumerate(index[t]):
            counts[expert] += 1
            lost += 0 if dropped is None else dropped[t, slot]
    usage = counts / counts.sum()
    return {
        "gate_entropy": np.mean(entropies),
        "gate_entropy_normalized": np.mean(entropies) / math.log(experts),
        "gate_sparsity": np.mean(decided),
        "expert_usage": usage,
        "load_entropy_normalized": -sum(f * math.log(f) for f in usage if f) / math.log(experts),
        "max_violation": counts.max() / counts.mean() - 1,
        "load_cv": counts.std() / counts.mean(),
        "dead_experts": np.mean(counts == 0),
        "drop_fraction": lost / counts.sum(),
    }


@pytest.mark.usefixtures("strict_numerics")
class TestOracle:
    @pytest.mark.parametrize(("experts", "selected"), [(2, 1), (4, 2), (5, 5), (64, 6)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_one_layer(self, experts, selected, masked):
        probs, index, mask, dropped = routing(experts, 1, 37, experts, selected)
        mask = mask[0] if masked else None
        got = mo.router_metrics(probs[0], index[0], mask=mask, dropped=dropped[0])
        assert_close(got, _oracle(probs[0], index[0], mask, dropped[0]))
        without = mo.router_metrics(probs[0], num_selected=selected, mask=mask)
        assert_close(without, _oracle(probs[0], index[0], mask))

    @pytest.mark.parametrize("form", ["stacked", "list", "jit"])
    def test_layers_and_their_mean(self, form):
        probs, index, mask, dropped = routing(7, 3, 29, 6, 2)
        given = [probs, index, mask, dropped]
        if form == "list":
            given = [list(array) for array in given]
        measure = jax.jit(mo.router_metrics) if form == "jit" else mo.router_metrics
        got = measure(given[0], given[1], mask=given[2], dropped=given[3])
        layers = [_oracle(*parts) for parts in zip(probs, index, mask, dropped, strict=True)]
        own = {f"{k}_per_layer": np.stack([layer[k] for layer in layers]) for k in layers[0]}
        means = {k: np.mean([layer[k] for layer in layers], axis=0) for k in layers[0]}
        assert_close(got, means | own)

    def test_one_mask_for_all_layers(self):
        probs, index, mask, _ = routing(8, 3, 29, 6, 2)
        assert_close(
            mo.router_metrics(probs, index, mask=mask[0]),
            {
                k: np.asarray(v)
                for k, v in mo.router_metrics(probs, index, mask=np.stack([mask[0]] * 3)).items()
            },
        )

    @given(probs=hnp.arrays(np.float64, (9, 7), elements=st.floats(0, 1)))
    def test_ranges(self, probs):
        probs = (probs + 1e-3) / (probs + 1e-3).sum(-1, keepdims=True)
        got = jax.device_get(_measure(probs.astype(np.float32)))
        experts = probs.shape[-1]
        for name in NAMES - {"gate_entropy", "max_violation", "load_cv"}:
            assert (got[name] >= 0).all(), name
            assert (got[name] <= 1 + 1e-5).all(), name
        assert got["expert_usage"].sum() == pytest.approx(1.0, rel=1e-5)
        assert 0 <= got["max_violation"] <= experts - 1 + 1e-4
        assert got["load_cv"] <= math.sqrt(experts - 1) + 1e-4


@pytest.mark.usefixtures("strict_numerics")
class TestClosedForms:
    def test_uniform(self):
        """Undecided: every token entropy log E; the load is even if the choices are."""
        got = mo.router_metrics(jnp.full([8, 4], 0.25), jnp.arange(8)[:, None] % 4)
        expected = {
            "gate_entropy": math.log(4),
            "gate_entropy_normalized": 1.0,
            "gate_sparsity": 0.0,
            "expert_usage": np.full(4, 0.25),
            "load_entropy_normalized": 1.0,
            "max_violation": 0.0,
            "load_cv": 0.0,
            "dead_experts": 0.0,
            "drop_fraction": 0.0,
        }
        assert_close(got, expected)

    def test_one_hot_on_one_expert(self):
        """Collapsed."""
        got = mo.router_metrics(jax.nn.one_hot(jnp.zeros(8, jnp.int32), 4))
        expected = {
            "gate_entropy": 0.0,
            "gate_entropy_normalized": 0.0,
            "gate_sparsity": 1.0,
            "expert_usage": np.eye(4)[0],
            "load_entropy_normalized": 0.0,
            "max_violation": 3.0,
            "load_cv": math.sqrt(3),
            "dead_experts": 0.75,
            "drop_fraction": 0.0,
        }
        assert_close(got, expected)

    def test_one_hot_on_all(self):
        """Healthy specialisation: low token entropy, even load."""
        got = mo.router_metrics(jax.nn.one_hot(jnp.arange(8) % 4, 4))
        assert float(got["gate_entropy"]) == 0.0
        assert float(got["load_entropy_normalized"]) == pytest.approx(1.0)

    def test_half_dead(self):
        got = mo.router_metrics(jax.nn.one_hot(jnp.arange(8) % 2, 4))
        assert float(got["dead_experts"]) == 0.5
        assert float(got["load_entropy_normalized"]) == pytest.approx(0.5)
        assert float(got["max_violation"]) == pytest.approx(1.0)
        assert float(got["load_cv"]) == pytest.approx(1.0)

    def test_a_single_expert_is_decided_and_even(self):
        got = mo.router_metrics(jnp.ones([3, 1]))
        assert float(got["gate_entropy_normalized"]) == 0.0
        assert float(got["load_entropy_normalized"]) == 1.0


class TestMeshes:
    def _mesh(self):
        return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def test_global_under_jit_with_sharded_tokens(self):
        probs, index, mask, _ = routing(1, 2, 64, 4, 2)
        split = jax.NamedSharding(self._mesh(), jax.P(None, "data"))
        sharded = [jax.device_put(x, split) for x in (probs, index, mask)]
        got = jax.jit(lambda p, i, m: mo.router_metrics(p, i, mask=m))(*sharded)
        assert all(value.sharding.is_fully_replicated for value in got.values())
        expected = mo.router_metrics(probs, index, mask=mask)
        assert_close(got, {k: np.asarray(v) for k, v in expected.items()})

    @pytest.mark.parametrize("case", ["index", "top k", "logits", "one layer"])
    def test_global_on_an_explicit_mesh(self, case):
        """The default kind of mesh, on which a scatter has to be told where its result goes."""
        probs, index, mask, _ = routing(3, 2, 64, 4, 2)

        def measure(p, i, m):
            if case == "one layer":
                return mo.router_metrics(p[0], i[0], mask=m[0])
            if case == "logits":
                return mo.router_metrics_from_logits(jnp.log(p), i, mask=m)
            return mo.router_metrics(p, i if case == "index" else None, num_selected=2, mask=m)

        expected = measure(probs, index, mask)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            split = jax.NamedSharding(mesh, jax.P(None, "data"))
            got = jax.jit(measure)(*(jax.device_put(x, split) for x in (probs, index, mask)))
        assert_close(got, {k: np.asarray(v) for k, v in expected.items()})

    @pytest.mark.parametrize("given_index", [False, True])
    def test_global_under_shard_map(self, given_index):
        """Devices have different numbers of tokens left by the mask."""
        probs, index, mask, _ = routing(2, 2, 64, 4, 2)
        measure = functools.partial(mo.router_metrics, axis_name="data", num_selected=2)
        tokens = jax.P(None, "data")
        got = jax.jit(
            jax.shard_map(
                lambda p, i, m: measure(p, i if given_index else None, mask=m),
                mesh=self._mesh(),
                in_specs=(tokens, tokens, tokens),
                out_specs=jax.P(),
            )
        )(probs, index, mask)
        expected = mo.router_metrics(probs, index, mask=mask)
        assert_close(got, {k: np.asarray(v) for k, v in expected.items()})

    def test_counts_under_shard_map(self):
        counts = np.arange(32.0, dtype=np.float32).reshape(8, 4)
        got = jax.jit(
            jax.shard_map(
                lambda c: mo.router_metrics_from_counts(c[0], jnp.float32(1), axis_name="data"),
                mesh=self._mesh(),
                in_specs=(jax.P("data"),),
                out_specs=jax.P(),
            )
        )(counts)
        expected = mo.router_metrics_from_counts(counts.sum(0), jnp.float32(8))
        assert_close(got, {k: np.asarray(v) for k, v in expected.items()})


class TestInsideTraining:
    def test_nothing_is_differentiated_through(self):
        probs, index, _, _ = routing(3, 2, 16, 4, 2)

        def loss(scale):
            scores = jax.nn.softmax(scale * jnp.log(probs))
            return (scores**2).sum(), mo.router_metrics(scores, index)

        for function in (loss, jax.checkpoint(loss)):
            gradient, metrics = jax.jit(jax.grad(function, has_aux=True))(2.0)
            plain = jax.grad(lambda s: loss(s)[0])(2.0)
            assert float(gradient) == pytest.approx(float(plain), rel=1e-5)
            assert np.isfinite(metrics["gate_entropy"])

    def test_vmap_and_scan(self):
        probs, index, _, _ = routing(4, 3, 16, 4, 2)
        expected = mo.router_metrics(probs, index)
        mapped = jax.vmap(mo.router_metrics)(probs, index)
        _, scanned = jax.lax.scan(lambda c, x: (c, mo.router_metrics(*x)), None, (probs, index))
        for name in NAMES:
            np.testing.assert_allclose(mapped[name], expected[f"{name}_per_layer"], rtol=1e-6)
            np.testing.assert_allclose(scanned[name], expected[f"{name}_per_layer"], rtol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_narrow_probabilities_are_summed_in_float32(self, dtype):
        probs, index, _, _ = routing(5, 1, 4096, 8, 2)
        narrow = jnp.asarray(probs[0]).astype(dtype)
        got = mo.router_metrics(narrow, index[0])
        expected = jax.jit(mo.router_metrics)(narrow.astype(jnp.float32), index[0])
        for name in NAMES:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)

    def test_ready_to_be_passed(self):
        probs, index, _, _ = routing(6, 2, 16, 4, 2)
        state = mo.smart_expert_gate().init()
        metrics = {"step": 0, **mo.router_metrics(probs, index)}
        new = mo.smart_expert_gate().observe(state, metrics)
        assert int(new.nonfinite_count) == 0
        assert int(new.usage_count) == 1

    def test_one_pass_over_the_probabilities(self):
        """XLA's own count, for 32 layers of 8,192 tokens and 64 experts: the example of a run."""
        shape = (32, 8192, 64)
        probs = jax.ShapeDtypeStruct(shape, jnp.float32)
        index = jax.ShapeDtypeStruct((*shape[:2], 2), jnp.int32)
        one_pass = 4 * math.prod(shape)
        for arguments in ((probs,), (probs, index)):
            cost = jax.jit(mo.router_metrics).lower(*arguments).compile().cost_analysis()
            # What is beyond one pass are arrays without the experts' axis, 1/64 of it each.
            assert one_pass <= cost["bytes accessed"] < 1.5 * one_pass


class TestBadInput:
    @pytest.mark.parametrize("bad", [[0.7, 0.7], [1.5, -0.5], [0.2, 0.2]])
    def test_probabilities_that_are_none(self, bad):
        probs = jnp.array([[0.5, 0.5], bad])
        with pytest.raises(ValueError, match=r"sum to 1.*token 1.*router_metrics_from_logits"):
            mo.router_metrics(probs)
        jax.jit(mo.router_metrics)(probs)  # Not seen while traced, as the docstring says.
        mo.router_metrics(probs, mask=[1, 0])  # Padding may hold anything.

    @pytest.mark.parametrize("outside", [-1, 4, 99])
    def test_index_out_of_range_is_an_error_or_a_counted_hold(self, outside):
        probs = jnp.full([3, 4], 0.25)
        index = jnp.array([[0], [outside], [1]])
        with pytest.raises(ValueError, match=rf"expert_index in \[0, 4\), got {outside}"):
            mo.router_metrics(probs, index)
        metrics = jax.jit(mo.router_metrics)(probs, index)
        assert np.isnan(metrics["expert_usage"]).all()
        assert np.isnan([float(metrics[name]) for name in LOAD_NAMES - {"expert_usage"}]).all()
        strategy = mo.smart_expert_gate()
        held = strategy.observe(strategy.init(), {"step": 0, **metrics})
        assert int(held.nonfinite_count) == 1
        inside = jax.jit(functools.partial(mo.router_metrics, mask=[1, 0, 1]))(probs, index)
        np.testing.assert_allclose(inside["expert_usage"], [0.5, 0.5, 0, 0])

    @pytest.mark.parametrize("jit", [False, True])
    def test_all_masked_is_a_counted_hold(self, jit):
        measure = jax.jit(mo.router_metrics) if jit else mo.router_metrics
        metrics = measure(jnp.full([3, 4], 0.25), mask=jnp.zeros(3))
        assert all(np.isnan(value).all() for value in metrics.values())
        for strategy in (mo.expert_gate(), mo.smart_expert_gate()):
            state = strategy.observe(strategy.init(), {"step": 0, **metrics})
            assert int(state.nonfinite_count) == 1

    @pytest.mark.parametrize("selected", [1, 2])
    @pytest.mark.parametrize("jit", [False, True])
    def test_nan_probabilities_are_no_error_but_a_hold(self, selected, jit):
        """Also of the load: a highest one is found among NaNs too."""
        measure = functools.partial(mo.router_metrics, num_selected=selected)
        measure = jax.jit(measure) if jit else measure
        for probs in (jnp.array([[jnp.nan, 0.5], [0.5, 0.5]]), jnp.full([4, 2], jnp.nan)):
            metrics = measure(probs)
            assert all(np.isnan(value).all() for value in metrics.values())
            _, state = mo.balance_router_bias().update(
                jnp.zeros(2), mo.balance_router_bias().init(None), **metrics
            )
            assert int(state.nonfinite_count) == 1

    def test_one_layer_of_nan_leaves_the_others_values(self):
        probs = jnp.stack([jnp.full([4, 2], 0.5), jnp.full([4, 2], jnp.nan)])
        metrics = mo.router_metrics(probs)
        np.testing.assert_array_equal(np.isnan(metrics["max_violation_per_layer"]), [False, True])
        assert np.isnan(metrics["max_violation"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((jnp.ones(3),), r"2 dimensions.*\(3,\)"),
            ((jnp.ones([2, 2, 2, 2]),), "Batch and sequence are one axis"),
            (([jnp.ones([3, 1]), jnp.ones([4, 1])],), "layers that differ one by one"),
            ((jnp.full([3, 2], 0.5), jnp.zeros([4, 1], jnp.int32)), r"T = 3"),
            ((jnp.full([3, 2], 0.5), jnp.zeros([1, 3, 1], jnp.int32)), r"expert_index of shape"),
            ((jnp.full([3, 2], 0.5), jnp.zeros([3, 1])), "integers as expert_index"),
            ((jnp.full([3, 2], 0.5), jnp.zeros([3, 1], jnp.int32), 2), "num_selected is 2"),
            ((jnp.full([3, 2], 0.5), None, 3), r"num_selected must be in \[1, 2\], got 3"),
            ((jnp.full([3, 2], 0.5), None, None, jnp.ones(4)), r"mask of shape \[3\]"),
        ],
    )
    def test_shapes_that_do_not_fit(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            mo.router_metrics(*arguments)

    def test_dropped_needs_the_index(self):
        probs = jnp.full([3, 2], 0.5)
        with pytest.raises(ValueError, match="expert_index to know"):
            mo.router_metrics(probs, dropped=jnp.ones([3, 1]))
        with pytest.raises(ValueError, match="dropped of the shape"):
            mo.router_metrics(probs, jnp.zeros([3, 1], jnp.int32), dropped=jnp.ones([3, 2]))
