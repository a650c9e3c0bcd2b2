"""`benchmark checkpoint` writes what it measured and leaves no checkpoint behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.benchmark import main
from tests.tiny_runs import quick, wide

__all__ = ["quick", "wide"]


def test_what_is_measured_is_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    (tmp_path / "place").mkdir()
    assert main(["checkpoint", "megabytes=15", "saves=1", "steps=1", f"folder={tmp_path / 'place'}", f"out={out}"]) == 0
    told = capsys.readouterr().out
    found = json.loads(out.read_text())
    weights = 2 * 768 * 768 * 4
    assert 3 * weights < found["checkpoint_bytes"] < 3 * weights + 20_000, "weights and two moments, and little else"
    assert found["waited_fraction_of_save"] == found["wait_s"] / found["save_s"]
    assert f"it waits {found['waited_fraction_of_save']:.1%}" in told
    assert list((tmp_path / "place").iterdir()) == []
