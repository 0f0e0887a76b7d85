"""`moe_partition`: rates of groups that are seen to act, labels, fallbacks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import LABELS, params, row

import meta_optax as mo


def test_gate_and_expert_rates_are_seen_to_act():
    """The updates of gate leaves shrink by exactly the ratio asked for."""
    strategy = mo.expert_gate(gate_lr_factor=0.1, expert_lr_factor=2.0, entropy_threshold=0.8)
    tx = mo.inject_meta_hyperparams(mo.moe_partition(optax.adamw, LABELS), strategy)(
        learning_rate=0.1, weight_decay=0.01
    )
    p = params()
    plain = optax.adamw(0.1, weight_decay=0.01)
    expected, _ = plain.update(p, plain.init(p), p)
    for entropy, gate_ratio in ((1.2, 0.1), (0.4, 0.05)):
        updates, _ = tx.update(p, tx.init(p), p, gate_entropy=entropy)
        for leaf, ratio in (("router", gate_ratio), ("experts", 2.0), ("dense", 1.0)):
            np.testing.assert_allclose(updates[leaf], ratio * expected[leaf], rtol=1e-5)


def test_gate_weight_decay_is_seen_to_act():
    tx = mo.inject_meta_hyperparams(
        mo.moe_partition(optax.adamw, LABELS), mo.smart_expert_gate(gate_lr_factor=1.0)
    )(learning_rate=0.1, weight_decay=0.2)
    p = params()
    zeros = jax.tree.map(jnp.zeros_like, p)
    updates, _ = tx.update(zeros, tx.init(p), p, **{**row(), "gate_sparsity": 0.7})
    np.testing.assert_allclose(updates["router"], -0.1 * 0.3 * p["router"], rtol=1e-5)
    np.testing.assert_allclose(updates["experts"], -0.1 * 0.2 * p["experts"], rtol=1e-5)


def test_a_plateau_cuts_every_group():
    tx = mo.inject_meta_hyperparams(
        mo.moe_partition(optax.sgd, LABELS), mo.plateau(patience=1, min_lr=0.0)
    )(learning_rate=1.0, gate_learning_rate=0.1)
    p = params()
    state = tx.init(p)
    for _ in range(2):
        _, state = tx.update(p, state, p, value=1.0)
    assert mo.read_hyperparams(state) == pytest.approx(
        {"learning_rate": 0.5, "gate_learning_rate": 0.05}
    )


@pytest.mark.parametrize("make", [mo.plateau, mo.advanced_plateau])
def test_a_plain_rate_of_zero_leaves_the_groups_room_to_be_cut(make):
    arguments = {"warmup_steps": 0} if make is mo.advanced_plateau else {}
    strategy = make(patience=1, **arguments)
    tx = mo.inject_meta_hyperparams(mo.moe_partition(optax.adamw, LABELS), strategy)(
        learning_rate=0.0, gate_learning_rate=0.1, expert_learning_rate=0.2
    )
    p = params()
    state = tx.init(p)
    for _ in range(2):
        _, state = tx.update(p, state, p, value=1.0)
    read = mo.read_hyperparams(state)
    rates = [read[f"{group}learning_rate"] for group in ("", "gate_", "expert_")]
    assert rates == pytest.approx([0.0, 0.05, 0.1])


def test_a_base_of_the_group_takes_the_place_of_the_plain_one():
    tx = mo.inject_meta_hyperparams(mo.moe_partition(optax.sgd, LABELS), mo.expert_gate())(
        learning_rate=1.0, gate_learning_rate=0.5
    )
    assert mo.read_hyperparams(tx.init(params()))["gate_learning_rate"] == pytest.approx(0.05)


def test_forms_fall_back_to_the_plain_argument():
    tx = mo.moe_partition(optax.sgd, LABELS)(1.0, momentum=0.9, expert_momentum=0.0)
    p = params()
    state = tx.init(p)
    for _ in range(2):
        updates, state = tx.update(p, state, p)
    np.testing.assert_allclose(updates["router"], -1.9 * p["router"], rtol=1e-6)
    np.testing.assert_allclose(updates["experts"], -1.0 * p["experts"], rtol=1e-6)


def test_other_labels_count_as_documented():
    labels = {"a": "gate", "b": "gate_bias", "c": "expert", "d": "shared_expert", "e": "dense"}
    labels |= {"f": "balance_bias"}
    p = {name: jnp.ones(2) for name in labels}
    tx = mo.moe_partition(optax.adamw, labels)(
        1.0, weight_decay=0.5, gate_learning_rate=0.1, expert_learning_rate=0.01
    )
    updates, _ = tx.update(p, tx.init(p), p)
    ratios = {name: float(-updates[name][0] / 1.5) for name in labels}
    expected = {"a": 0.1, "b": 0.1, "c": 0.01, "d": 1.0, "e": 1.0, "f": 0.0}
    assert ratios == pytest.approx(expected, rel=1e-5)


def test_labels_as_function_as_prefix_and_as_a_tree_that_can_be_called():
    @jax.tree_util.register_pytree_node_class
    class Model(dict):
        """A model is often callable, and so is a tree of its labels."""

        def __call__(self):
            raise AssertionError

        def tree_flatten(self):
            return tuple(self.values()), tuple(self)

        @classmethod
        def tree_unflatten(cls, names, leaves):
            return cls(zip(names, leaves, strict=True))

    p = Model(router={"w": jnp.ones(2)}, experts={"w": jnp.ones(2)})
    prefix = Model(router="gate", experts="expert")
    for labels in (prefix, lambda tree: prefix):
        tx = mo.moe_partition(optax.sgd, labels)(1.0, gate_learning_rate=0.1)
        updates, _ = tx.update(p, tx.init(p), p)
        np.testing.assert_allclose(updates["router"]["w"], -0.1)


@pytest.mark.parametrize("lost", ["gate", "expert"])
def test_a_label_without_parameters(lost):
    labels = {k: ("dense" if v == lost else v) for k, v in LABELS.items()}
    with pytest.raises(ValueError, match=f"no parameters labelled '{lost}'.*dense"):
        mo.moe_partition(optax.sgd, labels)(1.0).init(params())


def test_an_unknown_label():
    labels = {**LABELS, "dense": "attention"}
    with pytest.raises(ValueError, match=r"'attention' at .*'dense'.* is unknown.*balance_bias"):
        mo.moe_partition(optax.sgd, labels)(1.0).init(params())


def test_a_factory_with_groups_of_its_own():
    def factory(learning_rate, gate_learning_rate):
        return optax.sgd(learning_rate)

    with pytest.raises(ValueError, match="gate_learning_rate"):
        mo.moe_partition(factory, LABELS)
