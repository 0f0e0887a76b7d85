"""`migrate`: checkpoints that older layouts wrote go on as the code that wrote them would have."""

import json
import pathlib
import warnings
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp
from write_layouts import AFTER, BEFORE, decisions, params, run, transformations

import meta_optax as mo
from meta_optax._control import LAYOUT_VERSION

FOLDER = pathlib.Path(__file__).parent / "checkpoints"
LAYOUTS = range(1, LAYOUT_VERSION + 1)
ROWS = [(layout, name) for layout in LAYOUTS for name in transformations(layout)]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Each layout's checkpoint, restored without a template."""
    found = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp(f"layout_{layout}")
        with zipfile.ZipFile(FOLDER / f"layout_{layout}.zip") as archive:
            archive.extractall(folder)
        with warnings.catch_warnings():
            # Where there is no template, Orbax takes the devices that the checkpoint names.
            warnings.filterwarnings("ignore", "Sharding info not provided")
            found[layout] = ocp.load(folder / "checkpoint")
    return found


@pytest.fixture(scope="module")
def expected():
    return {n: json.loads((FOLDER / f"layout_{n}.json").read_text()) for n in LAYOUTS}


@pytest.mark.parametrize(("layout", "name"), ROWS)
def test_the_next_steps_are_those_of_the_version_that_wrote_it(raw, expected, layout, name):
    """No rule of these rows has changed what it decides since layout 1, nor what the log says."""
    tx, after = transformations(layout)[name], expected[layout][name]
    p, state = raw[layout][name]["params"], raw[layout][name]["state"]
    migrated = mo.migrate(state, tx, p)
    chex.assert_trees_all_equal_shapes_and_dtypes(migrated, tx.init(p))
    template = mo.checkpoint_template(tx, p)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x.sharding, migrated), jax.tree.map(lambda x: x.sharding, template)
    )
    p, state, used = run(tx, p, migrated, range(BEFORE, BEFORE + AFTER))
    for got, wanted in zip(used, after["hyperparams"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose([p[k] for k in p], [after["params"][k] for k in p], rtol=1e-5)
    made = decisions(state)
    if made is None:
        assert after["decisions"] is None
        return
    assert len(made) == len(after["decisions"])
    for got, wanted in zip(made, after["decisions"], strict=True):
        (*got_place, got_old, got_new), (*place, old, new) = _sorted(got), _sorted(wanted)
        assert got_place == place
        assert [got_old, got_new] == pytest.approx([old, new], rel=1e-6)


def _sorted(decision):
    step, hyperparam, old, new, reason = decision
    return step, hyperparam, reason, old, new


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fixture_is_of_its_layout_and_has_decided(raw, expected, layout):
    assert int(raw[layout]["plateau"]["state"]["layout_version"]) == layout
    assert any(row["decisions"] for row in expected[layout].values())
    of_log = raw[layout]["with_decisions"]["state"]["meta_state"]["log"]
    assert 0 < int(of_log["count"])
    assert ("value" in of_log) == (layout > 2)


def test_decisions_of_older_layouts_rest_on_no_known_metric(raw):
    tx = transformations(1)["as_schedule"]
    state = mo.migrate(raw[1]["as_schedule"]["state"], tx, params())
    made = mo.read_decisions(state)
    assert made
    assert all(d.metric == "" and np.isnan(d.value) for d in made)
    log = state.hyperparams_states["learning_rate"].meta_state.log
    assert (np.asarray(log.value)[len(made) :] == 0).all()


@pytest.mark.parametrize("name", transformations(LAYOUT_VERSION))
def test_the_present_layout_comes_back_as_it_is(name):
    tx, p = transformations(LAYOUT_VERSION)[name], params()
    _, state, _ = run(tx, p, tx.init(p), range(4))
    again = mo.migrate(state, tx, p)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    chex.assert_trees_all_equal(again, state)


def test_a_typed_state_and_one_with_string_keys_are_taken(raw):
    tx, p = transformations(1)["expert_gate"], params()
    state = raw[1]["expert_gate"]["state"]
    expected = mo.migrate(state, tx, p)

    def stringly(node):
        if isinstance(node, list):
            node = dict(enumerate(node))
        return {str(k): stringly(v) for k, v in node.items()} if isinstance(node, dict) else node

    chex.assert_trees_all_equal(mo.migrate(stringly(state), tx, p), expected)
    older = expected._replace(layout_version=jnp.int32(1))
    chex.assert_trees_all_equal(mo.migrate(older, tx, p), expected)


def test_goes_to_the_mesh_of_the_params(raw):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    tx = transformations(2)["plateau"]
    p = jax.device_put(raw[2]["plateau"]["params"], split)
    state = mo.migrate(raw[2]["plateau"]["state"], tx, p)
    assert state.inner_state[0].mu["dense"].sharding == split
    assert state.meta_state.cooldown_count.sharding == whole
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p)
    state = mo.migrate(raw[2]["plateau"]["state"], tx, shapes, mesh)
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {whole}
    run(tx, jax.device_put(p, whole), state, range(BEFORE, BEFORE + 2))


class TestErrors:
    @pytest.fixture
    def state(self, raw):
        return raw[2]["plateau"]["state"]

    @pytest.fixture
    def tx(self):
        return transformations(2)["plateau"]

    def test_a_newer_layout_names_both_versions(self, state, tx):
        newer = state | {"layout_version": jnp.int32(LAYOUT_VERSION + 4)}
        with pytest.raises(ValueError, match=rf"version {LAYOUT_VERSION + 4}.*knows 3.*newer"):
            mo.migrate(newer, tx, params())

    def test_what_reads_or_resets_an_older_state_points_here(self, tx):
        older = tx.init(params())._replace(layout_version=jnp.int32(2))
        for call in (mo.read_hyperparams, lambda s: mo.reset(s, tx, params())):
            with pytest.raises(ValueError, match=r"version 2.*layout 3: migrate\("):
                call(older)
        newer = older._replace(layout_version=jnp.int32(9))
        with pytest.raises(ValueError, match=r"version 9.*newer"):
            mo.read_hyperparams(newer)

    def test_a_state_without_a_version_points_to_adopt(self, tx):
        for state in (optax.adamw(0.1).init(params()), {"mu": jnp.ones(2)}):
            with pytest.raises(ValueError, match=r"no layout version.*adopt"):
                mo.migrate(state, tx, params())

    def test_what_is_missing_or_left_over_is_named_with_its_path(self, state, tx):
        meta = state["meta_state"]
        less = {k: v for k, v in meta.items() if k != "best"}
        with pytest.raises(ValueError, match=r"\.meta_state \['best'\] are missing and \[\] are"):
            mo.migrate(state | {"meta_state": less}, tx, params())
        more = meta | {"worst": jnp.zeros([])}
        with pytest.raises(ValueError, match=r"\.meta_state \[\] are missing and \['worst'\] are"):
            mo.migrate(state | {"meta_state": more}, tx, params())
        with pytest.raises(ValueError, match=r"layout 2.*\.hyperparams.*'gate_learning_rate'"):
            mo.migrate(state, transformations(2)["expert_gate"], params())

    def test_a_field_that_the_present_layout_has_must_be_there(self, state, tx):
        """Only what a version added may be missing, and only from before that version."""
        with pytest.raises(ValueError, match=r"'cooldown_count', 'smoothed'\] are missing"):
            mo.migrate(state | {"layout_version": jnp.int32(3)}, tx, params())

    def test_another_shape_or_dtype_is_named_with_both_sides(self, state, tx):
        wide = state | {"count": jnp.zeros([3], jnp.int32)}
        with pytest.raises(ValueError, match=r"\.count .*int32\[\].*int32\[3\]"):
            mo.migrate(wide, tx, params())
        half = state | {"meta_state": state["meta_state"] | {"best": jnp.bfloat16(1.0)}}
        with pytest.raises(ValueError, match=r"\.meta_state\.best .*float32\[\].*bfloat16\[\]"):
            mo.migrate(half, tx, params())
