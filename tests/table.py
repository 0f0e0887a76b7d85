"""What the suites know of each strategy and each transformation: a row each."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import meta_optax as mo

LABELS = {"dense": "dense", "experts": "expert", "router": "gate"}
BASE = {"learning_rate": 0.01, "weight_decay": 0.1}
# What the loss needs, and no factory takes.
FREE = {"aux_loss_weight": 0.01}
# The shape of each metric that a strategy of the table needs.
SHAPES = {"value": (), "grad_norm": (), "param_norm": (), "gate_entropy": (), "gate_sparsity": ()}
SHAPES |= {"expert_usage": (4,), "drop_fraction": (), "max_violation": (), "dead_experts": ()}
SHAPES |= {"load_entropy_normalized": (), "gate_entropy_normalized": ()}
# With labels of one layer, the rows that judge by layer have one.
LAYERS = 1
SHAPES |= {f"{name}_per_layer": (LAYERS, *shape) for name, shape in SHAPES.items()}


class Strategy(NamedTuple):
    """A strategy with its defaults, and one that decides as often as it can."""

    make: Callable[..., mo.MetaOptimizer]
    eager: Callable[[], mo.MetaOptimizer]
    grouped: bool = False
    layered: bool = False
    # Whether a reset keeps a part of its state: a log, the progress of a warm-up, windows.
    keeps: bool = False


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
        keeps=True,
    ),
    "plateau[smoothing]": Strategy(
        lambda: mo.plateau(smoothing=0.9, mode="max"),
        lambda: mo.plateau(patience=1, smoothing=2, cooldown=1, rtol=1e-3),
    ),
    "advanced_plateau[smoothing]": Strategy(
        lambda: mo.advanced_plateau(smoothing=10, mode="max"),
        lambda: mo.advanced_plateau(
            patience=1, warmup_steps=0, trend_window=2, smoothing=0.5, cooldown=2
        ),
    ),
    "trend_plateau": Strategy(
        mo.trend_plateau, lambda: mo.trend_plateau(window=8, significance=0.5, min_evidence=8)
    ),
    "greedy": Strategy(
        mo.greedy, lambda: mo.greedy(patience=0, window=8, significance=0.5, max_scale=1.0)
    ),
    "reinforce": Strategy(
        # Adam makes whole steps of rounding errors, so what compares ways to run has none.
        mo.reinforce,
        lambda: mo.reinforce(
            update_frequency=1, batch_size=8, lr_actions=(0.5, 0.7, 1), wd_actions=(0,)
        ),
    ),
    "policy_gradient": Strategy(
        lambda: mo.policy_gradient(lr_actions=(0.5, 0.7), horizon=100),
        lambda: mo.policy_gradient(update_frequency=1, lr_actions=(0.5, 0.7), wd_actions=(0.5,)),
    ),
    "policy_gradient[groups]": Strategy(
        mo.policy_gradient, lambda: mo.policy_gradient(update_frequency=1), grouped=True
    ),
    "learned": Strategy(lambda: mo.learned(horizon=100), lambda: mo.learned(update_frequency=1)),
    "smart_expert_gate": Strategy(mo.smart_expert_gate, mo.smart_expert_gate, grouped=True),
    "expert_gate[per_layer]": Strategy(
        lambda: mo.expert_gate(per_layer=True, num_layers=LAYERS),
        lambda: mo.expert_gate(per_layer=True, num_layers=LAYERS, normalized_entropy=True),
        grouped=True,
        layered=True,
    ),
    "smart_expert_gate[normalized]": Strategy(
        lambda: mo.smart_expert_gate(normalized_entropy=True),
        lambda: mo.smart_expert_gate(normalized_entropy=True, specialization_threshold=0.0),
        grouped=True,
    ),
    "smart_expert_gate[per_layer]": Strategy(
        lambda: mo.smart_expert_gate(per_layer=True, num_layers=LAYERS),
        lambda: mo.smart_expert_gate(per_layer=True, num_layers=LAYERS, normalized_entropy=True),
        grouped=True,
        layered=True,
    ),
    "adapt_aux_loss": Strategy(
        mo.adapt_aux_loss, lambda: mo.adapt_aux_loss(smoothing=0.0, factor=2.0)
    ),
    "guard_collapse": Strategy(
        mo.guard_collapse,
        lambda: mo.guard_collapse(patience=1, release_patience=1, smoothing=0.0),
        grouped=True,
    ),
    "guard_collapse[per_layer]": Strategy(
        lambda: mo.guard_collapse(per_layer=True, num_layers=LAYERS),
        lambda: mo.guard_collapse(
            per_layer=True, num_layers=LAYERS, patience=1, release_patience=1, smoothing=0.0
        ),
        grouped=True,
        layered=True,
    ),
    "custom": Strategy(lambda: mo.chain(custom()), lambda: mo.chain(custom())),
    "chain": Strategy(
        lambda: mo.chain(mo.advanced_plateau(), mo.smart_expert_gate()),
        lambda: mo.chain(mo.plateau(patience=1), mo.smart_expert_gate()),
        grouped=True,
    ),
    "every": Strategy(
        lambda: mo.every(3, mo.plateau()), lambda: mo.every(2, mo.plateau(patience=1))
    ),
    "every[signal]": Strategy(
        lambda: mo.every("is_validation", mo.plateau()),
        lambda: mo.every("is_validation", mo.plateau(patience=1)),
    ),
    "bounded": Strategy(
        lambda: mo.bounded(mo.plateau(), learning_rate=(1e-4, 1.0)),
        lambda: mo.bounded(mo.plateau(patience=1), learning_rate=(1e-4, 1.0)),
    ),
    "log_only": Strategy(
        lambda: mo.log_only(mo.plateau()), lambda: mo.log_only(mo.plateau(patience=1))
    ),
    "hold_spikes": Strategy(
        lambda: mo.hold_spikes(mo.advanced_plateau()),
        lambda: mo.hold_spikes(mo.plateau(patience=1), window=8, max_consecutive=1),
        keeps=True,
    ),
    "with_decisions": Strategy(
        lambda: mo.with_decisions(mo.chain(mo.advanced_plateau(), mo.smart_expert_gate())),
        lambda: mo.with_decisions(mo.chain(mo.plateau(patience=1), mo.expert_gate()), 3),
        grouped=True,
        keeps=True,
    ),
}


def factory(row: Strategy) -> Callable[..., Any]:
    """AdamW, with groups where the strategy sets rates of groups."""
    if not row.grouped:
        return optax.adamw
    return mo.moe_partition(optax.adamw, LABELS, num_layers=LAYERS if row.layered else None)


def injected(row: Strategy, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    make = mo.inject_meta_hyperparams(factory(row), row.eager(), free_hyperparams=FREE)
    return make(**{**BASE, **kwargs})


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
    "scale_by_expert_gate[per_layer]": lambda: optax.chain(
        optax.adamw(0.1), mo.scale_by_expert_gate(LABELS, per_layer=True, num_layers=LAYERS)
    ),
    "balance_router_bias": lambda: optax.chain(
        optax.adamw(0.1),
        optax.partition(
            {"dense": optax.identity(), "bias": mo.balance_router_bias()},
            {"dense": "dense", "experts": "dense", "router": "bias"},
        ),
    ),
    "as_schedule": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=mo.as_schedule(mo.plateau(patience=1), 0.1)
    ),
    "moe_partition": lambda: mo.moe_partition(optax.adamw, LABELS)(0.1),
    "skip_spikes": lambda: mo.skip_spikes(optax.adamw(0.1), window=8, max_consecutive=1),
    "multi_steps": lambda: mo.multi_steps(injected(STRATEGIES["plateau"]), 2, metrics=SHAPES),
    "multi_steps[skip]": lambda: mo.multi_steps(
        optax.chain(optax.clip(1.0), injected(STRATEGIES["smart_expert_gate"])),
        1,
        metrics=SHAPES,
        should_skip_update_fn=optax.skip_not_finite,
    ),
    "skip_spikes[inject]": lambda: mo.skip_spikes(injected(STRATEGIES["plateau"]), window=8),
}

# What holds for the transformations of this library alone: Optax's own injection lets updates
# leave in the dtype of a strong schedule, and a plain AdamW of a partition is Optax's throughout.
WITHOUT_HYPERPARAMS = ("moe_partition", "balance_router_bias", "skip_spikes")
KEEPS_DTYPE = [name for name in TRANSFORMATIONS if name != "as_schedule"]


def params(dtype: Any = jnp.float32) -> dict[str, Any]:
    return {name: jnp.linspace(0.5, 1.5, 4).astype(dtype) for name in LABELS}


def row(step: int = 0, *, value: float = 1.0) -> dict[str, Any]:
    """One step's metrics, as arrays."""
    load = {
        "gate_entropy": jnp.float32(0.4 if step % 2 else 1.2),
        "gate_entropy_normalized": jnp.float32(0.3 if step % 2 else 0.9),
        "gate_sparsity": jnp.float32(0.9),
        "expert_usage": jnp.array([0.9, 0.1, 0.0, 0.0], jnp.float32),
        "load_entropy_normalized": jnp.float32(0.2 if step % 2 else 1.0),
        "dead_experts": jnp.float32(0.5 if step % 2 else 0.0),
        "max_violation": jnp.float32(2.6 if step % 2 else 0.1),
        "drop_fraction": jnp.float32(0.0),
    }
    return {
        "value": jnp.float32(value),
        "grad_norm": jnp.float32(12.0 if step % 3 == 0 else 1.0),
        "param_norm": jnp.float32(1.0 + step),
        "is_validation": jnp.array(step % 2 == 0),
        **load,
        **{f"{name}_per_layer": jnp.stack([x] * LAYERS) for name, x in load.items()},
    }


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key, which has no numbers to compare."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(tree: Any) -> Any:
    """The tree with the numbers of keys in their place."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def finite_nonnegative(hyperparams: dict[str, Any]) -> bool:
    return all(math.isfinite(v) and v >= 0 for v in map(float, hyperparams.values()))
