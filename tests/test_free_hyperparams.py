"""Free hyperparameters: what the loss needs rides in the optimizer's state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import params, row

import meta_optax as mo

FREE = {"aux_loss_weight": 1e-2}


def _injected(strategy=None, free=None, **kwargs):
    strategy = strategy or mo.adapt_aux_loss(smoothing=0.0, factor=2.0)
    make = mo.inject_meta_hyperparams(optax.adamw, strategy, free_hyperparams=free or FREE)
    return make(**{"learning_rate": 0.1, **kwargs})


def _violating(violation):
    return {**row(), "max_violation": jnp.float32(violation), "drop_fraction": jnp.float32(0.0)}


def test_the_jitted_loss_reads_what_the_strategy_set():
    tx = _injected()
    seen = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(p, state, violation):
        def loss(p):
            weight = optax.tree.get(state, "aux_loss_weight")
            return weight * sum(x.sum() for x in p.values()), weight

        grads, weight = jax.grad(loss, has_aux=True)(p)
        updates, state = tx.update(grads, state, p, **_violating(violation))
        return optax.apply_updates(p, updates), state, weight, grads["router"][0]

    p = params()
    state = tx.init(p)
    for violation in (3.0, 3.0, 0.7, 0.0):
        p, state, weight, gradient = step(p, state, violation)
        assert float(weight) == float(gradient)
        seen.append(float(weight))
    assert seen == pytest.approx([0.01, 0.02, 0.04, 0.04])
    assert float(optax.tree.get(state, "aux_loss_weight")) == pytest.approx(0.02)


def test_the_optimizer_never_sees_it():
    p = params()
    plain = mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(0.1)
    free = mo.inject_meta_hyperparams(optax.adamw, mo.plateau(), free_hyperparams=FREE)(0.1)
    one, _ = plain.update(p, plain.init(p), p, value=1.0)
    other, _ = free.update(p, free.init(p), p, value=1.0)
    chex.assert_trees_all_equal(one, other)


def test_one_that_nothing_controls_can_be_written_to_as_with_optax():
    tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau(), free_hyperparams=FREE)(0.1)
    p = params()
    state = optax.tree.set(tx.init(p), aux_loss_weight=jnp.float32(0.5))
    _, state = tx.update(p, state, p, value=1.0)
    assert mo.read_hyperparams(state)["aux_loss_weight"] == 0.5


def test_the_base_of_one_under_control_is_changed_in_flight():
    tx = _injected()
    p = params()
    state = optax.tree.set(tx.init(p), base_aux_loss_weight=jnp.float32(0.04))
    _, state = tx.update(p, state, p, **_violating(3.0))
    assert mo.read_hyperparams(state)["aux_loss_weight"] == pytest.approx(0.08)


def test_a_schedule_keeps_its_shape():
    free = {"aux_loss_weight": optax.linear_schedule(0.01, 0.03, 2)}
    tx = _injected(free=free)
    p = params()
    state, seen = tx.init(p), []
    for _ in range(3):
        seen.append(mo.read_hyperparams(state)["aux_loss_weight"])  # as the step's loss reads it
        _, state = tx.update(p, state, p, **_violating(3.0))
    assert seen == pytest.approx([0.01, 0.02 * 2, 0.03 * 3.333333])


def test_a_schedule_is_read_at_the_step_that_it_is_for():
    values = jnp.array([1.0, 0.1, 0.01, 0.001])
    free = {"aux_loss_weight": lambda count: values[jnp.minimum(count, 3)]}
    tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau(), free_hyperparams=free)(0.1)
    p = params()
    state, seen = tx.init(p), []
    for _ in range(4):
        seen.append(float(optax.tree.get(state, "aux_loss_weight")))
        _, state = tx.update(p, state, p, value=1.0)
    assert seen == pytest.approx(values.tolist())


def test_a_strong_array_survives_donation():
    weight = jnp.float32(0.01)
    tx = _injected(free={"aux_loss_weight": weight})
    p = params()
    jax.jit(lambda s: tx.update(p, s, p, **row())[1], donate_argnums=0)(tx.init(p))
    assert not weight.is_deleted()


def test_a_strategy_that_needs_one_that_is_not_there():
    with pytest.raises(ValueError, match=r"'aux_loss_weight'.*free_hyperparams="):
        mo.inject_meta_hyperparams(optax.adamw, mo.adapt_aux_loss())(0.1)


def test_reset_leaves_the_base():
    tx = _injected()
    p = params()
    state = tx.init(p)
    for _ in range(3):
        _, state = tx.update(p, state, p, **_violating(3.0))
    state = mo.reset(state, tx, p)
    _, state = tx.update(p, state, p, **_violating(0.7))
    assert mo.read_hyperparams(state)["aux_loss_weight"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ({"learning_rate": 0.1}, "'learning_rate', which is an argument of the factory"),
        ({"value": 1.0}, "'value', which is the name of a metric"),
        ({"step": 1.0}, "'step', which is the name of a metric"),
        ({"aux": None}, "needs a number or a schedule as 'aux', got None"),
        ({"aux": True}, "needs a number or a schedule as 'aux', got True"),
        ({"aux": "high"}, "needs a number or a schedule as 'aux', got 'high'"),
    ],
)
def test_what_is_no_free_hyperparameter(free, message):
    with pytest.raises(ValueError, match=message):
        mo.inject_meta_hyperparams(optax.adamw, mo.plateau(), free_hyperparams=free)


@pytest.mark.parametrize("value", [np.ones(3), np.nan, -0.1, np.inf])
def test_a_base_out_of_range(value):
    with pytest.raises(ValueError, match="aux_loss_weight"):
        _injected(free={"aux_loss_weight": value}).init(params())
