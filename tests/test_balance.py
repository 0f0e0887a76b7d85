"""`balance_router_bias`, alone and where `moe_partition` puts it."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moe_trees import TREES, build

import meta_optax as mo
from meta_optax.moe._paths import leaves_with_paths

BALANCED = [
    name
    for name, tree in TREES.items()
    if any(leaf.label == "balance_bias" for leaf in tree.leaves.values())
]
USAGE = jnp.array([0.7, 0.2, 0.1, 0.0])


def _update(tx, bias, **metrics):
    return tx.update(jax.tree.map(jnp.ones_like, bias), tx.init(bias), bias, **metrics)


class TestRule:
    def test_sign_by_hand(self):
        updates, _ = _update(mo.balance_router_bias(0.01), jnp.zeros(4), expert_usage=USAGE)
        direction = np.array([-1, 1, 1, 1]) - 0.5
        np.testing.assert_allclose(updates, 0.01 * direction, rtol=1e-6)

    def test_proportional_by_hand(self):
        tx = mo.balance_router_bias(0.01, rule="proportional")
        updates, _ = _update(tx, jnp.zeros(4), expert_usage=USAGE)
        np.testing.assert_allclose(updates, 0.01 * (1 - 4 * np.asarray(USAGE)), rtol=1e-5)

    @pytest.mark.parametrize("rule", ["sign", "proportional"])
    def test_mean_centred_and_at_rest_when_even(self, rule):
        tx = mo.balance_router_bias(0.01, rule=rule)
        for seed in range(5):
            usage = jax.random.dirichlet(jax.random.key(seed), jnp.ones(8))
            updates, _ = _update(tx, jnp.zeros(8), expert_usage=usage)
            assert float(jnp.abs(updates.sum())) < 1e-6
        updates, _ = _update(tx, jnp.zeros(8), expert_usage=jnp.full(8, 0.125))
        np.testing.assert_array_equal(updates, jnp.zeros(8))

    def test_annealed_by_a_schedule(self):
        tx = mo.balance_router_bias(optax.linear_schedule(0.1, 0.0, 2))
        state, sizes = tx.init(jnp.zeros(4)), []
        for _ in range(3):
            updates, state = tx.update(jnp.zeros(4), state, expert_usage=USAGE)
            sizes.append(float(updates[1]))
        assert sizes == pytest.approx([0.05, 0.025, 0.0])

    def test_evens_the_load_of_a_router(self):
        """Sigmoid scores, top 2 of 8 with the bias, as in DeepSeek-V3."""
        scores = jax.nn.sigmoid(
            jax.random.normal(jax.random.key(0), (512, 8)) + jnp.linspace(-2, 2, 8)
        )
        tx = mo.balance_router_bias(optax.linear_schedule(1e-2, 0.0, 400))

        def step(carry, _):
            bias, state = carry
            index = jax.lax.top_k(scores + bias, 2)[1]
            metrics = mo.router_metrics(jax.nn.softmax(scores), index)
            updates, state = tx.update(bias, state, expert_usage=metrics["expert_usage"])
            return (bias + updates, state), metrics["max_violation"]

        start = (jnp.zeros(8), tx.init(jnp.zeros(8)))
        violations = jax.lax.scan(step, start, length=400)[1]
        assert violations[0] > 1.0
        assert violations[-1] < 0.1

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_load_that_is_not_finite_is_held_and_counted(self, bad):
        updates, state = _update(
            mo.balance_router_bias(), jnp.zeros(4), expert_usage=USAGE.at[0].set(bad)
        )
        np.testing.assert_array_equal(updates, np.zeros(4))
        assert int(state.nonfinite_count) == 1

    def test_no_load_and_no_rate_are_held_and_counted(self):
        for tx, load in (
            (mo.balance_router_bias(rule="proportional"), jnp.zeros(4)),
            (mo.balance_router_bias(lambda count: jnp.nan), USAGE),
        ):
            updates, state = _update(tx, jnp.zeros(4), expert_usage=load)
            np.testing.assert_array_equal(updates, np.zeros(4))
            assert int(state.nonfinite_count) == 1

    def test_a_schedule_below_zero_is_clipped(self):
        tx = mo.balance_router_bias(lambda count: -1.0)
        updates, _ = _update(tx, jnp.zeros(4), expert_usage=USAGE)
        np.testing.assert_array_equal(updates, np.zeros(4))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_updates_leave_in_the_dtype_they_came_in(self, dtype):
        updates, _ = _update(mo.balance_router_bias(), jnp.zeros(4, dtype), expert_usage=USAGE)
        assert updates.dtype == dtype


class TestLayers:
    def _usage(self, layers, experts):
        return jax.random.dirichlet(jax.random.key(1), jnp.ones(experts), (layers,))

    @pytest.mark.parametrize(
        "name",
        [n for n, t in TREES.items() if "balance_bias" in {x.label for x in t.leaves.values()}],
    )
    def test_biases_of_every_code_base_follow_their_own_layer(self, name):
        tree = TREES[name]
        if tree.style == "nnx":
            pytest.importorskip("flax.nnx", exc_type=Exception)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape), build(tree))
        experts = 7
        usage = self._usage(tree.num_layers, experts)
        factory = mo.moe_partition(optax.sgd, mo.label_moe_params)
        tx = factory(1.0, balance_update_rate=0.01)
        updates, _ = tx.update(params, tx.init(params), params, expert_usage_per_layer=usage)
        known = {tuple(re.split("[/.]", path)): leaf for path, leaf in tree.leaves.items()}
        moved = []
        for path, update in leaves_with_paths(updates)[0]:
            if known[path].label != "balance_bias":
                assert not update.any()
                continue
            rows = jnp.moveaxis(update, known[path].layer_axis or 0, 0)
            moved += list(rows.reshape(-1, experts))
        expected = jnp.sign(1 / experts - usage)
        expected = 0.01 * (expected - expected.mean(-1, keepdims=True))
        np.testing.assert_allclose(jnp.stack(moved), expected, atol=1e-7)

    def test_one_load_is_not_enough_for_many_layers(self):
        biases = {"l_0": jnp.zeros(4), "l_1": jnp.zeros(4)}
        with pytest.raises(ValueError, match=r"expert_usage_per_layer, \[L, E\]"):
            _update(mo.balance_router_bias(), biases, expert_usage=USAGE)

    def test_biases_of_another_size_than_the_load(self):
        with pytest.raises(ValueError, match=r"load of 4 experts.*shape \(5,\)"):
            _update(mo.balance_router_bias(), jnp.zeros(5), expert_usage=USAGE)

    def test_no_load(self):
        with pytest.raises(TypeError, match=r"'expert_usage_per_layer', which was not passed"):
            _update(mo.balance_router_bias(), jnp.zeros(4))


LABELS = {"router": "gate", "experts": "expert", "bias": "balance_bias", "dense": "dense"}


class TestInPartition:
    def _params(self):
        return {name: jnp.ones(4) for name in LABELS}

    def test_no_moments_no_decay_no_clip(self):
        def clipped(learning_rate, weight_decay=0.5):
            return optax.chain(
                optax.clip_by_global_norm(1e-3),
                optax.adamw(learning_rate, weight_decay=weight_decay),
            )

        tx = mo.moe_partition(clipped, LABELS)(1.0, balance_update_rate=0.1)
        p = self._params()
        grads = jax.tree.map(jnp.ones_like, p) | {"bias": jnp.full(4, 1e6)}
        updates, state = tx.update(grads, tx.init(p), p, expert_usage=USAGE)
        np.testing.assert_allclose(updates["bias"], [-0.15, 0.05, 0.05, 0.05], rtol=1e-5)
        # The others' clip never saw the bias's gradient.
        without = {k: v for k, v in LABELS.items() if k != "bias"}
        reference = mo.moe_partition(clipped, without)(1.0)
        q = {k: v for k, v in p.items() if k != "bias"}
        expected, _ = reference.update(
            {k: v for k, v in grads.items() if k != "bias"}, reference.init(q), q
        )
        chex.assert_trees_all_close({k: updates[k] for k in q}, expected, rtol=1e-6)
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
        assert len(moments) == 2 * 3

    def test_a_hyperparameter_like_any_other(self):
        strategy = mo.with_decisions(mo.guard_collapse(patience=1, smoothing=0.0))
        tx = mo.inject_meta_hyperparams(mo.moe_partition(optax.sgd, LABELS), strategy)(
            learning_rate=1.0, balance_update_rate=0.0
        )
        p = self._params()
        state = tx.init(p)
        collapsed = mo.router_metrics(jnp.full([8, 4], 0.01).at[:, 0].set(0.97))
        updates, state = tx.update(p, state, p, **collapsed)
        assert float(optax.tree.get(state, "balance_update_rate")) == pytest.approx(1e-3)
        np.testing.assert_allclose(
            updates["bias"], 1e-3 * np.array([-1.5, 0.5, 0.5, 0.5]), rtol=1e-4
        )
        reasons = {d.hyperparam: d.reason for d in mo.read_decisions(state)}
        assert reasons == {
            "gate_learning_rate": "guard_collapse: load_entropy",
            "balance_update_rate": "guard_collapse: load_entropy",
        }

    def test_a_schedule_under_injection(self):
        tx = mo.inject_meta_hyperparams(
            mo.moe_partition(optax.sgd, LABELS), mo.log_only(mo.plateau())
        )(1.0, balance_update_rate=optax.linear_schedule(0.1, 0.0, 2))
        p = self._params()
        state = tx.init(p)
        for expected in (0.05, 0.025, 0.0):
            updates, state = tx.update(p, state, p, value=1.0, expert_usage=USAGE)
            assert float(updates["bias"][1]) == pytest.approx(expected)

    def test_without_a_rate_nothing_moves(self):
        tx = mo.moe_partition(optax.sgd, LABELS)(1.0)
        updates, _ = tx.update(self._params(), tx.init(self._params()))
        np.testing.assert_array_equal(updates["bias"], np.zeros(4))

    def test_a_rule_that_is_none(self):
        with pytest.raises(ValueError, match="rule must be one of"):
            mo.moe_partition(optax.sgd, LABELS, balance_rule="signum")

    def test_a_rate_without_a_bias(self):
        labels = LABELS | {"bias": "dense"}
        with pytest.raises(ValueError, match="labelled 'balance_bias'"):
            mo.moe_partition(optax.sgd, labels)(1.0, balance_update_rate=1e-3).init(self._params())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update_rate": -1.0}, "update_rate must be a number in .*-1.0"),
        ({"update_rate": np.nan}, "update_rate"),
        ({"rule": "signum"}, r"rule must be one of \('sign', 'proportional'\), got 'signum'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mo.balance_router_bias(**arguments)
