"""The other ways to act: scales behind an optimizer, and stateful schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import LABELS, custom, params, row

import meta_optax as mo


class TestScale:
    def test_multiplies_the_updates_of_any_optimizer(self):
        tx = optax.chain(optax.adam(0.1), mo.scale_by_plateau(patience=1, lr_factor=0.1))
        p = params()
        plain = optax.adam(0.1)
        state, plain_state = tx.init(p), plain.init(p)
        for factor in (1.0, 0.1, 0.01):
            updates, state = tx.update(p, state, p, value=1.0)
            expected, plain_state = plain.update(p, plain_state, p)
            np.testing.assert_allclose(updates["router"], factor * expected["router"], rtol=1e-5)

    def test_each_named_form_is_scale_by_meta_of_its_strategy(self):
        forms = [
            (mo.scale_by_plateau, mo.plateau, ()),
            (mo.scale_by_advanced_plateau, mo.advanced_plateau, ()),
            (mo.scale_by_expert_gate, mo.expert_gate, (LABELS,)),
            (mo.scale_by_smart_expert_gate, mo.smart_expert_gate, (LABELS,)),
        ]
        p = params()
        for named, strategy, labels in forms:
            arguments = {"update_frequency": 2}
            ours, spelled = (
                named(*labels, **arguments),
                mo.scale_by_meta(strategy(**arguments), *labels),
            )
            a, _ = ours.update(p, ours.init(p), p, **row())
            b, _ = spelled.update(p, spelled.init(p), p, **row())
            jax.tree.map(np.testing.assert_array_equal, a, b)

    def test_groups_shrink_by_the_ratio_asked_for(self):
        tx = optax.chain(
            optax.adamw(0.1), mo.scale_by_smart_expert_gate(LABELS, gate_lr_factor=0.25)
        )
        p = params()
        plain = optax.adamw(0.1)
        expected, _ = plain.update(p, plain.init(p), p)
        updates, _ = tx.update(p, tx.init(p), p, **row(1))
        for leaf, ratio in (("router", 0.125), ("experts", 1.0), ("dense", 1.0)):
            np.testing.assert_allclose(updates[leaf], ratio * expected[leaf], rtol=1e-5)

    def test_needs_the_loss_alone(self):
        """No weight decay to control, so no norm is asked for, and params are not needed."""
        for tx in (mo.scale_by_plateau(), mo.scale_by_advanced_plateau()):
            tx.update(params(), tx.init(params()), value=1.0)

    def test_a_rate_injected_in_the_same_chain_stays_readable(self):
        tx = optax.chain(
            optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
            mo.scale_by_plateau(patience=1),
        )
        p = params()
        state = tx.init(p)
        for _ in range(2):
            _, state = tx.update(p, state, p, value=1.0)
        assert float(optax.tree.get(state, "learning_rate")) == pytest.approx(0.1)
        read = mo.read_hyperparams(state)
        assert read["learning_rate_scale"] == 0.5
        assert read["learning_rate"] == pytest.approx(0.1)

    def test_groups_without_labels(self):
        with pytest.raises(ValueError, match=r"expert_gate sets .*gate_learning_rate.*labels"):
            mo.scale_by_meta(mo.expert_gate())

    def test_a_label_without_parameters(self):
        labels = {**LABELS, "router": "dense"}
        with pytest.raises(ValueError, match="no parameters labelled 'gate'"):
            mo.scale_by_expert_gate(labels).init(params())

    def test_a_label_over_nothing(self):
        p = {"router": jnp.ones(2), "experts": {}}
        with pytest.raises(ValueError, match="no parameters labelled 'expert'"):
            mo.scale_by_expert_gate({"router": "gate", "experts": "expert"}).init(p)

    def test_labels_of_another_tree(self):
        labels = {**LABELS, "ghost": "dense"}
        with pytest.raises(ValueError, match="labels that do not fit the params"):
            mo.scale_by_expert_gate(labels).init(params())

    def test_a_balance_bias_is_left_alone(self):
        labels = {"router": "gate", "experts": "expert", "dense": "balance_bias"}
        tx = mo.scale_by_meta(mo.chain(mo.plateau(patience=1), mo.expert_gate()), labels)
        p = params()
        state = tx.init(p)
        for _ in range(3):
            updates, state = tx.update(p, state, p, **row())
        np.testing.assert_array_equal(updates["dense"], p["dense"])
        np.testing.assert_allclose(updates["experts"], p["experts"] / 4, rtol=1e-6)

    def test_two_in_one_chain_report_what_each_controls(self):
        tx = optax.chain(mo.scale_by_plateau(), mo.scale_by_expert_gate(LABELS))
        read = mo.read_hyperparams(tx.init(params()))
        assert read["learning_rate_scale"] == 1.0
        assert read["gate_learning_rate_scale"] == pytest.approx(0.1)

    def test_something_else_than_a_rate(self):
        warm = custom()._replace(apply=lambda s, h: {**h, "warmth": jnp.ones([])})
        with pytest.raises(ValueError, match=r"custom sets \['warmth'\]"):
            mo.scale_by_meta(warm)

    def test_unknown_argument(self):
        with pytest.raises(TypeError, match="patients"):
            mo.scale_by_plateau(patients=3)


class TestSchedule:
    def _tx(self, strategy, base=0.1, **kwargs):
        schedule = mo.as_schedule(strategy, base, **kwargs)
        name = kwargs.get("hyperparam", "learning_rate")
        others = {} if name == "learning_rate" else {"learning_rate": 0.1}
        return optax.inject_hyperparams(optax.adamw)(**{name: schedule}, **others)

    def test_is_one_of_optax(self):
        assert isinstance(mo.as_schedule(mo.plateau(), 0.1), optax.schedules.StatefulSchedule)

    def test_acts_on_the_same_step(self):
        tx = self._tx(mo.plateau(patience=1))
        p, rates = params(), []
        state = tx.init(p)
        assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.1)
        step = jax.jit(lambda s, v: tx.update(p, s, p, value=v)[1])
        for value in (1.0, 1.0, 0.5, 0.6):
            state = step(state, value)
            rates.append(float(state.hyperparams["learning_rate"]))
        assert rates == pytest.approx([0.1, 0.05, 0.05, 0.025])
        assert step._cache_size() == 1

    def test_base_schedule_keeps_its_shape(self):
        cosine = optax.cosine_decay_schedule(1.0, 10)
        tx = self._tx(mo.plateau(patience=1), cosine)
        p = params()
        state = tx.init(p)
        for _ in range(3):
            _, state = tx.update(p, state, p, value=1.0)
        rate = float(state.hyperparams["learning_rate"])
        assert rate == pytest.approx(float(cosine(2)) / 4)

    def test_weight_decay(self):
        tx = self._tx(mo.plateau(), 0.01, hyperparam="weight_decay")
        p = params()
        _, state = tx.update(p, tx.init(p), p, value=1.0, grad_norm=50.0)
        assert float(state.hyperparams["weight_decay"]) == pytest.approx(0.011)

    def test_form_of_a_group(self):
        schedule = mo.as_schedule(mo.expert_gate(), 1.0, hyperparam="gate_learning_rate")
        state = schedule.update(schedule.init(), gate_entropy=0.1)
        assert float(state.last) == pytest.approx(0.05)

    def test_missing_metric(self):
        tx = self._tx(mo.plateau())
        p = params()
        for metrics in ({}, {"loss": 1.0}):
            with pytest.raises(TypeError, match=r"plateau needs the metric 'value'"):
                tx.update(p, tx.init(p), p, **metrics)

    def test_norm_has_to_be_passed_for_weight_decay(self):
        tx = self._tx(mo.plateau(), 0.01, hyperparam="weight_decay")
        p = params()
        with pytest.raises(TypeError, match=r"'grad_norm'.*grad_norm=optax.tree.norm\(grads\)"):
            tx.update(p, tx.init(p), p, value=1.0)

    def test_hyperparameter_that_it_does_not_control(self):
        with pytest.raises(ValueError, match=r"expert_gate does not control 'learning_rate'"):
            mo.as_schedule(mo.expert_gate(), 0.1)

    def test_dry_run(self):
        schedule = mo.as_schedule(mo.log_only(mo.plateau(patience=1)), 0.1)
        state = schedule.init()
        for _ in range(3):
            state = schedule.update(state, value=1.0)
        assert float(state.last) == pytest.approx(0.1)
        for name in ("gate_learning_rate",):
            with pytest.raises(ValueError, match="does not control"):
                mo.as_schedule(mo.log_only(mo.expert_gate()), 0.1, hyperparam=name)

    @pytest.mark.parametrize("base", [float("nan"), -0.1, None])
    def test_base_out_of_range(self, base):
        with pytest.raises(ValueError, match="base of 'learning_rate'"):
            mo.as_schedule(mo.plateau(), base)
