"""Arguments out of range: an error that names the argument and the value, when it is built."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import row

import meta_optax as mo
from meta_optax import _checks

POSITIVE_INTEGERS = [0, -1, 1.5, 2**40, math.nan, math.inf, "3", None, True, [3]]
AT_LEAST_ZERO = [-1.0, -1e-9, math.nan, -math.inf, "1", None, [1.0], 1j]
FACTORS = [0.0, 1.0, -0.5, 1.5, math.nan, math.inf, "0.5", None, True]
GROWTHS = [0.5, -1.0, math.nan, "2", None]
SHARES = [-0.1, 1.1, math.nan, None]
FLAGS = [1, None, "yes"]
NOT_NEGATIVE = [-1, 1.5, math.nan, None]
OPEN_SHARES = [0.0, 1.0, -0.1, 1.5, math.nan, None, "0.5"]
ACTIONS = [(), [], (0.0,), (0.5, -1), (math.inf,), 0.5, "0.5", None]
SMOOTHINGS = [-1, 1.5, -0.5, math.nan, math.inf, None, "0.9", True, [3]]
MODES = ["Min", "", None, 1, ["min"]]

BAD = [
    (mo.plateau, "patience", POSITIVE_INTEGERS),
    (mo.plateau, "lr_factor", FACTORS),
    (mo.plateau, "min_lr", [*AT_LEAST_ZERO, math.inf]),
    (mo.plateau, "wd_increase_factor", [*GROWTHS, math.inf]),
    (mo.plateau, "max_weight_decay_growth", GROWTHS),
    (mo.plateau, "update_frequency", POSITIVE_INTEGERS),
    (mo.advanced_plateau, "patience", POSITIVE_INTEGERS),
    (mo.advanced_plateau, "lr_factor", FACTORS),
    (mo.advanced_plateau, "min_lr", [*AT_LEAST_ZERO, math.inf]),
    (mo.advanced_plateau, "grad_norm_threshold", AT_LEAST_ZERO),
    (mo.advanced_plateau, "weight_decay_factor", GROWTHS),
    (mo.advanced_plateau, "weight_norm_threshold", AT_LEAST_ZERO),
    (mo.advanced_plateau, "warmup_steps", [-1, 1.5, math.nan, None]),
    (mo.advanced_plateau, "trend_window", [1, *POSITIVE_INTEGERS]),
    (mo.advanced_plateau, "update_frequency", POSITIVE_INTEGERS),
    (mo.advanced_plateau, "rearm_trend", [1, None, "yes"]),
    (mo.advanced_plateau, "max_weight_decay_growth", GROWTHS),
    (mo.expert_gate, "gate_lr_factor", [*AT_LEAST_ZERO, math.inf]),
    (mo.expert_gate, "expert_lr_factor", [*AT_LEAST_ZERO, math.inf]),
    (mo.expert_gate, "entropy_threshold", [*AT_LEAST_ZERO, math.inf]),
    (mo.expert_gate, "update_frequency", POSITIVE_INTEGERS),
    (mo.smart_expert_gate, "gate_lr_factor", [*AT_LEAST_ZERO, math.inf]),
    (mo.smart_expert_gate, "expert_lr_factor", [*AT_LEAST_ZERO, math.inf]),
    (mo.smart_expert_gate, "entropy_threshold", [*AT_LEAST_ZERO, math.inf]),
    (mo.smart_expert_gate, "entropy_adjustment_factor", [*AT_LEAST_ZERO, math.inf]),
    (mo.smart_expert_gate, "sparsity_target", SHARES),
    (mo.smart_expert_gate, "sparsity_tolerance", SHARES),
    (mo.smart_expert_gate, "specialization_bonus", [*AT_LEAST_ZERO, math.inf]),
    (mo.smart_expert_gate, "update_frequency", POSITIVE_INTEGERS),
    (mo.smart_expert_gate, "specialization_threshold", SHARES),
    *(
        (make, name, values)
        for make in (mo.plateau, mo.advanced_plateau)
        for name, values in {
            "rtol": [*AT_LEAST_ZERO, math.inf],
            "atol": [*AT_LEAST_ZERO, math.inf],
            "cooldown": NOT_NEGATIVE,
            "smoothing": SMOOTHINGS,
        }.items()
    ),
    *(
        (make, "mode", MODES)
        for make in (mo.plateau, mo.advanced_plateau, mo.trend_plateau, mo.greedy)
    ),
    *(
        (make, name, values)
        for make in (mo.trend_plateau, mo.greedy)
        for name, values in {
            "window": [2, 7, *POSITIVE_INTEGERS],
            "significance": OPEN_SHARES,
            "cooldown": NOT_NEGATIVE,
            "update_frequency": POSITIVE_INTEGERS,
        }.items()
    ),
    (mo.trend_plateau, "lr_factor", FACTORS),
    (mo.trend_plateau, "min_evidence", [7, *POSITIVE_INTEGERS]),
    (mo.trend_plateau, "min_lr", [*AT_LEAST_ZERO, math.inf]),
    (mo.greedy, "factor", FACTORS),
    (mo.greedy, "patience", NOT_NEGATIVE),
    (mo.greedy, "warmup", NOT_NEGATIVE),
    # Bounds in the wrong order cannot be given: 1 lies between them.
    (mo.greedy, "min_scale", [0.0, 1.1, -1.0, math.nan, None]),
    (mo.greedy, "max_scale", [0.9, math.inf, -1.0, math.nan, None]),
    *(
        (mo.policy_gradient, name, values)
        for name, values in {
            "update_frequency": POSITIVE_INTEGERS,
            "horizon": [value for value in POSITIVE_INTEGERS if value is not None],
            "lr_actions": ACTIONS,
            "wd_actions": ACTIONS,
            "gate_lr_actions": ACTIONS,
            "expert_lr_actions": ACTIONS,
            "policy_lr": [*AT_LEAST_ZERO, math.inf],
            "trust_region": [*AT_LEAST_ZERO, math.inf],
            "baseline_decay": [1.0, *SHARES],
            "trace_decay": [1.0, *SHARES],
            "min_scale": [0.0, 1.1, -1.0, math.nan, None],
            "max_scale": [0.9, math.inf, -1.0, math.nan, None],
            "seed": NOT_NEGATIVE,
        }.items()
    ),
    *(
        (make, name, FLAGS)
        for make in (mo.expert_gate, mo.smart_expert_gate)
        for name in ("normalized_entropy", "per_layer")
    ),
    *(
        (functools.partial(make, per_layer=True), "num_layers", POSITIVE_INTEGERS)
        for make in (mo.expert_gate, mo.smart_expert_gate, mo.guard_collapse)
    ),
]
spikes_held = functools.partial(mo.hold_spikes, mo.plateau())
spikes_skipped = functools.partial(mo.skip_spikes, optax.sgd(0.1))
BAD += [
    *(
        (make, name, values)
        for make in (spikes_held, spikes_skipped)
        for name, values in (
            ("window", [7, *POSITIVE_INTEGERS]),
            ("threshold", [0.0, *AT_LEAST_ZERO]),
            ("max_consecutive", POSITIVE_INTEGERS),
        )
    ),
    (spikes_skipped, "mode", ["MIN", None, True, 1]),
]
CASES = [(make, name, value) for make, name, values in BAD for value in values]


@pytest.mark.parametrize(("make", "name", "value"), CASES)
def test_bad_argument_is_named(make, name, value):
    with pytest.raises(ValueError, match=name) as error:
        make(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", ["lr_actions", "wd_actions", "gate_lr_actions"])
@pytest.mark.parametrize("value", ["0.7", math.nan, None, True, [0.7], 1j])
def test_an_action_that_is_no_number_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        mo.policy_gradient(**{name: (1.0, value)})


def test_traced_actions_are_an_error():
    with pytest.raises(ValueError, match=r"lr_actions.*traced"):
        jax.jit(lambda factor: mo.policy_gradient(lr_actions=(factor, 1.0)).init())(0.5)


@pytest.mark.parametrize("kind", [int, float, np.float32, np.float64, jnp.float32, np.asarray])
def test_numbers_of_all_kinds_are_taken(kind):
    mo.expert_gate(entropy_threshold=kind(1))
    mo.plateau(patience=kind(2))


@pytest.mark.parametrize("value", [0, 1, 5, 100.0, np.int64(3)])
def test_good_integers(value):
    assert _checks.integer("n", value, low=0) == value


def test_traced_arguments_can_be_mapped_over():
    """`vmap` over what is a number; out of range it is clipped, as the docstrings say."""

    def final_rate(patience, factor):
        strategy = mo.plateau(patience=patience, lr_factor=factor)
        state = strategy.init()
        for step in range(5):
            seen = {**row(step), "grad_norm": jnp.float32(1.0), "step": jnp.int32(step)}
            state = strategy.observe(state, seen)
        return strategy.apply(state, {"learning_rate": jnp.float32(1.0)})["learning_rate"]

    patience = jnp.array([1, 2, 4, 9, -3])
    factor = jnp.array([0.5, 0.1, 0.5, 0.5, 7.0], jnp.float32)
    rates = jax.jit(jax.vmap(final_rate))(patience, factor)
    np.testing.assert_allclose(rates, [1 / 16, 0.01, 0.5, 1.0, 1.0], rtol=1e-5)


def test_traced_window_is_an_error():
    with pytest.raises(ValueError, match=r"trend_window.*traced"):
        jax.jit(lambda n: mo.advanced_plateau(trend_window=n).init())(5)
    with pytest.raises(ValueError, match=r"window.*traced"):
        jax.jit(lambda n: mo.hold_spikes(mo.plateau(), window=n).init())(9)
