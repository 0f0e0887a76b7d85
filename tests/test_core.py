"""The core type, custom strategies and the combinators."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import custom, params, row

import meta_optax as mo
from meta_optax import _core


def _observed(strategy, values, base=None):
    base = base or {"learning_rate": jnp.float32(1.0), "weight_decay": jnp.float32(0.1)}
    state, used = strategy.init(), []
    for step, value in enumerate(values):
        seen = {**row(step, value=value), **strategy.apply(state, base), "step": jnp.int32(step)}
        state = strategy.observe(state, {**seen, "grad_norm": jnp.float32(1.0)})
        used.append(float(strategy.apply(state, base)["learning_rate"]))
    return state, used


class TestMetaOptimizer:
    def test_is_a_tuple_of_the_five_fields(self):
        assert mo.MetaOptimizer._fields == ("name", "init", "observe", "apply", "metrics")
        name, _, _, _, metrics = mo.plateau()
        assert (name, metrics) == ("plateau", ("value", "grad_norm"))

    @pytest.mark.parametrize("missing", ["init", "observe", "apply", "name"])
    def test_without_a_function_is_an_error(self, missing):
        fields = {**custom()._asdict()}
        with pytest.raises(TypeError, match=missing):
            mo.MetaOptimizer(**{**fields, missing: None})
        del fields[missing]
        with pytest.raises(TypeError, match=missing):
            mo.MetaOptimizer(**fields)

    def test_metrics_are_names(self):
        with pytest.raises(TypeError, match="metrics"):
            mo.MetaOptimizer(**{**custom()._asdict(), "metrics": "value"})

    def test_replace_keeps_the_type(self):
        assert isinstance(custom()._replace(name="other"), mo.MetaOptimizer)


@pytest.mark.usefixtures("strict_numerics")
class TestChain:
    def test_applies_left_to_right(self):
        both = mo.chain(mo.plateau(), mo.expert_gate(gate_lr_factor=0.5))
        state, _ = _observed(both, [1.0] * 4)
        out = both.apply(state, {"learning_rate": jnp.float32(1.0)})
        assert float(out["learning_rate"]) == 0.5
        assert float(out["gate_learning_rate"]) == pytest.approx(0.5 * 0.5 * 0.5)

    def test_order_does_not_keep_a_plateau_from_the_groups(self):
        """A cut reaches every group, whether the groups' rates were set before it or after."""
        base = {"learning_rate": jnp.float32(1.0)}
        for chain in (
            mo.chain(mo.plateau(), mo.expert_gate()),
            mo.chain(mo.expert_gate(), mo.plateau()),
        ):
            state, _ = _observed(chain, [1.0] * 4)
            out = chain.apply(state, base)
            assert float(out["expert_learning_rate"]) == 0.5

    def test_each_holds_for_its_own_metrics_only(self):
        both = mo.chain(mo.plateau(), mo.expert_gate())
        state = both.observe(both.init(), {**row(1, value=math.nan), "step": jnp.int32(0)})
        assert int(state.states[0].nonfinite_count) == 1
        assert int(state.states[1].nonfinite_count) == 0
        assert int(state.nonfinite_count) == 1
        assert float(state.states[1].gate_scale) == 0.5

    def test_names_the_strategy_that_lacks_a_metric(self):
        both = mo.chain(mo.plateau(), mo.smart_expert_gate())
        seen = {**row(), "step": jnp.int32(0)}
        del seen["expert_usage"]
        with pytest.raises(TypeError, match=r"^smart_expert_gate needs the metric 'expert_usage'"):
            both.observe(both.init(), seen)

    def test_of_nothing_or_of_something_else_is_an_error(self):
        with pytest.raises(ValueError, match="at least one"):
            mo.chain()
        with pytest.raises(TypeError, match="adam"):
            mo.chain(optax.adam)
        with pytest.raises(TypeError, match=r"^chain needs a MetaOptimizer.*mean plateau\(\)"):
            _core.protect(mo.plateau, "chain")


class TestEvery:
    def test_shows_each_nth_row(self):
        values = [1.0, 9.0, 9.0, 1.0, 0.1, 0.1, 1.0, 9.0]
        _, used = _observed(mo.every(3, mo.plateau(patience=2)), values)
        assert used == [1.0] * 6 + [0.5] * 2

    def test_is_what_update_frequency_does(self):
        values = np.random.default_rng(0).uniform(size=40)
        for n in (1, 2, 5):
            _, combined = _observed(mo.every(n, mo.plateau(patience=2)), values)
            _, own = _observed(mo.plateau(patience=2, update_frequency=n), values)
            assert combined == own

    def test_does_not_see_what_is_not_finite_in_between(self):
        state, _ = _observed(mo.every(2, mo.plateau()), [1.0, math.nan, 1.0, math.nan])
        assert int(state.nonfinite_count) == 0

    @pytest.mark.parametrize("n", [0, -1, 1.5, math.nan, "2", None, True])
    def test_period_out_of_range_is_an_error(self, n):
        with pytest.raises(ValueError, match="n must be an integer >= 1"):
            mo.every(n, mo.plateau())


class TestLogOnly:
    def test_moves_its_state_but_no_value(self):
        dry = mo.log_only(mo.plateau(patience=1))
        state, used = _observed(dry, [1.0] * 5)
        wet, _ = _observed(mo.plateau(patience=1), [1.0] * 5)
        assert used == [1.0] * 5
        chex.assert_trees_all_equal(state, wet)

    def test_needs_no_factory_that_takes_what_it_would_set(self):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.log_only(mo.expert_gate()))(0.1)
        p = params()
        updates, state = tx.update(p, tx.init(p), p, **row())
        assert set(state.hyperparams) == {"learning_rate"}
        np.testing.assert_allclose(updates["router"], -0.1 * p["router"], rtol=1e-6)


@pytest.mark.usefixtures("strict_numerics")
class TestBounded:
    def test_clips_from_both_sides(self):
        meta = mo.bounded(mo.plateau(patience=1), learning_rate=(0.3, 0.6))
        _, used = _observed(meta, [1.0] * 4)
        assert used == pytest.approx([0.6, 0.5, 0.3, 0.3])

    @pytest.mark.parametrize(
        "pair", [(1.0, 0.5), (-1.0, 1.0), (math.nan, 1.0), (0.1, math.nan), 0.5, (1.0,), None]
    )
    def test_bad_pair_is_an_error_that_names_the_hyperparameter(self, pair):
        with pytest.raises(ValueError, match="learning_rate"):
            mo.bounded(mo.plateau(), learning_rate=pair)

    def test_unknown_hyperparameter_is_an_error_that_lists_those_there_are(self):
        meta = mo.bounded(mo.plateau(), learing_rate=(0.0, 1.0))
        with pytest.raises(ValueError, match=r"'learing_rate'.*learning_rate"):
            meta.apply(meta.init(), {"learning_rate": 1.0})


class TestCustom:
    def test_is_held_and_counted_by_every_way_to_act(self):
        p = params()
        for tx in (
            mo.inject_meta_hyperparams(optax.sgd, custom())(0.1),
            mo.scale_by_meta(custom()),
        ):
            state = tx.init(p)
            _, state = tx.update(p, state, p, value=1.0)
            _, held = tx.update(p, state, p, value=jnp.nan)
            assert int(held.meta_state.nonfinite_count) == 1
            np.testing.assert_array_equal(held.meta_state.inner, state.meta_state.inner)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
    def test_unsafe_value_is_replaced_by_the_last_safe_one(self, bad):
        def apply(state, hyperparams):
            rate = jnp.where(state > 0, bad, hyperparams["learning_rate"])
            return {**hyperparams, "learning_rate": rate}

        careless = custom()._replace(apply=apply)
        p = params()
        tx = mo.inject_meta_hyperparams(optax.sgd, careless)(learning_rate=0.25)
        state = tx.init(p)
        for _ in range(2):
            _, state = tx.update(p, state, p, value=1.0)
            assert mo.read_hyperparams(state) == {"learning_rate": 0.25}

    def test_array_of_the_users_own_survives_donation_and_weak_types_cost_no_trace(self):
        start = jnp.ones([])
        p = params()
        for init in (lambda: start, lambda: 1.0):
            strategy = custom()._replace(init=init, observe=lambda state, metrics: state * 0.5)
            tx = mo.inject_meta_hyperparams(optax.sgd, strategy)(0.1)
            step = jax.jit(lambda s, tx=tx: tx.update(p, s, p, value=1.0)[1], donate_argnums=0)
            step(step(tx.init(p)))
            assert step._cache_size() == 1
        assert not start.is_deleted()

    def test_that_is_none_is_an_error_that_helps(self):
        makers = [
            lambda m: mo.inject_meta_hyperparams(optax.sgd, m),
            mo.scale_by_meta,
            lambda m: mo.as_schedule(m, 0.1),
            mo.with_decisions,
            mo.log_only,
            mo.bounded,
            lambda m: mo.every(2, m),
        ]
        for make in makers:
            with pytest.raises(TypeError, match=r"MetaOptimizer|plateau"):
                make(mo.plateau)

    def test_that_drops_a_hyperparameter_is_an_error(self):
        dropping = custom()._replace(apply=lambda state, hyperparams: {})
        with pytest.raises(ValueError, match=r"custom drops the hyperparameters.*learning_rate"):
            mo.inject_meta_hyperparams(optax.sgd, dropping)(learning_rate=0.25)

    def test_that_sets_an_array_is_an_error(self):
        def apply(state, hyperparams):
            return {**hyperparams, "learning_rate": jnp.ones([3])}

        with pytest.raises(ValueError, match=r"custom sets 'learning_rate' to shape \(3,\)"):
            mo.inject_meta_hyperparams(optax.sgd, custom()._replace(apply=apply))(0.1)


def test_protect_leaves_those_alone_that_count_for_themselves():
    for strategy in (mo.plateau(), mo.chain(custom()), mo.with_decisions(mo.plateau())):
        assert _core.protect(strategy, "test") is strategy


def test_hold_counts_saturate():
    strategy = mo.expert_gate()
    most = jnp.iinfo(jnp.int32).max
    state = strategy.init()._replace(nonfinite_count=jnp.int32(most))
    state = jax.jit(strategy.observe)(state, {"gate_entropy": jnp.float32(jnp.nan)})
    assert int(state.nonfinite_count) == most
