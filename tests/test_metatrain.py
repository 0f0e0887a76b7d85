"""The command that trains the policy of `learned`: what it leaves behind, and what it survives."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("statsmodels", exc_type=ImportError)

import meta_optax as mo
from meta_optax._learned import FEATURES
from meta_optax._policy_file import load_policy
from meta_optax.metatrain import __main__ as command
from meta_optax.metatrain import _runs, _store, _train

TINY = ("--iterations", "3", "--pairs", "2", "--runs", "3", "--shortest", "20", "--longest", "40")
ALL_KINDS = 3
# What one training has compiled serves the next with the same settings.
Trainer = _store.Trainer
cached_trainer = functools.cache(Trainer)


@pytest.fixture
def one_family(monkeypatch):
    """The family that compiles in seconds; a row of the curve, and a checkpoint, an iteration."""
    monkeypatch.setattr(_train, "FAMILIES", {"regression": _runs.FAMILIES["regression"]})
    monkeypatch.setattr(command, "_EVERY", 1)
    monkeypatch.setattr(_train, "Trainer", cached_trainer)
    monkeypatch.setattr(_train, "_EVALUATED", 2)
    monkeypatch.setattr(_train, "EVALUATION_STEPS", 30)


def _main(out, *options):
    return command.main([*TINY, "--out", str(out), "--plain", *options])


def test_it_leaves_a_policy_a_curve_and_a_picture(one_family, tmp_path, capsys):
    out = tmp_path / "made"
    assert _main(out) == 0
    printed = capsys.readouterr()
    assert str(out / "policy.json") in printed.out
    assert "3/3 after" in printed.err
    policy = load_policy(out / "policy.json", FEATURES)
    assert any(np.any(weights) for weights in policy[2:])
    mo.learned(weights=out / "policy.json")
    curve = json.loads((out / "curve.json").read_text())
    assert [row["iteration"] for row in curve] == [1, 2, 3]
    assert len(curve[0]) == 1 + ALL_KINDS
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    made = json.loads((out / "policy.json").read_text())["made"]
    assert made["iterations_done"] == 3
    assert made["settings"]["pairs"] == 2


def test_ended_and_resumed_is_as_never_ended(one_family, tmp_path, monkeypatch, capsys):
    assert _main(tmp_path / "whole") == 0
    step = Trainer.step

    def end(trainer, progress):
        if progress.iteration == 2:
            raise KeyboardInterrupt
        return step(trainer, progress)

    monkeypatch.setattr(Trainer, "step", end)
    assert _main(tmp_path / "cut") == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "cut/policy.json").exists()
    monkeypatch.setattr(Trainer, "step", step)
    assert _main(tmp_path / "cut") == command.EXIT_BAD_INPUT
    assert "holds a training: go on with --resume" in capsys.readouterr().err
    assert _main(tmp_path / "cut", "--resume", "--seed", "1") == command.EXIT_BAD_INPUT
    assert "seed=0" in capsys.readouterr().err
    assert _main(tmp_path / "cut", "--resume") == 0
    for name in ("policy.json", "curve.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_damaged_checkpoint_is_named(one_family, tmp_path, capsys):
    (tmp_path / "checkpoint.npz").write_bytes(b"PK\x03\x04 no archive")
    assert _main(tmp_path, "--resume") == command.EXIT_BAD_INPUT
    assert "checkpoint.npz: no checkpoint of this version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--iterations", "0"), "--iterations must be an integer >= 1, got 0"),
        (("--pairs", "-1"), "--pairs must be an integer >= 1, got -1"),
        (("--longest", "5"), "--longest must be at least --shortest, 20: 5"),
        (("--seed", "-1"), "--seed must be from 0"),
    ],
)
def test_bad_arguments(tmp_path, capsys, options, said):
    assert _main(tmp_path / "out", *options) == command.EXIT_BAD_INPUT
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(one_family, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert _main(tmp_path / "file") == command.EXIT_BAD_INPUT
    assert "metatrain: error" in capsys.readouterr().err


CHANGES = {
    "plain": {},
    "low": {"multiple": 0.02},
    "scaled": {"loss_scale": 100.0},
    "shifted": {"shift_at": 0.95},
    "cut": {},
}


@pytest.fixture(scope="module")
def losses():
    """The log of the final loss of runs with one thing changed, all in one program."""
    key = jax.random.key(3)
    plain = _runs.draw_trouble(key, jnp.int32(0))
    sound = {"loss_scale": 1.0, "noise": 0.0, "spike_at": 2.0, "shift_at": 2.0, "multiple": 1.0}
    troubles = [
        plain._replace(**{k: jnp.float32(v) for k, v in (sound | changes).items()})
        for changes in CHANGES.values()
    ]
    still = _train._first_policy(key)
    policies = [still] * 4 + [still._replace(bias=jnp.full(1, -9.0))]
    family = _runs.FAMILIES["regression"]()

    def run(policy, trouble):
        return _runs.run(family, policy, trouble, jnp.int32(60))

    stacked = (jax.tree.map(lambda *x: jnp.stack(x), *part) for part in (policies, troubles))
    return dict(zip(CHANGES, map(float, jax.jit(jax.vmap(run))(*stacked)), strict=True))


class TestRuns:
    """One run of the regression, at its own rate and elsewhere."""

    def test_it_trains_better_the_better_the_rate(self, losses):
        assert losses["plain"] < losses["low"] - 0.5

    def test_no_scale_of_the_loss_changes_what_adam_does(self, losses):
        assert losses["scaled"] == pytest.approx(losses["plain"], abs=1e-2)

    def test_a_shift_of_the_data_shows(self, losses):
        assert losses["shifted"] > losses["plain"] + 0.5

    def test_the_weights_are_used(self, losses):
        assert losses["cut"] > losses["plain"] + 0.5

    def test_kinds_are_ranges_of_the_multiple(self):
        kinds = jnp.arange(3).repeat(50)
        drawn = jax.vmap(_runs.draw_trouble)(jax.random.split(jax.random.key(0), 150), kinds)
        for number, (low, high) in enumerate(_runs.MULTIPLES.values()):
            multiples = np.asarray(drawn.multiple)[np.asarray(kinds) == number]
            assert low <= multiples.min() < 1.3 * low
            assert high / 1.3 < multiples.max() <= high
        assert 0.02 < float(drawn.blind.mean()) < 0.3


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(tmp_path):
    """The command as a user runs it, all families, ended by SIGKILL and by Ctrl-C."""

    def start(out, *more):
        options = [*TINY, "--iterations", "25", "--out", str(out), *more]
        return subprocess.Popen(
            [sys.executable, "-m", "meta_optax.metatrain", *options],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "XLA_FLAGS": ""},
        )  # fmt: skip

    whole = start(tmp_path / "whole")
    assert whole.wait(600) == 0
    for sent in (signal.SIGKILL, signal.SIGINT):
        process = start(tmp_path / "cut", *(["--resume"] if sent == signal.SIGINT else []))
        before = tmp_path / "cut/checkpoint.npz"
        old = before.stat().st_mtime_ns if before.exists() else 0
        for _ in range(1200):
            if before.exists() and before.stat().st_mtime_ns > old:
                break
            time.sleep(0.25)
        process.send_signal(sent)
        assert process.wait(60) in (-signal.SIGKILL, 130)
    assert start(tmp_path / "cut", "--resume").wait(600) == 0
    for name in ("policy.json", "curve.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
