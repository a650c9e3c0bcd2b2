"""Variants times seeds from one command: each is pretrained and probed once, and a second call goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.compare import main
from pipelines.progress import mean_and_deviation
from tests.synthetic_volumes import save_volume
from tests.tiny_runs import quick, shared_tracking

__all__ = ["quick"]

PRETRAINING = [
    "prepare.tile=[16,16,16]",
    "prepare.num_workers=0",
    "prepare.split.val_fraction=0.4",
    "model.encoder.preset=nano",
    "model.encoder.patch=[4]",
    "model.decoder.width=16",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
    "loader.global_batch_size=4",
    "train.steps=2",
    "train.log_steps=1",
    "train.eval_steps=2",
    "train.device=cpu",
    "tracking.system_metrics=false",
]
PROBING = ["prepare.tile=[16,16,16]", "prepare.num_workers=0", "prepare.split.val_fraction=0.4", "device=cpu", "k=3", "linear.l2=[0.1]"]


@pytest.fixture
def words(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    for number in range(5):
        rng = np.random.default_rng(number)
        classes = np.kron(rng.integers(0, 2, (2, 2, 2)), np.ones((8, 8, 8), int))
        values = 400 * (1 + classes) + rng.normal(0, 10, classes.shape)
        save_volume(tmp_path / "images" / f"p{number}.nii.gz", values.astype(np.float32))
        save_volume(tmp_path / "labels" / f"p{number}.nii.gz", classes.astype(np.uint8))
    tracked = f"tracking.uri={shared_tracking(tmp_path_factory)}"
    lists = {"pretraining": [*PRETRAINING, tracked], "probing": [*PROBING, tracked]}
    variants = {"default": [], "mask50": ["hiding.mask_ratio=0.5"]}
    places = ["--data", str(tmp_path / "images"), "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "run")]
    settings = tmp_path / "compare.json"
    settings.write_text(json.dumps({"modality": "mri", "seeds": [0, 1], "variants": variants, **lists}))
    return ["--config", str(settings), *places]


def test_every_variant_is_pretrained_and_probed_once_per_seed(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    found: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text())["figures"]
    assert list(found) == ["default", "mask50"]
    for name, runs in found.items():
        assert [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            assert set(run["balanced_accuracy"]) == {"pretrained", "pixels"} | ({"random"} if name == "default" else set())
            assert run["balanced_accuracy"]["pixels"]["linear"] > 0.8, "brightness is easy to read"
    ratios = {
        json.loads((tmp_path / "run" / f"{name}-seed0" / "result.json").read_text())["config"]["hiding"]["mask_ratio"] for name in found
    }
    assert ratios == {0.75, 0.5}
    assert "(random)" in capsys.readouterr().out
    before = (tmp_path / "run" / "mask50-seed1" / "result.json").stat().st_mtime_ns
    (tmp_path / "run" / "result.json").unlink()
    assert main(words) == 0
    assert (tmp_path / "run" / "mask50-seed1" / "result.json").stat().st_mtime_ns == before, "what is finished is not done again"


def test_a_variant_that_fails_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "variants.broken=[hiding.mask_ratio=2]"]) == 1
    assert "variant broken failed with exit code 2; its message is above" in " ".join(capsys.readouterr().err.split())


def test_a_name_that_is_no_folder_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "variants.a/b=[]"]) == 2
    assert "letters, digits, - and _" in " ".join(capsys.readouterr().err.split())


def test_a_mean_has_a_deviation_where_there_are_several() -> None:
    assert mean_and_deviation([0.5, 0.7]) == "0.600 ± 0.141"
    assert mean_and_deviation([0.25], "+") == "+0.250"
    assert mean_and_deviation([]) == "–"
