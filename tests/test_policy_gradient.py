"""The modern policy gradient: what it finds, sees and refuses, and what it does in an optimizer."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import LABELS, params, row

import meta_optax as mo
from meta_optax._signals import add_row, empty_signals, end_interval, read_signals

FACTORS = (0.7, 1.0, 1.4)
GROUP_RATES = ("gate_learning_rate", "expert_learning_rate")
DECISIONS, LAST, GAIN = 3000, 500, 1e-2


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, None, None, None, None))
def _decide_often(seed, best, noise, shift, add, trace_decay):
    """The actions of the rate's head; compiled once for all bandits."""
    meta = mo.policy_gradient(update_frequency=1, seed=seed, trace_decay=trace_decay)
    drawn = noise * jax.random.normal(jax.random.key(1000 + seed), [DECISIONS])

    def decide(carry, step_and_noise):
        state, loss, past = carry
        step, wobble = step_and_noise
        metrics = {"step": step, "value": loss, "grad_norm": 1.0, "param_norm": 1.0}
        metrics |= {"learning_rate": jnp.float32(1e-3), "weight_decay": jnp.float32(1e-4)}
        state = meta.observe(state, metrics)
        past = jnp.concatenate([state.choice.actions[:1], past[:-1]])
        fall = jnp.where(past[shift] == best, GAIN, 0.0) - wobble
        loss = jnp.where(add, loss - fall, loss * jnp.exp(-fall))
        return (state, loss, past), state.choice.actions[0]

    start = (meta.init(), jnp.float32(5.0), jnp.zeros([2], jnp.int32))
    return jax.lax.scan(decide, start, (jnp.arange(DECISIONS, dtype=jnp.int32), drawn))[1]


def _play(best=None, *, noise=0.0, shift=0, add=False, trace_decay=0.5):
    """The shares of the rate's factors in the last decisions, [seeds, factors].

    The factor of one decision sets by how much the loss, or its logarithm, falls to the next.
    """
    best = -1 if best is None else best
    seeds = jnp.arange(5, dtype=jnp.int32)
    actions = np.asarray(_decide_often(seeds, best, noise, shift, add, trace_decay))
    return np.stack([(actions[:, -LAST:] == i).mean(axis=1) for i in range(len(FACTORS))], axis=1)


class TestBandit:
    """One factor always makes the loss fall by more than the others do."""

    @pytest.mark.parametrize("best", range(len(FACTORS)))
    def test_it_finds_the_factor_that_pays(self, best):
        shares = _play(best)
        assert (shares[:, best] >= 0.8).all(), shares

    def test_it_finds_it_in_a_loss_that_goes_through_zero(self):
        shares = _play(2, add=True)
        assert (shares[:, 2] >= 0.8).all(), shares

    def test_noise_of_the_same_size_hides_little(self):
        shares = _play(2, noise=GAIN)
        assert (shares[:, 2] >= 0.6).all(), shares
        assert np.median(shares[:, 2]) >= 0.8, shares

    def test_it_fails_where_each_reward_is_of_the_decision_before(self):
        """Without a trace, which is there to credit decisions before."""
        shares = _play(2, shift=1, trace_decay=0.0)
        assert (shares[:, 2] < 0.6).all(), shares
        # Nor is it the trace that makes it find what pays.
        assert (_play(2, trace_decay=0.0)[:, 2] >= 0.8).all()

    def test_noise_alone_leaves_the_prior_alone(self):
        shares = _play(noise=GAIN)
        assert np.median(shares[:, 1]) >= 0.5, shares
        assert (np.median(shares, axis=0)[[0, 2]] < 0.4).all(), shares


# Of one object the transition compiles once, whatever number of tests call it.
EAGER = mo.policy_gradient(update_frequency=1)


@functools.cache
def _compiled(meta):
    return jax.jit(meta.observe)


def _observe(meta, state, step, value=1.0, **more):
    return _compiled(meta)(
        state, {"step": step, "value": value, "grad_norm": 1.0, "param_norm": 1.0, **more}
    )


def _scales(state):
    return np.exp(np.asarray(state.log_scales))


class TestActions:
    def test_four_heads_and_what_each_moves(self):
        meta = mo.policy_gradient(
            update_frequency=1,
            lr_actions=(0.5,),
            wd_actions=(2,),
            gate_lr_actions=(0.8,),
            expert_lr_actions=(1.25,),
        )
        base = {"learning_rate": 0.1, "weight_decay": 0.01, "gate_learning_rate": 0.2}
        base |= {"expert_learning_rate": 0.4, "expert_weight_decay": 0.02, "b1": 0.9}
        state = _observe(meta, meta.init(), 0, **base)
        state = _observe(meta, state, 1, **base)
        used = meta.apply(state, base)
        wanted = {"learning_rate": 0.05, "weight_decay": 0.02, "gate_learning_rate": 0.08}
        wanted |= {"expert_learning_rate": 0.25, "expert_weight_decay": 0.04, "b1": 0.9}
        assert {k: pytest.approx(float(v), rel=1e-6) for k, v in used.items()} == wanted

    def test_heads_of_nothing_stay_and_learn_nothing(self):
        state = EAGER.init()
        for step in range(30):
            state = _observe(EAGER, state, step, 3.0 / (step + 1), learning_rate=0.1)
        assert state.learner.trace.rate_head.any()
        for trace in state.learner.trace[1:]:
            assert not trace.any()
        np.testing.assert_array_equal(_scales(state)[1:], 1.0)

    def test_scales_stay_within_their_bounds_and_owe_nothing(self):
        meta = mo.policy_gradient(update_frequency=1, lr_actions=(0.5,), min_scale=0.2)
        state = meta.init()
        for step in range(10):
            state = _observe(meta, state, step)
        assert _scales(state)[0] == pytest.approx(0.2)

    def test_it_decides_at_steps_n_2n_and_no_other(self):
        meta = mo.policy_gradient(update_frequency=3, lr_actions=(0.5,))
        state, seen = meta.init(), []
        for step in range(8):
            state = _observe(meta, state, step)
            seen.append(float(_scales(state)[0]))
        assert seen == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25])

    def test_features_are_within_their_bounds(self):
        meta = mo.policy_gradient(update_frequency=1, horizon=4)
        state = meta.init()
        for step, value in enumerate([1e30, -1e30, 0.0, 1e-30, 5.0, 5.0]):
            load = {"gate_entropy_normalized": 0.2, "max_violation": 3.0}
            state = _observe(meta, state, step, value, learning_rate=1e-30, **load)
            assert np.isfinite(state.choice.features).all()
            assert (np.abs(state.choice.features) <= 1).all()
        assert float(state.choice.features[3]) == 1.0
        assert float(state.choice.features[6]) == pytest.approx(-0.6)
        assert float(state.choice.features[7]) == pytest.approx(math.tanh(1.5))

    @pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, 0.0, -1.0])
    def test_no_schedule_leads_to_features_that_are_not_finite(self, rate):
        state = EAGER.init()
        for step in range(3):
            state = _observe(EAGER, state, step, learning_rate=rate)
        assert np.isfinite(state.choice.features).all()

    def test_seeds_under_vmap_are_those_by_themselves(self):
        @jax.jit
        def run(seed):
            meta = mo.policy_gradient(update_frequency=1, seed=seed)

            def advance(state, step):
                return _observe(meta, state, step, 2.0 / (step + 1.0)), None

            return jax.lax.scan(advance, meta.init(), jnp.arange(12))[0].log_scales

        together = jax.vmap(run)(jnp.arange(3))
        np.testing.assert_allclose(together, [run(i) for i in range(3)], rtol=1e-6)
        assert len({tuple(scales) for scales in np.asarray(together).tolist()}) > 1


class TestNonFinite:
    meta = mo.policy_gradient(update_frequency=4, lr_actions=(0.7,), wd_actions=(2,))

    def _after_bad(self, **bad):
        """Decisions at steps 4 and 8, and a bad row at 9."""
        meta, state = self.meta, self.meta.init()
        for step in range(9):
            state = _observe(meta, state, step)
        assert _scales(state)[:2] == pytest.approx([0.49, 4.0])
        assert int(state.learner.count) == 1
        held = _observe(meta, state, 9, **bad)
        return meta, state, held

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_bad_loss_takes_the_action_back_and_cuts_at_the_next_finite_row(self, bad):
        meta, state, held = self._after_bad(value=bad)
        chex.assert_trees_all_equal(held.log_scales, state.log_scales)
        after = _observe(meta, held, 10)
        assert _scales(after)[:2] == pytest.approx([0.35, 2.0])
        rules = after.decision_rules()["learning_rate"]
        assert rules.texts[int(rules.index)] == "policy_gradient: loss not finite"
        # Once, however many rows follow; and another bad one cuts again.
        after = _observe(meta, after, 11)
        assert _scales(after)[:2] == pytest.approx([0.35, 2.0])
        after = _observe(meta, _observe(meta, after, 12, bad), 13)
        assert _scales(after)[:2] == pytest.approx([0.175, 2.0])

    def test_the_interval_of_a_bad_loss_is_not_credited(self):
        meta, _, held = self._after_bad(value=math.nan)
        for step in (10, 11, 12):
            held = _observe(meta, held, step)
        assert int(held.learner.count) == 1
        assert int(held.decision_count) == 3
        for step in (13, 14, 15, 16):
            held = _observe(meta, held, step)
        assert int(held.learner.count) == 2

    def test_a_bad_norm_is_no_decision(self):
        meta, state, held = self._after_bad(grad_norm=math.inf)
        assert int(held.nonfinite_count) == 1
        chex.assert_trees_all_equal(_observe(meta, held, 10).log_scales, state.log_scales)


class TestSignals:
    def _signals(self, losses, rows=1, unit=1e-3):
        state = empty_signals()
        for loss in losses:
            for _ in range(rows):
                state = add_row(state, *map(jnp.float32, (loss, 1.0, 1.0)))
            state = end_interval(state, unit)
        return state

    def test_power_law_predicts_a_power_law(self):
        losses = [3.0 * k**-0.4 for k in range(1, 15)]
        reading = read_signals(self._signals(losses))
        assert float(reading.surplus) == pytest.approx(0.0, abs=2e-3)
        better = read_signals(self._signals([*losses[:-1], losses[-1] * 0.9]))
        assert float(better.surplus) == pytest.approx(-math.log(0.9), abs=3e-3)

    def test_no_unit_moves_a_reading(self):
        losses = [2.0, 1.7, 1.5, 1.6, 1.2, 1.3]
        one, other = (read_signals(self._signals([s * x for x in losses])) for s in (1.0, 1e-5))
        chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)

    def test_slope_score_is_the_t_statistic_of_least_squares(self):
        losses = np.array([2.0, 1.9, 1.95, 1.7, 1.72])
        values, times = np.arcsinh(losses / 2e-3 / 2.0), np.arange(5.0)
        slope, offset = np.polyfit(times, values, 1)
        residuals = values - slope * times - offset
        error = math.sqrt(residuals @ residuals / 3 / ((times - 2.0) ** 2).sum())
        got = float(read_signals(self._signals(losses)).slope_score)
        assert got == pytest.approx(slope / error, rel=1e-2)

    def test_mean_and_noise_of_an_interval(self):
        state = empty_signals()
        for loss in (1.0, 3.0, 2.0, 2.0):
            state = add_row(state, *map(jnp.float32, (loss, 1.0, 1.0)))
        assert float(state.interval.loss) == pytest.approx(2.0)
        noise = float(read_signals(end_interval(state, 1e-3)).noise)
        assert noise == pytest.approx(math.sqrt(0.5 / 4) / 2.0, rel=1e-3)


def test_in_a_real_optimizer_it_says_why():
    strategy = mo.with_decisions(mo.policy_gradient(update_frequency=1, lr_actions=(0.5,)))
    tx = mo.inject_meta_hyperparams(optax.adamw, strategy)(learning_rate=0.1, weight_decay=0.1)
    p = {"w": jnp.ones(3)}
    state = tx.init(p)
    for step in range(3):
        _, state = tx.update(p, state, p, value=row(step)["value"])
    made = [d for d in mo.read_decisions(state) if d.hyperparam == "learning_rate"]
    assert [(d.step, d.new) for d in made] == [(1, pytest.approx(0.05)), (2, pytest.approx(0.025))]
    assert made[0].reason == "policy_gradient: action"


class TestInAnOptimizer:
    def _train(self, tx, p, steps=40, **more):
        """The state after steps of a falling loss."""

        def advance(state, step):
            metrics = {"value": 2.0 / (step + 1.0), **more}
            return tx.update(p, state, p, **metrics)[1], None

        return jax.jit(lambda s: jax.lax.scan(advance, s, jnp.arange(steps))[0])(tx.init(p))

    def test_groups_have_heads_of_their_own_that_act_and_say_why(self):
        probs = jax.nn.softmax(jnp.arange(12.0).reshape(3, 4) / 4.0)
        p = params()
        tx = mo.inject_meta_hyperparams(
            mo.moe_partition(optax.adamw, LABELS),
            mo.with_decisions(mo.policy_gradient(update_frequency=1), 256),
        )(learning_rate=0.1, gate_learning_rate=0.1, expert_learning_rate=0.1)
        state = self._train(tx, p, **mo.router_metrics(probs, probs.argmax(axis=1)[:, None]))
        made = mo.read_decisions(state)
        factors = {name: set() for name in ("learning_rate", *GROUP_RATES)}
        for decision in made:
            assert decision.reason == "policy_gradient: action"
            if decision.hyperparam in factors:
                factors[decision.hyperparam].add(round(decision.new / decision.old, 2))
        # A group's rate moves by its own factor, by the common one, or by both.
        assert factors["learning_rate"] <= {0.7, 1.4}
        assert all({0.8, 1.25} & factors[name] for name in GROUP_RATES)
        learned = state.meta_state.inner
        assert all(trace.any() for trace in learned.learner.trace)
        assert learned.choice.features[6:].all()

    def test_rates_that_are_not_there_are_not_missed(self):
        """Groups without rates of their own follow the common one."""
        tx = mo.inject_meta_hyperparams(
            mo.moe_partition(optax.adamw, LABELS), mo.policy_gradient(update_frequency=1)
        )(learning_rate=0.1)
        state = self._train(tx, params())
        assert not state.meta_state.log_scales[2:].any()
        assert state.meta_state.log_scales[0] != 0

    def test_a_loss_that_comes_now_and_then_is_what_counts(self):
        """Rows without one are not seen: decisions fall on steps that have one."""
        meta = mo.policy_gradient(update_frequency=2, lr_actions=(0.5,))

        def advance(state, step):
            return _observe(meta, state, step, (jnp.float32(1.0), step % 4 == 0)), None

        state = jax.jit(lambda s: jax.lax.scan(advance, s, jnp.arange(9))[0])(meta.init())
        assert int(state.decision_count) == 2
        assert int(state.nonfinite_count) == 0

    def test_a_flag_hides_a_loss_that_is_not_finite(self):
        meta = mo.policy_gradient()
        state = _observe(meta, meta.init(), 0, (jnp.float32(math.nan), False))
        chex.assert_trees_all_equal(state, meta.init())

    def test_behind_an_optimizer_the_rate_alone_has_a_head(self):
        tx = optax.chain(optax.adamw(0.1), mo.scale_by_meta(mo.policy_gradient(update_frequency=1)))
        state = self._train(tx, params(), grad_norm=jnp.float32(1.0))[1]
        assert not state.meta_state.log_scales[1:].any()
        wanted = math.exp(float(state.meta_state.log_scales[0]))
        assert float(state.hyperparams["learning_rate_scale"]) == pytest.approx(wanted)


def test_on_noise_without_slope_the_prior_takes_the_rate_down():
    """The page says how fast: to a thousandth in 45 to 138 decisions, 85 in the median seed."""

    @jax.jit
    @jax.vmap
    def run(seed):
        meta = mo.policy_gradient(seed=seed)
        losses = 1.0 + 0.1 * jax.random.normal(jax.random.key(seed + 5000), [4000])

        def advance(state, row):
            step, loss = row
            rates = {"learning_rate": jnp.float32(1e-3), "weight_decay": jnp.float32(1e-4)}
            state = _observe(meta, state, step, loss, **rates)
            return state, state.log_scales[0]

        return jax.lax.scan(advance, meta.init(), (jnp.arange(4000), losses))[1]

    low = np.asarray(run(jnp.arange(40))) < math.log(1.01e-3)
    assert low.any(axis=1).all()
    decisions = low.argmax(axis=1) / 10
    assert 30 < decisions.min() < np.median(decisions) < 110, decisions


def test_a_loss_that_never_changes_is_nothing_to_learn_from():
    meta = mo.policy_gradient(update_frequency=1)

    @jax.jit
    @jax.vmap
    def run(loss):
        def advance(state, step):
            return _observe(meta, state, step, loss), None

        return jax.lax.scan(advance, meta.init(), jnp.arange(50))[0]

    state = run(jnp.array([0.0, 1.0, -1.0, 3e38, -3e38, 1e-40], jnp.float32))
    chex.assert_tree_all_finite((state.learner, state.log_scales, state.choice))
    assert not any(weights.any() for weights in state.learner.weights)
