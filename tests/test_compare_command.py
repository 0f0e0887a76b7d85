"""The command that compares: its folder, its report, and what a user may do to it."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("statsmodels", exc_type=ImportError)

from meta_optax.compare import _cli, _protocol, _store
from meta_optax.compare._arms import ARMS, BASELINE
from meta_optax.compare._protocol import MULTIPLES, WELL_TUNED, PlanError, make_plan
from meta_optax.compare._tasks import TASKS
from meta_optax.compare._train import Curves, Lanes

OPTIONS = ["compare", "--tasks", "noisy_quadratic", "--arms", "plateau", "--seeds", "2", "--plain"]
CELLS = 4  # Trials and runs of plateau and of the baseline, which is always there.
CURVES = Curves(np.float32([[2.0, 1.0]]), np.float32([[1.5]]), {}, [[]], np.array([0]), 0.0, 0.0)
LANES = Lanes(np.int32([0]), np.float32([0.1]), np.float32([1e-3]))


def _run(*options):
    return subprocess.run(
        [sys.executable, "-m", "meta_optax", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison as a user runs it."""
    out = tmp_path_factory.mktemp("compared") / "out"
    run = _run(*OPTIONS, "--out", out)
    assert run.returncode == 0, run.stderr
    return out, run


class TestCommand:
    def test_what_a_reader_sees_first(self, finished):
        out, run = finished
        assert run.stderr.count("noisy_quadratic") == CELLS
        report = (out / "report.md").read_text()
        headings = re.findall(r"^#+ (.*)$", report, re.MULTILINE)
        assert headings[:2] == ["Comparison of 2 ways to train, quick budget", "Caveats"]
        answer = report.split("## Caveats")[0]
        assert "**plateau**" in answer
        assert re.search(r"\[[\d.]+, [\d.]+\] (holds|fails)", answer)
        assert answer.split("\n", 2)[2].strip() in run.stdout

    def test_the_page_needs_no_other_file(self, finished):
        page = (finished[0] / "report.html").read_text()
        pictures = re.findall(r'src="([^"]{0,30})', page)
        assert len(pictures) == 4
        assert all(source.startswith("data:image/png;base64,") for source in pictures)
        assert "<table>" in page
        assert not re.search(r'(href|src)="(?!data:)', page)

    def test_numbers_are_in_the_json(self, finished):
        found = json.loads((finished[0] / "results.json").read_text())
        assert found["protocol"]["protocol_version"] == _protocol.PROTOCOL_VERSION
        losses = found["arms"]["plateau"]["tasks"]["noisy_quadratic"]["final_losses"]
        assert np.shape(losses) == (2, len(MULTIPLES))
        peer = found["arms"][BASELINE]["tasks"]["noisy_quadratic"]["final_losses"]
        ratio = np.divide(losses, peer)
        entry = found["well_tuned"]["arms"]["plateau"]["ratio_to_baseline"]
        # Of two values none is trimmed.
        assert entry["value"] == pytest.approx(ratio[:, WELL_TUNED].mean(), rel=1e-5)
        assert found["well_tuned"]["arms"][BASELINE]["ratio_to_baseline"]["value"] == 1.0
        assert json.loads((finished[0] / "timings.json").read_text())["overhead"]["AdamW"]

    def test_again_is_the_same_to_the_byte(self, finished, tmp_path):
        assert _run(*OPTIONS, "--out", tmp_path / "b").returncode == 0
        first = (finished[0] / "results.json").read_bytes()
        assert (tmp_path / "b" / "results.json").read_bytes() == first

    def test_killed_and_gone_on_with(self, finished, tmp_path):
        out = tmp_path / "killed"
        process = subprocess.Popen(
            [sys.executable, "-m", "meta_optax", *OPTIONS, "--out", str(out)],
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not list(out.glob("cells/*.npz")):
            assert time.monotonic() < deadline
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = {path.name: path.stat().st_mtime_ns for path in out.glob("cells/*.npz")}
        refused = _run(*OPTIONS, "--out", out)
        assert refused.returncode == 2
        assert "--resume" in refused.stderr
        again = _run(*OPTIONS, "--out", out, "--resume")
        assert again.returncode == 0, again.stderr
        assert again.stderr.count("was there") == len(kept)
        for name, when in kept.items():
            assert (out / "cells" / name).stat().st_mtime_ns == when
        expected = (finished[0] / "results.json").read_bytes()
        assert (out / "results.json").read_bytes() == expected

    def test_list_names_all(self, capsys):
        assert _cli.main(["compare", "--list"]) == 0
        text = capsys.readouterr().out
        for name in (*TASKS, *ARMS, *_protocol.BUDGETS):
            assert name in text

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["--arms", "adam"], "unknown arm 'adam'; known are: constant, linear"),
            (["--tasks", "mnist"], "unknown task 'mnist'; known are: noisy_quadratic"),
            (["--seeds", "0"], "seeds must be from 1"),
            (["--budget", "big"], "unknown budget 'big'; known are: quick, full"),
        ],
    )
    def test_bad_input_is_one_line(self, options, text, tmp_path, capsys):
        assert _cli.main(["compare", *options, "--out", str(tmp_path / "x")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert text in error
        assert not (tmp_path / "x").exists()


class TestFolder:
    def _open(self, folder, **options):
        return _store.Store(folder, make_plan("quick", ["photo"], ["linear"], 2), **options)

    def test_another_protocol_is_refused_by_name(self, tmp_path):
        self._open(tmp_path / "a", resume=False)
        path = tmp_path / "a" / "protocol.json"
        about = json.loads(path.read_text())
        path.write_text(json.dumps({**about, "protocol_version": 0}))
        with pytest.raises(PlanError, match=r"another protocol_version: 0, and not 1"):
            self._open(tmp_path / "a", resume=True)
        path.write_text(json.dumps({**about, "seeds": 3}))
        with pytest.raises(PlanError, match=r"another seeds: 3, and not 2"):
            self._open(tmp_path / "a", resume=True)

    @pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
    def test_a_broken_protocol_is_refused(self, tmp_path, text):
        (tmp_path / "protocol.json").write_text(text)
        with pytest.raises(PlanError, match=r"protocol"):
            self._open(tmp_path, resume=True)

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(PlanError, match="none is a comparison's"):
            self._open(tmp_path, resume=True)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "out").write_text("")
        with pytest.raises(PlanError, match="cannot write"):
            self._open(tmp_path / "out", resume=False)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
    def test_a_cell_that_was_cut_off_is_done_again(self, tmp_path, share):
        store, lanes = self._open(tmp_path, resume=False), LANES
        store.save("runs", "linear", "photo", lanes, CURVES)
        assert store.load("runs", "linear", "photo", lanes) is not None
        (path,) = tmp_path.glob("cells/*.npz")
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        assert store.load("runs", "linear", "photo", lanes) is None

    def test_a_cell_of_other_lanes_is_none(self, tmp_path):
        """Another configuration was chosen, since other tasks were asked for."""
        store = self._open(tmp_path, resume=False)
        store.save("runs", "linear", "photo", LANES, CURVES)
        assert (
            store.load("runs", "linear", "photo", LANES._replace(learning_rate=np.float32([0.2])))
            is None
        )
        assert store.load("trials", "linear", "photo", LANES) is None
