"""Steps whose loss or gradient is a spike, dropped from training."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from noisy import AFTER, CLEAN, clean, noise
from table import params

import meta_optax as mo
from meta_optax._history import Window, empty_window, push, stands_out


@functools.cache
def _runner(**arguments):
    """Which steps of a row of losses and gradients are dropped, and the state behind them."""
    tx = mo.skip_spikes(optax.adam(0.1), **arguments)

    def step(state, loss_and_norm):
        loss, norm = loss_and_norm
        grads = norm * jnp.array([0.6, 0.8])  # whose norm this is
        _, new = tx.update(grads, state, value=loss)
        return new, new.skipped_count > state.skipped_count

    start = tx.init(jnp.zeros([2]))
    return jax.jit(lambda rows: jax.lax.scan(step, start, rows))


def _dropped(loss, norm=None, **arguments):
    loss = jnp.asarray(loss, jnp.float32)
    norm = jnp.ones_like(loss) if norm is None else jnp.asarray(norm, jnp.float32)
    state, dropped = _runner(**arguments)((loss, norm))
    return np.flatnonzero(dropped).tolist(), state


class TestStandsOut:
    """The rule itself, on arrays."""

    # Median 3, absolute distances 2, 1, 0, 1, 97: their median is 1, so 1.4826 is a deviation.
    VALUES = (1.0, 2.0, 3.0, 4.0, 100.0)

    def _window(self, values=VALUES, size=8):
        window = empty_window(size)
        for value in values:
            window = push(window, jnp.float32(value))
        return window

    @pytest.mark.parametrize(
        ("value", "above", "either"),
        [
            (3.0 + 8 * 1.4826 + 0.01, True, True),
            (3.0 + 8 * 1.4826 - 0.01, False, False),
            (3.0 - 8 * 1.4826 - 0.01, False, True),
            (3.0 - 8 * 1.4826 + 0.01, False, False),
        ],
    )
    def test_by_hand(self, value, above, either):
        window = self._window()
        assert bool(stands_out(window, jnp.float32(value), 8.0)) == above
        assert bool(stands_out(window, jnp.float32(value), 8.0, both_sides=True)) == either

    def test_what_left_the_window_does_not_count(self):
        moved = self._window([1e6] * 8 + list(range(8)))
        assert bool(stands_out(moved, jnp.float32(100.0), 8.0))

    def test_what_was_never_pushed_does_not_count(self):
        """An empty place is no zero: among seven of those, 3 would be the spike."""
        assert not bool(stands_out(self._window([3.0]), jnp.float32(3.02), 8.0))

    def test_deviation_of_constants_is_a_share_of_the_median(self):
        window = self._window([-2.0] * 8)
        assert not bool(stands_out(window, jnp.float32(-2.0 + 0.015), 8.0))
        assert bool(stands_out(window, jnp.float32(-2.0 + 0.017), 8.0))

    @pytest.mark.parametrize("values", [(), (0.0,) * 8, (3e38,) * 8, (-3e38, 3e38) * 4])
    def test_extremes_are_no_error(self, values):
        window = self._window(values)
        value = jnp.float32(values[-1] if values else 1.0)
        assert not bool(stands_out(window, value, 8.0, both_sides=True))
        assert not bool(stands_out(window, value + 1.0, math.inf, both_sides=True))


class TestWhatIsASpike:
    @pytest.mark.parametrize("seed", range(8))
    def test_none_in_ten_thousand_steps_of_gaussian_noise(self, seed):
        loss = 3.0 + noise(2 * seed, 10_000, scale=0.3)
        assert _dropped(loss, np.exp(noise(2 * seed + 1, 10_000)))[0] == []

    @pytest.mark.parametrize("kind", ["steady fall", "power law", "autocorrelated", "warm-up"])
    def test_none_where_training_moves(self, kind):
        loss, norm, time = 3.0 + noise(3, 10_000), np.exp(noise(4, 10_000)), np.arange(10_000)
        if kind == "steady fall":
            loss += 10.0 - 1e-3 * time
        elif kind == "power law":
            loss += 9.0 / np.sqrt(1.0 + time)
        elif kind == "warm-up":  # a thousandfold norm within 500 steps
            norm *= 1e3 ** np.minimum(time / 500, 1.0)
        else:
            for i in range(1, loss.size):
                loss[i] = 3.0 + 0.9 * (loss[i - 1] - 3.0) + np.sqrt(0.19) * (loss[i] - 3.0)
        assert _dropped(loss, norm)[0] == []

    def test_few_where_tails_are_heavy(self):
        heavy = np.random.default_rng(5).standard_t(3, 10_000)
        assert 0 < len(_dropped(3.0 + 0.1 * heavy)[0]) <= 20

    def test_upward_of_either(self):
        loss, norm = clean(0)
        loss[500] += 2.0
        norm[600] *= 20.0
        loss[700], norm[800] = 0.0, 0.0
        at, state = _dropped(loss, norm)
        assert at == [500, 600]
        assert (int(state.skipped_count), int(state.nonfinite_count)) == (2, 0)

    def test_mode_max_has_its_spikes_below(self):
        loss, norm = clean(0)
        score = 10.0 - loss
        score[500] -= 2.0
        score[600] += 2.0
        assert _dropped(score, norm, mode="max")[0] == [500]

    def test_none_before_the_window_is_half_full(self):
        loss = np.ones(100)
        loss[[10, 31, 33, 99]] = 50.0
        # The first two are accepted, so 33 is judged by 33 accepted values.
        assert _dropped(loss)[0] == [33, 99]
        assert _dropped(loss, window=8)[0] == [10, 31, 33, 99]

    def test_threshold_decides(self):
        loss, norm = clean(0)
        loss[500] += 0.3
        assert _dropped(loss, norm, threshold=8.0)[0] == [500]
        assert _dropped(loss, norm, threshold=30.0)[0] == []
        loss[500] = np.inf
        assert _dropped(loss, norm, threshold=math.inf)[0] == [500]


class TestNonfinite:
    """What is not finite leaves no trace in the windows."""

    @pytest.mark.parametrize("where", ["loss", "gradient", "norm"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("seed", [0, 10, 20])
    def test_no_clean_step_is_dropped_after_one(self, where, bad, seed):
        loss, norm = clean(seed)
        if where == "norm":  # gradients that are finite, but whose norm is not
            norm[500] = np.copysign(3e38, bad)
        else:
            (loss if where == "loss" else norm)[500] = bad
        at, state = _dropped(loss, norm)
        assert at == [500]
        assert not [step for step in at if 500 < step <= 500 + AFTER]
        assert (int(state.skipped_count), int(state.nonfinite_count)) == (1, 1)
        for window in state.watch.windows.values():
            assert np.isfinite(window.values).all()

    @pytest.mark.parametrize("where", ["gradient", "norm"])
    def test_gradients_never_get_through(self, where):
        loss, norm = clean(0)
        norm[500:] = np.nan if where == "gradient" else 3e38
        at, state = _dropped(loss, norm, max_consecutive=2)
        assert at == list(range(500, CLEAN))
        assert int(state.nonfinite_count) == CLEAN - 500
        assert int(state.inner_state[0].count) == 500

    def test_losses_get_through_once_there_are_many(self):
        loss, norm = clean(0)
        loss[500:520] = np.nan
        loss[521], loss[530] = np.nan, 9.0  # the row has ended, and the windows are as they were
        at, state = _dropped(loss, norm, max_consecutive=3)
        assert at == [500, 501, 502, 521, 530]
        assert (int(state.skipped_count), int(state.nonfinite_count)) == (5, 4)
        assert int(state.inner_state[0].count) == CLEAN - 5

    def test_gradients_do_not_get_through_among_losses(self):
        loss, norm = clean(0)
        loss[500:520] = np.nan
        norm[505:510] = np.nan
        assert _dropped(loss, norm, max_consecutive=2)[0] == [500, 501, *range(505, 510)]

    def test_gradients_are_looked_at_where_the_norm_is_passed(self):
        tx = mo.skip_spikes(optax.sgd(1.0))
        p = params()
        grads = {**p, "router": p["router"].at[1].set(jnp.nan)}
        for norm in (1.0, jnp.nan):
            for g in (p, grads):
                updates, state = tx.update(g, tx.init(p), p, value=1.0, grad_norm=norm)
                broken = math.isnan(norm) or g is grads
                assert int(state.nonfinite_count) == broken
                assert all((u == 0).all() == broken for u in jax.tree.leaves(updates))


class TestGivingUp:
    def test_level_shift_becomes_the_new_normal(self):
        """Three times the loss from step 200 on: five are dropped, the sixth is believed."""
        loss = np.concatenate([np.full(200, 1.0), np.full(100, 3.0)]) + noise(0, 300, scale=0.01)
        at, state = _dropped(loss)
        assert at == [200, 201, 202, 203, 204]
        assert int(state.skipped_count) == 5
        assert int(state.watch.streak) == 0
        assert int(state.watch.windows["value"].count) == 64
        assert float(state.watch.windows["value"].values.min()) > 2.9

    def test_windows_start_afresh_from_it(self):
        loss = np.concatenate([np.full(100, 1.0), np.full(7, 3.0)])
        _, state = _dropped(loss, max_consecutive=5)
        for name, value in (("value", 3.0), ("grad_norm", 1.0)):
            window = state.watch.windows[name]
            assert int(window.count) == 2
            np.testing.assert_array_equal(window.values[-2:], [value, value])

    def test_row_has_to_be_one(self):
        loss = np.full(200, 1.0)
        loss[100:104], loss[105:109] = 9.0, 9.0
        assert _dropped(loss, max_consecutive=4)[0] == [*range(100, 104), *range(105, 109)]

    def test_what_is_not_finite_neither_counts_nor_ends_the_row(self):
        loss, norm = np.full(200, 1.0), np.full(200, 1.0)
        loss[100:110] = 9.0
        norm[101], loss[103] = np.nan, np.nan
        # Spikes at 100, 102, 104; then 105 is believed.
        assert _dropped(loss, norm, max_consecutive=3)[0] == [100, 101, 102, 103, 104]

    def test_count_compares_with_at_least(self):
        """A streak beyond the most, as after it was lowered in a restart, ends all the same."""
        loss = jnp.ones(100).at[90:].set(9.0)
        _, state = _dropped(loss[:96], max_consecutive=20)
        assert int(state.watch.streak) == 6
        tx = mo.skip_spikes(optax.adam(0.1), max_consecutive=3)
        _, state = tx.update(jnp.array([0.6, 0.8]), state, value=9.0)
        assert int(state.skipped_count) == 6


class TestSkip:
    def _warm(self, tx, p, steps=40):
        state, step = tx.init(p), jax.jit(tx.update)
        for i in range(steps):
            _, state = step(p, state, p, value=jnp.float32(1.0 + 0.01 * (i % 3)))
        return state

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("bad", [9.0, np.nan])
    def test_state_inside_stays_to_the_bit(self, dtype, bad):
        tx = mo.skip_spikes(
            mo.inject_meta_hyperparams(optax.adamw, mo.with_decisions(mo.plateau(patience=2)))(0.1)
        )
        p = params(dtype)
        old = self._warm(tx, p)
        updates, new = tx.update(p, old, p, value=jnp.float32(bad))
        chex.assert_trees_all_equal(new.inner_state, old.inner_state)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, p))
        assert {u.dtype.name for u in jax.tree.leaves(updates)} == {dtype}
        assert int(new.skipped_count) == 1
        assert mo.read_decisions(new) == mo.read_decisions(old) != []
        assert mo.read_hyperparams(new) == mo.read_hyperparams(old)

    def test_accepted_steps_are_those_of_the_optimizer_alone(self):
        p = params()
        alone, wrapped = optax.adamw(0.1), mo.skip_spikes(optax.adamw(0.1))
        state, skip_state = alone.init(p), wrapped.init(p)
        for i in range(6):
            grads = jax.tree.map(lambda x, i=i: x * (1 + i), p)
            expected, state = jax.jit(alone.update)(grads, state, p)
            updates, skip_state = jax.jit(wrapped.update)(grads, skip_state, p, value=1.0)
            chex.assert_trees_all_close(updates, expected, rtol=1e-6)
        chex.assert_trees_all_close(skip_state.inner_state, state, rtol=1e-6)

    def test_norm_is_handed_on(self):
        seen = []

        def update(updates, state, params=None, **extra_args):
            seen.append(extra_args)
            return updates, state

        spy = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
        tx = mo.skip_spikes(spy)
        grads = {"w": jnp.array([3.0, 4.0])}
        with jax.disable_jit():
            tx.update(grads, tx.init(grads), value=1.0, other="kept")
            tx.update(grads, tx.init(grads), value=1.0, grad_norm=jnp.float32(7.0))
        assert [float(args["grad_norm"]) for args in seen] == [5.0, 7.0]
        assert seen[0]["other"] == "kept"
        assert "value" in seen[0]

    def test_missing_loss_says_what_to_write(self):
        tx = mo.skip_spikes(optax.sgd(0.1))
        p = params()
        message = r"skip_spikes needs the metric 'value'.*tx\.update\(.*value=loss\)"
        with pytest.raises(TypeError, match=message):
            jax.eval_shape(lambda: tx.update(p, tx.init(p), p))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
    def test_wide_updates_come_back_in_the_gradients_dtype(self, dtype):
        """Optax's own strong rate makes bf16 updates and moments float32."""
        with jax.enable_x64(dtype == jnp.float64):
            p = params(dtype)
            inner = optax.inject_hyperparams(optax.adamw)(learning_rate=jnp.float32(0.1))
            tx = mo.skip_spikes(inner)
            old = tx.init(p)
            updates, new = tx.update(p, old, p, value=1.0)
            chex.assert_trees_all_equal_shapes_and_dtypes(new, old)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, p)

    def test_reads_and_resets_like_the_other_ways_to_act(self):
        tx = mo.skip_spikes(mo.inject_meta_hyperparams(optax.adam, mo.plateau(patience=1))(0.5))
        p = params()
        old = self._warm(tx, p)
        _, old = tx.update(p, old, p, value=jnp.float32(np.nan))
        assert mo.read_hyperparams(old)["learning_rate"] < 0.5
        rate = float(optax.tree.get(old, "learning_rate"))
        assert float(old.hyperparams["learning_rate"]) == rate
        new = mo.reset(old, tx, p)
        chex.assert_trees_all_equal(new.watch, old.watch)
        assert int(new.skipped_count) == 1
        _, after = tx.update(p, new, p, value=jnp.float32(1.0))
        assert mo.read_hyperparams(after)["learning_rate"] == 0.5
        stale = old._replace(layout_version=jnp.int32(7))
        for read in (mo.read_hyperparams, lambda state: mo.reset(state, tx, p)):
            with pytest.raises(ValueError, match="layout version 7"):
                read(stale)

    def test_no_hyperparameters_inside(self):
        tx = mo.skip_spikes(optax.adam(0.5))
        state = tx.init(params())
        assert not hasattr(state, "hyperparams")
        with pytest.raises(ValueError, match="no hyperparameters"):
            mo.read_hyperparams(state)
        with pytest.raises(ValueError, match="nothing to reset"):
            mo.reset(state, tx, params())

    @pytest.mark.parametrize("inner", [optax.adamw, None, mo.plateau(), "adamw"])
    def test_what_is_no_transformation(self, inner):
        with pytest.raises(TypeError, match=r"skip_spikes needs an optax.GradientTransformation"):
            mo.skip_spikes(inner)
        with pytest.raises(TypeError, match=r"did you mean adamw\(\.\.\.\)\?"):
            mo.skip_spikes(optax.adamw)


def test_arguments_can_be_mapped_over():
    def count(threshold, most):
        tx = mo.skip_spikes(optax.sgd(0.1), window=8, threshold=threshold, max_consecutive=most)
        losses = jnp.ones(20).at[10:14].set(1.5)

        def step(state, loss):
            return tx.update(jnp.ones(1), state, value=loss)[1], None

        return jax.lax.scan(step, tx.init(jnp.ones(1)), losses)[0].skipped_count

    # At 8, 1.5 is a spike of ones; a threshold of 1000 is beyond it; below the range it is clipped.
    counts = jax.vmap(count)(jnp.array([8.0, 8.0, 1000.0, -1.0]), jnp.array([5, 2, 5, -7]))
    np.testing.assert_array_equal(counts[:3], [4, 2, 0])
    assert counts[3] >= 1


def test_window_is_a_state_of_its_own_buffers():
    """Two windows that shared one could not be donated."""
    state = mo.skip_spikes(optax.sgd(0.1)).init(params())
    assert all(isinstance(window, Window) for window in state.watch.windows.values())
    jax.jit(lambda s: s, donate_argnums=0)(state)
