"""Losses and norms of clean training."""

import numpy as np

AFTER = 140  # steps behind a NaN, of which a window of 128 with that NaN in it drops 128
CLEAN = 1_000


def noise(seed, size, *, scale=0.1):
    return scale * np.random.default_rng(seed).standard_normal(size)


def clean(seed, size=CLEAN):
    """A falling, noisy loss and a noisy norm, none of which is a spike."""
    loss = 1.0 + 2.0 / np.sqrt(1.0 + np.arange(size) / 10) + noise(seed, size, scale=0.02)
    return loss.astype(np.float32), np.exp(noise(seed + 1, size)).astype(np.float32)
