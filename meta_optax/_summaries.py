"""How many numbers a log keeps of an array, under which names: NumPy in, Python numbers out."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from meta_optax._core import any_layer

Number = int | float


def summarise(name: str, value: Any, max_layers: int) -> dict[str, Number]:
    """A metric as numbers by key, at most ``3 * max_layers`` of them.

    With n the length of the first axis: a scalar is ``name``; a vector of at most ``max_layers``
    is ``name/00``, ``name/01``, …; an array of a higher rank has ``name/00/min``, ``/mean`` and
    ``/max`` over the other axes where n is at most ``max_layers``; whatever is longer has
    ``name/min``, ``name/mean`` and ``name/max`` over all of it. A NaN in an array makes those that
    it goes into NaN.

    Raises:
      ValueError: if the value is no array of real numbers, or an empty one.
    """
    array = np.asarray(value)
    if not (jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)):
        if array.dtype != bool:
            raise ValueError(
                f"The metric {name!r} must be a real number or an array of them, got {value!r}."
            )
        array = array.astype(np.int32)
    if not array.size:
        raise ValueError(f"The metric {name!r} is empty, with shape {array.shape}: leave it out.")
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float64)
    if array.ndim == 0:
        return {name: array.item()}
    if len(array) > max_layers:
        return _extent(name, array)
    rows: dict[str, Number] = {}
    for index, row in enumerate(array):
        key = f"{name}/{index:0{_digits(len(array))}}"
        rows |= {key: row.item()} if array.ndim == 1 else _extent(key, row)
    return rows


def summarise_layers(hyperparams: Mapping[str, Number], max_layers: int) -> dict[str, Number]:
    """Hyperparameters, those of more than ``max_layers`` layers as their least, mean and most.

    ``gate_0_learning_rate``, ``gate_1_learning_rate``, … are then three keys,
    ``gate_*_learning_rate/min``, ``/mean`` and ``/max``.
    """
    alike: dict[str, dict[str, Number]] = {}
    for name, value in hyperparams.items():
        alike.setdefault(any_layer(name), {})[name] = value
    kept: dict[str, Number] = {}
    for pattern, layers in alike.items():
        many = len(layers) > max_layers
        kept |= _extent(pattern, np.array(list(layers.values()))) if many else layers
    return kept


def _extent(key: str, array: np.ndarray) -> dict[str, Number]:
    # Infinities of both signs have no mean, which is no reason to warn.
    with np.errstate(all="ignore"):
        mean = array.mean(dtype=np.float64).item()
    return {f"{key}/min": array.min().item(), f"{key}/mean": mean, f"{key}/max": array.max().item()}


def _digits(length: int) -> int:
    """Enough that keys sort as the layers do."""
    return max(2, len(str(length - 1)))
