"""Coarse bands kept as they are on a fine grid: every measurement of the file stands there, each the same number of times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine

from modalities.quality import Quality
from modalities.raster import RasterScene, assemble
from tests.synthetic_rasters import band_of, check_scene, north_up, write_raster, write_world

FACTORS = (2, 3, 6)
DATA = Path(__file__).parents[2].parent / "shared" / "data" / "satellite"


def stored(step: int, space: tuple[int, int] = (48, 60)) -> np.ndarray:
    rng = np.random.default_rng(step)
    values = rng.integers(1, 5000, (1, -(-space[0] // step), -(-space[1] // step)), dtype=np.uint16)
    values[rng.random(values.shape) < 0.1] = 0
    return values


def native(folder: Path, space: tuple[int, int] = (48, 60)) -> RasterScene:
    fine = write_raster(folder / "fine.tif", np.full((1, *space), 7, np.uint16), north_up(), nodata=0)
    coarse = [write_raster(folder / f"x{step}.tif", stored(step, space), north_up(10 * step), nodata=0) for step in FACTORS]
    scene, left = assemble("s", [band_of(path, path.stem) for path in (*coarse, fine)], "native")
    assert not left
    return scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> RasterScene:
    return native(tmp_path_factory.mktemp("native"))


def test_footprints_and_the_law_of_every_scene(scene: RasterScene) -> None:
    check_scene(scene)
    assert [(channel.name, channel.footprint) for channel in scene.channels] == [("x2", 2), ("x3", 3), ("x6", 6), ("fine", 1)]


@given(rows=st.tuples(st.integers(0, 47), st.integers(1, 48)), columns=st.tuples(st.integers(0, 59), st.integers(1, 60)))
@settings(max_examples=30, deadline=None)
def test_every_fth_voxel_of_a_window_is_the_files_own_pixel(scene: RasterScene, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    for place, step in enumerate(FACTORS):
        window = tuple(slice(min(ends) // step * step, max(ends[0] + 1, ends[1])) for ends in (rows, columns))
        pixels, _ = scene.read(window)
        part = tuple(slice(one.start // step, -(-one.stop // step)) for one in window)
        np.testing.assert_array_equal(pixels[place, ::step, ::step], stored(step)[0][part])


def test_blocks_hold_one_value_and_nodata_flags_all_of_its_block_and_nothing_else(scene: RasterScene) -> None:
    pixels, quality = scene.read(scene.grid.full)
    empty = np.zeros(scene.grid.space, bool)
    for place, step in enumerate(FACTORS):
        block = np.ones((step, step), np.uint16)
        np.testing.assert_array_equal(pixels[place], np.kron(stored(step)[0], block))
        empty |= np.kron(stored(step)[0] == 0, block).astype(bool)
    np.testing.assert_array_equal(quality, empty * np.uint8(Quality.NODATA))


def test_a_last_measurement_may_reach_over_the_edge_and_a_scene_over_the_last_measurement(tmp_path: Path) -> None:
    check_scene(native(tmp_path / "over", (47, 59)))
    fine, short = write_world(tmp_path / "fine.tif", (20, 20)), write_world(tmp_path / "short.tif", (10, 8), 20)
    west, _ = assemble("s", [band_of(fine, "fine"), band_of(short, "short")], "native")
    _, quality = west.read(west.grid.full)
    assert (quality[:, 16:] == Quality.OUTSIDE).all()
    assert not quality[:, :16].any()
    late = write_world(tmp_path / "late.tif", (8, 10), 20, affine=north_up(20, y=4_999_960))
    south, left = assemble("s", [band_of(fine, "fine"), band_of(late, "late")], "native")
    assert not left
    assert (south.read(south.grid.full)[1][:4] == Quality.OUTSIDE).all()


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (north_up(20, 500_010), "one covers 2 × 2 of the scene's, which begin at its row 0 and column -0.5; resampling=native wants"),
        (north_up(25), "one covers 2.5 × 2.5 of the scene's"),
        (Affine(20, 0, 500_000, 0, -30, 5_000_000), "one covers 3 × 2 of the scene's"),
        (Affine(20, 0, 500_000, 0, 20, 4_999_800), "one covers -2 × 2 of the scene's"),
        (north_up(10, 500_003), "one covers 1 × 1 of the scene's, which begin at its row 0 and column -0.3"),
    ],
    ids=["shifted by half", "no whole number", "oblong", "south up", "fine and shifted"],
)
def test_a_lattice_that_does_not_fit_is_left_out_with_the_remedy(tmp_path: Path, affine: Affine, reason: str) -> None:
    bands = [band_of(write_world(tmp_path / "fine.tif", (20, 20)), "fine")]
    bands.append(band_of(write_world(tmp_path / "odd.tif", (10, 10), affine=affine), "odd"))
    scene, left = assemble("s", bands, "native")
    ((band, found),) = left
    assert (band.path.name, [channel.name for channel in scene.channels]) == ("odd.tif", ["fine"])
    assert reason in found
    assert found.endswith("Use resampling=bilinear")
    assert not assemble("s", bands)[1], "bilinear takes it"


@pytest.mark.parametrize(
    ("folder", "steps"), [("bigearthnet_tiny", {"B01": 6, "B05": 2}), ("majortom_core_199U_1099R", {"B09": 6, "B11": 2})]
)
def test_real_bands_of_20_and_60_m_are_the_files_own_pixels(folder: str, steps: dict[str, int]) -> None:
    root = DATA / folder
    if not root.is_dir():
        pytest.skip(f"real files are not at {root}")
    names = [*steps, "B02"]
    paths = [next(path for path in root.rglob(f"*{name}.tif")) for name in names]
    scene, left = assemble("s", [band_of(path, name) for path, name in zip(paths, names, strict=True)], "native")
    assert not left
    assert [channel.footprint for channel in scene.channels] == [*steps.values(), 1]
    window = (slice(12, 108), slice(24, 120))
    pixels, _ = scene.read(window)
    for place, (path, step) in enumerate(zip(paths, [*steps.values(), 1], strict=True)):
        with rasterio.open(path) as source:
            own = source.read(1)[tuple(slice(part.start // step, part.stop // step) for part in window)]
        assert own.std() > 0
        np.testing.assert_array_equal(pixels[place, ::step, ::step], own)
        np.testing.assert_array_equal(pixels[place], np.kron(own, np.ones((step, step), own.dtype)))
