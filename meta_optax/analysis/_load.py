"""Logs of runs: lines of JSON in, arrays by name out."""

import json
import math
import os
import pathlib
import re
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from meta_optax._decisions import Decision

# The files that hold a log, by whom: `MetricsWriter`, and the scripts in examples/.
_FILES = ("metrics.jsonl", "log.jsonl")
# How MetricsWriter calls an entry of a vector, and what it says of a row of an array.
_ENTRY = re.compile(r"(.+)/(\d{2,})(/min|/mean|/max)?")

Row = Mapping[str, Any]


class Log(NamedTuple):
    """A run as it was logged.

    Attributes:
      path: the file it was read from.
      steps: the step of each row, strictly increasing.
      values: what was logged, by key: [rows], or [rows, n...] for arrays; NaN where a row lacks
        the key or has null.
      decisions: what the strategies changed, oldest first.
      absent: the steps of the rows that lack a key, by key, for keys that some rows lack: a metric
        that was measured now and then is not one that broke.
    """

    path: pathlib.Path
    steps: Int[np.ndarray, " rows"]
    values: dict[str, Float[np.ndarray, "rows ..."]]
    decisions: list[Decision]
    absent: Mapping[str, Int[np.ndarray, " lacking"]] = types.MappingProxyType({})


def load_log(path: str | os.PathLike[str]) -> Log:
    """Reads a log of `MetricsWriter`, or of a script in ``examples/``.

    Keys stay as they are in the file, but that the writer's ``name/00``, ``name/01``, … become one
    array ``name`` again, and ``name/00/min``, … one array ``name/min``. Texts and objects are left
    out. A step that is not greater than the one before starts a part that was run again: rows of
    that step and later, written before, give way to it.

    Args:
      path: a file with one JSON object a line, each with an integer ``step``; or a folder with a
        ``metrics.jsonl`` or a ``log.jsonl``. Where rows tell no decisions, those of a
        ``summary.json`` beside the file are taken.

    Returns:
      The log. A last line that is no whole object, as a crash leaves it, is dropped with a warning.

    Raises:
      FileNotFoundError: if there is no such file, or none in the folder.
      ValueError: if a folder has both files, if there is no row, if a line is no row of a log, or
        if an array changes its shape; the message names the file and the line.

    Example:
      >>> import meta_optax as mo, tempfile
      >>> from meta_optax import analysis
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with mo.MetricsWriter(folder, tensorboard=False) as writer:
      ...         writer.write(0, {"loss": 1.5, "expert_usage": [0.25, 0.75]})
      ...         writer.write(10, {"loss": 0.5})
      ...     log = analysis.load_log(folder)
      >>> print(log.steps, log.values["loss"], log.values["expert_usage"][0])
      [ 0 10] [1.5 0.5] [0.25 0.75]
    """
    file = _find(pathlib.Path(path))
    rows = _replace_rerun(_read_rows(file))
    told = [entry for _, row in rows for entry in _told(row.get("decisions") or [])]
    decisions = _decisions(file, told or _summary_decisions(file))
    try:
        steps = np.array([row["step"] for _, row in rows], np.int64)
    except OverflowError as error:
        raise ValueError(f"{file} has a step that is no 64-bit integer.") from error
    values, parts = _join(_columns(file, rows))
    absent = {
        key: np.array([not any(part in row for part in parts[key]) for _, row in rows])
        for key in values
    }
    return Log(
        path=file,
        steps=steps,
        values=values,
        decisions=decisions,
        absent={key: steps[lacks] for key, lacks in absent.items() if lacks.any()},
    )


def _find(path: pathlib.Path) -> pathlib.Path:
    """The file itself, or the one log in a folder."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"There is no log at {path}: pass a file, or a folder of one.")
        return path
    found = [path / name for name in _FILES if (path / name).exists()]
    if not found:
        raise FileNotFoundError(f"{path} has no {' and no '.join(_FILES)}: pass the file itself.")
    if len(found) > 1:
        raise ValueError(f"{path} has both {' and '.join(_FILES)}: pass the file you mean.")
    return found[0]


def _read_rows(file: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows with the numbers of their lines, without a last one that is cut off."""
    lines = [
        (number, line)
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1)
        if line.strip()
    ]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            if number != lines[-1][0]:
                raise ValueError(f"{file}, line {number}, is no JSON: {error}.") from error
            warnings.warn(f"{file}, line {number}, is cut off: it is left out.", stacklevel=3)
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(
                f"{file}, line {number}, is no row of a log, an object with an integer 'step': "
                f"{line[:60].decode(errors='replace')}"
            )
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{file} has no row: nothing was logged.")
    return rows


def _replace_rerun(rows: Iterable[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """The rows, of which later ones replace those of the same step and beyond."""
    kept: list[tuple[int, dict[str, Any]]] = []
    for number, row in rows:
        while kept and kept[-1][1]["step"] >= row["step"]:
            kept.pop()
        kept.append((number, row))
    return kept


def _columns(
    file: pathlib.Path, rows: Sequence[tuple[int, Row]]
) -> dict[str, Float[np.ndarray, "rows ..."]]:
    """One array a key, NaN where a row has nothing."""
    columns: dict[str, np.ndarray] = {}
    for index, (number, row) in enumerate(rows):
        for key, value in row.items():
            if key in ("step", "decisions") or value is None or isinstance(value, str | dict):
                continue
            try:
                array = np.asarray(value, np.float64)  # None is NaN.
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"{file}, line {number}: {key!r} must be a number or an array of them, "
                    "none larger than a float."
                ) from error
            if key not in columns:
                columns[key] = np.full((len(rows), *array.shape), np.nan)
            if array.shape != columns[key].shape[1:]:
                raise ValueError(
                    f"{file}, line {number}: {key!r} has shape {array.shape}, and had "
                    f"{columns[key].shape[1:]} before."
                )
            columns[key][index] = array
    return columns


def _join(
    columns: Mapping[str, Float[np.ndarray, "rows ..."]],
) -> tuple[dict[str, Float[np.ndarray, "rows ..."]], dict[str, list[str]]]:
    """The columns, with the entries of a vector in one [rows, n], and what each was made of."""
    entries: dict[str, dict[int, str]] = {}
    for key in columns:
        if match := _ENTRY.fullmatch(key):
            entries.setdefault(match[1] + (match[3] or ""), {})[int(match[2])] = key
    joined = dict(columns)
    parts = {key: [key] for key in columns}
    for name, keys in entries.items():
        if name in columns or sorted(keys) != list(range(len(keys))):
            continue  # It is no vector of the writer's.
        parts[name] = [keys[index] for index in sorted(keys)]
        joined[name] = np.stack([columns[key] for key in parts[name]], axis=1)
        for key in parts[name]:
            del joined[key]
    return joined, parts


def _told(decisions: Any) -> list[Any]:
    """A row's decisions; what is no list is one that `_decisions` refuses."""
    return decisions if isinstance(decisions, list) else [decisions]


def _summary_decisions(file: pathlib.Path) -> list[Any]:
    """What a summary beside the log tells; an empty list if there is none."""
    summary = file.with_name("summary.json")
    if not summary.exists():
        return []
    try:
        return _told(json.loads(summary.read_bytes()).get("decisions") or [])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{summary} is no JSON object: mend it, or take it away.") from error


def _decisions(file: pathlib.Path, told: Iterable[Any]) -> list[Decision]:
    """Decisions by step, each once: a run that goes on may tell again what it had told."""
    decisions: dict[tuple[Any, ...], Decision] = {}
    for entry in told:
        try:
            fields = tuple(entry[name] for name in Decision._fields)
            step, hyperparam, old, new, reason = fields
            old, new = (math.nan if value is None else float(value) for value in (old, new))
            decisions.setdefault(fields, Decision(step, hyperparam, old, new, reason))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: a decision must have {', '.join(Decision._fields)}, got {entry!r}."
            ) from error
    return sorted(decisions.values(), key=lambda decision: decision.step)
