"""Label rasters on another lattice or in another CRS give the class of the nearest pixel on the ground, whatever window is read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform

from modalities.grid import Grid
from modalities.label_raster import NearestLabels, NoOverlapError, RasterLabels, label_index, open_raster_labels
from modalities.scene import SceneError
from tests.synthetic_rasters import UTM, north_up, scene_of, write_raster, write_world

SPACE = (70, 90)


def places(affine: Affine, space: tuple[int, int]) -> NDArray[np.float64]:
    """x and y `(2, row, column)` of pixel centres."""
    row, column = np.mgrid[: space[0], : space[1]] + 0.5
    return np.stack([affine.a * column + affine.b * row + affine.c, affine.d * column + affine.e * row + affine.f])


def carried(source: str, target: str, xy: Any) -> NDArray[np.float64]:
    """Coordinates in another CRS, one by one and without any shortcut."""
    x, y = xy.reshape(2, -1)
    return np.array(transform(CRS.from_user_input(source), CRS.from_user_input(target), x.tolist(), y.tolist())[:2]).reshape(xy.shape)


def naive(values: NDArray[Any], affine: Affine, xy: NDArray[np.float64]) -> NDArray[np.int64]:
    """Value of the pixel that each place lies in; -1 beyond the edge."""
    column, row = (np.floor(found + 1e-6).astype(int) for found in ~affine @ (xy[0], xy[1]))
    inside = (row >= 0) & (column >= 0) & (row < values.shape[0]) & (column < values.shape[1])
    return np.where(inside, values[np.clip(row, 0, values.shape[0] - 1), np.clip(column, 0, values.shape[1] - 1)], -1)


def classes_of(space: tuple[int, int]) -> NDArray[np.int32]:
    """Every pixel another number, so that a pixel's shift is seen wherever it happens."""
    return np.arange(space[0] * space[1], dtype=np.int32).reshape(space)


def around(crs: str, pixel: float, space: tuple[int, int]) -> tuple[Affine, str, tuple[int, int]]:
    """A lattice in another CRS with its middle in the image's."""
    x, y = carried(UTM, crs, np.array([[500_450.0], [4_999_650.0]]))[:, 0]
    return Affine(pixel, 0, x - pixel * space[1] / 2, 0, -pixel, y + pixel * space[0] / 2), crs, space


LATTICES: dict[str, tuple[Affine, str, tuple[int, int]]] = {
    "twice as coarse": (north_up(20), UTM, (40, 50)),
    "three times finer": (north_up(10 / 3, 500_000 - 100, 5_000_000 + 50), UTM, (240, 320)),
    "shifted by 0.3 pixels": (north_up(10, 500_003), UTM, (70, 90)),
    "south up": (Affine(10, 0, 500_004, 0, 10, 4_999_303), UTM, (70, 90)),
    "turned": (Affine(8, 6, 499_900, 6, -8, 5_000_000), UTM, (120, 130)),
    "the neighbouring zone": around("EPSG:32634", 10, (160, 180)),
    "degrees": around("EPSG:4326", 0.0001, (400, 400)),
    "a British grid far from Britain": around("EPSG:27700", 30, (25, 25)),
}


@pytest.mark.parametrize("case", LATTICES)
def test_each_pixel_takes_the_class_that_lies_under_its_centre(tmp_path: Path, case: str) -> None:
    affine, crs, space = LATTICES[case]
    scene = scene_of(write_world(tmp_path / "a.tif", SPACE))
    values = classes_of(space)
    labels, note = open_raster_labels(write_raster(tmp_path / "labels.tif", values[None], affine, crs), scene.grid, scene.name)
    ground = places(north_up(), SPACE)
    wanted = naive(values, affine, ground if crs == UTM else carried(UTM, crs, ground))
    assert (wanted >= 0).mean() > 0.3
    found = labels.read(scene.grid.full)
    # Where a centre falls on the line between two label pixels, either is as near.
    assert (found == wanted).mean() > (0.999 if crs == UTM else 0.995)
    assert np.array_equal(found >= 0, wanted >= 0) or (found >= 0).mean() == pytest.approx((wanted >= 0).mean(), abs=0.01)
    assert note.startswith(f"reprojected with nearest neighbour from CRS {crs}, {space[0]}×{space[1]} pixels of ")
    assert note.endswith("to CRS EPSG:32633, 70×90 pixels of 10 × 10")
    assert pickle.loads(pickle.dumps(labels)) == labels


@pytest.mark.parametrize("case", ["turned", "the neighbouring zone", "degrees", "three times finer"])
def test_any_window_gives_the_numbers_of_the_whole(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    affine, crs, space = LATTICES[case]
    scene = scene_of(write_world(tmp_path / "a.tif", SPACE))
    path = write_raster(tmp_path / "labels.tif", classes_of(space)[None], affine, crs)
    labels, _ = open_raster_labels(path, scene.grid, scene.name)
    whole = labels.read(scene.grid.full)
    monkeypatch.setattr("modalities.label_raster.BLOCK", 23)
    rng = np.random.default_rng(0)
    for _ in range(25):
        (top, bottom), (left, right) = (sorted(rng.choice(size + 1, 2, replace=False)) for size in SPACE)
        window = (slice(int(top), int(bottom)), slice(int(left), int(right)))
        assert np.array_equal(labels.read(window), whole[window])


@pytest.mark.parametrize("crs", ["EPSG:32634", "EPSG:4326", "EPSG:3035", "EPSG:3857"])
def test_the_way_between_nodes_is_as_good_as_carrying_every_pixel(crs: str) -> None:
    image = Grid.from_matrix((200, 160), np.array([[0, 10, 500_005], [-10, 0, 4_999_995], [0, 0, 1]]), UTM, "m")
    step = 0.0001 if crs == "EPSG:4326" else 10.0
    x, y = carried(UTM, crs, np.array([[500_000.0], [5_000_000.0]]))[:, 0]
    labels = Grid.from_matrix((300, 300), np.array([[0, step, x], [-step, 0, y], [0, 0, 1]]), crs, "degree" if step < 1 else "m")
    window = (slice(3, 187), slice(19, 160))
    near, exact = (label_index(image, labels, window, step) for step in (16, 1))
    assert np.abs(near - exact).max() < 1e-3
    assert np.ptp(exact) > 100


def test_a_crs_that_bends_too_much_is_carried_pixel_by_pixel(tmp_path: Path) -> None:
    grid = Grid.from_matrix((60, 60), np.array([[0, 20_000, 0], [-20_000, 0, 9_000_000], [0, 0, 1]]), UTM, "m")
    path = write_raster(tmp_path / "labels.tif", np.zeros((1, 180, 360), np.uint8), Affine(1, 0, -180, 0, -1, 90), "EPSG:4326")
    labels, _ = open_raster_labels(path, grid, "a")
    assert isinstance(labels, NearestLabels)
    assert labels.step == 1


def test_what_is_no_label_stays_none_on_the_way(tmp_path: Path) -> None:
    scene = scene_of(write_world(tmp_path / "a.tif", (8, 8)))
    values = np.array([[[0, 1, 255, 3], [-4, 5, 6, 7], [8, 9, 10, 11]]], np.int16)
    labels, _ = open_raster_labels(write_raster(tmp_path / "l.tif", values, north_up(20), nodata=255), scene.grid, "a")
    coarse = np.where((values[0] < 0) | (values[0] == 255), -1, values[0])
    wanted = np.concatenate([np.kron(coarse, np.ones((2, 2), int)), np.full((2, 8), -1)])
    assert np.array_equal(labels.read(scene.grid.full), wanted)


def test_the_same_lattice_is_read_as_it_is(tmp_path: Path) -> None:
    scene = scene_of(write_world(tmp_path / "a.tif", (20, 30)))
    path = write_raster(tmp_path / "labels.tif", np.ones((1, 20, 30), np.uint8), north_up())
    labels, note = open_raster_labels(path, scene.grid, "a", reproject=False)
    assert isinstance(labels, RasterLabels)
    assert not note


@pytest.mark.parametrize(
    ("affine", "crs", "reason"),
    [
        (north_up(20), UTM, r"labels have CRS EPSG:32633, 20×30 pixels of 20 × 20, the image has CRS EPSG:32633, 20×30 pixels of 10 × 10"),
        (north_up(10, 500_003), UTM, r"Reproject them with nearest neighbour to the image's grid, or give label_options.reproject=true"),
        (north_up(), "EPSG:32634", r"labels have CRS EPSG:32634"),
        (Affine(8, 6, 500_000, 6, -8, 5_000_000), UTM, "does not lie on the grid"),
    ],
)
def test_labels_on_another_grid_are_refused_where_the_user_says_so(tmp_path: Path, affine: Affine, crs: str, reason: str) -> None:
    scene = scene_of(write_world(tmp_path / "a.tif", (20, 30)))
    path = write_raster(tmp_path / "labels.tif", np.ones((1, 20, 30), np.uint8), affine, crs)
    with pytest.raises(SceneError, match=reason):
        open_raster_labels(path, scene.grid, scene.name, reproject=False)


@pytest.mark.parametrize(
    ("affine", "crs"),
    [
        (north_up(10, 600_000), UTM),
        (north_up(20, 500_000, 4_000_000), UTM),
        (north_up(), "EPSG:32634"),
        (Affine(0.1, 0, -80, 0, -0.1, 10), "EPSG:4326"),
    ],
)
def test_labels_that_lie_elsewhere_are_refused(tmp_path: Path, affine: Affine, crs: str) -> None:
    scene = scene_of(write_world(tmp_path / "a.tif", (20, 30)))
    path = write_raster(tmp_path / "labels.tif", np.ones((1, 20, 30), np.uint8), affine, crs)
    with pytest.raises(NoOverlapError, match="covers no part of a"):
        open_raster_labels(path, scene.grid, scene.name)


def test_labels_without_a_place_are_refused_for_an_image_with_one(tmp_path: Path) -> None:
    scene = scene_of(write_world(tmp_path / "a.tif", (20, 30)))
    path = write_raster(tmp_path / "labels.tif", np.ones((1, 20, 30), np.uint8), None, None)
    with pytest.raises(SceneError, match=r"labels have CRS none.*; without a CRS on both sides nothing relates them\. Write the labels"):
        scene.open_labels(path)
