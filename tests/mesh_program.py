"""Trains the example's model on a mesh for some steps, and prints its decisions as JSON.

    python tests/mesh_program.py --mesh data=2,expert=4
    python tests/mesh_program.py --mesh data=2,expert=4 --processes 2 --process 0 --port 12345

Of several processes, each makes its own rows of every batch and holds four of the devices.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import command_line
import jax
import numpy as np
import optax

STEPS, ROWS = 30, 24
DEVICES_PER_PROCESS = 4


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", type=command_line.mesh_sizes("data", "fsdp", "expert"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--seen", type=int, help="show the controller this half's loss alone")
    return parser.parse_args()


def make_optimizer(mo):
    plateau = mo.advanced_plateau(warmup_steps=6, patience=2, trend_window=3, min_lr=1e-4)
    gate = mo.smart_expert_gate(gate_lr_factor=0.5, update_frequency=5)
    balance = mo.adapt_aux_loss(update_frequency=5)
    strategy = mo.with_decisions(mo.chain(plateau, gate, balance), capacity=256)
    controlled = mo.inject_meta_hyperparams(
        mo.moe_partition(optax.adamw, mo.label_moe_params),
        strategy,
        free_hyperparams={"aux_loss_weight": 0.01},
    )
    return controlled(learning_rate=6e-3, weight_decay=0.01)


class Quiet:
    def announce(self, text):
        pass

    def check(self):
        pass


def half(batch, index):
    """The rows that one of two processes holds."""
    return {name: rows[index * ROWS // 2 : (index + 1) * ROWS // 2] for name, rows in batch.items()}


def main():
    arguments = parse()
    if arguments.processes > 1:
        jax.config.update("jax_num_cpu_devices", DEVICES_PER_PROCESS)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{arguments.port}", arguments.processes, arguments.process
        )
    import meshes
    import train_moe
    import training
    from corpora import load_corpora, training_batches
    from flax import nnx
    from moe_model import ModelConfig, MoeTransformer

    import meta_optax as mo

    # Nearly the loss of each batch alone: decisions that scatter are decisions that can differ.
    training.SMOOTHING = 0.2
    config = ModelConfig(length=16, width=16, heads=2, layers=1, expert_width=32, block=16)

    def loss_fn(graphdef, params, batch, weight):
        loss, statistics = train_moe.loss_and_statistics(graphdef, params, batch, weight)
        if arguments.seen is not None:
            seen = half(batch, arguments.seen)
            own = train_moe.loss_and_statistics(graphdef, params, seen)[1]["loss"]
            statistics = {**statistics, "loss": own}
        return loss, statistics

    def share(batch):
        return half(batch, arguments.process) if arguments.processes > 1 else batch

    batches = training_batches(load_corpora(config.length, 32), ROWS, seed=0)
    with meshes.use_mesh(arguments.mesh):
        setup = training.set_up(
            lambda: MoeTransformer(config, nnx.Rngs(0)),
            loss_fn,
            make_optimizer(mo),
            guesses=256,
            example=share(next(batches)),
            monitor=Quiet(),
            stop=Quiet(),
        )
        state, losses = setup.state, []
        for _ in range(STEPS):
            state, metrics = setup.step_fn(state, meshes.place_rows(share(next(batches))))
            losses.append(float(np.asarray(metrics["loss"])))
    decisions = [
        [d.step, d.hyperparam, d.reason, d.old, d.new, d.value]
        for d in mo.read_decisions(state.opt_state)
    ]
    whole = all(
        leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state.meta_state)
    )
    found = {"devices": jax.device_count(), "local": jax.local_device_count(), "whole": whole}
    print(json.dumps({**found, "losses": losses, "decisions": decisions}), flush=True)


if __name__ == "__main__":
    main()
