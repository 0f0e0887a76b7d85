"""Decisions as the host reads them: what a strategy changed, when, from what to what, and why."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from meta_optax._core import any_layer
from meta_optax._log import DecisionLog


class _DecisionFields(NamedTuple):
    step: int
    hyperparam: str
    old: float
    new: float
    reason: str


class Decision(_DecisionFields):
    """One change of one hyperparameter: a tuple of five, which the metric it rests on goes with.

    Attributes:
      step: the updates made before the one that it first acted on.
      hyperparam: the hyperparameter's name.
      old: what it would have been without the change.
      new: what it became.
      reason: the strategy's name and the rule that fired, as ``"advanced_plateau: patience"``.
      metric: the name of the metric that the rule fired on, no part of the tuple; empty where the
        strategy does not say.
      value: that metric at that step, NaN where it is no scalar; no part of the tuple.
    """

    metric: str = ""
    value: float = math.nan

    def __new__(
        cls,
        step: int,
        hyperparam: str,
        old: float,
        new: float,
        reason: str,
        metric: str = "",
        value: float = math.nan,
    ) -> "Decision":
        """Builds the tuple, and notes the metric beside it."""
        self = super().__new__(cls, step, hyperparam, old, new, reason)
        self.metric, self.value = metric, value
        return self

    def _replace(self, **changes: Any) -> "Decision":
        """A copy with some of the five, or of the two notes, changed."""
        own = {**self._asdict(), "metric": self.metric, "value": self.value}
        return Decision(**{**own, **changes})


def read_decisions(opt_state: Any) -> list[Decision]:
    """The decisions that a state remembers, oldest first, with one transfer from the device.

    Args:
      opt_state: a state with `with_decisions` anywhere in it, not batched.

    Returns:
      The decisions of all logs in the state, by step; an empty list if nothing was decided.

    Raises:
      ValueError: if there is no log in the state, or if it is batched (by `jax.vmap`).
    """
    logs = gather_logs(opt_state)
    if not logs:
        raise ValueError("The state holds no log: wrap the strategy in with_decisions(...).")
    return decisions_of(jax.device_get(logs))


def gather_logs(opt_state: Any) -> list[DecisionLog]:
    """The logs in a state, wherever its arrays are."""
    return [node for node in jax.tree.leaves(opt_state, is_leaf=_is_log) if _is_log(node)]


def decisions_of(logs: Iterable[DecisionLog]) -> list[Decision]:
    """The decisions of logs on the host, oldest first."""
    decisions = [entry for log in logs for entry in _entries(log)]
    return sorted(decisions, key=lambda decision: decision.step)


def format_decisions(decisions: Iterable[Decision]) -> str:
    """Decisions as lines for people; a rule that fires at each step, or look, is one line.

    So is one that changes several layers' rates alike at one step (``gate_*_learning_rate``).

    Args:
      decisions: what `read_decisions` gave, or a part of it.

    Returns:
      A line a run of decisions: steps, hyperparameter, old and new value, reason.

    Example:
      >>> import meta_optax as mo
      >>> cut = mo.Decision(7, "learning_rate", 0.01, 0.008, "advanced_plateau: patience")
      >>> print(mo.format_decisions([cut]))
      step 7: learning_rate 0.01 -> 0.008 (advanced_plateau: patience)
    """
    runs: list[list[Decision]] = []
    latest: dict[tuple[str, str], list[Decision]] = {}
    for decision in _merge_layers(decisions):
        key = (decision.hyperparam, decision.reason)
        run = latest.get(key)
        if run is not None and _continues(run, decision):
            run.append(decision)
        else:
            latest[key] = [decision]
            runs.append(latest[key])
    # Two decisions some steps apart are two, and no rule that fires at regular looks.
    parts = [part for run in runs for part in ([run] if _is_regular(run) else [[d] for d in run])]
    lines = map(_format_run, sorted(parts, key=lambda part: part[0].step))
    return "\n".join(lines) or "no decisions"


def _is_log(node: Any) -> bool:
    return isinstance(node, DecisionLog)


def _merge_layers(decisions: Iterable[Decision]) -> list[Decision]:
    """One decision for all those that differ in the layer alone."""
    alike: dict[Decision, list[Decision]] = {}
    for decision in decisions:
        kind = decision._replace(hyperparam=any_layer(decision.hyperparam))
        alike.setdefault(kind, []).append(decision)
    return [own[0] if len(own) == 1 else merged for merged, own in alike.items()]


def _continues(run: list[Decision], decision: Decision) -> bool:
    """Whether a decision goes the way of those before it, and as long after as they did."""
    gap = decision.step - run[-1].step
    same_way = (decision.new > decision.old) == (run[-1].new > run[-1].old)
    return same_way and gap > 0 and (len(run) == 1 or gap == run[1].step - run[0].step)


def _is_regular(run: list[Decision]) -> bool:
    return len(run) != 2 or run[1].step == run[0].step + 1


def _format_run(run: list[Decision]) -> str:
    first, last = run[0], run[-1]
    when = f"step {first.step}"
    if len(run) > 1:
        gap = run[1].step - first.step
        when = f"steps {first.step}-{last.step}" + (f" by {gap}" if gap > 1 else "")
    on = f", {first.metric}={first.value:.4g}" if first.metric and len(run) == 1 else ""
    return f"{when}: {first.hyperparam} {first.old:.4g} -> {last.new:.4g} ({first.reason}{on})"


def _entries(log: DecisionLog) -> list[Decision]:
    """A log's decisions on the host, oldest first."""
    if log.count.ndim:
        raise ValueError(f"The log is batched, with shape {log.count.shape}: read one of them.")
    count, capacity = int(log.count), len(log.step)
    order = [index % capacity for index in range(max(0, count - capacity), count)]
    return [
        Decision(
            step=int(log.step[i]),
            hyperparam=_decode(log.hyperparam[i]),
            old=float(log.old[i]),
            new=float(log.new[i]),
            reason=_decode(log.reason[i]),
            metric=_decode(log.metric[i]),
            value=float(log.value[i]),
        )
        for i in order
    ]


def _decode(data: Any) -> str:
    return bytes(data).rstrip(b"\0").decode(errors="replace")
