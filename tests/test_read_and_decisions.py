"""What can be read from a state, and starting afresh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp
from table import BASE, FREE, LABELS, STRATEGIES, injected, params, plain, row

import meta_optax as mo


def _run(tx, rows, state=None):
    p = params()
    state = tx.init(p) if state is None else state
    step = jax.jit(lambda s, metrics: tx.update(p, s, p, **metrics)[1])
    for metrics in rows:
        state = step(state, metrics)
    return state


def _logged(strategy, **kwargs):
    return mo.inject_meta_hyperparams(
        mo.moe_partition(optax.adamw, LABELS), mo.with_decisions(strategy, **kwargs)
    )(**BASE)


class TestRead:
    def test_count_of_what_was_held_stands_on_the_state(self):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.chain(mo.plateau(), mo.plateau()))(0.5)
        assert int(_run(tx, [{"value": jnp.nan}] * 3).nonfinite_count) == 6
        tx = mo.scale_by_plateau()
        assert int(_run(tx, [{"value": jnp.nan}] * 3).nonfinite_count) == 3

    def test_finds_the_state_wherever_it_is(self):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.5)
        for wrapped in (tx, optax.chain(optax.clip(1.0), tx), optax.apply_if_finite(tx, 2)):
            assert mo.read_hyperparams(wrapped.init(params())) == {"learning_rate": 0.5}
        multi = optax.MultiSteps(tx, 2)
        assert mo.read_hyperparams(multi.init(params())) == {"learning_rate": 0.5}

    def test_reads_optaxs_own_injection(self):
        tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
        assert mo.read_hyperparams(tx.init(params())) == {"learning_rate": 0.5}

    def test_nothing_to_read(self):
        with pytest.raises(ValueError, match="inject_meta_hyperparams"):
            mo.read_hyperparams(optax.adam(0.1).init(params()))

    def test_two_values_of_one_name(self):
        one = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.5)
        other = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.25)
        with pytest.raises(ValueError, match="'learning_rate' stands in the state twice"):
            mo.read_hyperparams(optax.chain(one, other).init(params()))

    def test_batched_state(self):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.5)
        batch = jax.tree.map(lambda x: jnp.stack([x, x]), params())
        with pytest.raises(ValueError, match=r"shape \(2,\)"):
            mo.read_hyperparams(jax.vmap(tx.init)(batch))

    def test_unknown_layout_is_refused_by_its_version(self):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.5)
        state = tx.init(params())._replace(layout_version=jnp.int32(7))
        with pytest.raises(ValueError, match="layout version 7"):
            mo.read_hyperparams(state)


class TestReset:
    @pytest.mark.parametrize("name", STRATEGIES)
    def test_strategies_start_afresh_and_the_rest_stays(self, name):
        tx = injected(STRATEGIES[name])
        p = params()
        old = _run(tx, [row(i) for i in range(5)])
        new = mo.reset(old, tx, p)
        assert int(new.count) == 5
        chex.assert_trees_all_equal(new.inner_state, old.inner_state)
        chex.assert_trees_all_equal(new.hyperparams, old.hyperparams)
        if not STRATEGIES[name].keeps:
            chex.assert_trees_all_equal(plain(new.meta_state), plain(tx.init(p).meta_state))

    def test_warm_up_does_not_start_again(self):
        strategy = mo.with_decisions(mo.advanced_plateau(warmup_steps=4, patience=1))
        for wrapped in (strategy, mo.every(5, strategy)):
            tx = mo.inject_meta_hyperparams(optax.adam, wrapped)(learning_rate=0.5)
            old = _run(tx, [{"value": 1.0}] * 12)
            new = mo.reset(old, tx, params())
            after = _run(tx, [{"value": np.nan}], new)
            assert mo.read_hyperparams(after)["learning_rate"] == 0.5
            assert mo.read_decisions(after) == mo.read_decisions(old)

    def test_state_of_another_shape(self):
        tx = mo.inject_meta_hyperparams(optax.adam, mo.plateau())(learning_rate=0.5)
        batch = jax.tree.map(lambda x: jnp.stack([x, x]), params())
        with pytest.raises(ValueError, match="does not belong"):
            mo.reset(jax.vmap(tx.init)(batch), tx, params())
        longer = mo.inject_meta_hyperparams(optax.adam, mo.advanced_plateau(trend_window=9))(0.5)
        shorter = mo.inject_meta_hyperparams(optax.adam, mo.advanced_plateau(trend_window=3))(0.5)
        with pytest.raises(ValueError, match="does not belong"):
            mo.reset(longer.init(params()), shorter, params())

    def test_unknown_layout(self):
        tx = mo.inject_meta_hyperparams(optax.adam, mo.plateau())(learning_rate=0.5)
        state = tx.init(params())._replace(layout_version=jnp.int32(0))
        with pytest.raises(ValueError, match="layout version 0"):
            mo.reset(state, tx, params())

    def test_in_any_wrapper_and_under_jit(self):
        inner = mo.inject_meta_hyperparams(optax.adam, mo.plateau(patience=1))(learning_rate=0.5)
        tx = optax.chain(optax.apply_if_finite(inner, 2), mo.scale_by_plateau(patience=1))
        p = params()
        old = _run(tx, [{"value": 1.0}] * 4)
        new = jax.jit(lambda s: mo.reset(s, tx, p))(old)
        assert jax.tree.structure(new) == jax.tree.structure(old)
        after = _run(tx, [{"value": 1.0}], new)
        assert mo.read_hyperparams(after)["learning_rate"] == 0.5
        assert mo.read_hyperparams(after)["learning_rate_scale"] == 1.0
        moments = optax.tree.get(new, "mu")["router"]
        np.testing.assert_array_equal(moments, optax.tree.get(old, "mu")["router"])

    def test_schedule_inside_the_injection_of_optax(self):
        rate = mo.as_schedule(mo.plateau(patience=1), 1.0)
        tx = optax.inject_hyperparams(optax.adam)(learning_rate=rate)
        old = _run(tx, [{"value": 1.0}] * 4)
        after = _run(tx, [{"value": 1.0}], mo.reset(old, tx, params()))
        assert float(after.hyperparams["learning_rate"]) == 1.0

    def test_log_of_decisions_stays(self):
        tx = _logged(mo.plateau(patience=1))
        old = _run(tx, [row(i) for i in range(4)])
        assert mo.read_decisions(mo.reset(old, tx, params())) == mo.read_decisions(old)

    def test_buffers_can_be_donated_afterwards(self):
        tx = mo.inject_meta_hyperparams(optax.adam, mo.advanced_plateau())(learning_rate=0.5)
        p = params()
        state = mo.reset(tx.init(p), tx, p)
        jax.jit(lambda s: tx.update(p, s, p, **row())[1], donate_argnums=0)(state)

    def test_nothing_to_reset(self):
        tx = optax.adam(0.1)
        with pytest.raises(ValueError, match="nothing to reset"):
            mo.reset(tx.init(params()), tx, params())

    def test_state_of_something_else(self):
        one = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.5)
        other = mo.inject_meta_hyperparams(optax.adam, mo.plateau())(learning_rate=0.5)
        with pytest.raises(ValueError, match="does not belong"):
            mo.reset(one.init(params()), other, params())


class TestDecisions:
    def test_each_says_when_what_and_why(self):
        tx = _logged(mo.chain(mo.plateau(patience=2), mo.expert_gate()))
        quiet = {"grad_norm": 1.0, "gate_entropy": 1.2}
        rows = [{"value": v, **quiet} for v in (1.0, 1.0, 1.0)]
        rows[2]["grad_norm"] = 20.0
        rows += [{"value": 0.5, **quiet, "gate_entropy": 0.1}]
        got = mo.read_decisions(_run(tx, rows))
        expected = [
            (2, "learning_rate", 0.01, 0.005, "plateau: patience"),
            (2, "weight_decay", 0.1, 0.11, "plateau: grad_norm"),
            (2, "gate_learning_rate", 0.001, 0.0005, "plateau: patience"),
            (2, "expert_learning_rate", 0.01, 0.005, "plateau: patience"),
            (3, "gate_learning_rate", 0.0005, 0.00025, "expert_gate: gate_entropy"),
        ]
        key = lambda d: (d[0], d[1])  # noqa: E731
        for decision, (step, name, old, new, reason) in zip(
            sorted(got, key=key), sorted(expected, key=key), strict=True
        ):
            assert (decision.step, decision.hyperparam, decision.reason) == (step, name, reason)
            assert (decision.old, decision.new) == pytest.approx((old, new))
        assert [d.step for d in got] == sorted(d.step for d in got)

    @pytest.mark.parametrize(
        ("arguments", "rows", "hyperparam", "reason"),
        [
            ({}, {"value": [2.0, 1.9]}, "learning_rate", "warm-up"),
            ({"warmup_steps": 0, "patience": 2}, {"value": [1.0] * 3}, "learning_rate", "patience"),
            (
                {"warmup_steps": 0, "patience": 9, "trend_window": 3},
                {"value": [1.0] * 3},
                "learning_rate",
                "trend",
            ),
            (
                {"warmup_steps": 0},
                {"value": [1.0], "grad_norm": [11.0]},
                "weight_decay",
                "grad_norm",
            ),
            (
                {"warmup_steps": 0},
                {"value": [3.0, 2.0, 1.0], "param_norm": [1.0, 5.0, 9.0]},
                "weight_decay",
                "param_norm",
            ),
            (
                {"warmup_steps": 0},
                {"value": [1.0, 2.0], "grad_norm": [6.0, 7.0]},
                "weight_decay",
                "rising loss",
            ),
        ],
    )
    def test_each_rule_of_advanced_plateau_gives_its_name(
        self, arguments, rows, hyperparam, reason
    ):
        tx = _logged(mo.advanced_plateau(**arguments))
        columns = {"grad_norm": [1.0] * 3, "param_norm": [1.0] * 3, **rows}
        n = len(rows["value"])
        state = _run(tx, [{k: v[i] for k, v in columns.items()} for i in range(n)])
        last = mo.read_decisions(state)[-1]
        assert (last.hyperparam, last.reason) == (hyperparam, f"advanced_plateau: {reason}")

    def test_schedule_is_no_decision(self):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.with_decisions(mo.plateau()))(
            learning_rate=optax.cosine_decay_schedule(1.0, 10)
        )
        assert mo.read_decisions(_run(tx, [{"value": 1.0 / (i + 1)} for i in range(5)])) == []

    def test_ring_keeps_the_last(self):
        tx = _logged(mo.plateau(patience=1, min_lr=0.0), capacity=2)
        state = _run(tx, [row(1)] * 6)
        got = mo.read_decisions(state)
        assert [d.step for d in got] == [4, 5]
        assert int(state.meta_state.log.count) == 5

    def test_more_decisions_in_a_step_than_the_ring_holds(self):
        tx = _logged(mo.chain(mo.plateau(patience=1), mo.expert_gate()), capacity=1)
        got = mo.read_decisions(_run(tx, [row(1)] * 3))
        assert len(got) == 1
        assert got[0].reason.startswith(("plateau", "expert_gate"))

    def test_dry_run_records_what_would_have_been(self):
        tx = mo.inject_meta_hyperparams(
            optax.sgd, mo.log_only(mo.with_decisions(mo.plateau(patience=1)))
        )(learning_rate=1.0)
        state = _run(tx, [{"value": 1.0}] * 2)
        assert mo.read_hyperparams(state) == {"learning_rate": 1.0}
        assert [(d.old, d.new) for d in mo.read_decisions(state)] == [(1.0, 0.5)]

    def test_dry_run_the_wrong_way_round_is_an_error(self):
        strategy = mo.with_decisions(mo.log_only(mo.plateau()))
        tx = mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=1.0)
        with pytest.raises(ValueError, match=r"nothing to record.*log_only\(with_decisions"):
            _run(tx, [{"value": 1.0}])

    def test_one_log_for_each_strategy(self):
        tx = mo.inject_meta_hyperparams(
            mo.moe_partition(optax.sgd, LABELS),
            mo.chain(
                mo.with_decisions(mo.plateau(patience=1)), mo.with_decisions(mo.expert_gate())
            ),
        )(learning_rate=1.0)
        got = mo.read_decisions(_run(tx, [row(1), row(1), row(2, value=0.5)]))
        assert [(d.step, d.hyperparam, d.old, d.new) for d in got] == [
            (0, "gate_learning_rate", pytest.approx(0.1), pytest.approx(0.05)),
            (1, "learning_rate", 1.0, 0.5),
            # The second strategy starts from what the first one makes of the base.
            (2, "gate_learning_rate", pytest.approx(0.025), pytest.approx(0.05)),
        ]

    def test_acts_as_without_the_log(self):
        plain = injected(STRATEGIES["chain"])
        logged = mo.inject_meta_hyperparams(
            mo.moe_partition(optax.adamw, LABELS),
            mo.with_decisions(STRATEGIES["chain"].eager()),
            free_hyperparams=FREE,
        )(**BASE)
        rows = [row(i) for i in range(6)]
        assert mo.read_hyperparams(_run(plain, rows)) == mo.read_hyperparams(_run(logged, rows))

    def test_layers_that_change_alike_are_one_line(self):
        reason = "expert_gate: gate_entropy"
        decisions = [
            mo.Decision(7, f"gate_{layer}_learning_rate", 0.1, new, reason)
            for layer, new in enumerate((0.05, 0.05, 0.01))
        ]
        assert mo.format_decisions(decisions).splitlines() == [
            f"step 7: gate_*_learning_rate 0.1 -> 0.05 ({reason})",
            f"step 7: gate_2_learning_rate 0.1 -> 0.01 ({reason})",
        ]

    def test_regular_looks_are_one_line_and_two_cuts_are_two(self):
        def decide(step, old):
            return mo.Decision(step, "learning_rate", old, old / 2, "plateau: patience")

        looks = [decide(step, 1.0 / 2**i) for i, step in enumerate((0, 10, 20, 30, 400, 700, 720))]
        assert mo.format_decisions(looks).splitlines() == [
            "steps 0-30 by 10: learning_rate 1 -> 0.0625 (plateau: patience)",
            "step 400: learning_rate 0.0625 -> 0.03125 (plateau: patience)",
            "step 700: learning_rate 0.03125 -> 0.01562 (plateau: patience)",
            "step 720: learning_rate 0.01562 -> 0.007812 (plateau: patience)",
        ]

    def test_to_and_fro_is_not_hidden_in_one_line(self):
        values = [0.003, 0.0015, 0.003, 0.0015]
        steps = zip((280, 300, 320), values[:-1], values[1:], strict=True)
        moves = [mo.Decision(s, "gate_learning_rate", old, new, "x: y") for s, old, new in steps]
        assert len(mo.format_decisions(moves).splitlines()) == 3

    def test_the_reason_of_a_layers_form_is_that_of_the_group(self):
        meta = mo.chain(mo.smart_expert_gate(), mo.guard_collapse(per_layer=True, num_layers=1))
        factory = mo.moe_partition(optax.adamw, LABELS, num_layers=1)
        tx = mo.inject_meta_hyperparams(factory, mo.with_decisions(meta))(0.1)
        reasons = {d.hyperparam: d.reason for d in mo.read_decisions(_run(tx, [row(1)]))}
        assert reasons["gate_0_learning_rate"] == "smart_expert_gate: gate_entropy"

    def test_reading_is_one_transfer_and_compiles_nothing(self):
        state = _run(_logged(mo.plateau(patience=1)), [row(1)] * 3)
        with jax.transfer_guard("disallow"), jax.log_compiles(False):
            mo.read_decisions(state)
            mo.read_hyperparams(state)

    def test_log_survives_a_checkpoint(self, tmp_path):
        """Saved and restored by Orbax, it reads the same, and goes on as if nothing had been."""
        tx = _logged(mo.chain(mo.plateau(patience=1), mo.trend_plateau(window=8)))
        old = _run(tx, [row(i) for i in range(12)])
        ocp.save(tmp_path / "state", old)
        restored = ocp.load(tmp_path / "state", tx.init(params()))
        assert mo.read_decisions(restored) == mo.read_decisions(old)
        rows = [row(i) for i in range(3)]
        again = mo.read_decisions(_run(tx, rows, restored))
        assert again == mo.read_decisions(_run(tx, rows, old))
        assert [(d.metric, d.value) for d in again] == [
            (d.metric, d.value) for d in mo.read_decisions(_run(tx, rows, old))
        ]
        assert len(again) > len(mo.read_decisions(old))

    def test_log_is_the_same_under_scan_and_vmap(self):
        tx = _logged(mo.plateau(patience=1))
        p, rows = params(), [row(i) for i in range(6)]
        expected = mo.read_decisions(_run(tx, rows))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

        def run(state):
            return jax.lax.scan(lambda s, m: (tx.update(p, s, p, **m)[1], None), state, stacked)[0]

        assert mo.read_decisions(jax.jit(run)(tx.init(p))) == expected
        two = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(p))
        one = jax.tree.map(lambda x: x[1], jax.vmap(run)(two))
        assert mo.read_decisions(one) == expected

    def test_batched_log(self):
        tx = _logged(mo.plateau())
        batch = jax.tree.map(lambda x: jnp.stack([x, x]), params())
        with pytest.raises(ValueError, match=r"batched.*\(2,\)"):
            mo.read_decisions(jax.vmap(tx.init)(batch))

    def test_no_log(self):
        with pytest.raises(ValueError, match="with_decisions"):
            mo.read_decisions(injected(STRATEGIES["plateau"]).init(params()))

    @pytest.mark.parametrize("capacity", [0, -1, 1.5, None])
    def test_capacity_out_of_range(self, capacity):
        with pytest.raises(ValueError, match="capacity"):
            mo.with_decisions(mo.plateau(), capacity=capacity)

    def test_format_joins_what_fires_step_after_step(self):
        warm = [
            mo.Decision(i, "learning_rate", 0.1 * i, 0.1 * (i + 1), "advanced_plateau: warm-up")
            for i in range(1, 4)
        ]
        cut = mo.Decision(9, "learning_rate", 0.4, 0.2, "advanced_plateau: patience")
        assert mo.format_decisions([*warm, cut]).splitlines() == [
            "steps 1-3: learning_rate 0.1 -> 0.4 (advanced_plateau: warm-up)",
            "step 9: learning_rate 0.4 -> 0.2 (advanced_plateau: patience)",
        ]
        assert mo.format_decisions([]) == "no decisions"
