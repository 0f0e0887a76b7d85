"""Where `checkpoint_template` has each leaf of a state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_rows import NAMES, start
from flax import nnx
from table import TRANSFORMATIONS, params

import meta_optax as mo

AUTO = jax.sharding.AxisType.Auto


def _unplaced(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", NAMES)
def test_is_the_state_of_init_with_a_sharding_for_every_leaf(name):
    tx, p = start(name)
    shapes = _unplaced(p)
    state = tx.init(p)
    only = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for given in (p, shapes, jax.tree.map(np.asarray, p)):
        template = mo.checkpoint_template(tx, given)
        chex.assert_trees_all_equal_shapes_and_dtypes(template, state)
        assert jax.tree.structure(template) == jax.tree.structure(state)
        assert {leaf.sharding for leaf in jax.tree.leaves(template)} == {only}


@pytest.mark.parametrize("name", NAMES)
def test_on_a_mesh_moments_are_as_their_params_and_decisions_everywhere(name):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO, AUTO))
    tx, p = start(name)
    specs = dict(zip(p, [jax.P("data"), jax.P(), jax.P(("data", "model"))], strict=True))
    size = {k: 4 if name == "balance_router_bias" else 16 for k in p}
    specs |= {"router": jax.P()} if name == "balance_router_bias" else {}
    shapes = {
        k: jax.ShapeDtypeStruct([size[k]], x.dtype, sharding=jax.NamedSharding(mesh, specs[k]))
        for k, x in p.items()
    }
    template = mo.checkpoint_template(tx, shapes)
    moments = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        key = getattr(path[-1], "key", None)
        is_moment = key in p and leaf.shape == shapes[key].shape
        moments += is_moment
        expected = specs[key] if is_moment else jax.P()
        assert leaf.sharding == jax.NamedSharding(mesh, expected), path
    assert moments or name == "noise"


def test_nothing_is_allocated():
    huge = {k: jax.ShapeDtypeStruct([2**40], jnp.float32) for k in params()}
    tx = TRANSFORMATIONS["inject[with_decisions]"]()
    before = len(jax.live_arrays())
    mo.checkpoint_template(tx, huge)
    assert len(jax.live_arrays()) <= before


def test_factored_moments_mirror_no_param():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    split = jax.NamedSharding(mesh, jax.P(None, "data"))
    shape = jax.ShapeDtypeStruct([256, 128], jnp.float32, sharding=split)
    tx = mo.inject_meta_hyperparams(
        optax.adafactor, mo.plateau(), static_args=("min_dim_size_to_factor",)
    )(learning_rate=0.1)
    template = mo.checkpoint_template(tx, {"w": shape})
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(template)} == {jax.P()}


def test_lists_in_a_leafs_place_are_found():
    """SM3 keeps a list of rows and columns for each param."""
    template = mo.checkpoint_template(optax.sm3(0.1), params())
    assert jax.tree.structure(template) == jax.tree.structure(optax.sm3(0.1).init(params()))


def test_nnx_states():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(learning_rate=0.1)
    split = jax.NamedSharding(mesh, jax.P("data"))
    for state in (nnx.state(model, nnx.Param), nnx.as_pure(nnx.state(model, nnx.Param))):
        placed = jax.device_put(state, split)
        template = mo.checkpoint_template(tx, placed)
        kernel, count = template.inner_state[0].mu["kernel"], template.count
        assert jax.tree.leaves(kernel)[0].sharding == split
        assert count.sharding == jax.NamedSharding(mesh, jax.P())
        assert jax.tree.structure(template) == jax.tree.structure(tx.init(placed))


def test_a_mesh_replicates_what_has_none():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    template = mo.checkpoint_template(optax.adamw(0.1), params(), mesh)
    assert {x.sharding for x in jax.tree.leaves(template)} == {jax.NamedSharding(mesh, jax.P())}


def test_params_without_a_place_go_everywhere_beside_sharded_ones():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in (("data",), ()))
    p = {"a": jax.device_put(jnp.ones(8), split), "b": jnp.ones(8), "c": np.ones(8)}
    mu = mo.checkpoint_template(optax.adamw(0.1), p)[0].mu
    assert [mu[k].sharding for k in "abc"] == [split, whole, whole]


def test_the_params_device_is_the_states():
    last = jax.devices()[-1]
    only = jax.sharding.SingleDeviceSharding(last)
    template = mo.checkpoint_template(optax.adamw(0.1), jax.device_put(params(), last))
    assert {x.sharding for x in jax.tree.leaves(template)} == {only}
    with jax.default_device(last):
        template = mo.checkpoint_template(optax.adamw(0.1), _unplaced(params()))
    assert {x.sharding for x in jax.tree.leaves(template)} == {only}


def test_an_abstract_mesh_needs_a_concrete_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    split = jax.NamedSharding(mesh.abstract_mesh, jax.P("data"))
    shapes = {"w": jax.ShapeDtypeStruct([8], jnp.float32, sharding=split)}
    with pytest.raises(ValueError, match=r"\['w'\].*abstract mesh.*pass the mesh"):
        mo.checkpoint_template(optax.adamw(0.1), shapes)
    template = mo.checkpoint_template(optax.adamw(0.1), shapes, mesh)
    assert template[0].mu["w"].sharding == jax.NamedSharding(mesh, jax.P("data"))


def test_two_meshes_or_two_devices_are_refused():
    meshes = [jax.make_mesh(s, ("a", "b"), axis_types=(AUTO, AUTO)) for s in [(8, 1), (2, 4)]]
    on = [jax.NamedSharding(mesh, jax.P("a")) for mesh in meshes]
    p = {"x": jax.device_put(jnp.ones(8), on[0]), "y": jax.device_put(jnp.ones(8), on[1])}
    with pytest.raises(ValueError, match=r"\['y'\].*ShapeDtypeStruct"):
        mo.checkpoint_template(optax.adamw(0.1), p)
    with pytest.raises(ValueError, match=r"\['x'\]"):
        mo.checkpoint_template(optax.adamw(0.1), p, meshes[1])
    first, last = jax.devices()[0], jax.devices()[-1]
    for other in (last, on[0]):
        p = {"x": jax.device_put(jnp.ones(8), first), "y": jax.device_put(jnp.ones(8), other)}
        with pytest.raises(ValueError, match="alone, and the state is to be on"):
            mo.checkpoint_template(optax.adamw(0.1), p)
