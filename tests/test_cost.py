"""What the control costs, by XLA's own count of the bytes that a compiled step moves."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

import meta_optax as mo

SIZE = 16 * 2**20  # parameters
STEP_BYTES = 10 * 4 * SIZE  # what AdamW reads and writes: ten passes over float32
PASS = 4 * SIZE

NO_NORMS = {
    "plateau": mo.plateau(wd_increase_factor=1.0),
    "advanced_plateau": mo.advanced_plateau(
        grad_norm_threshold=math.inf, weight_norm_threshold=math.inf
    ),
    "chain": mo.chain(mo.plateau(wd_increase_factor=1.0), mo.plateau(wd_increase_factor=1.0)),
}


def _shapes(leaves=16):
    leaf = jax.ShapeDtypeStruct((SIZE // leaves // 1024, 1024), jnp.float32)
    return {f"w{i}": leaf for i in range(leaves)}


def _bytes(tx, *, leaves=16, **metrics):
    tx = optax.with_extra_args_support(tx)
    p = _shapes(leaves)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(p, state, grads, metrics):
        updates, state = tx.update(grads, state, p, **metrics)
        return optax.apply_updates(p, updates), state

    compiled = step.lower(p, jax.eval_shape(tx.init, p), p, metrics).compile()
    return compiled.cost_analysis()["bytes accessed"]


@functools.cache
def _plain(leaves=16):
    return _bytes(optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3), leaves=leaves)


@pytest.mark.parametrize("name", NO_NORMS)
@pytest.mark.parametrize("leaves", [1, 16])
def test_without_norms_no_parameter_is_read_once_more(name, leaves):
    """The decision's own scalars are all that is added: less than a kilobyte in 671 million."""
    tx = mo.inject_meta_hyperparams(optax.adamw, NO_NORMS[name])(learning_rate=1e-3)
    added = _bytes(tx, leaves=leaves, value=jnp.float32(1.0)) - _plain(leaves)
    assert 0 <= added < 1024


def test_norms_that_are_passed_are_not_measured():
    tx = mo.inject_meta_hyperparams(optax.adamw, mo.advanced_plateau())(learning_rate=1e-3)
    one = jnp.float32(1.0)
    assert _bytes(tx, value=one, grad_norm=one, param_norm=one) - _plain() < 1024


def test_both_norms_cost_one_read_each():
    tx = mo.inject_meta_hyperparams(optax.adamw, mo.advanced_plateau())(learning_rate=1e-3)
    total = _bytes(tx, value=jnp.float32(1.0))
    assert total / _plain() <= 1.21
    assert total - _plain() < 2 * PASS + 4096


def test_two_strategies_share_the_norms():
    twice = mo.chain(mo.advanced_plateau(), mo.plateau(), mo.advanced_plateau())
    tx = mo.inject_meta_hyperparams(optax.adamw, twice)(learning_rate=1e-3)
    assert _bytes(tx, value=jnp.float32(1.0)) - _plain() < 2 * PASS + 4096


def test_no_norm_is_measured_where_there_is_no_weight_decay():
    value = jnp.float32(1.0)
    plain = _bytes(optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3))
    ours = mo.inject_meta_hyperparams(optax.sgd, mo.advanced_plateau())(learning_rate=1e-3)
    assert _bytes(ours, value=value) - plain < 1024


def test_cheaper_than_the_clip_of_optax():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    tx = mo.inject_meta_hyperparams(optax.adamw, mo.advanced_plateau())(learning_rate=1e-3)
    assert _bytes(tx, value=jnp.float32(1.0)) < _bytes(clipped)


def test_state_is_small():
    """Decision state in bytes, the log of decisions apart."""
    for strategy, most in (
        (mo.plateau(), 64),
        (mo.advanced_plateau(), 128),
        (mo.expert_gate(), 64),
        (mo.smart_expert_gate(), 64),
    ):
        leaves = jax.tree.leaves(jax.eval_shape(strategy.init))
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) <= most


def _under_cond(inner):
    """The optimizer under a condition that costs nothing: what any skipping costs at the least."""

    def update(updates, state, params=None, *, value, **extra_args):
        return jax.lax.cond(
            jnp.isfinite(value),
            lambda: inner.update(updates, state, params, **extra_args),
            lambda: (optax.tree.zeros_like(updates), state),
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


@pytest.mark.parametrize("passed", [{}, {"grad_norm": jnp.float32(1.0)}])
@pytest.mark.parametrize("leaves", [1, 16])
def test_skipping_spikes_costs_one_read_of_the_gradients(leaves, passed):
    """XLA adds up both branches of a condition, and updates that come out of one are written and
    read: three passes, the zeros among them, that any condition around an optimizer costs."""
    metrics = {"value": jnp.float32(1.0), **passed}
    tx = optax.adamw(1e-3)
    least = _bytes(_under_cond(tx), leaves=leaves, **metrics)
    added = _bytes(mo.skip_spikes(tx), leaves=leaves, **metrics) - least
    assert least - _bytes(tx, leaves=leaves) < 3.01 * PASS
    assert PASS <= added < 1.001 * PASS


def test_the_norm_is_measured_once_for_the_strategy_inside_too():
    tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(learning_rate=1e-3)
    value = jnp.float32(1.0)
    plain = _bytes(mo.skip_spikes(optax.inject_hyperparams(optax.adamw)(1e-3)), value=value)
    assert _bytes(mo.skip_spikes(tx), value=value) - plain < 1024
