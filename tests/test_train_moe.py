"""The main example, run as a user runs it."""

import time

import numpy as np
import pytest
from as_run import assert_picture, interrupt_example, read_log, read_summary, run_example

pytest.importorskip("flax.nnx", exc_type=Exception)
pytest.importorskip("grain")

EXAMPLE = "train_moe.py"
RATES = ("learning_rate", "gate_learning_rate", "expert_learning_rate")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("train_moe")
    return out, run_example(EXAMPLE, "--steps", 60, "--seed", 1, "--out", out, "--plain")


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
        log = read_log(short_run[0])
        steps = [record["step"] for record in log]
        assert steps == sorted(set(steps))
        assert steps[-1] == 59
        for record in log:
            assert {"loss", "gate_entropy", "gate_sparsity", *RATES} <= set(record)
            assert sum(record["expert_usage"]) == pytest.approx(1.0, abs=1e-4)
            assert 0.0 <= record["gate_entropy"] <= np.log(8) + 1e-4
        assert log[-1]["loss"] < log[0]["loss"] - 1.0

    def test_rates_of_the_groups_are_apart_and_warm_up(self, short_run):
        log = read_log(short_run[0])
        first, last = log[0], log[-1]
        assert last["learning_rate"] == pytest.approx(50 * first["learning_rate"], rel=1e-3)
        assert last["gate_learning_rate"] < 0.5 * last["learning_rate"]
        assert last["expert_learning_rate"] == pytest.approx(last["learning_rate"])

    def test_summary_and_picture(self, short_run):
        out, _ = short_run
        summary = read_summary(out)
        bits = summary["bits_per_byte"]
        assert set(bits) == {"overall", "code", "prose", "names"}
        assert 0.5 < bits["overall"] < summary["bits_per_byte_of_byte_frequencies"]["overall"]
        assert summary["decisions"]
        assert_picture(out / "train_moe.png")

    def test_the_same_seed_gives_the_same_run(self, short_run, tmp_path):
        out, _ = short_run
        run_example(EXAMPLE, "--steps", 21, "--seed", 1, "--out", tmp_path, "--plain")
        for one, other in zip(read_log(out), read_log(tmp_path), strict=False):
            assert one["step"] == other["step"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_interrupt_ends_cleanly_with_everything_written(tmp_path):
    interrupt_example(EXAMPLE, tmp_path)
    assert len(read_log(tmp_path)) >= 3
    assert read_summary(tmp_path)["bits_per_byte"] is None
    assert_picture(tmp_path / "train_moe.png")


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
        (["--mesh", "data=2,model=2"], "'model'"),
        (["--mesh", "data=4"], "18 rows"),
        (["--mesh", "expert=3"], "expert=3"),
    ],
)
def test_bad_input_ends_with_one_clear_line(options, named):
    run = run_example(EXAMPLE, *options)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert named in run.stderr
    assert "Traceback" not in run.stderr + run.stdout


@pytest.mark.slow
def test_full_length(tmp_path):
    """At the defaults: under three minutes, and far better than byte frequencies."""
    start = time.monotonic()
    run = run_example(EXAMPLE, "--out", tmp_path, "--plain")
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - start < 180
    summary = read_summary(tmp_path)
    assert summary["bits_per_byte"]["overall"] < 2.5
