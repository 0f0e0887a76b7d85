"""The last words of a run that all examples share: tables for people, a summary for machines."""

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from command_line import Arguments, StopRequest
from jaxtyping import PyTree

import meta_optax as mo

Records = Sequence[Mapping[str, Any]]


class Outcome(NamedTuple):
    """What training ended with.

    Attributes:
        steps: made in all; fewer than asked for if the end was.
        resumed_after: the steps made before this process.
        compile_seconds: what compiling the step took.
        train_seconds: what this process' steps took.
        params: the params.
        opt_state: the optimizer's state.
    """

    steps: int
    resumed_after: int
    compile_seconds: float
    train_seconds: float
    params: PyTree
    opt_state: Any


def say_decisions(outcome: Outcome, stop: StopRequest) -> None:
    """Prints what the controller did."""
    stop.say("\nWhat the controller changed, and why")
    stop.say(mo.format_decisions(mo.read_decisions(outcome.opt_state)))


def summarise(
    arguments: Arguments, outcome: Outcome, own: Mapping[str, Any], packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the run in a nutshell, for machines.

    Args:
        arguments: what was asked for.
        outcome: what training ended with.
        own: what only this example has to say.
        packages: what the numbers depend on beside JAX, Optax and Flax.
    """
    return {
        "steps": outcome.steps,
        "steps_asked_for": arguments.steps,
        "resumed_after": outcome.resumed_after,
        "seed": arguments.seed,
        "compile_seconds": outcome.compile_seconds,
        "train_seconds": outcome.train_seconds,
        **own,
        "hyperparams": mo.read_hyperparams(outcome.opt_state),
        "decisions": [decision._asdict() for decision in mo.read_decisions(outcome.opt_state)],
        "versions": versions(packages),
    }


def format_usage(usage: np.ndarray, kinds: Sequence[str], heading: str) -> str:
    """Returns a table of which expert serves what kind of input, each row's strongest marked.

    Args:
        usage: shares of each kind's selected slots, [layers, kinds, experts].
        kinds: the kinds' names.
        heading: what kinds they are.
    """
    experts = usage.shape[-1]
    lines = [f"{'layer':<7}{heading:<8}" + "".join(f"{expert:>7} " for expert in range(experts))]
    for layer, by_kind in enumerate(usage):
        for kind, shares in zip(kinds, by_kind, strict=True):
            cells = (
                f"{100 * share:>6.1f}%{'*' if expert == shares.argmax() else ' '}"
                for expert, share in enumerate(shares)
            )
            lines.append(f"{layer:<7}{kind:<8}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of Python, JAX, Optax, Flax and the packages named."""
    names = ("jax", "optax", "flax", *packages)
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
