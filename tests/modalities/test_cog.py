"""What is written is a valid COG with names, colours and place, whole or absent, and is gone on with after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.transform import Affine
from rio_cogeo import cog_validate

from modalities import cog
from modalities.cog import (
    BLOCK,
    CACHE_BYTES,
    DIGEST_TAG,
    PALETTE,
    Layout,
    RasterBand,
    RasterWriter,
    count_values,
    little_cache,
    made_from,
    palette,
    write_raster,
)
from modalities.raster_file import quiet
from modalities.scene import SceneError
from tests.synthetic_rasters import UTM, north_up

CLASSES = ((1, "water & <ice>"), (5, "forest"), (7, "Öde"))
COLOURS = ((0, 0, 255), (0, 128, 0), (200, 200, 100))


def of_classes(space: tuple[int, int], **change: Any) -> Layout:
    place = {"crs": UTM, "transform": north_up()}
    given: dict[str, Any] = {"classes": CLASSES, "colours": COLOURS, "tags": {DIGEST_TAG: "made so", "TIFFTAG_SOFTWARE": "terravox"}}
    return Layout(space, place, (RasterBand("class"),), "uint8", 255, "nearest", **{**given, **change})


def numbers(space: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).choice(np.array([1, 5, 7, 255], np.uint8), (1, *space))


@pytest.mark.parametrize("space", [(1100, 700), (20, 30), (512, 513)])
@pytest.mark.parametrize("compress", ["deflate", "zstd"])
def test_a_map_of_classes_is_a_valid_cog_with_names_and_colours(tmp_path: Path, space: tuple[int, int], compress: str) -> None:
    path, values = tmp_path / "map.tif", numbers(space)
    write_raster(path, of_classes(space, compress=compress), values)
    assert cog_validate(path, strict=True) == (True, [], [])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map.tif", "map.tif.aux.xml"]
    with rasterio.open(path) as found:
        np.testing.assert_array_equal(found.read(), values)
        assert (found.crs.to_string(), found.transform, found.nodata) == (UTM, north_up(), 255)
        assert (found.descriptions, found.block_shapes, found.compression.name) == (("class",), [(BLOCK, BLOCK)], compress)
        assert [found.colormap(1)[value][:3] for value, _ in CLASSES] == list(COLOURS)
        assert found.tags()[DIGEST_TAG] == made_from(path) == "made so"
        assert found.tags()["TIFFTAG_SOFTWARE"] == "terravox"
        levels = found.overviews(1)
        assert bool(levels) == (max(space) > BLOCK)
    for level in range(len(levels)):
        with rasterio.open(path, overview_level=level) as small:
            assert set(np.unique(small.read())) <= {1, 5, 7, 255}, "no class is made up between two others"
    assert count_values(path) == {int(value): int((values == value).sum()) for value in np.unique(values)}


def test_numbers_without_a_colour_table_are_not_averaged_either(tmp_path: Path) -> None:
    """GDAL leaves what has a colour table unaveraged of itself; this has none."""
    values = numbers((1024, 600))
    write_raster(tmp_path / "map.tif", of_classes((1024, 600), classes=(), colours=()), values)
    with rasterio.open(tmp_path / "map.tif", overview_level=0) as small:
        blocks = values[0].reshape(512, 2, 300, 2)
        assert (blocks == small.read(1)[:, None, :, None]).any(axis=(1, 3)).all(), "each is one of the four below it"


def test_gdal_finds_the_names_of_the_classes(tmp_path: Path) -> None:
    """A VRT tells what GDAL knows of a file, which rasterio does not ask for."""
    write_raster(tmp_path / "map.tif", of_classes((20, 30)), numbers((20, 30)))
    rasterio.shutil.copy(tmp_path / "map.tif", tmp_path / "map.vrt", driver="VRT")
    told = (tmp_path / "map.vrt").read_text(encoding="utf-8")
    names = [line.strip() for line in told.splitlines() if "Category>" in line]
    filled = {1: "water &amp; &lt;ice&gt;", 5: "forest", 7: "Öde"}
    assert names == [f"<Category>{filled.get(value, '')}</Category>" for value in range(8)]
    assert "<F>7</F>" in told
    assert told.count("<F>200</F>") == 2


def test_measurements_keep_scale_unit_and_nodata_and_overviews_are_means(tmp_path: Path) -> None:
    space, path = (1024, 1024), tmp_path / "values.tif"
    values = np.random.default_rng(0).normal(1, 0.2, (2, *space)).astype(np.float32)
    values[:, :100] = np.nan
    bands = (RasterBand("B04", 0.0001, -0.1, "reflectance"), RasterBand("B08"))
    write_raster(path, Layout(space, {"crs": UTM, "transform": north_up()}, bands, "float32", np.nan, "average"), values)
    assert cog_validate(path, strict=True) == (True, [], [])
    assert [file.name for file in tmp_path.iterdir()] == ["values.tif"]
    with rasterio.open(path) as found:
        np.testing.assert_array_equal(found.read(), values)
        assert (found.scales, found.offsets) == ((0.0001, 1.0), (-0.1, 0.0))
        assert (found.descriptions, found.units) == (("B04", "B08"), ("reflectance", None))
        assert np.isnan(found.nodata)
    with rasterio.open(path, overview_level=0) as small:
        wanted = values[:, 100:].reshape(2, 462, 2, 512, 2).mean(axis=(2, 4))
        np.testing.assert_allclose(small.read()[:, 50:], wanted, rtol=1e-5)


def test_what_has_no_place_is_written_without_one(tmp_path: Path) -> None:
    path = tmp_path / "map.tif"
    write_raster(path, of_classes((20, 30), colours=()), numbers((20, 30)))
    with rasterio.open(path) as found:
        assert found.colormap(1)[5][:3] == PALETTE[1]
    layout = Layout((20, 30), {}, (RasterBand("class"),), "uint8", 255, "nearest")
    write_raster(path, layout, numbers((20, 30)))
    with quiet():
        assert cog_validate(path, strict=True) == (True, [], [])
        with rasterio.open(path) as found:
            assert (found.crs, found.transform) == (None, Affine.identity())
    assert [file.name for file in tmp_path.iterdir()] == ["map.tif"], "the side file of the old map is gone"


def rows_of(writer: RasterWriter, values: np.ndarray, start: int, stop: int, step: int = 100) -> None:
    """Rows handed over by hundreds."""
    for first in range(start, stop, step):
        last = min(first + step, stop)
        writer.write((slice(first, last), slice(0, values.shape[2])), values[:, first:last])


@pytest.mark.parametrize("reached", [0, 100, 511, 600, 1100])
def test_rows_that_were_on_disk_are_kept_after_a_kill(tmp_path: Path, reached: int) -> None:
    space, path = (1100, 300), tmp_path / "map.tif"
    values, layout = numbers(space), of_classes(space)
    killed = RasterWriter(path, layout, "key")
    rows_of(killed, values, 0, reached)
    killed.close()
    assert not path.exists()
    after = RasterWriter(path, layout, "key")
    assert after.position == ((300, 0) if reached == 1100 else (0, reached // BLOCK * BLOCK))
    if after.position[0] == 0:
        rows_of(after, values, after.position[1], 1100)
    after.finish()
    write_raster(tmp_path / "whole.tif", layout, values)
    assert path.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_what_has_no_key_never_goes_on_with_what_a_kill_left(tmp_path: Path) -> None:
    """The rows would be written anew, but under the nodata value, names and place of what was left."""
    space, path = (20, 30), tmp_path / "map.tif"
    killed = RasterWriter(path, of_classes(space, tags={"TERRAVOX_RUN": "old"}), "")
    killed._lock.close()
    layout = replace(of_classes(space, tags={"TERRAVOX_RUN": "new"}), nodata=0, bands=(RasterBand("kind"),))
    write_raster(path, layout, numbers(space))
    with rasterio.open(path) as found:
        assert (found.nodata, found.descriptions, found.tags()["TERRAVOX_RUN"]) == (0, ("kind",), "new")


def test_another_key_or_a_damaged_note_begins_anew(tmp_path: Path) -> None:
    space, path = (1100, 300), tmp_path / "map.tif"
    values, layout = numbers(space), of_classes(space)

    def interrupted() -> Path:
        writer = RasterWriter(path, layout, "key")
        writer.go_to(0, 0)
        rows_of(writer, values, 0, 1100)
        writer.close()
        return writer.folder

    def begins_at(key: str, layout: Layout) -> tuple[int, int]:
        writer = RasterWriter(path, layout, key)
        writer.close()
        return writer.position

    interrupted()
    assert begins_at("key", layout) == (300, 0)
    assert begins_at("other", layout) == (0, 0)
    (interrupted() / "progress.json").write_text('{"key": ')
    assert begins_at("key", layout) == (0, 0)
    (interrupted() / "rows.tif").write_bytes(b"II*\0")
    assert begins_at("key", layout) == (0, 0)


def test_strips_side_by_side_make_the_whole(tmp_path: Path) -> None:
    space = (700, 1300)
    values, layout = numbers(space), of_classes(space)
    writer = RasterWriter(tmp_path / "map.tif", layout, "key")
    for columns in (slice(0, 512), slice(512, 1024), slice(1024, 1300)):
        for rows in (slice(0, 333), slice(333, 700)):
            assert writer.position[0] == columns.start
            writer.write((rows, columns), values[:, rows, columns])
    writer.finish()
    with rasterio.open(tmp_path / "map.tif") as found:
        np.testing.assert_array_equal(found.read(), values)


def test_rows_out_of_order_are_refused(tmp_path: Path) -> None:
    writer = RasterWriter(tmp_path / "map.tif", of_classes((700, 30)), "key")
    with pytest.raises(ValueError, match="rows 5 of column 0 do not follow row 0 of 0"):
        writer.write((slice(5, 9), slice(0, 30)), numbers((4, 30)))
    with pytest.raises(ValueError, match="cannot go on at row 512"):
        writer.go_to(0, 512)
    writer.close()


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    first = RasterWriter(tmp_path / "map.tif", of_classes((20, 30)), "key")
    with pytest.raises(SceneError, match=r"map\.tif is being written by another process"):
        RasterWriter(tmp_path / "map.tif", of_classes((20, 30)), "key")
    first.close()


def test_a_failure_leaves_the_old_file_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.tif"
    write_raster(path, of_classes((20, 30)), numbers((20, 30)))
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cog.rasterio.shutil, "copy", full)
    with pytest.raises(SceneError, match=r"cannot write .*map\.tif: .*No space left.*free some space and run again"):
        write_raster(path, of_classes((20, 30)), 0 * numbers((20, 30)))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map.tif", "map.tif.aux.xml"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SceneError, match=r"cannot write .*deep\.tif"):
        write_raster(tmp_path / "file" / "deep.tif", of_classes((20, 30)), numbers((20, 30)))


def test_colours_never_repeat() -> None:
    many = palette(60)
    assert many[: len(PALETTE)] == PALETTE
    assert len(set(many)) == 60
    assert all(0 <= part <= 255 for colour in many for part in colour)


def test_the_cache_is_bounded_meanwhile() -> None:
    with rasterio.Env() as outside, little_cache():
        assert rasterio.env.getenv()["GDAL_CACHEMAX"] == CACHE_BYTES
        assert outside is not None
