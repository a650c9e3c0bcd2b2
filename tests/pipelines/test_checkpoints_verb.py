"""`checkpoints` lists what a run holds and finds every damage; scripts read its exit code and its JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mae_core.checkpoint_writer import CheckpointWriter
from pipelines import checkpoints as verb
from pipelines.checkpoints import main
from tests.core.test_checkpoint import FORMAT_1
from tests.tiny_runs import ROOT, environment, wide
from tests.tiny_states import ALONE, DAMAGES, FILES, flip, fresh, save

__all__ = ["wide"]


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing costs seconds where a disk is shared."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 2, 4 and 5, of which 2 and 4 stay for ever."""
    settings = {"train": {"keep_every_steps": 2}}
    state = fresh()
    with CheckpointWriter(tmp_path / "a run" / "checkpoints", settings, 1, ALONE, keep_every=2) as writer:
        for state.step in range(1, 6):
            writer.save(state)
    return tmp_path / "a run"


def facts(run: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, object]:
    capsys.readouterr()
    assert main([str(run), "--json"]) == code
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_it_lists_each_with_step_size_and_whether_it_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(run, capsys)
    items = found["checkpoints"]
    assert isinstance(items, list)
    assert [(each["step"], each["stays"], each["latest"], each["wrong"]) for each in items] == [
        (2, "for ever", False, None),
        (4, "for ever", False, None),
        (5, "rolling", True, None),
    ]
    folder = run / "checkpoints" / "step-00000005"
    assert items[-1]["place"] == "checkpoints/step-00000005"
    assert items[-1]["num_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    os.utime(folder / "manifest.json", (86400, 86400))
    assert main([f"--run={run}"]) == 0
    told = capsys.readouterr().out
    assert "1970-01-02 00:00:00" in told
    assert f"3 checkpoints in {run}: all sound" in told


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_found_and_is_an_exit_code(run: Path, capsys: pytest.CaptureFixture[str], file: str, name: str) -> None:
    DAMAGES[name](run / "checkpoints" / "step-00000004" / file)
    items = facts(run, capsys, code=1)["checkpoints"]
    assert isinstance(items, list)
    assert [bool(each["wrong"]) for each in items] == [False, True, False]
    assert file in items[1]["wrong"]
    assert main([str(run)]) == 1
    told = capsys.readouterr().out
    assert f"checkpoints/step-00000004: {items[1]['wrong']}" in told
    assert "1 damaged" in told


def test_arms_pointers_old_formats_and_leftovers_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints").rename(run / "moved")
    (run / "pretrained-seed0").mkdir()
    (run / "moved").rename(run / "pretrained-seed0" / "checkpoints")
    shutil.copytree(FORMAT_1, run / "scratch-seed0" / "checkpoints")
    (run / "scratch-seed0" / "checkpoints" / "step-00000004.tmp").mkdir()
    assert main([str(run)]) == 0
    told = capsys.readouterr().out
    assert "scratch-seed0/checkpoints" in told
    assert "sound, format 1" in told
    assert "older formats are brought to 2 when they are restored" in told
    assert "1 left half written or half deleted by a kill" in told
    assert "4 checkpoints" in told
    for content, words in (("step-00000009", "names step-00000009, which is not there"), ("", "cannot be read")):
        (run / "pretrained-seed0" / "checkpoints" / "latest").write_text(content)
        assert main([str(run)]) == 1
        assert words in capsys.readouterr().out


def test_what_holds_no_checkpoints_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert f"{tmp_path / 'none'} is no folder; give the folder of a run" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "holds no checkpoints; give the folder of a run that has begun to train" in capsys.readouterr().err
    assert main([]) == 2
    assert "run: missing" in capsys.readouterr().err


def test_one_that_goes_while_it_is_looked_at_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = verb.problem

    def late(path: Path) -> str | None:
        if path.name == "step-00000002":
            shutil.rmtree(path)
        return verify(path)

    monkeypatch.setattr(verb, "problem", late)
    items = facts(run, capsys)["checkpoints"]
    assert isinstance(items, list)
    assert [each["step"] for each in items] == [4, 5]


def test_the_command_needs_no_tracker(tmp_path: Path) -> None:
    path = save(fresh(), tmp_path / "run" / "checkpoints")
    flip(path / "model.safetensors")
    code = f"import sys; from pipelines.terravox import main; code = main(['checkpoints', {str(tmp_path / 'run')!r}]); "
    code += "assert 'mlflow' not in sys.modules; sys.exit(code)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert told.returncode == 1, told.stderr
    assert "model.safetensors fails its SHA-256" in told.stdout
