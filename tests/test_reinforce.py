"""The recorded policy gradient: its features and rewards, and that it learns what there is."""

import json
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import plain

import meta_optax as mo
from meta_optax._policy import Policy, Samples, policy_loss

RECORDS = [
    record
    for record in json.loads((pathlib.Path(__file__).parent / "data/traces.json").read_text())
    if record["meta_optimizer"] == "reinforce_features"
]
FACTORS, STEPS = 3, 3
DECISIONS, LAST = 3000, 500


@pytest.mark.parametrize("record", RECORDS)
def test_features_and_rewards_are_those_of_the_records(record):
    meta = mo.reinforce(update_frequency=1)
    state = meta.init()
    for row, features, reward in zip(
        record["metrics"], record["expected_features"], record["expected_rewards"], strict=True
    ):
        state = meta.observe(state, {**row, "value": row["loss"]})
        np.testing.assert_allclose(state.features, features, rtol=1e-5, atol=1e-6)
        assert float(state.reward) == pytest.approx(reward, rel=1e-5, abs=1e-5)


def test_there_are_three_records():
    assert len(RECORDS) == 3


def _play(seeds, gain, *, shift=0, noise=0.0, **arguments):
    """The actions of a policy whose action of one row sets the fall of the loss to the next."""
    rows = DECISIONS

    def run(seed):
        meta = mo.reinforce(update_frequency=1, seed=seed, **arguments)
        drawn = noise * jax.random.normal(jax.random.key(1000 + seed), [rows])

        def row(carry, step_and_noise):
            state, loss, past = carry
            step, wobble = step_and_noise
            metrics = {"step": step, "value": loss, "grad_norm": jnp.float32(1.0)}
            metrics |= {"learning_rate": jnp.float32(1e-3), "weight_decay": jnp.float32(1e-4)}
            state = meta.observe(state, metrics)
            past = jnp.concatenate([state.action[None], past[:-1]])
            return (state, loss - gain(past[shift]) + wobble, past), state.action

        start = (meta.init(), jnp.float32(5.0), jnp.zeros([2], jnp.int32))
        return jax.lax.scan(row, start, (jnp.arange(rows, dtype=jnp.int32), drawn))[1]

    actions = jax.jit(jax.vmap(run))(jnp.asarray(seeds, jnp.int32))
    return np.asarray(actions) // STEPS


def _pays(best, gain=1e-2):
    return lambda action: jnp.where(action // STEPS == best, gain, 0.0)


def _shares(factors):
    """How often each factor was chosen in the last rows, [seeds, factors]."""
    return np.stack([(factors[:, -LAST:] == i).mean(axis=1) for i in range(FACTORS)], axis=1)


class TestBandit:
    """One factor always earns more than the others."""

    @pytest.mark.parametrize("best", range(FACTORS))
    def test_it_finds_the_factor_that_pays(self, best):
        shares = _shares(_play(range(5), _pays(best)))
        assert (shares[:, best] >= 0.8).all(), shares

    @pytest.mark.parametrize("gain", [1e-4, 1.0])
    def test_it_finds_it_whatever_the_scale_and_under_noise_of_the_same_size(self, gain):
        shares = _shares(_play(range(5), _pays(2, gain), noise=gain))
        assert (shares[:, 2] >= 0.8).all(), shares

    def test_it_fails_where_each_reward_is_of_the_decision_before(self):
        shares = _shares(_play(range(5), _pays(2), shift=1))
        assert (shares[:, 2] < 0.6).all(), shares

    def test_noise_alone_teaches_nothing(self):
        shares = np.median(_shares(_play(range(5), lambda a: 0.0 * a, noise=1e-2)), axis=0)
        assert ((shares >= 0.2) & (shares <= 0.5)).all(), shares


def _observe(meta, state, step, value, **more):
    return meta.observe(state, {"step": step, "value": value, "grad_norm": 1.0, **more})


def _learned(state):
    """What only rewards change."""
    return state.policy, state.opt_state, state.samples, state.baseline, state.squares


class TestPolicy:
    def test_gradient_goes_through_the_log_probability(self):
        """By hand: one hidden unit, two actions, no entropy bonus."""
        policy = Policy(
            hidden_kernel=jnp.array([[0.5], [0.0]]),
            hidden_bias=jnp.array([0.1]),
            kernel=jnp.array([[0.02, -0.04]]),
            bias=jnp.array([0.0, 0.01]),
        )
        samples = Samples(
            features=jnp.array([[1.0, -1.0]]),
            actions=jnp.array([1], jnp.int32),
            advantages=jnp.array([2.0]),
            count=jnp.array(1, jnp.int32),
        )
        grads = jax.grad(policy_loss)(policy, samples, 0.0)
        hidden = math.tanh(0.6)
        logits = 5.0 * np.array([0.02 * hidden, -0.04 * hidden + 0.01])
        probs = np.exp(logits) / np.exp(logits).sum()
        by_logit = 2.0 * 5.0 * (probs - np.array([0.0, 1.0]))
        np.testing.assert_allclose(grads.bias, by_logit, rtol=1e-5)
        np.testing.assert_allclose(grads.kernel[0], hidden * by_logit, rtol=1e-5)
        by_hidden = (1.0 - hidden**2) * by_logit @ np.array([0.02, -0.04])
        np.testing.assert_allclose(
            grads.hidden_kernel[:, 0], by_hidden * np.array([1.0, -1.0]), rtol=1e-4
        )

    def test_it_moves_without_the_entropy_bonus(self):
        meta = mo.reinforce(update_frequency=1, batch_size=2, entropy_weight=0.0)
        state = meta.init()
        before = state.policy
        for step, value in enumerate([3.0, 2.0, 1.9, 1.0, 0.9]):
            state = _observe(meta, state, step, value)
        assert float(jnp.abs(state.policy.bias - before.bias).max()) > 1e-5

    def test_every_action_is_as_likely_at_first(self):
        meta = mo.reinforce(update_frequency=1)
        chosen = jax.vmap(
            lambda seed: (
                _observe(
                    mo.reinforce(seed=seed),
                    meta.init()._replace(draw_key=jax.random.key(seed)),
                    0,
                    1.0,
                ).action
            )
        )(jnp.arange(900, dtype=jnp.int32))
        np.testing.assert_allclose(np.bincount(chosen, minlength=9), 100, atol=40)


class TestCredit:
    def test_a_reward_that_is_not_finite_is_dropped_with_its_decision(self):
        meta = mo.reinforce(update_frequency=1, batch_size=3)
        state = _observe(meta, _observe(meta, meta.init(), 0, 2.0), 1, 1.5)
        assert int(state.samples.count) == 1
        held = _observe(meta, state, 2, jnp.nan)
        after = _observe(meta, held, 3, 1.0)
        chex.assert_trees_all_equal(_learned(after), _learned(state))
        assert int(after.nonfinite_count) == 1
        assert int(_observe(meta, after, 4, 0.9).samples.count) == 2

    @pytest.mark.parametrize("losses", [(3e38, -3e38), (-3e38, 3e38), (1e30, -1e30)])
    def test_a_reward_beyond_float32_teaches_nothing(self, losses):
        meta = mo.reinforce(update_frequency=1, batch_size=1)
        state = meta.init()
        for step in range(12):
            state = _observe(meta, state, step, losses[step % 2])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain(state)))
        np.testing.assert_allclose(state.policy.kernel, 0.0, atol=1e-4)

    def test_steps_in_between_are_not_seen(self):
        meta = mo.reinforce(update_frequency=4)
        state = _observe(meta, meta.init(), 0, 1.0)
        for step in (1, 2, 3):
            chex.assert_trees_all_equal(plain(_observe(meta, state, step, jnp.nan)), plain(state))
        assert int(_observe(meta, state, 4, 0.5).samples.count) == 1

    def test_the_first_reward_is_the_first_baseline(self):
        meta = mo.reinforce(update_frequency=1, baseline_decay=0.75, reward_scale=2.0)
        state = meta.init()
        for step, value in enumerate([3.0, 2.0, 0.0]):  # rewards of 1 and 2
            state = _observe(meta, state, step, value)
        assert float(state.baseline) == pytest.approx(0.75 * 2.0 + 0.25 * 4.0)
        # The second is 2 above it; of two squares, the first is 0.
        root = math.sqrt(0.01 * 4.0 / (1.0 - 0.99**2))
        np.testing.assert_allclose(state.samples.advantages[:2], [0.0, 2.0 * 2.0 / root], rtol=1e-5)

    def test_a_cost_that_is_passed_counts(self):
        meta = mo.reinforce(update_frequency=1)
        state = _observe(meta, meta.init(), 0, 1.0, cost=0.5)
        assert float(_observe(meta, state, 1, 1.0, cost=0.2).reward) == pytest.approx(0.03)
        held = _observe(meta, state, 1, 1.0, cost=jnp.inf)
        assert int(held.nonfinite_count) == 1


class TestActions:
    def test_rates_stay_within_their_bounds(self):
        for factor, step, expected in ((2, 1e-3, (1.0, 1e-2)), (0.5, -1e-3, (1e-7, 0.0))):
            meta = mo.reinforce(update_frequency=1, lr_actions=[factor], wd_actions=[step])
            tx = mo.inject_meta_hyperparams(optax.adamw, meta)(learning_rate=0.1, weight_decay=1e-3)
            params = jnp.ones(2)

            def update(state, _, tx=tx, params=params):
                return tx.update(params, state, params, value=1.0)[1], None

            state, _ = jax.lax.scan(update, tx.init(params), length=200)
            used = mo.read_hyperparams(state)
            assert used["learning_rate"] == pytest.approx(expected[0])
            assert used["weight_decay"] == pytest.approx(expected[1])
            # And no further: the next action the other way acts at once.
            assert 0 < float(state.meta_state.rate_scale) < 11

    def test_a_base_beyond_the_bounds_is_left_there(self):
        meta = mo.reinforce(lr_actions=[1.0], wd_actions=[0.0])
        state = _observe(meta, meta.init(), 0, 1.0)
        base = {"learning_rate": 3.0, "weight_decay": 0.1}
        out = meta.apply(state, base)
        assert {k: pytest.approx(float(v)) for k, v in out.items()} == base

    def test_a_schedule_keeps_its_shape_and_sgd_has_no_decay(self):
        meta = mo.reinforce(update_frequency=1, lr_actions=[0.5])
        schedule = optax.linear_schedule(1.0, 0.0, 4)
        tx = mo.inject_meta_hyperparams(optax.sgd, meta)(learning_rate=schedule)
        params = jnp.ones(2)
        state, rates = tx.init(params), []
        for _ in range(4):
            _, state = tx.update(params, state, params, value=1.0)
            rates.append(mo.read_hyperparams(state)["learning_rate"])
        np.testing.assert_allclose(rates, [0.5, 0.75 / 4, 0.5 / 8, 0.25 / 16], rtol=1e-6)

    def test_decisions_say_who_took_them(self):
        meta = mo.with_decisions(mo.reinforce(update_frequency=2, lr_actions=[0.5]))
        tx = mo.inject_meta_hyperparams(optax.sgd, meta)(learning_rate=0.5)
        params = jnp.ones(2)
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(params, state, params, value=1.0)
        told = [(d.step, d.new, d.reason) for d in mo.read_decisions(state)]
        assert told == [(0, 0.25, "reinforce: action"), (2, 0.125, "reinforce: action")]

    def test_seeds_decide_the_draws(self):
        first, again, other = (_play(seeds, lambda a: 0.0 * a)[0, :50] for seeds in ([3], [3], [4]))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr_actions", ()),
        ("wd_actions", []),
        ("lr_actions", (0.5, 0.0)),
        ("lr_actions", (0.5, -1.0)),
        ("lr_actions", (math.inf,)),
        ("lr_actions", "1"),
        ("lr_actions", 2.0),
        ("wd_actions", (0, math.nan)),
        ("wd_actions", (math.inf,)),
        ("batch_size", 0),
        ("hidden_dim", 0),
        ("update_frequency", 0),
        ("policy_lr", -1.0),
        ("baseline_decay", 1.0),
        ("entropy_weight", -0.1),
        ("reward_scale", math.inf),
        ("seed", -1),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        mo.reinforce(**{argument: value})
