"""The end of a preparation tells which values the training side holds, so that wrong units are seen, and MLflow has the same table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from mae_core.store import TileStore
from pipelines import prepare
from pipelines.store_facts import value_columns
from tests.synthetic_rasters import north_up, write_raster
from tests.tiny_runs import quick, shared_tracking, wide

__all__ = ["quick", "wide"]


def test_values_are_told_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Values of 0 to 9999, each once in each of four places, of which the scale makes reflectance."""
    for place in range(4):
        values = np.stack([np.arange(10000).reshape(100, 100) % 10000, np.full((100, 100), 7)]).astype(np.uint16)
        write_raster(tmp_path / "images" / f"{place}.tif", values, north_up(x=500_000 + 5000 * place))
    described = "[{name: red, position: 1, scale: 0.0001, unit: reflectance}, {name: flat, position: 2}]"
    uri = shared_tracking(tmp_path_factory)
    words = ["modality=raster", f"data={tmp_path / 'images'}", f"out={tmp_path / 'store'}", f"reader.bands={described}"]
    words += ["prepare.tile=[100,100]", "prepare.num_workers=0", "prepare.split.val_fraction=0.25", f"tracking.uri={uri}"]
    assert prepare.main(words) == 0
    printed = capsys.readouterr().out
    columns = value_columns(TileStore.open(tmp_path / "store"))
    assert list(columns) == ["channel", "unit", "mean", "std", "2 %", "50 %", "98 %"]
    red, flat = (list(row) for row in zip(*columns.values(), strict=True))
    assert red[:2] == ["red", "reflectance"]
    wanted = np.arange(10000) * 1e-4
    numbers = [wanted.mean(), wanted.std(), *np.percentile(wanted, [2, 50, 98])]
    np.testing.assert_allclose([float(text) for text in red[2:]], numbers, rtol=2e-3)
    assert flat == ["flat", "not said", "7", "0", "7", "7", "7"]
    for text in (*columns, *red, *flat):
        assert text in printed
    client = MlflowClient(tracking_uri=uri)
    run_id = json.loads((tmp_path / "store" / "result.json").read_text())["mlflow"]["run_id"]
    logged = json.loads(Path(client.download_artifacts(run_id, "channels.json", str(tmp_path))).read_text())
    assert (logged["columns"], logged["data"]) == (list(columns), [red, flat])
