"""The rules that people use to cut a rate, for many losses at a time: oracles for comparison.

Each takes losses of shape [curves, steps] and returns where it cuts. They are the published rules,
with the published defaults, in NumPy; `tests/test_detection.py` holds that of Optax against Optax,
and `tests/test_peers.py` the others against recordings of the packages.
"""

import numpy as np


def optax_cuts(
    losses: np.ndarray, patience: int = 10, rtol: float = 1e-4, accumulation_size: int = 1
) -> np.ndarray:
    """Where `optax.contrib.reduce_on_plateau` cuts: better is ``x < (1 - rtol) * best``."""
    blocks = losses.shape[1] // accumulation_size
    means = losses[:, : blocks * accumulation_size].reshape(len(losses), blocks, -1).mean(axis=2)
    cuts = np.zeros(losses.shape, bool)
    best, bad = np.full(len(losses), np.inf), np.zeros(len(losses), int)
    for block, mean in enumerate(means.T):
        is_better = mean < (1.0 - rtol) * best
        best, bad = np.where(is_better, mean, best), np.where(is_better, 0, bad + 1)
        fires = bad == patience
        bad[fires] = 0
        cuts[:, (block + 1) * accumulation_size - 1] = fires
    return cuts


def torch_cuts(losses: np.ndarray, patience: int = 10, threshold: float = 1e-4) -> np.ndarray:
    """Where PyTorch's ``ReduceLROnPlateau`` cuts: Optax's rule, but for ``bad > patience``."""
    return optax_cuts(losses, patience + 1, threshold)


def greedy_lr_cuts(
    losses: np.ndarray, patience: int = 10, threshold: float = 1e-6, window_size: int = 1
) -> np.ndarray:
    """Where GreedyLR cuts: better is ``x < best - threshold``, of a streaming mean where asked.

    Raises do not bear on cuts, but that they begin the count of good rows anew. Rates are not known
    here: what starts theirs again after 500 cuts at the floor is left out.
    """
    means = losses.astype(float)
    if window_size > 1:
        # A running sum as theirs is: what is not finite stays in it for ever.
        with np.errstate(invalid="ignore"):
            sums = np.cumsum(means, axis=1)
            sums[:, window_size:] -= sums[:, :-window_size].copy()
        means = sums / np.minimum(np.arange(losses.shape[1]) + 1, window_size)
    cuts = np.zeros(losses.shape, bool)
    best, bad = np.full(len(losses), np.inf), np.zeros(len(losses), int)
    for step, mean in enumerate(means.T):
        is_better = mean < best - threshold
        best, bad = np.where(is_better, mean, best), np.where(is_better, 0, bad + 1)
        cuts[:, step] = bad > patience
        bad[cuts[:, step]] = 0
    return cuts
