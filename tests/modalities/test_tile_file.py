"""A tile that is written and read again is the same numbers at the same place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.transform import Affine

from modalities import raster_file
from modalities.grid import Grid
from modalities.nifti_file import read_header, read_stored
from modalities.quality import NO_VALUE, Quality
from modalities.scene import Channel, SceneError
from modalities.tile_file import TileImage, suffix_of, write_tile
from tests.synthetic_rasters import UTM, north_up, scene_of, world_values, write_raster
from tests.synthetic_volumes import OBLIQUE

BANDS = (Channel("B04", 665.0, 10.0, 1e-4, -0.1), Channel("B8A"))
WINDOW = (slice(3, 15), slice(7, 17))
SPACE = (12, 10)
PLANE = Grid.from_matrix(SPACE, np.array([[0.0, 10, 5], [-10, 0, 7], [0, 0, 1]]), UTM, "m")
RAS = Grid.from_matrix((4, 5, 6), OBLIQUE @ np.diag([1.5, 2, 3, 1]), "RAS+", "mm")
SIGNED = ["int8", "int16", "int32", "int64"]
DTYPES = ["uint8", "uint16", "uint32", "uint64", *SIGNED, "float16", "float32"]


def image_of(grid: Grid, channels: tuple[Channel, ...] = BANDS, dtype: str = "uint16", **more: Any) -> TileImage:
    rng = np.random.default_rng(0)
    pixels = rng.normal(60, 20, (len(channels), *grid.space)).astype(dtype)
    quality = rng.choice([0, 0, 1, 16, 128], grid.space).astype(np.uint8)
    return TileImage(**{"pixels": pixels, "quality": quality, "labels": None, "channels": channels, "grid": grid} | more, no_value=NO_VALUE)


def same_grid(one: Grid, other: Grid) -> None:
    assert (one.space, one.frame) == (other.space, other.frame)
    np.testing.assert_allclose(one.matrix, other.matrix, rtol=1e-14, atol=1e-9)


@pytest.mark.parametrize(
    ("affine", "crs"),
    [
        (north_up(), UTM),
        (Affine(10, 0, 500_000.123456789, 0, 10, 5_000_000), UTM),
        (Affine(8, 6, 500_000, 6, -8, 5_000_000), UTM),
        (Affine(0.0001, 0, 15.00003, 0, -0.00009, 45), "EPSG:4326"),
        (north_up(), "+proj=laea +lat_0=12.3 +lon_0=45.6 +datum=WGS84 +units=m"),
        (Affine(8, 6, 500_000, 6, -8, 5_000_000), None),
        (None, None),
    ],
)
def test_a_window_of_a_raster_goes_out_and_comes_back_in_the_same_place(tmp_path: Path, affine: Affine | None, crs: str | None) -> None:
    """Every value is a function of world position, so that half a pixel is a wrong number."""
    space = (20, 30)
    values = np.stack([world_values(affine or Affine.identity(), space, band) for band in (0, 1)]).astype(np.float32)
    scene = scene_of(write_raster(tmp_path / "source.tif", values, affine, crs))
    grid = scene.grid.window(WINDOW)
    pixels, quality = scene.read(WINDOW)
    files = write_tile(tmp_path / "out" / "tile.tif", TileImage(pixels, quality, None, scene.channels, grid, NO_VALUE))
    assert [file.name for file in files] == ["tile_quality.tif", "tile.tif"]
    assert sorted(file.name for file in files[0].parent.iterdir()) == ["tile.tif", "tile_quality.tif"]
    back = scene_of(files[1])
    same_grid(back.grid, grid)
    again, flags = back.read(back.grid.full)
    np.testing.assert_array_equal(again, pixels)
    np.testing.assert_array_equal(again, values[(slice(None), *WINDOW)])
    assert not flags.any()
    if affine is not None:
        with raster_file.opened(files[1]) as target:
            here = np.stack([world_values(target.transform, grid.space, band) for band in (0, 1)])
        np.testing.assert_allclose(again, here, rtol=1e-6)
    with raster_file.opened(files[1]) as target:
        assert (target.crs is None) == (crs is None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_values_keep_their_type_names_scales_and_what_counts(tmp_path: Path, dtype: str) -> None:
    labels = np.random.default_rng(1).integers(-1, 4, SPACE).astype(np.int16)
    image = image_of(PLANE, dtype=dtype, labels=labels, tags={"tile": "7"})
    image.quality[0, :5] = [0, Quality.NODATA, Quality.CLOUD, Quality.BACKGROUND, Quality.BACKGROUND | Quality.SATURATED]
    files = write_tile(tmp_path / "a.tif", image)
    assert [file.name for file in files] == ["a_quality.tif", "a_labels.tif", "a.tif"]
    with raster_file.opened(files[2]) as target:
        assert target.dtypes[0] == ("float32" if dtype == "float16" else dtype)
        np.testing.assert_array_equal(target.read(), image.pixels)
        assert target.descriptions == ("B04", "B8A")
        assert (target.scales, target.offsets) == ((1e-4, 1.0), (-0.1, 0.0))
        assert (target.tags(1)["wavelength_nm"], "wavelength_nm" in target.tags(2), target.tags()["tile"]) == ("665", False, "7")
        shown = target.dataset_mask() != 0
        assert target.nodata is None
    assert shown[0, :5].tolist() == [True, False, False, True, False]
    np.testing.assert_array_equal(shown, (image.quality & NO_VALUE) == 0)
    with raster_file.opened(files[0]) as target:
        assert (target.dtypes, target.descriptions) == (("uint8",), ("quality",))
        np.testing.assert_array_equal(target.read(1), image.quality)
    with raster_file.opened(files[1]) as target:
        assert (target.dtypes, target.nodata) == (("int16",), -1)
        np.testing.assert_array_equal(target.read(1), labels)
    _, flags = scene_of(files[2]).read((slice(0, 12), slice(0, 10)))
    np.testing.assert_array_equal(flags != 0, ~shown)


def stored(file: Path) -> tuple[NDArray[np.generic], Any]:
    header = read_header(file)
    return read_stored(file, header), header


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_volume_keeps_type_affine_scale_and_quality(tmp_path: Path, dtype: str) -> None:
    labels = np.random.default_rng(1).integers(-1, 4, RAS.space).astype(np.int16)
    image = image_of(RAS, (Channel("T1w", scale=0.25, offset=-1.5),), dtype=dtype, labels=labels)
    files = write_tile(tmp_path / "a.nii.gz", image)
    assert [file.name for file in files] == ["a_quality.nii.gz", "a_labels.nii.gz", "a.nii.gz"]
    for file, values in zip(files, (image.quality, labels, image.pixels[0]), strict=True):
        found, header = stored(file)
        np.testing.assert_array_equal(found, values)
        assert found.dtype == (np.float32 if values.dtype == np.float16 else values.dtype)
        np.testing.assert_allclose(header.grid.matrix, RAS.matrix, rtol=1e-6)
        assert header.flags == ()
    assert (header.slope, header.intercept) == (0.25, -1.5)
    loaded = nib.load(files[2])
    np.testing.assert_allclose(loaded.get_fdata(), image.pixels[0].astype(np.float64) * 0.25 - 1.5)
    np.testing.assert_allclose(loaded.affine, RAS.matrix, rtol=1e-6)
    assert loaded.header.get_zooms() == pytest.approx(RAS.spacing, rel=1e-6)


def test_channels_of_a_volume_become_files_of_their_own(tmp_path: Path) -> None:
    image = image_of(RAS, (Channel("T1w"), Channel("T2w/FLAIR", scale=2.0)))
    files = write_tile(tmp_path / "a.nii.gz", image)
    assert [file.name for file in files] == ["a_quality.nii.gz", "a_T1w.nii.gz", "a_T2w_FLAIR.nii.gz"]
    for file, values, slope in zip(files[1:], image.pixels, (1, 2), strict=True):
        found, header = stored(file)
        np.testing.assert_array_equal(found, values)
        assert header.slope == slope
    with pytest.raises(SceneError, match=r"two files of .* would be called the same: b_quality.nii.gz, .*; rename the channels"):
        write_tile(tmp_path / "b.nii.gz", image_of(RAS, (Channel("T1w"), Channel("quality"))))


def test_the_same_tile_gives_the_same_bytes(tmp_path: Path) -> None:
    for grid, name in ((PLANE, "a.tif"), (RAS, "a.nii.gz")):
        one, other = (write_tile(tmp_path / folder / name, image_of(grid)) for folder in ("one", "other"))
        assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
    assert other[1].read_bytes()[4:8] == bytes(4), "gzip holds no time"


@pytest.mark.parametrize(("space", "frame"), [((4,), UTM), ((4, 5, 6), ""), ((4, 5, 6), UTM), ((4, 5), "RAS+")])
def test_what_no_format_has_a_place_for_is_refused(space: tuple[int, ...], frame: str) -> None:
    with pytest.raises(SceneError, match=f"a tile of {len(space)} axes in frame .* is neither an image .* nor a volume"):
        suffix_of(Grid.from_matrix(space, np.eye(len(space) + 1), frame, "m"))


def test_nothing_is_written_over_and_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SceneError, match=r"a\.nii\.gz: a tile in EPSG:32633 is written as \.tif; change the ending"):
        write_tile(tmp_path / "a.nii.gz", image_of(PLANE))
    (tmp_path / "a_quality.tif").write_text("mine")
    with pytest.raises(SceneError, match=r"a_quality\.tif exists; choose another name, or delete it first"):
        write_tile(tmp_path / "a.tif", image_of(PLANE))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a_quality.tif", "mine")]
    (tmp_path / "file").write_text("")
    with pytest.raises(SceneError, match=r"cannot write .*file/a\.tif: "):
        write_tile(tmp_path / "file" / "a.tif", image_of(PLANE))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rasterio.io.DatasetWriter, "write_mask", full, raising=False)
    with pytest.raises(SceneError, match=r"cannot write .*b\.tif: .*No space left"):
        write_tile(tmp_path / "out" / "b.tif", image_of(PLANE))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["b_quality.tif"], "the image comes last, and whole or not at all"


def test_arrays_that_do_not_fit_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a tile of \(12, 10\) with 2 channels comes with arrays of"):
        image_of(PLANE, quality=np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"with 2 channels"):
        image_of(PLANE, pixels=np.zeros((3, *SPACE), np.uint8))
