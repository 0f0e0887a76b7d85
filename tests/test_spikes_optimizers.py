"""One broken batch in the midst of a real training run, around each optimizer of Optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from test_readme import DISTANCE, SPEED

import meta_optax as mo

STEPS, BROKEN = 150, 50
# `sam` is not among them: its `update` makes a step of its own to where it wants a gradient, so
# a broken batch is one half of a step.
OPTIMIZERS = {
    "acprop": lambda: contrib.acprop(1e-2),
    "ademamix": lambda: contrib.ademamix(1e-2),
    "adopt": lambda: contrib.adopt(1e-2),
    "cocob": contrib.cocob,
    "dadapt_adamw": contrib.dadapt_adamw,
    "dog": lambda: contrib.dog(1.0),
    "dowg": lambda: contrib.dowg(1.0),
    "galore": lambda: contrib.galore(1e-2),
    "madgrad": lambda: contrib.madgrad(1e-2),
    "mechanize": lambda: contrib.mechanize(optax.adamw(1e-2)),
    "momo": lambda: contrib.momo(1e-1),
    "momo_adam": lambda: contrib.momo_adam(1e-2),
    "muon": lambda: contrib.muon(1e-2),
    "prodigy": contrib.prodigy,
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(1e-2),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(1e-1),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(1e-3),
    "sophia": lambda: contrib.sophia(1e-2),
}
CONTRIBUTED = tuple(OPTIMIZERS)
OPTIMIZERS |= {
    "adamw": lambda: optax.adamw(1e-2),
    "sgd with momentum": lambda: optax.sgd(1e-1, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "lamb": lambda: optax.lamb(1e-2),
}
# Optimizers whose own course has bursts of the norm, which are spikes: on the whole data the same
# gradient comes again until `max_consecutive` of them were dropped.
BURSTS = {"mechanize": 5}


def _loss(p):
    """Least squares of a parabola through the stopping distances of cars."""
    speed, distance = jnp.array(SPEED) / 25.0, jnp.array(DISTANCE) / 100.0
    return jnp.mean((p["w"][0] * speed**2 + p["w"][1] * speed + p["b"][0] - distance) ** 2)


def _train(tx, *, broken):
    """Params, state and loss before and after each step; one compilation."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(p, state, factor):
        loss, grads = jax.value_and_grad(_loss)(p)
        grads = jax.tree.map(lambda g: factor * g, grads)
        updates, state = tx.update(grads, state, p, value=loss, obj_fn=_loss)
        return optax.apply_updates(p, updates), state, loss

    p = {"w": jnp.full([2], 0.1, jnp.float32), "b": jnp.zeros([1], jnp.float32)}
    run = [(p, tx.init(p), None)]
    for i in range(STEPS):
        p, state, _ = run[-1]
        run.append(step(p, state, jnp.float32(broken if i == BROKEN else 1.0)))
    assert step._cache_size() == 1
    return run


def _is_finite(p):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(p))


@functools.cache
def _survives_alone(name):
    return _is_finite(_train(OPTIMIZERS[name](), broken=jnp.nan)[-1][0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_broken_gradient_is_dropped_and_the_run_goes_on(name):
    run = _train(mo.skip_spikes(OPTIMIZERS[name]()), broken=jnp.nan)
    (before, old, _), (after, new, _) = run[BROKEN : BROKEN + 2]
    chex.assert_trees_all_equal(after, before)
    chex.assert_trees_all_equal(new.inner_state, old.inner_state)
    assert int(new.skipped_count) == int(new.nonfinite_count) == 1
    end, state, loss = run[-1]
    assert _is_finite(end)
    assert int(state.nonfinite_count) == 1
    assert int(state.skipped_count) == 1 + BURSTS.get(name, 0)
    assert float(loss) < float(run[BROKEN][2]) < float(run[1][2])


def test_without_it_one_broken_gradient_is_the_end():
    """Of those that Optax's contributors wrote, at least seven; tried: all of them."""
    lost = [name for name in CONTRIBUTED if not _survives_alone(name)]
    assert len(lost) >= 7, lost
