"""The folder of a training: what it is, how far it got, the policy and its learning curve."""

import io
import json
import pathlib
import zipfile
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from meta_optax._learned import FEATURES
from meta_optax._policy_file import policy_content
from meta_optax.compare._store import write_bytes, write_json
from meta_optax.metatrain._runs import MULTIPLES
from meta_optax.metatrain._train import Progress, Settings, Trainer

CHECKPOINT, POLICY, CURVE, PICTURE = "checkpoint.npz", "policy.json", "curve.json", "curve.png"


class StoreError(ValueError):
    """The folder cannot be used; the text says why."""


def load(folder: pathlib.Path, trainer: Trainer, *, resume: bool) -> Progress:
    """Where the training in the folder stands, from its start if there is none.

    Raises:
      StoreError: if there is one and ``resume`` is not asked for, or it has other settings.
    """
    path = folder / CHECKPOINT
    start = trainer.start()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return start
    if not resume:
        raise StoreError(f"{folder} holds a training: go on with --resume, or take another folder")
    try:
        data = np.load(io.BytesIO(path.read_bytes()))
        there = Settings(**json.loads(str(data["settings"])))
        weights, opt_state = data["weights"], data["opt_state"]
        iteration, curve = int(data["iteration"]), json.loads(str(data["curve"]))
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path}: no checkpoint of this version: {error}") from error
    if there != trainer.settings:
        raise StoreError(f"{folder} holds a training with {there}, not {trainer.settings}")
    flat, as_state = ravel_pytree(start.opt_state)
    return Progress(jnp.asarray(weights), as_state(opt_state.astype(flat.dtype)), iteration, curve)


def save(folder: pathlib.Path, trainer: Trainer, progress: Progress) -> None:
    """Writes the checkpoint, all or nothing."""
    data = io.BytesIO()
    np.savez(
        data,
        settings=json.dumps(trainer.settings._asdict()),
        weights=np.asarray(progress.weights),
        opt_state=np.asarray(ravel_pytree(progress.opt_state)[0]),
        iteration=progress.iteration,
        curve=json.dumps(progress.curve),
    )
    write_bytes(folder / CHECKPOINT, data.getvalue())


def publish(folder: pathlib.Path, trainer: Trainer, progress: Progress) -> None:
    """Writes the policy's file, and the learning curve as JSON and as a picture."""
    made: dict[str, Any] = {
        "command": "python -m meta_optax.metatrain",
        "settings": trainer.settings._asdict(),
        "iterations_done": progress.iteration,
        "last_row_of_curve": progress.curve[-1] if progress.curve else None,
        "versions": {name: metadata.version(name) for name in ("jax", "optax", "meta-optax")},
        "device": jax.devices()[0].device_kind,
    }
    content = policy_content(trainer.policy(progress), FEATURES, made)
    write_json(folder / POLICY, content)
    write_json(folder / CURVE, progress.curve)
    if progress.curve:
        write_bytes(folder / PICTURE, _picture(progress))


def _picture(progress: Progress) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure((11.0, 4.0), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(MULTIPLES), sharex=True)
    iterations = [row["iteration"] for row in progress.curve]
    for axes, (kind, ends) in zip(panels, MULTIPLES.items(), strict=True):
        for name in progress.curve[0]:
            if name.endswith(f", {kind}"):
                values = [row[name] for row in progress.curve]
                axes.plot(iterations, values, label=name.partition(",")[0], lw=1.6)
        axes.axhline(1.0, color="black", lw=0.8, ls="--")
        axes.set(title="rates {:g} to {:g} times the tuned one".format(*ends), xlabel="iteration")
    panels[0].set_ylabel("final loss over that of the\nlinear schedule, interquartile mean")
    panels[0].legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
