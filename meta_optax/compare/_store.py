"""The folder of a comparison: a file a finished cell, so that a killed one goes on where it was."""

import contextlib
import io
import json
import os
import pathlib
import platform
import zipfile
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

import meta_optax as mo
from meta_optax.compare._protocol import MULTIPLES, PROTOCOL_VERSION, Plan, PlanError
from meta_optax.compare._train import Curves, Lanes

_PROTOCOL = "protocol.json"
_HYPERPARAM = "hyperparam:"


def describe(plan: Plan) -> dict[str, Any]:
    """What all cells of a folder have in common."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "numpy", "optax", "scikit-learn", "scipy")
    return {
        "protocol_version": PROTOCOL_VERSION,
        "budget": plan.budget,
        "seeds": plan.seeds,
        "trials": plan.limits.trials,
        "tuning_seeds": plan.limits.tuning_seeds,
        "multiples": list(MULTIPLES),
        "platform": {
            "backend": device.platform,
            "device": device.device_kind,
            "machine": platform.machine(),
            "system": platform.system(),
        },
        "versions": {
            "meta_optax": mo.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
    }


class Store:
    """What has been finished so far."""

    def __init__(self, folder: pathlib.Path, plan: Plan, *, resume: bool) -> None:
        """Opens a folder.

        Args:
          folder: made if it is not there.
          plan: what is to be run.
          resume: whether to go on with what is there.

        Raises:
          PlanError: if the folder holds a comparison and is not to be gone on with, or holds one of
            another protocol; if it cannot be written to.
        """
        self.folder = folder
        self.about = describe(plan)
        path = folder / _PROTOCOL
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _check_same(folder, _read_protocol(path), self.about)
                if not resume:
                    raise PlanError(
                        f"{folder} holds a comparison: go on with --resume, or name another folder"
                    )
            elif any(folder.iterdir()):
                raise PlanError(f"{folder} has files, and none is a comparison's {_PROTOCOL}")
            else:
                write_json(path, self.about)
            (folder / "cells").mkdir(exist_ok=True)
        except OSError as error:
            raise PlanError(f"cannot write {folder}: {error.strerror or error}") from error

    def _path(self, phase: str, arm: str, task: str) -> pathlib.Path:
        return self.folder / "cells" / f"{arm}.{task}.{phase}.npz"

    def load(self, phase: str, arm: str, task: str, lanes: Lanes) -> Curves | None:
        """A finished cell; None if there is none, or none of these lanes."""
        path = self._path(phase, arm, task)
        try:
            data = dict(np.load(io.BytesIO(path.read_bytes())))
        except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):
            return None  # A file that is cut off is done again.
        expected = {f"lane:{name}": value for name, value in lanes._asdict().items()}
        if any(
            key not in data or not np.array_equal(data[key], value)
            for key, value in expected.items()
        ):
            return None
        return _unpack(data)

    def save(self, phase: str, arm: str, task: str, lanes: Lanes, curves: Curves) -> None:
        """Writes a cell, all or nothing."""
        buffer = io.BytesIO()
        lane_values = {f"lane:{name}": value for name, value in lanes._asdict().items()}
        np.savez(buffer, **lane_values, **_pack(curves))
        write_bytes(self._path(phase, arm, task), buffer.getvalue())


def _read_protocol(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise PlanError(f"{path} is no JSON: {error}") from error
    if not isinstance(there, dict):
        raise PlanError(f"{path} is no protocol of a comparison")
    return there


def _check_same(folder: pathlib.Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for key in ("protocol_version", *here):
        if there.get(key) != here[key]:
            raise PlanError(
                f"{folder} holds a comparison of another {key}: {there.get(key)!r}, and not "
                f"{here[key]!r}. Numbers of the two must not be mixed: name another folder"
            )


def _pack(curves: Curves) -> dict[str, Any]:
    decisions = [[list(decision) for decision in run] for run in curves.decisions]
    return {
        "held_out": curves.held_out,
        "train": curves.train,
        **{_HYPERPARAM + name: values for name, values in curves.hyperparams.items()},
        "decisions": np.frombuffer(json.dumps(decisions).encode(), np.uint8),
        "decision_counts": curves.decision_counts,
        "compile_seconds": np.float64(curves.compile_seconds),
        "run_seconds": np.float64(curves.run_seconds),
    }


def _unpack(data: Mapping[str, Any]) -> Curves:
    decisions = json.loads(data["decisions"].tobytes())
    return Curves(
        held_out=data["held_out"],
        train=data["train"],
        hyperparams={
            name.removeprefix(_HYPERPARAM): values
            for name, values in data.items()
            if name.startswith(_HYPERPARAM)
        },
        decisions=[[mo.Decision(*fields) for fields in run] for run in decisions],
        decision_counts=data["decision_counts"],
        compile_seconds=float(data["compile_seconds"]),
        run_seconds=float(data["run_seconds"]),
    )


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes one strict JSON document, all or nothing."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file beside, and renames it: a kill leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
