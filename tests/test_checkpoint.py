"""States through Orbax: restored into a template, they go on as if there had been no stop."""

import pathlib
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp0
import pytest
from checkpoint_rows import KEYED, NAMES, ROWS, start
from orbax.checkpoint import v1 as ocp
from table import LABELS, TRANSFORMATIONS, params, row

import meta_optax as mo

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 3
AUTO = jax.sharding.AxisType.Auto


def _shardings(template):
    return jax.tree.map(lambda leaf: leaf.sharding, template)


def _abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
    )


def _assert_same(a, b):
    """To the bit, keys too."""

    def data(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    assert jax.tree.structure(a) == jax.tree.structure(b)
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(jax.tree.map(data, a), jax.tree.map(data, b))


def _stepper(tx):
    update = (
        tx.update if isinstance(tx, optax.MultiSteps) else optax.with_extra_args_support(tx).update
    )

    @jax.jit
    def step(p, state, metrics):
        updates, state = update(p, state, p, **metrics)
        return optax.apply_updates(p, updates), state

    return step


class Run(NamedTuple):
    """A run up to a checkpoint, and what came after it."""

    tx: Any
    step: Any
    params: Any
    state: Any
    after: Any


@pytest.fixture(scope="module")
def runs():
    """Each row after some steps, its state placed as a template says from the first on."""
    found = {}
    for name in NAMES:
        tx, p = start(name)
        p = jax.device_put(p, jax.devices()[0])
        state = jax.device_put(tx.init(p), _shardings(mo.checkpoint_template(tx, p)))
        step = _stepper(tx)
        for i in range(STEPS):
            p, state = step(p, state, row(i))
        after = step(p, state, row(STEPS))
        found[name] = Run(tx, step, p, state, after)
    return found


def _saved(runs):
    return {name: {"params": run.params, "state": run.state} for name, run in runs.items()}


def _templates(runs):
    found = {}
    for name, run in runs.items():
        shapes = _abstract(run.params)
        state = mo.checkpoint_template(run.tx, shapes)
        found[name] = {"params": shapes, "state": state}
    return found


def _through_v1(folder, tree, template):
    with ocp.training.Checkpointer(folder) as checkpointer:
        checkpointer.save(0, tree)
        return checkpointer.load(0, template)


def _through_v1_async(folder, tree, template):
    with ocp.training.Checkpointer(folder) as checkpointer:
        checkpointer.save_async(0, tree).result()
        return checkpointer.load(0, template)


def _through_v0(folder, tree, template):
    with ocp0.CheckpointManager(folder) as manager:
        manager.save(0, args=ocp0.args.StandardSave(tree))
        manager.wait_until_finished()
        return manager.restore(0, args=ocp0.args.StandardRestore(template))


@pytest.fixture(scope="module", params=[_through_v1, _through_v1_async, _through_v0])
def restored(request, runs, tmp_path_factory):
    """All rows in one checkpoint, through each way to save."""
    return request.param(tmp_path_factory.mktemp("all"), _saved(runs), _templates(runs))


def test_every_row_comes_back_to_the_bit_and_goes_on(runs, restored):
    for name, run in runs.items():
        p, state = restored[name]["params"], restored[name]["state"]
        _assert_same(state, run.state)
        _assert_same(p, run.params)
        compiled = run.step._cache_size()
        _assert_same(run.step(p, state, row(STEPS)), run.after)
        assert run.step._cache_size() == compiled == 1, name


def test_some_row_has_decided_and_some_key_has_moved(runs):
    """What the tests above carry is no fresh state."""
    assert mo.read_decisions(runs["inject[with_decisions]"].state)
    key = runs["key"].state.meta_state.inner.key
    assert (jax.random.key_data(key) != jax.random.key_data(jax.random.key(0))).any()


def test_no_leaf_is_of_what_orbax_cannot_save():
    """NumPy scalars and arrays of no size fail in Orbax (its issue 2587)."""
    for name in NAMES:
        tx, p = start(name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tx.init(p)):
            assert isinstance(leaf, jax.Array), (name, path)
            assert leaf.size > 0, (name, path)


@pytest.mark.parametrize("name", KEYED)
def test_keys_are_carried_held_and_reset(name):
    tx, p = start(name)

    def keys(state):
        leaves = jax.tree.leaves(state)
        return [x for x in leaves if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]

    state = tx.init(p)
    _, new = tx.update(p, state, p, **row(0))
    _, held = tx.update(p, new, p, **row(1, value=np.nan))
    assert len(keys(new)) == 1
    if name != "noise":  # which the hold on a strategy does not hold
        _assert_same(keys(held), keys(new))
    _assert_same(keys(mo.reset(new, tx, p)), keys(new if name == "noise" else state))
    batch = jax.vmap(tx.init)(jax.tree.map(lambda x: jnp.stack([x, x]), p))
    assert keys(batch)[0].shape in ((), (2,))


SHARDED = [
    "inject[with_decisions]",
    "skip_spikes[inject]",
    "scale_by_plateau",
    "as_schedule",
    "key",
]
# From eight devices in a row: onto another shape, fewer devices, one.
MESHES = [((2, 4), 8), ((4,), 4), ((1,), 1), (None, 1)]


def _mesh(shape, count):
    names = ("data", "model")[: len(shape)]
    devices = np.asarray(jax.devices()[:count]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(AUTO,) * len(shape))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Some rows on eight devices, saved, and what the next step gave there."""
    mesh = _mesh((8,), 8)
    split = jax.NamedSharding(mesh, jax.P("data"))
    saved, after, folder = {}, {}, tmp_path_factory.mktemp("sharded")
    for name in SHARDED:
        tx = ROWS[name]()
        p = {k: jax.device_put(jnp.linspace(0.5, 1.5, 16), split) for k in LABELS}
        state = jax.jit(tx.init, out_shardings=_shardings(mo.checkpoint_template(tx, p)))(p)
        step = _stepper(tx)
        for i in range(STEPS):
            p, state = step(p, state, row(i))
        saved[name] = {"params": p, "state": state}
        after[name] = jax.device_get(_plain(step(p, state, row(STEPS))))
        assert step._cache_size() <= _entries(name)
    with ocp.training.Checkpointer(folder) as checkpointer:
        checkpointer.save(0, saved)
    return folder, after


def _entries(name):
    """JAX says P(None) for the P() of a key that a step on a mesh made, and looks twice."""
    return 2 if name == "key" else 1


def _plain(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


@pytest.mark.parametrize(("shape", "count"), MESHES)
def test_a_sharded_state_comes_back_on_other_devices(sharded, shape, count):
    folder, after = sharded
    if shape is None:
        split = whole = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    else:
        mesh = _mesh(shape, count)
        split, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    shapes = {k: jax.ShapeDtypeStruct([16], jnp.float32, sharding=split) for k in LABELS}
    templates = {
        name: {"params": shapes, "state": mo.checkpoint_template(ROWS[name](), shapes)}
        for name in SHARDED
    }
    with ocp.training.Checkpointer(folder) as checkpointer:
        restored = checkpointer.load(0, templates)
    for name in SHARDED:
        p, state = restored[name]["params"], restored[name]["state"]
        for leaf in jax.tree.leaves(state):
            where = split if leaf.shape == (16,) else whole
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
        step = _stepper(ROWS[name]())
        got = step(p, state, row(STEPS))
        chex.assert_trees_all_close(jax.device_get(_plain(got)), after[name], rtol=1e-5)
        step(*got, row(STEPS))
        # On a mesh of one device JAX says P() for the P("data") of what a step on it made.
        assert step._cache_size() <= _entries(name) + (shape == (1,))


def test_the_trap_of_a_template_of_shapes_alone(tmp_path):
    """Scalars of an eager init of Optax's are on no mesh, and come back on one device for good."""
    mesh = _mesh((8,), 8)
    tx = optax.adamw(1e-3)
    p = jax.device_put(params(), jax.NamedSharding(mesh, jax.P()))
    state, step = tx.init(p), _stepper(tx)
    step(p, state, row())  # which JAX takes, as nothing holds the scalars where they are
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        trapped = checkpointer.load(0, _abstract(state))
        sound = checkpointer.load(0, mo.checkpoint_template(tx, p))
    with pytest.raises(ValueError, match="incompatible devices"):
        step(p, trapped, row())
    _assert_same(step(p, sound, row()), step(p, state, row()))


def test_an_eager_init_on_a_mesh_is_no_trap(tmp_path):
    """Where the params are on a mesh, our own state is on it from the start."""
    tx = TRANSFORMATIONS["inject[plateau]"]()
    p = jax.device_put(params(), jax.NamedSharding(_mesh((8,), 8), jax.P()))
    state, step = tx.init(p), _stepper(tx)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        loaded = checkpointer.load(0, _abstract(state))
    _assert_same(step(p, loaded, row()), step(p, state, row()))


def test_a_state_is_made_where_it_belongs():
    """No array of the whole is made on one device first."""
    mesh = _mesh((8,), 8)
    split = jax.NamedSharding(mesh, jax.P("data"))
    p = {k: jax.device_put(jnp.ones([16]), split) for k in LABELS}
    for name in SHARDED:
        tx = ROWS[name]()
        template = mo.checkpoint_template(tx, p)
        state = jax.jit(tx.init, out_shardings=_shardings(template))(p)
        assert _shardings(state) == _shardings(template)
        _assert_same(jax.device_get(_plain(state)), jax.device_get(_plain(tx.init(p))))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_the_page_runs_from_top_to_bottom(tmp_path, capsys):
    text = (ROOT / "docs/checkpoints.md").read_text()
    scope = {"folder": tmp_path / "run"}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/checkpoints.md", "exec"), scope)
    assert capsys.readouterr().out == "6\n"
    assert scope["shardings"].inner_state[0].mu["w"].spec == jax.P("data")
    assert int(scope["state"].count) == 6
    assert mo.read_decisions(scope["state"])
    for name in set(re.findall(r"\bmo\.(\w+)", text)):
        assert hasattr(mo, name), name
