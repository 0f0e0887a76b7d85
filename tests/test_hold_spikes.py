"""Spikes of the loss and of the gradient's norm, hidden from a strategy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from noisy import AFTER, clean
from table import LABELS, params, row

import meta_optax as mo


class TestHold:
    QUIET = (1.2, 1.1, 1.3, 1.2, 1.1, 1.0, 1.1, 1.2)

    def _observe(self, meta, rows, state=None):
        state = meta.init() if state is None else state
        for metrics in rows:
            state = jax.jit(meta.observe)(state, {k: jnp.float32(v) for k, v in metrics.items()})
        return state

    def _plateau(self, **arguments):
        return mo.hold_spikes(mo.plateau(patience=50, wd_increase_factor=1.0), **arguments)

    @pytest.mark.parametrize("low", [0.0, -50.0])
    def test_a_batch_of_padding_is_not_the_best_for_ever(self, low):
        losses = [*self.QUIET, low, *self.QUIET]
        rows = [{"value": loss} for loss in losses]
        poisoned = self._observe(mo.plateau(patience=50, wd_increase_factor=1.0), rows)
        assert float(poisoned.best) == low
        state = self._observe(self._plateau(window=8), rows)
        assert float(state.inner.best) == 1.0
        assert (int(state.spike_count), int(state.nonfinite_count)) == (1, 0)
        assert int(state.inner.bad_count) == 10  # the two behind the best, and the second eight

    def test_norm_counts_upward_only(self):
        meta = mo.hold_spikes(mo.plateau(), window=8)
        rows = [{"value": 1.0 - 0.001 * i, "grad_norm": 1.0 + 0.1 * (i % 3)} for i in range(8)]
        old = self._observe(meta, rows)
        for norm, held in ((0.0, 0), (50.0, 1)):
            new = self._observe(meta, [{"value": 0.992, "grad_norm": norm}], old)
            assert int(new.spike_count) == held
            assert (float(new.inner.best) == float(old.inner.best)) == bool(held)

    def test_gives_up_on_a_new_level(self):
        rows = [{"value": v} for v in (*self.QUIET, *[0.1] * 4)]
        state = self._observe(self._plateau(window=8, max_consecutive=3), rows)
        assert float(state.inner.best) == pytest.approx(0.1)
        assert int(state.spike_count) == 3
        assert int(state.watch.windows["value"].count) == 1

    def test_nonfinite_is_counted_once_and_never_shown(self):
        meta = mo.hold_spikes(mo.chain(mo.plateau(), mo.plateau(), mo.expert_gate()), window=8)
        fine = {"value": 1.0, "grad_norm": 1.0, "gate_entropy": 1.2}
        state = self._observe(meta, [fine, *[{**fine, "value": np.nan}] * 20])
        assert int(state.nonfinite_count) == 20
        assert int(state.inner.nonfinite_count) == 0
        state = self._observe(meta, [{**fine, "gate_entropy": np.nan}], state)
        assert int(state.nonfinite_count) == 21

    @pytest.mark.parametrize("where", ["value", "grad_norm"])
    def test_nothing_is_held_after_a_nan(self, where):
        loss, norm = clean(0)
        (loss if where == "value" else norm)[500] = np.nan
        meta = mo.hold_spikes(mo.advanced_plateau())
        rows = {"value": loss, "grad_norm": norm, "param_norm": np.ones_like(loss)}
        rows |= {"step": np.arange(loss.size, dtype=np.int32)}

        def step(state, metrics):
            new = meta.observe(state, metrics)
            return new, new.spike_count + new.nonfinite_count

        counts = jax.lax.scan(step, meta.init(), rows)[1]
        assert counts[499] == 0
        assert counts[500] == counts[500 + AFTER] == 1

    def test_a_strategy_that_watches_neither(self):
        with pytest.raises(ValueError, match=r"hold_spikes.*expert_gate needs neither"):
            mo.hold_spikes(mo.expert_gate())

    def test_no_norm_where_none_is_shown(self):
        """A plateau over a schedule: no gradients, so no norm."""
        rate = mo.as_schedule(mo.hold_spikes(mo.plateau(patience=1)), 1.0)
        tx = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
        state = tx.init(params())
        for _ in range(3):
            _, state = tx.update(params(), state, value=jnp.float32(1.0))
        assert float(state.hyperparams["learning_rate"]) == 0.25

    @pytest.mark.parametrize("inside", [True, False])
    def test_decisions_are_logged_on_either_side(self, inside):
        plain = mo.plateau(patience=2)
        log, hold = mo.with_decisions, functools.partial(mo.hold_spikes, window=8)
        strategy = hold(log(plain)) if inside else log(hold(plain))
        tx = mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=1.0)
        p, state = params(), None
        for loss in (*[1.0] * 8, 0.0, 1.0):
            _, state = tx.update(p, tx.init(p) if state is None else state, p, value=loss)
        got = [(d.step, d.new, d.reason) for d in mo.read_decisions(state)]
        cuts = ((2, 0.5), (4, 0.25), (6, 0.125), (9, 0.0625))  # the ninth step was hidden
        assert got == [(step, new, "plateau: patience") for step, new in cuts]
        assert mo.read_decisions(mo.reset(state, tx, p)) == mo.read_decisions(state)

    def test_reset_keeps_the_windows_alone(self):
        meta = mo.hold_spikes(mo.plateau(patience=1), window=8)
        tx = mo.inject_meta_hyperparams(optax.sgd, meta)(learning_rate=1.0)
        p, state = params(), tx.init(params())
        for loss in (*[1.0] * 8, 9.0):
            _, state = tx.update(p, state, p, value=loss)
        new = mo.reset(state, tx, p).meta_state
        assert int(state.meta_state.watch.streak) == int(new.watch.streak) == 1
        np.testing.assert_array_equal(new.watch.windows["value"].values, np.ones(8))
        assert int(new.watch.windows["value"].count) == 8
        assert (int(new.spike_count), float(new.inner.best)) == (0, np.inf)

    def test_in_a_chain_only_its_own_is_held(self):
        meta = mo.chain(mo.hold_spikes(mo.plateau(), window=8), mo.smart_expert_gate())
        tx = mo.inject_meta_hyperparams(mo.moe_partition(optax.adamw, LABELS), meta)(0.1)
        p, state = params(), None
        for i in range(10):
            state = tx.init(p) if state is None else state
            loss = 0.0 if i == 9 else 1.0
            _, state = tx.update(p, state, p, **{**row(1), "value": jnp.float32(loss)})
        hold, gate = state.meta_state.states
        assert (int(hold.spike_count), float(hold.inner.best)) == (1, 1.0)
        assert meta.name == "chain(hold_spikes(plateau), smart_expert_gate)"
        assert int(gate.nonfinite_count) == 0
