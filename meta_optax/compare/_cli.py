"""The command ``meta-optax compare``."""

import argparse
import contextlib
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
_EPILOG = """\
The quick budget takes a few minutes on two cores; the full one is for a GPU or a night. Finished
cells are kept in OUT: a comparison that was ended goes on with --resume. Needs the extra
meta-optax[compare]. What the protocol is, and what the report says: docs/compare.md.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Leaves the usage out: `--help` has it, and the error is easier to see alone."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser, which imports nothing heavy."""
    parser = _Parser(prog="meta-optax", description="Tools of meta_optax.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    compare = commands.add_parser(
        "compare",
        help="compare every strategy with what people would otherwise use",
        description="Compares ways to train by one protocol, and writes a report.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = compare.add_argument
    add("--tasks", type=_names, metavar="A,B", help="what to train (default: the budget's)")
    add("--arms", type=_names, metavar="A,B", help="ways to train (default: the budget's)")
    add("--seeds", type=int, metavar="N", help="paired seeds (default: the budget's)")
    add("--budget", default="quick", help="quick or full (default: quick)")
    add("--out", type=pathlib.Path, default=pathlib.Path("comparison"), metavar="DIR",
        help="folder for cells and report (default: comparison)")  # fmt: skip
    add("--list", action="store_true", help="list tasks, arms and budgets, and end")
    add("--resume", action="store_true", help="go on with the cells that are in DIR")
    add("--plain", action="store_true", help="lines instead of a live bar, for logs")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments; the process' own by default.

    Returns:
      The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = make_parser().parse_args(argv)
    try:
        return _compare(arguments)
    except ModuleNotFoundError as error:
        return _fail(f"{error}; the comparison needs: pip install 'meta-optax[compare]'")
    except KeyboardInterrupt:
        print("ended; go on with --resume", file=sys.stderr)
        return EXIT_INTERRUPTED


def _compare(arguments: argparse.Namespace) -> int:
    from meta_optax.compare import _protocol, _run, _store

    if arguments.list:
        print(_listing())
        return 0
    try:
        plan = _protocol.make_plan(
            arguments.budget, arguments.tasks, arguments.arms, arguments.seeds
        )
        store = _store.Store(arguments.out, plan, resume=arguments.resume)
    except _protocol.PlanError as error:
        return _fail(str(error))
    with _progress(_run.count_cells(plan), plain=arguments.plain) as report:
        results = _run.run_plan(plan, store, report)
    from meta_optax.compare import _report

    print(_report.write_report(plan, store, results))
    return 0


def _fail(text: str) -> int:
    print(f"meta-optax: error: {' '.join(text.split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _listing() -> str:
    from meta_optax.compare._arms import ARMS
    from meta_optax.compare._protocol import BUDGETS
    from meta_optax.compare._tasks import TASKS, why_missing

    lines = ["Tasks"]
    for name, make in TASKS.items():
        missing = why_missing(name)
        lines.append(f"  {name:<22} {f'({missing})' if missing else make().about}")
    lines.append("Arms (ours are marked *)")
    for name, arm in ARMS.items():
        lines.append(f"{'*' if arm.kind == 'ours' else ' ':>2}{name:<22} {arm.about}")
    lines.append("Budgets")
    for name, budget in BUDGETS.items():
        lines.append(
            f"  {name:<22} {len(budget.tasks)} tasks, {len(budget.arms)} arms, {budget.seeds} "
            f"seeds, {budget.trials} trials of {budget.tuning_seeds} seeds"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def _progress(total: int, *, plain: bool) -> Iterator[Callable[[str, str, str, bool], None]]:
    """A bar with the time left on a terminal, a line a cell anywhere else."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    live = console.is_terminal and not console.is_dumb_terminal and not plain
    done = 0

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        disable=not live,
        # Cells differ: the estimate rests on many.
        speed_estimate_period=600,
    ) as bar:
        number = bar.add_task("starting", total=total)

        def report(arm: str, task: str, phase: str, is_there: bool) -> None:
            nonlocal done
            done += 1
            bar.update(number, advance=1, description=f"{arm} on {task}, {phase}")
            if not live:
                known = ", was there" if is_there else ""
                print(f"{done}/{total} {arm} on {task}, {phase}{known}", file=sys.stderr)

        yield report
