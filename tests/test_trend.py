"""The tests behind `trend_plateau` and `greedy`, on arrays; and the two strategies themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from losses import watch
from scipy import stats

import meta_optax as mo
from meta_optax import _trend

SIGNIFICANCE = 1e-3


def _after(rows, window=64):
    def step(state, row):
        return _trend.advance_trend(state, row), None

    rows = jnp.asarray(rows, jnp.float32)
    return jax.lax.scan(step, _trend.empty_trend(window), rows)[0]


def _read(rows, window=64):
    return _trend.read_trend(_after(rows, window), window, SIGNIFICANCE)


def _autocorrelated(rng, size, phi):
    noise = rng.standard_normal(size)
    for i in range(1, size):
        noise[i] = phi * noise[i - 1] + np.sqrt(1 - phi**2) * noise[i]
    return noise


@pytest.mark.usefixtures("strict_numerics")
class TestStatistics:
    def test_blocks_are_means_of_rows(self):
        rows = np.sqrt(1.0 + np.arange(200))  # of which none is drawn in
        state = _after(rows, window=256)
        assert state.means.shape == (4, 64)
        for size, means in zip((1, 2, 4, 8), state.means, strict=True):
            whole = rows[: 200 // size * size].reshape(-1, size).mean(axis=1)[-64:]
            np.testing.assert_allclose(means[-len(whole) :], whole, rtol=1e-4, atol=1e-5)

    def test_state_grows_with_the_logarithm_of_the_window(self):
        def size(window):
            return sum(x.size for x in jax.tree.leaves(_trend.empty_trend(window)))

        assert [size(2**k) - size(2 ** (k - 1)) for k in (6, 10, 14)] == [65, 65, 65]
        assert 4 * size(10_000) < 3_000

    def test_line_is_that_of_least_squares(self):
        rows = np.random.default_rng(1).normal(size=64).astype(np.float32)
        fit = _trend._fit(jnp.asarray(rows[None]), (16, 32), 1)
        for i, (length, begin) in enumerate(((16, 32), (32, 0))):
            piece, time = rows[begin : begin + length], np.arange(length)
            slope, intercept = np.polyfit(time, piece, 1)
            residuals = piece - slope * time - intercept
            assert float(fit.slope[0, i]) == pytest.approx(slope, rel=1e-4)
            assert float(fit.squares[0, i]) == pytest.approx((residuals**2).sum(), rel=1e-4)
            products = (residuals[1:] * residuals[:-1]).sum()
            assert float(fit.products[0, i]) == pytest.approx(products, abs=1e-4)

    @pytest.mark.parametrize("freedom", [2.0, 5.0, 14.0, 60.0])
    @pytest.mark.parametrize("statistic", [-6.0, -2.0, -0.3, 0.0, 1.0, 4.0])
    def test_score_has_the_tail_of_students_t(self, freedom, statistic):
        score = _trend._score(jnp.float32(statistic), jnp.float32(1.0), jnp.float32(freedom))
        expected = stats.norm.isf(stats.t.sf(statistic, freedom))
        assert float(score) == pytest.approx(expected, abs=0.02 + 0.02 * abs(expected))

    @pytest.mark.parametrize(("phi", "low", "high"), [(0.0, 1.0, 1.6), (0.8, 6.0, 16.0)])
    def test_autocorrelated_rows_are_worth_fewer(self, phi, low, high):
        """The truth is (1 + phi) / (1 - phi): 1 and 9."""
        spans, found = (16, 23, 32, 32), []
        for seed in range(40):
            noise = _autocorrelated(np.random.default_rng(seed), 64, phi)[None]
            fits = [_trend._fit(jnp.asarray(noise, jnp.float32), spans, b) for b in range(4)]
            pieces = jnp.asarray([[4, 2, 2, 2]], jnp.int32)
            lengths = jnp.asarray([spans], jnp.float32)
            found.append(float(_trend._inflation(fits, pieces, lengths)[0, 2]))
        assert low <= np.median(found) <= high

    @pytest.mark.parametrize("phi", [0.0, 0.8])
    def test_level_of_significance_is_kept_on_noise(self, phi):
        """One look at each of 2,000 sequences: at most 1 % rise, and at most 1 % fall, of 0.1 %
        for each of the seven spans."""
        rng = np.random.default_rng(0)
        rows = np.stack([_autocorrelated(rng, 128, phi) for _ in range(2000)]).astype(np.float32)
        trends = jax.jit(jax.vmap(_read))(jnp.asarray(rows))
        assert float(trends.is_rising.mean()) < 0.01
        assert float(trends.is_falling.mean()) < 0.01
        assert not trends.has_stalled.any()

    def test_spike_is_drawn_in_and_a_new_level_starts_afresh(self):
        rows = 1.0 + 0.01 * np.random.default_rng(2).normal(size=40)
        spiked = _after([*rows, 1e6])
        assert float(spiked.means[0, -1]) < 1.2
        assert int(spiked.outliers) == 1
        assert int(spiked.count) == 41
        for more, count in ((3, 44), (4, 1), (5, 2)):
            assert int(_after([*rows, *(5.0 + 0.01 * np.arange(more + 1))]).count) == count

    def test_nothing_is_poisoned_by_the_largest_values(self):
        rows = np.float32([3e38, -3e38, 1.0] * 30)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(_after(rows)))

    @pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e6, 1e20])
    @pytest.mark.parametrize("shift", [0.0, -3.0])
    def test_units_do_not_matter(self, scale, shift):
        rng = np.random.default_rng(3)
        rows = np.maximum(1.0 - 0.01 * np.arange(80), 0.5) + 0.01 * rng.normal(size=80)
        plain, moved = _read(rows), _read(scale * (rows + shift))
        assert bool(plain.has_stalled) == bool(moved.has_stalled)
        assert float(plain.flat_score) == pytest.approx(float(moved.flat_score), abs=0.05)


class TestVerdict:
    """A fall, a stall, a rise: without noise and with it."""

    @pytest.mark.parametrize("deviation", [0.0, 0.02])
    def test_of_fall_stall_and_rise(self, deviation):
        noise = deviation * np.random.default_rng(4).normal(size=100)
        fall = 5.0 - 0.02 * np.arange(100)
        rise = 5.0 + 0.02 * np.arange(100)
        falling, rising = (_read(rows + noise) for rows in (fall, rise))
        assert falling.is_falling
        assert falling.is_certain
        assert not falling.has_stalled
        assert not falling.is_rising
        assert not falling.is_flat
        assert rising.is_rising
        assert rising.is_flat  # in the sense that it does not fall
        assert not rising.is_falling
        assert not rising.has_stalled

    @pytest.mark.parametrize("deviation", [0.0, 0.02])
    def test_a_stall_shows_a_while_after_it_began(self, deviation):
        noise = deviation * np.random.default_rng(4).normal(size=120)
        rows = 5.0 - 0.02 * np.minimum(np.arange(120), 60) + noise
        ends = np.arange(40, 121, 4)
        shown = [bool(_read(rows[:end]).has_stalled) for end in ends]
        assert any(shown)
        assert 70 < ends[np.argmax(shown)] < 110

    def test_a_slow_fall_after_a_steep_one_is_no_stall(self):
        rows = np.concatenate([10.0 - 0.1 * np.arange(60), 4.0 - 0.002 * np.arange(60)])
        noise = 1e-3 * np.random.default_rng(5).normal(size=120)
        assert watch(mo.trend_plateau(), rows + noise).cuts == []


class TestTrendPlateau:
    @pytest.mark.parametrize(("slope", "low", "high"), [(0.0, 0.4, 0.6), (1e-2, 0.24, 0.26)])
    def test_cut_is_sized_by_the_evidence(self, slope, low, high):
        """Half for a flat loss (here a little more or less, by noise), a quarter for a rise."""
        rng, rates = np.random.default_rng(6), []
        meta = mo.trend_plateau()
        for _ in range(20):
            after = 4.0 + slope * np.arange(100)
            losses = np.concatenate([6.0 - 0.02 * np.arange(100), after])
            seen = watch(meta, losses + 1e-2 * rng.normal(size=200))
            rates.append(seen.rates[seen.cuts[0]])
        assert low <= np.mean(rates) <= high
        assert min(rates) >= 0.25 - 1e-6

    def test_minimum_of_evidence(self):
        """16 rows of a clean fall and 16 flat ones: not before, and then at once."""
        losses = np.concatenate([2.0 - 0.05 * np.arange(16), np.full(40, 1.2)])
        assert watch(mo.trend_plateau(), losses).cuts == [31]

    @pytest.mark.parametrize("window", [8, 20, 64])
    @pytest.mark.parametrize("evidence", [8, 32, 100])
    def test_no_cut_before_the_least_evidence(self, window, evidence):
        meta = mo.trend_plateau(window=window, min_evidence=evidence)
        assert watch(meta, np.ones(200)).cuts[0] == max(window, evidence) - 1

    def test_more_evidence_looks_past_a_rhythm(self):
        rows = np.arange(1500)
        rhythm = 0.05 * np.sin(2 * np.pi * rows / 100)
        losses = 5.0 - 0.002 * rows + rhythm + 0.02 * np.random.default_rng(10).normal(size=1500)
        assert len(watch(mo.trend_plateau(), losses).cuts) > 5
        assert watch(mo.trend_plateau(min_evidence=400), losses).cuts == []

    @pytest.mark.parametrize("repeats", [5, 50, 100])
    def test_value_that_is_carried_on_is_a_plateau_too(self, repeats):
        """An evaluation's loss, handed on until the next: a change in it is no new level."""
        rng = np.random.default_rng(11)
        losses = np.repeat(2.0 + 0.05 * rng.normal(size=1000 // repeats), repeats)
        assert len(watch(mo.trend_plateau(), losses).cuts) == 1

    def test_few_digits_do_not_end_the_longer_wait(self):
        losses = np.round(2.0 + 0.1 * np.random.default_rng(12).normal(size=5000), 1)
        assert len(watch(mo.trend_plateau(), losses).cuts) <= 3

    @pytest.mark.parametrize("share", [0.999, 0.99, 0.95])
    def test_smooth_falls_are_not_cut_and_raise_greedys_rate(self, share):
        """Their residuals are as correlated as can be; the signs of the changes tell."""
        losses = 3.0 * share ** np.arange(400)
        assert watch(mo.trend_plateau(), losses).cuts == []
        assert watch(mo.greedy(), losses).rates[-1] == 3.0

    @pytest.mark.parametrize("growth", [1.005, 1.05, 1.3])
    def test_smooth_divergence_is_seen(self, growth):
        losses = 2.0 * growth ** np.arange(280.0)
        assert watch(mo.trend_plateau(), losses).cuts == [255]
        assert watch(mo.greedy(), losses).rates[-1] < 0.25

    def test_reason_names_the_rule_and_the_metric(self):
        strategy = mo.with_decisions(mo.trend_plateau(window=16, min_evidence=16))
        tx = mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=1.0)
        params = jnp.ones(2)
        state = tx.init(params)
        step = jax.jit(lambda s, loss: tx.update(params, s, params, value=loss)[1])
        for loss in [*np.full(16, 3.0), *(3.0 - 0.1 * np.arange(16)), *np.full(40, 1.5)]:
            state = step(state, loss)
        got = [(d.reason, d.metric, d.value) for d in mo.read_decisions(state)]
        assert got[0] == ("trend_plateau: no fall", "value", 3.0)

    def test_max_mirrors_min(self):
        rng = np.random.default_rng(7)
        losses = 5.0 - 0.01 * np.minimum(np.arange(500), 200) + 0.02 * rng.normal(size=500)
        for make in (mo.trend_plateau, mo.greedy):
            low, high = (
                watch(make(mode=mode), s * losses) for mode, s in (("min", 1), ("max", -1))
            )
            np.testing.assert_array_equal(low.rates, high.rates)
            assert low.rates.min() < 1.0 or low.rates.max() > 1.0

    def test_cooldown_is_not_looked_at(self):
        losses = np.ones(200)
        assert watch(mo.trend_plateau(window=16), losses).cuts == [31, 95]
        assert watch(mo.trend_plateau(window=16, cooldown=10), losses).cuts == [31, 105]

    def test_a_certain_fall_ends_the_longer_wait(self):
        """The third cut waits 4 windows, 128 rows, for the second; without the fall it were 512."""
        losses = [*np.ones(32), *(1.0 - 0.1 * np.arange(40)), *np.full(200, -2.9)]
        cuts = watch(mo.trend_plateau(window=32), np.array(losses)).cuts
        assert cuts[0] == 31
        assert np.diff(cuts).tolist()[1:] == [128]

    def test_floor_is_on_cuts_and_lifts_nothing(self):
        meta = mo.trend_plateau(window=8, min_lr=0.3)
        rates = watch(meta, np.ones(3000)).rates
        assert rates.min() == pytest.approx(0.3)
        low = meta.apply(meta.init(), {"learning_rate": jnp.float32(0.01)})
        assert float(low["learning_rate"]) == pytest.approx(0.01)


class TestGreedy:
    def test_up_while_it_improves_and_down_when_it_does_not(self):
        noise = 1e-2 * np.random.default_rng(8).normal(size=900)
        truth = 5.0 - 2e-3 * np.minimum(np.arange(900), 400)
        rates = watch(mo.greedy(), truth + noise).rates
        assert rates[399] == 3.0
        assert rates[600] < 2.5
        assert rates[-1] < 2.0
        assert (np.diff(rates[:400]) >= 0).all()
        assert (np.diff(rates[600:]) <= 0).all()

    def test_down_to_the_bound_while_it_worsens(self):
        rows = np.arange(1000.0) + np.random.default_rng(9).normal(size=1000)
        rates = watch(mo.greedy(min_scale=0.25), rows).rates
        assert rates[-1] == 0.25
        assert (np.diff(rates) <= 0).all()

    def test_bounds_are_relative_to_the_base(self):
        """The recorded floor of GreedyLR, 1e-3, would raise a base of 1e-5 a hundredfold."""
        meta = mo.greedy(min_scale=0.5, max_scale=2.0)
        worsens = watch(meta, np.arange(500.0)).state
        improves = watch(meta, -np.arange(500.0)).state
        for base in (1e-5, 10.0):
            for state, share in ((worsens, 0.5), (improves, 2.0)):
                used = meta.apply(state, {"learning_rate": jnp.float32(base)})
                assert float(used["learning_rate"]) == pytest.approx(share * base)

    @pytest.mark.parametrize(
        ("arguments", "steps"),
        [
            ({}, [15, 32, 49]),
            ({"patience": 3}, [18, 38, 58]),
            ({"warmup": 30}, [15, 46, 77]),
            ({"cooldown": 30}, [15, 32, 49]),
        ],
    )
    def test_counters_by_hand(self, arguments, steps):
        """A clean fall shows after 16 rows; then 16 rows, or the warm-up's, move nothing."""
        rates = watch(mo.greedy(max_scale=100.0, **arguments), -np.arange(100.0)).rates
        assert np.flatnonzero(np.diff(rates, prepend=1.0))[:3].tolist() == steps

    def test_cooldown_follows_a_cut(self):
        rates = watch(mo.greedy(cooldown=30), np.arange(100.0)).rates
        assert np.flatnonzero(np.diff(rates, prepend=1.0))[:3].tolist() == [15, 46, 77]
