from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modalities.quality import Quality
from modalities.raster import Radiometry, RasterScene
from modalities.sentinel2 import Sentinel2Settings, scan_sentinel2
from modalities.sentinel2_bands import BANDS, band_name, split_band
from tests.synthetic_rasters import check_scene, north_up, world_values, write_raster, write_world

TEN = Sentinel2Settings()
RISING = ["B10", *(name for name in BANDS if name != "B10")]
NO_BAND = "neither the end of its name nor its band's description says which Sentinel-2 band (B01 … B12) it is"


def found_in(folder: Path, chosen: Sentinel2Settings = TEN) -> tuple[list[RasterScene], dict[str, str]]:
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in (".tif", ".tiff", ".jp2")]
    scenes, rejected = scan_sentinel2(files, folder, chosen)
    assert sum(len(scene.files) for scene in scenes) + len(rejected) == len(files)
    return scenes, {item.file: item.reason for item in rejected}


def names(scene: RasterScene) -> list[str]:
    return [channel.name for channel in scene.channels]


def write_product(folder: Path, stem: str = "T33_2020_{}.tif", dtype: str = "float32") -> None:
    """All 13 bands of 120 × 180 pixels of 10 m at their own resolutions, each brighter than the one before, B10 the darkest."""
    for name, band in BANDS.items():
        step = int(band.resolution_m / 10)
        write_world(folder / stem.format(name), (120 // step, 180 // step), band.resolution_m, RISING.index(name), dtype)


@pytest.mark.parametrize(
    ("text", "band"),
    [
        ("B2", "B02"),
        ("B02", "B02"),
        ("b02", "B02"),
        ("band 2", "B02"),
        ("Band_12", "B12"),
        ("B8A", "B8A"),
        ("b08a", "B8A"),
        ("B10", "B10"),
        ("_B02_10m", "B02"),
        ("T48QUE_20200223_B02.tif", "B02"),
        ("T48QUE_20200223T032739_B8A_20m.jp2", "B8A"),
        ("2020-01-27-00_00_2020-01-27-23_59_Sentinel-2_L2A_B05_(Raw).tiff", "B05"),
        ("B4, central wavelength 665 nm", "B04"),
        ("B8_median", "B08"),
        ("blue", "B02"),
        ("Green", "B03"),
        ("red", "B04"),
        ("nir", "B08"),
        ("Red Edge 1", "B05"),
        ("rededge3", "B07"),
        ("nir08", "B8A"),
        ("narrow NIR", "B8A"),
        ("swir16", "B11"),
        ("SWIR 2", "B12"),
        ("coastal aerosol", "B01"),
        ("Red Edge", None),
        ("swir", None),
        ("B0", None),
        ("B13", None),
        ("B4/B3", None),
        ("B8-B4", None),
        ("B04_mean_of_B03_and_more", "B04"),
        ("SCL", None),
        ("VV", None),
        ("", None),
        ("T33_2020_TCI_10m.jp2", None),
        ("sen2_20210527_aber_tile11.tif", None),
        ("subB02", None),
    ],
)
def test_band_names(text: str, band: str | None) -> None:
    assert band_name(text) == band


@given(name=st.sampled_from(list(BANDS)), before=st.text("abT0_-.", max_size=8), after=st.sampled_from(["", "_10m", "_20m"]))
def test_a_band_at_the_end_of_a_file_name_is_found_and_the_rest_is_common(name: str, before: str, after: str) -> None:
    split = split_band(f"{before}_{name}{after}")
    assert split == (name, f"{before}".strip("_-. "))


def test_the_table_is_the_instrument() -> None:
    assert len(BANDS) == 13
    assert [name for name, band in BANDS.items() if band.resolution_m == 10] == ["B02", "B03", "B04", "B08"]
    assert [name for name, band in BANDS.items() if band.resolution_m == 60] == ["B01", "B09", "B10"]
    assert all(band_name(name) == name for name in BANDS)


def test_settings() -> None:
    assert Sentinel2Settings(channels=("b2", "nir")).channels == ("B02", "B08")
    for wrong, message in (
        ({"channels": ["B02", "B14"]}, "no Sentinel-2 band: B14; the bands are B01, B02"),
        ({"bands": ["B2", "B02"]}, "named once only"),
        ({"channels": ["B02"], "min_channels": 2}, "min_channels is 2, but only 1 channels"),
        ({"chanels": ["B02"]}, "Extra inputs"),
    ):
        with pytest.raises(ValidationError, match=message):
            Sentinel2Settings.model_validate(wrong)


def test_files_of_one_band_become_one_scene_on_the_ten_metre_grid(tmp_path: Path) -> None:
    write_product(tmp_path / "S2A")
    scenes, rejected = found_in(tmp_path)
    (scene,) = scenes
    assert (scene.name, names(scene)) == ("S2A/T33_2020", list(TEN.channels))
    assert rejected == {f"S2A/T33_2020_{b}.tif": f"band {b} is not among the wanted channels" for b in ("B01", "B09", "B10")}
    assert scene.grid.space == (120, 180)
    check_scene(scene)
    pixels, quality = scene.read(scene.grid.full)
    assert not quality.any()
    for i, channel in enumerate(scene.channels):
        wanted = world_values(north_up(), (120, 180), RISING.index(channel.name))
        np.testing.assert_allclose(pixels[i, 6:-6, 6:-6], wanted[6:-6, 6:-6], atol=2e-3)
        assert (channel.wavelength_nm, channel.resolution_m) == (BANDS[channel.name].wavelength_nm, BANDS[channel.name].resolution_m)
        assert (channel.scale, channel.offset) == (1e-4, 0)


def test_the_order_is_that_of_the_channels_and_the_reference_the_finest_wanted_band(tmp_path: Path) -> None:
    write_product(tmp_path, dtype="uint16")
    (scene,), rejected = found_in(tmp_path, Sentinel2Settings(channels=("B11", "B09", "B8A")))
    assert names(scene) == ["B11", "B09", "B8A"]
    assert scene.grid.space == (60, 90)
    assert len(rejected) == 10
    check_scene(scene)


def test_a_product_folder_and_doubled_resolutions(tmp_path: Path) -> None:
    for step, bands in ((1, ("B02", "B03")), (2, ("B02", "B05", "SCL")), (6, ("B02", "B05"))):
        for name in bands:
            path = tmp_path / "IMG_DATA" / f"R{step}0m" / f"T33_{name}_{step}0m.tif"
            write_world(path, (24 // step, 24 // step), 10.0 * step, dtype="uint16")
    (scene,), rejected = found_in(tmp_path)
    assert (scene.name, names(scene), scene.grid.space) == ("IMG_DATA/T33", ["B02", "B03", "B05"], (24, 24))
    assert [classes.band.path.name for classes in scene.class_bands] == ["T33_SCL_20m.tif"]
    assert rejected == {
        "IMG_DATA/R20m/T33_B02_20m.tif": "band B02 is read from T33_B02_10m.tif, which is finer",
        "IMG_DATA/R60m/T33_B02_60m.tif": "band B02 is read from T33_B02_10m.tif, which is finer",
        "IMG_DATA/R60m/T33_B05_60m.tif": "band B05 is read from T33_B05_20m.tif, which is finer",
    }


def test_bare_band_names_take_the_folders_name(tmp_path: Path) -> None:
    for name in ("B2.tif", "B02.TIF", "b3.tif"):
        write_world(tmp_path / "product" / name, (8, 8), dtype="uint16")
    assert [scene.name for scene in found_in(tmp_path)[0]] == ["product"]
    (scene,), rejected = found_in(tmp_path / "product")
    assert (scene.name, names(scene)) == ("product", ["B02", "B03"])
    assert rejected == {"B2.tif": "band B02 is read from B02.TIF"}


def test_a_band_on_another_grid_and_too_few_bands_are_rejected(tmp_path: Path) -> None:
    for name in ("B02", "B03"):
        write_world(tmp_path / "a" / f"{name}.tif", (8, 8), dtype="uint16")
    write_world(tmp_path / "a" / "B04.tif", (8, 8), dtype="uint16", crs="EPSG:32634")
    (scene,), rejected = found_in(tmp_path)
    assert names(scene) == ["B02", "B03"]
    assert rejected["a/B04.tif"].startswith("its CRS (EPSG:32634) is not that of the scene's other bands (EPSG:32633)")
    scenes, rejected = found_in(tmp_path, Sentinel2Settings(min_channels=3))
    assert not scenes
    assert rejected["a/B02.tif"] == "its scene has 2 of the wanted channels (B02, B03), reader.min_channels is 3"


def test_one_file_of_named_bands(tmp_path: Path) -> None:
    pixels = np.arange(1, 6, dtype=np.uint16)[:, None, None] * np.ones((1, 8, 8), np.uint16)
    write_raster(tmp_path / "stac.tif", pixels, north_up(), names=("red", "green", "blue", "nir", "scl"))
    write_raster(tmp_path / "bare.tif", pixels, north_up())
    write_raster(tmp_path / "counted.tif", pixels, north_up(), names=tuple(f"Band {i}" for i in range(1, 6)))
    write_raster(tmp_path / "twice.tif", pixels, north_up(), names=("B02", "B2", "B03", "B04", "B05"))
    write_raster(tmp_path / "sixty.tif", pixels[:2], north_up(), names=("B01", "QA60"))
    (scene,), rejected = found_in(tmp_path)
    assert (scene.name, names(scene)) == ("stac", ["B02", "B03", "B04", "B08"])
    assert scene.read(scene.grid.full)[0][:, 0, 0].tolist() == [3, 2, 1, 4]
    unnamed = "its 5 bands have no names: name them with reader.bands=[...]"
    sixty = "none of its bands (B01) is among the wanted channels"
    assert rejected == {"bare.tif": unnamed, "counted.tif": unnamed, "twice.tif": unnamed, "sixty.tif": sixty}
    scenes, rejected = found_in(tmp_path, Sentinel2Settings(bands=("B08", "B04", "B03", "B02", "B01")))
    assert [scene.name for scene in scenes] == ["bare", "counted", "stac", "twice"]
    assert scenes[0].read(scenes[0].grid.full)[0][:, 0, 0].tolist() == [4, 3, 2, 1]
    assert rejected == {"sixty.tif": sixty}
    rejected = found_in(tmp_path, Sentinel2Settings(bands=("B08", "B04", "B03")))[1]
    assert rejected["bare.tif"] == "it has 5 bands where reader.bands names 3 (B08, B04, B03)"
    rejected = found_in(tmp_path, Sentinel2Settings(min_channels=5))[1]
    assert rejected["stac.tif"] == "its scene has 4 of the wanted channels (B02, B03, B04, B08), reader.min_channels is 5"


def test_special_values_and_the_validity_band(tmp_path: Path) -> None:
    pixels = np.full((2, 6, 6), 1000, np.uint16)
    pixels[1] = 1
    pixels[0, 0, :2], pixels[1, 1, :3] = (0, 65535), 0
    write_raster(tmp_path / "x_B02.tif", pixels, north_up())
    (scene,), _ = found_in(tmp_path)
    quality = scene.read(scene.grid.full)[1]
    assert names(scene) == ["B02"]
    assert quality[0].tolist() == [Quality.NODATA, Quality.SATURATED, 0, 0, 0, 0]
    assert quality[1].tolist() == [1, 1, 1, 0, 0, 0]
    pixels[1, 5, 5] = 2
    write_raster(tmp_path / "x_B02.tif", pixels, north_up())
    assert found_in(tmp_path)[1] == {"x_B02.tif": "its 2 bands have no names: name them with reader.bands=[...]"}
    write_raster(tmp_path / "x_B02.tif", pixels[:1].astype(np.int16), north_up(), nodata=-1)
    (scene,), _ = found_in(tmp_path)
    assert scene.read(scene.grid.full)[1][0].tolist() == [0, 1, 0, 0, 0, 0]


def test_radiometry_comes_from_the_glob_then_the_file_then_the_settings(tmp_path: Path) -> None:
    for name in ("a_B02", "a_B03"):
        path = write_world(tmp_path / f"{name}.tif", (4, 4), dtype="uint16")
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = (1e-4,), (-0.1,)
    chosen = Sentinel2Settings(scale=1e-3, offset=0.5)
    assert [(c.scale, c.offset) for c in found_in(tmp_path, chosen)[0][0].channels] == [(1e-3, 0.5), (1e-4, -0.1)]
    chosen = Sentinel2Settings(radiometry=(Radiometry(match="*B03.tif", scale=2),))
    assert [(c.scale, c.offset) for c in found_in(tmp_path, chosen)[0][0].channels] == [(1e-4, 0), (2, 0)]


def test_reflectance_below_zero_is_data(tmp_path: Path) -> None:
    """With +1000 in the numbers, 950 is a reflectance of -0.005: water and shadow after correction. Only 0 is no data."""
    numbers = np.random.default_rng(0).integers(900, 1100, (2, 32, 32)).astype(np.uint16)
    numbers[:, 0, 0] = 0
    write_raster(tmp_path / "chip.tif", numbers, north_up(), names=("B04", "B08"))
    (scene,), _ = found_in(tmp_path, Sentinel2Settings(scale=1e-4, offset=-0.1, level="L2A"))
    pixels, quality = scene.read(scene.grid.full)
    assert quality[0, 0] == Quality.NODATA
    assert np.count_nonzero(quality) == 1
    physical = pixels[0] * scene.channels[0].scale + scene.channels[0].offset
    assert physical[numbers[0] == 950].max() == pytest.approx(-0.005)
