"""`inject_meta_hyperparams`: what reaches the optimizer, and what is an error."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import LABELS, STRATEGIES, custom, injected, params, row

import meta_optax as mo


def _plateaued(**hyperparams):
    strategy = mo.plateau(patience=1, wd_increase_factor=1.0)
    return mo.inject_meta_hyperparams(optax.adamw, strategy)(**hyperparams)


def _run(tx, values, p=None, state=None):
    p = params() if p is None else p
    state = tx.init(p) if state is None else state
    for value in values:
        updates, state = tx.update(p, state, p, value=value)
    return updates, state


class TestState:
    def test_hyperparams_are_strong_float32_scalars(self):
        for p in (params(), params(jnp.bfloat16)):
            state = injected(STRATEGIES["chain"]).init(p)
            assert isinstance(state.hyperparams, dict)
            for value in state.hyperparams.values():
                assert (value.dtype, value.shape, value.weak_type) == (jnp.float32, (), False)
            assert {"b1", "b2", "eps", "gate_weight_decay"} <= set(state.hyperparams)

    def test_bf16_params_do_not_round_the_hyperparameters(self):
        """Optax would turn b2 = 0.999 into 1.0 (optax #1414)."""
        assert float(
            _plateaued(learning_rate=1e-3).init(params(jnp.bfloat16)).hyperparams["b2"]
        ) == (np.float32(0.999))

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_a_rate_is_found_without_ambiguity(self, name):
        tx = injected(STRATEGIES[name], learning_rate=optax.constant_schedule(0.25))
        p = params()
        state = tx.init(p)
        for _ in range(2):
            assert float(optax.tree.get(state, "learning_rate")) > 0
            assert float(optax.tree.get(state, "weight_decay")) > 0
            _, state = tx.update(p, state, p, **row())

    def test_integers_with_an_integer_default_stay_integers(self):
        def factory(learning_rate, steps=3):
            return optax.sgd(learning_rate / steps)

        state = mo.inject_meta_hyperparams(factory, mo.plateau())(1).init(params())
        assert state.hyperparams["learning_rate"].dtype == jnp.float32
        assert state.hyperparams["steps"].dtype == jnp.int32

    def test_floats_for_integer_defaults_stay_floats(self):
        def factory(learning_rate=1, weight_decay=0, momentum=0):
            return optax.chain(
                optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum)
            )

        make = mo.inject_meta_hyperparams(factory, mo.plateau())
        state = make(0.1, weight_decay=0.3, momentum=0.9).init(params())
        read = {"learning_rate": 0.1, "weight_decay": 0.3, "momentum": 0.9}
        assert mo.read_hyperparams(state) == pytest.approx(read)
        assert make().init(params()).hyperparams["learning_rate"].dtype == jnp.float32

    @pytest.mark.filterwarnings("ignore:Specifying a key:UserWarning")
    @pytest.mark.parametrize("seed", [0, None])
    def test_seeds_and_keys_are_left_to_the_factory(self, seed):
        key = jax.random.key(0) if seed is None else seed
        tx = mo.inject_meta_hyperparams(optax.noisy_sgd, mo.plateau())(0.1, key=key)
        assert mo.read_hyperparams(_run(tx, [1.0])[1])["learning_rate"] == pytest.approx(0.1)

    def test_the_callers_array_survives_donation(self):
        rate, b1 = jnp.float32(0.1), jnp.float32(0.9)
        tx = _plateaued(learning_rate=rate, b1=b1)
        p = params()
        state = tx.init(p)
        jax.jit(lambda g, s: tx.update(g, s, g, value=1.0), donate_argnums=1)(p, state)
        assert not rate.is_deleted()
        assert not b1.is_deleted()

    def test_one_array_can_serve_two_groups(self):
        rate = jnp.float32(0.1)
        factory = mo.moe_partition(optax.adamw, LABELS)
        tx = mo.inject_meta_hyperparams(factory, mo.plateau())(
            learning_rate=rate, gate_learning_rate=rate, expert_learning_rate=rate
        )
        p = params()
        jax.jit(lambda g, s: tx.update(g, s, g, value=1.0), donate_argnums=1)(p, tx.init(p))

    def test_counts_saturate(self):
        tx = _plateaued(learning_rate=0.1)
        p = params()
        state = tx.init(p)._replace(count=jnp.int32(2**31 - 1))
        assert int(_run(tx, [1.0], p, state)[1].count) == 2**31 - 1

    def test_no_value_of_a_trace_outlives_it(self):
        tx = injected(STRATEGIES["with_decisions"])
        p = params()
        with jax.checking_leaks():
            jax.jit(lambda g, s: tx.update(g, s, g, **row()))(p, tx.init(p))


class TestActing:
    @pytest.mark.parametrize("inner", [optax.sgd, optax.adam, optax.adamw, optax.lion])
    def test_updates_are_those_of_the_optimizer_at_the_rate_in_use(self, inner):
        tx = mo.inject_meta_hyperparams(inner, mo.plateau(patience=1))(learning_rate=0.1)
        p = params()
        updates, state = _run(tx, [1.0, 1.0, 1.0], p)
        reference = inner(0.1)
        ref_state = reference.init(p)
        for _ in range(3):
            expected, ref_state = reference.update(p, ref_state, p)
        assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.025)
        for name in p:
            np.testing.assert_allclose(updates[name], expected[name] / 4, rtol=1e-5)

    def test_metrics_act_on_their_own_step(self):
        updates, _ = _run(_plateaued(learning_rate=0.1, weight_decay=0.0), [1.0, 1.0])
        first, _ = _run(_plateaued(learning_rate=0.1, weight_decay=0.0), [1.0])
        np.testing.assert_allclose(updates["router"], first["router"] / 2, rtol=1e-4)

    def test_cosine_times_plateau_is_one_line(self):
        cosine = optax.cosine_decay_schedule(0.1, 100)
        _, state = _run(_plateaued(learning_rate=cosine), [1.0] * 3)
        assert float(state.hyperparams["learning_rate"]) == pytest.approx(float(cosine(2)) / 4)

    def test_floor_lifts_no_schedule(self):
        falling = optax.linear_schedule(1.0, 0.0, 4)
        strategy = mo.plateau(patience=1, min_lr=0.6)
        tx = mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=falling)
        p, rates = params(), []
        state = tx.init(p)
        for _ in range(6):
            _, state = _run(tx, [1.0], p, state)
            rates.append(float(state.hyperparams["learning_rate"]))
        assert rates == pytest.approx([1.0, 0.6, 0.5, 0.25, 0.0, 0.0])

    @pytest.mark.parametrize("wrap", [lambda m: m, mo.log_only])
    def test_cuts_end_at_the_floor_and_a_rising_base_comes_back(self, wrap):
        """The factor does not fall out of sight at the floor, nor in a dry run."""
        rising = optax.piecewise_constant_schedule(1e-5, {12: 1000.0})
        strategy = wrap(mo.plateau(patience=1, min_lr=1e-6))
        _, state = _run(
            mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=rising), [1.0] * 12
        )
        assert float(state.meta_state.rate_scale) == pytest.approx(1 / 16)

    def test_arguments_of_like_names_are_left_alone(self):
        def factory(learning_rate, max_learning_rate=1.0, ema_of_learning_rate=0.5):
            return optax.sgd(learning_rate)

        tx = mo.inject_meta_hyperparams(factory, mo.plateau(patience=1))(0.1)
        read = mo.read_hyperparams(_run(tx, [1.0] * 3)[1])
        assert (read["max_learning_rate"], read["ema_of_learning_rate"]) == (1.0, 0.5)

    def test_stateful_schedule_of_optax_is_a_base(self):
        class Halving:
            def init(self):
                return jnp.float32(1.0)

            def update(self, state, **extra_args):
                return state * extra_args["value"]

            def __call__(self, state, **extra_args):
                return state

        _, state = _run(_plateaued(learning_rate=Halving()), [0.5, 0.4, 0.3])
        assert float(optax.tree.get(state, "learning_rate")) == pytest.approx(0.2)

    def test_base_can_be_changed_in_flight_without_a_trace(self):
        tx = _plateaued(learning_rate=0.1)
        p = params()
        step = jax.jit(lambda s: tx.update(p, s, p, value=1.0)[1])
        state = step(step(tx.init(p)))
        state = optax.tree.set(state, base_learning_rate=jnp.float32(8.0))
        assert float(step(state).hyperparams["learning_rate"]) == pytest.approx(2.0)
        assert step._cache_size() == 1

    def test_uncontrolled_hyperparameter_can_be_written_to_as_with_optax(self):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(0.1, momentum=0.5)
        p = params()
        state = tx.init(p)
        state.hyperparams["momentum"] = jnp.float32(0.0)
        _, state = _run(tx, [1.0], p, state)
        updates, state = _run(tx, [0.9], p, state)
        assert float(state.hyperparams["momentum"]) == 0.0
        np.testing.assert_allclose(updates["router"], -0.1 * p["router"], rtol=1e-6)

    def test_norms_are_those_of_optax(self):
        seen = {}

        def observe(state, metrics):
            seen.update(metrics)
            return state

        spy = custom()._replace(observe=observe, metrics=("grad_norm", "param_norm"))
        tx = mo.inject_meta_hyperparams(optax.sgd, spy)(0.1)
        for dtype in (jnp.float32, jnp.bfloat16):
            p = params(dtype)
            grads = jax.tree.map(lambda x: 3 * x, p)
            tx.update(grads, tx.init(p), p)
            wide = optax.tree.cast(p, jnp.float32)
            assert seen["grad_norm"].dtype == jnp.float32
            np.testing.assert_allclose(seen["param_norm"], optax.tree.norm(wide), rtol=1e-6)
            np.testing.assert_allclose(seen["grad_norm"], 3 * optax.tree.norm(wide), rtol=1e-2)
        tx.update(p, tx.init(p), p, grad_norm=7.0)
        assert seen["grad_norm"] == 7.0
        assert int(seen["step"]) == 0
        assert float(seen["learning_rate"]) == pytest.approx(0.1)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nonfinite_gradients_become_no_decision(self, bad):
        tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau(patience=1))(0.1)
        p = params()
        _, state = _run(tx, [1.0], p)
        _, held = tx.update(jax.tree.map(lambda x: x * bad, p), state, p, value=1.0)
        assert int(held.meta_state.nonfinite_count) == 1
        assert mo.read_hyperparams(held) == mo.read_hyperparams(state)

    def test_extra_args_reach_the_inner_optimizer(self):
        def factory(learning_rate):
            return optax.chain(
                optax.sgd(learning_rate), optax.contrib.reduce_on_plateau(patience=1)
            )

        tx = mo.inject_meta_hyperparams(factory, mo.expert_gate())
        with pytest.raises(ValueError, match="gate_learning_rate"):
            tx(learning_rate=1.0)
        tx = mo.inject_meta_hyperparams(factory, mo.log_only(mo.plateau()))(learning_rate=1.0)
        updates, _ = _run(tx, [1.0, 1.0, 1.0])
        assert float(np.abs(updates["router"]).max()) < 0.5


class TestErrors:
    def test_missing_metric(self):
        tx = _plateaued(learning_rate=0.1)
        p = params()
        with pytest.raises(TypeError, match=r"plateau needs the metric 'value'.*value=loss"):
            jax.jit(lambda s: tx.update(p, s, p, loss=1.0))(tx.init(p))

    def test_no_params_where_a_norm_needs_them(self):
        tx = mo.inject_meta_hyperparams(optax.adamw, mo.advanced_plateau())(0.1)
        p = params()
        with pytest.raises(
            TypeError, match=r"advanced_plateau.*'param_norm'.*without params.*params"
        ):
            tx.update(p, tx.init(p), value=1.0)

    def test_key_that_the_factory_does_not_take(self):
        with pytest.raises(
            ValueError, match=r"'gate_learning_rate'.*adamw.*moe_partition\(adamw, labels\)"
        ):
            mo.inject_meta_hyperparams(optax.adamw, mo.expert_gate())(learning_rate=0.1)
        warm = custom()._replace(apply=lambda s, h: {**h, "warmth": jnp.ones([])})
        with pytest.raises(
            ValueError, match=r"custom sets the hyperparameter 'warmth'.*give adamw"
        ):
            mo.inject_meta_hyperparams(optax.adamw, warm)(learning_rate=0.1)

    def test_nothing_to_control(self):
        with pytest.raises(ValueError, match=r"plateau controls 'learning_rate'.*'step_size'"):
            mo.inject_meta_hyperparams(optax.scale, mo.plateau())(step_size=0.1)

        def make(lr, weight_decay=1e-2):
            return optax.adamw(lr, weight_decay=weight_decay)

        for strategy in (mo.plateau(), mo.advanced_plateau()):
            with pytest.raises(ValueError, match=r"controls 'learning_rate'.*'lr'"):
                mo.inject_meta_hyperparams(make, strategy)(0.1)

    def test_schedule_that_starts_below_zero(self):
        tx = _plateaued(learning_rate=lambda count: -1e-3)
        with pytest.raises(ValueError, match=r"'learning_rate' starts at -0.001"):
            tx.init(params())

    def test_mask_that_answers_with_a_bool(self):
        tx = _plateaued(learning_rate=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
        with pytest.raises(TypeError, match=r"'mask'.*static_args='mask'"):
            tx.init(params())

    def test_optimizer_in_place_of_a_factory(self):
        for make in (
            lambda: mo.inject_meta_hyperparams(optax.sgd(0.1), mo.plateau()),
            lambda: mo.moe_partition(optax.sgd(0.1), LABELS),
        ):
            with pytest.raises(TypeError, match="factory"):
                make()

    @pytest.mark.parametrize("base", [math.nan, math.inf, -0.1, jnp.float32(-1.0), np.nan])
    def test_base_out_of_range(self, base):
        with pytest.raises(ValueError, match="learning_rate"):
            _plateaued(learning_rate=base)

    def test_base_that_is_no_scalar(self):
        with pytest.raises(ValueError, match=r"'learning_rate' must be a scalar.*\(3,\)"):
            _plateaued(learning_rate=jnp.ones(3))

    def test_schedule_that_is_none(self):
        tx = _plateaued(learning_rate=0.1, mask=lambda p: {"no": "schedule"})
        with pytest.raises(TypeError, match=r"'mask'.*static_args='mask'"):
            tx.init(params())

    def test_mask_as_a_static_argument(self):
        tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau(), static_args="mask")(
            0.1, weight_decay=1.0, mask=lambda p: jax.tree.map(lambda _: False, p)
        )
        with_mask, _ = _run(tx, [1.0])
        without, _ = _run(_plateaued(learning_rate=0.1, weight_decay=0.0), [1.0])
        np.testing.assert_allclose(with_mask["router"], without["router"], rtol=1e-6)

    def test_unknown_static_argument(self):
        with pytest.raises(ValueError, match="maks"):
            mo.inject_meta_hyperparams(optax.adamw, mo.plateau(), static_args="maks")

    def test_unknown_argument(self):
        with pytest.raises(TypeError, match="learing_rate"):
            _plateaued(learning_rate=0.1, learing_rate=0.1)

    def test_first_schedule_value_that_is_not_finite(self):
        """An inverse square root is infinite at step 0: nothing is emitted until it is not."""

        def rsqrt(count):
            return 1.0 / jnp.sqrt(count.astype(jnp.float32))

        tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=rsqrt)
        p = params()
        updates, state = _run(tx, [1.0], p)
        assert (np.asarray(updates["router"]) == 0).all()
        _, state = _run(tx, [0.9], p, state)
        assert float(state.hyperparams["learning_rate"]) == 1.0
