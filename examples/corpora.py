"""Balanced batches of bytes from the three corpora that every Python installation carries.

`meta_optax.compare.corpora` says what they are. Nothing is downloaded, and nothing is random but
the order. The sizes differ between Python versions, so losses compare on one version only.
"""

import functools
from collections.abc import Mapping
from typing import TypedDict

import grain
import numpy as np
from command_line import UserError

from meta_optax.compare.corpora import CORPORA, CorpusError, CorpusSplit, load_corpus

__all__ = ["CORPORA"]


class Batch(TypedDict):
    """What one step sees: `tokens` uint8 [B, L + 1] (inputs and targets overlap), `corpus` [B]."""

    tokens: np.ndarray
    corpus: np.ndarray


def load_corpora(length: int, held_out: int) -> dict[str, CorpusSplit]:
    """Reads and splits every corpus, in the order of `CORPORA`.

    Args:
        length: predicted bytes per chunk.
        held_out: chunks kept back from each corpus.

    Returns:
        The split chunks by the corpus' name.

    Raises:
        UserError: naming the corpus that is missing or too short.
    """
    try:
        return {name: load_corpus(name, length, held_out) for name in CORPORA}
    except CorpusError as error:
        raise UserError(str(error)) from error


def training_batches(
    splits: Mapping[str, CorpusSplit], batch_size: int, seed: int
) -> grain.DatasetIterator:
    """Streams shuffled batches with an equal share of every corpus, for ever.

    Each corpus is reshuffled at every pass over it; a shorter one is simply passed over more often.
    The order depends on the seed alone, and the iterator's `get_state` and `set_state` resume it.

    Args:
        splits: chunks by corpus.
        batch_size: rows per batch; a multiple of the number of corpora gives exact shares.
        seed: decides the order.

    Returns:
        A Grain iterator, which prepares batches ahead in a thread.
    """
    streams = [
        grain.MapDataset.range(len(split.train))
        .seed(seed)
        .shuffle()
        .repeat()
        .map(functools.partial(_row, split.train, corpus))
        for corpus, split in enumerate(splits.values())
    ]
    mixed = grain.MapDataset.mix(streams).batch(batch_size, drop_remainder=True)
    return iter(mixed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def _row(chunks: np.ndarray, corpus: int, index: int) -> Batch:
    return Batch(tokens=chunks[index], corpus=np.array(corpus, np.int32))


def held_out_batches(splits: Mapping[str, CorpusSplit], batch_size: int) -> list[Batch]:
    """Returns the held-out chunks in full batches of one corpus each, without a remainder."""
    batches = []
    for index, split in enumerate(splits.values()):
        for start in range(0, len(split.held_out) - batch_size + 1, batch_size):
            rows = split.held_out[start : start + batch_size]
            batches.append(Batch(tokens=rows, corpus=np.full(batch_size, index, np.int32)))
    return batches


def unigram_bits(splits: Mapping[str, CorpusSplit]) -> dict[str, float]:
    """Returns the bits per held-out byte of guessing from each corpus' own byte frequencies.

    This is what a model reaches that has learnt which corpus it reads and how often each byte
    occurs there, and nothing else.
    """
    bits = {}
    for name, split in splits.items():
        # One count is added to each so that a byte never seen in training costs no infinity.
        counts = np.bincount(split.train.reshape(-1), minlength=256) + 1
        bits[name] = float(-np.log2(counts / counts.sum())[split.held_out[:, 1:]].mean())
    return {"overall": float(np.mean(list(bits.values()))), **bits}
