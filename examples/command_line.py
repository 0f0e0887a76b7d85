"""What every example's command line shares: arguments, one-line errors, and ending on request.

Nothing here imports JAX, so that a script can have its Ctrl-C in place before it does.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Self

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_STDOUT_CLOSED = 128 + 13  # As if killed by SIGPIPE, which Windows does not have.

LARGEST = 2**31 - 1  # Step counts and seeds are int32 on the device.
SAVE_EVERY = 100
NEWEST = -1


class UserError(Exception):
    """Something that the user can mend; its text is the whole message."""


class EndedEarly(Exception):
    """The end was asked for before there was anything to report."""


class Arguments(NamedTuple):
    """The options of an example.

    Attributes:
        steps: training steps.
        seed: of weights and data order.
        out: the folder for the files.
        plain: whether lines are to stand for the live display.
        checkpoint_dir: the folder for checkpoints; None for none.
        save_every: the steps from one checkpoint to the next.
        resume: the step to go on from, `NEWEST` for the newest; None to start anew.
        switches: the options of its own that are on.
    """

    steps: int
    seed: int
    out: Path
    plain: bool
    checkpoint_dir: Path | None = None
    save_every: int = SAVE_EVERY
    resume: int | None = None
    switches: frozenset[str] = frozenset()
    mesh: Mapping[str, int] | None = None


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Leaves the usage out: `--help` has it, and the error is easier to see alone."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see --help)\n")


def whole_number(lowest: int):
    """Returns an argument type for whole numbers from `lowest` to `LARGEST`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= LARGEST:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {lowest} to {LARGEST}, not {text!r}"
            )
        return value

    return parse


def mesh_sizes(*axes: str):
    """Returns an argument type for sizes of a mesh's axes, such as ``data=2,expert=4``."""
    known = ", ".join(axes)

    def parse(text: str) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = part.partition("=")
            if axis not in axes:
                raise argparse.ArgumentTypeError(f"has the axes {known}, not {axis!r}")
            if axis in sizes:
                raise argparse.ArgumentTypeError(f"has the axis {axis!r} twice")
            if not (size.isascii() and size.isdecimal() and 1 <= int(size) <= LARGEST):
                raise argparse.ArgumentTypeError(
                    f"needs a whole number >= 1 as the size of {axis!r}, not {size!r}"
                )
            sizes[axis] = int(size)
        return sizes

    return parse


def parse_arguments(
    description: str,
    *,
    steps: int,
    out: str,
    switches: Mapping[str, str] | None = None,
    mesh_axes: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> Arguments:
    """Parses the command line; a mistake ends the program with one line on stderr.

    Args:
        description: the text of `--help`, printed as it is.
        steps: the default of `--steps`.
        out: the default of `--out`.
        switches: options without a value that only this example has, and what they do.
        mesh_axes: the axes of `--mesh`, for an example that runs on many devices.
        argv: the arguments; the process' own by default.

    Returns:
        The options.
    """
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--steps", type=whole_number(1), default=steps, help=f"training steps (default: {steps})")
    add("--seed", type=whole_number(0), default=0, help="of weights and data order (default: 0)")
    add("--out", type=Path, default=Path(out), help=f"folder for the files (default: {out})")
    add("--plain", action="store_true", help="lines instead of a live bar, for logs")
    add("--checkpoint-dir", type=Path, metavar="DIR", help="folder for checkpoints (default: none)")
    every = f"steps from one checkpoint to the next (default: {SAVE_EVERY})"
    add("--save-every", type=whole_number(1), metavar="N", help=every)
    resume = "go on from the newest checkpoint in DIR that is whole, or from that of a step"
    add("--resume", nargs="?", type=whole_number(1), const=NEWEST, metavar="STEP", help=resume)
    own = switches or {}
    for name, meaning in own.items():
        add(f"--{name}", action="store_true", help=meaning)
    if mesh_axes:
        meaning = f"run on many devices; axes {', '.join(mesh_axes)} (default: one device)"
        add("--mesh", type=mesh_sizes(*mesh_axes), metavar="AXIS=SIZE,...", help=meaning)
    values = vars(parser.parse_args(argv))
    for option in ("save_every", "resume"):
        if values["checkpoint_dir"] is None and values[option] is not None:
            parser.error(f"--{option.replace('_', '-')} needs --checkpoint-dir")
    values["save_every"] = values["save_every"] or SAVE_EVERY
    on = frozenset(name for name in own if values.pop(name))
    return Arguments(**values, switches=on)


def prepare_folder(out: Path, names: Sequence[str], *, keep: bool = False) -> dict[str, Path]:
    """Makes sure that every output file can be written, and clears what an earlier run left.

    A file left over would be taken for this run's, were this run killed before writing its own.

    Args:
        out: the folder, created if it is missing.
        names: the files that will be written there.
        keep: whether those that are there are to stay.

    Returns:
        The files' paths by name.

    Raises:
        UserError: naming the path and what is wrong with it.
    """
    paths = {name: out / name for name in names}
    path = out
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in paths.values():
            path.open("a").close()
            if not keep:
                path.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write {path}: {error.strerror or error}") from error
    return paths


def checkpoint_steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint in a folder, damaged ones among them."""
    names = (path.name for path in folder.glob("*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def _refuse_to_mix_runs(arguments: Arguments) -> None:
    """Raises `UserError` where a new run would write among the checkpoints of another."""
    folder = arguments.checkpoint_dir
    if folder and arguments.resume is None and (steps := checkpoint_steps(folder)):
        raise UserError(
            f"--checkpoint-dir {folder} holds a run of {steps[-1]} steps: go on with --resume, or "
            "name another folder"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write a file, a full disk for one, into a message that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


class StopRequest:
    """Ctrl-C, SIGTERM, or a reader of stdout who went away, as a flag that the loop asks for.

    An exception would come up anywhere, inside JAX or a background thread's callback among other
    places, and could not be told apart from an error there.

    Attributes:
        exit_code: 0, or what to exit with since somebody asked for the end.
    """

    def __init__(self) -> None:
        """Starts without a request."""
        self.exit_code = 0

    def __enter__(self) -> Self:
        """Takes over Ctrl-C and SIGTERM; a second Ctrl-C ends the process at once."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # A path may hold any bytes.
        handlers = {signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._on_terminate}
        self._previous = {number: signal.signal(number, f) for number, f in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives both back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_interrupt(self, *_: object) -> None:
        self.request(EXIT_INTERRUPTED)
        signal.signal(signal.SIGINT, _leave_now)

    def _on_terminate(self, *_: object) -> None:
        self.request(EXIT_TERMINATED)

    def request(self, exit_code: int) -> None:
        """Asks for the end; the first reason given is the one that counts."""
        self.exit_code = self.exit_code or exit_code

    def check(self) -> None:
        """Raises `EndedEarly` if the end is asked for; for the time before there are results."""
        if self.exit_code:
            raise EndedEarly("ended on request before the first step")

    def say(self, text: str = "") -> None:
        """Prints a line; if nobody reads stdout any more, asks for the end instead."""
        try:
            print(text, flush=True)
        except OSError:
            self.request(EXIT_STDOUT_CLOSED)
            # What is still buffered needs a place to go, or the interpreter complains as it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_now(*_: object) -> NoReturn:
    if sys.stdout is not None and sys.stdout.isatty():
        # The live display hides the cursor. Written past `sys.stdout`, which may be in use.
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def interruptible_imports() -> Iterator[None]:
    """Lets Ctrl-C during the seconds that imports take end the process without a traceback."""
    if threading.current_thread() is not threading.main_thread():  # Signals are not its business.
        yield
        return
    previous = signal.signal(signal.SIGINT, _leave_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def run_example(
    arguments: Arguments,
    files: Sequence[str],
    body: Callable[[Arguments, dict[str, Path], StopRequest], None],
) -> int:
    """Runs what an example is for, or as much of it as there is time for.

    Args:
        arguments: the options.
        files: the names of the files that it writes.
        body: does it, given the options, the files' paths by name, and what may ask for the end.

    Returns:
        The exit code.
    """
    try:
        _refuse_to_mix_runs(arguments)
        # A run that is gone on with goes on in its log.
        paths = prepare_folder(arguments.out, files, keep=arguments.resume is not None)
        with StopRequest() as stop:
            try:
                body(arguments, paths, stop)
            except EndedEarly as ended:
                stop.say(str(ended))
            return stop.exit_code
    except UserError as error:
        return fail(error)


def fail(error: Exception) -> int:
    """Prints one line on stderr and returns the exit code of bad input."""
    line = " ".join(str(error).split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    return EXIT_BAD_INPUT
