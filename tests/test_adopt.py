"""`adopt`: control for runs that were begun without it, against those that go on without."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import LABELS, params

import meta_optax as mo

COSINE = optax.cosine_decay_schedule(0.1, 20)
BEFORE, AFTER = 5, 4


def _grads(step, p):
    return jax.tree.map(lambda x: (0.3 + 0.1 * step) * x, p)


def _update_of(tx):
    # A MultiSteps is no GradientTransformation, and takes extra arguments itself.
    return (tx if isinstance(tx, optax.MultiSteps) else optax.with_extra_args_support(tx)).update


def _run(tx, p, state, first, steps, **metrics):
    update = _update_of(tx)
    with jax.disable_jit():
        for step in range(first, first + steps):
            updates, state = update(_grads(step, p), state, p, **metrics)
            p = optax.apply_updates(p, updates)
    return p, state


def _idle(strategy=None):
    return mo.log_only(strategy or mo.plateau(patience=1))


# An injected b2 is a float32, and 1 - b2 of that is 5e-5 off what a plain AdamW computes with.
FLOATS = ("b1", "b2", "eps", "eps_root")


def _injected(factory=optax.adamw, static_args=FLOATS, **arguments):
    return mo.inject_meta_hyperparams(factory, _idle(), static_args)(**arguments)


def _scheduled(base, factory=optax.adamw, **arguments):
    return optax.inject_hyperparams(factory, FLOATS)(
        learning_rate=mo.as_schedule(_idle(), base), **arguments
    )


def _clipped(*links):
    return optax.chain(optax.clip_by_global_norm(1.0), *links)


ADAMW = {"learning_rate": 0.1, "weight_decay": 0.01}
INJECTED = optax.inject_hyperparams(optax.adamw, FLOATS)
# Each: the old transformation, and the new one that never acts.
CASES = {
    "plain": (lambda: optax.adamw(**ADAMW), lambda: _injected(**ADAMW)),
    "schedule": (
        lambda: optax.adamw(COSINE, weight_decay=0.01),
        lambda: _injected(learning_rate=COSINE, weight_decay=0.01),
    ),
    "inject": (lambda: INJECTED(**ADAMW), lambda: _injected(**ADAMW)),
    "inject, schedule": (
        lambda: INJECTED(learning_rate=COSINE, weight_decay=0.01),
        lambda: _injected(learning_rate=COSINE, weight_decay=0.01),
    ),
    "sgd": (
        lambda: optax.sgd(COSINE, momentum=0.9),
        lambda: _injected(optax.sgd, (), learning_rate=COSINE, momentum=0.9),
    ),
    "adafactor": (
        lambda: optax.adafactor(0.01),
        lambda: _injected(
            optax.adafactor,
            ("min_dim_size_to_factor", "decay_rate", "decay_offset", "clipping_threshold", "eps"),
            learning_rate=0.01,
        ),
    ),
    "a chain in the factory": (
        lambda: _clipped(optax.adamw(**ADAMW)),
        lambda: _injected(
            lambda learning_rate, weight_decay: _clipped(
                optax.adamw(learning_rate, weight_decay=weight_decay)
            ),
            (),
            **ADAMW,
        ),
    ),
    "scale behind": (
        lambda: optax.adamw(**ADAMW),
        lambda: optax.chain(optax.adamw(**ADAMW), mo.scale_by_meta(_idle())),
    ),
    "scale behind a schedule": (
        lambda: optax.adamw(COSINE),
        lambda: optax.chain(optax.adamw(COSINE), mo.scale_by_meta(_idle())),
    ),
    "scale in a chain": (
        lambda: _clipped(optax.adamw(COSINE)),
        lambda: _clipped(optax.adamw(COSINE), mo.scale_by_meta(_idle())),
    ),
    "scale behind a chain of one": (
        lambda: optax.chain(optax.adamw(**ADAMW)),
        lambda: optax.chain(optax.adamw(**ADAMW), mo.scale_by_meta(_idle())),
    ),
    "scale among the links": (
        lambda: optax.chain(optax.scale_by_adam(), optax.scale(-0.1)),
        lambda: optax.chain(optax.scale_by_adam(), mo.scale_by_meta(_idle()), optax.scale(-0.1)),
    ),
    "named chain": (
        lambda: optax.named_chain(("adam", optax.adam(0.1))),
        lambda: optax.named_chain(("adam", optax.adam(0.1)), ("m", mo.scale_by_meta(_idle()))),
    ),
    "masked scale": (
        lambda: optax.adamw(**ADAMW),
        lambda: optax.chain(
            optax.adamw(**ADAMW),
            optax.masked(mo.scale_by_meta(_idle()), dict.fromkeys(params(), True)),
        ),
    ),
    "as_schedule": (lambda: optax.adamw(**ADAMW), lambda: _scheduled(0.1, weight_decay=0.01)),
    "as_schedule, inject and schedule": (
        lambda: INJECTED(learning_rate=COSINE, weight_decay=0.01),
        lambda: _scheduled(COSINE, weight_decay=0.01),
    ),
    "groups": (
        lambda: optax.adamw(**ADAMW),
        lambda: _injected(mo.moe_partition(optax.adamw, LABELS), **ADAMW),
    ),
    "groups, inject and schedule": (
        lambda: INJECTED(learning_rate=COSINE, weight_decay=0.01),
        lambda: _injected(
            mo.moe_partition(optax.adamw, LABELS), learning_rate=COSINE, weight_decay=0.01
        ),
    ),
    "groups, as_schedule": (
        lambda: optax.adamw(**ADAMW),
        lambda: _scheduled(0.1, mo.moe_partition(optax.adamw, LABELS), weight_decay=0.01),
    ),
    "skip_spikes around": (
        lambda: optax.adamw(**ADAMW),
        lambda: mo.skip_spikes(_injected(**ADAMW)),
    ),
    "skip_spikes on both sides": (
        lambda: mo.skip_spikes(optax.adamw(**ADAMW)),
        lambda: mo.skip_spikes(_injected(**ADAMW)),
    ),
    "MultiSteps on both sides": (
        lambda: optax.MultiSteps(optax.adamw(**ADAMW), 2),
        lambda: optax.MultiSteps(_injected(**ADAMW), 2),
    ),
    "apply_if_finite around": (
        lambda: optax.adamw(COSINE),
        lambda: optax.apply_if_finite(_injected(learning_rate=COSINE), 3),
    ),
    "apply_if_finite on both sides": (
        lambda: optax.apply_if_finite(optax.adamw(COSINE), 3),
        lambda: optax.apply_if_finite(mo.skip_spikes(_injected(learning_rate=COSINE)), 3),
    ),
    "masked on both sides": (
        lambda: optax.masked(
            optax.adamw(**ADAMW), {"dense": True, "experts": True, "router": False}
        ),
        lambda: optax.masked(_injected(**ADAMW), {"dense": True, "experts": True, "router": False}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_as_it_would_have_gone(name):
    """To the bit: operation by operation, as XLA fuses a constant and a scalar differently."""
    old, new = (make() for make in CASES[name])
    p, state = _run(old, params(), old.init(params()), 0, BEFORE, value=jnp.float32(1.0))
    before = jax.tree.map(np.array, state)
    adopted = mo.adopt(state, new, p)
    chex.assert_trees_all_equal(before, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(adopted, new.init(p))
    expected, _ = _run(old, p, state, BEFORE, AFTER, value=jnp.float32(1.0))
    got, _ = _run(new, p, adopted, BEFORE, AFTER, value=jnp.float32(1.0))
    chex.assert_trees_all_equal(got, expected)
