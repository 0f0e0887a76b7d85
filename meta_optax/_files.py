"""The files of a log: lines of JSON, and event files of TensorBoard."""

import contextlib
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from meta_optax._decisions import Decision

# A decision in a log: its five fields, what is not finite as None.
DecisionKey = tuple[Any, ...]


def import_tensorboard() -> Any:
    """The module tensorboardX, which only event files need.

    Raises:
      ImportError: if it is missing; the message says what to install.
    """
    try:
        import tensorboardX
        import tensorboardX.proto.event_pb2
        import tensorboardX.summary
    except ImportError as error:
        raise ImportError(
            'MetricsWriter needs tensorboardX to write event files: pip install "meta-optax'
            '[logging]", or pass tensorboard=False.'
        ) from error
    return tensorboardX


def as_json(value: Any) -> Any:
    """The value, or None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decision_key(decision: Decision) -> DecisionKey:
    """What tells a decision from others, the same before it is written and after it is read."""
    return tuple(as_json(value) for value in decision)


class JsonLines:
    """A file of one JSON object a line, on which a step is written whole or not at all.

    Attributes:
      told: the decisions that the lines which were there tell.
    """

    def __init__(self, path: pathlib.Path, resume_step: int | None) -> None:
        """Opens the file for more lines, without those from ``resume_step`` on."""
        self._path = path
        self.told: set[DecisionKey] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            if resume_step is None:
                raise FileExistsError(
                    f"{path} has a log already: pass resume_step=... to go on with it, the step "
                    "that comes next, or choose another folder."
                )
            self._cut(resume_step)
        # Unbuffered: what a full disk does not take is not tried again behind our back.
        self._file = open(path, "ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a line; if that fails, the file is as it was."""
        values = {key: as_json(value) for key, value in row.items()}
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        start = self._file.seek(0, os.SEEK_END)
        with _naming(self._path):
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:]) or 0
            except OSError:
                self._file.truncate(start)
                raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _cut(self, resume_step: int) -> None:
        """Leaves out the lines from a step on, by a copy that takes the file's place when whole."""
        path = self._path.resolve()  # A link stays one.
        copy = path.with_name(path.name + ".tmp")
        try:
            with _naming(copy), open(copy, "wb") as file:
                for row, line in self._rows():
                    if row["step"] < resume_step:
                        file.write(line.rstrip(b"\n") + b"\n")
                        self.told |= {tuple(d.values()) for d in row.get("decisions", ())}
                file.flush()
                os.fsync(file.fileno())
            os.replace(copy, path)
        finally:
            copy.unlink(missing_ok=True)

    def _rows(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The lines and their objects, without a last one that is cut off."""
        broken = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if broken:
                    raise ValueError(
                        f"{self._path} has something else than a row of a log in line {broken}, "
                        "and more behind it: mend the file, or choose another folder."
                    )
                row = _row_of(line)
                if row is None:
                    broken = number
                else:
                    yield row, line


def _row_of(line: bytes) -> dict[str, Any] | None:
    """A line's object, None if it is not whole or no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the path into errors, of which those of writing have none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class EventFile:
    """An event file of TensorBoard, written without tensorboardX's thread.

    In that thread an error is lost, and the queue before it then fills until ``put`` waits for
    ever; and what is in the queue when a run is killed is lost too.
    """

    def __init__(self, folder: pathlib.Path, resume_step: int | None) -> None:
        """Makes the file; TensorBoard hides what others have from ``resume_step`` on."""
        tensorboard = import_tensorboard()
        folder.mkdir(parents=True, exist_ok=True)
        if resume_step is None and (others := sorted(folder.glob("events.out.tfevents.*"))):
            raise FileExistsError(
                f"{others[0]} is a log already: pass resume_step=... to go on with it, the step "
                "that comes next, or choose another folder."
            )
        self._proto = tensorboard.proto.event_pb2
        self._summary = tensorboard.summary
        # TensorBoard reads files in the order of their names, so those of one second too.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._file = tensorboard.RecordWriter(str(self._path))
        self._add(file_version="brain.Event:2")
        if resume_step is not None:
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._add(step=resume_step, session_log=start)
        self._flush()

    def write(self, step: int, scalars: Mapping[str, int | float], text: str) -> None:
        """Adds the numbers of a step, and the text of its decisions unless that is empty."""
        summary = self._summary.text("decisions", text) if text else self._summary.Summary()
        for tag, value in scalars.items():
            summary.value.add(tag=tag, simple_value=value)
        self._add(step=step, summary=summary)
        self._flush()

    def close(self) -> None:
        """Closes the file."""
        with _naming(self._path):
            self._file.close()

    def _add(self, **fields: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), **fields)
        with _naming(self._path):
            self._file.write(event.SerializeToString())

    def _flush(self) -> None:
        with _naming(self._path):
            self._file.flush()
