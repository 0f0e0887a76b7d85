"""The command ``python -m meta_optax.metatrain``."""

import argparse
import contextlib
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
# Iterations from one row of the learning curve, and one checkpoint, to the next.
_EVERY = 10
_EPILOG = """\
The defaults made the weights that come with the package. A training that was ended goes on with
--resume, from its last checkpoint. The same command uses a GPU where JAX sees one. OUT then holds
policy.json, for meta_optax.learned(weights=...), curve.json, curve.png and checkpoint.npz.
Needs the extra meta-optax[compare].
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser, which imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_optax.metatrain",
        description="Trains the policy of meta_optax.learned by evolution strategies.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=pathlib.Path, default=pathlib.Path("metatrain"), metavar="DIR",
        help="folder for checkpoint, policy and curve (default: metatrain)")  # fmt: skip
    add("--iterations", type=int, metavar="N", help="steps of Adam on the weights")
    add("--pairs", type=int, metavar="N", help="antithetic pairs of weights an iteration")
    add("--runs", type=int, metavar="N", help="runs of each family that judge each of them")
    add("--shortest", type=int, metavar="STEPS", help="the shortest horizon")
    add("--longest", type=int, metavar="STEPS", help="the longest horizon")
    add("--seed", type=int, metavar="N", help="of everything that is drawn")
    add("--resume", action="store_true", help="go on with the training that is in DIR")
    add("--plain", action="store_true", help="lines instead of a live bar, for logs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments; the process' own by default.

    Returns:
      The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = make_parser().parse_args(argv)
    try:
        return _train(arguments)
    except ModuleNotFoundError as error:
        return _fail(f"{error}; training needs: pip install 'meta-optax[compare]'")
    except KeyboardInterrupt:
        print("ended; go on with --resume", file=sys.stderr)
        return EXIT_INTERRUPTED


def _train(arguments: argparse.Namespace) -> int:
    from meta_optax.metatrain import _store, _train

    given = {name: getattr(arguments, name, None) for name in _train.Settings._fields}
    settings = _train.Settings(**{k: v for k, v in given.items() if v is not None})
    if problem := _train.problem_of(settings):
        return _fail(problem)
    folder = arguments.out
    trainer = _train.Trainer(settings)
    try:
        progress = _store.load(folder, trainer, resume=arguments.resume)
    except (_store.StoreError, OSError) as error:
        return _fail(str(error))
    with _bar(settings.iterations, progress.iteration, plain=arguments.plain) as report:
        while progress.iteration < settings.iterations:
            progress = trainer.step(progress)
            row = None
            if progress.iteration % _EVERY == 0 or progress.iteration == settings.iterations:
                row = trainer.evaluate(progress)
                progress.curve.append(row)
                _store.save(folder, trainer, progress)
            report(progress.iteration, row)
    _store.publish(folder, trainer, progress)
    print(f"{folder / _store.POLICY}\n{folder / _store.PICTURE}")
    return 0


def _fail(text: str) -> int:
    print(f"metatrain: error: {' '.join(text.split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


@contextlib.contextmanager
def _bar(
    total: int, done: int, *, plain: bool
) -> Iterator[Callable[[int, Mapping[str, Any] | None], None]]:
    """A bar with the time left on a terminal, a line a row of the curve anywhere else."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    console = Console(stderr=True)
    live = console.is_terminal and not console.is_dumb_terminal and not plain
    columns = (*Progress.get_default_columns(), TextColumn("{task.completed}/{task.total}"))
    start = time.monotonic()
    with Progress(*columns, console=console, disable=not live) as bar:
        number = bar.add_task("training", total=total, completed=done)

        def report(iteration: int, row: Mapping[str, Any] | None) -> None:
            bar.update(number, completed=iteration)
            if row is not None and not live:
                numbers = "; ".join(f"{k} {v:.3f}" for k, v in row.items() if k != "iteration")
                seconds = time.monotonic() - start
                print(f"{iteration}/{total} after {seconds:.0f} s: {numbers}", file=sys.stderr)

        yield report


def _use_all_cores() -> None:
    """One of JAX's CPU devices a core, among which runs are shared; of no effect with a GPU."""
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


if __name__ == "__main__":
    _use_all_cores()
    sys.exit(main())
