from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from rasterio.transform import Affine
from rio_cogeo import cog_validate

from modalities import raster_file
from modalities.scene import SceneError
from tests.synthetic_rasters import (
    UTM,
    north_up,
    palette,
    scene_of,
    write_raster,
    write_world,
)


@pytest.mark.parametrize(
    ("space", "affine", "crs"),
    [
        ((300, 270), north_up(), UTM),
        ((40, 300), Affine(10, 0, 500_000.123456789, 0, 10, 5_000_000), UTM),
        ((40, 50), Affine(8, 6, 500_000, 6, -8, 5_000_000), None),
        ((40, 50), Affine(0.0001, 0, 15.00003, 0, -0.00009, 45), "EPSG:4326"),
        ((40, 50), None, None),
    ],
)
def test_labels_go_out_and_come_back_in_the_same_place(
    tmp_path: Path, space: tuple[int, int], affine: Affine | None, crs: str | None
) -> None:
    source = write_raster(tmp_path / "a.tif", np.ones((1, *space), np.uint16), affine, crs)
    scene = scene_of(source)
    labels = np.random.default_rng(0).integers(0, 5, space).astype(np.uint8)
    labels[0, 0] = 255
    out = tmp_path / "deep" / "labels.tif"
    scene.write_labels(out, labels, 255)
    assert [file.name for file in out.parent.iterdir()] == ["labels.tif"]
    with raster_file.quiet():
        assert cog_validate(out, strict=True) == (True, [], [])
    with raster_file.opened(source) as one, raster_file.opened(out) as other:
        assert (other.crs, other.transform, other.shape) == (one.crs, one.transform, one.shape)
        assert not one.transform.is_rectilinear or other.bounds == one.bounds
        assert (other.nodata, other.dtypes, other.profile["compress"]) == (255, ("uint8",), "deflate")
        assert other.block_shapes == [(512, 512)]
    window = (slice(0, space[0] - 3), slice(0, 17))
    back = scene.open_labels(out).read(window)
    np.testing.assert_array_equal(back, np.where(labels[window] == 255, -1, labels[window].astype(int)))
    with pytest.raises(SceneError, match="must be uint8 of shape"):
        scene.write_labels(out, labels[1:], 255)


def test_labels_of_a_larger_and_of_a_smaller_map(tmp_path: Path) -> None:
    scene = scene_of(write_world(tmp_path / "a.tif", (20, 30)))
    large = np.arange(1, 40 * 50 + 1, dtype=np.int32).reshape(1, 40, 50)
    labels = scene.open_labels(write_raster(tmp_path / "large.tif", large, north_up(10, 499_900, 5_000_050), nodata=2))
    np.testing.assert_array_equal(labels.read((slice(3, 9), slice(4, 30))), large[0, 8:14, 14:40])
    assert pickle.loads(pickle.dumps(labels)) == labels
    small = np.array([[[1, 2.0], [-7, np.nan]]])
    labels = scene.open_labels(write_raster(tmp_path / "small.tif", small, north_up(10, 500_010.05, 4_999_990), nodata=2))
    assert labels.read((slice(0, 4), slice(0, 4))).tolist() == [[-1] * 4, [-1, 1, -1, -1], [-1] * 4, [-1] * 4]
    assert (labels.read((slice(10, 20), slice(0, 30))) == -1).all()


def test_labels_that_are_no_class_numbers_are_refused(tmp_path: Path) -> None:
    scene = scene_of(write_world(tmp_path / "a.tif", (20, 30)))
    with pytest.raises(SceneError, match=r"has 2 bands of uint8; labels are one band"):
        scene.open_labels(write_raster(tmp_path / "two.tif", np.ones((2, 20, 30), np.uint8), north_up()))
    with pytest.raises(SceneError, match=r"not whole, such as 0.5"):
        scene.open_labels(write_raster(tmp_path / "half.tif", np.full((1, 20, 30), 0.5), north_up())).read(scene.grid.full)
    (tmp_path / "text.tif").write_text("no")
    with pytest.raises(SceneError, match=r"text.tif cannot be used: not a readable"):
        scene.open_labels(tmp_path / "text.tif")
    assert scene.open_labels(palette(tmp_path / "map.tif")).read(scene.grid.full)[:4, :4].min() == 1
