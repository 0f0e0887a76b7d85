"""Checkpoints of a run: written in the background, sealed, and found again after a crash.

Orbax writes a step's folder under another name and renames it when it is whole. What it does not
do is to notice a file that was damaged afterwards: a flipped bit in an array is read as a number.
So each folder gets a seal, `seal.json`: the size and SHA-256 of every file in it, and what else the
run needs to go on (the position in the data and in the log). Nothing is read before its seal holds.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from command_line import UserError, checkpoint_steps
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

SEAL = "seal.json"
KEPT = 3  # So that there are two to fall back to.
ASIDE, LEFT = ".damaged", ".left"

Position = Mapping[str, Any]


class Damaged(Exception):
    """A checkpoint that is not what was written; its text names the step and the file."""


class Unfinished(Damaged):
    """One that was killed before it was sealed, and so was never said to be there."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        step: the updates made before it.
        state: what was saved, placed as the template says.
        position: what else was saved.
    """

    step: int
    state: PyTree
    position: Position


class Checkpoints:
    """The checkpoints of one run, in a folder of their own."""

    def __init__(self, folder: Path, every: int, say: Callable[[str], None]) -> None:
        """Prepares the folder; nothing in it is touched.

        Args:
            folder: where they are, created if it is missing.
            every: the steps from one to the next.
            say: tells a person what happens.

        Raises:
            UserError: if the folder cannot be used.
        """
        self.folder, self.every = folder.absolute(), every
        self._say = say
        self._sealing: concurrent.futures.Future[None] | None = None
        self._saved: int | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._check()
        self._writer: ocp.training.Checkpointer | None = None

    def _check(self) -> None:
        """Raises `UserError` unless files can be made in the folder; Orbax takes minutes to say."""
        probe = self.folder / ".writable"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--checkpoint-dir {self.folder}: cannot write there: {error.strerror or error}"
            ) from error

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, damaged ones among them."""
        return checkpoint_steps(self.folder)

    def is_due(self, step: int) -> bool:
        """Whether there should be a checkpoint after so many updates."""
        return step % self.every == 0

    def save(self, step: int, state: PyTree, position: Position) -> None:
        """Starts to write a checkpoint; waits only for the one before, and for the copy.

        Args:
            step: the updates made.
            state: what to save; its buffers may be donated as soon as this returns.
            position: what else to save, fit for JSON.

        Raises:
            UserError: if the folder cannot be used any more, or if the one before could not be
                written, naming its step.
        """
        self.wait()
        if step == self._saved:
            return
        self._check()
        with _writing(self.folder, step):
            response = self._open().save_checkpointables_async(
                step, {"state": state}, force=True, overwrite=step in self.steps()
            )
        if response is None:
            raise UserError(f"cannot write the checkpoint of step {step} in {self.folder}")
        folder = self.folder / str(step)
        self._saved = step
        self._sealing = self._thread.submit(_seal, response, folder, step, dict(position))

    def wait(self) -> None:
        """Waits until what was started is written and sealed."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            with _writing(self.folder, self._saved):
                sealing.result()

    def restore(
        self, template: Callable[[Position], PyTree], step: int | None = None
    ) -> Checkpoint | None:
        """Reads the newest checkpoint that is whole, or the one of a step.

        Damaged ones that are newer are said to be so, and renamed out of the way.

        Args:
            template: makes the abstract tree to read into, or raises `UserError` because of the
                position that it is given.
            step: which one; None for the newest that is whole.

        Returns:
            The checkpoint; None if there is none at all.

        Raises:
            UserError: naming file and step, if the one asked for, or each, is damaged; but none
                that was never finished counts where no step is asked for.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            found = f"those of {', '.join(map(str, steps))}" if steps else "none"
            raise UserError(f"no checkpoint of step {step} in {self.folder}; there are {found}")
        damage = []
        for candidate in [step] if step is not None else reversed(steps):
            folder = self.folder / str(candidate)
            try:
                position = read_seal(folder, candidate)
            except Damaged as error:
                damage.append((folder, error))
                continue
            state = _load(folder, candidate, template(position))
            for damaged, error in damage:
                self._set_aside(damaged, error)
            return Checkpoint(candidate, state, position)
        if damage and not (step is None and all(isinstance(e, Unfinished) for _, e in damage)):
            raise UserError("; ".join(str(error) for _, error in damage))
        # A run that was killed before its first checkpoint was sealed has none.
        for damaged, error in damage:
            self._set_aside(damaged, error)
        return None

    def leave_later(self, step: int) -> None:
        """Renames the checkpoints behind a step out of the way: the run goes on from there anew.

        Args:
            step: the one that was gone back to.
        """
        for later in self.steps():
            if later > step:
                left = self.folder / f"{later}{LEFT}"
                shutil.rmtree(left, ignore_errors=True)
                (self.folder / str(later)).rename(left)
                self._say(f"checkpoint of step {later} is not of this run; left as {left.name}")

    def _set_aside(self, folder: Path, error: Damaged) -> None:
        aside = folder.with_name(folder.name + ASIDE)
        shutil.rmtree(aside, ignore_errors=True)  # Of an earlier crash at this very step.
        folder.rename(aside)
        self._say(f"{error}; set aside as {aside.name}")

    def _open(self) -> ocp.training.Checkpointer:
        """The writer, made when it is first needed: it reads what there is, which must be whole."""
        if self._writer is None:
            self._writer = ocp.training.Checkpointer(
                str(self.folder),
                # Orbax annotates the policy and the argument with different classes of metadata.
                preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,
            )
        return self._writer

    def __enter__(self) -> Self:
        """Returns the checkpoints."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Waits for what is being written; an error that is under way goes before one of ours."""
        try:
            self.wait()
        except UserError:
            if kind is None:
                raise
        finally:
            self._thread.shutdown()
            if self._writer is not None:
                self._writer.close()


def read_seal(folder: Path, step: int) -> Position:
    """Checks every file of a checkpoint against its seal.

    Args:
        folder: the checkpoint's.
        step: its step, for the errors.

    Returns:
        What was saved beside the state.

    Raises:
        Damaged: naming the first file that is missing, of another size, or of other content.
    """
    path = folder / SEAL
    try:
        seal = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(seal, dict):
            raise ValueError("it is something else")
        own = seal.pop("sha256")
        if own != _digest_of_json(seal) or seal["step"] != step:
            raise ValueError("its checksum is another")
    except FileNotFoundError:
        raise Unfinished(
            f"checkpoint of step {step}: {path} is missing, so it was never finished"
        ) from None
    except (ValueError, KeyError, OSError) as error:
        raise Damaged(f"checkpoint of step {step}: {path} cannot be read: {error}") from error
    for name, (size, digest) in seal["files"].items():
        file = folder / name
        try:
            data = file.read_bytes()
        except OSError as error:
            raise Damaged(f"checkpoint of step {step}: {file}: {error.strerror}") from error
        if len(data) != size:
            raise Damaged(
                f"checkpoint of step {step}: {file} has {len(data)} bytes, and had {size}"
            )
        if hashlib.sha256(data).hexdigest() != digest:
            raise Damaged(f"checkpoint of step {step}: {file} is not what was written")
    return seal["position"]


def _seal(response: Any, folder: Path, step: int, position: dict[str, Any]) -> None:
    """Waits for a checkpoint to be written, and seals it."""
    response.result()
    files = {
        path.relative_to(folder).as_posix(): (len(data), hashlib.sha256(data).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
        for data in [path.read_bytes()]
    }
    seal = {"step": step, "position": position, "files": files}
    text = json.dumps({**seal, "sha256": _digest_of_json(seal)}, indent=1)
    unfinished = folder / f".{SEAL}"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / SEAL)


def _digest_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _load(folder: Path, step: int, template: PyTree) -> PyTree:
    """Reads what is known to be whole; what does not fit then is of another program."""
    try:
        return ocp.load_checkpointables(str(folder), {"state": template})["state"]
    except Exception as error:  # Orbax has no error of its own for a tree that does not fit.
        raise UserError(
            f"the checkpoint of step {step} in {folder.parent} does not fit this program: {error}"
        ) from error


@contextlib.contextmanager
def _writing(folder: Path, step: int | None) -> Iterator[None]:
    """Turns a failure to write a checkpoint into a message that names it."""
    try:
        yield
    except Exception as error:  # What Orbax raises, from its threads too, has no common type.
        raise UserError(f"cannot write the checkpoint of step {step} in {folder}: {error}") from (
            error
        )
