"""Scikit-learn's handwritten digits, 1,797 images of 8 x 8 pixels, split and cut into batches.

The images come with scikit-learn; nothing is downloaded.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self, TypedDict

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
    data: Any = load_digits()
    images, labels = data.images.reshape(-1, 64), data.target
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    pixels = (images[order] / BRIGHTEST).astype(np.float32)
    digit = labels[order].astype(np.int32)
    kept = round(test_share * len(order))
    return Split(
        train=Samples(pixels=pixels[kept:], digit=digit[kept:]),
        test=Samples(pixels=pixels[:kept], digit=digit[:kept]),
    )


class TrainingBatches:
    """Batches for ever, reshuffled at every pass; a pass' last, smaller batch is left out."""

    def __init__(self, samples: Samples, batch_size: int, seed: int) -> None:
        """Starts before the first batch.

        Args:
            samples: what to draw from; at least one batch of it.
            batch_size: images per batch.
            seed: decides the order.
        """
        self._samples, self._batch_size, self._seed = samples, batch_size, seed
        self._per_pass = len(samples["digit"]) // batch_size
        self.set_state({"drawn": 0})

    def get_state(self) -> dict[str, int]:
        """Returns the position, fit for JSON."""
        return {"drawn": self._drawn}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to a position."""
        self._drawn = state["drawn"]
        self._random = np.random.default_rng(self._seed)
        # One shuffle a pass, the present one's among them.
        for _ in range(-(-self._drawn // self._per_pass)):
            self._shuffle()

    def _shuffle(self) -> None:
        self._order = self._random.permutation(len(self._samples["digit"]))

    def __iter__(self) -> Self:
        """Returns the iterator itself."""
        return self

    def __next__(self) -> Samples:
        """Returns the next batch."""
        place = self._drawn % self._per_pass
        if place == 0:
            self._shuffle()
        self._drawn += 1
        rows = self._order[place * self._batch_size :][: self._batch_size]
        return Samples(pixels=self._samples["pixels"][rows], digit=self._samples["digit"][rows])
