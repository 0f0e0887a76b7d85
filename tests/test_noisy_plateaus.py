"""What misleads a plateau that judges single rows, and what does not mislead the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noisy import noise

import meta_optax as mo

BASE = 1e-4
# A loss that falls throughout, by a hundredth of its noise at each step.
FALLING = 2.0 - 1e-3 * np.arange(1000) + noise(0, 1000)


def _rates(meta, losses, base=BASE):
    """The rate after each row."""

    def step(state, step_and_loss):
        step, loss = step_and_loss
        state = meta.observe(state, {"step": step, "value": loss})
        return state, meta.apply(state, {"learning_rate": base})["learning_rate"]

    losses = jnp.asarray(losses, jnp.float32)
    rows = (jnp.arange(len(losses), dtype=jnp.int32), losses)
    return np.asarray(jax.jit(lambda rows: jax.lax.scan(step, meta.init(), rows)[1])(rows))


def _plateau(**arguments):
    return mo.plateau(wd_increase_factor=1.0, **arguments)


class TestLuckyMinibatch:
    """The best of a noisy loss is a lucky row's, which later ones do not better for long."""

    def test_patience_cuts_while_the_loss_falls(self):
        assert _rates(_plateau(patience=20), FALLING)[-1] < BASE / 8

    @pytest.mark.parametrize(
        "meta", [mo.trend_plateau(), _plateau(patience=3, smoothing=50)], ids=["trend", "blocks"]
    )
    def test_others_do_not(self, meta):
        np.testing.assert_allclose(_rates(meta, FALLING), BASE, rtol=1e-6)

    def test_one_row_far_too_low_is_no_best_for_ever(self):
        losses = FALLING.copy()
        losses[200] = 0.0
        assert _rates(_plateau(patience=200), FALLING)[-1] == pytest.approx(BASE)
        assert _rates(_plateau(patience=200), losses)[-1] < 0.6 * BASE
        np.testing.assert_allclose(_rates(mo.trend_plateau(), losses), BASE, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [mo.trend_plateau, mo.greedy])
def test_what_is_not_finite_is_as_if_it_had_not_been(make, bad):
    flat_after = np.concatenate([FALLING[:300], np.full(300, 1.7) + noise(1, 300)])
    broken = np.insert(flat_after, 150, bad)
    rates = _rates(make(), broken)
    np.testing.assert_array_equal(np.delete(rates, 150), _rates(make(), flat_after))


class TestLevelShift:
    """After a spike the loss falls again, from far above its old best."""

    SHIFTED = FALLING + np.where(np.arange(1000) < 400, 0.0, 5.0)

    def test_patience_cuts_all_the_way(self):
        quiet = 2.0 - 1e-3 * np.arange(1000) + np.where(np.arange(1000) < 400, 0.0, 5.0)
        assert _rates(_plateau(patience=20), quiet)[-1] == pytest.approx(1e-6)

    def test_trend_plateau_does_not(self):
        np.testing.assert_allclose(_rates(mo.trend_plateau(), self.SHIFTED), BASE, rtol=1e-6)


class TestBounds:
    """A floor in units of the rate would lift a base that lies below it."""

    RISING = -FALLING

    @pytest.mark.parametrize("base", [1e-4, 1e-1])
    def test_those_of_greedy_are_shares_of_the_base(self, base):
        meta = mo.greedy(patience=0, significance=1e-3, factor=0.5)
        falling, rising = (_rates(meta, x, base) for x in (FALLING, self.RISING))
        assert falling.max() == pytest.approx(3.0 * base)
        assert rising.min() == pytest.approx(0.1 * base)

    def test_base_of_zero_stays_zero(self):
        assert not _rates(mo.greedy(patience=0), FALLING, 0.0).any()

    @pytest.mark.parametrize("make", [_plateau, mo.trend_plateau])
    def test_floor_of_a_plateau_neither_lifts_nor_cuts_a_base_below(self, make):
        flat = np.concatenate([FALLING[:100], np.full(900, 1.9)])
        np.testing.assert_allclose(_rates(make(min_lr=1e-3), flat), BASE, rtol=1e-6)
        assert _rates(make(min_lr=1e-6), flat)[-1] < 0.6 * BASE
