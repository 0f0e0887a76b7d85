"""Real data that needs no download: what scikit-learn, Python and Debian's packages bring along.

The splits never follow a run's seed: runs with different seeds are measured on the same samples.
"""

import functools
import gzip
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

SPLIT_SEED = 0
# A fifth of small data sets is kept back.
_KEPT_SHARE = 0.2
# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")
_FASHION_TRAIN, _FASHION_TEST = 10_000, 1_000


class Labelled(NamedTuple):
    """Inputs [N, ...] and classes [N]."""

    inputs: Float[Array, "samples ..."] | np.ndarray
    labels: Int[Array, " samples"] | np.ndarray


class Split(NamedTuple):
    """What to learn from, and what to be measured on."""

    train: Labelled
    held_out: Labelled


@functools.cache
def digits() -> Split:
    """Scikit-learn's handwritten digits: 1,797 images of 64 pixels, centred about their mean."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images, labels = data.images.reshape(-1, 64), data.target
    # A pixel counts up to 16 dark ones; the mean pixel is 0.3 of that.
    inputs = (images / 8.0 - 0.6).astype(np.float32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    kept = round(_KEPT_SHARE * len(order))
    return _split(inputs[order], labels[order].astype(np.int32), kept)


def has_fashion() -> bool:
    """Whether the files of Fashion-MNIST are on this machine."""
    return (FASHION_FOLDER / "train-images-idx3-ubyte.gz").is_file()


@functools.cache
def fashion() -> Split:
    """Fashion-MNIST, 28 x 28 pixels: 10,000 training images and 1,000 of the test's."""
    train = _read_fashion("train", _FASHION_TRAIN)
    return Split(train, _read_fashion("t10k", _FASHION_TEST))


def _read_fashion(part: str, count: int) -> Labelled:
    images = gzip.decompress((FASHION_FOLDER / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION_FOLDER / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    # The formats' headers are 16 and 8 bytes.
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 784)[:count]
    classes = np.frombuffer(labels, np.uint8, offset=8)[:count]
    return Labelled((pixels / 127.5 - 0.57).astype(np.float32), classes.astype(np.int32))


@functools.cache
def photo() -> Split:
    """Scikit-learn's photograph of a flower: places in [-1, 1]^2, and colours in [0, 1]^3.

    The "labels" are colours, [N, 3]; every fourth pixel of every fourth row is used.
    """
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image("flower.jpg")[::4, ::4].astype(np.float32) / 255.0
    rows, columns = pixels.shape[:2]
    grid = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    places = np.stack(grid, axis=-1).reshape(-1, 2).astype(np.float32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(places))
    return _split(places[order], pixels.reshape(-1, 3)[order], kept=2_000)


def _split(inputs: np.ndarray, labels: np.ndarray, kept: int) -> Split:
    return Split(Labelled(inputs[kept:], labels[kept:]), Labelled(inputs[:kept], labels[:kept]))
