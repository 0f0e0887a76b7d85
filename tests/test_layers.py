"""Which layer a leaf is of, in the trees of every code base."""

import jax
import numpy as np
import pytest
from moe_trees import TREES

from meta_optax.moe._layers import find_layers
from meta_optax.moe._paths import normalise


def _find(tree, *, layer_axis=None, num_layers=None):
    leaves = {
        normalise((jax.tree_util.DictKey(path),)): leaf
        for path, leaf in tree.leaves.items()
        if leaf.label in ("gate", "gate_bias", "balance_bias", "expert")
    }
    found = find_layers(
        "test",
        {path: leaf.shape for path, leaf in leaves.items()},
        {path: leaf.shape for path, leaf in leaves.items() if leaf.label == "gate"},
        num_layers=num_layers or tree.num_layers,
        layer_axis=layer_axis,
        plain_ndim=2,
    )
    return {path: (leaf, found[path]) for path, leaf in leaves.items()}


# Two stacked axes, of a scan inside a scan; two routers a layer, one of them for three dimensions.
NOT_FOUND = ["maxtext_gemma4_scanned", "flaxformer_parallel_fused"]
FOUND = [name for name in TREES if name not in NOT_FOUND]


@pytest.mark.parametrize("name", FOUND)
def test_axis_and_number_of_layers_of_every_code_base(name):
    tree = TREES[name]
    seen = set()
    for path, (leaf, layers) in _find(tree).items():
        assert layers.axis == leaf.layer_axis, path
        if leaf.layer_axis is not None:
            assert len(layers.layers) == leaf.shape[leaf.layer_axis]
        seen |= set(np.atleast_1d(layers.layers).tolist())
    assert seen == set(range(tree.num_layers))


@pytest.mark.parametrize("name", FOUND)
def test_an_axis_that_is_given_is_the_one_taken(name):
    tree = TREES[name]
    axes = {leaf.layer_axis for leaf in tree.leaves.values() if leaf.label == "gate"} - {None}
    for axis in axes:
        found = _find(tree, layer_axis=axis)
        assert {layers.axis for _, layers in found.values()} - {None} == {axis}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_cannot_be_found_is_an_error_with_the_shapes(name):
    with pytest.raises(ValueError, match=r"num_layers=\d+.*router|num_layers=\d+.*gate"):
        _find(TREES[name])


def test_blocks_of_unlike_layers_alternate():
    """In a scan over blocks of two, slice j of layer kind i is layer 2 j + i."""
    found = _find(TREES["maxtext_gpt_oss_scanned"])
    for path, (_, layers) in found.items():
        first = 0 if "layers_0" in path else 1
        assert layers.layers.tolist() == [first, first + 2, first + 4]


def test_parts_of_other_names_follow():
    found = _find(TREES["maxtext_deepseek3_scanned_mtp"])
    for path, (_, layers) in found.items():
        assert layers.layers.tolist() == ([0, 1, 2] if "decoder" in path else 3)


def test_natural_order_of_separate_layers():
    shapes = {("l_10", "router"): (4, 2), ("l_9", "router"): (4, 2), ("l_9", "experts"): (2, 4, 4)}
    anchors = {path: shape for path, shape in shapes.items() if path[1] == "router"}
    found = find_layers("test", shapes, anchors, num_layers=2, layer_axis=None, plain_ndim=2)
    assert {path: int(layers.layers) for path, layers in found.items()} == {
        ("l_10", "router"): 1,
        ("l_9", "router"): 0,
        ("l_9", "experts"): 0,
    }
