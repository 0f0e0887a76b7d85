"""Softmax heads by hand: what a reward credits, how far it moves them, and their prior."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_optax import _heads
from meta_optax._policy_gradient import FEATURES

FACTORS = (0.7, 1.0, 1.4)
PACE = _heads.Pace(rate=0.3, trust_region=0.02, baseline_decay=0.9, trace_decay=0.5)


class TestLearning:
    """By hand, of one feature and two actions that are equally likely."""

    features = jnp.zeros([FEATURES]).at[0].set(1.0)
    active = jnp.array([True, False, False, False])

    def _choice(self, action):
        likely = _heads.Heads(*[jnp.array([0.5, 0.5])] * 4)
        return _heads.Choice(self.features, jnp.array([action, 0, 0, 0], jnp.int32), likely)

    def _learn(self, learner, surplus, action=1):
        return _heads.learn(learner, self._choice(action), jnp.float32(surplus), self.active, PACE)

    def test_trace_gradient_and_baseline(self):
        learner = self._learn(_heads.new_learner(FEATURES, [2] * 4), 0.5)
        # The first reward is its own deviation, so 1.
        np.testing.assert_allclose(learner.trace.rate_head[0], [-0.5, 0.5])
        np.testing.assert_allclose(learner.gradient.rate_head[0], [-0.01, 0.01], rtol=1e-5)
        assert float(learner.baseline) == pytest.approx(0.1)
        learner = self._learn(learner, 0.5, action=0)
        np.testing.assert_allclose(learner.trace.rate_head[0], [0.25, -0.25])
        wanted = 0.98 * 0.01 + 0.02 * 0.9 * -0.25
        np.testing.assert_allclose(learner.gradient.rate_head[0, 1], wanted, rtol=1e-5)

    def test_rewards_are_in_deviations_and_clipped(self):
        learner = _heads.new_learner(FEATURES, [2] * 4)
        for _ in range(50):
            learner = self._learn(learner, 0.0)
        before = float(learner.baseline)
        learner = self._learn(learner, 1e6)
        assert before == 0.0
        assert float(learner.baseline) == pytest.approx(0.3)

    def test_no_evidence_no_move(self):
        weight = jnp.float32(1.0)
        mean = jnp.full([FEATURES, 2], 0.1)
        size = float(jnp.square(mean).sum())
        left = 3.0 * 0.02 / 1.98
        assert float(_heads.evidence(mean, jnp.float32(size / left), weight)) == pytest.approx(
            0.0, abs=1e-6
        )
        half = _heads.evidence(mean, jnp.float32(0.5 * size / left), weight)
        assert float(half) == pytest.approx(0.5, rel=1e-5)
        assert float(_heads.evidence(0.0 * mean, jnp.float32(1.0), weight)) == 0.0

    def test_a_move_stays_within_the_trust_region(self):
        likely = jnp.array([0.2, 0.5, 0.3])
        move = jnp.zeros([FEATURES, 3]).at[0].set(jnp.array([1.0, -2.0, 0.5]))
        share = _heads.within_trust(move, self.features, likely, jnp.float32(0.001))
        moved = jax.nn.softmax(jnp.log(likely) + share * move[0])
        divergence = float((likely * jnp.log(likely / moved)).sum())
        assert divergence == pytest.approx(0.001, rel=0.1)
        assert float(_heads.within_trust(1e-4 * move, self.features, likely, share)) == 1.0

    def test_prior_prefers_to_leave_alone_and_cuts_what_rises(self):
        prior = _heads.prior_of(FACTORS, 1.0)
        weights = _heads.Heads(*[jnp.zeros([FEATURES, 3])] * 4)
        late = jnp.int32(10**6)

        def likely(slope):
            features = self.features.at[1].set(slope)
            plain = _heads.prior_of(FACTORS)
            return _heads.probabilities(weights, (prior, plain, plain, plain), features, late)

        np.testing.assert_allclose(likely(0.0).decay_head, [0.1, 0.8, 0.1], atol=1e-4)
        for slope, cut in ((-1.0, 0.0), (0.0, 1.0), (1.0, 2.0)):
            odds = np.array([math.exp(cut), 8.0, math.exp(-cut)])
            np.testing.assert_allclose(likely(slope).rate_head, odds / odds.sum(), rtol=1e-3)
        np.testing.assert_array_equal(_heads.prior_of((0.5, 2.0))[0], [0.0, 0.0])

    def test_early_decisions_explore_more(self):
        prior = _heads.prior_of(FACTORS)
        weights = _heads.Heads(*[jnp.zeros([FEATURES, 3])] * 4)
        first, later = (
            _heads.probabilities(weights, [prior] * 4, self.features, jnp.int32(k))[0]
            for k in (0, 1000)
        )
        assert float(first[1]) < float(later[1]) - 0.1
