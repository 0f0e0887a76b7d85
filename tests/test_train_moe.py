"""The main example, run as a user runs it."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("flax.nnx", exc_type=Exception)
pytest.importorskip("grain")

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "train_moe.py"
RATES = ("learning_rate", "gate_learning_rate", "expert_learning_rate")


def _run(*options, timeout=600):
    return subprocess.run(
        [sys.executable, EXAMPLE, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _assert_picture(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert min(image.shape[:2]) > 500
    assert np.std(image) > 0.05  # something is drawn


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("train_moe")
    return out, _run("--steps", 60, "--seed", 1, "--out", out, "--plain")


class TestShortRun:
    def test_ends_well_and_says_what_it_found(self, short_run):
        _, run = short_run
        assert run.returncode == 0, run.stderr
        assert "Traceback" not in run.stderr
        for said in ("Bits per held-out byte", "code", "prose", "names", "Which expert serves"):
            assert said in run.stdout
        assert "advanced_plateau: warm-up" in run.stdout
        assert "smart_expert_gate: " in run.stdout

    def test_log_has_one_object_for_each_logged_step(self, short_run):
        log = _log(short_run[0])
        steps = [record["step"] for record in log]
        assert steps == sorted(set(steps))
        assert steps[-1] == 59
        for record in log:
            assert {"loss", "gate_entropy", "gate_sparsity", *RATES} <= set(record)
            assert sum(record["expert_usage"]) == pytest.approx(1.0, abs=1e-4)
            assert 0.0 <= record["gate_entropy"] <= np.log(8) + 1e-4
        assert log[-1]["loss"] < log[0]["loss"] - 1.0

    def test_rates_of_the_groups_are_apart_and_warm_up(self, short_run):
        log = _log(short_run[0])
        first, last = log[0], log[-1]
        assert last["learning_rate"] == pytest.approx(50 * first["learning_rate"], rel=1e-3)
        assert last["gate_learning_rate"] < 0.5 * last["learning_rate"]
        assert last["expert_learning_rate"] == pytest.approx(last["learning_rate"])

    def test_summary_and_picture(self, short_run):
        out, _ = short_run
        summary = json.loads((out / "summary.json").read_text())
        bits = summary["bits_per_byte"]
        assert set(bits) == {"overall", "code", "prose", "names"}
        assert 0.5 < bits["overall"] < summary["bits_per_byte_of_byte_frequencies"]["overall"]
        assert summary["decisions"]
        _assert_picture(out / "train_moe.png")

    def test_the_same_seed_gives_the_same_run(self, short_run, tmp_path):
        out, _ = short_run
        _run("--steps", 21, "--seed", 1, "--out", tmp_path, "--plain")
        for one, other in zip(_log(out), _log(tmp_path), strict=False):
            assert one["step"] == other["step"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_interrupt_ends_cleanly_with_everything_written(tmp_path):
    process = subprocess.Popen(
        [sys.executable, EXAMPLE, "--steps", "5000", "--out", tmp_path, "--plain"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "Ended on request" in stdout
    assert len(_log(tmp_path)) >= 3
    assert json.loads((tmp_path / "summary.json").read_text())["bits_per_byte"] is None
    _assert_picture(tmp_path / "train_moe.png")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--setps", "3"], "--setps"),
        (["--steps", "0"], "--steps"),
        (["--steps", "x"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--out", __file__], "--out"),
        (["--out", f"{__file__}/deeper"], "--out"),
        (["--out", "/proc/no/such/folder"], "--out"),
    ],
)
def test_bad_input_ends_with_one_clear_line(options, named):
    run = _run(*options)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert named in run.stderr
    assert "Traceback" not in run.stderr + run.stdout


@pytest.mark.slow
def test_full_length(tmp_path):
    """At the defaults: under three minutes, and far better than byte frequencies."""
    start = time.monotonic()
    run = _run("--out", tmp_path, "--plain")
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - start < 180
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["bits_per_byte"]["overall"] < 2.5
