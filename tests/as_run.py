"""The examples as a user runs them: in a process of their own."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run_example(name, *options, timeout=600):
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_summary(out):
    return json.loads((out / "summary.json").read_text())


def assert_picture(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert min(image.shape[:2]) > 500
    assert np.std(image) > 0.05  # something is drawn


def interrupt_example(name, out):
    """Starts a long run, sends Ctrl-C once three steps are logged, and checks how it ended."""
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / name, "--steps", "1000000", "--out", out, "--plain"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = out / "log.jsonl"
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
