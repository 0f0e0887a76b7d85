"""What the suites know of each strategy and each transformation: a row each."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import meta_optax as mo

LABELS = {"dense": "dense", "experts": "expert", "router": "gate"}
BASE = {"learning_rate": 0.01, "weight_decay": 0.1}
# The shape of each metric that a strategy of the table needs.
SHAPES = {"value": (), "grad_norm": (), "param_norm": (), "gate_entropy": (), "gate_sparsity": ()}
SHAPES |= {"expert_usage": (4,)}


class Strategy(NamedTuple):
    """A strategy with its defaults, and one that decides as often as it can."""

    make: Callable[..., mo.MetaOptimizer]
    eager: Callable[[], mo.MetaOptimizer]
    grouped: bool = False


def custom() -> mo.MetaOptimizer:
    """A strategy of a user's own: no count of non-finite metrics, no check, no care."""

    def apply(state, hyperparams):
        rate = hyperparams["learning_rate"] * jnp.exp(-state)
        return {**hyperparams, "learning_rate": rate}

    return mo.MetaOptimizer(
        name="custom",
        init=lambda: jnp.zeros([], jnp.float32),
        observe=lambda state, metrics: state + 0.1 * metrics["value"].astype(jnp.float32),
        apply=apply,
        metrics=("value",),
    )


STRATEGIES = {
    "plateau": Strategy(mo.plateau, lambda: mo.plateau(patience=1)),
    "expert_gate": Strategy(mo.expert_gate, mo.expert_gate, grouped=True),
    "advanced_plateau": Strategy(
        mo.advanced_plateau,
        lambda: mo.advanced_plateau(patience=1, warmup_steps=2, trend_window=2),
    ),
    "smart_expert_gate": Strategy(mo.smart_expert_gate, mo.smart_expert_gate, grouped=True),
    "custom": Strategy(lambda: mo.chain(custom()), lambda: mo.chain(custom())),
    "chain": Strategy(
        lambda: mo.chain(mo.advanced_plateau(), mo.smart_expert_gate()),
        lambda: mo.chain(mo.plateau(patience=1), mo.smart_expert_gate()),
        grouped=True,
    ),
    "every": Strategy(
        lambda: mo.every(3, mo.plateau()), lambda: mo.every(2, mo.plateau(patience=1))
    ),
    "bounded": Strategy(
        lambda: mo.bounded(mo.plateau(), learning_rate=(1e-4, 1.0)),
        lambda: mo.bounded(mo.plateau(patience=1), learning_rate=(1e-4, 1.0)),
    ),
    "log_only": Strategy(
        lambda: mo.log_only(mo.plateau()), lambda: mo.log_only(mo.plateau(patience=1))
    ),
    "with_decisions": Strategy(
        lambda: mo.with_decisions(mo.chain(mo.advanced_plateau(), mo.smart_expert_gate())),
        lambda: mo.with_decisions(mo.chain(mo.plateau(patience=1), mo.expert_gate()), 3),
        grouped=True,
    ),
}


def factory(row: Strategy) -> Callable[..., Any]:
    """AdamW, with groups where the strategy sets rates of groups."""
    return mo.moe_partition(optax.adamw, LABELS) if row.grouped else optax.adamw


def injected(row: Strategy, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    return mo.inject_meta_hyperparams(factory(row), row.eager())(**{**BASE, **kwargs})


TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    **{f"inject[{name}]": (lambda row=row: injected(row)) for name, row in STRATEGIES.items()},
    "inject[raw custom]": lambda: mo.inject_meta_hyperparams(optax.adamw, custom())(**BASE),
    "inject[schedule]": lambda: injected(
        STRATEGIES["plateau"], learning_rate=optax.cosine_decay_schedule(0.1, 100)
    ),
    "scale_by_meta[custom]": lambda: optax.chain(optax.adamw(0.1), mo.scale_by_meta(custom())),
    "scale_by_plateau": lambda: optax.chain(optax.adamw(0.1), mo.scale_by_plateau(patience=1)),
    "scale_by_advanced_plateau": lambda: optax.chain(
        optax.adamw(0.1), mo.scale_by_advanced_plateau(patience=1, warmup_steps=2)
    ),
    "scale_by_expert_gate": lambda: optax.chain(optax.adamw(0.1), mo.scale_by_expert_gate(LABELS)),
    "scale_by_smart_expert_gate": lambda: optax.chain(
        optax.adamw(0.1), mo.scale_by_smart_expert_gate(LABELS)
    ),
    "as_schedule": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=mo.as_schedule(mo.plateau(patience=1), 0.1)
    ),
    "moe_partition": lambda: mo.moe_partition(optax.adamw, LABELS)(0.1),
}

# What holds for the transformations of this library alone: Optax's own injection lets updates
# leave in the dtype of a strong schedule, and a plain AdamW of a partition is Optax's throughout.
KEEPS_DTYPE = [name for name in TRANSFORMATIONS if name != "as_schedule"]


def params(dtype: Any = jnp.float32) -> dict[str, Any]:
    return {name: jnp.linspace(0.5, 1.5, 4).astype(dtype) for name in LABELS}


def row(step: int = 0, *, value: float = 1.0) -> dict[str, Any]:
    """One step's metrics, as arrays."""
    return {
        "value": jnp.float32(value),
        "grad_norm": jnp.float32(12.0 if step % 3 == 0 else 1.0),
        "param_norm": jnp.float32(1.0 + step),
        "gate_entropy": jnp.float32(0.4 if step % 2 else 1.2),
        "gate_sparsity": jnp.float32(0.9),
        "expert_usage": jnp.array([0.9, 0.1, 0.0, 0.0], jnp.float32),
    }


def finite_nonnegative(hyperparams: dict[str, Any]) -> bool:
    return all(math.isfinite(v) and v >= 0 for v in map(float, hyperparams.values()))
