"""`adapt_aux_loss` and `guard_collapse`: their rules by hand, in Python, and at the edges."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meta_optax as mo

HEALTHY = {"load": 0.98, "dead": 0.0, "violation": 0.2, "gate": 0.5}
COLLAPSED = {"load": 0.3, "dead": 0.6, "violation": 4.0, "gate": 0.1}
UNDECIDED = {"load": 0.3, "dead": 0.6, "violation": 4.0, "gate": 0.99}
UNEVEN = {"load": 0.8, "dead": 0.2, "violation": 0.8, "gate": 0.5}


def _row(load, dead, violation, gate):
    return {
        "step": 0,
        "load_entropy_normalized": jnp.float32(load),
        "dead_experts": jnp.float32(dead),
        "max_violation": jnp.float32(violation),
        "gate_entropy_normalized": jnp.float32(gate),
    }


BASE = {"learning_rate": 1.0, "aux_loss_weight": 0.01, "balance_update_rate": 1e-4}
CALM = {"gate_learning_rate": 1.0, "aux_loss_weight": 0.01, "balance_update_rate": 1e-4}
ACTING = {"gate_learning_rate": 0.1, "aux_loss_weight": 0.3, "balance_update_rate": 1e-3}


def _run(meta, rows, state=None):
    state = meta.init() if state is None else state
    for row in rows:
        state = meta.observe(state, _row(**row))
    return state


def _used(meta, state, base=BASE):
    out = meta.apply(state, base)
    return {k: float(v) for k, v in out.items() if k != "learning_rate"}


class TestGuard:
    def _guard(self, **arguments):
        return mo.guard_collapse(
            **{"smoothing": 0.0, "patience": 2, "release_patience": 3, **arguments}
        )

    def test_acts_after_patience_and_lets_go_after_health(self):
        meta = self._guard()
        state = _run(meta, [COLLAPSED])
        assert _used(meta, state) == pytest.approx(CALM)
        state = _run(meta, [COLLAPSED], state)
        assert _used(meta, state) == pytest.approx(ACTING)
        state = _run(meta, [HEALTHY] * 2, state)
        assert _used(meta, state) == pytest.approx(ACTING)
        state = _run(meta, [HEALTHY], state)
        assert _used(meta, state) == pytest.approx(CALM)
        assert int(state.interventions) == 1

    def test_between_the_thresholds_nothing_changes(self):
        meta = self._guard()
        for begin in ([], [COLLAPSED] * 2):
            state = _run(meta, begin)
            before = _used(meta, state)
            assert _used(meta, _run(meta, [UNEVEN] * 20, state)) == before
        # And it breaks a row of either.
        assert not bool(_run(meta, [COLLAPSED, UNEVEN, COLLAPSED]).is_acting)
        assert bool(_run(meta, [COLLAPSED] * 2 + [HEALTHY, UNEVEN, HEALTHY, HEALTHY]).is_acting)

    def test_undecided_is_not_collapsed(self):
        assert not bool(_run(self._guard(), [UNDECIDED] * 50).is_acting)

    @pytest.mark.parametrize("cause", ["load", "dead", "violation"])
    def test_each_quantity_alone_is_enough_and_names_the_reason(self, cause):
        meta = self._guard()
        state = _run(meta, [HEALTHY | {cause: COLLAPSED[cause]}] * 2)
        assert bool(state.is_acting)
        rules = state.decision_rules()["*"]
        names = {"load": "load_entropy", "dead": "dead_experts", "violation": "max_violation"}
        assert rules.texts[int(rules.index)] == f"guard_collapse: {names[cause]}"

    @pytest.mark.parametrize("cause", ["load", "dead", "violation"])
    def test_all_must_be_healthy_to_let_go(self, cause):
        meta = self._guard()
        still = HEALTHY | {cause: UNEVEN[cause]}
        assert bool(_run(meta, [COLLAPSED] * 2 + [still] * 50).is_acting)

    def test_each_intervention_holds_four_times_as_long(self):
        meta = self._guard()
        state = meta.init()
        for looks in (3, 12, 48):
            state = _run(meta, [COLLAPSED] * 2 + [HEALTHY] * (looks - 1), state)
            assert bool(state.is_acting)
            state = _run(meta, [HEALTHY], state)
            assert not bool(state.is_acting)
        assert int(state.interventions) == 3

    def test_a_hold_stays_within_int32(self):
        meta = self._guard(release_patience=10**6)
        state = meta.init()._replace(interventions=jnp.int32(1000), is_acting=jnp.array(True))
        assert bool(_run(meta, [HEALTHY] * 5, state).is_acting)

    def test_against_a_loop_in_python(self):
        """Random health, smoothed, through the rule as the docstring has it."""
        rng = np.random.default_rng(0)
        meta = mo.guard_collapse(patience=2, release_patience=2, smoothing=0.5)
        step = jax.jit(meta.observe)
        state, average = meta.init(), None
        acting, bad, good, count = False, 0, 0, 0
        for _ in range(400):
            level = float(rng.choice([0.0, 0.5, 1.0], p=[0.4, 0.1, 0.5]))
            row = {k: (1 - level) * COLLAPSED[k] + level * HEALTHY[k] for k in HEALTHY}
            row = {k: np.float32(v) for k, v in row.items()}
            average = (
                row
                if average is None
                else {k: np.float32(0.5) * average[k] + np.float32(0.5) * row[k] for k in row}
            )
            load, dead, violation, gate = average.values()
            is_bad = (load < 0.7 or dead > 0.3 or violation > 1.0) and gate < 0.95
            is_good = load > 0.9 and dead < 0.15 and violation < 0.5
            bad, good = (bad + 1 if is_bad else 0), (good + 1 if is_good else 0)
            if not acting and bad >= 2:
                acting, count = True, count + 1
            elif acting and good >= 2 * 4 ** (count - 1):
                acting = False
            state = step(state, _row(**row))
            assert bool(state.is_acting) == acting
            assert int(state.interventions) == count
        assert count >= 2

    def test_acts_on_what_there_is(self):
        meta = self._guard()
        state = _run(meta, [COLLAPSED] * 2)
        assert _used(meta, state, {"aux_loss_weight": 0.0}) == pytest.approx(
            {"aux_loss_weight": 0.3}
        )
        stronger = {"aux_loss_weight": 0.7, "balance_update_rate": 0.1}
        assert _used(meta, state, stronger) == pytest.approx(stronger)
        layers = {"gate_0_learning_rate": 1.0, "gate_1_learning_rate": 0.5}
        assert _used(meta, state, layers) == pytest.approx(
            {"gate_0_learning_rate": 0.1, "gate_1_learning_rate": 0.05}
        )
        with pytest.raises(ValueError, match=r"nothing to control.*'momentum'"):
            meta.apply(state, {"momentum": 0.9})

    def test_all_layers_gates_are_slowed_where_some_have_forms_of_their_own(self):
        meta = self._guard()
        state = _run(meta, [COLLAPSED] * 2)
        used = _used(meta, state, {"learning_rate": 1.0, "gate_1_learning_rate": 0.5})
        expected = {"gate_learning_rate": 0.1, "gate_1_learning_rate": 0.05}
        assert used == pytest.approx(expected)

    @pytest.mark.parametrize("gate_first", [False, True])
    def test_in_a_chain_with_a_strategy_for_all_layers(self, gate_first):
        layered = mo.guard_collapse(per_layer=True, num_layers=2)
        parts = [mo.expert_gate(entropy_threshold=0.0), layered]
        meta = mo.chain(*(parts if gate_first else parts[::-1]))
        used = meta.apply(meta.init(), {"learning_rate": jnp.float32(1.0)})
        rates = [float(used[f"gate_{layer}_learning_rate"]) for layer in range(2)]
        assert rates == pytest.approx([0.1, 0.1])

    def test_a_factor_of_one_leaves_the_gate_alone(self):
        meta = self._guard(gate_lr_factor=1.0)
        out = meta.apply(_run(meta, [COLLAPSED] * 2), {"learning_rate": 1.0, "aux_loss_weight": 0})
        assert set(out) == {"learning_rate", "aux_loss_weight"}

    def test_one_layer_of_many(self):
        """The mean over the layers hides a collapse that the layers' own metrics show."""
        probs = np.tile(np.eye(4, dtype=np.float32), (8, 4, 1))
        probs[3] = np.eye(4)[0]
        metrics = {"step": 0, **mo.router_metrics(probs)}
        mean = self._guard(load_entropy=(0.5, 0.9))
        layered = self._guard(load_entropy=(0.5, 0.9), per_layer=True, num_layers=8)
        one, other = mean.init(), layered.init()
        for _ in range(3):
            one, other = mean.observe(one, metrics), layered.observe(other, metrics)
        assert not bool(one.is_acting)
        assert other.is_acting.tolist() == [layer == 3 for layer in range(8)]
        used = _used(layered, other)
        rates = [used[f"gate_{layer}_learning_rate"] for layer in range(8)]
        assert rates == pytest.approx([0.1 if layer == 3 else 1.0 for layer in range(8)])
        assert used["aux_loss_weight"] == pytest.approx(0.3)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"load_entropy": (0.9, 0.7)}, "load_entropy must be a pair with the first at most"),
            ({"dead_experts": (0.1, 0.2)}, "dead_experts must be a pair with the first at least"),
            ({"max_violation": 2.0}, r"max_violation must be a pair \(collapse, health\)"),
            ({"load_entropy": (0.5, 1.5)}, r"load_entropy must be .* \[0, 1\], got 1.5"),
            ({"undecided_entropy": -0.1}, "undecided_entropy"),
            ({"smoothing": 1.0}, "smoothing"),
            ({"patience": 0}, "patience"),
            ({"release_patience": 0}, "release_patience"),
            ({"gate_lr_factor": 1.1}, "gate_lr_factor"),
            ({"aux_loss_weight": math.inf}, "aux_loss_weight"),
            ({"balance_update_rate": -1.0}, "balance_update_rate"),
            ({"update_frequency": 0}, "update_frequency"),
            ({"per_layer": True}, "num_layers"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            mo.guard_collapse(**arguments)


def _look(meta, state, violation, drop=0.0, **base):
    row = {"step": 0, "max_violation": violation, "drop_fraction": drop}
    return meta.observe(state, {**row, **base})


def _adapt(**arguments):
    return mo.adapt_aux_loss(**{"violation_band": (0.25, 0.5), **arguments})


class TestAdaptAuxLoss:
    def test_rises_and_falls_with_a_band_between(self):
        meta = _adapt(smoothing=0.0, factor=2.0)
        state, weights = meta.init(), []
        for violation, drop in ((1.0, 0.0), (0.0, 0.2), (0.4, 0.0), (0.0, 0.03), (0.1, 0.0)):
            state = _look(meta, state, violation, drop)
            used = meta.apply(state, {"aux_loss_weight": 0.01})
            weights.append(float(used["aux_loss_weight"]))
        assert weights == pytest.approx([0.02, 0.04, 0.04, 0.04, 0.02])

    def test_smooths_as_the_equation_says(self):
        meta = _adapt(smoothing=0.75)
        state, average = meta.init(), None
        for violation in (1.0, 0.0, 0.5, 2.0):
            state = _look(meta, state, violation)
            average = violation if average is None else 0.75 * average + 0.25 * violation
            assert float(state.max_violation) == pytest.approx(average)

    @pytest.mark.parametrize("named", [False, True])
    def test_turns_at_once_at_its_bounds(self, named):
        """The factor does not wind up while the weight is at a bound."""
        meta = _adapt(smoothing=0.0, factor=2.0, min_weight=0.005, max_weight=0.04)
        base = {"base_aux_loss_weight": jnp.float32(0.01)} if named else {}
        state = meta.init()
        for _ in range(10):
            state = _look(meta, state, 2.0, **base)
        used = meta.apply(state, {"aux_loss_weight": 0.01})
        assert float(used["aux_loss_weight"]) == pytest.approx(0.04)
        if named:
            used = meta.apply(_look(meta, state, 0.0, **base), {"aux_loss_weight": 0.01})
            assert float(used["aux_loss_weight"]) == pytest.approx(0.02)
        for _ in range(40):
            state = _look(meta, state, 0.0, **base)
        used = meta.apply(state, {"aux_loss_weight": 0.01})
        assert float(used["aux_loss_weight"]) == pytest.approx(0.005)

    @pytest.mark.parametrize("base", [0.0, 1e-6, 0.5])
    def test_a_base_outside_the_bounds_is_left_alone(self, base):
        meta = _adapt(smoothing=0.0)
        used = meta.apply(meta.init(), {"aux_loss_weight": base})
        assert float(used["aux_loss_weight"]) == pytest.approx(base)
        for violation, further in ((9.0, max), (0.0, min)):
            state = meta.init()
            for _ in range(5):
                state = _look(meta, state, violation, base_aux_loss_weight=jnp.float32(base))
            weight = float(meta.apply(state, {"aux_loss_weight": base})["aux_loss_weight"])
            is_out = base in (0.0, 0.5 if violation else 1e-6)
            assert weight == pytest.approx(base) if is_out else further(weight, base) == weight

    @pytest.mark.parametrize(("before", "after"), [(0.0, 0.01), (1e-3, 5e-2)])
    def test_no_windup_under_a_base_that_moves(self, before, after):
        """What was balanced, or at a bound, for long turns within a few looks of a new base."""
        meta = _adapt(smoothing=0.0, factor=2.0)
        calm, uneven = (0.0, 2.0) if before == 0.0 else (2.0, 0.0)
        state = meta.init()
        for _ in range(100):
            state = _look(meta, state, calm, base_aux_loss_weight=jnp.float32(before))
        weights = []
        for _ in range(2):
            state = _look(meta, state, uneven, base_aux_loss_weight=jnp.float32(after))
            weights.append(float(meta.apply(state, {"aux_loss_weight": after})["aux_loss_weight"]))
        expected = [0.02, 0.04] if before == 0.0 else [0.05, 0.025]
        assert weights == pytest.approx(expected)

    def test_says_why(self):
        meta = _adapt(smoothing=0.0)
        reasons = []
        for violation, drop in ((1.0, 0.0), (0.0, 0.5), (1.0, 0.5), (0.0, 0.0)):
            rules = _look(meta, meta.init(), violation, drop).decision_rules()["*"]
            reasons.append(rules.texts[int(rules.index)].removeprefix("adapt_aux_loss: "))
        assert reasons == [
            "max_violation",
            "drop_fraction",
            "drop_fraction and max_violation",
            "balanced",
        ]

    def test_another_name(self):
        meta = _adapt(hyperparam="z_loss_weight", smoothing=0.0, factor=2.0)
        used = meta.apply(_look(meta, meta.init(), 1.0), {"z_loss_weight": 0.01})
        assert float(used["z_loss_weight"]) == pytest.approx(0.02)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"drop_band": (0.5, 0.1)}, "drop_band must be a pair .* low <= high"),
            ({"drop_band": (0.5, 1.1)}, r"drop_band must be .* \[0, 1\], got 1.1"),
            ({"violation_band": 0.5}, r"violation_band must be a pair \(low, high\), got 0.5"),
            ({"factor": 1.0}, "factor"),
            ({"smoothing": 1.0}, "smoothing"),
            ({"min_weight": -1.0}, "min_weight"),
            ({"max_weight": 1e-5}, r"max_weight must be at least min_weight \(0.0001\), got 1e-05"),
            ({"update_frequency": 0}, "update_frequency"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            mo.adapt_aux_loss(**arguments)
