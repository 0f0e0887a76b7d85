"""Three real corpora that every Python installation carries, cut into chunks of bytes.

Code is the standard library's own top-level modules, prose is the language reference behind
`help()`, and names are the Unicode character names. Nothing is downloaded, and nothing is random
but the order. The sizes differ between Python versions, so losses compare on one version only.
"""

import functools
import sysconfig
import unicodedata
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import numpy as np

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


class CorpusError(Exception):
    """A corpus is missing from this Python installation, or too short for the batches asked for."""


class CorpusSplit(NamedTuple):
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


_READERS: dict[str, Callable[[], bytes]] = dict(
    zip(CORPORA, (read_code, read_prose, read_names), strict=True)
)


def split_chunks(text: bytes, length: int, held_out: int) -> CorpusSplit:
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
    return CorpusSplit(train=chunks[order[held_out:]], held_out=chunks[order[:held_out]])


@functools.cache
def load_corpus(name: str, length: int, held_out: int) -> CorpusSplit:
    """Reads and splits one corpus.

    Args:
        name: one of `CORPORA`.
        length: predicted bytes per chunk.
        held_out: chunks kept back.

    Returns:
        The split chunks.

    Raises:
        CorpusError: naming the corpus that is missing or too short.
    """
    try:
        return split_chunks(_READERS[name](), length, held_out)
    except (CorpusError, OSError) as error:
        raise CorpusError(f"this Python's corpus {name!r} cannot be used: {error}") from error
