"""The same decisions on 1, 2, 4 and 8 devices, and on two processes with four each.

Each run is a process of its own (mesh_program.py) that trains the example's model on the real
corpora. Sums over devices are taken in another order, so values differ by rounding: measured, the
losses of 30 steps by at most 4e-7 of their size, and the decisions' values by 3e-7.
"""

import collections
import concurrent.futures
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("flax.nnx", exc_type=Exception)
pytest.importorskip("grain")

PROGRAM = pathlib.Path(__file__).parent / "mesh_program.py"
MESHES = {
    "data=2": 2,
    "data=2,expert=2": 4,
    "data=2,expert=4": 8,
    "data=2,fsdp=2,expert=2": 8,
}
KINDS = {
    "advanced_plateau: warm-up",
    "advanced_plateau: patience",
    "adapt_aux_loss: max_violation",
    "smart_expert_gate: gate_sparsity",
}


def _start(*options, devices=None):
    flags = f"--xla_force_host_platform_device_count={devices}" if devices else ""
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, options)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(processes):
    results = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr
            results.append(json.loads(stdout.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return results


@functools.cache
def _runs():
    """The run on one device (of mesh "") and those on each mesh, two at a time."""

    def run(mesh):
        options = ["--mesh", mesh] if mesh else []
        return _finish([_start(*options, devices=MESHES.get(mesh, 1))])[0]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(["", *MESHES], pool.map(run, ["", *MESHES]), strict=True))


def _on_one_device():
    return _runs()[""]


def _free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _keys(result):
    return [tuple(decision[:3]) for decision in result["decisions"]]


def _assert_same(result, expected):
    assert _keys(result) == _keys(expected)
    values = [np.array([d[3:] for d in r["decisions"]], float) for r in (result, expected)]
    np.testing.assert_allclose(*values, rtol=1e-5)
    np.testing.assert_allclose(result["losses"], expected["losses"], rtol=1e-5)
    assert result["whole"]


def test_decisions_are_of_several_kinds():
    counts = collections.Counter(reason for _, _, reason in _keys(_on_one_device()))
    assert set(counts) >= KINDS
    assert counts["advanced_plateau: patience"] >= 3


@pytest.mark.parametrize("mesh", MESHES)
def test_same_decisions_on_many_devices(mesh):
    result = _runs()[mesh]
    assert result["devices"] == MESHES[mesh]
    _assert_same(result, _on_one_device())


def test_same_decisions_in_two_processes():
    shared = ["--mesh", "data=2,expert=4", "--processes", 2, "--port", _free_port(), "--process"]
    results = _finish([_start(*shared, process) for process in range(2)])
    assert results[0] == results[1]
    assert (results[0]["devices"], results[0]["local"]) == (8, 4)
    _assert_same(results[0], _on_one_device())


def test_each_processes_own_loss_would_decide_otherwise():
    """So the tests above can fail: they hang on the loss being that of all rows."""
    whole = _keys(_on_one_device())
    own = [_keys(r) for r in _finish([_start("--seen", half, devices=1) for half in range(2)])]
    assert own[0] != own[1]
    assert whole not in own
