"""What a folder that nobody vouches for can hold, and that none of it makes the reader look elsewhere."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import rasterio

from modalities.catalogue import scan
from modalities.raster import RasterSettings
from modalities.raster_file import inspect, quiet
from modalities.scene import SceneError
from modalities.sentinel2 import Sentinel2Settings
from tests.synthetic_rasters import NOTHING, UTM, check_scene, north_up, reason_of, scene_of, write_raster, write_world


@pytest.mark.parametrize(
    "path",
    [
        "/vsizip/a.zip/a.tif",
        "/vsicurl/http://host/a.tif",
        "/vsimem/a.tif",
        "http://host/a.tif",
        "https://host/a.tif",
        "s3://bucket/a.tif",
        "vrt:///a.tif",
        "GTIFF_DIR:1:/a.tif",
    ],
)
def test_no_protocol_is_spoken(path: str) -> None:
    with pytest.raises(SceneError, match=r"not a path of the file system|No such file"):
        inspect(Path(path), "a.tif")


DESCRIPTIONS = {
    "vrt": '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Float32" band="1"><SimpleSource>'
    "<SourceFilename>{}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>",
    "wms": "<GDAL_WMS><Service><ServerUrl>file://{}</ServerUrl></Service></GDAL_WMS>",
    "aux": '<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{}</MDI></Metadata></PAMDataset>',
    "stac": '{{"type": "Feature", "assets": {{"data": {{"href": "{}"}}}}}}',
    "text": "{}",
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
@pytest.mark.parametrize("name", ["a.tif", "a.tiff", "a.jp2"])
def test_a_description_of_another_file_is_no_raster_whatever_it_is_called(tmp_path: Path, kind: str, name: str) -> None:
    other = write_world(tmp_path / "elsewhere" / "b.tif", (8, 8))
    path = tmp_path / name
    path.write_text(DESCRIPTIONS[kind].format(other))
    assert "not like a TIFF or a JPEG 2000" in reason_of(path)


def test_metadata_that_name_another_file_are_not_followed(tmp_path: Path) -> None:
    other = write_raster(tmp_path / "other.tif", np.full((1, 8, 8), 99, np.float32), north_up(80))
    path = write_world(tmp_path / "a.tif", (64, 64))
    wanted = scene_of(path).read((slice(0, 64), slice(0, 64)))[0]
    with rasterio.open(path, "r+") as target:
        target.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(other))
        target.update_tags(OVERVIEW_FILE=str(other), MASK_FILE=str(other), SOURCE=str(other))
    (tmp_path / "a.tif.aux.xml").write_text(DESCRIPTIONS["aux"].format(other))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as target:
        target.write_mask(np.zeros((64, 64), bool))
    assert (tmp_path / "a.tif.msk").is_file()
    (tmp_path / "a.tif.ovr").write_bytes(other.read_bytes())
    other.unlink()
    scene = scene_of(path)
    check_scene(scene)
    pixels, quality = scene.read(scene.grid.full)
    np.testing.assert_array_equal(pixels, wanted)
    assert not quality.any()
    assert scene.grid.frame == UTM
    with rasterio.open(path, "r+") as target:
        target.update_tags(ns="SUBDATASETS", SUBDATASET_1_NAME=str(other), SUBDATASET_1_DESC="x")
    assert "it holds 1 images (pages)" in reason_of(path)


def test_links_to_rasters_are_followed_and_links_to_folders_and_to_other_things_are_not(tmp_path: Path) -> None:
    """Archives are often trees of links (annexes, pools). A link gives away nothing that is not a raster and no folder."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    inside.mkdir()
    write_world(outside / "deep" / "a.tif", (8, 8))
    (outside / "secret.txt").write_text("a secret")
    (inside / "link.tif").symlink_to(outside / "deep" / "a.tif")
    (inside / "secret.tif").symlink_to(outside / "secret.txt")
    (inside / "gone.tif").symlink_to(outside / "gone.tif")
    (inside / "folder").symlink_to(outside)
    os.mkfifo(inside / "pipe.tif")
    found = scan(inside, RasterSettings())
    assert [scene.name for scene in found.scenes] == ["link"]
    assert [item.file for item in found.rejected] == ["secret.tif"]
    assert "secret" not in found.rejected[0].reason.removeprefix("not a readable GeoTIFF, COG or JPEG 2000 ")
    assert found.num_files == 2


def test_a_file_of_nothing_but_a_claim_is_refused_and_a_large_empty_one_is_not(tmp_path: Path) -> None:
    def sparse(side: int) -> Path:
        shape = {"height": side, "width": side, "count": 1, "dtype": "uint8", "tiled": True, "SPARSE_OK": True}
        with rasterio.open(tmp_path / f"{side}.tif", "w", driver="GTiff", crs=UTM, transform=north_up(), **shape):
            pass
        return tmp_path / f"{side}.tif"

    assert "it is all but empty or made to fill the memory" in reason_of(sparse(1 << 16))
    small = scene_of(sparse(10_980))
    assert not small.read((slice(0, 64), slice(0, 64)))[0].any()


def test_ground_control_points_are_named_where_a_place_is_wanted(tmp_path: Path) -> None:
    points = [rasterio.control.GroundControlPoint(row, col, col, row) for row, col in ((0, 0), (0, 8), (8, 0), (8, 8))]
    path = write_raster(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8), gcps=points)
    assert scene_of(path).grid.frame == ""
    assert "but 4 ground control points; warp it by them" in reason_of(path, RasterSettings(require_georeference=True))
    assert NOTHING.require_georeference is False


@pytest.mark.parametrize(("scale", "offset"), [(np.nan, 0.0), (1e-4, np.nan), (np.inf, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("reader", [RasterSettings(), Sentinel2Settings()])
def test_tags_that_no_number_can_be_reckoned_with_are_a_reason(
    tmp_path: Path, scale: float, offset: float, reader: RasterSettings | Sentinel2Settings
) -> None:
    write_raster(tmp_path / "good.tif", np.full((1, 20, 20), 900, np.uint16), north_up(), names=("B04",))
    path = write_raster(tmp_path / "odd.tif", np.full((1, 20, 20), 900, np.uint16), north_up(), names=("B04",))
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = (scale,), (offset,)
    found = scan(tmp_path, reader)
    assert [scene.name for scene in found.scenes] == ["good"]
    (odd,) = found.rejected
    assert odd.file == "odd.tif"
    assert f"scale {scale:g} and offset {offset:g}" in odd.reason


def test_what_opens_a_file_quietly_may_do_so_from_where_it_is_quiet_already() -> None:
    done = threading.Event()

    def nested() -> None:
        with quiet(), quiet():
            done.set()

    threading.Thread(target=nested, daemon=True).start()
    assert done.wait(5), "the lock is taken twice by one thread"
