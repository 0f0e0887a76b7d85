"""The last words of a run: tables for people, and a summary for machines."""

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

import numpy as np


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
