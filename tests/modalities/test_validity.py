"""Every way in which a pixel can be bad has its bit, says it of that pixel alone, and leaves all other values as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio

from modalities.class_band import SceneClasses
from modalities.quality import NO_VALUE, Quality
from modalities.raster import RasterScene, RasterSettings, assemble, with_classes
from modalities.raster_bands import DescribedBand
from modalities.raster_file import inspect
from tests.synthetic_rasters import band_of, check_scene, north_up, scene_of, write_raster

SIZE, AT = 64, (20, 33)
PLAIN = np.random.default_rng(0).integers(3000, 4001, (2, SIZE, SIZE)).astype(np.float32)


def spoiled(value: float, band: int = 0) -> np.ndarray:
    pixels = PLAIN.copy()
    pixels[(band, *AT)] = value
    return pixels


def by_value(path: Path, value: float, **profile: float) -> RasterScene:
    return scene_of(write_raster(path, spoiled(value), north_up(), **profile))


def by_setting(path: Path) -> RasterScene:
    return scene_of(write_raster(path, spoiled(0), north_up()), RasterSettings(nodata=0))


def by_mask_band(path: Path) -> RasterScene:
    write_raster(path, PLAIN, north_up())
    there = np.ones((SIZE, SIZE), bool)
    there[AT] = False
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as target:
        target.write_mask(there)
    return scene_of(path)


def by_alpha(path: Path) -> RasterScene:
    alpha = np.full((1, SIZE, SIZE), 255, np.float32)
    alpha[(0, *AT)] = 0
    write_raster(path, np.concatenate([PLAIN, alpha]), north_up())
    with rasterio.open(path, "r+") as target:
        gray, extra = rasterio.enums.ColorInterp.gray, rasterio.enums.ColorInterp.undefined
        target.colorinterp = (gray, extra, rasterio.enums.ColorInterp.alpha)
    return scene_of(path)


def by_validity_band(path: Path) -> RasterScene:
    there = np.ones((1, SIZE, SIZE), np.float32)
    there[(0, *AT)] = 0
    write_raster(path, np.concatenate([PLAIN, there]), north_up())
    whole = scene_of(path)
    return replace(whole, bands=tuple(replace(band, validity_index=3) for band in whole.bands[:2]))


def by_saturation(path: Path) -> RasterScene:
    bands = (DescribedBand(name="a"), DescribedBand(name="b", saturated=65535))
    return scene_of(write_raster(path, spoiled(65535, band=1), north_up()), RasterSettings(bands=bands))


def by_class(path: Path, number: int) -> RasterScene:
    classes = np.full((1, SIZE, SIZE), 4, np.uint8)
    classes[(0, *AT)] = number
    file = inspect(write_raster(path.with_name("SCL.tif"), classes, north_up()), "SCL.tif")
    return with_classes(scene_of(write_raster(path, PLAIN, north_up())), SceneClasses(dilation_m=0, bad=(0, 1, 2, 3, 8, 9, 10)).band(file))


WAYS: dict[str, tuple[Callable[[Path], RasterScene], Quality]] = {
    "nodata 0": (lambda path: by_value(path, 0, nodata=0), Quality.NODATA),
    "nodata -9999": (lambda path: by_value(path, -9999, nodata=-9999), Quality.NODATA),
    "nodata NaN": (lambda path: by_value(path, np.nan, nodata=np.nan), Quality.NODATA),
    "nodata by setting": (by_setting, Quality.NODATA),
    "mask band": (by_mask_band, Quality.NODATA),
    "alpha band": (by_alpha, Quality.NODATA),
    "band of 0 and 1": (by_validity_band, Quality.NODATA),
    "NaN that nobody declared": (lambda path: by_value(path, np.nan), Quality.NOT_FINITE),
    "infinite": (lambda path: by_value(path, -np.inf, nodata=0), Quality.NOT_FINITE),
    "saturated": (by_saturation, Quality.SATURATED),
    "class without data": (lambda path: by_class(path, 0), Quality.NODATA),
    "class saturated": (lambda path: by_class(path, 1), Quality.SATURATED),
    "class shadow": (lambda path: by_class(path, 3), Quality.CLOUD),
    "class cirrus": (lambda path: by_class(path, 10), Quality.CLOUD),
    "class left out by choice": (lambda path: by_class(path, 2), Quality.EXCLUDED),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_bad_pixel_is_one_flag_and_nothing_else_changes(tmp_path: Path, way: str) -> None:
    make, bit = WAYS[way]
    scene = make(tmp_path / "a.tif")
    check_scene(scene)
    pixels, quality = scene.read(scene.grid.full)
    assert quality[AT] == bit
    assert quality[AT] & NO_VALUE
    assert np.count_nonzero(quality) == 1
    elsewhere = np.ones((SIZE, SIZE), bool)
    elsewhere[AT] = False
    np.testing.assert_array_equal(pixels[:2, elsewhere], PLAIN[:, elsewhere])


def test_outside_has_its_bit_and_the_band_that_reaches_keeps_its_values(tmp_path: Path) -> None:
    narrow = band_of(write_raster(tmp_path / "narrow.tif", PLAIN[:1, :, :-1], north_up()), "narrow")
    whole = band_of(write_raster(tmp_path / "whole.tif", PLAIN[1:], north_up()), "whole")
    scene, left = assemble("s", [whole, narrow])
    assert not left
    pixels, quality = scene.read(scene.grid.full)
    assert (quality[:, -1] == Quality.OUTSIDE).all()
    assert not quality[:, :-1].any()
    np.testing.assert_array_equal(pixels[0], PLAIN[1])
    np.testing.assert_array_equal(pixels[1, :, :-1], PLAIN[0, :, :-1])


def test_reasons_add_up(tmp_path: Path) -> None:
    pixels = spoiled(0)
    pixels[(1, *AT)] = np.inf
    scene = scene_of(write_raster(tmp_path / "a.tif", pixels, north_up(), nodata=0))
    assert scene.read(scene.grid.full)[1][AT] == Quality.NODATA | Quality.NOT_FINITE


@pytest.mark.parametrize("resampling", ["bilinear", "native"])
@pytest.mark.parametrize("way", ["nodata 0", "nodata NaN", "mask band", "NaN that nobody declared", "saturated"])
def test_one_bad_pixel_of_a_coarse_band_takes_its_own_ground_alone(tmp_path: Path, way: str, resampling: str) -> None:
    coarse = WAYS[way][0](tmp_path / "coarse.tif")
    fine = band_of(write_raster(tmp_path / "fine.tif", np.ones((1, 3 * SIZE, 3 * SIZE), np.float32), north_up(10 / 3)), "fine")
    scene, left = assemble("s", [fine, *coarse.bands], resampling)  # type: ignore[arg-type]
    assert not left
    pixels, quality = scene.read(scene.grid.full)
    wanted = np.zeros((SIZE, SIZE), np.uint8)
    wanted[AT] = WAYS[way][1]
    np.testing.assert_array_equal(quality, np.kron(wanted, np.ones((3, 3), np.uint8)))
    mixed = pixels[1:, quality == 0]
    assert (mixed.min(), mixed.max()) == (pytest.approx(3000, abs=5), pytest.approx(4000, abs=5)), "no bad value was mixed in"
    assert mixed.min() >= 3000
