"""What a run looks like from outside: metrics, hyperparameters and decisions, in files."""

import contextlib
import functools
import operator
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from meta_optax import _checks
from meta_optax._checks import Flag, Size
from meta_optax._core import describe_kind, is_boolean_scalar, is_pair
from meta_optax._decisions import Decision, decisions_of, format_decisions
from meta_optax._files import EventFile, JsonLines, decision_key, import_tensorboard
from meta_optax._gather import at_hand, gather
from meta_optax._read import hyperparams_of
from meta_optax._summaries import Number, summarise, summarise_layers

# What a row has besides numbers by name.
_OWN_KEYS = {"step", "decisions", "decisions_lost"}


class MetricsWriter:
    """Writes metrics, hyperparameters and decisions to event files of TensorBoard and to JSON.

    For the host, outside of jit. Each `write` fetches all that it needs with one
    `jax.device_get`, and is in the files when it returns.

    A row has, by key: ``step``; each metric; with a state, each hyperparameter as
    ``hyperparams/`` and its name, ``nonfinite_count``, ``skipped_count`` and ``spike_count`` where
    the state counts these (summed over the strategies in it), and the decisions since the last
    row. The number of keys does not grow with the model. With n the length of an array's first
    axis: a vector with n <= ``max_layers`` has a key an entry (``name/00``), an array of a higher
    rank three a row (``name/00/min``, ``/mean``, ``/max``), and what is longer three in all. So a
    metric never has more than ``3 * max_layers`` keys, 48 by default. A hyperparameter of more
    than ``max_layers`` layers has three: ``hyperparams/gate_*_learning_rate/min`` and so on.
    Nothing is left out of a minimum, mean or maximum: a NaN in an array makes them NaN.

    ``metrics.jsonl`` has one object a line, NaN and infinities as null, the decisions as a list
    ``decisions`` of objects with ``step``, ``hyperparam``, ``old``, ``new`` and ``reason``; if
    more were made than the log holds, ``decisions_lost`` says how many are missing. TensorBoard
    gets numbers as scalars and decisions as text.

    Under several processes, make and call it in that with ``jax.process_index() == 0`` alone; it
    waits for no other. Arrays that are spread over processes must be replicated.

    Args:
      folder: where the files go; made if it is not there. A path of this machine.
      tensorboard: whether to write event files; needs tensorboardX.
      json_lines: whether to write ``metrics.jsonl``.
      max_layers: the longest axis that has a key an entry, an integer >= 1.
      resume_step: the step at which a run goes on, after a crash for one, an integer >= 0. Lines
        of that step and later, and one that is cut off, leave ``metrics.jsonl``; TensorBoard
        hides what was there of them. Decisions that the remaining lines tell are not told again.

    Raises:
      ImportError: if tensorboardX is needed and missing.
      FileExistsError: if there is a log already (``metrics.jsonl`` or an event file), and no
        ``resume_step``; or if ``folder`` is a file. No log is ever overwritten.
      ValueError: for an argument outside its range, or if ``metrics.jsonl`` has a line of
        something else.
      OSError: if the files cannot be made or written; it names the path.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with mo.MetricsWriter(folder, tensorboard=False) as writer:
      ...         writer.write(0, {"loss": jnp.float32(1.5), "usage": jnp.array([0.25, 0.75])})
      ...     with open(f"{folder}/metrics.jsonl") as file:
      ...         print(file.read().strip())
      {"step": 0, "loss": 1.5, "usage/00": 0.25, "usage/01": 0.75}
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tensorboard: Flag = True,
        json_lines: Flag = True,
        max_layers: Size = 16,
        resume_step: Size | None = None,
    ) -> None:
        """Makes the folder and opens the files."""
        if not (tensorboard or json_lines):
            raise ValueError("MetricsWriter has nothing to write: set tensorboard or json_lines.")
        if "://" in os.fspath(folder):
            raise ValueError(f"folder must be a path of this machine, got {os.fspath(folder)!r}.")
        self._max_layers = _checks.size("max_layers", max_layers, low=1)
        if resume_step is not None:
            resume_step = _checks.size("resume_step", resume_step, low=0)
        if tensorboard:
            import_tensorboard()
        path = pathlib.Path(folder)
        with contextlib.ExitStack() as files:
            # The lines first: if they are another run's, no event file is made.
            self._lines = JsonLines(path / "metrics.jsonl", resume_step) if json_lines else None
            if self._lines:
                files.callback(self._lines.close)
            self._events = EventFile(path, resume_step) if tensorboard else None
            if self._events:
                files.callback(self._events.close)
            self._files = files.pop_all()
        self._resume_step = resume_step
        self._last: int | None = None
        self._told = self._lines.told if self._lines else set()
        # The decisions made up to the last row; after a crash nobody knows.
        self._decided = 0 if resume_step is None else None
        self._closed = False

    def __enter__(self) -> "MetricsWriter":
        """The writer itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the files."""
        self.close()

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        self._closed = True
        self._files.close()

    def write(self, step: Any, metrics: Mapping[str, Any], opt_state: Any = None) -> None:
        """Writes a row, with one transfer from the device.

        Args:
          step: an integer, greater than that of the row before.
          metrics: numbers or arrays by name, on the device or not. Of a pair ``(value, flag)`` the
            value is written where the flag is true, and nothing where it is not.
          opt_state: an optimizer's state, or as much of it as is to be told: the moments are not
            read, so ``state._replace(inner_state=())`` will do.

        Raises:
          ValueError: if the step is not greater than the last one written, if a metric is no
            number and no array of numbers, or is not all in this process, if two things have one
            key, if there is nothing to tell in the state, or if the writer is closed.
          OSError: if the files cannot be written; it names the path, and ``metrics.jsonl`` is as
            it was.
        """
        if self._closed:
            raise ValueError("This MetricsWriter is closed: make another one, with resume_step.")
        values = [
            jax.tree.map(functools.partial(at_hand, f"The metric {name!r}"), value)
            for name, value in metrics.items()
        ]
        found = None if opt_state is None else gather(opt_state)
        found = jax.tree.map(functools.partial(at_hand, "The state"), found)
        step, values, found = jax.device_get((step, values, found))
        step = self._check_step(step)
        row: dict[str, Number] = {}
        for name, value in zip(metrics, values, strict=True):
            if is_pair(value):
                value, has_arrived = _open_pair(name, value)
                if not has_arrived:
                    continue
            _add(row, summarise(name, value, self._max_layers))
        if found is None:
            self._put(step, row)
            return
        hyperparams = summarise_layers(hyperparams_of(found.hyperparams), self._max_layers)
        _add(row, {f"hyperparams/{name}": value for name, value in hyperparams.items()})
        _add(row, {name: int(sum(map(np.sum, counts))) for name, counts in found.counts.items()})
        if not found.logs:
            self._put(step, row)
            return
        decisions = decisions_of(found.logs)
        new = [decision for decision in decisions if decision_key(decision) not in self._told]
        decided = sum(int(log.count) for log in found.logs)
        lost = 0 if self._decided is None else max(0, decided - self._decided - len(new))
        self._put(step, row, new, lost)
        self._told = set(map(decision_key, decisions))
        self._decided = decided

    def _check_step(self, step: Any) -> int:
        """The step as an integer, if it comes after the last one."""
        try:
            number = operator.index(step)
        except TypeError as error:
            raise ValueError(f"step must be an integer, got {step!r}.") from error
        if self._last is not None and number <= self._last:
            raise ValueError(
                f"step {number} is not greater than {self._last}, the last one written: write "
                "once a step, from one place of the loop."
            )
        if number < (self._resume_step or 0):
            raise ValueError(f"step {number} comes before {self._resume_step or 0}, the first one.")
        return number

    def _put(
        self,
        step: int,
        row: Mapping[str, Number],
        decisions: list[Decision] | None = None,
        lost: int = 0,
    ) -> None:
        """Writes a row to all files; events first, which do no harm if they come twice."""
        lines = format_decisions(decisions).splitlines() if decisions else []
        if lost:
            lines.append(f"{lost} more that the log no longer held: write more often")
        if self._events:
            self._events.write(step, row, "\n".join(f"- {line}" for line in lines))
        if self._lines:
            whole: dict[str, Any] = {"step": step, **row}
            if decisions is not None:
                whole["decisions"] = [
                    dict(zip(d._fields, decision_key(d), strict=True)) for d in decisions
                ]
            if lost:
                whole["decisions_lost"] = lost
            self._lines.write(whole)
        self._last = step


def _open_pair(name: str, pair: tuple[Any, Any]) -> tuple[Any, bool]:
    """The value of a pair, and whether it arrived."""
    value, flag = pair
    if not is_boolean_scalar(flag):
        raise ValueError(
            f"The metric {name!r} is a pair whose flag is {describe_kind(flag)}: it must be a "
            "boolean scalar. Two numbers are an array."
        )
    return value, bool(flag)


def _add(row: dict[str, Number], new: Mapping[str, Number]) -> None:
    """Adds numbers to a row in which no key may stand twice."""
    if twice := sorted(new.keys() & (row.keys() | _OWN_KEYS)):
        raise ValueError(f"{twice[0]!r} would stand twice in a row: call the metric otherwise.")
    row.update(new)
