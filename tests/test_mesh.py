"""Eight devices with axes for data, FSDP and experts: as on one device, and always in place."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from table import LAYERS, TRANSFORMATIONS, plain
from table import SHAPES as METRICS

import meta_optax as mo

P = jax.P
AXES = ("data", "fsdp", "expert")
ROWS = P(("data", "fsdp"))
# A router of one row fits both the layers of the table and a bias on four experts.
SPECS = {"dense": P("fsdp", None), "experts": P("expert", "fsdp"), "router": P()}
SHAPES = {"dense": (8, 4), "experts": (4, 8), "router": (4,)}
LOSSES = [1.0, 1.0, 3.0, np.nan, 0.5, 0.6, 0.7]
DECIDED = np.array([[0.97, 0.01, 0.01, 0.01], [0.6, 0.2, 0.1, 0.1]], np.float32)
EVEN = (0.25 + 0.03 * (np.eye(4) - 0.25)).astype(np.float32)

each_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)
each_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


_compiles = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: _compiles.append(event)
)


def _count_compiles():
    return _compiles.count("/jax/core/compile/backend_compile_duration")


class _Step:
    """A jitted step that counts what its calls compile."""

    def __init__(self, step):
        self.step = jax.jit(step)
        self.compiles = 0

    def __call__(self, *args):
        before = _count_compiles()
        result = jax.block_until_ready(self.step(*args))
        self.compiles += _count_compiles() - before
        return result


def _mesh(kind):
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(kind,) * 3)


def _params():
    return {k: jnp.linspace(0.5, 1.5, np.prod(v)).reshape(v) for k, v in SHAPES.items()}


def _batch(step):
    """Sixteen rows of losses that scatter, and what a router made of them."""
    probs = np.tile(DECIDED, (8, 1)) if step % 2 else np.tile(EVEN, (4, 1))
    loss = LOSSES[step] + np.linspace(-0.5, 0.5, 16)
    return {"loss": loss.astype(np.float32), "probs": np.stack([probs] * LAYERS)}


def _make_step(tx, usage_spec=None):
    """A step that measures everything itself; the load may leave the model split over experts."""

    def step(params, state, batch):
        loss = batch["loss"].mean()
        grads = jax.tree.map(lambda leaf: batch["probs"].max(axis=-1).mean() * leaf, params)
        metrics = mo.router_metrics(batch["probs"])
        if usage_spec is not None:
            for name in ("expert_usage", "expert_usage_per_layer"):
                spec = P(*[None] * (metrics[name].ndim - 1), usage_spec)
                metrics[name] = jax.sharding.reshard(metrics[name], spec)
        # `multi_steps` refuses what it is not told to average, and is told of those.
        needed = {name: value for name, value in metrics.items() if name in METRICS}
        needed["is_validation"] = jnp.array(True)  # For the row of `every` by a signal.
        updates, state = tx.update(grads, state, params, value=loss, **needed)
        return optax.apply_updates(params, updates), state

    return step


def _transformation(name):
    return optax.with_extra_args_support(TRANSFORMATIONS[name]())


def _state_shardings(tx, mesh):
    """Moments lie as their params do, and all else is whole on every device."""
    return optax.tree.map_params(
        tx,
        lambda leaf, spec: leaf if _is_masked(leaf) else NamedSharding(mesh, spec),
        jax.eval_shape(tx.init, _params()),
        SPECS,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
        is_leaf=_is_masked,
    )


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)


def _put(tree, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def _put_batch(batch, mesh):
    return _put(batch, mesh, {"loss": ROWS, "probs": P(None, *ROWS)})


@functools.cache
def _on_one_device(name):
    tx = _transformation(name)
    params = _params()
    state = tx.init(params)
    step = jax.jit(_make_step(tx))
    for i in range(len(LOSSES)):
        params, state = step(params, state, _batch(i))
    return params, state


def _assert_in_place(state, shardings):
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True)
    for (path, leaf), sharding in pairs:
        assert leaf.committed, path
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (path, leaf.sharding)


@each_kind
@each_transformation
def test_same_as_on_one_device_in_one_compile(name, kind):
    tx, mesh = _transformation(name), _mesh(kind)
    shardings = _state_shardings(tx, mesh)
    with jax.set_mesh(mesh):
        params = _put(_params(), mesh, SPECS)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = _Step(_make_step(tx, "expert" if kind is AxisType.Explicit else None))
        for i in range(len(LOSSES)):
            params, state = step(params, state, _put_batch(_batch(i), mesh))
            _assert_in_place(state, shardings)
    assert step.compiles == 1
    expected_params, expected = _on_one_device(name)
    chex.assert_trees_all_close(params, expected_params, rtol=1e-5)
    chex.assert_trees_all_close(plain(state), plain(expected), rtol=1e-5, atol=1e-8)


WAYS = {
    "eagerly": (AxisType.Auto, False, False),
    "eagerly, under set_mesh": (AxisType.Auto, True, False),
    "eagerly, explicit": (AxisType.Explicit, True, False),
    "jitted, explicit": (AxisType.Explicit, True, True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["inject[with_decisions]", "inject[hold_spikes]", "skip_spikes", "skip_spikes[inject]"]
)
def test_state_of_any_init_is_in_place_at_once(name, way):
    """A scalar left on the first device would move at the first step: a second compile."""
    kind, is_set, is_jitted = WAYS[way]
    tx, mesh = _transformation(name), _mesh(kind)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        params = _put(_params(), mesh, SPECS)
        state = (jax.jit(tx.init) if is_jitted else tx.init)(params)
        step = _Step(_make_step(tx))
        counted = name.startswith("inject") or is_set or is_jitted
        for i in range(3):
            params, state = step(params, state, _put_batch(_batch(i), mesh))
            _assert_in_place(state, _state_shardings(tx, mesh))
    assert not counted or step.compiles == 1


@pytest.mark.parametrize("name", ["scale_by_plateau", "balance_router_bias", "skip_spikes"])
def test_own_state_of_an_eager_init_lies_on_the_mesh(name):
    """Of the neighbours in a chain, Adam's count among them, Optax takes care or nobody."""
    mesh = _mesh(AxisType.Auto)
    state = _transformation(name).init(_put(_params(), mesh, SPECS))
    (own,) = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "layout_version"))
        if hasattr(node, "layout_version")
    ]
    for leaf in jax.tree.leaves(own):
        assert leaf.committed
        assert leaf.sharding.mesh == mesh


def test_automatic_axes_and_a_jitted_init_move_no_decision_state():
    """XLA puts moments that are zeros where it likes: `out_shardings` is there for them."""
    tx, mesh = _transformation("inject[with_decisions]"), _mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        params = _put(_params(), mesh, SPECS)
        state = jax.jit(tx.init)(params)
        _, new = jax.jit(_make_step(tx))(params, state, _put_batch(_batch(0), mesh))
    for old_leaf, leaf in zip(
        jax.tree.leaves(state.meta_state), jax.tree.leaves(new.meta_state), strict=True
    ):
        assert leaf.sharding.is_fully_replicated
        assert old_leaf.sharding.is_fully_replicated


@each_kind
def test_decisions_and_a_reset(kind):
    tx, mesh = _transformation("inject[with_decisions]"), _mesh(kind)
    with jax.set_mesh(mesh):
        params = _put(_params(), mesh, SPECS)
        state = tx.init(params)
        step = _Step(_make_step(tx))
        for i in range(len(LOSSES)):
            params, state = step(params, state, _put_batch(_batch(i), mesh))
        decisions = mo.read_decisions(state)
        state = mo.reset(state, tx, params)
        _assert_in_place(state, _state_shardings(tx, mesh))
        step(params, state, _put_batch(_batch(0), mesh))
        assert step.compiles == 1
    expected = mo.read_decisions(_on_one_device("inject[with_decisions]")[1])
    assert len(expected) >= 3
    keys = [(d.step, d.hyperparam, d.reason) for d in decisions]
    assert keys == [(d.step, d.hyperparam, d.reason) for d in expected]
    np.testing.assert_allclose([d[2:4] for d in decisions], [d[2:4] for d in expected], rtol=1e-5)


def test_explicit_scan_carries_the_state():
    """Types may not change from one step to the next, whatever the type of a metric is."""
    tx, mesh = _transformation("inject[with_decisions]"), _mesh(AxisType.Explicit)
    batches = jax.tree.map(lambda *rows: np.stack(rows), *map(_batch, range(len(LOSSES))))
    with jax.set_mesh(mesh):
        params = _put(_params(), mesh, SPECS)
        batches = _put(batches, mesh, {"loss": P(None, *ROWS), "probs": P(None, None, *ROWS)})
        step = _make_step(tx, "expert")

        @jax.jit
        def run(params, state):
            return jax.lax.scan(lambda c, batch: (step(*c, batch), None), (params, state), batches)

        (_, state), _ = run(params, tx.init(params))
    chex.assert_trees_all_close(
        state, _on_one_device("inject[with_decisions]")[1], rtol=1e-5, atol=1e-8
    )


def _remember_usage():
    """A strategy of a user's own whose state has the shape of a metric."""
    return mo.MetaOptimizer(
        name="remember",
        init=lambda: jnp.zeros([4], jnp.float32),
        observe=lambda state, metrics: metrics["expert_usage"],
        apply=lambda state, hyperparams: {
            **hyperparams,
            "learning_rate": hyperparams["learning_rate"] * (1.0 - state.max()),
        },
        metrics=("expert_usage",),
    )


def test_split_metric_leaves_a_users_own_state_whole():
    tx = mo.inject_meta_hyperparams(optax.sgd, _remember_usage())(learning_rate=0.1)
    mesh = _mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = _put(_params(), mesh, SPECS)
        state = tx.init(params)
        step = _Step(_make_step(tx, "expert"))
        for i in range(2):
            params, state = step(params, state, _put_batch(_batch(i), mesh))
    assert step.compiles == 1
    assert jax.typeof(state.meta_state.inner).sharding.spec == P(None)
    np.testing.assert_allclose(state.meta_state.inner, [1.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("is_bias_split", [True, False])
def test_balance_update_has_the_sharding_of_its_bias(is_bias_split):
    tx, mesh = mo.balance_router_bias(), _mesh(AxisType.Explicit)
    spec, other = (P("expert"), P()) if is_bias_split else (P(), P("expert"))
    with jax.set_mesh(mesh):
        bias = jax.device_put(jnp.zeros(4), NamedSharding(mesh, spec))
        usage = jax.device_put(jnp.array([0.7, 0.1, 0.1, 0.1]), NamedSharding(mesh, other))
        update, _ = jax.jit(lambda b, u: tx.update(b, tx.init(b), expert_usage=u))(bias, usage)
    assert update.sharding.is_equivalent_to(bias.sharding, 1)
    np.testing.assert_allclose(1e3 * update, [-1.5, 0.5, 0.5, 0.5], rtol=1e-5)


def test_split_layers_are_judged_and_logged():
    """A pipeline keeps each layer's load where the layer is."""
    guard = mo.guard_collapse(per_layer=True, num_layers=2, patience=1, smoothing=0.0)
    labels = {"dense": "dense", "experts": "expert", "router": "gate"}
    tx = mo.inject_meta_hyperparams(
        mo.moe_partition(optax.adamw, labels, num_layers=2, layer_axis=0), mo.with_decisions(guard)
    )(learning_rate=0.1)
    shapes = {"dense": (8,), "experts": (2, 4, 8), "router": (2, 8, 4)}
    params = {k: jnp.ones(v) for k, v in shapes.items()}
    seen = {
        "load_entropy_normalized": [0.1, 1.0],
        "dead_experts": [0.75, 0.0],
        "gate_entropy_normalized": [0.1, 1.0],
        "max_violation": [3.0, 0.0],
        "drop_fraction": [0.0, 0.0],
    }
    metrics = {f"{name}_per_layer": jnp.array(values) for name, values in seen.items()}

    def decide(metrics):
        state = tx.init(params)
        update = jax.jit(lambda s, m: tx.update(params, s, params, **m)[1])
        for _ in range(2):
            state = update(state, metrics)
        return [tuple(d) for d in mo.read_decisions(state)]

    expected = decide(metrics)
    mesh = _mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P("fsdp"))
        decisions = decide(jax.tree.map(lambda x: jax.device_put(x, split), metrics))
    assert len(expected) >= 1
    assert decisions == expected
