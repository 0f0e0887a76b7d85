"""Accumulation over micro-batches: the inner transformation sees the whole batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from routing import routing
from table import SHAPES

import meta_optax as mo

K = 4
# A quadratic: examples whose mean is far from the last one's, of several updates.
TARGETS = jnp.asarray(np.random.default_rng(0).normal(3.0, 4.0, [12, K, 3]), jnp.float32)


def _loss(w, target):
    return jnp.mean(jnp.square(w - target))


def _inner():
    strategy = mo.with_decisions(mo.plateau(patience=1, wd_increase_factor=1.0))
    return mo.inject_meta_hyperparams(optax.adam, strategy)(learning_rate=0.5)


def _by_micro_batches(tx):
    """Twelve updates of four micro-batches each; None for the whole batch at once."""

    def step(carry, target):
        w, state = carry
        loss, grads = jax.value_and_grad(_loss)(w, target)
        updates, state = tx.update(grads, state, w, value=loss)
        return (optax.apply_updates(w, updates), state), None

    targets = TARGETS if tx is _WHOLE else TARGETS.reshape(12 * K, 3)
    start = (jnp.zeros(3), tx.init(jnp.zeros(3)))
    return jax.jit(lambda: jax.lax.scan(step, start, targets)[0])()


_WHOLE = _inner()


def _decisions(state):
    return [(d.step, d.hyperparam, d.reason, d.new, d.value) for d in mo.read_decisions(state)]


def test_four_micro_batches_are_one_batch_and_optaxs_are_not():
    w, state = _by_micro_batches(_WHOLE)
    expected = _decisions(state)
    w_ours, state_ours = _by_micro_batches(mo.multi_steps(_inner(), K))
    np.testing.assert_allclose(w_ours, w, rtol=1e-5)
    found = _decisions(state_ours)
    assert [d[:4] for d in found] == [d[:4] for d in expected]
    assert [d[4] for d in found] == pytest.approx([d[4] for d in expected], rel=1e-5)
    assert expected, "the case must have decisions"
    # Optax's own shows the last micro-batch's loss: other decisions, other params.
    peer = optax.MultiSteps(_inner(), K)
    w_peer, state_peer = _by_micro_batches(peer)
    assert [d[:2] for d in _decisions(state_peer)] != [d[:2] for d in expected]
    assert not np.allclose(w_peer, w, rtol=1e-3)
    # And in a chain it shows none at all.
    for inside in (peer, peer.gradient_transformation()):
        with pytest.raises(TypeError, match="needs the metric 'value'"):
            _by_micro_batches(optax.chain(inside))
    w_ours, _ = _by_micro_batches(optax.chain(mo.multi_steps(_inner(), K)))
    np.testing.assert_allclose(w_ours, w, rtol=1e-5)


def _run(tx, rows, grads=None):
    """The states and updates of a few calls on constant params."""
    p = jnp.ones(2)
    state, out = tx.init(p), []
    for i, row in enumerate(rows):
        g = p if grads is None else grads[i]
        updates, state = tx.update(g, state, p, **row)
        out.append(updates)
    return state, out


def _seen(metrics, rows, k=2):
    """What the inner transformation was shown at each of its updates."""

    def of_metrics(extra):
        return jax.tree.map(jnp.asarray, {name: extra[name] for name in metrics})

    inner = optax.GradientTransformationExtraArgs(
        lambda p: jax.tree.map(lambda x: (0 * x).astype(x.dtype), of_metrics(rows[0])),
        lambda updates, state, params=None, **extra: (updates, of_metrics(extra)),
    )
    tx = mo.multi_steps(inner, k, metrics=metrics)
    state, seen = tx.init(jnp.ones(2)), []
    for row in rows:
        _, state = tx.update(jnp.ones(2), state, **row)
        seen.append(state.multi_steps_state.inner_opt_state)
    return seen[k - 1 :: k]


def test_the_mean_is_of_each_named_metric():
    usage = [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]
    rows = [{"value": v, "expert_usage": u} for v, u in zip((1.0, 4.0), usage, strict=True)]
    (seen,) = _seen({"value": (), "expert_usage": (2,)}, rows)
    np.testing.assert_allclose(seen["value"], 2.5)
    np.testing.assert_allclose(seen["expert_usage"], [0.5, 0.5])
    assert seen["value"].dtype == jnp.float32


def test_shapes_may_be_anything_that_has_one():
    rows = [{"value": jnp.float32(1.0), "expert_usage": jnp.array([1.0, 0.0])}] * 2
    given = [
        {"value": (), "expert_usage": [2]},
        jax.eval_shape(lambda: rows[0]),
        rows[0],
        {"value": (rows[0]["value"], jnp.array(True)), "expert_usage": np.ones(2)},
    ]
    for metrics in given:
        (seen,) = _seen(metrics, rows)
        np.testing.assert_allclose(seen["expert_usage"], [1.0, 0.0])


def test_pairs_are_averaged_over_those_that_arrived():
    nan = jnp.nan
    pairs = [(2.0, True), (nan, False), (4.0, True), (nan, False), (nan, False), (nan, False)]
    first, second = _seen(("value",), [{"value": pair} for pair in pairs], k=3)
    (mean, flag), (_, no_flag) = first["value"], second["value"]
    assert (float(mean), bool(flag), bool(no_flag)) == (3.0, True, False)


def test_a_pair_without_any_arrival_holds_the_strategy_and_counts_nothing():
    tx = mo.multi_steps(_inner(), 2)
    state, _ = _run(tx, [{"value": v} for v in [(1.0, True), (1.0, True)] + [(9.0, False)] * 2])
    inner = state.multi_steps_state.inner_opt_state
    assert int(inner.nonfinite_count) == 0
    assert float(inner.meta_state.inner.best) == 1.0
    assert int(inner.count) == 2
    assert mo.read_decisions(state) == []


def test_a_nonfinite_micro_batch_is_held_counted_and_forgotten():
    tx = mo.multi_steps(_inner(), 2)
    state, _ = _run(tx, [{"value": v} for v in (jnp.nan, 1.0, 3.0, 1.0)])
    inner = state.multi_steps_state.inner_opt_state
    assert int(inner.nonfinite_count) == 1
    assert float(inner.meta_state.inner.best) == 2.0


def test_nan_gradients_end_with_their_update():
    """`optax.MultiSteps` multiplies what it has by 0, and NaN stays NaN for ever."""
    p = jnp.ones(2)
    grads = [jnp.nan * p, p, p, p]
    rows = [{"value": 1.0}] * 4
    state, updates = _run(mo.multi_steps(mo.skip_spikes(optax.sgd(1.0)), 2), rows, grads)
    np.testing.assert_array_equal(np.stack(updates), [[0, 0], [0, 0], [0, 0], [-1, -1]])
    assert int(state.multi_steps_state.inner_opt_state.skipped_count) == 1
    peer = optax.MultiSteps(mo.skip_spikes(optax.sgd(1.0)), 2)
    state, updates = _run(peer, rows, grads)
    assert np.isnan(state.acc_grads).all()
    np.testing.assert_array_equal(updates[-1], [0, 0])
    # Without `skip_spikes`, no update in between is NaN either.
    _, updates = _run(mo.multi_steps(optax.sgd(1.0), 2), rows, grads)
    assert np.isnan(updates[1]).all()
    np.testing.assert_array_equal(np.stack([updates[0], updates[2], updates[3]])[:, 0], [0, 0, -1])


def test_skipped_micro_batches_are_not_averaged_in():
    p = jnp.ones(2)
    tx = mo.multi_steps(_inner(), 2, should_skip_update_fn=optax.skip_not_finite)
    grads = [p, jnp.nan * p, p, jnp.inf * p]
    state, updates = _run(tx, [{"value": v} for v in (1.0, 50.0, 2.0, 50.0)], grads)
    inner = state.multi_steps_state.inner_opt_state
    assert float(inner.meta_state.inner.best) == 1.5
    assert [bool((u != 0).any()) for u in updates] == [False, False, True, False]
    chex.assert_trees_all_equal(state.sums, {"value": jnp.zeros([])})
    assert bool(state.multi_steps_state.skip_state["should_skip"])


def test_the_period_may_be_a_schedule():
    tx = mo.multi_steps(_inner(), lambda step: jnp.where(step == 0, 1, 3))
    values = (4.0, 1.0, 2.0, 6.0, 1.0)
    state, updates = _run(tx, [{"value": v} for v in values])
    assert [bool((u != 0).any()) for u in updates] == [True, False, False, True, False]
    inner = state.multi_steps_state.inner_opt_state
    assert float(inner.meta_state.inner.best) == 3.0
    assert float(state.sums["value"]) == 1.0


def test_sums_of_gradients_leave_metrics_means():
    tx = mo.multi_steps(mo.skip_spikes(optax.sgd(1.0)), 2, use_grad_mean=False)
    _, updates = _run(tx, [{"value": 1.0}] * 2)
    np.testing.assert_array_equal(updates[1], [-2.0, -2.0])


@pytest.mark.parametrize("metrics", [("value",), {"value": (), "grad_norm": ()}, ()])
def test_a_known_metric_that_is_not_named_is_an_error(metrics):
    tx = mo.multi_steps(optax.sgd(1.0), 2, metrics=metrics)
    p = jnp.ones(2)
    with pytest.raises(ValueError, match=r"'expert_usage'.*metrics=\{.*'expert_usage': \(3,\)\}"):
        tx.update(p, tx.init(p), p, expert_usage=jnp.ones(3))
    tx.update(p, tx.init(p), p, unheard_of=jnp.ones(3))


def test_all_metrics_that_the_library_gives_are_known():
    tx = mo.multi_steps(optax.sgd(1.0), 2, metrics=())
    p = jnp.ones(2)
    probs, index, mask, _ = routing(0, 2, 8, 4, 2)
    given = {**mo.router_metrics(probs, index, mask=mask), **dict.fromkeys(SHAPES, 1.0)}
    # That of the mean is measured instead, below.
    del given["grad_norm"]
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"'{name}'"):
            tx.update(p, tx.init(p), p, **{name: value})


def test_a_metric_of_another_shape_is_an_error():
    tx = mo.multi_steps(_inner(), 2)
    p = jnp.ones(2)
    with pytest.raises(ValueError, match=r"'value' of shape \(\), got shape \(3,\)"):
        tx.update(p, tx.init(p), p, value=jnp.ones(3))
    with pytest.raises(TypeError, match="pair whose flag"):
        tx.update(p, tx.init(p), p, value=(1.0, 1.0))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "every_k_schedule must be an integer >= 1", {"every_k_schedule": 0}),
        (ValueError, "every_k_schedule must be an integer >= 1", {"every_k_schedule": 1.5}),
        (TypeError, "names as metrics", {"metrics": "value"}),
        (TypeError, "names as metrics", {"metrics": 3}),
        (TypeError, "names as metrics", {"metrics": [3]}),
        (ValueError, "shape of the metric 'value'", {"metrics": {"value": 3}}),
        (ValueError, "shape of the metric 'value'", {"metrics": {"value": None}}),
        (ValueError, "shape of 'value' must be an integer", {"metrics": {"value": (-1,)}}),
        (ValueError, "use_grad_mean must be True or False", {"use_grad_mean": 1}),
        (TypeError, "needs an optax.GradientTransformation", {"tx": optax.adam}),
    ],
)
def test_arguments_are_checked(error, match, arguments):
    with pytest.raises(error, match=match):
        mo.multi_steps(**{"tx": optax.sgd(1.0), "every_k_schedule": 2, **arguments})


def test_a_strategys_missing_metric_is_the_strategys_error():
    tx = mo.multi_steps(_inner(), 2)
    p = jnp.ones(2)
    with pytest.raises(TypeError, match="plateau needs the metric 'value'"):
        tx.update(p, tx.init(p), p)


def test_reading_and_resetting_see_through_it():
    tx = mo.multi_steps(_inner(), 2)
    state, _ = _run(tx, [{"value": v} for v in (1.0, 1.0, 2.0, 2.0, 5.0)])
    assert mo.read_hyperparams(state)["learning_rate"] == 0.25
    assert float(state.hyperparams["learning_rate"]) == 0.25
    assert float(optax.tree.get(state, "learning_rate")) == 0.25
    assert len(mo.read_decisions(state)) == 1
    fresh = mo.reset(state, tx, jnp.ones(2))
    assert float(fresh.sums["value"]) == 5.0
    assert not np.isfinite(fresh.multi_steps_state.inner_opt_state.meta_state.inner.best)
    chex.assert_trees_all_equal(
        fresh.multi_steps_state.acc_grads, state.multi_steps_state.acc_grads
    )
    old = state._replace(layout_version=jnp.int32(1))
    for read in (mo.read_hyperparams, lambda s: mo.reset(s, tx, jnp.ones(2))):
        with pytest.raises(ValueError, match="layout version 1"):
            read(old)
    assert not hasattr(mo.multi_steps(optax.sgd(1.0), 2).init(jnp.ones(2)), "hyperparams")


def test_a_norm_from_outside_is_not_the_means():
    """`skip_spikes` around it passes the norm of each micro-batch; opposite ones have mean zero."""
    inner = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.5)
    tx = mo.skip_spikes(mo.multi_steps(inner, 2))
    p = jnp.ones(2)
    seen = {}
    for name, outer in {"around": tx, "alone": mo.multi_steps(inner, 2)}.items():
        state = outer.init(p)
        for sign in (20.0, -20.0, 20.0, -20.0):
            _, state = outer.update(sign * p, state, p, value=1.0)
        seen[name] = mo.read_hyperparams(state)
    assert seen["around"] == seen["alone"]
    # Weight decay would have grown, had the norm of 28 been shown.
    named = mo.multi_steps(inner, 2, metrics=("value", "grad_norm"))
    state = named.init(p)
    for _ in range(2):
        _, state = named.update(p, state, p, value=1.0, grad_norm=28.0)


def test_an_eager_init_lies_on_the_mesh_of_the_params():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    p = jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, jax.P("data")))
    inner = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())(learning_rate=0.5)
    state = mo.multi_steps(inner, 2).init(p)
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf.sharding, jax.NamedSharding)
