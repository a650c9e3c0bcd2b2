from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rasterio.transform import Affine

from modalities import raster_file
from modalities.catalogue import Catalogue, scan
from modalities.place import group_by_place
from modalities.quality import Quality
from modalities.raster import Radiometry, RasterSettings, assemble, scan_rasters
from modalities.raster_file import inspect
from modalities.scene import SceneError
from tests.synthetic_rasters import (
    NOTHING,
    UTM,
    band_of,
    check_scene,
    north_up,
    palette,
    reason_of,
    scene_of,
    write_raster,
    write_world,
)

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    "affine",
    [
        north_up(),
        Affine(10, 0, 500_000, 0, 10, 5_000_000),
        Affine(8, 6, 500_000, 6, -8, 5_000_000),
        Affine(8, 1, 500_000, 2, -9, 5_000_000),
    ],
    ids=["north up", "south up", "rotated", "sheared"],
)
def test_a_value_is_found_where_the_grid_says(tmp_path: Path, affine: Affine) -> None:
    scene = scene_of(write_world(tmp_path / "a.tif", (30, 40), affine=affine))
    check_scene(scene)
    pixels, quality = scene.read((slice(7, 20), slice(11, 31)))
    place = scene.grid.window((slice(7, 20), slice(11, 31)))
    for row, column in ((0, 0), (12, 0), (3, 17)):
        x, y = place.world((row, column))
        assert pixels[0, row, column] == pytest.approx(1000 + (x - 500_000) / 10 + (y - 5_000_000) / 5, abs=1e-3)
    assert not quality.any()
    assert (scene.grid.frame, scene.grid.unit, scene.dtype) == (UTM, "m", np.float32)


def test_flags_say_why_a_pixel_does_not_count(tmp_path: Path) -> None:
    pixels = np.ones((2, 4, 6), np.float32)
    pixels[0, 0, 0], pixels[0, 0, 1], pixels[0, 0, 2], pixels[1, 0, 3] = -9999, np.nan, np.inf, -9999
    scene = scene_of(write_raster(tmp_path / "a.tif", pixels, north_up(), nodata=-9999))
    assert scene.read(scene.grid.full)[1][0].tolist() == [1, 2, 2, 1, 0, 0]
    nan = scene_of(write_raster(tmp_path / "nan.tif", pixels, north_up(), nodata=np.nan))
    assert nan.read(nan.grid.full)[1][0].tolist() == [0, 1, 2, 0, 0, 0]
    chosen = scene_of(tmp_path / "nan.tif", RasterSettings(nodata=1))
    assert chosen.read(chosen.grid.full)[1][0].tolist() == [1, 3, 3, 1, 1, 1]
    check_scene(nan)


def test_alpha_and_internal_masks_are_nodata_and_no_channel(tmp_path: Path) -> None:
    pixels = np.full((4, 8, 8), 200, np.uint8)
    pixels[3, :2] = 0
    photo = {"photometric": "RGB", "alpha": "yes", "nodata": 7}
    scene = scene_of(write_raster(tmp_path / "alpha.tif", pixels, north_up(), **photo))
    assert len(scene.channels) == 3
    np.testing.assert_array_equal(scene.read(scene.grid.full)[1] == Quality.NODATA, pixels[3] == 0)
    path = write_raster(tmp_path / "valid.tif", pixels[:1], north_up())
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as target:
        target.write_mask(pixels[3] > 0)
    scene = scene_of(path)
    assert not list(tmp_path.glob("*.msk"))
    np.testing.assert_array_equal(scene.read(scene.grid.full)[1] == Quality.NODATA, pixels[3] == 0)


def test_files_beside_a_raster_are_not_looked_at(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8), north_up())
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as target:
        target.write_mask(np.zeros((8, 8), bool))
    assert (tmp_path / "a.tif.msk").is_file()
    scene = scene_of(path)
    assert not scene.read(scene.grid.full)[1].any()


def test_types_are_kept_and_mixed_to_the_narrowest_that_holds_both(tmp_path: Path) -> None:
    paths = [write_raster(tmp_path / f"{t}.tif", np.full((1, 4, 4), 3, t), north_up()) for t in ("uint8", "int16", "float64")]
    bands = [band_of(path, path.stem) for path in paths]
    for used, dtype in ((bands[:1], "uint8"), (bands[:2], "int16"), (bands, "float32")):
        scene, _ = assemble("s", used)
        check_scene(scene)
        assert scene.dtype == dtype
    huge = scene_of(write_raster(tmp_path / "huge.tif", np.full((1, 2, 2), 1e300), north_up()))
    assert (huge.read(huge.grid.full)[1] == Quality.NOT_FINITE).all()


def test_names_and_radiometry(tmp_path: Path) -> None:
    pixels = np.ones((3, 4, 4), np.int16)
    bare = write_raster(tmp_path / "bare.tif", pixels, north_up())
    named = write_raster(tmp_path / "named.tif", pixels, north_up(), names=("VV", "VH", "DEM"))
    twice = write_raster(tmp_path / "twice.tif", pixels, north_up(), names=("bands", "bands", "bands"))
    with rasterio.open(named, "r+") as target:
        target.scales, target.offsets = (0.1, 0.1, 1), (0, -5, 0)
    abc = RasterSettings(bands=("a", "b", "c"))

    def names(path: Path, chosen: RasterSettings) -> list[str]:
        return [channel.name for channel in scene_of(path, chosen).channels]

    assert names(bare, NOTHING) == names(twice, NOTHING) == ["band_1", "band_2", "band_3"]
    assert names(bare, abc) == names(twice, abc) == ["a", "b", "c"]
    assert names(named, abc) == ["VV", "VH", "DEM"]
    assert reason_of(bare, RasterSettings(bands=tuple("abcd"))) == "it has 3 bands where reader.bands names 4 (a, b, c, d)"
    assert reason_of(bare, RasterSettings(bands=("a", "b"))) == "it has 3 bands where reader.bands names 2 (a, b)"
    assert [(c.scale, c.offset, c.resolution_m) for c in scene_of(named).channels] == [(0.1, 0, 10), (0.1, -5, 10), (1, 0, 10)]
    chosen = RasterSettings(radiometry=(Radiometry(match="nam*", scale=2, offset=1), Radiometry(match="*", scale=3)))
    assert {(c.scale, c.offset) for c in scene_of(named, chosen).channels} == {(2, 1)}
    assert {(c.scale, c.offset) for c in scene_of(bare, chosen).channels} == {(3, 0)}


def test_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="named twice: a"):
        RasterSettings(bands=("a", "b", "a"))
    with pytest.raises(ValidationError, match="Extra inputs"):
        RasterSettings.model_validate({"band": ["a"]})


def test_a_file_without_a_place_is_taken_unless_one_is_required(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", np.ones((1, 4, 4), np.uint8), None, None)
    scene = scene_of(path)
    assert (scene.grid.frame, scene.grid.unit, scene.grid.world((0, 1))) == ("", "index", (1.5, 0.5))
    assert "no CRS and affine" in reason_of(path, RasterSettings(require_georeference=True))


VRT = '<VRTDataset rasterXSize="2" rasterYSize="2"><VRTRasterBand dataType="Byte" band="1"/></VRTDataset>'


@pytest.mark.parametrize(
    ("content", "reason"),
    [(VRT, "it begins with b'<VRT', not like a TIFF"), ("hello", "b'hell'"), ("", "the file is empty"), ("II*\0 and no more", "TIFF")],
)
def test_what_is_no_raster_is_refused_whatever_its_name_says(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "a.tif"
    path.write_text(content)
    found = reason_of(path)
    assert found.startswith("not a readable GeoTIFF, COG or JPEG 2000 (")
    assert reason in found
    assert str(tmp_path) not in found


def test_a_cut_off_file_is_found_by_its_last_block(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 9, (1, 64, 64), np.uint8), north_up(), blockysize=8)
    path.write_bytes(path.read_bytes()[:-300])
    assert "not a readable" in reason_of(path)


@given(cut=st.floats(0, 1), places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_damage_ends_in_a_reason_and_never_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, cut: float, places: list[tuple[float, int]]
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = write_world(folder / "a.tif", (16, 16), compress="deflate")
    data = bytearray(path.read_bytes())
    for place, value in places:
        data[4 + int(place * (len(data) - 5))] = value
    path.write_bytes(data if places else data[: int(cut * len(data))])
    scenes, rejected = scan_rasters([path], folder, NOTHING)
    assert len(scenes) + len(rejected) == 1
    for scene in group_by_place(scenes):
        if scene.grid.space == (16, 16):
            try:
                scene.read(scene.grid.full)
            except SceneError as error:
                assert "cannot read" in str(error)  # noqa: PT017


def test_a_remote_path_is_not_opened() -> None:
    for path in ("/vsizip/a.zip/a.tif", "http://host/a.tif"):
        with pytest.raises(SceneError, match="not a path of the file system"):
            inspect(Path(path), "a.tif")


def pages(path: Path) -> Path:
    for i in range(2):
        write_raster(path, np.ones((1, 4, 4), np.uint8), north_up(), **({"APPEND_SUBDATASET": "YES"} if i else {}))
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (palette, "entries of a colour table"),
        (lambda path: write_raster(path, np.ones((1025, 1, 1), np.uint8), north_up()), "it has 1025 bands, more than 1024"),
        (pages, "it holds 2 images (pages)"),
        (lambda path: write_raster(path, np.ones((1, 4, 4), np.complex64), north_up()), "complex numbers (complex64)"),
        (lambda path: write_raster(path, np.ones((1, 4, 4), np.uint8), Affine(1e-20, 0, 0, 0, 1e-20, 0)), "does not span a plane"),
    ],
)
def test_rasters_that_are_no_image_are_refused(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    assert reason in reason_of(make(tmp_path / "a.tif"))


def test_a_bomb_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = {"count": 1, "dtype": "uint16", "SPARSE_OK": True, "crs": UTM, "transform": north_up()}
    path = tmp_path / "a.tif"
    with rasterio.open(path, "w", driver="GTiff", height=40_000, width=40_000, tiled=True, **sparse):
        pass
    assert "it declares 3.0 GiB of pixels in a file of" in reason_of(path)
    monkeypatch.setattr(raster_file, "MAX_BLOCK_BYTES", 100)
    assert "one block of it unpacks to 0.0 GiB" in reason_of(write_world(tmp_path / "b.tif", (8, 8)))


def test_names_are_unique_and_every_file_is_accounted_for(tmp_path: Path) -> None:
    write_world(tmp_path / "x" / "a.tif", (4, 4))
    write_world(tmp_path / "x" / "a.tiff", (4, 4))
    write_world(tmp_path / "b.TIF", (4, 4))
    (tmp_path / "c.tif").write_text("no")
    (tmp_path / "notes.txt").write_text("no")
    found = scan(tmp_path, RasterSettings())
    assert [scene.name for scene in found.scenes] == ["b", "x/a.tif", "x/a.tiff"]
    assert [item.file for item in found.rejected] == ["c.tif"]
    assert found.num_used + len(found.rejected) + len(found.ignored) == found.num_files == 5


def test_damage_after_cataloguing_is_a_scene_error(tmp_path: Path) -> None:
    path = write_world(tmp_path / "a.tif", (16, 16))
    scene = scene_of(path)
    write_world(path, (8, 8))
    with pytest.raises(SceneError, match=r"has changed since it was catalogued: 1 bands of \(8, 8\)"):
        scene.read(scene.grid.full)
    path.unlink()
    with pytest.raises(SceneError, match="cannot read"):
        scene.read(scene.grid.full)
    with pytest.raises(SceneError, match="whose geometry the labels of a take"):
        scene.write_labels(tmp_path / "out.tif", np.zeros((16, 16), np.uint8), 255)


def grouped(tmp_path: Path, **places: tuple[Affine, str | None, int]) -> dict[str, str]:
    for name, (affine, crs, size) in places.items():
        write_raster(tmp_path / f"{name}.tif", np.ones((1, size, size), np.uint8), affine, crs)
    scenes, _ = scan_rasters(sorted(tmp_path.glob("*.tif")), tmp_path, NOTHING)
    return {scene.name: scene.group for scene in group_by_place(scenes[::-1])}


def test_scenes_of_one_place_share_a_group_and_neighbours_do_not(tmp_path: Path) -> None:
    groups = grouped(
        tmp_path,
        a=(north_up(), UTM, 100),
        b=(north_up(x=500_500), UTM, 100),
        c=(north_up(x=501_490), UTM, 100),
        d=(north_up(x=502_480), UTM, 100),
        small=(north_up(x=502_600, y=4_999_900), UTM, 10),
        nowhere=(north_up(), None, 100),
        somewhere=(north_up(), None, 100),
    )
    assert groups == {"a": "a", "b": "a", "c": "c", "d": "d", "small": "d", "nowhere": "nowhere", "somewhere": "somewhere"}


def test_groups_of_degrees_reach_across_the_date_line(tmp_path: Path) -> None:
    east, west = (Affine(0.01, 0, x, 0, -0.01, 10) for x in (179.5, -179.8))
    assert grouped(tmp_path, e=(east, "EPSG:4326", 100), w=(west, "EPSG:4326", 100)) == {"e": "e", "w": "e"}


@pytest.mark.parametrize("turn", [-720.0, -360.0, 0.0, 360.0])
def test_degrees_beyond_a_turn_are_the_same_ground(tmp_path: Path, turn: float) -> None:
    """Some count on past the date line, some back before it."""
    one, other = (Affine(0.01, 0, x, 0, -0.01, 10) for x in (179.5, 179.7 + turn))
    assert grouped(tmp_path, e=(one, "EPSG:4326", 100), w=(other, "EPSG:4326", 100)) == {"e": "e", "w": "e"}
    zero, around = (Affine(0.01, 0, x, 0, -0.01, 10) for x in (-0.5, -0.3 + turn))
    assert set(grouped(tmp_path / "zero", e=(zero, "EPSG:4326", 100), w=(around, "EPSG:4326", 100)).values()) == {"e"}


def test_groups_reach_across_crs_and_date_line(tmp_path: Path) -> None:
    groups = grouped(
        tmp_path,
        a=(north_up(), UTM, 100),
        degrees=(Affine(0.0001, 0, 15.0, 0, -0.0001, 45.153), "EPSG:4326", 100),
        east=(Affine(0.01, 0, 179.5, 0, -0.01, 10), "EPSG:4326", 100),
        west=(Affine(0.01, 0, -179.8, 0, -0.01, 10), "EPSG:4326", 100),
        fiji=(Affine(1000, 0, 800_000, 0, -1000, 1_100_000), "EPSG:32660", 100),
    )
    assert groups == {"a": "a", "degrees": "a", "east": "east", "west": "east", "fiji": "east"}


REAL = {
    "rasterio": (6, {"corrupt.tif": "TIFFReadEncodedTile() failed"}),
    "stars": (3, {"lc.tif": "colour table"}),
    "rio_tiler": (4, {"cog_cmap.tif": "colour table"}),
    "sentinelhub_jp2": (3, {}),
}
REAL_FLAGS = {
    "RGB.byte": 185533,
    "all-nodata": 2475 * 71,
    "float_nan": 1,
    "float_raster_with_nodata": 58,
    "na": 1,
    "inverted_lat": 360 * 720,
    "cog_nodata_nan": 154_081 + 4,
    "cog_scale": 6,
    "rotated": 0,
    "geomatrix": 0,
    "L7_ETMs": 0,
}


@cache
def scanned(root: Path) -> Catalogue:
    return scan(root, NOTHING)


@pytest.mark.parametrize("folder", REAL)
def test_real_odd_rasters(folder: str) -> None:
    root = DATA / "odd" / folder
    if not root.is_dir():
        pytest.skip(f"real files are not at {root}")
    found = scanned(root)
    count, reasons = REAL[folder]
    assert len(found.scenes) == count
    assert [Path(item.file).name for item in found.rejected] == sorted(reasons)
    assert all(reasons[Path(item.file).name] in item.reason for item in found.rejected)
    for scene in found.scenes:
        if scene.grid.space[0] < 1500 and scene.files[0].suffix != ".jp2":
            check_scene(scene)
        name = Path(scene.name).name
        if name in REAL_FLAGS:
            assert np.count_nonzero(scene.read(scene.grid.full)[1]) == REAL_FLAGS[name]


def test_real_geometry() -> None:
    root = DATA / "odd"
    if not root.is_dir():
        pytest.skip(f"real files are not at {root}")
    scenes = {Path(s.name).name: s for folder in REAL for s in scanned(root / folder).scenes}
    np.testing.assert_allclose(scenes["rotated"].grid.matrix[:2, :2], [[5, 17.320508], [-8.660254, 10]], rtol=1e-6)
    assert (scenes["cog_gcps"].grid.frame, scenes["rotated"].grid.frame, scenes["img-16bit"].grid.frame) == ("", "", "")
    assert scenes["inverted_lat"].grid.world((0, 0)) == (-179.75, -89.75)
    assert [(c.scale, c.offset) for c in scenes["cog_scale"].channels] == [(1e-4, 1000), (1e-3, 2000)]
    assert (scenes["img-15bit"].grid.frame, scenes["img-15bit"].dtype) == ("EPSG:32631", np.uint16)
    assert scenes["float_raster_with_nodata"].grid.frame.startswith("PROJCS[")
