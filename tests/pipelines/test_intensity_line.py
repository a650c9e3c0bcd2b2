"""From files to fed values: X-ray pictures through the whole line, and voxels of faces that count nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from modalities.grey_png import read_png
from pipelines import finetune_segmentation, predict, prepare, pretrain
from tests.synthetic_pictures import save_png, shades
from tests.tiny_runs import quick, shared_tracking

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
    assert predict.main([f"model={tmp_path / 'segmenter'}", f"data={data}", f"out={tmp_path / 'out'}", "overlap=0", uri]) == 0
    written = sorted((tmp_path / "out").glob("*_labels.png"))
    assert len(written) == 5
    for file in written:
        labels = read_png(file)
        assert labels.shape == (20, 24)
        assert labels.dtype == np.uint8
        assert set(np.unique(labels)) <= {0, 1}
