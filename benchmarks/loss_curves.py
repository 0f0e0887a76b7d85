"""Simulated training losses whose truth is known: which steps fall, and when each fall ends.

Each curve falls twice, over 300 to 700 steps each time, by a fifth to a half of what it is, and is
flat for 600 steps after each fall. It falls by a power law, in steps, or linearly; the noise is
Gaussian, heavy-tailed (Student's t with three degrees of freedom) or autocorrelated (0.8 a step),
with a standard deviation of 1, 10 or 100 times the mean fall a step; one step in 200 is a spike.
"""

from typing import NamedTuple

import numpy as np

SHAPES = ("power law", "steps", "linear")
NOISES = ("Gaussian", "heavy-tailed", "autocorrelated")
LEVELS = (1, 10, 100)
KINDS = [(shape, noise, level) for shape in SHAPES for noise in NOISES for level in LEVELS]

FALLS, STALL_STEPS = 2, 600
FALL_STEPS = (300, 700)
STEPS = FALLS * (FALL_STEPS[1] + STALL_STEPS)
AUTOCORRELATION, SPIKE_RATE = 0.8, 0.005


class Curves(NamedTuple):
    """Losses by curve and step, and the truth behind them.

    Attributes:
      values: float32 [curves, steps]; after its own end, each goes on at its last level.
      is_falling: where the loss without noise falls, bool [curves, steps].
      stalls: the first step of each stall, int [curves, FALLS].
      kinds: the shape, noise and level of each curve.
    """

    values: np.ndarray
    is_falling: np.ndarray
    stalls: np.ndarray
    kinds: list[tuple[str, str, int]]


def make_curves(per_kind: int, seed: int) -> Curves:
    """So many curves of each of the 27 kinds."""
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in KINDS for _ in range(per_kind)]
    curves = [_curve(rng, *kind) for kind in kinds]
    values, is_falling, stalls = (np.stack(parts) for parts in zip(*curves, strict=True))
    return Curves(values.astype(np.float32), is_falling, stalls, kinds)


def _curve(
    rng: np.random.Generator, shape: str, noise: str, level: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One curve: its values, where it falls, and where it stalls."""
    height = rng.uniform(2.0, 8.0)
    truth, is_falling = np.zeros(STEPS), np.zeros(STEPS, bool)
    begin, stalls, deviation = 0, [], 0.0
    for _ in range(FALLS):
        steps = int(rng.integers(*FALL_STEPS))
        drop = height * rng.uniform(0.2, 0.5)
        # The noise is that of the first fall: an optimizer's batch does not change.
        deviation = deviation or level * drop / steps
        truth[begin : begin + steps] = height - drop * _share(rng, shape, steps)
        is_falling[begin : begin + steps] = True
        height -= drop
        truth[begin + steps :] = height
        stalls.append(begin + steps)
        begin += steps + STALL_STEPS
    spikes = rng.random(STEPS) < SPIKE_RATE
    jumps = rng.uniform(5.0, 50.0, STEPS) * deviation + 0.05 * truth
    values = truth + deviation * _noise(rng, noise) + spikes * jumps
    return values, is_falling, np.array(stalls)


def _share(rng: np.random.Generator, shape: str, steps: int) -> np.ndarray:
    """How much of a fall is done by each of its steps: rising all the way, to 1."""
    time = np.arange(1, steps + 1)
    if shape == "linear":
        return time / steps
    if shape == "power law":
        share = 1.0 - (1.0 + time / (steps * rng.uniform(0.1, 0.5))) ** -rng.uniform(0.3, 1.0)
        return share / share[-1]
    # Two to four drops of about 30 steps make six tenths of the fall; the rest is steady.
    places = steps * rng.uniform(0.1, 0.9, int(rng.integers(2, 5)))
    drops = 1.0 / (1.0 + np.exp(-(time[:, None] - places) / 4.0))
    share = 0.4 * time / steps + 0.6 * drops.mean(axis=1)
    return (share - share[0]) / (share[-1] - share[0])


def _noise(rng: np.random.Generator, noise: str) -> np.ndarray:
    """Noise of mean 0 and variance 1."""
    if noise == "Gaussian":
        return rng.standard_normal(STEPS)
    if noise == "heavy-tailed":
        return rng.standard_t(3, STEPS) / np.sqrt(3.0)
    fresh = rng.standard_normal(STEPS) * np.sqrt(1.0 - AUTOCORRELATION**2)
    values = np.zeros(STEPS)
    values[0] = rng.standard_normal()
    for step in range(1, STEPS):
        values[step] = AUTOCORRELATION * values[step - 1] + fresh[step]
    return values
