"""Trains a mixture-of-experts language model under closed-loop control of its hyperparameters.

    python examples/train_moe.py                     # a minute and a half on two CPU cores, 0.9 GB
    python examples/train_moe.py --steps 40 --plain  # 10 seconds, to see that it runs

A byte-level transformer (8 experts a layer, 2 per token) learns Python code, English prose and
Unicode names, all read from the running Python itself. AdamW trains it in one compiled step;
`advanced_plateau` warms the learning rate up and cuts it when the smoothed loss stalls, and
`smart_expert_gate` sets the rate of the routers apart, from how decided they are.

Expect 1.8 to 1.9 bits per held-out byte, where guessing by each corpus' byte frequencies costs 4.6.
With the default seed the rate is first halved at step 940; other seeds differ, and other Python
versions carry other texts. Ctrl-C ends a run early, and writes its files.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import command_line
from command_line import Arguments, EndedEarly, StopRequest, UserError

with command_line.interruptible_imports():
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from corpora import (
        CORPORA,
        Batch,
        held_out_batches,
        load_corpora,
        training_batches,
        unigram_bits,
    )
    from figures import draw_run
    from flax import nnx
    from jaxtyping import Array, Float, PyTree
    from moe_model import (
        BYTES,
        ModelConfig,
        MoeTransformer,
        balance_loss,
        label_params,
        router_statistics,
    )
    from monitor import JsonLines, Monitor, Recorder, write_json
    from report import Evaluation, Outcome, say_results, summarise

    import meta_optax as mo

STEPS, OUT = 1200, "runs/train_moe"
FILES = ("log.jsonl", "train_moe.png", "summary.json")

BATCH_SIZE = 18  # Six rows of each corpus.
HELD_OUT_CHUNKS = 360  # Of each corpus; a multiple of the batch size, so that all are used.
BALANCE_WEIGHT = 0.01
LOG_EVERY = 10
CONTROL_EVERY = 10
# The controller is shown a mean over about fifty steps. A single batch's loss scatters by 0.1, more
# than a hundred steps gain, so its "best" would be a lucky batch and patience would run out.
SMOOTHING = 0.98

LEARNING_RATE = 6e-3
WEIGHT_DECAY = 0.01


class TrainState(NamedTuple):
    """All that a step reads and writes; its buffers are donated to the next one."""

    params: PyTree
    opt_state: optax.OptState
    smoothed_loss: Float[Array, ""]


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_optimizer() -> optax.GradientTransformationExtraArgs:
    """Returns AdamW, one each for routers, experts and the rest, under closed-loop control.

    Patience and trend count looks, one in `CONTROL_EVERY` steps: twenty steps without a better
    smoothed loss cut the rates. The floor keeps cuts at the end, where there is little left to
    gain, from following one another down to nothing.
    """
    plateau = mo.advanced_plateau(
        warmup_steps=50, patience=2, trend_window=5, min_lr=1e-4, update_frequency=CONTROL_EVERY
    )
    # Routers at a tenth of the rate, the default, decide too slowly for a run this short.
    gate = mo.smart_expert_gate(gate_lr_factor=0.5, update_frequency=CONTROL_EVERY)
    strategy = mo.chain(plateau, gate)
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


def describe(record: dict[str, Any]) -> tuple[str, str]:
    """Returns what a person wants to see of a record while waiting, in two lines."""
    speed = record["tokens_per_second"]
    groups = {"dense": "", "gate": "gate_", "expert": "expert_"}
    rates = (f"{group} {record[f'{form}learning_rate']:.1e}" for group, form in groups.items())
    return (
        f"loss {record['loss']:.3f}  gate entropy {record['gate_entropy']:.2f}  "
        f"{f'{speed:,.0f}' if speed else '-'} tokens/s",
        "rates: " + "  ".join(rates),
    )


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
    done, is_last = 0, False
    while not is_last:
        state, metrics = step_fn(state, next(batches))
        recorder.flush()
        is_last = done == steps - 1 or bool(stop.exit_code)
        if is_last or done % LOG_EVERY == 0:
            recorder.keep(done, metrics)
        done += 1
    recorder.flush()
    return state, done


def evaluate(
    graphdef: nnx.GraphDef, params: PyTree, batches: Sequence[Batch], stop: StopRequest
) -> Evaluation | None:
    """Measures bits per held-out byte and who serves which corpus; None if asked to end."""
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


class Setup(NamedTuple):
    """What training starts from."""

    graphdef: nnx.GraphDef
    state: TrainState
    step_fn: TrainStep
    compile_seconds: float


def set_up(
    config: ModelConfig, seed: int, example: Batch, monitor: Monitor, stop: StopRequest
) -> Setup:
    """Builds model and optimizer, and compiles the step for batches like the example."""
    tx = make_optimizer()
    graphdef, params = nnx.split(MoeTransformer(config, nnx.Rngs(seed)), nnx.Param)
    # The loss of guessing is where the smoothed one starts, so it needs no correction.
    state = TrainState(params, tx.init(params), jnp.log(jnp.float32(BYTES)))
    monitor.announce("compiling the step")
    stop.check()
    begin = time.perf_counter()
    jitted = jax.jit(functools.partial(train_step, graphdef, tx), donate_argnums=0)
    # Compiled ahead of time: another shape or dtype is an error then, not a second compile.
    step_fn = jitted.lower(state, example).compile()
    stop.check()
    return Setup(graphdef, state, step_fn, time.perf_counter() - begin)


def run(arguments: Arguments, log: JsonLines, stop: StopRequest) -> Outcome:
    """Trains and evaluates under a live display."""
    config = ModelConfig()
    with Monitor(arguments.steps, stop, plain=arguments.plain) as monitor:
        monitor.announce("reading the corpora")
        splits = load_corpora(config.length, HELD_OUT_CHUNKS)
        held_out = held_out_batches(splits, BATCH_SIZE)
        batches = training_batches(splits, BATCH_SIZE, arguments.seed)
        setup = set_up(config, arguments.seed, held_out[0], monitor, stop)
        recorder = Recorder(log, monitor, BATCH_SIZE * config.length, describe)
        monitor.start()
        begin = time.perf_counter()
        state, done = train(setup.step_fn, setup.state, batches, arguments.steps, recorder, stop)
        train_seconds = time.perf_counter() - begin
        monitor.announce("evaluating on held-out bytes")
        evaluation = evaluate(setup.graphdef, state.params, held_out, stop)
    return Outcome(
        steps=done,
        compile_seconds=setup.compile_seconds,
        train_seconds=train_seconds,
        opt_state=state.opt_state,
        evaluation=evaluation,
        baseline=unigram_bits(splits),
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    arguments = command_line.parse_arguments(__doc__ or "", steps=STEPS, out=OUT, argv=argv)
    try:
        paths = command_line.prepare_folder(arguments.out, FILES)
        with StopRequest() as stop:
            train_and_report(arguments, paths, stop)
            return stop.exit_code
    except UserError as error:
        return command_line.fail(error)


def train_and_report(arguments: Arguments, paths: dict[str, Path], stop: StopRequest) -> None:
    """Does what the example is for, or as much of it as there is time for."""
    try:
        with JsonLines(paths["log.jsonl"]) as log:
            outcome = run(arguments, log, stop)
    except EndedEarly as ended:
        stop.say(str(ended))
        return
    say_results(outcome, log.records, CORPORA, stop)
    draw_run(log.records, title(outcome), paths["train_moe.png"])
    write_json(paths["summary.json"], summarise(arguments, outcome, log.records, CORPORA))
    stop.say("\nFiles: " + "  ".join(map(str, paths.values())))


def title(outcome: Outcome) -> str:
    """Returns the heading of the picture."""
    if outcome.evaluation is None:
        return f"train_moe: ended on request after {outcome.steps} steps"
    bits = outcome.evaluation.bits["overall"]
    return f"train_moe: {outcome.steps} steps, {bits:.3f} bits per held-out byte"


if __name__ == "__main__":
    sys.exit(main())
