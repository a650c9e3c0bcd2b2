"""A folder of mixed products: every file to one adapter, every scene with a name of its own, every place one group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rasterio import Affine
from rasterio.warp import transform

from modalities.account import account
from modalities.catalogue import Catalogue, scan
from modalities.satellite import SatelliteSettings, recognise
from modalities.scene import SceneError
from modalities.sentinel1 import Sentinel1Settings
from modalities.sentinel2 import Sentinel2Settings
from tests.synthetic_rasters import check_scene, north_up, write_raster

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "satellite"
RADAR = "S1A_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904_03CFBA_D457"
OPTICAL = "S2B_MSIL2A_20200223T032739_N0214_R018_T33TWM_20200223T064303"


def optical(seed: int = 0, size: int = 16) -> Any:
    return np.random.default_rng(seed).integers(100, 3000, (1, size, size), dtype=np.uint16)


def radar(size: int = 16) -> Any:
    return np.random.default_rng(1).normal(-12, 2, (1, size, size)).astype(np.float32)


def mixed(folder: Path) -> Path:
    """One place seen by three sensors in two reference systems, another by one; labels, notes and a torn file beside."""
    for name in ("B02", "B03"):
        write_raster(folder / OPTICAL / f"{name}.tif", optical(), north_up())
        write_raster(folder / "other" / f"{name}.tif", optical(1), north_up(x=520_000.0))
    (west, east), (south, north) = transform("EPSG:32633", "EPSG:4326", [500_000, 500_160], [5_000_000 - 160, 5_000_000])
    degrees = Affine((east - west) / 16, 0, west, 0, (south - north) / 16, north)
    for name in ("VV", "VH"):
        write_raster(folder / "radar" / RADAR / f"{name}.tif", radar(), degrees, "EPSG:4326")
    write_raster(folder / "dem" / "chip.tif", np.full((1, 16, 16), 7, np.int16), north_up())
    write_raster(folder / "ndvi" / "index.tif", radar(), north_up(), names=("ndvi",))
    write_raster(folder / "labels.tif", np.ones((1, 16, 16), np.uint8), north_up())
    (folder / "torn_B04.tif").write_bytes(b"no raster")
    (folder / "radar" / RADAR / "metadata.json").write_text("{}")
    (folder / "notes.md").write_text("text")
    return folder


def check_counts(catalogue: Catalogue) -> None:
    used = [file for scene in catalogue.scenes for file in scene.files]
    assert len(used) == len(set(used)) == catalogue.num_used
    assert catalogue.num_used + len(catalogue.rejected) + len(catalogue.ignored) == catalogue.num_files
    names = [scene.name for scene in catalogue.scenes]
    assert len(set(names)) == len(names)
    assert catalogue.readers.keys() == set(names)
    assert sum(entry.scenes for entry in account(catalogue)) == len(names)
    assert sum(entry.files for entry in account(catalogue)) == catalogue.num_used


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/B02.tif", "sentinel2"),
        (f"{RADAR}/VV.tif", "sentinel1"),
        (f"{RADAR}/metadata.json", "sentinel1"),
        ("S1A_IW_20200607T010800_DVP_RTC30_G_gpunem_1234_VH.tif", "sentinel1"),
        ("SSL4EO-S12/s2a/0000200/20200604T054639/B8A.tif", "sentinel2"),
        ("SSL4EO-S12/s1/0000200/x/VH.tif", "sentinel1"),
        ("S1RTC/chip.tif", "sentinel1"),
        ("S2L1C/chip.tif", "sentinel2"),
        ("DEM/chip.tif", "elevation"),
        ("Copernicus_DSM_COG_10_N45_00_E011_00_DEM.tif", "elevation"),
        ("v1.1/S1Hand/Bolivia_103757_S1Hand.tif", "sentinel1"),
        ("S2Hand/Bolivia_103757_S2Hand.tif", "sentinel2"),
        (f"{OPTICAL}.SAFE/GRANULE/x/IMG_DATA/R10m/T33TWM_20200223T032739_B02_10m.jp2", "sentinel2"),
        ("LC08_L2SP_193026_20200705_20200913_02_T1_SR_B4.TIF", "landsat"),
        ("hls/HLS.S30.T33UUP.2020187T101031.v2.0.B8A.tif", "landsat"),
        ("LC08_L2SP_193026_20200705_20200913_02_T1/B4.tif", "landsat"),
        ("anything.tif", "sentinel2"),
    ],
)
def test_files_are_recognised_by_the_names_of_products_bands_and_folders(path: str, kind: str) -> None:
    assert recognise(path) == kind


def test_one_folder_of_three_sensors(tmp_path: Path) -> None:
    catalogue = scan(mixed(tmp_path), SatelliteSettings())
    check_counts(catalogue)
    assert catalogue.readers == {
        OPTICAL: "sentinel2",
        "other": "sentinel2",
        f"radar/{RADAR}": "sentinel1",
        "dem/chip": "elevation",
    }
    assert {item.file for item in catalogue.rejected} == {"labels.tif", "ndvi/index.tif", "torn_B04.tif"}
    assert catalogue.ignored == ("notes.md", f"radar/{RADAR}/metadata.json")
    for scene in catalogue.scenes:
        check_scene(scene)
    groups = {scene.name: scene.group for scene in catalogue.scenes}
    assert len({groups[OPTICAL], groups[f"radar/{RADAR}"], groups["dem/chip"]}) == 1, "one place, whatever the sensor and the CRS"
    assert groups["other"] == "other"


def test_the_first_source_that_matches_reads_a_file(tmp_path: Path) -> None:
    chosen = SatelliteSettings.model_validate(
        {
            "sources": [
                {"match": "ndvi/*", "reader": {"kind": "raster"}},
                {"match": ["*/index.tif", "other/*"], "reader": {"kind": "sentinel2", "channels": ["B03"], "scale": 1e-3}},
            ],
            "exclude": ["labels.tif"],
        }
    )
    catalogue = scan(mixed(tmp_path), chosen)
    check_counts(catalogue)
    assert catalogue.readers["ndvi/index"] == "raster (ndvi/*)"
    assert catalogue.readers["other"] == "sentinel2 (*/index.tif, other/*)"
    by_name = {scene.name: scene for scene in catalogue.scenes}
    assert [(channel.name, channel.scale) for channel in by_name["other"].channels] == [("B03", 1e-3)]
    assert "labels.tif" in catalogue.ignored


def test_a_reason_names_the_setting_of_the_reader_that_gave_it(tmp_path: Path) -> None:
    write_raster(tmp_path / "S1RTC" / "chip.tif", np.repeat(radar(), 2, 0), north_up())
    write_raster(tmp_path / "odd" / "VV.tif", np.abs(radar()), north_up())
    write_raster(tmp_path / "S2" / "chip.tif", np.repeat(optical(), 3, 0), north_up())
    write_raster(tmp_path / "B02.tif", optical(), north_up())
    sources = [{"match": "odd/*", "reader": {"kind": "sentinel1"}}]
    reasons = {item.file: item.reason for item in scan(tmp_path, SatelliteSettings.model_validate({"sources": sources})).rejected}
    assert "reader.sentinel1.bands" in reasons["S1RTC/chip.tif"]
    assert "set reader.sources[0].reader.unit to" in reasons["odd/VV.tif"]
    assert "reader.sentinel2.bands" in reasons["S2/chip.tif"]


def test_scenes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    write_raster(tmp_path / "a" / "B02.tif", optical(), north_up())
    write_raster(tmp_path / "a" / "VV.tif", radar(), north_up())
    catalogue = scan(tmp_path, SatelliteSettings())
    check_counts(catalogue)
    assert {scene.name for scene in catalogue.scenes} == {"a/B02.tif", "a/VV.tif"}


def test_the_account_says_what_an_analyst_asks(tmp_path: Path) -> None:
    entries = {entry.reader: entry for entry in account(scan(mixed(tmp_path), SatelliteSettings()))}
    one = entries["sentinel1"]
    assert (one.scenes, one.files, one.places, one.levels, one.dates, one.frames) == (1, 2, 1, "GRD", "2020-06-07", "EPSG:4326")
    assert (one.channels, one.radiometry) == ("VV VH", "dB, stored as dB: most values are below zero, which power and amplitude never are")
    two = entries["sentinel2"]
    assert (two.scenes, two.files, two.places, two.channels, two.frames) == (2, 4, 2, "B02 B03", "EPSG:32633")
    assert "= stored · 0.0001" in two.radiometry
    three = entries["elevation"]
    assert (three.levels, three.dates, three.channels, three.radiometry) == ("", "", "DEM", "m as stored")


def test_nothing_usable_is_said_with_counts(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    for name in "ab":
        (tmp_path / f"{name}_B02.tif").write_bytes(b"no raster")
    with pytest.raises(SceneError, match="nothing usable as satellite: 3 files found, 2 rejected, 1 of another kind") as caught:
        scan(tmp_path, SatelliteSettings())
    assert str(caught.value).count("\n") == 1, "one line for one reason"
    assert "\n  a_B02.tif and 1 more: not a readable GeoTIFF" in str(caught.value)


def test_settings() -> None:
    for wrong in ({"sources": [{"match": [], "reader": {"kind": "raster"}}]}, {"sources": [{"match": "*", "reader": {"kind": "mri"}}]}):
        with pytest.raises(ValidationError):
            SatelliteSettings.model_validate(wrong)


def test_one_sensor_alone_is_read_as_by_itself(tmp_path: Path) -> None:
    mixed(tmp_path)
    together = {scene.name: scene for scene in scan(tmp_path, SatelliteSettings()).scenes}
    for settings in (Sentinel1Settings(), Sentinel2Settings()):
        alone = scan(tmp_path, settings)
        check_counts(alone)
        for scene in alone.scenes:
            if scene.name in together:
                assert np.array_equal(scene.read(scene.grid.full)[0], together[scene.name].read(scene.grid.full)[0])
        assert {scene.name for scene in alone.scenes} & together.keys()


@pytest.mark.skipif(not DATA.is_dir(), reason="real files at ../shared/data are missing")
def test_all_real_folders_at_once() -> None:
    radar = Sentinel1Settings(bands=("VV", "VH"))
    with pytest.raises(SceneError, match=r"level L1C .* choose with reader\.sentinel2\.levels=\[L2A\]"):
        scan(DATA, SatelliteSettings(sentinel1=radar))
    catalogue = scan(DATA, SatelliteSettings(sentinel1=radar, sentinel2=Sentinel2Settings(levels=("L2A",))))
    check_counts(catalogue)
    entries = {entry.reader: entry for entry in account(catalogue)}
    assert entries["sentinel1"].scenes == 5
    assert entries["elevation"].scenes == 3
    groups = {scene.name: scene.group for scene in catalogue.scenes}
    radar_place = {group for name, group in groups.items() if "/s1/" in name}
    assert radar_place == {group for name, group in groups.items() if "/s2a/" in name}
