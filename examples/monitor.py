"""Watching a run: a live bar or plain lines, and a log of one JSON object a line."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from command_line import StopRequest, UserError, writing
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Describe = Callable[[dict[str, Any]], Sequence[str]]

PLAIN_SECONDS = 2.0  # Plain lines come no faster than this: they are read later, all at once.


def to_json(value: Any) -> Any:
    """Makes a value fit for strict JSON: arrays become lists, NaN and infinities become null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        # Float32 carries no more digits than these.
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes one indented JSON document."""
    with writing(path):
        path.write_text(json.dumps(to_json(value), indent=1) + "\n", encoding="utf-8")


class JsonLines:
    """A log with one JSON object a line, each on disk before the next step is waited for.

    Attributes:
        path: where it is.
        records: what was written, those before a resume among it.
        lasting: the bytes up to the last record that any longer run would have as well.
        size: the bytes written.
    """

    def __init__(self, path: Path) -> None:
        """Opens a log, in which everything is to be said by `go_on_from`."""
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.lasting = self.size = 0
        with writing(path):
            self._file = path.open("a+b")

    def go_on_from(self, size: int) -> bool:
        """Keeps the first bytes of what is there, and goes on behind them.

        Args:
            size: how many; the end of a record.

        Returns:
            Whether there were so many.
        """
        with writing(self.path):
            self._file.seek(0)
            kept = self._file.read(size)
            kept = kept[: kept.rfind(b"\n") + 1]
            self._file.truncate(len(kept))
        self.records = [self._read(n, line) for n, line in enumerate(kept.splitlines(), start=1)]
        self.lasting = self.size = len(kept)
        return len(kept) == size

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path} has no record in line {number}: {error}") from error

    def write(self, record: Mapping[str, Any], *, lasting: bool = True) -> None:
        """Appends one object, and keeps it for the plots."""
        self.records.append(dict(record))
        line = json.dumps(to_json(record)).encode() + b"\n"
        with writing(self.path):
            self._file.write(line)
            self._file.flush()
        self.size += len(line)
        self.lasting = self.size if lasting else self.lasting

    def sync(self) -> None:
        """Sees to it that all that was written outlives the machine."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        """Returns the log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        with writing(self.path):
            self._file.close()


class Monitor:
    """Shows how far a run is: a live bar with the latest values under it, or a line now and then.

    The bar needs a terminal; anything else (a pipe, a log file) gets plain lines unasked.
    """

    def __init__(self, total: int, stop: StopRequest, *, plain: bool) -> None:
        """Prepares a display for a number of steps; nothing is shown before it is entered."""
        self.total = total
        self._stop = stop
        self._started = self._last_line = -math.inf
        self._done_before = 0
        self._values = Text()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            speed_estimate_period=60,
        )
        self._task = self._progress.add_task("starting", total=total, start=False)
        console = Console()
        live = not plain and console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, get_renderable=self._render) if live else None

    def _render(self) -> Group:
        return Group(self._progress, self._values)

    def __enter__(self) -> Self:
        """Starts the live display."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the last state of the display standing."""
        word = "finished" if self._progress.finished else "ended"
        self._progress.update(self._task, description=word)
        if self._live:
            self._live.stop()

    def announce(self, what: str) -> None:
        """Says what happens now."""
        self._progress.update(self._task, description=what)
        if not self._live:
            self._stop.say(what)

    def start(self, done: int = 0) -> None:
        """Starts the clock of the time left; what came before, compiling, does not count."""
        self._started, self._done_before = time.monotonic(), done
        self._progress.start_task(self._task)
        self._progress.update(self._task, description="training", completed=done)

    def show(self, done: int, lines: Sequence[str]) -> None:
        """Shows how many steps are done, and lines with the latest values."""
        self._progress.update(self._task, completed=done)
        self._values = Text("\n".join(lines))
        now = time.monotonic()
        due = now - self._last_line >= PLAIN_SECONDS or done == self.total
        if self._live is None and due:
            self._last_line = now
            pace = (now - self._started) / (done - self._done_before)
            left = format_duration(pace * (self.total - done))
            self._stop.say("  ".join((f"{done}/{self.total}", *lines, f"{left} left")))


class Recorder:
    """Fetches a logged step's metrics, one step late, and hands them to log and display.

    By then the device has the next step to work on, so that it never waits for the host.
    """

    def __init__(
        self, log: JsonLines, monitor: Monitor, unit: str, units_per_step: int, describe: Describe
    ) -> None:
        """Starts with nothing kept.

        Args:
            log: where records go.
            monitor: where they are shown.
            unit: what speed is counted in, such as "tokens"; shown as `tokens_per_second`, and not
                logged: all that is logged is the same each time.
            units_per_step: how many of them a step sees.
            describe: says what to show of a record.
        """
        self.log, self._monitor, self._describe = log, monitor, describe
        self._speed_name, self._units_per_step = f"{unit}_per_second", units_per_step
        self._kept: tuple[int, Mapping[str, jax.Array], bool] | None = None
        self._fetched: tuple[int, float] | None = None

    def keep(self, step: int, metrics: Mapping[str, jax.Array], *, lasting: bool) -> None:
        """Remembers the metrics of a step to be logged, in any longer run too if it is lasting."""
        self._kept = step, metrics, lasting

    def flush(self) -> None:
        """Fetches, logs and shows what is kept."""
        if self._kept is None:
            return
        (step, metrics, lasting), self._kept = self._kept, None
        values = jax.device_get(metrics)
        # Single numbers first: a person who reads the log looks for those.
        by_rank = dict(sorted(values.items(), key=lambda item: np.ndim(item[1])))
        record = {"step": step, **by_rank}
        self.log.write(record, lasting=lasting)
        self._monitor.show(
            step + 1, self._describe({**record, self._speed_name: self._speed(step)})
        )

    def _speed(self, step: int) -> float | None:
        """Returns the units per second since the last fetch; nothing is known at the first."""
        now, last = time.perf_counter(), self._fetched
        self._fetched = step, now
        return last and (step - last[0]) * self._units_per_step / (now - last[1])


def format_duration(seconds: float) -> str:
    """Returns a duration as minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
