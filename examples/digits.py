"""Scikit-learn's handwritten digits, 1,797 images of 8 x 8 pixels, split and cut into batches.

The images come with scikit-learn; nothing is downloaded.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import numpy as np
from sklearn.datasets import load_digits

CLASSES = 10
BRIGHTEST = 16.0  # A pixel counts the dark ones among 4 x 4 of the scanned image.

# The split never follows the run's seed: runs with different seeds are measured on the same images.
SPLIT_SEED = 0


class Samples(TypedDict):
    """Some images: `pixels` float32 [N, 64] from 0 to 1, `digit` int32 [N]."""

    pixels: np.ndarray
    digit: np.ndarray


class Split(NamedTuple):
    """The images to learn from, and those to be tested on."""

    train: Samples
    test: Samples


def load_split(test_share: float) -> Split:
    """Loads the digits and keeps some back.

    They are shuffled before the split because they come in the order of their writers.

    Args:
        test_share: the share of the images to keep back, between 0 and 1.

    Returns:
        The two parts.
    """
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    pixels = (images[order] / BRIGHTEST).astype(np.float32)
    digit = labels[order].astype(np.int32)
    kept = round(test_share * len(order))
    return Split(
        train=Samples(pixels=pixels[kept:], digit=digit[kept:]),
        test=Samples(pixels=pixels[:kept], digit=digit[:kept]),
    )


def training_batches(samples: Samples, batch_size: int, seed: int) -> Iterator[Samples]:
    """Yields batches for ever, reshuffled at every pass; a pass' last, smaller batch is left out.

    Args:
        samples: what to draw from; at least one batch of it.
        batch_size: images per batch.
        seed: decides the order.

    Yields:
        The next batch.
    """
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(samples["digit"]))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield Samples(pixels=samples["pixels"][rows], digit=samples["digit"][rows])
