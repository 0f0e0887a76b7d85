"""What happens after 2**31 - 1 updates: counts stay there, and nothing turns over."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import BASE, FREE, STRATEGIES, TRANSFORMATIONS, WITHOUT_HYPERPARAMS, params, row

import meta_optax as mo
from meta_optax._counts import add_counts, keep_room
from meta_optax._trend import advance_trend, empty_trend

MOST = 2**31 - 1
# What is no count: versions, places of rules and of actions, how many experts there are, places
# within a period, and the signed run of outliers, which is never above five.
NO_COUNTS = ("layout_version", "rule", "num_experts", "mini_step", "outliers", "action")


def _is_count(path, leaf):
    name = str(path[-1]).strip(".[]'") if path else ""
    return leaf.dtype == jnp.int32 and not any(word in name for word in NO_COUNTS)


def _saturate(state):
    """The state with every count at the largest number that it can be."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, MOST) if _is_count(path, leaf) else leaf, state
    )


def _assert_no_count_is_negative(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert any(_is_count(path, leaf) for path, leaf in leaves)
    for path, leaf in leaves:
        assert not _is_count(path, leaf) or (np.asarray(leaf) >= 0).all(), path
    while hasattr(state, "inner_state"):
        state = state.inner_state
    assert int(getattr(state, "nonfinite_count", 0)) >= 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_counts_of_a_strategy_stay(name):
    strategy = STRATEGIES[name].eager()
    base = {k: jnp.float32(v) for k, v in (BASE | FREE).items()}

    @jax.jit
    def step(state, metrics):
        prefixed = {f"base_{k}": v for k, v in base.items()}
        seen = {**metrics, **strategy.apply(state, base), **prefixed, "step": jnp.int32(MOST)}
        state = strategy.observe(state, seen)
        return state, strategy.apply(state, base)

    state = _saturate(strategy.init())
    for i, value in enumerate([1.0, 2.0, np.nan, 0.5, 3.0, 4.0]):
        state, used = step(state, row(i, value=value))
        _assert_no_count_is_negative(state)
        assert all(np.isfinite(v) and v >= 0 for v in used.values())
    assert int(state.nonfinite_count) == MOST


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_counts_of_a_transformation_stay(name):
    tx = optax.with_extra_args_support(TRANSFORMATIONS[name]())
    p = params()

    @jax.jit
    def step(state, metrics):
        return tx.update(p, state, p, **metrics)

    state = _saturate(tx.init(p))
    for i, value in enumerate([1.0, 2.0, np.nan, 0.5, 3.0, 4.0]):
        updates, state = step(state, row(i, value=value))
        _assert_no_count_is_negative(state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        if name not in WITHOUT_HYPERPARAMS:
            assert all(np.isfinite(v) and v >= 0 for v in mo.read_hyperparams(state).values())


@pytest.mark.parametrize("capacity", [1, 3, 32])
def test_the_ring_of_decisions_goes_on_turning(capacity):
    """Before, at and after the largest count: the last decisions, oldest first."""
    meta = mo.with_decisions(mo.plateau(patience=1), capacity)
    base = {"learning_rate": jnp.float32(1.0), "weight_decay": jnp.float32(0.1)}
    prefixed = {f"base_{k}": v for k, v in base.items()}
    observe = jax.jit(meta.observe)

    def run(count):
        state = meta.init()
        state = state._replace(log=state.log._replace(count=jnp.int32(count)))
        for i in range(70):
            metrics = {"value": jnp.float32(1.0 + i), "grad_norm": jnp.float32(20.0)}
            state = observe(state, {**metrics, **base, **prefixed, "step": jnp.int32(i)})
        return [tuple(d) for d in mo.read_decisions(state)][-capacity:], state.log.count

    expected, count = run(0)
    assert len(expected) == capacity
    assert int(count) > capacity
    for start in (MOST - 500, MOST - 7, MOST):
        found, count = run(start)
        assert found == expected
        assert int(count) > MOST - 500


def test_blocks_of_a_trend_go_on_being_whole():
    """The means are those of a count that is the same modulo the largest block."""
    window, rows = 512, 40
    start = empty_trend(window)
    period = 2 ** (len(start.partial) - 1)
    assert period > 1
    plain, late = start._replace(count=jnp.int32(MOST % period)), start
    late = late._replace(count=jnp.int32(MOST))
    for i in range(rows):
        plain, late = (advance_trend(s, jnp.float32(np.sin(i))) for s in (plain, late))
        assert int(late.count) > MOST - 2 * period
        np.testing.assert_array_equal(plain.means, late.means)
        np.testing.assert_array_equal(plain.partial, late.partial)


def test_sums_and_room():
    ones = [jnp.int32(1)] * 3
    assert int(add_counts(*ones)) == 3
    assert int(add_counts(jnp.int32(MOST), *ones)) == MOST
    assert int(add_counts(jnp.int32(MOST - 1), *ones)) == MOST
    for period in (1, 3, 8):
        for room in (1, 2, 9):
            count = jnp.int32(MOST)
            kept = int(keep_room(count, room, period))
            assert kept + room <= MOST
            assert (MOST - kept) % period == 0
            assert int(keep_room(jnp.int32(MOST - room), room, period)) == MOST - room
