"""Trains a mixture-of-experts language model under closed-loop control of its hyperparameters.

    python examples/train_moe.py                     # a minute and a half on two CPU cores, 0.9 GB
    python examples/train_moe.py --steps 40 --plain  # 10 seconds, to see that it runs
    python examples/train_moe.py --mesh data=2,expert=4  # experts on four devices each

A byte-level transformer (8 experts a layer, 2 per token) learns Python code, English prose and
Unicode names, all read from the running Python itself. AdamW trains it in one compiled step;
`advanced_plateau` warms the learning rate up and cuts it when the smoothed loss stalls,
`smart_expert_gate` sets the rate of the routers apart, from how decided they are, `adapt_aux_loss`
weighs the balance loss by how uneven the load is, and `guard_collapse` watches each layer.

Expect 1.8 to 1.9 bits per held-out byte, where guessing by each corpus' byte frequencies costs 4.6.
With the default seed the rate is first halved at step 620; other seeds differ, and other Python
versions carry other texts. Ctrl-C ends a run early, and writes its files.
"""

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import command_line
from command_line import Arguments, StopRequest

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
    from figures import draw_gate, draw_loss, draw_rates, draw_run, draw_usage
    from flax import nnx
    from jaxtyping import Array, Float, PyTree
    from meshes import AXES, check_rows, current_mesh, place_rows, use_mesh
    from moe_model import (
        BYTES,
        ModelConfig,
        MoeTransformer,
        balance_loss,
        usage_by_kind,
    )
    from monitor import JsonLines, Monitor, Recorder, write_json
    from report import Outcome, Records, format_usage, say_decisions, summarise
    from training import (
        describe_rates,
        describe_speed,
        go_on,
        open_checkpoints,
        set_up,
        train,
    )

    import meta_optax as mo

STEPS, OUT = 1200, "runs/train_moe"
FILES = ("log.jsonl", "train_moe.png", "summary.json")

BATCH_SIZE = 18  # Six rows of each corpus.
HELD_OUT_CHUNKS = 360  # Of each corpus; a multiple of the batch size, so that all are used.
BALANCE_WEIGHT = 0.01  # To begin with.
CONTROL_EVERY = 10

LEARNING_RATE = 6e-3
WEIGHT_DECAY = 0.01


def make_optimizer(layers: int) -> optax.GradientTransformationExtraArgs:
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
    balance = mo.adapt_aux_loss(update_frequency=CONTROL_EVERY)
    guard = mo.guard_collapse(per_layer=True, num_layers=layers)
    controlled = mo.inject_meta_hyperparams(
        mo.moe_partition(optax.adamw, mo.label_moe_params, num_layers=layers),
        mo.with_decisions(mo.chain(plateau, gate, balance, guard), capacity=512),
        free_hyperparams={"aux_loss_weight": BALANCE_WEIGHT},
    )
    return controlled(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def loss_and_statistics(
    graphdef: nnx.GraphDef,
    params: PyTree,
    batch: Batch,
    aux_loss_weight: Float[Array, ""] | float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the training loss, and what there is to say about a batch."""
    tokens = jnp.asarray(batch["tokens"]).astype(jnp.int32)
    logits, routing = nnx.merge(graphdef, params)(tokens[:, :-1])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    balance = balance_loss(routing)
    loss = losses.mean()
    return loss + aux_loss_weight * balance, {
        "loss": loss,
        "balance_loss": balance,
        "corpus_usage": usage_by_kind(routing, jnp.asarray(batch["corpus"]), len(CORPORA)),
        **mo.router_metrics(*routing),
    }


class Evaluation(NamedTuple):
    """What a model is worth on data it never saw.

    Attributes:
        bits: bits per byte by corpus, with "overall" first.
        usage: shares of each corpus' selected slots, [layers, corpora, experts].
    """

    bits: dict[str, float]
    usage: np.ndarray


class Result(NamedTuple):
    """All that the report is made of; there is no evaluation of a run that was ended on request."""

    outcome: Outcome
    evaluation: Evaluation | None
    baseline: dict[str, float]


def describe(record: dict[str, Any]) -> tuple[str, str]:
    """Returns what a person wants to see of a record while waiting, in two lines."""
    return (
        f"loss {record['loss']:.3f}  gate entropy {record['gate_entropy']:.2f}  "
        + describe_speed(record["tokens_per_second"], "tokens"),
        describe_rates(record),
    )


def evaluate(
    graphdef: nnx.GraphDef, params: PyTree, batches: Sequence[Batch], stop: StopRequest
) -> Evaluation | None:
    """Measures bits per held-out byte and who serves which corpus; None if asked to end."""
    measure = jax.jit(functools.partial(loss_and_statistics, graphdef))
    losses, usage = [], []
    for batch in batches:
        if stop.exit_code:
            return None
        statistics = jax.device_get(measure(params, place_rows(batch))[1])
        losses.append(statistics["loss"])
        usage.append(statistics["corpus_usage"])
    # Each batch is of one corpus, and each corpus has as many batches as the next.
    means = np.reshape(losses, (len(CORPORA), -1)).mean(axis=1) / np.log(2)
    bits = {"overall": float(means.mean()), **dict(zip(CORPORA, means.tolist(), strict=True))}
    return Evaluation(bits, np.sum(usage, axis=0) * len(CORPORA) / len(batches))


def run(arguments: Arguments, log: JsonLines, stop: StopRequest) -> Result:
    """Trains and evaluates under a live display."""
    config = ModelConfig()
    if mesh := current_mesh():
        check_rows(mesh, BATCH_SIZE)
    with (
        open_checkpoints(arguments, stop) as checkpoints,
        Monitor(arguments.steps, stop, plain=arguments.plain) as monitor,
    ):
        monitor.announce("reading the corpora")
        splits = load_corpora(config.length, HELD_OUT_CHUNKS)
        held_out = held_out_batches(splits, BATCH_SIZE)
        batches = training_batches(splits, BATCH_SIZE, arguments.seed)
        setup = set_up(
            lambda: MoeTransformer(config, nnx.Rngs(arguments.seed)),
            loss_and_statistics,
            make_optimizer(config.layers),
            guesses=BYTES,
            example=held_out[0],
            monitor=monitor,
            stop=stop,
        )
        recorder = Recorder(log, monitor, "tokens", BATCH_SIZE * config.length, describe)
        start = go_on(setup, arguments, checkpoints, batches, log, stop)
        monitor.start(start[1])
        begin = time.perf_counter()
        state, done = train(
            setup, arguments, batches, recorder, stop, start=start, checkpoints=checkpoints
        )
        train_seconds = time.perf_counter() - begin
        monitor.announce("evaluating on held-out bytes")
        evaluation = evaluate(setup.graphdef, state.params, held_out, stop)
    outcome = Outcome(
        steps=done,
        resumed_after=start[1],
        compile_seconds=setup.compile_seconds,
        train_seconds=train_seconds,
        params=state.params,
        opt_state=state.opt_state,
    )
    return Result(outcome, evaluation, unigram_bits(splits))


def usage_of(result: Result, records: Records) -> tuple[np.ndarray, str]:
    """Returns who serves which corpus [layers, corpora, experts], and by which bytes' account."""
    if result.evaluation:
        return result.evaluation.usage, "held-out bytes"
    last = [record["corpus_usage"] for record in records[-10:]]
    return np.mean(last, axis=0), "the last logged training batches"


def format_bits(bits: Mapping[str, float], baseline: Mapping[str, float]) -> str:
    """Returns a table of bits per byte beside a baseline, a row per corpus.

    Args:
        bits: what the model reached, by corpus, with "overall" among them.
        baseline: the same of byte frequencies alone.
    """
    lines = [f"{'':<10}{'this model':>12}{'byte frequencies':>18}"]
    lines += [f"{name:<10}{bits[name]:>12.3f}{baseline[name]:>18.3f}" for name in bits]
    return "\n".join(lines)


def say_results(result: Result, records: Records, stop: StopRequest) -> None:
    """Prints what was reached, who serves what, and what the controller did."""
    if result.evaluation:
        stop.say("\nBits per held-out byte (lower is better)")
        stop.say(format_bits(result.evaluation.bits, result.baseline))
    else:
        stop.say(f"\nEnded on request after {result.outcome.steps} steps; nothing was evaluated.")
    usage, source = usage_of(result, records)
    stop.say(f"\nWhich expert serves which corpus: shares of {source} (* the strongest)")
    stop.say(format_usage(usage, CORPORA, "corpus"))
    say_decisions(result.outcome, stop)


def findings(result: Result, records: Records) -> dict[str, Any]:
    """Returns what the summary says that no other example's does."""
    usage, source = usage_of(result, records)
    return {
        "bits_per_byte": result.evaluation and result.evaluation.bits,
        "bits_per_byte_of_byte_frequencies": result.baseline,
        "corpora": CORPORA,
        "corpus_usage": usage,
        "corpus_usage_of": source,
    }


def title(result: Result) -> str:
    """Returns the heading of the picture."""
    steps = result.outcome.steps
    if result.evaluation is None:
        return f"train_moe: ended on request after {steps} steps"
    return (
        f"train_moe: {steps} steps, {result.evaluation.bits['overall']:.3f} bits per held-out byte"
    )


def train_and_report(arguments: Arguments, paths: dict[str, Path], stop: StopRequest) -> None:
    """Does what the example is for."""
    with use_mesh(arguments.mesh), JsonLines(paths["log.jsonl"]) as log:
        result = run(arguments, log, stop)
    say_results(result, log.records, stop)
    panels = (functools.partial(draw_loss, unit="nats per byte"), draw_rates, draw_gate, draw_usage)
    draw_run(log.records, panels, title(result), paths["train_moe.png"])
    own = findings(result, log.records)
    write_json(paths["summary.json"], summarise(arguments, result.outcome, own, ("grain",)))
    stop.say("\nFiles: " + "  ".join(map(str, paths.values())))


def main(argv: list[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    arguments = command_line.parse_arguments(
        __doc__ or "", steps=STEPS, out=OUT, mesh_axes=AXES, argv=argv
    )
    return command_line.run_example(arguments, FILES, train_and_report)


if __name__ == "__main__":
    sys.exit(main())
