"""Writes the checkpoints of tests/checkpoints, one of each layout of states.

With the meta_optax of the layout on the path, from the root of the repository:

    git worktree add ../layout1 4b09479  # layout 2: af0b463; layout 3: its own last commit
    PYTHONPATH=../layout1 python tests/write_layouts.py 1

It writes tests/checkpoints/layout_1.zip, an Orbax checkpoint of the states of several strategies
and ways to act after some steps, and layout_1.json: the hyperparameters of the steps after that and
the decisions of all, as that version made them. All arguments whose defaults may change are given.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

import meta_optax as mo

FOLDER = pathlib.Path(__file__).parent / "checkpoints"
LABELS = {"dense": "dense", "experts": "expert", "router": "gate"}
BEFORE, AFTER = 7, 8


def params():
    return {name: jnp.linspace(0.5, 1.5, 4) for name in LABELS}


def metrics(step):
    """A loss that falls, stands still and rises, and a router that wavers."""
    losses = [2.0, 1.5, 1.2, 1.2, 1.2, 1.25, 1.2, 1.1, 1.1, 1.15, 1.2, 1.3, 1.3, 1.2, 1.2]
    return {
        "value": jnp.float32(losses[step]),
        "grad_norm": jnp.float32(12.0 if step % 3 == 0 else 1.0),
        "param_norm": jnp.float32(1.0 + step),
        "gate_entropy": jnp.float32(0.4 if step % 2 else 1.2),
        "gate_entropy_normalized": jnp.float32(0.3 if step % 2 else 0.9),
        "gate_sparsity": jnp.float32(0.9 if step < 9 else 0.5),
        "expert_usage": jnp.array([0.97, 0.01, 0.01, 0.01] if step > 4 else [0.25] * 4),
        "load_entropy_normalized": jnp.float32(0.2 if step % 4 > 1 else 1.0),
        "dead_experts": jnp.float32(0.0),
        "max_violation": jnp.float32(2.6 if step % 4 > 1 else 0.1),
        "drop_fraction": jnp.float32(0.3 if step % 2 else 0.0),
    }


def _plateau():
    return mo.plateau(
        patience=2,
        lr_factor=0.5,
        min_lr=1e-6,
        wd_increase_factor=1.1,
        max_weight_decay_growth=10.0,
        update_frequency=1,
    )


def _advanced():
    return mo.advanced_plateau(
        patience=2,
        lr_factor=0.5,
        min_lr=1e-6,
        grad_norm_threshold=10.0,
        weight_decay_factor=1.5,
        weight_norm_threshold=0.5,
        warmup_steps=3,
        trend_window=3,
        update_frequency=1,
        rearm_trend=True,
        max_weight_decay_growth=10.0,
    )


def _gate():
    return mo.expert_gate(
        gate_lr_factor=0.1, expert_lr_factor=1.0, entropy_threshold=0.8, update_frequency=1
    )


def _smart():
    return mo.smart_expert_gate(
        gate_lr_factor=0.1,
        expert_lr_factor=1.0,
        entropy_threshold=0.8,
        entropy_adjustment_factor=0.5,
        sparsity_target=0.7,
        sparsity_tolerance=0.1,
        specialization_bonus=1.2,
        update_frequency=1,
    )


def _adamw(meta, **arguments):
    return mo.inject_meta_hyperparams(optax.adamw, meta)(
        **{"learning_rate": 0.01, "weight_decay": 0.1, **arguments}
    )


def _groups(meta):
    factory = mo.moe_partition(optax.adamw, LABELS)
    return mo.inject_meta_hyperparams(factory, meta)(learning_rate=0.01, weight_decay=0.1)


def _first():
    """What layout 1 had."""
    cosine = optax.cosine_decay_schedule(0.1, 100)
    return {
        "plateau": _adamw(_plateau()),
        "plateau, schedule": _adamw(_plateau(), learning_rate=cosine),
        "advanced_plateau": _adamw(_advanced()),
        "expert_gate": _groups(_gate()),
        "smart_expert_gate": _groups(_smart()),
        "with_decisions": _groups(mo.with_decisions(mo.chain(_advanced(), _smart()), 32)),
        "every, bounded": _adamw(
            mo.with_decisions(mo.every(2, mo.bounded(_plateau(), learning_rate=(1e-4, 1.0))), 8)
        ),
        "log_only": _adamw(mo.log_only(_plateau())),
        "scale_by_meta": optax.chain(
            optax.adamw(0.1), mo.scale_by_meta(mo.with_decisions(_advanced(), 32))
        ),
        "scale_by_smart": optax.chain(optax.adamw(0.1), mo.scale_by_meta(_smart(), LABELS)),
        "as_schedule": optax.inject_hyperparams(optax.adamw)(
            learning_rate=mo.as_schedule(mo.with_decisions(_plateau(), 8), 0.1)
        ),
        "MultiSteps": optax.MultiSteps(_adamw(mo.with_decisions(_plateau(), 8)), 2),
    }


def _second():
    """What layout 2 added."""
    guard = mo.guard_collapse(
        load_entropy=(0.7, 0.9),
        dead_experts=(0.3, 0.15),
        max_violation=(1.0, 0.5),
        undecided_entropy=0.7,
        smoothing=0.0,
        patience=1,
        release_patience=1,
        gate_lr_factor=0.1,
        aux_loss_weight=0.3,
        balance_update_rate=1e-3,
        update_frequency=1,
    )
    adapt = mo.adapt_aux_loss(
        drop_band=(0.01, 0.05),
        violation_band=(0.5, 1.0),
        factor=2.0,
        smoothing=0.0,
        min_weight=1e-4,
        max_weight=1e-1,
        update_frequency=1,
    )
    weight = mo.inject_meta_hyperparams(
        optax.adamw, adapt, free_hyperparams={"aux_loss_weight": 0.01}
    )
    balance = {"dense": optax.adamw(0.1), "bias": mo.balance_router_bias(1e-3)}
    where = {"dense": "dense", "experts": "dense", "router": "bias"}
    return {
        "adapt_aux_loss": weight(learning_rate=0.01),
        "guard_collapse": _groups(mo.with_decisions(guard, 16)),
        "balance_router_bias": optax.chain(
            optax.partition(balance, where), mo.scale_by_meta(_plateau())
        ),
    }


def _third():
    """What layout 3 added."""
    trend = mo.trend_plateau(window=8, significance=0.5, min_evidence=8)
    greedy = mo.greedy(patience=0, window=8, significance=0.5, max_scale=1.0)
    smooth = mo.plateau(patience=1, smoothing=0.5, cooldown=1, rtol=1e-3)
    return {
        "trend_plateau": _adamw(mo.with_decisions(trend, 16)),
        "greedy": _adamw(mo.with_decisions(greedy, 16)),
        "smoothing": _adamw(mo.with_decisions(smooth, 16)),
        "hold_spikes": _adamw(mo.hold_spikes(_advanced(), window=8)),
        "skip_spikes": mo.skip_spikes(_adamw(_plateau()), window=8),
    }


def transformations(layout):
    """The rows of a layout, each with all its arguments."""
    added = [_first, _second, _third][:layout]
    return {name: tx for rows in added for name, tx in rows().items()}


def run(tx, p, state, steps):
    """Some steps, and the hyperparameters that each used."""
    update = jax.jit(tx.update)
    used = []
    for step in steps:
        updates, state = update(jax.tree.map(lambda x: 0.3 * x, p), state, p, **metrics(step))
        p = optax.apply_updates(p, updates)
        used.append({name: float(v) for name, v in mo.read_hyperparams(state).items()})
    return p, state, used


def decisions(state):
    """The decisions of a state that logs them, as JSON has them."""
    try:
        return [list(decision) for decision in mo.read_decisions(state)]
    except ValueError:
        return None


def main():
    layout = int(sys.argv[1])
    saved, after = {}, {}
    for name, tx in transformations(layout).items():
        p, state, _ = run(tx, params(), tx.init(params()), range(BEFORE))
        saved[name] = {"params": p, "state": state}
        p, state, used = run(tx, p, state, range(BEFORE, BEFORE + AFTER))
        ends = {k: np.asarray(v).tolist() for k, v in p.items()}
        after[name] = {"hyperparams": used, "decisions": decisions(state), "params": ends}
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        ocp.save(f"{folder}/checkpoint", saved)
        shutil.make_archive(str(FOLDER / f"layout_{layout}"), "zip", folder)
    (FOLDER / f"layout_{layout}.json").write_text(json.dumps(after, indent=1) + "\n")


if __name__ == "__main__":
    main()
