"""Runs that are killed at any moment, and go on as if they had not been."""

import json
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from as_run import EXAMPLES, read_summary, run_example
from orbax.checkpoint import v1 as ocp

checkpoints = pytest.importorskip("checkpoints", exc_type=ImportError)

UNFINISHED = "*.orbax-checkpoint-tmp"


class Case:
    """One run of an example in folders of its own."""

    def __init__(self, name, folder, steps, every, switches=()):
        self.out, self.saved = folder / "out", folder / "checkpoints"
        self.steps = steps
        self.options = ["--steps", steps, "--out", self.out, "--plain", *switches]
        self.options += ["--checkpoint-dir", self.saved, "--save-every", every]
        self.name = name

    def run(self, *options):
        run = run_example(self.name, *self.options, *options)
        assert run.returncode == 0, run.stderr
        assert "Traceback" not in run.stderr
        return run

    def start(self):
        return subprocess.Popen(
            [sys.executable, EXAMPLES / self.name, *map(str, self.options), "--resume"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def log(self):
        return (self.out / "log.jsonl").read_bytes()

    def newest_whole(self):
        """The step that a resume must take, by the seals; None if there is none."""
        steps = []
        for folder in self.saved.glob("[0-9]*"):
            if not folder.name.isdecimal():
                continue
            try:
                checkpoints.read_seal(folder, int(folder.name))
            except checkpoints.Damaged:
                continue
            steps.append(int(folder.name))
        return max(steps, default=None)

    def last_state(self):
        folder = self.saved / str(self.steps)
        checkpoints.read_seal(folder, self.steps)
        on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one),
            ocp.checkpointables_metadata(folder).metadata["state"],
        )
        return ocp.load_checkpointables(folder, {"state": template})["state"]


def _wait(process, ready, seconds=300):
    """Polls until something has happened, or the run has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _kill(case, process, dice, during_a_save):
    """Sends SIGKILL while a checkpoint is being written, or at any other moment."""
    if during_a_save:
        _wait(process, lambda: any(case.saved.glob(UNFINISHED)))
        time.sleep(dice.uniform(0.0, 0.04))  # Among arrays, at the renaming, or at the seal.
    elif dice.random() < 0.3:
        time.sleep(dice.uniform(0.0, 5.0))  # Importing, compiling, restoring.
    else:
        size = len(case.log()) if (case.out / "log.jsonl").exists() else 0
        log = case.out / "log.jsonl"
        _wait(process, lambda: log.exists() and log.stat().st_size > size)
        time.sleep(dice.uniform(0.0, 0.3))
    hit = any(case.saved.glob(UNFINISHED))
    process.send_signal(signal.SIGKILL)
    return hit


def _crash(case, dice, kills):
    """Kills and resumes so many times; returns how many kills came in the middle of a save."""
    hits = 0
    for number in range(kills):
        expected = case.newest_whole()
        process = case.start()
        hits += _kill(case, process, dice, during_a_save=number % 2 == 0)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, (number, stdout, stderr)
        assert "Traceback" not in stderr
        if "resumed after step" in stdout:
            assert f"resumed after step {expected} " in stdout
    return hits


def _assert_same(case, reference):
    """The log, the state and the decisions are those of the run that was never killed."""
    assert case.log() == reference.log()
    one, other = case.last_state(), reference.last_state()
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    summary, expected = read_summary(case.out), read_summary(reference.out)
    for key in expected.keys() - {"compile_seconds", "train_seconds", "resumed_after"}:
        assert summary[key] == expected[key], key


def _test_kills(name, folder, *, steps, every, kills, seed):
    reference = Case(name, folder / "whole", steps, every)
    reference.run()
    case = Case(name, folder / "killed", steps, every)
    hits = _crash(case, random.Random(seed), kills)
    expected = case.newest_whole()
    last = case.run("--resume")
    assert f"resumed after step {expected} " in last.stdout
    _assert_same(case, reference)
    assert not list(case.saved.glob(UNFINISHED))
    return hits


@pytest.mark.parametrize(
    ("steps", "kills"), [(500, 8), pytest.param(1500, 22, marks=pytest.mark.slow)]
)
def test_so_many_kills_and_not_a_bit_is_different(tmp_path, steps, kills):
    """`expert_graph`, its default length last; half of the kills while a checkpoint is written."""
    hits = _test_kills("expert_graph.py", tmp_path, steps=steps, every=12, kills=kills, seed=0)
    assert hits >= kills // 8


@pytest.mark.slow
def test_train_moe_killed_twenty_times(tmp_path):
    assert _test_kills("train_moe.py", tmp_path, steps=300, every=4, kills=22, seed=2) >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_end_saves_and_goes_on(tmp_path, number):
    """Neither a multiple of the interval nor of the log's."""
    reference = Case("expert_graph.py", tmp_path / "whole", 150, 1000)
    reference.run()
    case = Case("expert_graph.py", tmp_path / "ended", 150, 1000)
    process = case.start()
    log = case.out / "log.jsonl"
    _wait(process, lambda: log.exists() and log.stat().st_size > 0)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    step = case.newest_whole()
    assert json.loads(case.log().splitlines()[-1])["step"] == step - 1
    assert f"resumed after step {step} " in case.run("--resume").stdout
    _assert_same(case, reference)
