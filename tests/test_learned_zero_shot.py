"""The shipped policy on models that it was never trained on, and at ten times its horizons."""

import numpy as np
import pytest

pytest.importorskip("statsmodels", exc_type=ImportError)

import learned as benchmark

from meta_optax.compare._arms import ARMS
from meta_optax.compare._protocol import MULTIPLES, WELL_TUNED
from meta_optax.metatrain._train import Settings

SEEDS, FIRST_SEED = 2, 2000


def _ratios(task, lengthen=1.0):
    """Median final losses over those of the schedule alone, by multiple of the rate."""
    arms = benchmark.learned_arm(None), ARMS["linear"]
    ours, peer = (benchmark.train(task, arm, SEEDS, lengthen, FIRST_SEED) for arm in arms)
    assert not ours.diverged.any()
    return np.median(ours.final / peer.final, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gru_prose", "cnn_digits", "moe_language"])
def test_on_architectures_that_it_never_saw(task):
    ratios = _ratios(task)
    assert ratios[WELL_TUNED] < 1.1
    assert np.delete(ratios, WELL_TUNED).max() < 1.1
    assert ratios[MULTIPLES.index(0.03)] < 0.95
    assert ratios[MULTIPLES.index(30.0)] < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("task", ["noisy_quadratic", "logistic_digits"])
def test_at_ten_times_the_longest_horizon(task):
    lengthen = 6.67
    assert lengthen * benchmark.TASKS[task]().steps > 10 * Settings().longest
    ratios = _ratios(task, lengthen)
    assert ratios.max() < 1.1
