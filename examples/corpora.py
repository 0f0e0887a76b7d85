"""Three real corpora that every Python installation carries, cut into balanced batches of bytes.

Code is the standard library's own top-level modules, prose is the language reference behind
`help()`, and names are the Unicode character names. Nothing is downloaded, and nothing is random
but the order. The sizes differ between Python versions, so losses compare on one version only.
"""

import functools
import sysconfig
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple, TypedDict

import grain
import numpy as np
from command_line import UserError

CORPORA = ("code", "prose", "names")

# Names that are a code point spelled out ("CJK UNIFIED IDEOGRAPH-4E00") or a syllable computed
# from one: three quarters of all names, and there is next to nothing to learn from them.
COMPUTED_NAMES = (
    "CJK UNIFIED",
    "CJK COMPATIBILITY IDEOGRAPH",
    "HANGUL SYLLABLE",
    "TANGUT IDEOGRAPH",
    "NUSHU CHARACTER",
    "KHITAN SMALL SCRIPT",
)

# The split never follows the run's seed: runs with different seeds are measured on the same bytes.
SPLIT_SEED = 0


class CorpusError(UserError):
    """A corpus is missing from this Python installation, or too short for the batches asked for."""


class Batch(TypedDict):
    """What one step sees: `tokens` uint8 [B, L + 1] (inputs and targets overlap), `corpus` [B]."""

    tokens: np.ndarray
    corpus: np.ndarray


class Split(NamedTuple):
    """Chunks of one corpus, uint8 [N, L + 1]; no byte is in both parts."""

    train: np.ndarray
    held_out: np.ndarray


def read_code() -> bytes:
    """Returns the top-level modules of the standard library, in alphabetical order.

    Packages are left out: they hold the test suites and the generated tables (`encodings`), and
    `pydoc_data` there is the prose corpus itself.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    return b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def read_prose() -> bytes:
    """Returns the topics of the language reference that `help()` shows."""
    return "\n".join(topics.topics.values()).encode()


def read_names() -> bytes:
    """Returns the names of the Unicode characters, one a line, in the order of the code points."""
    names = (unicodedata.name(chr(point), "") for point in range(0x110000))
    kept = (name for name in names if name and not name.startswith(COMPUTED_NAMES))
    return "\n".join(kept).encode()


def split_chunks(text: bytes, length: int, held_out: int) -> Split:
    """Cuts a text into chunks, shuffles them and keeps some back.

    Chunks are shuffled before the split because alphabetical tails are not like the rest: the last
    names are all variation selectors.

    Args:
        text: one corpus.
        length: predicted bytes per chunk; a chunk is one byte longer, and chunks share no byte.
        held_out: how many chunks to keep back.

    Returns:
        The two parts.

    Raises:
        CorpusError: if fewer than twice `held_out` chunks can be cut.
    """
    count = len(text) // (length + 1)
    if count < 2 * held_out:
        raise CorpusError(f"only {len(text)} bytes, too few for {held_out} held-out chunks")
    chunks = np.frombuffer(text, np.uint8)[: count * (length + 1)].reshape(count, length + 1)
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    return Split(train=chunks[order[held_out:]], held_out=chunks[order[:held_out]])


def load_corpora(length: int, held_out: int) -> dict[str, Split]:
    """Reads and splits every corpus, in the order of `CORPORA`.

    Args:
        length: predicted bytes per chunk.
        held_out: chunks kept back from each corpus.

    Returns:
        The split chunks by the corpus' name.

    Raises:
        CorpusError: naming the corpus that is missing or too short.
    """
    splits = {}
    for name, read in zip(CORPORA, (read_code, read_prose, read_names), strict=True):
        try:
            splits[name] = split_chunks(read(), length, held_out)
        except (CorpusError, OSError) as error:
            raise CorpusError(f"this Python's corpus {name!r} cannot be used: {error}") from error
    return splits


def training_batches(
    splits: Mapping[str, Split], batch_size: int, seed: int
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


def held_out_batches(splits: Mapping[str, Split], batch_size: int) -> list[Batch]:
    """Returns the held-out chunks in full batches of one corpus each, without a remainder."""
    batches = []
    for index, split in enumerate(splits.values()):
        for start in range(0, len(split.held_out) - batch_size + 1, batch_size):
            rows = split.held_out[start : start + batch_size]
            batches.append(Batch(tokens=rows, corpus=np.full(batch_size, index, np.int32)))
    return batches


def unigram_bits(splits: Mapping[str, Split]) -> dict[str, float]:
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
