"""The code of docs/sharding.md, run block by block in one namespace."""

import pathlib
import re

import jax
import numpy as np

PAGE = pathlib.Path(__file__).parent.parent / "docs/sharding.md"


def test_each_block_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    # The page puts its mesh into force for good; a test gives the one of before back.
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        scope = {}
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), scope)
    assert len(blocks) == 3
    assert scope["step"]._cache_size() == 1
    moments = jax.tree.leaves(scope["state"].inner_state)
    assert {leaf.sharding.spec for leaf in moments if leaf.shape == (4, 8)} == {
        jax.P("expert", "fsdp")
    }
    assert all(
        leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(scope["state"].meta_state)
    )
    assert scope["gate_state"].hyperparams["gate_learning_rate"] > 0
    np.testing.assert_allclose(scope["sgd_state"].meta_state.best, 64.0)
