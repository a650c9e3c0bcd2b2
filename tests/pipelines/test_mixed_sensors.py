"""Several sensors, reference systems and dates in one store: from files to an encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rasterio import Affine

from mae_core.export import load_encoder
from mae_core.store import TileStore
from pipelines import prepare, pretrain_sentinel
from tests.synthetic_rasters import north_up, write_raster
from tests.tiny_runs import quick, shared_tracking

__all__ = ["quick"]

TINY = [
    "train.steps=2",
    "train.log_steps=1",
    "train.eval_steps=2",
    "train.device=cpu",
    "loader.global_batch_size=4",
    "tracking.system_metrics=false",
    "prepare.num_workers=0",
    "prepare.split.val_fraction=0.3",
    "model.encoder.preset=nano",
    "model.decoder.width=16",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
]
FRAMES = {
    "EPSG:32633": north_up(),
    "EPSG:32634": north_up(),
    "EPSG:27700": north_up(x=260_000.0),
    "EPSG:4326": Affine(1e-4, 0, 12, 0, -1e-4, 42),
}


def optical_and_radar(folder: Path) -> Path:
    """Four places in four reference systems, each seen in two bands, by radar on two dates, and as heights."""
    rng = np.random.default_rng(2)
    for number, (crs, affine) in enumerate(FRAMES.items()):
        place = folder / f"place{number}"
        name = f"S2B_MSIL2A_2020022{number}T032739_N0214_R018_T33TWM_20200223T064303"
        for band in ("B02", "B03"):
            values = rng.integers(200, 3000, (1, 16, 16)).astype(np.uint16)
            write_raster(place / name / f"{band}.tif", values, affine, crs)
        for day in (1, 7):
            radar = f"S1A_IW_GRDH_1SDV_2020060{day}T01080{number}_20200607T010825_032904_03CFBA_D457"
            for polarisation in ("VV", "VH"):
                write_raster(place / radar / f"{polarisation}.tif", rng.normal(-12, 2, (1, 16, 16)).astype(np.float32), affine, crs)
        write_raster(place / "DEM" / "heights.tif", rng.integers(0, 900, (1, 16, 16)).astype(np.int16), affine, crs)
    return folder


def words(**values: Any) -> list[str]:
    return [f"{key.replace('__', '.')}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def run(verb: Any, *arguments: str) -> None:
    assert verb.main(list(arguments)) == 0


def test_three_sensors_in_four_reference_systems_become_one_encoder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    data, uri = optical_and_radar(tmp_path / "data"), shared_tracking(tmp_path_factory)
    layouts = words(reader__sentinel2__scale=1e-4, reader__sentinel2__offset=0)
    own = words(data=str(data), out=str(tmp_path / "run"), store=str(tmp_path / "store"), prepare__tile=[16, 16], tracking__uri=uri)
    run(pretrain_sentinel, *own, *layouts, *TINY, "model.encoder.patch=[4]")
    told = capsys.readouterr().out
    assert "sentinel1: 8 scenes of 4 places, from 16 files" in told
    assert "elevation: 4 scenes of 4 places, from 4 files" in told
    store = TileStore.open(tmp_path / "store")
    assert (store.kind, store.dtype, store.channels) == ("satellite", np.float32, ("DEM", "VV", "VH", "B02", "B03"))
    assert sorted(store.index.present.sum(axis=1).tolist()) == [1] * 4 + [2] * 12
    assert set(store.index.frame.tolist()) == set(FRAMES)
    assert len(set(store.index.group.tolist())) == 4
    units = {channel["name"]: channel["unit"] for channel in store.attributes["channels"]}
    assert (units["VV"], units["DEM"]) == ("dB", "m")
    assert np.isfinite(store.statistics.mean).all()
    encoder, about = load_encoder(tmp_path / "run" / "model")
    assert about.modality == "satellite"
    assert about.reader["kind"] == "satellite"
    assert encoder is not None


def test_a_series_becomes_an_encoder_of_three_axes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data, uri = optical_and_radar(tmp_path / "data"), shared_tracking(tmp_path_factory)
    own = words(data=str(data), out=str(tmp_path / "run"), store=str(tmp_path / "store"), prepare__tile=[2, 16, 16], tracking__uri=uri)
    series = words(reader__kind="series", reader__dates=2, reader__of__kind="sentinel1", crop=[2, 12, 12])
    run(pretrain_sentinel, *own, *series, *TINY, "model.encoder.patch=[4]")
    store = TileStore.open(tmp_path / "store")
    assert (store.kind, store.space, store.attributes["axes"]) == ("series", (2, 16, 16), ["time", "y", "x"])
    assert len(store) == 4
    _, about = load_encoder(tmp_path / "run" / "model")
    assert (about.encoder.patch, about.crop) == ((1, 4, 4), (2, 12, 12))
    assert list((tmp_path / "run").glob("panels/*.png"))


def test_channels_in_two_levels_stop_before_anything_is_written(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("S1GRD", "S1RTC"):
        for name in ("VV", "VH"):
            values = np.random.default_rng(0).normal(-12, 2, (1, 16, 16)).astype(np.float32)
            write_raster(tmp_path / "data" / folder / f"{name}.tif", values, north_up(x=500_000.0 + 1000 * (folder == "S1RTC")))
    own = words(
        modality="sentinel1", data=str(tmp_path / "data"), out=str(tmp_path / "store"), tracking__uri=shared_tracking(tmp_path_factory)
    )
    assert prepare.main([*own, "prepare.num_workers=0"]) == 1
    assert "VV, VH: GRD in 1 scenes, first S1GRD; RTC in 1 scenes, first S1RTC" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    run(prepare, *own, "prepare.num_workers=0", "prepare.mix_levels=true", "tracking.system_metrics=false")


def test_settings_of_sentinel2_mean_it_and_others_mean_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, kind in (
        ([], "satellite"),
        (["reader.exclude=[x]"], "satellite"),
        (["reader.channels=[B02]", "reader.exclude=[x]"], "sentinel2"),
        (["reader.kind=sentinel1", "reader.channels=[VV]"], "sentinel1"),
    ):
        run(pretrain_sentinel, *words(data=str(tmp_path), out=str(tmp_path / "run")), *given, "--print-config")
        told = capsys.readouterr().out
        assert f"\nreader:\n  kind: {kind}" in told
        assert "\n  tile: [128, 128]" in told
    run(pretrain_sentinel, *words(data="x", out="y"), "reader.kind=series", "reader.dates=3", "--print-config")
    assert "\n  tile: [3, 128, 128]" in capsys.readouterr().out
