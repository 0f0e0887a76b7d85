"""Trains a mixture-of-experts language model under closed-loop control of its hyperparameters.

    python examples/train_moe.py                     # about two minutes on two CPU cores
    python examples/train_moe.py --steps 40 --plain  # a few seconds, to see that it runs

A byte-level transformer (8 experts a layer, 2 per token) learns Python code, English prose and
Unicode names, all read from the running Python itself. AdamW trains it in one compiled step;
`advanced_plateau` warms the learning rate up and cuts it when the smoothed loss stalls, and
`smart_expert_gate` sets the rates of routers and experts apart, from how the routers behave.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import command_line
from command_line import Arguments, StopRequest, UserError

with command_line.interruptible_imports():
    import jax
    import jax.numpy as jnp
    import meta_optax as mo
    import numpy as np
    import optax
    from corpora import (
        CORPORA,
        Batch,
        CorpusError,
        Split,
        held_out_batches,
        load_corpora,
        training_batches,
        unigram_bits,
    )
    from figures import draw_run
    from flax import nnx
    from jaxtyping import Array, Float, PyTree
    from moe_model import (
        ModelConfig,
        MoeTransformer,
        balance_loss,
        label_params,
        router_statistics,
    )
    from monitor import JsonLines, Monitor, write_json
    from report import format_bits, format_usage, versions

STEPS, OUT = 600, "runs/train_moe"
FILES = ("log.jsonl", "train_moe.png", "summary.json")

BATCH_SIZE = 18  # Six rows of each corpus.
HELD_OUT_CHUNKS = 360  # Of each corpus; a multiple of the batch size, so that all are used.
BALANCE_WEIGHT = 0.01
LOG_EVERY = 10
SMOOTHING = 0.98  # About fifty steps: a single batch's loss is ten times too noisy to judge by.

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01


class TrainState(NamedTuple):
    """All that a step reads and writes; its buffers are donated to the next one."""

    params: PyTree
    opt_state: optax.OptState
    smoothed_loss: Float[Array, ""]


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_optimizer() -> optax.GradientTransformationExtraArgs:
    """Returns AdamW, one each for routers, experts and the rest, under closed-loop control."""
    strategy = mo.chain(
        mo.advanced_plateau(warmup_steps=50, patience=3, trend_window=5, update_frequency=10),
        mo.smart_expert_gate(update_frequency=10),
    )
    controlled = mo.inject_meta_hyperparams(
        mo.moe_partition(optax.adamw, label_params),
        mo.with_decisions(strategy, capacity=512),
    )
    return controlled(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def loss_and_statistics(
    graphdef: nnx.GraphDef, params: PyTree, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the training loss, and what there is to say about a batch."""
    tokens = jnp.asarray(batch["tokens"]).astype(jnp.int32)
    logits, routing = nnx.merge(graphdef, params)(tokens[:, :-1])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    balance = balance_loss(routing)
    statistics = router_statistics(routing, batch["corpus"], len(CORPORA))
    loss = losses.mean()
    return loss + BALANCE_WEIGHT * balance, {"loss": loss, "balance_loss": balance, **statistics}


def train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, Array]]:
    """Makes one update, and shows the controller what it did to loss and routers."""
    differentiate = jax.grad(loss_and_statistics, argnums=1, has_aux=True)
    grads, metrics = differentiate(graphdef, state.params, batch)
    smoothed = SMOOTHING * state.smoothed_loss + (1 - SMOOTHING) * metrics["loss"]
    updates, opt_state = tx.update(
        grads,
        state.opt_state,
        state.params,
        value=smoothed,
        gate_entropy=metrics["gate_entropy"],
        gate_sparsity=metrics["gate_sparsity"],
        expert_usage=metrics["expert_usage"],
    )
    params = optax.apply_updates(state.params, updates)
    rates = {
        name: value
        for name, value in opt_state.hyperparams.items()
        if name.endswith(("learning_rate", "weight_decay"))
    }
    return TrainState(params, opt_state, smoothed), {**metrics, **rates, "smoothed_loss": smoothed}


class Recorder:
    """Fetches a logged step's metrics, one step late, and hands them to log and display.

    By then the device has the next step to work on, so that it never waits for the host.
    """

    def __init__(self, log: JsonLines, monitor: Monitor, tokens_per_step: int) -> None:
        """Starts with nothing kept."""
        self._log, self._monitor = log, monitor
        self._tokens_per_step = tokens_per_step
        self._kept: tuple[int, dict[str, Array]] | None = None
        self._fetched: tuple[int, float] | None = None

    def keep(self, step: int, metrics: dict[str, Array]) -> None:
        """Remembers the metrics of a step to be logged."""
        self._kept = step, metrics

    def flush(self) -> None:
        """Fetches, logs and shows what is kept."""
        if self._kept is None:
            return
        (step, metrics), self._kept = self._kept, None
        values = jax.device_get(metrics)
        record = {"step": step, **values, "tokens_per_second": self._speed(step)}
        self._log.write(record)
        self._monitor.show(step + 1, describe(record))

    def _speed(self, step: int) -> float | None:
        """Returns the tokens per second since the last fetch; nothing is known at the first."""
        now, last = time.perf_counter(), self._fetched
        self._fetched = step, now
        return last and (step - last[0]) * self._tokens_per_step / (now - last[1])


def describe(record: dict[str, Any]) -> dict[str, str]:
    """Returns what a person wants to see of a record while waiting."""
    speed = record["tokens_per_second"]
    return {
        "loss": f"{record['loss']:.3f}",
        "dense": f"{record['learning_rate']:.1e}",
        "gate": f"{record['gate_learning_rate']:.1e}",
        "expert": f"{record['expert_learning_rate']:.1e}",
        "entropy": f"{record['gate_entropy']:.2f}",
        "tok/s": f"{speed:,.0f}" if speed else "-",
    }


def train(
    step_fn: TrainStep,
    state: TrainState,
    batches: Iterator[Batch],
    steps: int,
    recorder: Recorder,
    stop: StopRequest,
) -> tuple[TrainState, int]:
    """Runs the steps, or as many as there are until the end is asked for.

    Returns:
        The last state, and how many steps were made.
    """
    done = 0
    while done < steps and not stop.exit_code:
        state, metrics = step_fn(state, next(batches))
        recorder.flush()
        if done % LOG_EVERY == 0 or done == steps - 1 or stop.exit_code:
            recorder.keep(done, metrics)
        done += 1
    recorder.flush()
    return state, done


class Evaluation(NamedTuple):
    """What the model is worth on bytes it never saw."""

    bits: dict[str, float]
    usage: np.ndarray


def evaluate(
    graphdef: nnx.GraphDef, params: PyTree, splits: dict[str, Split], stop: StopRequest
) -> Evaluation | None:
    """Measures bits per held-out byte, and who serves which corpus; None if the end is asked for."""
    batches = held_out_batches(splits, BATCH_SIZE)
    measure = jax.jit(functools.partial(loss_and_statistics, graphdef))
    losses, usage = [], []
    for batch in batches:
        if stop.exit_code:
            return None
        statistics = jax.device_get(measure(params, batch)[1])
        losses.append(statistics["loss"])
        usage.append(statistics["corpus_usage"])
    # Each batch is of one corpus, and each corpus has as many batches as the next.
    means = np.reshape(losses, (len(CORPORA), -1)).mean(axis=1) / np.log(2)
    bits = {"overall": float(means.mean()), **dict(zip(CORPORA, means.tolist(), strict=True))}
    return Evaluation(bits, np.sum(usage, axis=0) * len(CORPORA) / len(batches))


class Outcome(NamedTuple):
    """All that the report is made of."""

    steps: int
    compile_seconds: float
    train_seconds: float
    opt_state: optax.OptState
    evaluation: Evaluation | None
    baseline: dict[str, float]


def run(
    arguments: Arguments, log: JsonLines, stop: StopRequest, config: ModelConfig = ModelConfig()
) -> Outcome:
    """Trains and evaluates under a live display."""
    with Monitor(arguments.steps, stop, plain=arguments.plain) as monitor:
        monitor.announce("reading the corpora")
        splits = load_corpora(config.length, HELD_OUT_CHUNKS)
        batches = training_batches(splits, BATCH_SIZE, arguments.seed)
        tx = make_optimizer()
        graphdef, params = nnx.split(MoeTransformer(config, nnx.Rngs(arguments.seed)), nnx.Param)
        # The loss of guessing is where the smoothed one starts, so it needs no correction.
        state = TrainState(params, tx.init(params), jnp.log(jnp.float32(256)))
        monitor.announce("compiling the step")
        begin = time.perf_counter()
        # Compiled ahead of time: another shape or dtype is an error then, not a second compile.
        jitted = jax.jit(functools.partial(train_step, graphdef, tx), donate_argnums=0)
        step_fn = jitted.lower(state, next(batches)).compile()
        compiled = time.perf_counter()
        monitor.start()
        recorder = Recorder(log, monitor, BATCH_SIZE * config.length)
        state, done = train(step_fn, state, batches, arguments.steps, recorder, stop)
        trained = time.perf_counter()
        monitor.announce("evaluating on held-out bytes")
        evaluation = evaluate(graphdef, state.params, splits, stop)
    return Outcome(
        steps=done,
        compile_seconds=compiled - begin,
        train_seconds=trained - compiled,
        opt_state=state.opt_state,
        evaluation=evaluation,
        baseline=unigram_bits(splits),
    )
