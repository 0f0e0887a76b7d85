"""Updates inside `jax.shard_map`: a metric of each device's own must not become a decision."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import custom

import meta_optax as mo

P = jax.P
ROWS = np.linspace(0.0, 2.0, 16, dtype=np.float32)


def _plateau(**kwargs):
    strategy = mo.with_decisions(mo.plateau(patience=1, wd_increase_factor=1.0, **kwargs))
    return mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=0.1)


def _mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def _params():
    return {"w": jnp.ones(4)}


def _step(tx, measure, params, state, rows):
    grads = jax.tree.map(lambda w: w * jax.lax.pmean(rows.mean(), "data"), params)
    updates, state = tx.update(grads, state, params, **measure(rows))
    return optax.apply_updates(params, updates), state


def _shard(tx, measure, **options):
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P()), **options}
    return jax.jit(jax.shard_map(functools.partial(_step, tx, measure), mesh=_mesh(), **specs))


def _mean(rows):
    return {"value": jax.lax.pmean(rows.mean(), "data")}


def _local(rows):
    return {"value": rows.mean()}


@pytest.mark.parametrize("check_vma", [True, False])
def test_mean_over_the_axis_decides_as_on_one_device(check_vma):
    tx = _plateau()
    step = _shard(tx, _mean, check_vma=check_vma)
    params, state = _params(), tx.init(_params())
    alone, lone_state = _params(), tx.init(_params())
    for scale in (1.0, 1.0, 0.5, 0.7):
        params, state = step(params, state, scale * ROWS)
        grads = jax.tree.map(lambda w, s=scale: w * s, alone)
        updates, lone_state = tx.update(grads, lone_state, alone, value=jnp.float32(scale))
        alone = optax.apply_updates(alone, updates)
    chex.assert_trees_all_close((params, state), (alone, lone_state), rtol=1e-5)
    assert len(mo.read_decisions(state)) == 2


OWN = {
    "plateau": _plateau,
    "hold_spikes": lambda: mo.inject_meta_hyperparams(optax.sgd, mo.hold_spikes(mo.plateau()))(0.1),
    "custom": lambda: mo.inject_meta_hyperparams(optax.sgd, custom())(0.1),
    "scale_by_plateau": lambda: optax.chain(optax.sgd(0.1), mo.scale_by_plateau()),
    "skip_spikes": lambda: mo.skip_spikes(optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", OWN)
def test_metric_of_each_device_is_an_error_that_says_what_to_write(name):
    tx = OWN[name]()
    with pytest.raises(ValueError, match=r"'value'.*'data'.*jax\.lax\.pmean\(value, 'data'\)"):
        _shard(tx, _local)(_params(), tx.init(_params()), ROWS)


def test_load_of_each_device_is_an_error():
    tx = mo.balance_router_bias()
    with pytest.raises(ValueError, match=r"jax\.lax\.pmean\(expert_usage, 'data'\)"):
        _shard(tx, lambda rows: {"expert_usage": jnp.full(4, rows.mean())})(
            _params(), tx.init(_params()), ROWS
        )


def test_norm_of_each_devices_share_is_an_error_that_names_the_norm():
    """FSDP by hand: the norm of a shard is not the norm."""
    tx = mo.inject_meta_hyperparams(optax.sgd, mo.hold_spikes(mo.advanced_plateau()))(0.1)

    def step(params, state, rows):
        return _step(tx, _mean, params, state, rows)

    split = {"w": jnp.ones(8)}
    sharded = jax.shard_map(
        step, mesh=_mesh(), in_specs=(P("data"), P(), P("data")), out_specs=(P("data"), P())
    )
    with pytest.raises(ValueError, match=r"'grad_norm' that varies.*pass the norm over all"):
        jax.jit(sharded)(split, tx.init(split), ROWS)


@pytest.mark.parametrize("check_vma", [True, False])
def test_population_of_independent_runs_decides_run_by_run(check_vma):
    tx = _plateau()
    runs = {"w": jnp.ones([8, 4])}
    states = jax.vmap(tx.init)(runs)

    def step(params, state, rows):
        mine = jax.tree.map(lambda leaf: leaf[0], (params, state))
        updates, state = tx.update(mine[0], mine[1], mine[0], value=rows.mean())
        out = optax.apply_updates(mine[0], updates), state
        return jax.tree.map(lambda leaf: leaf[None], out)

    sharded = jax.jit(
        jax.shard_map(
            step, mesh=_mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
        )
    )
    fallen = np.where(np.arange(16) < 8, 0.5, 1.0).astype(np.float32)
    for rows in (ROWS + 1, (ROWS + 1) * fallen):
        runs, states = sharded(runs, states, rows)
    # The first four runs' loss halved; that of the others stayed, and cost them half their rate.
    np.testing.assert_allclose(states.hyperparams["learning_rate"], [0.1] * 4 + [0.05] * 4)


def test_state_made_inside_can_be_told_to_vary():
    tx = _plateau()

    def run(rows):
        params = _params()
        state = jax.lax.pcast(tx.init(params), "data", to="varying")
        _, state = tx.update(params, state, params, value=rows.mean())
        return state.meta_state.inner.best[None]

    best = jax.shard_map(run, mesh=_mesh(), in_specs=P("data"), out_specs=P("data"))(ROWS)
    np.testing.assert_allclose(best, ROWS.reshape(8, 2).mean(axis=1), rtol=1e-6)


def test_without_check_vma_nobody_can_tell():
    """The trap that docs/sharding.md warns of; JAX keeps no track, and each device goes its way."""
    tx = _plateau()
    _, state = _shard(tx, _local, check_vma=False)(_params(), tx.init(_params()), ROWS)
    best = [float(shard.data) for shard in state.meta_state.inner.best.addressable_shards]
    assert len(set(best)) == 8
