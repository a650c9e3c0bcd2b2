"""Maps of classes: which bit a class gives, where it lies, and that clouds are widened the same in every window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modalities.catalogue import scan
from modalities.class_band import Bits, ClassBand, MaskFile, SceneClasses, class_band
from modalities.quality import Quality
from modalities.raster import RasterScene, RasterSettings, assemble, scan_rasters, with_classes
from modalities.raster_file import inspect
from modalities.scene import SceneError
from tests.synthetic_rasters import UTM, band_of, check_scene, north_up, write_raster, write_world

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def image(tmp_path: Path, space: tuple[int, int] = (40, 60)) -> RasterScene:
    scene, left = assemble("s", [band_of(write_world(tmp_path / "fine.tif", space), "fine")])
    assert not left
    return scene


def classes_of(tmp_path: Path, numbers: np.ndarray, pixel: float = 20.0, how: SceneClasses | None = None, **profile: Any) -> ClassBand:
    affine = profile.pop("affine", north_up(pixel))
    path = write_raster(tmp_path / "SCL.tif", numbers[None], affine, **profile)
    return (how or SceneClasses(dilation_m=0)).band(inspect(path, "SCL.tif"))


def test_every_scene_class_gets_its_bit_and_snow_and_dark_ground_are_data(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.uint8).repeat(2).reshape(4, 6)
    scene = with_classes(image(tmp_path, (8, 12)), classes_of(tmp_path, numbers))
    check_scene(scene)
    _, quality = scene.read(scene.grid.full)
    wanted = {0: Quality.NODATA, 1: Quality.SATURATED, 3: Quality.CLOUD, 8: Quality.CLOUD, 9: Quality.CLOUD, 10: Quality.CLOUD}
    fine = np.kron(numbers, np.ones((2, 2), np.uint8))
    for number in range(12):
        assert set(quality[fine == number]) == {int(wanted.get(number, Quality.GOOD))}, number
    chosen = classes_of(tmp_path, numbers, how=SceneClasses(bad=(2, 11), dilation_m=0))
    _, quality = with_classes(image(tmp_path, (8, 12)), chosen).read(scene.grid.full)
    assert set(quality[np.isin(fine, (2, 11))]) == {int(Quality.EXCLUDED)}
    assert not quality[~np.isin(fine, (2, 11))].any()


@pytest.mark.parametrize("pixel", [5.0, 10.0, 20.0, 60.0])
def test_a_pixel_takes_the_class_that_its_centre_lies_on(tmp_path: Path, pixel: float) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 12, (int(240 / pixel), int(360 / pixel)), dtype=np.uint8)
    scene = with_classes(image(tmp_path, (24, 36)), classes_of(tmp_path, numbers, pixel))
    _, quality = scene.read(scene.grid.full)
    for row in range(24):
        for column in range(36):
            y, x = (row * 10 + 5) / pixel, (column * 10 + 5) / pixel
            options = {numbers[int(np.ceil(y)) - 1, int(np.ceil(x)) - 1]}  # where the centre lies on an edge, the upper left one
            assert (quality[row, column] > 0) == bool(options & {0, 1, 3, 8, 9, 10})


def test_a_class_map_that_ends_or_has_nodata_makes_what_it_does_not_know_invalid(tmp_path: Path) -> None:
    numbers = np.full((20, 25), 4, np.uint8)
    numbers[0, 0] = 255
    scene = with_classes(image(tmp_path), classes_of(tmp_path, numbers, nodata=255))
    _, quality = scene.read(scene.grid.full)
    assert (quality[:, 50:] == Quality.OUTSIDE).all()
    assert (quality[:2, :2] == Quality.NODATA).all()
    assert np.count_nonzero(quality[:, :50]) == 4


def test_bits_and_confidence_pairs(tmp_path: Path) -> None:
    numbers = np.array([[0, 1, 8, 1 << 14, 2 << 14, 3 << 14]], np.uint16)
    file = inspect(write_raster(tmp_path / "qa.tif", numbers[None], north_up()), "qa.tif")
    bits = (Bits(0, Quality.NODATA), Bits(3, Quality.CLOUD), Bits(14, Quality.EXCLUDED, count=2, at_least=3))
    scene = with_classes(image(tmp_path, (1, 6)), class_band(file, 0, {}, bits))
    assert scene.read(scene.grid.full)[1][0].tolist() == [0, Quality.NODATA, Quality.CLOUD, 0, 0, Quality.EXCLUDED]
    whole = inspect(write_raster(tmp_path / "qa2.tif", numbers[None].astype(np.float32), north_up()), "qa2.tif")
    with pytest.raises(SceneError, match=r"qa2.tif holds float32; bits are in whole numbers"):
        class_band(whole, 0, {}, bits)


@pytest.mark.parametrize("metres", [0, 20, 30, 45, 90])
def test_clouds_are_widened_by_a_disc_of_metres_and_nothing_else_is(tmp_path: Path, metres: float) -> None:
    rng = np.random.default_rng(1)
    numbers = np.where(rng.random((20, 30)) < 0.02, 9, 4).astype(np.uint8)
    numbers[10, 10], numbers[3, 3] = 1, 11
    scene = with_classes(image(tmp_path), classes_of(tmp_path, numbers, how=SceneClasses(dilation_m=metres)))
    _, quality = scene.read(scene.grid.full)
    own = np.zeros((20, 30), np.uint8)
    own[numbers == 9] = Quality.CLOUD
    own[numbers == 1] = Quality.SATURATED
    for row in range(20):
        for column in range(30):
            near = [np.hypot(row - y, column - x) * 20 <= metres for y, x in np.argwhere(numbers == 9)]
            if any(near) and numbers[row, column] != 9:
                own[row, column] |= Quality.EXCLUDED
    np.testing.assert_array_equal(quality, np.kron(own, np.ones((2, 2), np.uint8)))
    assert (np.count_nonzero(own & Quality.EXCLUDED) > 0) == (metres > 0)


@given(rows=st.tuples(st.integers(0, 39), st.integers(1, 40)), columns=st.tuples(st.integers(0, 59), st.integers(1, 60)))
@settings(max_examples=40, deadline=None)
def test_any_window_has_the_widened_clouds_of_the_whole(widened: RasterScene, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    window = (slice(min(rows), max(rows[0] + 1, rows[1])), slice(min(columns), max(columns[0] + 1, columns[1])))
    _, whole = widened.read(widened.grid.full)
    assert {0, int(Quality.CLOUD), int(Quality.EXCLUDED)} <= set(np.unique(whole))
    np.testing.assert_array_equal(widened.read(window)[1], whole[window])


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory) -> RasterScene:
    folder = tmp_path_factory.mktemp("widened")
    numbers = np.where(np.random.default_rng(3).random((20, 30)) < 0.02, 8, 4).astype(np.uint8)
    return with_classes(image(folder), classes_of(folder, numbers, how=SceneClasses(dilation_m=55)))


def test_metres_on_a_grid_of_degrees_and_on_none(tmp_path: Path) -> None:
    numbers = np.full((41, 41), 4, np.uint8)
    numbers[20, 20] = 9
    step = 20 / 111_320
    turned = classes_of(tmp_path, numbers, affine=north_up(step, 10, 60), crs="EPSG:4326", how=SceneClasses(dilation_m=61))
    flags = turned.read(turned.band.grid, turned.band.grid.full)
    assert np.flatnonzero(flags[:, 20]).tolist() == list(range(17, 24)), "20 m a row"
    assert np.flatnonzero(flags[20]).tolist() == list(range(14, 27)), "10 m a column at 60 degrees north"
    with pytest.raises(SceneError, match=r"SCL.tif has no place, so clouds cannot be widened by metres; set dilation_pixels"):
        classes_of(tmp_path, numbers, affine=None, crs=None, how=SceneClasses())
    placeless = classes_of(tmp_path, numbers, affine=None, crs=None, how=SceneClasses(dilation_pixels=1))
    assert np.count_nonzero(placeless.read(placeless.band.grid, placeless.band.grid.full)) == 5


def test_a_class_map_of_another_place_is_refused_by_name(tmp_path: Path) -> None:
    numbers = np.full((20, 30), 4, np.uint8)
    with pytest.raises(SceneError, match=r"SCL.tif has the CRS EPSG:32634, its image EPSG:32633"):
        with_classes(image(tmp_path), classes_of(tmp_path, numbers, crs="EPSG:32634"))
    with pytest.raises(SceneError, match=r"SCL.tif does not fit: it does not overlap"):
        with_classes(image(tmp_path), classes_of(tmp_path, numbers, affine=north_up(20, 900_000)))


def test_its_file_and_block_count(tmp_path: Path) -> None:
    scene = image(tmp_path, (256, 256))
    numbers = np.full((128, 128), 4, np.uint8)
    classes = classes_of(tmp_path, numbers, tiled=True, blockxsize=64, blockysize=32)
    assert scene.block == (1, 1)
    assert with_classes(scene, classes).block == (64, 128)
    assert [file.name for file in with_classes(scene, classes).files] == ["fine.tif", "SCL.tif"]


def masked(tmp_path: Path, how: MaskFile, **masks: np.ndarray) -> tuple[list[RasterScene], list[tuple[str, str]]]:
    for name in ("a", "b"):
        write_world(tmp_path / f"{name}.tif", (8, 8))
    for name, values in masks.items():
        write_raster(tmp_path / f"{name}.tif", values[None], north_up(), nodata=0)
    scenes, rejected = scan_rasters(tmp_path.glob("*.tif"), tmp_path, RasterSettings(clouds=how))
    return scenes, [(item.file, item.reason) for item in rejected]


def test_a_mask_beside_images_by_one_name_and_by_theirs(tmp_path: Path) -> None:
    cloud = np.eye(8, dtype=np.uint8)
    scenes, rejected = masked(tmp_path / "one", MaskFile(file="clouds.tif", cloud=(1,)), clouds=cloud)
    assert not rejected
    assert [scene.name for scene in scenes] == ["a", "b"]
    for scene in scenes:
        np.testing.assert_array_equal(scene.read(scene.grid.full)[1], cloud * Quality.CLOUD)
    assert scan(tmp_path / "one", RasterSettings(clouds=MaskFile(file="clouds.tif", cloud=(1,)))).num_used == 3
    scenes, rejected = masked(
        tmp_path / "own", MaskFile(file="{stem}_valid.tif", nodata=(0,), required=False), a_valid=cloud, c_valid=cloud
    )
    assert [scene.name for scene in scenes] == ["a", "b", "c_valid"], "a mask of no image looks like an image"
    np.testing.assert_array_equal(scenes[0].read(scenes[0].grid.full)[1], (1 - cloud) * Quality.NODATA)


def test_masks_in_a_folder_of_their_own_and_a_root_that_goes_up_and_down(tmp_path: Path) -> None:
    cloud = np.eye(8, dtype=np.uint8)
    for name in ("x", "y"):
        write_world(tmp_path / "images" / f"{name}.tif", (8, 8))
        write_raster(tmp_path / "clouds" / f"{name}.tif", cloud[None] * (name == "y"), north_up())
    (tmp_path / "other").mkdir()
    root = tmp_path / "other" / ".."
    how = MaskFile(file="../clouds/{stem}.tif", cloud=(1,))
    scenes, rejected = scan_rasters(root.rglob("*.tif"), root, RasterSettings(clouds=how))
    assert not rejected
    assert [(scene.name, scene.read(scene.grid.full)[1].any()) for scene in scenes] == [("images/x", False), ("images/y", True)]
    assert all(len(scene.files) == 2 for scene in scenes)


def test_images_without_their_mask_are_rejected_unless_told_otherwise(tmp_path: Path) -> None:
    cloud = np.eye(8, dtype=np.uint8)
    scenes, rejected = masked(tmp_path, MaskFile(file="{stem}_c*.tif", cloud=(1,), required=False), a_cloud=cloud)
    assert [(scene.name, len(scene.files)) for scene in scenes] == [("a", 2), ("b", 1)]
    assert not rejected
    scenes, rejected = masked(tmp_path, MaskFile(file="{stem}_c*.tif", cloud=(1,)))
    assert rejected == [("b.tif", "there is no mask {stem}_c*.tif of it; set reader.clouds.required=false to use it without")]
    scenes, rejected = masked(tmp_path, MaskFile(file="{stem}_c*.tif", cloud=(1,)), a_cirrus=cloud)
    assert [scene.name for scene in scenes] == []
    assert "2 files fit {stem}_c*.tif (a_cirrus.tif, a_cloud.tif); name one" in dict(rejected)["a.tif"]
    assert dict(rejected)["a_cloud.tif"] == "a mask of no scene"
    with pytest.raises(ValidationError, match=r"say which numbers of x.tif are bad: cloud=\[1\]"):
        MaskFile(file="x.tif")


def test_real_major_tom_cloud_mask() -> None:
    root = DATA / "satellite" / "majortom_core_199U_1099R"
    if not root.is_dir():
        pytest.skip(f"real files are not at {root}")
    (path,) = root.rglob("cloud_mask.tif")
    band, cloud = inspect(path.with_name("B02.tif"), "B02.tif"), inspect(path, path.name)
    scene, _ = assemble("s", [band_of(band.path, "B02")])
    clear = with_classes(scene, MaskFile(file="cloud_mask.tif", cloud=(1,), dilation_m=100).band(cloud))
    window = (slice(500, 564), slice(500, 564))
    assert not clear.read(window)[1].any(), "its SOURCE.md says that all is clear"
    assert (with_classes(scene, MaskFile(file="cloud_mask.tif", cloud=(0,)).band(cloud)).read(window)[1] == Quality.CLOUD).all()
    assert clear.grid.frame == "EPSG:32648" != UTM


@pytest.mark.parametrize("file", ["{stem}/mask.tif", "{stem}/m*.tif"])
def test_a_mask_lies_in_a_folder_that_is_called_like_its_image_whatever_that_is(tmp_path: Path, file: str) -> None:
    for name, bad in (("a[1]", 1), ("b", 0)):
        write_world(tmp_path / f"{name}.tif", (8, 8))
        write_raster(tmp_path / name / "mask.tif", np.full((1, 8, 8), bad, np.uint8), north_up())
    found = scan(tmp_path, RasterSettings(clouds=MaskFile(file=file, cloud=(1,))))
    flags = {scene.name: set(np.unique(scene.read(scene.grid.full)[1])) for scene in found.scenes}
    assert flags == {"a[1]": {int(Quality.CLOUD)}, "b": {0}}
