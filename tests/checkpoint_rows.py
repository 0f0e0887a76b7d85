"""What the suites of checkpoints save: each transformation of the table, and some more."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from table import BASE, STRATEGIES, TRANSFORMATIONS, injected, params

import meta_optax as mo


class Jitter(NamedTuple):
    """A state with a typed PRNG key, of a strategy of a user's own."""

    key: Any
    scale: Any


def jitter():
    """Draws a factor for the rate at every step."""

    def observe(state, metrics):
        key, draw = jax.random.split(state.key)
        better = metrics["value"] < 100.0
        return Jitter(key, jnp.where(better, jax.random.uniform(draw), 1.0).astype(jnp.float32))

    def apply(state, hyperparams):
        return {**hyperparams, "learning_rate": hyperparams["learning_rate"] * state.scale}

    return mo.MetaOptimizer(
        "jitter", lambda: Jitter(jax.random.key(0), jnp.ones([])), observe, apply, ("value",)
    )


def _noisy(learning_rate):
    return optax.chain(
        optax.add_noise(eta=0.01, gamma=0.55, key=jax.random.key(7)), optax.sgd(learning_rate)
    )


def _keyed(wrap=lambda meta: meta):
    return mo.inject_meta_hyperparams(optax.adamw, wrap(jitter()))(**BASE)


KEYED = {
    "key": _keyed,
    "key[chain]": lambda: _keyed(lambda m: mo.chain(mo.plateau(patience=1), m)),
    "key[every]": lambda: _keyed(lambda m: mo.every(2, m)),
    "key[bounded]": lambda: _keyed(lambda m: mo.bounded(m, learning_rate=(0.0, 1.0))),
    "key[log_only]": lambda: _keyed(mo.log_only),
    "key[with_decisions]": lambda: _keyed(lambda m: mo.with_decisions(m, 4)),
    "key[hold_spikes]": lambda: _keyed(lambda m: mo.hold_spikes(m, window=8)),
    "key[skip_spikes]": lambda: mo.skip_spikes(_keyed(), window=8),
    "key[scale_by_meta]": lambda: optax.chain(optax.adamw(0.1), mo.scale_by_meta(jitter())),
    "key[as_schedule]": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=mo.as_schedule(jitter(), 0.1)
    ),
    "noise": lambda: mo.inject_meta_hyperparams(_noisy, mo.plateau(patience=1))(learning_rate=0.1),
}
WRAPPED = {
    "MultiSteps": lambda: optax.MultiSteps(TRANSFORMATIONS["inject[plateau]"](), 2),
    "masked": lambda: optax.masked(
        TRANSFORMATIONS["inject[plateau]"](), {"dense": True, "experts": True, "router": False}
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(
        TRANSFORMATIONS["inject[with_decisions]"](), 3
    ),
    "partition": lambda: optax.partition(
        {"a": injected(STRATEGIES["plateau"]), "b": TRANSFORMATIONS["scale_by_plateau"]()},
        {"dense": "a", "experts": "b", "router": "b"},
    ),
    "adafactor": lambda: optax.chain(optax.adafactor(0.1), mo.scale_by_plateau(patience=1)),
}
ROWS = TRANSFORMATIONS | KEYED | WRAPPED
HALF = [name for name in ROWS if name in ("inject[with_decisions]", "skip_spikes[inject]", "key")]
NAMES = [*ROWS, *(f"{name}, bfloat16" for name in HALF)]


def start(name):
    base, _, dtype = name.partition(", ")
    return ROWS[base](), params(dtype or jnp.float32)
