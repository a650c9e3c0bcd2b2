"""Every adapter says what its source unpacks at least; a window of whole blocks costs no more than its share."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np

from modalities.catalogue import scan
from modalities.medical import MriSettings
from modalities.sentinel2 import Sentinel2Settings
from modalities.volume import Recent
from tests.synthetic_rasters import scene_of, write_world
from tests.synthetic_volumes import head, save_volume


def test_tiles_and_strips_of_a_raster(tmp_path: Path) -> None:
    tiled = scene_of(write_world(tmp_path / "tiled.tif", (100, 90), tiled=True, blockxsize=32, blockysize=16))
    assert tiled.block == (16, 32)
    strips = scene_of(write_world(tmp_path / "strips.tif", (100, 90), blockysize=8))
    assert strips.block == (8, 90)
    small = scene_of(write_world(tmp_path / "small.tif", (20, 9), tiled=True, blockxsize=32, blockysize=32))
    assert small.block == (20, 9), "never beyond the scene"


def test_the_largest_block_of_several_bands_on_the_grid_of_the_finest(tmp_path: Path) -> None:
    write_world(tmp_path / "x_B02.tif", (96, 96), 10, tiled=True, blockxsize=32, blockysize=32)
    write_world(tmp_path / "x_B05.tif", (48, 48), 20, tiled=True, blockxsize=16, blockysize=32)
    (scene,) = scan(tmp_path, Sentinel2Settings()).scenes
    assert scene.grid.space == (96, 96)
    assert scene.block == (64, 32)


def test_a_volume_is_one_block_at_the_spacing_of_the_scene(tmp_path: Path) -> None:
    save_volume(tmp_path / "a.nii.gz", head()[:12, :14, :16], np.diag([2.0, 2.0, 2.0, 1.0]))
    (scene,) = scan(tmp_path, MriSettings(spacing_mm=(1.0, 1.0, 1.0))).scenes
    assert scene.block == scene.grid.space == (23, 27, 31)


def test_no_more_than_one_volume_is_kept_while_another_is_read() -> None:
    """Else the second volume of a worker would need more memory than the first."""
    recent: Recent[np.ndarray] = Recent()
    first = weakref.ref(recent.get("a", lambda: np.zeros(3)))
    assert first() is recent.get("a", lambda: np.ones(3))
    gone: list[bool] = []

    def load() -> np.ndarray:
        gone.append(first() is None)
        return np.ones(3)

    recent.get("b", load)
    assert gone == [True]
