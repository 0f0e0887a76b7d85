"""Statistics of a comparison, on arrays."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy import stats as scipy_stats

from meta_optax.compare import _statistics
from meta_optax.compare._runs import at_rates, divergence, make_runs, paired_ratios
from meta_optax.compare._statistics import (
    holm_pvalues,
    interquartile_mean,
    normalized_loss,
    probability_of_improvement,
    ratio_to_peer,
    signed_rank_pvalue,
    task_ratios,
    worst_task,
)

INF = np.inf


def _runs(losses, tasks=None):
    """Runs of which those with an infinite loss diverged."""
    losses = np.asarray(losses, float)
    return make_runs(tasks or [f"task{i}" for i in range(len(losses))], losses, np.isinf(losses))


@st.composite
def _pairs(draw):
    """Losses of two arms on the same tasks, some of whose runs diverge."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4)))
    losses = st.sampled_from([0.01, 0.5, 1.0, 1.1, 2.0, 7.0, 1e6, INF])
    return [draw(hnp.arrays(float, shape, elements=losses)) for _ in range(2)]


class TestRuns:
    def test_what_a_diverged_run_ended_with_is_forgotten(self):
        losses = np.array([[[1.0, 5.0, np.nan, 1e30, -INF]]])
        runs = make_runs(["digits"], losses, np.array([[[False, True, False, True, True]]]))
        assert runs.losses.tolist() == [[[1.0, INF, INF, INF, INF]]]

    def test_divergence_is_counted_by_task(self):
        runs = _runs([[[1, INF], [2, INF]], [[1, 1], [1, 1]], [[INF, INF], [1, INF]]])
        found = divergence(runs)
        assert (found.share, found.count, found.total) == (5 / 12, 5, 12)
        assert found.by_task == {"task0": 2, "task1": 0, "task2": 3}

    def test_well_tuned_and_mis_set_are_parted(self):
        runs = _runs([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
        assert at_rates(runs, [1]).losses.tolist() == [[[2.0], [5.0]]]
        assert at_rates(runs, [0, 2]).losses.tolist() == [[[1.0, 3.0], [4.0, 6.0]]]
        with pytest.raises(ValueError, match="columns must name at least one rate"):
            at_rates(runs, [])

    @pytest.mark.parametrize(
        ("tasks", "losses", "diverged", "message"),
        [
            (["a"], np.ones((2, 3, 1)), np.zeros((2, 3, 1), bool), "1 tasks, seeds, rates"),
            (["a"], np.ones((1, 3)), np.zeros((1, 3), bool), r"got \(1, 3\)"),
            (["a"], np.ones((1, 3, 2)), np.zeros((1, 3, 1), bool), r"and \(1, 3, 1\)"),
            (["a"], np.ones((1, 0, 2)), np.zeros((1, 0, 2), bool), "at least one run"),
            (["a", "a"], np.ones((2, 1, 1)), np.zeros((2, 1, 1), bool), "each be named once"),
        ],
    )
    def test_bad_runs_are_refused(self, tasks, losses, diverged, message):
        with pytest.raises(ValueError, match=message):
            make_runs(tasks, losses, diverged)


class TestRatios:
    def test_divergence_is_a_rank(self):
        arm, peer = _runs([[[1.0, 3.0, INF, INF]]]), _runs([[[2.0, INF, 3.0, INF]]])
        assert paired_ratios(arm, peer).tolist() == [[[0.5, 0.0, INF, 1.0]]]

    def test_only_shared_tasks_are_paired_by_name(self):
        arm = _runs([[[6.0]], [[1.0]], [[2.0]]], ["moe", "alone", "digits"])
        peer = _runs([[[4.0]], [[3.0]]], ["digits", "moe"])
        assert paired_ratios(arm, peer).tolist() == [[[2.0]], [[0.5]]]
        assert worst_task(arm, peer).task == "moe"
        with pytest.raises(ValueError, match="must share a task"):
            paired_ratios(_runs([[[1.0]]], ["other"]), peer)

    def test_arms_of_other_seeds_are_refused(self):
        with pytest.raises(ValueError, match=r"same seeds and rates, got \(3, 1\) and \(2, 1\)"):
            paired_ratios(_runs(np.ones((1, 3, 1))), _runs(np.ones((1, 2, 1))))

    @pytest.mark.parametrize("loss", [0.0, -1.0])
    def test_loss_that_has_no_ratio_is_refused_by_task(self, loss):
        good, bad = _runs([[[1.0]], [[1.0]]]), _runs([[[1.0]], [[loss]]])
        with pytest.raises(ValueError, match="'task1' must be positive"):
            paired_ratios(good, bad)
        with pytest.raises(ValueError, match="'task1' must be positive"):
            signed_rank_pvalue(bad, good)
        with pytest.raises(ValueError, match="'task1' must be positive"):
            normalized_loss(bad, {"task0": 1.0, "task1": 1.0})

    def test_ratio_beyond_the_range_of_floats_is_a_rank(self):
        tiny, huge = _runs([[[1e-200]]]), _runs([[[1e200]]])
        assert paired_ratios(huge, tiny).item() == INF
        assert paired_ratios(tiny, huge).item() == 0.0

    @hypothesis.given(_pairs())
    def test_swapped_arms_invert_ratios_and_keep_the_p_value(self, pair):
        arm, peer = map(_runs, pair)
        forth, back = paired_ratios(arm, peer), paired_ratios(peer, arm)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(back, 1 / forth, rtol=1e-12)
        assert signed_rank_pvalue(arm, peer) == pytest.approx(signed_rank_pvalue(peer, arm))

    @hypothesis.given(_pairs(), st.integers(-8, 8))
    def test_unit_of_a_tasks_loss_does_not_matter(self, pair, exponent):
        scale = 2.0 ** (exponent * np.arange(3))[: len(pair[0]), None, None]
        pair, scaled = ([_runs(losses * factor) for losses in pair] for factor in (1.0, scale))
        np.testing.assert_array_equal(paired_ratios(*scaled), paired_ratios(*pair))
        chances = [probability_of_improvement(*arms, n_resamples=50) for arms in (pair, scaled)]
        np.testing.assert_array_equal(*chances)


class TestInterquartileMean:
    def test_hand_computed(self):
        assert interquartile_mean([9.0, 1.0, 2.0, -50.0]) == 1.5
        assert interquartile_mean([1.0, 2.0, 6.0]) == 3.0  # a quarter of three is no whole run
        assert interquartile_mean([0.0, 1.0, 2.0, 3.0, INF]) == 2.0
        assert interquartile_mean([[1.0, 8.0], [3.0, 4.0]], axis=0).tolist() == [2.0, 6.0]

    def test_infinity_counts_where_the_middle_half_holds_one(self):
        assert interquartile_mean([1.0, 2.0, INF, INF]) == INF
        assert interquartile_mean([-INF, -INF, 1.0, 2.0]) == -INF
        assert interquartile_mean([-INF, -INF, INF, INF]) == INF
        assert interquartile_mean([-INF, 1.0, 3.0, INF]) == 2.0
        assert interquartile_mean([1e308, 1e308]) == INF

    @pytest.mark.parametrize("values", [[], [1.0, np.nan]])
    def test_what_has_no_rank_is_refused(self, values):
        with pytest.raises(ValueError, match="at least one and none of them NaN"):
            interquartile_mean(values)

    @hypothesis.given(
        hnp.arrays(float, st.integers(1, 20), elements=st.floats(-1e6, 1e6)),
        st.data(),
    )
    def test_rises_with_every_value_and_stays_among_them(self, values, data):
        before = interquartile_mean(values)
        slack = 1e-9 * (1 + np.abs(values).max())
        assert values.min() - slack <= before <= values.max() + slack
        raised = values.copy()
        raised[data.draw(st.integers(0, len(values) - 1))] += data.draw(st.floats(0, INF))
        assert interquartile_mean(raised) >= before - slack


# Two arms' losses on 4 tasks with 7 seeds, and what rliable 1.2.0 with arch 7.2.0 printed for them
# (of the negative losses where higher is better): interquartile means, the interval of the first
# from 20,000 resamples, the probability of improvement and its interval from 5,000.
RECORDED_ARM = [
    [1.0, 0.872, 0.863, 1.032, 0.668, 0.575, 1.048],
    [1.209, 0.821, 0.917, 0.836, 0.963, 1.03, 1.045],
    [0.754, 0.834, 0.948, 0.812, 0.463, 0.56, 0.385],
    [1.033, 2.018, 1.502, 1.663, 0.917, 1.464, 1.148],
]
RECORDED_PEER = [
    [1.089, 0.824, 1.094, 1.142, 1.661, 0.912, 1.13],
    [1.264, 0.958, 0.963, 1.245, 0.768, 2.226, 1.452],
    [0.572, 1.244, 0.76, 0.627, 1.171, 1.137, 0.855],
    [1.293, 1.171, 1.443, 1.526, 1.546, 1.033, 1.831],
]
RECORDED_MEANS = (0.9364999999999999, 1.138142857142857)
RECORDED_INTERVAL = (0.87435714, 0.99364286)
RECORDED_PROBABILITY = 0.7091836734693878


class TestAgainstRliable:
    arm = _runs(np.array(RECORDED_ARM)[:, :, None])
    peer = _runs(np.array(RECORDED_PEER)[:, :, None])
    references = dict.fromkeys(arm.tasks, 1.0)

    def test_interquartile_means(self):
        for runs, recorded in zip((self.arm, self.peer), RECORDED_MEANS, strict=True):
            assert interquartile_mean(runs.losses) == pytest.approx(recorded, rel=1e-14)

    def test_stratified_interval(self):
        found = normalized_loss(self.arm, self.references, n_resamples=20_000)
        assert found.value == pytest.approx(RECORDED_MEANS[0], rel=1e-14)
        assert (found.low, found.high) == pytest.approx(RECORDED_INTERVAL, abs=2e-3)

    def test_probability_of_improvement(self):
        found = probability_of_improvement(self.arm, self.peer)
        assert found.value == pytest.approx(RECORDED_PROBABILITY, rel=1e-14)


class TestBootstrap:
    def test_seeds_are_resampled_together_over_tasks_and_rates(self):
        """Where every run of a seed has one ratio, a resample is one of a list of 3 numbers."""
        ratios = np.array([1.0, 2.0, 4.0])
        arm = _runs(np.broadcast_to(ratios[:, None], (4, 3, 5)))
        found = ratio_to_peer(arm, _runs(np.ones((4, 3, 5))))
        # The middle half of 60 ratios leaves 15 off either end: of 20 ones, twos and fours each,
        # 5, 20 and 5 are left.
        assert found.value == pytest.approx((5 * 1 + 20 * 2 + 5 * 4) / 30)
        assert (found.low, found.high) == (1.0, 4.0)  # one of 27 resamples has one seed only

    def test_seeds_are_resampled_apart_within_each_task(self):
        """Tasks that differ only in the order of the seeds: apart, their errors cancel."""
        rng = np.random.default_rng(0)
        losses = np.exp(rng.normal(0, 0.5, 10))
        runs = _runs(np.stack([losses] * 16)[:, :, None])
        references = dict.fromkeys(runs.tasks, 1.0)
        apart = normalized_loss(runs, references)
        together = ratio_to_peer(runs, _runs(np.ones_like(runs.losses)))
        assert apart.value == pytest.approx(together.value)
        assert (apart.high - apart.low) < 0.4 * (together.high - together.low)

    def test_references_are_by_task(self):
        runs = _runs([[[2.0], [2.0]], [[30.0], [30.0]]])
        assert normalized_loss(runs, {"task0": 2.0, "task1": 30.0}) == (1.0, 1.0, 1.0)
        for bad in ({"task0": 2.0}, {"task0": 2.0, "task1": 0.0}):
            with pytest.raises(ValueError, match=r"references\['task1'\] must be positive"):
                normalized_loss(runs, bad)

    def test_seed_decides_to_the_bit(self):
        rng = np.random.default_rng(3)
        arm, peer = (_runs(np.exp(rng.normal(size=(3, 5, 2)))) for _ in range(2))
        for compare in (ratio_to_peer, task_ratios, worst_task, probability_of_improvement):
            assert compare(arm, peer) == compare(arm, peer, seed=0)
            assert compare(arm, peer, n_resamples=40, seed=1) != compare(
                arm, peer, n_resamples=40, seed=2
            )

    def test_one_task_alone_is_that_task_among_others(self):
        rng = np.random.default_rng(4)
        arm, peer = (np.exp(rng.normal(size=(3, 6, 2))) for _ in range(2))
        found = task_ratios(_runs(arm), _runs(peer))
        for i, task in enumerate(found):
            alone = ratio_to_peer(_runs(arm[i : i + 1]), _runs(peer[i : i + 1]))
            assert found[task] == pytest.approx(alone)

    def test_worst_task_has_the_largest_ratio(self):
        arm = _runs([[[1.0], [1.2]], [[3.0], [3.0]], [[3.0], [3.0]]])
        found = worst_task(arm, _runs(np.ones((3, 2, 1))))
        assert found == ("task1", (3.0, 3.0, 3.0))


class TestProbabilityOfImprovement:
    def test_hand_computed(self):
        arm, peer = _runs([[[1.0], [3.0]]]), _runs([[[2.0], [3.0]]])
        # 1 < 2, 1 < 3, 3 > 2, and a tie.
        assert probability_of_improvement(arm, peer).value == (1 + 1 + 0 + 0.5) / 4

    def test_diverged_runs_lose_and_tie_with_one_another(self):
        arm, peer = _runs([[[INF], [1.0]]]), _runs([[[INF], [-5.0]]])
        assert probability_of_improvement(arm, peer).value == (0.5 + 0 + 1 + 0) / 4

    def test_runs_meet_only_within_their_task_and_rate(self):
        arm = _runs([[[1.0, 100.0]], [[7.0, 7.0]]])
        peer = _runs([[[2.0, 50.0]], [[8.0, 8.0]]])
        assert probability_of_improvement(arm, peer).value == 3 / 4

    @hypothesis.given(_pairs())
    def test_swapped_arms_share_out_one(self, pair):
        arm, peer = map(_runs, pair)
        forth = probability_of_improvement(arm, peer, n_resamples=9)
        back = probability_of_improvement(peer, arm, n_resamples=9)
        assert forth.value + back.value == pytest.approx(1)

    @hypothesis.given(_pairs())
    def test_is_the_statistic_of_mann_and_whitney(self, pair):
        arm, peer = pair
        tasks, seeds, rates = arm.shape
        shares = [
            scipy_stats.mannwhitneyu(peer[t, :, r], arm[t, :, r], method="exact").statistic
            for t in range(tasks)
            for r in range(rates)
        ]
        found = probability_of_improvement(_runs(arm), _runs(peer), n_resamples=9)
        assert found.value == pytest.approx(np.mean(shares) / seeds**2)


class TestFewRuns:
    @pytest.mark.parametrize("arms", [(1.0, 1.0), (2.0, 1.0), (INF, 1.0), (1.0, INF), (INF, INF)])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (1, 2, 1), (2, 5, 3)])
    def test_runs_all_alike_give_a_point(self, arms, shape):
        arm, peer = (_runs(np.full(shape, loss)) for loss in arms)
        ratio = 1.0 if arms[0] == arms[1] else arms[0] / arms[1]
        chance = 0.5 if arms[0] == arms[1] else float(arms[0] < arms[1])
        unknown = shape[1] == 1

        def point(value):
            return (value, np.nan, np.nan) if unknown else (value, value, value)

        np.testing.assert_equal(tuple(ratio_to_peer(arm, peer)), point(ratio))
        np.testing.assert_equal(tuple(worst_task(arm, peer).ratio), point(ratio))
        np.testing.assert_equal(tuple(probability_of_improvement(arm, peer)), point(chance))
        references = dict.fromkeys(arm.tasks, 1.0)
        np.testing.assert_equal(tuple(normalized_loss(arm, references)), point(arms[0]))

    def test_interval_reaches_from_numbers_to_infinity(self):
        arm = _runs(np.array([1.0, 1.1, 1.2, INF, INF])[None, :, None])
        peer = _runs(np.ones((1, 5, 1)))
        found = ratio_to_peer(arm, peer)
        assert found.value == INF
        assert 1.0 <= found.low < 1.2
        assert found.high == INF
        assert normalized_loss(arm, {"task0": 1.0}).high == INF

    @hypothesis.given(_pairs())
    def test_no_estimate_is_lost_and_every_interval_is_in_order(self, pair):
        arm, peer = map(_runs, pair)
        estimates = [
            ratio_to_peer(arm, peer, n_resamples=50),
            probability_of_improvement(arm, peer, n_resamples=50),
            normalized_loss(arm, dict.fromkeys(arm.tasks, 2.0), n_resamples=50),
            *task_ratios(arm, peer, n_resamples=50).values(),
        ]
        for value, low, high in estimates:
            assert value >= 0
            assert low <= high if arm.losses.shape[1] > 1 else np.isnan([low, high]).all()


class TestPValues:
    def test_hand_computed(self):
        """Six units that all fall: two of 64 patterns of signs are as extreme."""
        arm = _runs(np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])[None, :, None])
        peer = _runs(np.ones((1, 6, 1)))
        assert signed_rank_pvalue(arm, peer) == pytest.approx(2 / 64)

    def test_unit_is_the_median_over_rates(self):
        arm = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])[None, :, None]
        rates = arm * np.array([1.0, 1e9, 1e-9])
        peer = _runs(np.ones((1, 6, 1)))
        expected = signed_rank_pvalue(_runs(arm), peer)
        assert signed_rank_pvalue(_runs(rates), _runs(np.ones((1, 6, 3)))) == expected

    def test_divergence_is_the_last_rank_however_large_the_others_are(self):
        losses = np.array([1e9, 0.9, 0.8, 0.7, 0.6, 0.5, INF])[None, :, None]
        peer = np.ones_like(losses)
        finite = np.where(np.isinf(losses), 1e12, losses)
        expected = scipy_stats.wilcoxon(np.log(finite.ravel())).pvalue
        assert signed_rank_pvalue(_runs(losses), _runs(peer)) == pytest.approx(expected)

    def test_two_rates_that_diverged_on_either_side_are_a_tie(self):
        arm, peer = _runs([[[INF, 1.0]]]), _runs([[[1.0, INF]]])
        assert signed_rank_pvalue(arm, peer) == 1.0

    def test_arms_all_alike_differ_nowhere(self):
        arm = _runs([[[1.0], [INF], [3.0]]])
        assert signed_rank_pvalue(arm, arm) == 1.0

    def test_holm_by_hand(self):
        """Sorted, they are multiplied by 3, 2 and 1, and none falls below the one before."""
        ones = np.ones((1, 8, 1))
        arms = {
            "strong": _runs(ones * np.linspace(0.2, 0.9, 8)[:, None]),
            "none": _runs(ones * np.array([0.5, 2.1, 0.4, 2.4, 0.6, 1.7, 0.9, 1.2])[:, None]),
            "weak": _runs(ones * np.array([1.05, *np.linspace(0.2, 0.9, 7)])[:, None]),
        }
        found = holm_pvalues(arms, _runs(ones))
        assert list(found) == list(arms)
        assert found["strong"].raw == pytest.approx(2 / 256)
        assert found["weak"].raw == pytest.approx(4 / 256)
        assert found["strong"].adjusted == pytest.approx(6 / 256)
        assert found["weak"].adjusted == pytest.approx(8 / 256)
        assert found["none"].adjusted == found["none"].raw > 0.5

    def test_holm_of_nothing_is_nothing(self):
        assert holm_pvalues({}, _runs([[[1.0]]])) == {}

    def test_level_is_kept_where_nothing_differs(self):
        rng = np.random.default_rng(0)
        pvalues = [
            signed_rank_pvalue(*(_runs(np.exp(rng.normal(size=(3, 5, 4)))) for _ in range(2)))
            for _ in range(400)
        ]
        assert 0.02 <= np.mean(np.array(pvalues) < 0.05) <= 0.08


def _simulated(rng, seeds):
    """Two arms on three tasks at four rates: the first is better by a tenth of a log on average."""
    effect = np.linspace(-0.3, 0.1, 12).reshape(3, 1, 4)
    weights = rng.normal(0, 0.2, (3, seeds, 1))  # of both arms, at all rates
    luck = rng.normal(0, 0.15, (3, seeds, 1))  # of the first, at all rates
    noise = rng.normal(0, 0.2, (2, 3, seeds, 4))
    return np.exp(weights + effect + luck + noise[0]), np.exp(weights + noise[1])


@functools.cache
def _truth():
    arm, peer = _simulated(np.random.default_rng(1), 20_000)
    chance = scipy_stats.mannwhitneyu(peer, arm, axis=1).statistic.mean() / 20_000**2
    return interquartile_mean(arm / peer), interquartile_mean(arm), chance


class TestCoverage:
    @staticmethod
    def _held(seeds):
        """How often each interval, of 300, holds what it estimates."""
        rng, truth = np.random.default_rng(2), _truth()
        held = np.zeros(3)
        for _ in range(300):
            arm, peer = map(_runs, _simulated(rng, seeds))
            found = (
                ratio_to_peer(arm, peer, n_resamples=500),
                normalized_loss(arm, dict.fromkeys(arm.tasks, 1.0), n_resamples=500),
                probability_of_improvement(arm, peer, n_resamples=500),
            )
            held += [x.low <= t <= x.high for x, t in zip(found, truth, strict=True)]
        return held / 300

    @pytest.mark.parametrize("seeds", [5, 10])
    def test_intervals_hold_the_truth(self, seeds):
        held = self._held(seeds)
        assert (held >= 0.87).all()
        assert (held <= 0.98).all()

    def test_percentiles_that_are_not_widened_hold_it_too_rarely(self, monkeypatch):
        def narrow(statistic, seeds, n_resamples, seed):
            return _statistics._interval(statistic, 1, seeds, 0.025, n_resamples, seed)

        monkeypatch.setattr(_statistics, "_clustered_interval", narrow)
        assert self._held(5)[0] < 0.87
