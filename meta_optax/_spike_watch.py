"""What a spike is: a value that stands out from those accepted before it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from meta_optax import _checks
from meta_optax._core import select
from meta_optax._history import Window, clear_where, empty_window, push, stands_out

_SHORTEST_WINDOW = 8


class SpikeWatch(NamedTuple):
    """What is known of the judged metrics; ``streak`` is how many spikes came in a row."""

    kept_on_reset = ("windows", "streak")

    windows: dict[str, Window]
    streak: Int[Array, ""]


class SpikeRule(NamedTuple):
    """When a value is a spike, and for how long."""

    window: int
    threshold: ArrayLike
    max_consecutive: ArrayLike
    both_sides: tuple[str, ...]


class Verdict(NamedTuple):
    """What becomes of a step: neither where something was not finite."""

    is_accepted: Bool[Array, ""]
    is_spike: Bool[Array, ""]


def spike_rule(
    window: Any, threshold: Any, max_consecutive: Any, *, both_sides: tuple[str, ...]
) -> SpikeRule:
    """The arguments, checked."""
    return SpikeRule(
        window=_checks.size("window", window, low=_SHORTEST_WINDOW),
        threshold=_checks.real("threshold", threshold, open_low=True),
        max_consecutive=_checks.integer("max_consecutive", max_consecutive, low=1),
        both_sides=both_sides,
    )


def start_watch(rule: SpikeRule, names: tuple[str, ...]) -> SpikeWatch:
    return SpikeWatch(
        windows={name: empty_window(rule.window) for name in names},
        streak=jnp.zeros([], jnp.int32),
    )


def judge(
    rule: SpikeRule,
    watch: SpikeWatch,
    values: Mapping[str, Array],
    finite: Bool[Array, ""],
    arrived: Mapping[str, Bool[Array, ""]],
) -> tuple[SpikeWatch, Verdict]:
    """Judges the values of a step that arrived, and learns them if they are accepted."""
    stands_out_at_all = jnp.array(False)
    for name, value in values.items():
        window = watch.windows[name]
        enough = window.count >= max(rule.window // 2, _SHORTEST_WINDOW)
        stands_out_at_all |= (arrived[name] & enough) & stands_out(
            window, value, rule.threshold, both_sides=name in rule.both_sides
        )
    suspect = finite & stands_out_at_all
    is_new_normal = suspect & (watch.streak >= rule.max_consecutive)
    verdict = Verdict(
        is_accepted=finite & (~suspect | is_new_normal), is_spike=suspect & ~is_new_normal
    )
    learned = {
        name: select(
            verdict.is_accepted & arrived[name],
            push(clear_where(is_new_normal, watch.windows[name]), value),
            watch.windows[name],
        )
        for name, value in values.items()
    }
    streak = count_if(watch.streak, verdict.is_spike)
    # A step on which a metric did not arrive says nothing of whether that one is back to normal:
    # if it ended the row, spikes of a loss that comes every n-th step would be hidden for ever.
    complete = all_of(arrived)
    ends = verdict.is_accepted & (complete | is_new_normal)
    return SpikeWatch(
        windows={**watch.windows, **learned}, streak=jnp.where(ends, 0, streak)
    ), verdict


def count_if(count: Int[Array, ""], happened: Bool[Array, ""]) -> Int[Array, ""]:
    """One more where something happened, saturating."""
    return jnp.where(happened, optax.safe_increment(count), count)


def all_of(flags: Mapping[str, Bool[Array, ""]]) -> Bool[Array, ""]:
    """Whether all of some flags are true."""
    return jnp.stack(list(flags.values())).all()
