"""The example on a mesh: what lies where, what moves, and that the numbers stay."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meta_optax as mo

nnx = pytest.importorskip("flax.nnx", exc_type=Exception)
pytest.importorskip("grain")
command_line = pytest.importorskip("command_line")
meshes = pytest.importorskip("meshes", exc_type=ImportError)
moe_model = pytest.importorskip("moe_model", exc_type=ImportError)
train_moe = pytest.importorskip("train_moe", exc_type=ImportError)
training = pytest.importorskip("training", exc_type=ImportError)

CONFIG = moe_model.ModelConfig(length=16, width=64, heads=2, layers=2, expert_width=96, block=8)
ROWS = 12
# A size that only the experts' weights have, to know them by in a compiled program.
WEIGHTS = re.compile(r"f32\[\d+,(?:64,96|96,64)\]")


def _batch():
    tokens = np.random.default_rng(0).integers(0, 256, (ROWS, CONFIG.length + 1)).astype(np.uint8)
    return {"tokens": tokens, "corpus": np.arange(ROWS, dtype=np.int32) % 3}


def _model():
    return moe_model.MoeTransformer(CONFIG, nnx.Rngs(0))


def _differentiate(bias=0.0):
    """The loss, its statistics and its gradients, on whatever mesh is in force."""
    graphdef, params = nnx.split(_model(), nnx.Param)
    for block in params["blocks"].values():
        kernel = block["moe"]["router"]["kernel"]
        kernel[...] = kernel[...] + bias * (jnp.arange(CONFIG.experts) < 2)
    if mesh := meshes.current_mesh():
        params = jax.device_put(params, meshes.param_shardings(mesh, params))
    loss = functools.partial(train_moe.loss_and_statistics, graphdef)
    differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return jax.device_get(differentiate(params, meshes.place_rows(_batch()), 0.01))


@pytest.mark.parametrize(
    ("sizes", "bias"),
    [({"data": 2, "expert": 4}, 1.0), ({"data": 2, "fsdp": 2, "expert": 2}, 0.0)],
    ids=str,
)
def test_loss_and_gradients_are_those_without_a_mesh(sizes, bias):
    (loss, statistics), grads = _differentiate(bias)
    with meshes.use_mesh(sizes):
        (split_loss, split_statistics), split_grads = _differentiate(bias)
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    for name, value in statistics.items():
        np.testing.assert_allclose(split_statistics[name], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(jax.tree.leaves(split_grads), jax.tree.leaves(grads), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * scale)


class _Silent:
    """Stands for the display and for whoever may ask for the end."""

    def announce(self, text):
        pass

    def check(self):
        pass


@functools.cache
def _set_up(**sizes):
    with meshes.use_mesh(sizes):
        return training.set_up(
            _model,
            train_moe.loss_and_statistics,
            train_moe.make_optimizer(CONFIG.layers),
            guesses=256,
            example=_batch(),
            monitor=_Silent(),
            stop=_Silent(),
        )


def _experts(tree):
    """All leaves with a row for each expert: weights, and both moments of each."""
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if leaf.ndim == 3 and leaf.shape[0] == CONFIG.experts]


def test_each_device_holds_its_share_of_experts_and_moments():
    state = _set_up(data=2, expert=4).state
    experts = _experts(state)
    assert len(experts) == 3 * 2 * CONFIG.layers
    for leaf in experts:
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, *leaf.shape[1:])}
        assert {shard.data.nbytes * 4 for shard in leaf.addressable_shards} == {leaf.nbytes}


def test_fsdp_splits_what_is_large_and_nothing_else():
    mesh = meshes.make_mesh({"fsdp": 2, "expert": 2})
    shapes = nnx.split(nnx.eval_shape(_model), nnx.Param)[1]
    tx = train_moe.make_optimizer(CONFIG.layers)
    params, state, _ = training.abstract_state(tx, shapes, mesh)
    leaves = jax.tree.leaves((params, state.inner_state))
    for leaf in leaves:
        share = np.prod(leaf.sharding.shard_shape(leaf.shape)) / np.prod(leaf.shape)
        is_expert = leaf.ndim == 3
        if leaf.size >= meshes.SMALLEST_SPLIT:
            assert share == (0.25 if is_expert else 0.5), leaf.shape
        else:
            assert share == 1.0, leaf.shape
    for leaf in jax.tree.leaves((state.meta_state, state.hyperparams)):
        assert leaf.sharding.is_fully_replicated


def test_no_weight_of_an_expert_leaves_its_place():
    """From the compiled step: gradients of own experts are summed over data, and that is all."""
    text = _set_up(data=2, expert=4).step_fn.as_text()
    moved = [
        line for line in text.splitlines() if re.search(r"(?<!%)\ball-(gather|to-all)\b", line)
    ]
    assert not [line for line in moved if WEIGHTS.search(line)]
    sizes = {int(size) for size in re.findall(r"f32\[(\d+),(?:64,96|96,64)\]", text)}
    # Two experts a device; blocks of rows have other sizes, and all eight are nowhere.
    assert 2 in sizes
    assert 8 not in sizes


def test_no_device_waits_for_one_that_takes_another_branch():
    """A collective in a branch would never end: the devices' own experts have work or have none."""
    text = _set_up(data=2, expert=4).step_fn.as_text()
    bodies = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    names = set()
    for line in text.splitlines():
        if " conditional(" in line:
            for part in re.findall(
                r"(?:branch_computations=\{|true_computation=|false_computation=)([^}]*)", line
            ):
                names |= {name for name in re.findall(r"%?([\w.\-]+)", part) if name in bodies}
    assert names
    for name in names:
        assert not re.search(r"\ball-(reduce|gather|to-all)|collective", bodies[name]), name


def test_steps_keep_everything_in_place():
    setup = _set_up(data=2, expert=4)
    before = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    with meshes.use_mesh({"data": 2, "expert": 4}):
        state = jax.tree.map(jnp.copy, setup.state)
        for _ in range(2):
            state, metrics = setup.step_fn(state, meshes.place_rows(_batch()))
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert np.isfinite(metrics["loss"])
    assert mo.read_decisions(state.opt_state)


def test_same_start_as_without_a_mesh():
    split = jax.device_get(_set_up(data=2, expert=4).state.params)
    alone = nnx.split(_model(), nnx.Param)[1]
    for one, other in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


class TestSizes:
    parse = staticmethod(command_line.mesh_sizes(*meshes.AXES))

    def test_each_axis_has_its_size(self):
        assert self.parse("data=2,expert=4") == {"data": 2, "expert": 4}
        assert self.parse("fsdp=8") == {"fsdp": 8}

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("expert=0", "'expert', not '0'"),
            ("data=-1", "'data', not '-1'"),
            ("data=2.0", "'data', not '2.0'"),
            ("data", "'data', not ''"),
            ("data=2,data=2", "'data' twice"),
            ("model=2", "not 'model'"),
            ("", "not ''"),
            ("data=2,", "not ''"),
            ("data=99999999999", "'data'"),
        ],
    )
    def test_mistake_is_named(self, text, named):
        with pytest.raises(command_line.argparse.ArgumentTypeError, match=named):
            self.parse(text)

    def test_too_few_devices(self):
        with pytest.raises(command_line.UserError, match=r"expert=16 needs 16 .* there are 8"):
            meshes.make_mesh({"expert": 16})

    def test_experts_that_cannot_be_split(self):
        mesh = meshes.make_mesh({"expert": 3})
        shapes = nnx.split(nnx.eval_shape(_model), nnx.Param)[1]
        with pytest.raises(command_line.UserError, match="expert=3 cannot split 8 experts"):
            meshes.param_shardings(mesh, shapes)

    def test_rows_that_cannot_be_split(self):
        mesh = meshes.make_mesh({"data": 2, "fsdp": 2})
        with pytest.raises(command_line.UserError, match=r"data=2,fsdp=2 .* 4 equal .* 18 rows"):
            meshes.check_rows(mesh, 18)
