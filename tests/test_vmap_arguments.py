"""Every argument of a strategy that is a number may be mapped over; what is structural says so."""

import functools
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import BASE, FREE, row

import meta_optax as mo

STEPS = 160
GATES = {"normalized_entropy": True}
# The plateaus decide often, so that each argument has something to change.
QUICK = {"patience": 2}
TREND = {"window": 8, "significance": 0.5}


class Case(NamedTuple):
    """A factory with an argument that is a number, two values of it, and the other arguments."""

    factory: Any
    name: str
    values: tuple[Any, Any]
    others: dict[str, Any]

    def make(self, value):
        return self.factory(**{**self.others, self.name: value})


def _cases():
    plateau = {
        "patience": (1, 3),
        "lr_factor": (0.5, 0.8),
        "min_lr": (0.0, 0.004),
        "max_weight_decay_growth": (1.2, 10.0),
        "update_frequency": (1, 3),
        "rtol": (0.0, 0.3),
        "atol": (0.0, 0.4),
        "cooldown": (0, 2),
    }
    advanced = {
        **plateau,
        "grad_norm_threshold": (1.5, 20.0),
        "weight_decay_factor": (1.2, 1.5),
        "weight_norm_threshold": (0.1, 5.0),
        "warmup_steps": (0, 5),
    }
    trend = {
        "lr_factor": (0.3, 0.8),
        "min_lr": (0.0, 0.009),
        "cooldown": (0, 5),
        "min_evidence": (8, 200),
        "update_frequency": (1, 2),
    }
    greedy = {
        "factor": (0.5, 0.9),
        "patience": (0, 3),
        "warmup": (0, 20),
        "cooldown": (0, 20),
        "max_scale": (1.0, 3.0),
        "significance": (0.2, 0.9),
        "update_frequency": (1, 2),
    }
    gate = {
        "gate_lr_factor": (0.1, 0.3),
        "expert_lr_factor": (1.0, 2.0),
        "entropy_threshold": (0.1, 0.8),
        "update_frequency": (1, 2),
    }
    smart = {
        **gate,
        "entropy_adjustment_factor": (0.2, 0.9),
        "sparsity_target": (0.2, 0.9),
        "sparsity_tolerance": (0.05, 0.5),
        "specialization_bonus": (1.1, 1.5),
    }
    aux = {
        "factor": (1.1, 2.0),
        "smoothing": (0.0, 0.9),
        "min_weight": (1e-4, 0.009),
        "max_weight": (0.011, 0.5),
        "update_frequency": (1, 2),
        "drop_band": ((0.0, 0.1), (0.2, 0.3)),
        "violation_band": ((0.0, 0.05), (2.0, 3.0)),
    }
    guard = {
        "undecided_entropy": (0.1, 0.95),
        "smoothing": (0.0, 0.8),
        "patience": (1, 3),
        "release_patience": (1, 3),
        "gate_lr_factor": (0.1, 0.5),
        "aux_loss_weight": (0.1, 0.3),
        "balance_update_rate": (0.0, 1.0),
        "update_frequency": (1, 2),
    }
    guarded = {"patience": 1, "release_patience": 1, "smoothing": 0.0}
    # Each pair by itself, the other two causes being out of reach.
    causes = {
        "load_entropy": ((0.1, 0.9), (0.7, 0.9)),
        "dead_experts": ((0.4, 0.1), (0.9, 0.6)),
        "max_violation": ((1.0, 0.5), (9.0, 8.0)),
    }
    never = {"load_entropy": (0.0, 0.0), "dead_experts": (1.0, 1.0), "max_violation": (99.0, 99.0)}
    table = [
        (mo.plateau, {**plateau, "wd_increase_factor": (1.1, 2.0)}, QUICK),
        (mo.advanced_plateau, advanced, {**QUICK, "warmup_steps": 2}),
        (mo.trend_plateau, trend, {**TREND, "min_evidence": 8}),
        (mo.trend_plateau, {"significance": (1e-9, 0.9)}, {"window": 32, "min_evidence": 32}),
        (mo.greedy, greedy, {**TREND, "max_scale": 2.0}),
        (mo.greedy, {"min_scale": (0.1, 0.9)}, {**TREND, "factor": 0.5}),
        (mo.expert_gate, gate, GATES),
        (mo.smart_expert_gate, smart, {}),
        (mo.smart_expert_gate, {"specialization_threshold": (0.0, 0.9)}, GATES),
        (mo.adapt_aux_loss, aux, {"smoothing": 0.0}),
        (mo.guard_collapse, guard, guarded),
        (mo.guard_collapse, causes, guarded | never),
        (_every, {"n": (1, 3)}, {}),
        (_bounded, {"learning_rate": ((1e-4, 0.004), (0.006, 0.008))}, {}),
        (_hold_spikes, {"threshold": (1.0, 8.0), "max_consecutive": (1, 3)}, {}),
    ]
    return [
        Case(factory, name, values, {k: v for k, v in others.items() if k != name})
        for factory, arguments, others in table
        for name, values in arguments.items()
    ]


def _every(*, n):
    return mo.every(n, mo.plateau(patience=1))


def _bounded(*, learning_rate):
    return mo.bounded(mo.plateau(patience=1), learning_rate=learning_rate)


def _hold_spikes(*, threshold=1.0, max_consecutive=5):
    inner = mo.plateau(patience=1)
    return mo.hold_spikes(inner, window=8, threshold=threshold, max_consecutive=max_consecutive)


CASES = _cases()
STRUCTURAL = [
    *[(f, name) for f in (mo.plateau, mo.advanced_plateau) for name in ("smoothing", "mode")],
    (mo.advanced_plateau, "trend_window"),
    (mo.advanced_plateau, "rearm_trend"),
    *[(f, name) for f in (mo.trend_plateau, mo.greedy) for name in ("window", "mode")],
    *[
        (f, name)
        for f in (mo.expert_gate, mo.smart_expert_gate)
        for name in ("normalized_entropy", "per_layer", "num_layers")
    ],
    (mo.guard_collapse, "per_layer"),
    (mo.guard_collapse, "num_layers"),
]
NEITHER = {(mo.adapt_aux_loss, "hyperparam")}


def _loss(step):
    """A fall with a spike, a plateau, a rise, and a fall again, with noise enough for tests."""
    falls = jnp.maximum(2.0 - 0.04 * step, 0.8)
    rises = jnp.clip(step - 60.0, 0.0, 40.0) - 1.3 * jnp.clip(step - 120.0, 0.0, 40.0)
    spike = jnp.where(step == 9, 2.0, 0.0)
    return falls + 0.03 * rises + spike + 0.05 * jnp.sin(1000.0 * step * step)


@functools.cache
def _metrics():
    """All steps' metrics, made once: a router that is sick, and healthy from the middle on."""
    rows = [row(step) for step in range(STEPS)]
    metrics = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    late = np.arange(STEPS) > STEPS // 2
    for name, good in (("load_entropy_normalized", 1.0), ("dead_experts", 0.0)):
        metrics[name] = np.where(late, good, metrics[name] * 0.5 + 0.3).astype(np.float32)
    metrics["max_violation"] = np.where(late, 0.1, 2.0).astype(np.float32)
    metrics["expert_usage"] = np.where(late[:, None], np.float32(0.25), metrics["expert_usage"])
    metrics["value"] = np.asarray(_loss(jnp.arange(STEPS, dtype=jnp.float32)))
    return metrics


def _used(meta):
    """What is made of the base values at each step of a run."""
    base = {k: jnp.float32(v) for k, v in (BASE | FREE | {"balance_update_rate": 0.01}).items()}

    def step(state, inputs):
        i, seen = inputs
        current = meta.apply(state, base)
        prefixed = {f"base_{k}": v for k, v in base.items()}
        state = meta.observe(state, {**seen, **current, **prefixed, "step": i})
        return state, meta.apply(state, base)

    return jax.lax.scan(step, meta.init(), (jnp.arange(STEPS, dtype=jnp.int32), _metrics()))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.factory.__name__}-{c.name}")
def test_two_values_at_once_are_two_runs(case):
    _metrics()
    both = jax.tree.map(lambda *leaves: jnp.asarray(leaves), *case.values)
    mapped = jax.jit(jax.vmap(lambda value: _used(case.make(value))))(both)
    alone = [jax.jit(lambda value=value: _used(case.make(value)))() for value in case.values]
    for i, expected in enumerate(alone):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], mapped), expected, rtol=1e-5)
    one, other = (jax.tree.leaves(used) for _, used in alone)
    assert any((a != b).any() for a, b in zip(one, other, strict=True)), "both values do the same"


@pytest.mark.parametrize(
    ("factory", "name"), STRUCTURAL, ids=[f"{f.__name__}-{n}" for f, n in STRUCTURAL]
)
def test_what_is_structural_says_so_when_it_is_traced(factory, name):
    others = {"per_layer": True} if name == "num_layers" else {}

    def build(value):
        factory(**others, **{name: value})
        return value

    with pytest.raises(ValueError, match=name):
        jax.vmap(build)(jnp.array([2, 3]))


@pytest.mark.parametrize("name", ["window", "capacity"])
def test_what_is_structural_in_a_combinator_says_so(name):
    combinator = {"window": mo.hold_spikes, "capacity": mo.with_decisions}[name]

    def build(value):
        combinator(mo.plateau(), **{name: value})
        return value

    with pytest.raises(ValueError, match=f"{name} .*must not be traced"):
        jax.vmap(build)(jnp.array([8, 9]))


def test_no_argument_of_a_strategy_is_left_out():
    told = {(c.factory, c.name) for c in CASES} | set(STRUCTURAL) | NEITHER
    strategies = (mo.plateau, mo.advanced_plateau, mo.trend_plateau, mo.greedy)
    strategies += (mo.expert_gate, mo.smart_expert_gate, mo.adapt_aux_loss, mo.guard_collapse)
    for factory in strategies:
        for name in inspect.signature(factory).parameters:
            assert (factory, name) in told, (factory.__name__, name)
