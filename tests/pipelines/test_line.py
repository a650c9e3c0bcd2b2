"""The whole line in both worlds: files, encoder, both arms of a segmenter, label files in the geometry of their sources."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import rasterio
from mlflow import MlflowClient
from rasterio.crs import CRS

from mae_core.checkpoint import peek
from modalities.pseudonyms import pseudonyms
from pipelines import finetune_segmentation, predict, prepare, pretrain, pretrain_mri
from tests.synthetic_rasters import north_up, write_raster
from tests.synthetic_volumes import save_volume
from tests.tiny_runs import logged_sheets, one_thread, quick, shared_tracking, signals_restored

__all__ = ["quick"]

TINY = [
    "train.steps=2",
    "train.log_steps=1",
    "train.eval_steps=2",
    "train.device=cpu",
    "loader.global_batch_size=4",
    "tracking.system_metrics=false",
    "prepare.num_workers=0",
]
DECODER = ["model.decoder.width=16", "model.decoder.depth=1", "model.decoder.heads=2"]
ENCODER = ["model.encoder.preset=nano", "model.encoder.patch=[4]", *DECODER]
LONGER = ["train.steps=30", "train.eval_steps=30"]
SEGMENTER = ["head.features=4", "optim.base_lr=0.5", "overlap=0.1", "prepare.split.val_fraction=0.3", *LONGER]
RASTER_WORDS = ["prepare.tile=[16,16]", "ignore=[0]", "class_names=[dark,bright]"]


def done(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def rasters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Six places of two bands whose labels are 1 where the first band is dark and 2 where it is bright, 0 in a row; an encoder of them."""
    folder, uri = tmp_path_factory.mktemp("rasters"), shared_tracking(tmp_path_factory)
    for number in range(6):
        rng = np.random.default_rng(number)
        classes = np.kron(rng.integers(1, 3, (4, 5)), np.ones((4, 4), int))
        affine = north_up(x=500_000 + 1000 * number)
        pixels = 1000 * classes + rng.normal(0, 50, (2, 16, 20)).round()
        write_raster(folder / "images" / f"place{number}.tif", pixels.astype(np.uint16), affine, names=("A", "B"))
        classes[0] = 0
        write_raster(folder / "labels" / f"place{number}.tif", classes[None].astype(np.uint8), affine)
    words = ["prepare.tile=[16,16]", "prepare.split.val_fraction=0.3"]
    with one_thread():
        store = ["--modality", "raster", "--data", str(folder / "images"), "--out", str(folder / "store")]
        assert prepare.main([*store, *words, "prepare.num_workers=0"]) == 0
        own = [word for word in TINY if not word.startswith("prepare")]
        assert (
            pretrain.main(["--store", str(folder / "store"), "--out", str(folder / "encoder"), *ENCODER, *own, f"tracking.uri={uri}"]) == 0
        )
        with pytest.MonkeyPatch.context() as patched, signals_restored():
            patched.setattr(finetune_segmentation, "train", asked_to_stop_in(finetune_segmentation.train, 2))
            assert finetune(folder, uri, *RASTER_WORDS) == 75
        (folder / "first.json").write_text(json.dumps(arms_of(folder / "segmenter")))
        assert finetune(folder, uri, *RASTER_WORDS) == 0
    return folder, uri


def finetune(folder: Path, uri: str, *more: str) -> int:
    places = {"encoder": "encoder", "data": "images", "labels": "labels", "out": "segmenter"}
    words = [f"{name}={folder / place}" for name, place in places.items()]
    return finetune_segmentation.main([*words, *TINY, *SEGMENTER, f"tracking.uri={uri}", *more])


def asked_to_stop_in(train: Callable[..., None], arm: int) -> Callable[..., None]:
    """The loop, in whose so-manieth call the process is sent SIGTERM."""
    calls: list[str] = []

    def told(*given: Any) -> None:
        calls.append("one more")
        if len(calls) == arm:
            os.kill(os.getpid(), signal.SIGTERM)
        train(*given)

    return told


def arms_of(folder: Path) -> dict[str, dict[str, int]]:
    """Of each arm the newest checkpoint's step, and when it was scored, if it was."""
    found = {}
    for arm in ("pretrained-seed0", "scratch-seed0"):
        scores = folder / arm / "scores.json"
        record = peek(folder / arm / "checkpoints")
        found[arm] = {"step": record["step"]} | ({"scored": scores.stat().st_mtime_ns} if scores.is_file() else {})
    return found


def test_stopped_in_its_second_arm_a_fine_tuning_goes_on_there(rasters: tuple[Path, str]) -> None:
    before, after = json.loads((rasters[0] / "first.json").read_text()), arms_of(rasters[0] / "segmenter")
    assert before["scratch-seed0"] == {"step": 1}
    assert before["pretrained-seed0"] == after["pretrained-seed0"]
    assert (after["scratch-seed0"]["step"], "scored" in after["scratch-seed0"]) == (30, True)


def test_both_arms_are_scored_on_the_same_held_out_groups(rasters: tuple[Path, str]) -> None:
    result = done(rasters[0] / "segmenter")
    scores = result["figures"]["held_out"]
    assert set(scores) == {"pretrained-seed0", "scratch-seed0"}
    assert result["groups"] == {"train": 4, "val": 2}
    for found in scores.values():
        assert {"dice/dark", "dice/bright", "iou/dark", "iou/bright", "mean_dice", "mean_iou"} <= set(found)
        assert 0.9 < found["mean_dice"] <= 1, "brightness is easy to learn"


def test_the_registered_segmenter_knows_its_encoder(rasters: tuple[Path, str]) -> None:
    folder, uri = rasters
    result = done(folder / "segmenter")["mlflow"]
    tags = MlflowClient(uri).get_run(result["run_id"]).data.tags
    assert tags["parent.model_version"] == done(folder / "encoder")["mlflow"]["model"] == result["encoder"]


def test_a_second_call_tells_the_result_again(rasters: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, uri = rasters
    before = (folder / "segmenter" / "result.json").read_bytes()
    assert finetune(folder, uri, *RASTER_WORDS) == 0
    assert "is finished; its result is told again" in capsys.readouterr().out
    assert (folder / "segmenter" / "result.json").read_bytes() == before


def test_labels_of_a_raster_lie_where_the_raster_lies(rasters: tuple[Path, str], tmp_path: Path) -> None:
    folder, uri = rasters
    source, place = folder / "images" / "place1.tif", tmp_path / "labels.tif"
    model = done(folder / "segmenter")["mlflow"]["model"]
    for words in (["--model", str(folder / "segmenter")], ["--model", model]):
        assert predict.main([*words, "--data", str(source), "--out", str(place), f"tracking.uri={uri}"]) == 0
        with rasterio.open(place) as found, rasterio.open(source) as image, rasterio.open(folder / "labels" / "place1.tif") as truth:
            assert found.crs == image.crs == CRS.from_epsg(found.crs.to_epsg())
            assert found.transform == image.transform
            assert found.bounds == image.bounds
            assert (found.width, found.height, found.dtypes) == (image.width, image.height, ("uint8",))
            labels, wanted = found.read(1), truth.read(1)
            assert (labels == wanted)[wanted > 0].mean() > 0.9
            assert found.nodata == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "ENCODER", "--data", "IMAGE", "--out", "x.tif"], "holds an encoder, a segmenter is wanted; fine-tune it first"),
        (["--model", "SEGMENTER", "--data", "IMAGE", "--out", "x.png"], "is to hold the labels of one image and must end in .tif"),
        (["--model", "SEGMENTER", "--data", "IMAGE", "--out", "IMAGE"], "would overwrite an image; choose another --out"),
    ],
)
def test_predict_refuses_with_words(
    rasters: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    folder, uri = rasters
    image = folder / "images" / "place0.tif"
    before = image.read_bytes()
    known = {"ENCODER": folder / "encoder", "SEGMENTER": folder / "segmenter", "IMAGE": image}
    spelled = [str(known.get(word, tmp_path / word if word.startswith("x.") else word)) for word in words]
    assert predict.main([*spelled, f"tracking.uri={uri}"]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert image.read_bytes() == before


def test_volumes_go_the_whole_way_and_labels_come_back_in_their_geometry(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    uri = shared_tracking(tmp_path_factory)
    affine = np.array([[0, 0, 1.0, -9], [-1.0, 0, 0, 4], [0, 1.0, 0, 7], [0, 0, 0, 1]])
    for number in range(5):
        rng = np.random.default_rng(number)
        classes = np.kron(rng.integers(0, 2, (2, 3, 2)), np.ones((8, 8, 8), int))
        save_volume(
            tmp_path / "images" / f"p{number}.nii.gz", (400 * (1 + classes) + rng.normal(0, 10, classes.shape)).astype(np.float32), affine
        )
        save_volume(tmp_path / "labels" / f"p{number}.nii.gz", classes.astype(np.uint8), affine)
    pretraining = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "encoder"), "prepare.tile=[16,16,16]", *ENCODER, *TINY]
    for _ in range(2):
        assert pretrain_mri.main([*pretraining, "prepare.split.val_fraction=0.3", f"tracking.uri={uri}"]) == 0
    finetune(
        tmp_path,
        uri,
        "prepare.tile=[16,16,16]",
        "train.steps=2",
        "init=pretrained",
        "drop_path=0.3",
        "sheets=true",
        "tracking.log_images=true",
    )
    sheets = {path.stem for path in (tmp_path / "segmenter" / "pretrained-seed0" / "sheets").iterdir()}
    assert len(sheets) == 2
    parent = MlflowClient(uri).get_run(done(tmp_path / "segmenter")["mlflow"]["run_id"])
    arms = MlflowClient(uri).search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [set(logged_sheets(uri, arm.info.run_id)) for arm in arms] == [sheets]
    assert list(done(tmp_path / "segmenter")["figures"]["held_out"]) == ["pretrained-seed0"]
    words = ["--model", str(tmp_path / "segmenter"), "--data", str(tmp_path / "images"), "--out", str(tmp_path / "found"), "overlap=0.1"]
    assert predict.main([*words, f"tracking.uri={uri}"]) == 0
    for number in range(5):
        scan = pseudonyms().of("scan", f"p{number}.nii.gz")
        source, found = (nib.load(tmp_path / name) for name in (f"images/p{number}.nii.gz", f"found/{scan}_labels.nii.gz"))
        assert found.shape == source.shape
        np.testing.assert_array_equal(found.affine, source.affine)
        for code in ("sform_code", "qform_code"):
            assert found.header[code] == source.header[code]
        assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1}
