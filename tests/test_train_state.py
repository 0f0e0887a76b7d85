"""Flax Linen's train state with metrics."""

import inspect
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

import meta_optax as mo


def _tx():
    return mo.inject_meta_hyperparams(optax.sgd, mo.plateau(patience=1))(learning_rate=0.5)


def _create(kind, tx, **kwargs):
    return kind.create(apply_fn=jnp.dot, params={"w": jnp.ones(2)}, tx=tx, **kwargs)


def test_metrics_reach_the_optimizer_in_one_trace():
    state = _create(mo.TrainState, _tx())

    @jax.jit
    def step(state, loss):
        return state.apply_gradients(grads=state.params, value=loss)

    tx = state.tx
    for loss in (1.0, 1.0, 2.0):
        state = step(state, jnp.float32(loss))
    assert step._cache_size() <= 2  # the first `step` of Flax is a Python number
    assert state.tx is tx
    assert int(state.step) == 3
    assert mo.read_hyperparams(state.opt_state) == {"learning_rate": 0.125}
    np.testing.assert_allclose(state.params["w"], 0.5 * 0.75 * 0.875)


def test_flaxs_own_takes_metrics_for_fields():
    state = _create(train_state.TrainState, _tx())
    with pytest.raises(TypeError, match=r"needs the metric 'value'.*value=loss"):
        state.apply_gradients(grads=state.params)
    plain = _create(train_state.TrainState, optax.sgd(0.5))
    with pytest.raises(TypeError, match="value"):
        plain.apply_gradients(grads=plain.params, value=1.0)


def test_a_needed_metric_that_is_missing_is_an_error():
    state = _create(mo.TrainState, _tx())
    with pytest.raises(TypeError, match="needs the metric 'value'"):
        state.apply_gradients(grads=state.params)


def test_fields_of_a_subclass_are_replaced_and_the_rest_are_metrics():
    class WithStats(mo.TrainState):
        batch_stats: Any

    state = _create(WithStats, _tx(), batch_stats={"mean": jnp.zeros(2)})
    state = state.apply_gradients(grads=state.params, value=1.0, batch_stats={"mean": jnp.ones(2)})
    assert isinstance(state, WithStats)
    np.testing.assert_array_equal(state.batch_stats["mean"], [1.0, 1.0])
    other = optax.sgd(1.0)
    assert state.apply_gradients(grads=state.params, value=1.0, tx=other).tx is other


@pytest.mark.parametrize("grads_scale", [1.0, 3.0])
def test_it_does_what_flaxs_own_does_with_any_optimizer(grads_scale):
    """An optimizer without extra arguments too, which gets none."""
    tx = optax.GradientTransformation(*optax.adamw(0.1))
    ours, theirs = _create(mo.TrainState, tx), _create(train_state.TrainState, tx)
    grads = {"w": grads_scale * jnp.ones(2)}
    for _ in range(3):
        ours = ours.apply_gradients(grads=grads, value=1.0)
        theirs = theirs.apply_gradients(grads=grads)
    for name in ("params", "opt_state", "step"):
        mine, own = (jax.tree.leaves(getattr(s, name)) for s in (ours, theirs))
        assert all(np.array_equal(a, b) for a, b in zip(mine, own, strict=True))


def test_what_is_overwritten_with_its_gradient_stays_so():
    params = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones([])}}
    state = mo.TrainState.create(apply_fn=jnp.dot, params=params, tx=_tx())
    grads = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.float32(7.0)}}
    state = state.apply_gradients(grads=grads, value=1.0)
    np.testing.assert_array_equal(state.params["params"]["w"], [0.5, 0.5])
    assert float(state.params[OVERWRITE_WITH_GRADIENT]["scale"]) == 7.0


@pytest.mark.parametrize("wrap", [optax.MultiSteps, mo.multi_steps])
def test_accumulation_inside(wrap):
    """`optax.MultiSteps` is no transformation, but takes extra arguments."""
    state = _create(mo.TrainState, wrap(_tx(), 2))
    for loss in (1.0, 1.0, 1.0, 1.0):
        state = state.apply_gradients(grads=state.params, value=loss)
    assert mo.read_hyperparams(state.opt_state) == {"learning_rate": 0.25}


_WITHOUT_FLAX = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flax":
            raise ModuleNotFoundError("No module named 'flax'", name="flax")
sys.meta_path.insert(0, Hidden())
import meta_optax as mo
assert "TrainState" in dir(mo) and "plateau" in dir(mo)
try:
    mo.TrainState
except ImportError as error:
    assert 'pip install "meta-optax[flax]"' in str(error), error
else:
    raise SystemExit("no error")
try:
    mo.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
"""
_WITH_FLAX = """
import sys, meta_optax as mo
assert not [name for name in sys.modules if name.split(".")[0] == "flax"]
assert mo.TrainState is mo.TrainState and "flax" in sys.modules
"""


@pytest.mark.parametrize("program", [_WITHOUT_FLAX, _WITH_FLAX], ids=["hidden", "lazy"])
def test_importing_the_library_imports_no_flax(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_public():
    assert "TrainState" in mo.__all__
    assert inspect.isclass(mo.TrainState)
