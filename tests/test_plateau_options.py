"""Mode, thresholds, cooldown and smoothing of the plateaus, by hand; what decisions rest on."""

import copy
import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from losses import watch
from table import LABELS, LAYERS, params, row

import meta_optax as mo

advanced = functools.partial(mo.advanced_plateau, warmup_steps=0, trend_window=50)
each_plateau = pytest.mark.parametrize("make", [mo.plateau, advanced])


@each_plateau
class TestOptions:
    def test_cooldown_counts_as_torch_does(self, make):
        """Rows 1 and 2 are bad, 3 and 4 are of the cooldown, 5 and 6 are bad again."""
        meta = make(patience=2, cooldown=2)
        assert watch(meta, np.ones(12)).cuts == [2, 6, 10]

    def test_best_moves_on_during_a_cooldown(self, make):
        losses = [1.0, 1.0, 1.0, 0.5, 0.6, 0.4, 0.4, 0.4]
        assert watch(make(patience=2, cooldown=2), losses).cuts == [2, 7]

    @pytest.mark.parametrize(
        ("arguments", "losses", "bad"),
        [
            ({"rtol": 0.1, "atol": 0.0}, [10.0, 9.5], 1),
            ({"rtol": 0.1, "atol": 0.0}, [10.0, 8.9], 0),
            ({"rtol": 0.1, "atol": 0.0}, [-10.0, -10.5], 1),
            ({"rtol": 0.1, "atol": 0.0}, [-10.0, -11.1], 0),
            ({"atol": 0.5}, [10.0, 9.6], 1),
            ({"atol": 0.5}, [0.2, -0.4], 0),
            ({"rtol": 0.1, "atol": 0.5}, [10.0, 8.6], 1),
            ({"rtol": 0.1, "atol": 0.5}, [10.0, 8.4], 0),
            ({"rtol": 0.1, "atol": 0.5}, [0.0, -0.4], 1),
        ],
    )
    def test_thresholds_above_and_below_zero(self, make, arguments, losses, bad):
        assert int(watch(make(patience=9, **arguments), losses).state.bad_count) == bad
        mirrored = watch(make(patience=9, mode="max", **arguments), [-x for x in losses])
        assert int(mirrored.state.bad_count) == bad

    def test_blocks_are_judged_at_their_end(self, make):
        """Means 2, 2, 1 and 1: bad at rows 3, and 7."""
        losses = [1.0, 3.0, 3.0, 1.0, 0.0, 2.0, 2.0, 0.0]
        meta = make(patience=1, smoothing=2)
        seen = watch(meta, losses)
        assert seen.cuts == [3, 7]
        assert float(seen.state.best) == 1.0

    def test_average_is_judged_at_each_row(self, make):
        """4, 3, 3.5, 1.75: only the third is worse."""
        seen = watch(make(patience=1, smoothing=0.5), [4.0, 2.0, 4.0, 0.0])
        assert seen.cuts == [2]
        assert float(seen.state.smoothed.average) == pytest.approx(1.75)

    @pytest.mark.parametrize("smoothing", [0, 1, 0.0, 1.0, np.int32(1)])
    def test_smoothing_of_one_row_is_none(self, make, smoothing):
        losses = np.random.default_rng(0).normal(size=100)
        plain, other = watch(make(patience=3), losses), watch(make(smoothing=smoothing), losses)
        np.testing.assert_array_equal(plain.rates, other.rates)

    @pytest.mark.parametrize("smoothing", [2, 2.0, np.int64(2), jnp.int32(2)])
    def test_kinds_of_numbers(self, make, smoothing):
        assert watch(make(patience=1, smoothing=smoothing), np.ones(8)).cuts == [3, 5, 7]

    def test_smoothing_must_not_be_traced(self, make):
        with pytest.raises(ValueError, match=r"smoothing.*traced"):
            jax.jit(lambda n: make(smoothing=n).init())(5)

    def test_a_nan_is_in_no_average(self, make):
        losses = [1.0, 1.0, math.nan, 0.5, 0.5]
        seen = watch(make(patience=5, smoothing=2), losses)
        assert float(seen.state.best) == 0.5
        assert int(seen.state.nonfinite_count) == 1


class TestAdvanced:
    def test_trend_waits_for_the_cooldown(self):
        meta = mo.advanced_plateau(warmup_steps=0, patience=100, trend_window=4, cooldown=5)
        assert watch(meta, np.ones(30)).cuts == [3, 12, 21]

    def test_trend_and_rising_loss_are_mirrored(self):
        up = np.array([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
        meta = mo.advanced_plateau(warmup_steps=0, patience=100, trend_window=3, mode="max")
        assert watch(meta, up).cuts == [3]
        state = meta.init()
        for step, value in enumerate((2.0, 1.0)):
            seen = {"value": value, "grad_norm": 7.0, "param_norm": 1.0, "step": step}
            state = meta.observe(state, {**seen, "weight_decay": 0.1})
        assert float(state.decay_growth) == 1.5


def _decisions(strategy, rows, **hyperparams):
    factory = mo.moe_partition(optax.adamw, LABELS, num_layers=LAYERS)
    tx = mo.inject_meta_hyperparams(
        factory, mo.with_decisions(strategy), free_hyperparams={"aux_loss_weight": 0.01}
    )(learning_rate=0.01, weight_decay=0.1, **hyperparams)
    p = params()
    state = tx.init(p)
    step = jax.jit(lambda s, metrics: tx.update(p, s, p, **metrics)[1])
    for metrics in rows:
        state = step(state, metrics)
    return mo.read_decisions(state)


class TestWhatADecisionRestsOn:
    @pytest.mark.parametrize(
        ("strategy", "reason", "metric", "value"),
        [
            (mo.plateau(patience=1), "plateau: patience", "value", 1.0),
            (mo.plateau(), "plateau: grad_norm", "grad_norm", 12.0),
            (mo.advanced_plateau(), "advanced_plateau: warm-up", "step", 1.0),
            (
                mo.advanced_plateau(warmup_steps=0, patience=1),
                "advanced_plateau: patience",
                "value",
                1.0,
            ),
            (mo.expert_gate(), "expert_gate: gate_entropy", "gate_entropy", 0.4),
            (
                mo.expert_gate(normalized_entropy=True),
                "expert_gate: gate_entropy",
                "gate_entropy_normalized",
                0.3,
            ),
            (
                mo.smart_expert_gate(),
                "smart_expert_gate: gate_entropy",
                "gate_entropy",
                0.4,
            ),
            (
                mo.expert_gate(per_layer=True, num_layers=LAYERS),
                "expert_gate: gate_entropy",
                "gate_entropy_per_layer",
                0.4,
            ),
            (
                mo.expert_gate(per_layer=True, num_layers=LAYERS, normalized_entropy=True),
                "expert_gate: gate_entropy",
                "gate_entropy_normalized_per_layer",
                0.3,
            ),
            (
                mo.adapt_aux_loss(smoothing=0.0),
                "adapt_aux_loss: max_violation",
                "max_violation",
                2.6,
            ),
            (
                mo.guard_collapse(patience=1, smoothing=0.0),
                "guard_collapse: load_entropy",
                "load_entropy_normalized",
                0.2,
            ),
            (
                mo.guard_collapse(patience=1, smoothing=0.0, per_layer=True, num_layers=LAYERS),
                "guard_collapse: load_entropy",
                "load_entropy_normalized_per_layer",
                0.2,
            ),
            (mo.trend_plateau(window=8, min_evidence=8), "trend_plateau: no fall", "value", 1.0),
            (mo.greedy(window=8), "greedy: improves", "value", 0.3),
        ],
        ids=lambda x: x.name if isinstance(x, mo.MetaOptimizer) else None,
    )
    def test_of_each_rule(self, strategy, reason, metric, value):
        falls = strategy.name == "greedy"
        rows = [row(i, value=1.0 - 0.1 * i if falls else 1.0) for i in range(8)]
        found = [d for d in _decisions(strategy, rows) if d.reason == reason]
        assert found
        values = [(d.metric, pytest.approx(d.value)) for d in found]
        assert (metric, pytest.approx(value)) in values

    def test_array_has_no_value(self):
        usage = mo.smart_expert_gate(specialization_bonus=2.0)
        (first, *_) = [
            d for d in _decisions(usage, [row(i) for i in range(3)]) if "expert_usage" in d.reason
        ]
        assert first.metric == "expert_usage"
        assert math.isnan(first.value)

    def test_strategy_without_rules_has_no_metric(self):
        meta = mo.MetaOptimizer(
            name="halve",
            init=lambda: jnp.ones([], jnp.float32),
            observe=lambda state, metrics: state * 0.5,
            apply=lambda state, h: {**h, "learning_rate": h["learning_rate"] * state},
        )
        assert {(d.reason, d.metric) for d in _decisions(meta, [row()])} == {("halve", "")}

    def test_is_a_tuple_of_five_with_two_notes(self):
        decision = mo.Decision(3, "learning_rate", 0.2, 0.1, "plateau: patience", "value", 0.7)
        step, name, old, new, reason = decision
        assert (step, name, old, new, reason) == decision
        assert decision == mo.Decision(3, "learning_rate", 0.2, 0.1, "plateau: patience")
        for copied in (copy.copy(decision), pickle.loads(pickle.dumps(decision))):
            assert (copied, copied.metric, copied.value) == (decision, "value", 0.7)
        assert decision._replace(step=4).step == 4

    def test_is_written_out(self):
        decision = mo.Decision(3, "learning_rate", 0.2, 0.1, "plateau: patience", "value", 0.7123)
        line = "step 3: learning_rate 0.2 -> 0.1 (plateau: patience, value=0.7123)"
        assert mo.format_decisions([decision]) == line
