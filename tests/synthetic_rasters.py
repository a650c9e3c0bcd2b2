"""GeoTIFFs whose values say where they lie: `world_values` is linear in x and y, so half a pixel is a wrong number."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

from modalities.raster import RasterScene, RasterSettings, scan_rasters
from modalities.raster_file import BandFile, inspect
from modalities.scene import Channel, Scene, SceneError

UTM = "EPSG:32633"
NOTHING = RasterSettings()


def world_values(affine: Affine, space: tuple[int, int], band: int = 0) -> NDArray[np.float64]:
    """`1000 + 100 · band + x / 10 + y / 5` at the pixel centres, x and y in metres from (500 000, 5 000 000)."""
    row, column = np.mgrid[: space[0], : space[1]] + 0.5
    x = affine.a * column + affine.b * row + affine.c - 500_000
    y = affine.d * column + affine.e * row + affine.f - 5_000_000
    return 1000 + 100 * band + x / 10 + y / 5


def north_up(pixel: float = 10.0, x: float = 500_000.0, y: float = 5_000_000.0) -> Affine:
    return Affine(pixel, 0, x, 0, -pixel, y)


def write_raster(
    path: Path,
    pixels: NDArray[np.generic],
    affine: Affine | None = None,
    crs: str | None = UTM,
    names: tuple[str, ...] = (),
    **profile: Any,
) -> Path:
    """A GeoTIFF of `(band, row, column)`; `affine=None` and `crs=None` leave it without a place."""
    count, height, width = pixels.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        place = {} if affine is None else {"transform": affine}
        shape = {"count": count, "height": height, "width": width, "dtype": pixels.dtype.name}
        with rasterio.open(path, "w", driver="GTiff", crs=crs, **shape, **place, **profile) as target:
            target.write(pixels)
            for i, name in enumerate(names):
                target.set_band_description(i + 1, name)
    return path


def write_world(path: Path, space: tuple[int, int], pixel: float = 10.0, band: int = 0, dtype: str = "float32", **profile: Any) -> Path:
    """A one-band GeoTIFF of `world_values`."""
    affine = profile.pop("affine", north_up(pixel))
    values = world_values(affine, space, band)
    return write_raster(path, (np.rint(values) if dtype[0] in "iu" else values).astype(dtype)[None], affine, **profile)


def palette(path: Path) -> Path:
    write_raster(path, np.ones((1, 4, 4), np.uint8), north_up(), photometric="palette")
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {0: (0, 0, 0, 255), 1: (255, 0, 0, 255)})
    return path


def scene_of(path: Path, chosen: RasterSettings = NOTHING) -> RasterScene:
    scenes, rejected = scan_rasters([path], path.parent, chosen)
    assert not rejected, rejected
    return scenes[0]


def reason_of(path: Path, chosen: RasterSettings = NOTHING) -> str:
    scenes, rejected = scan_rasters([path], path.parent, chosen)
    assert not scenes
    assert [item.file for item in rejected] == [path.name]
    return rejected[0].reason


def band_of(path: Path, name: str) -> BandFile:
    file = inspect(path, path.name)
    return BandFile(path, 1, Channel(name), file.grid, file.dtypes[0], file.nodata[0])


def check_scene(scene: Scene) -> None:
    """What every scene keeps to."""
    assert pickle.loads(pickle.dumps(scene)) == scene
    space = scene.grid.space
    pixels, quality = scene.read(scene.grid.full)
    assert pixels.shape == (len(scene.channels), *space)
    assert pixels.dtype == scene.dtype != np.float64
    assert quality.shape == space
    assert quality.dtype == np.uint8
    assert np.isfinite(pixels[:, quality == 0]).all()
    part = tuple(slice(n // 3, max(n // 3 + 1, 2 * n // 3)) for n in space)
    some, some_quality = scene.read(part)
    np.testing.assert_array_equal(some, pixels[(slice(None), *part)])
    np.testing.assert_array_equal(some_quality, quality[part])
    assert all(file.is_file() for file in scene.files)
    for wrong in ((slice(0, space[0] + 1), slice(0, 1)), (slice(-1, 1), slice(0, 1)), (slice(0, 1), slice(1, 1))):
        with pytest.raises(SceneError, match="leaves"):
            scene.read(wrong)
