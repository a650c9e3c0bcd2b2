"""From files to fed values: X-ray pictures through the whole line, and voxels of faces that count nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_core.store import TileStore
from modalities.catalogue import scan
from modalities.grey_png import read_png
from modalities.medical import MriSettings
from pipelines import finetune_segmentation, predict, prepare, pretrain
from pipelines.preparation import PrepareSettings
from pipelines.preparation import prepare as prepare_scenes
from pipelines.prepare import store_attributes
from pipelines.tiling_plan import SplitSettings
from tests.synthetic_pictures import save_png, shades
from tests.synthetic_volumes import head, save_volume
from tests.tiny_runs import curve, quick, shared_tracking, tiny_recipe, tiny_run

__all__ = ["quick"]

TINY = [
    "train.steps=2",
    "train.log_steps=1",
    "train.eval_steps=2",
    "train.device=cpu",
    "loader.global_batch_size=4",
    "tracking.system_metrics=false",
]
ENCODER = [
    "model.encoder.preset=nano",
    "model.encoder.patch=[4]",
    "model.decoder.width=16",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
]


def test_xray_pictures_go_from_files_to_label_maps(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for number in range(5):
        values = shades((20, 24), number)
        values[4:12, 6:16] += 3000
        save_png(tmp_path / "images" / f"picture{number}.png", values)
        save_png(tmp_path / "labels" / f"picture{number}.png", (values > 3500).astype(np.uint8))
    uri = f"tracking.uri={shared_tracking(tmp_path_factory)}"
    words = ["prepare.num_workers=0", "prepare.split.val_fraction=0.3", "prepare.tile=[16,16]", uri]
    data, store, encoder = (str(tmp_path / name) for name in ("images", "store", "encoder"))
    assert prepare.main(["--modality", "xray", "--data", data, "--out", store, *words]) == 0
    assert pretrain.main(["--store", store, "--out", encoder, *ENCODER, *TINY, uri]) == 0
    places = [f"encoder={encoder}", f"data={data}", f"labels={tmp_path / 'labels'}", f"out={tmp_path / 'segmenter'}", "init=pretrained"]
    assert finetune_segmentation.main([*places, *TINY, *words, "head.features=4"]) == 0
    result = json.loads((tmp_path / "segmenter" / "result.json").read_text())
    assert result["groups"]["val"] >= 1
    cases = result["figures"]["cases"]
    assert cases["cases"] == result["groups"]["val"]
    (scores,) = [entry for name, entry in cases["arms"]["pretrained"].items() if name != "mean of classes"]
    assert scores["dice"]["mean"] is not None
    assert "hd95_pixels" in scores
    assert "hd95_mm" not in scores
    assert predict.main([f"model={tmp_path / 'segmenter'}", f"data={data}", f"out={tmp_path / 'out'}", "overlap=0", uri]) == 0
    written = sorted((tmp_path / "out").glob("*_labels.png"))
    assert len(written) == 5
    for file in written:
        labels = read_png(file)
        assert labels.shape == (20, 24)
        assert labels.dtype == np.uint8
        assert set(np.unique(labels)) <= {0, 1}


def stored(folder: Path, rubbish: float, defaced: str | None) -> TileStore:
    """A store of heads in part of which a face is marked; `rubbish` stands in the voxels of the face."""
    face = np.zeros((24, 24, 24), np.uint8)
    face[6:18, 14:, 4:12] = 1
    for number in range(3):
        values = head(seed=number)
        values[face == 1] = rubbish * (1 + number)
        save_volume(folder / "data" / f"sub-{number}_T1w.nii.gz", values)
        save_volume(folder / "data" / f"sub-{number}_desc-deface_mask.nii.gz", face)
    reader = MriSettings(spacing_mm=None, defaced=defaced, exclude=() if defaced else ("*mask*",))
    settings = PrepareSettings(tile=(24, 24, 24), num_workers=0, min_valid_fraction=0.0, split=SplitSettings(val_fraction=0.3))
    prepare_scenes(scan(folder / "data", reader), folder / "store", settings, attributes=store_attributes(reader, 3))
    return TileStore.open(folder / "store")


def test_what_is_in_a_face_changes_neither_statistics_nor_loss_nor_weights(tmp_path: Path) -> None:
    pattern = "*_desc-deface_mask.nii.gz"
    recipe = tiny_recipe(crop=[16], loader__global_batch_size=2, train__steps=2)
    stores = {rubbish: stored(tmp_path / str(rubbish), rubbish, pattern) for rubbish in (80.0, 160.0)}
    runs = {rubbish: tiny_run(store, recipe) for rubbish, store in stores.items()}
    losses = [curve(run.train()) for run in runs.values()]
    assert losses[0] == losses[1]
    one, two = (dict(run.state.model.named_parameters()) for run in runs.values())
    assert all(torch.equal(one[name], two[name]) for name in one)
    one_store, two_store = stores.values()
    assert one_store.statistics.mean == two_store.statistics.mean
    assert one_store.attributes["reader"]["defaced"] == pattern
    seen = [curve(tiny_run(stored(tmp_path / f"all {rubbish}", rubbish, None), recipe).train()) for rubbish in stores]
    assert seen[0] != seen[1]
