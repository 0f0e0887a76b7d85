"""Trains a mixture-of-experts language model under closed-loop control of its hyperparameters.

    python examples/train_moe.py                     # about two minutes on two CPU cores
    python examples/train_moe.py --steps 40 --plain  # a few seconds, to see that it runs

A byte-level transformer (8 experts a layer, 2 per token) learns Python code, English prose and
Unicode names, all read from the running Python itself. AdamW trains it in one compiled step;
`advanced_plateau` warms the learning rate up and cuts it when the smoothed loss stalls, and
`smart_expert_gate` sets the rates of routers and experts apart, from how the routers behave.
"""

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
    import numpy as np
    import optax
    from corpora import (
        CORPORA,
        Batch,
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
    from monitor import JsonLines, Monitor, Recorder, write_json
    from report import format_bits, format_usage, versions

    import meta_optax as mo

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
    statistics = router_statistics(routing, jnp.asarray(batch["corpus"]), len(CORPORA))
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
        for name, value in optax.tree.get(opt_state, "hyperparams").items()
        if name.endswith(("learning_rate", "weight_decay"))
    }
    return TrainState(params, opt_state, smoothed), {**metrics, **rates, "smoothed_loss": smoothed}


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
    """Measures bits per held-out byte and who serves which corpus; None if asked to end."""
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


def run(arguments: Arguments, log: JsonLines, stop: StopRequest) -> Outcome:
    """Trains and evaluates under a live display."""
    config = ModelConfig()
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
        step_fn = jitted.lower(state, held_out_batches(splits, BATCH_SIZE)[0]).compile()
        compiled = time.perf_counter()
        monitor.start()
        recorder = Recorder(log, monitor, BATCH_SIZE * config.length, describe)
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


def usage_of(log: JsonLines, outcome: Outcome) -> tuple[np.ndarray, str]:
    """Returns who serves which corpus [layers, corpora, experts], and on which bytes."""
    if outcome.evaluation:
        return outcome.evaluation.usage, "held-out bytes"
    last = [record["corpus_usage"] for record in log.records[-10:]]
    return np.mean(last, axis=0), "the last logged training batches"


def say_results(log: JsonLines, outcome: Outcome, stop: StopRequest) -> None:
    """Prints what was reached, who serves what, and what the controller did."""
    if outcome.evaluation:
        stop.say("\nBits per held-out byte (lower is better)")
        stop.say(format_bits(outcome.evaluation.bits, outcome.baseline))
    else:
        stop.say(f"\nEnded on request after {outcome.steps} steps; nothing was evaluated.")
    if log.records:
        usage, source = usage_of(log, outcome)
        stop.say(f"\nWhich expert serves which corpus: shares of {source} (* the strongest)")
        stop.say(format_usage(usage, CORPORA))
    stop.say("\nWhat the controller changed, and why")
    stop.say(mo.format_decisions(mo.read_decisions(outcome.opt_state)))


def summarise(arguments: Arguments, log: JsonLines, outcome: Outcome) -> dict[str, Any]:
    """Returns the run in a nutshell, for machines."""
    evaluation = outcome.evaluation
    summary: dict[str, Any] = {
        "steps": outcome.steps,
        "steps_asked_for": arguments.steps,
        "seed": arguments.seed,
        "compile_seconds": outcome.compile_seconds,
        "train_seconds": outcome.train_seconds,
        "bits_per_byte": evaluation and evaluation.bits,
        "bits_per_byte_of_byte_frequencies": outcome.baseline,
        "hyperparams": mo.read_hyperparams(outcome.opt_state),
        "decisions": [d._asdict() for d in mo.read_decisions(outcome.opt_state)],
        "versions": versions(),
    }
    if log.records:
        usage, source = usage_of(log, outcome)
        summary |= {"corpora": CORPORA, "corpus_usage": usage, "corpus_usage_of": source}
    return summary


def write_files(
    arguments: Arguments, paths: dict[str, Path], log: JsonLines, outcome: Outcome
) -> list[Path]:
    """Writes the picture and the summary; returns the files that there are now."""
    if log.records:
        bits = outcome.evaluation and outcome.evaluation.bits["overall"]
        result = f"{bits:.3f} bits per held-out byte" if bits else "ended on request"
        draw_run(log.records, f"train_moe: {outcome.steps} steps, {result}", paths["train_moe.png"])
    write_json(paths["summary.json"], summarise(arguments, log, outcome))
    return [path for path in paths.values() if path.exists()]


def main(argv: list[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    arguments = command_line.parse_arguments(__doc__ or "", steps=STEPS, out=OUT, argv=argv)
    stop = StopRequest()
    stop.install()
    try:
        paths = command_line.prepare_folder(arguments.out, FILES)
        log = JsonLines(paths["log.jsonl"])
        outcome = run(arguments, log, stop)
        log.close()
        say_results(log, outcome, stop)
        files = write_files(arguments, paths, log, outcome)
    except UserError as error:
        return command_line.fail(error)
    stop.say("\nFiles: " + "  ".join(map(str, files)))
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(main())
