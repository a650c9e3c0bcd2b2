"""A run folder is claimed once, gone on with by the same settings only, and tells its result again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mae_core.export import Description
from mae_core.settings import to_plain
from modalities.raster import RasterSettings
from modalities.satellite import SatelliteSettings
from modalities.sentinel2 import Sentinel2Settings
from pipelines.compute_time import ComputeTime, compute_of
from pipelines.run_folder import RunError, begin, code_commit, finish, reader_of, without_paths
from tests.tiny_runs import ALONE

CONFIG: dict[str, Any] = {"crop": [8], "train": {"steps": 10, "log_steps": 1}, "tracking": {"uri": None}}
MAY = ("tracking", "train.log_steps")


def again(out: Path, verb: str = "pretrain", **train: int) -> dict[str, Any] | None:
    return begin(out, verb, {**CONFIG, "train": {**CONFIG["train"], **train}}, MAY)


@pytest.mark.parametrize("there", [True, False])
def test_a_new_or_empty_folder_is_claimed(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "deep" / "run"
    if there:
        out.mkdir(parents=True)
    assert again(out) is None
    assert json.loads((out / "config.json").read_text()) == {"verb": "pretrain", "settings": CONFIG}
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_an_unfinished_run_is_gone_on_with(tmp_path: Path) -> None:
    again(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert again(tmp_path) is None


def test_what_may_differ_may_differ(tmp_path: Path) -> None:
    again(tmp_path)
    assert begin(tmp_path, "pretrain", {**CONFIG, "train": {"steps": 10, "log_steps": 5}, "tracking": {"uri": "x"}}, MAY) is None


def test_other_settings_are_refused_line_by_line(tmp_path: Path) -> None:
    again(tmp_path)
    changed = {"crop": [16], "train": {"steps": 20, "log_steps": 1}, "tracking": {"uri": None}, "new": 1}
    with pytest.raises(RunError) as caught:
        begin(tmp_path, "pretrain", changed, MAY)
    first, *lines = str(caught.value).split("\n")
    assert first == f"--out {tmp_path} holds a run with other settings; choose another folder, or give the old settings again:"
    assert lines == ["  crop: [8] -> [16]", "  new: absent -> 1", "  train.steps: 10 -> 20"]


def test_a_run_of_another_verb_is_refused(tmp_path: Path) -> None:
    again(tmp_path)
    with pytest.raises(RunError, match=r"holds a run of pretrain, not of finetune_segmentation; choose another folder"):
        again(tmp_path, "finetune_segmentation")


def test_a_finished_run_tells_its_result_again(tmp_path: Path) -> None:
    again(tmp_path)
    result = finish(tmp_path, "pretrain", CONFIG, {"figures": {"train/loss": 1.5}, "folder": Path("x")})
    assert result["figures"] == {"train/loss": 1.5}
    assert {"python", "torch", "mlflow", "terravox"} <= result["versions"].keys()
    assert result["hardware"].keys() == {"processor", "cores", "gpus"}
    assert platform.node() not in result["hardware"].values()
    found = again(tmp_path)
    assert found == {**result, "folder": "x"}
    with pytest.raises(RunError, match=r"train\.steps: 10 -> 11"):
        again(tmp_path, steps=11)


def test_a_file_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RunError, match=rf"--out {file} is a file; give the name of a folder"):
        again(file)
    with pytest.raises(RunError, match=rf"--out {file}/run cannot be written: Not a directory; choose another folder"):
        again(file / "run")
    with pytest.raises(RunError, match=rf"--out {tmp_path} is not empty and holds no run \(file\); choose another folder"):
        again(tmp_path)
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours_to_write_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot be written: Permission denied"):
        again(tmp_path / "run")


@pytest.mark.parametrize("content", [b'{"verb": ', b"", b"\xff\xfe", b"[]"])
def test_a_damaged_configuration_is_told(tmp_path: Path, content: bytes) -> None:
    again(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json is damaged.*; choose another --out"):
        again(tmp_path)


def test_killed_while_it_claims_or_finishes_nothing_half_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        again(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json.tmp"]
    monkeypatch.undo()
    assert again(tmp_path) is None
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path, "pretrain", CONFIG, {})
    monkeypatch.undo()
    assert again(tmp_path) is None
    finish(tmp_path, "pretrain", CONFIG, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "result.json"]


def test_a_change_of_one_setting_of_a_reader_leaves_the_others_as_in_training() -> None:
    trained_with = SatelliteSettings(
        sentinel2=Sentinel2Settings(harmonize=True, levels=("L2A",), channels=("B02", "B08")), exclude=("*.vrt",)
    )
    about = Description.model_construct(modality="satellite", reader=to_plain(trained_with))
    assert reader_of(about, {}) == trained_with
    wanted = trained_with.model_copy(update={"sentinel2": trained_with.sentinel2.model_copy(update={"harmonize": False})})
    assert reader_of(about, {"sentinel2": {"harmonize": False}}) == wanted
    assert reader_of(about, {"kind": "raster"}) == RasterSettings(), "another adapter begins anew"
    with pytest.raises(RunError, match=r"does not fit the adapter satellite: sentinel2\.harmonise: Extra inputs are not permitted$"):
        reader_of(about, {"sentinel2": {"harmonise": True}})


def test_the_commit_of_a_checkout_is_known_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert code_commit(tmp_path) == ""
    (tmp_path / "code.py").write_text("a = 1\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"], ["tag", "v1"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    assert code_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("a = 2\n")
    assert code_commit(tmp_path) == f"{commit}-dirty"


def test_no_path_of_any_depth_is_told_to_a_tracker() -> None:
    told = {
        "model": {"encoder": {"preset": "nano"}},
        "init": {"encoder": "models:/a@candidate"},
        "tracking": {"experiment": "x"},
        "seed": 1,
    }
    own = {"out": "/home/anna/run", "perceptual": {"encoder": "smith/run"}, "tracking": {"experiment": "x", "uri": "sqlite:////smith/m.db"}}
    assert without_paths({**told, **own}) == {**told, "perceptual": {}}


@pytest.mark.parametrize("damage", ["", "[]", "{"])
def test_a_damaged_account_of_the_time_ends_no_training(tmp_path: Path, damage: str) -> None:
    (tmp_path / "compute.json").write_text(damage)
    ComputeTime(tmp_path, ALONE).note()
    assert compute_of(tmp_path)["attempts"] == 1
    (tmp_path / "compute.json").write_text(damage)
    assert compute_of(tmp_path)["attempts"] == 0
    (tmp_path / "compute.json.tmp").mkdir()
    ComputeTime(tmp_path, ALONE).note()
