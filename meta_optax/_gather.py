"""What there is to tell of a state, and how it comes to the host."""

from typing import Any, NamedTuple

import jax

from meta_optax._decisions import gather_logs
from meta_optax._log import DecisionLog
from meta_optax._read import FoundHyperparams, gather_hyperparams

# The fields of states that count what was held, hidden or dropped, and what each is shown as.
_COUNTS = {
    "nonfinite_count": "nonfinite_count",
    "own_nonfinite_count": "nonfinite_count",
    "skipped_count": "skipped_count",
    "spike_count": "spike_count",
}


class Found(NamedTuple):
    """What there is to tell of a state."""

    hyperparams: FoundHyperparams
    counts: dict[str, list[Any]]
    logs: list[DecisionLog]


def gather(opt_state: Any) -> Found:
    """What there is to tell of a state, wherever its arrays are.

    Raises:
      ValueError: if there is nothing.
    """
    counts: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        for key in path:
            if name := _COUNTS.get(getattr(key, "name", "")):
                counts.setdefault(name, []).append(leaf)
    found = Found(gather_hyperparams(opt_state), counts, gather_logs(opt_state))
    if not (found.hyperparams.values or counts or found.logs):
        raise ValueError(
            "The state holds no hyperparameters, counts or decisions: build the optimizer with "
            "inject_meta_hyperparams or scale_by_meta, or leave opt_state out."
        )
    return found


def at_hand(what: str, leaf: Any) -> Any:
    """A leaf that this process can fetch without the others.

    Raises:
      ValueError: if parts of it are in other processes only.
    """
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    raise ValueError(
        f"{what} is spread over processes, with shape {leaf.shape} and {leaf.sharding}: replicate "
        "it inside the step, by taking its mean for one."
    )
