"""The code of docs/analysis.md, run block by block in one namespace."""

import pathlib
import re

import pytest

pytest.importorskip("matplotlib")

PAGE = pathlib.Path(__file__).parent.parent / "docs/analysis.md"


def test_each_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 6
    scope = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    printed = capsys.readouterr().out
    assert "plateau: patience" in printed
    assert "has nothing of routing" in printed
    assert "at step" in printed
    fixed, plateau = scope["comparison"].runs
    assert plateau.ratio < 0.5
    assert plateau.interval[1] < fixed.interval[0]
    assert (tmp_path / "runs/hyperparameters.png").exists()
    assert (tmp_path / "runs/distance.png").exists()
    assert scope["best"] > 0
