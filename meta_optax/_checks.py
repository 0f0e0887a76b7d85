"""Checks of arguments: at build time an error, while tracing a clip."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

if TYPE_CHECKING:
    from jax.typing import ArrayLike as Scalar
    from optax import GradientTransformation as Transformation

    Mode = Literal["min", "max"]
    Pair = tuple[Scalar, Scalar]
    Actions = Sequence[float]
    Flag = bool
    Size = int
else:
    # What has another type must reach the checks here, also where types are checked at run time.
    Scalar = Pair = Actions = Flag = Size = Mode = Transformation = Any

_MOST = np.iinfo(np.int32).max


def real(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> float | jax.Array:
    """Returns ``value`` if it is a real number in the range, else raises.

    A traced value (a ``vmap`` over arguments, say) cannot be looked at: it is clipped to the
    nearest float32 inside the range instead.

    Args:
      name: the argument's name, for the message.
      value: what the caller gave.
      low: the lower end of the range.
      high: the upper end of the range; ``math.inf`` may be reached unless ``open_high``.
      open_low: whether ``low`` itself is outside.
      open_high: whether ``high`` itself is outside.

    Raises:
      ValueError: if ``value`` is not a real scalar in the range; NaN never is.
    """
    if isinstance(value, Tracer):
        floor = np.nextafter(np.float32(low), np.float32(np.inf)) if open_low else low
        ceiling = np.nextafter(np.float32(high), np.float32(-np.inf)) if open_high else high
        return jnp.clip(value.astype(jnp.float32), floor, ceiling)
    number = _as_float(value)
    above = number is not None and (number > low if open_low else number >= low)
    below = number is not None and (number < high if open_high else number <= high)
    if number is None or not (above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}.")
    return number


def size(name: str, value: Any, *, low: int) -> int:
    """Like `integer`, for what decides a shape and so must not be traced."""
    if isinstance(value, Tracer):
        raise ValueError(f"{name} decides the shape of a state, so it must not be traced: {value}.")
    return int(integer(name, value, low=low))


def integer(name: str, value: Any, *, low: int) -> int | jax.Array:
    """Returns ``value`` if it is an integer of at least ``low``, else raises.

    A traced value is clipped to ``low`` from below instead.

    Args:
      name: the argument's name, for the message.
      value: what the caller gave.
      low: the least that is allowed.

    Raises:
      ValueError: if ``value`` is not an integer, or is below ``low``.
    """
    if isinstance(value, Tracer):
        return jnp.maximum(value.astype(jnp.int32), low)
    number = _as_float(value)
    if number is None or not number.is_integer() or not low <= number <= _MOST:
        raise ValueError(f"{name} must be an integer >= {low} (in int32), got {value!r}.")
    return int(number)


def actions(name: str, values: Any, *, are_factors: bool) -> tuple[float, ...]:
    """Returns a list of factors above 0, or of finite steps, as a tuple of floats.

    Raises:
      ValueError: if it is no list, is empty, is traced, or holds anything else.
    """
    what = "factors above 0" if are_factors else "finite steps"
    is_vector = isinstance(values, np.ndarray) and values.ndim == 1
    is_list = is_vector or isinstance(values, tuple | list)
    if not is_list or len(values) == 0:
        raise ValueError(f"{name} must be a list of at least one of {what}, got {values!r}.")
    if not is_known(*values):
        raise ValueError(f"{name} decides what is computed, so it must not be traced: {values}.")
    numbers = [float(real(f"{name}[{i}]", v, low=-math.inf)) for i, v in enumerate(values)]
    if not all(math.isfinite(n) and (n > 0 or not are_factors) for n in numbers):
        raise ValueError(f"{name} must be a list of {what}, got {values!r}.")
    return tuple(numbers)


def scale_bounds(min_scale: Any, max_scale: Any) -> tuple[jax.Array, jax.Array]:
    """The logarithms of the bounds of a scale, the lower in (0, 1] and the upper in [1, inf)."""
    least = real("min_scale", min_scale, low=0.0, high=1.0, open_low=True)
    most = real("max_scale", max_scale, low=1.0, open_high=True)
    low, high = (jnp.log(jnp.asarray(end, jnp.float32)) for end in (least, most))
    return low, high


def pair(name: str, value: Any, *, what: str, high: float = math.inf) -> tuple[Any, Any]:
    """Returns the two numbers of ``value``, each in [0, ``high``], else raises a ``ValueError``."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{name} must be a pair {what}, got {value!r}.")
    first, second = (real(name, end, high=high) for end in value)
    return first, second


def sign_of_mode(mode: Any) -> float:
    """What turns a metric into one to be lowered: 1 for ``"min"`` and -1 for ``"max"``.

    Raises:
      ValueError: for another mode.
    """
    if not isinstance(mode, str) or mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")
    return 1.0 if mode == "min" else -1.0


def smoothing(value: Any) -> int | float:
    """Returns what is kept by an average, in (0, 1), or the rows of a block, >= 2; 0 for neither.

    Raises:
      ValueError: if it is none of these, or traced.
    """
    if not is_known(value):
        raise ValueError(f"smoothing decides what is computed, so it must not be traced: {value}.")
    number = _as_float(value)
    is_block = number is not None and number.is_integer() and 0 <= number <= _MOST
    if number is None or not (is_block or 0.0 < number < 1.0):
        raise ValueError(
            "smoothing must be 0 or 1 (none), a share in (0, 1) that an average keeps, or the rows "
            f"of a block, an integer >= 2; got {value!r}."
        )
    return int(max(number, 1)) if is_block else number


def is_known(*values: Any) -> bool:
    """Whether the values can be looked at: none is traced."""
    return not any(isinstance(value, Tracer) for value in values)


def flag(name: str, value: Any) -> bool:
    """Returns ``value`` if it is a bool, else raises a ``ValueError`` that names the argument."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def _as_float(value: Any) -> float | None:
    """A finite or infinite Python float, or None for what is no real scalar."""
    if isinstance(value, bool | np.bool_ | str | bytes) or value is None or np.ndim(value) != 0:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number
