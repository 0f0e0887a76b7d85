"""The last words of a run: tables for people, and a summary for machines."""

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from command_line import Arguments, StopRequest

import meta_optax as mo

Records = Sequence[Mapping[str, Any]]


class Evaluation(NamedTuple):
    """What a model is worth on data it never saw.

    Attributes:
        bits: bits per byte by corpus, with "overall" first.
        usage: shares of each corpus' selected slots, [layers, corpora, experts].
    """

    bits: dict[str, float]
    usage: np.ndarray


class Outcome(NamedTuple):
    """All that the report is made of; there is no evaluation of a run that was ended on request."""

    steps: int
    compile_seconds: float
    train_seconds: float
    opt_state: Any
    evaluation: Evaluation | None
    baseline: dict[str, float]


def usage_of(outcome: Outcome, records: Records) -> tuple[np.ndarray, str]:
    """Returns who serves which corpus [layers, corpora, experts], and by which bytes' account."""
    if outcome.evaluation:
        return outcome.evaluation.usage, "held-out bytes"
    last = [record["corpus_usage"] for record in records[-10:]]
    return np.mean(last, axis=0), "the last logged training batches"


def say_results(
    outcome: Outcome, records: Records, corpora: Sequence[str], stop: StopRequest
) -> None:
    """Prints what was reached, who serves what, and what the controller did."""
    if outcome.evaluation:
        stop.say("\nBits per held-out byte (lower is better)")
        stop.say(format_bits(outcome.evaluation.bits, outcome.baseline))
    else:
        stop.say(f"\nEnded on request after {outcome.steps} steps; nothing was evaluated.")
    usage, source = usage_of(outcome, records)
    stop.say(f"\nWhich expert serves which corpus: shares of {source} (* the strongest)")
    stop.say(format_usage(usage, corpora))
    stop.say("\nWhat the controller changed, and why")
    stop.say(mo.format_decisions(mo.read_decisions(outcome.opt_state)))


def summarise(
    arguments: Arguments, outcome: Outcome, records: Records, corpora: Sequence[str]
) -> dict[str, Any]:
    """Returns the run in a nutshell, for machines."""
    usage, source = usage_of(outcome, records)
    return {
        "steps": outcome.steps,
        "steps_asked_for": arguments.steps,
        "seed": arguments.seed,
        "compile_seconds": outcome.compile_seconds,
        "train_seconds": outcome.train_seconds,
        "bits_per_byte": outcome.evaluation and outcome.evaluation.bits,
        "bits_per_byte_of_byte_frequencies": outcome.baseline,
        "corpora": corpora,
        "corpus_usage": usage,
        "corpus_usage_of": source,
        "hyperparams": mo.read_hyperparams(outcome.opt_state),
        "decisions": [decision._asdict() for decision in mo.read_decisions(outcome.opt_state)],
        "versions": versions(),
    }


def format_bits(bits: Mapping[str, float], baseline: Mapping[str, float]) -> str:
    """Returns a table of bits per byte beside a baseline, a row per corpus.

    Args:
        bits: what the model reached, by corpus, with "overall" among them.
        baseline: the same of byte frequencies alone.
    """
    lines = [f"{'':<10}{'this model':>12}{'byte frequencies':>18}"]
    lines += [f"{name:<10}{bits[name]:>12.3f}{baseline[name]:>18.3f}" for name in bits]
    return "\n".join(lines)


def format_usage(usage: np.ndarray, corpora: Sequence[str]) -> str:
    """Returns a table of which expert serves which corpus, the strongest of each row marked.

    Args:
        usage: shares of each corpus' selected slots, [layers, corpora, experts].
        corpora: the corpora's names.
    """
    experts = usage.shape[-1]
    lines = [f"{'layer':<7}{'corpus':<8}" + "".join(f"{expert:>7} " for expert in range(experts))]
    for layer, by_corpus in enumerate(usage):
        for corpus, shares in zip(corpora, by_corpus, strict=True):
            cells = (
                f"{100 * share:>6.1f}%{'*' if expert == shares.argmax() else ' '}"
                for expert, share in enumerate(shares)
            )
            lines.append(f"{layer:<7}{corpus:<8}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def versions() -> dict[str, str]:
    """Returns the versions of what the numbers depend on."""
    packages = {name: metadata.version(name) for name in ("jax", "optax", "flax", "grain")}
    return {"python": platform.python_version(), **packages}
