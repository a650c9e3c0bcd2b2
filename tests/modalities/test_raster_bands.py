"""Rasters whose bands and times settings describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pydantic import ValidationError

from modalities.quality import Quality
from modalities.raster import Radiometry, RasterSettings
from modalities.raster_bands import DescribedBand, TimeSource
from modalities.scene import Channel
from tests.synthetic_rasters import check_scene, north_up, reason_of, scene_of, write_raster

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def three(path: Path, names: tuple[str, ...] = ()) -> Path:
    """Bands of 1, 2 and 3, pixel 0 of each being 9."""
    pixels = np.arange(1, 4, dtype=np.uint8)[:, None, None] * np.ones((3, 4, 4), np.uint8)
    pixels[:, 0, 0] = 9
    return write_raster(path, pixels, north_up(), names=names)


def described(*bands: dict[str, Any] | str, **rest: Any) -> RasterSettings:
    return RasterSettings.model_validate({"bands": list(bands), **rest})


def test_everything_that_is_said_of_a_band_is_in_its_channel(tmp_path: Path) -> None:
    path = three(tmp_path / "a.tif")
    said = {"name": "ETM_B4", "position": 3, "wavelength_nm": 835, "resolution_m": 30, "unit": "reflectance", "level": "C2L1"}
    scene = scene_of(path, described({**said, "scale": 0.004, "offset": -0.1}, {"name": "DEM", "position": 1, "unit": "m"}))
    check_scene(scene)
    assert scene.channels == (
        Channel("ETM_B4", 835, 30, 0.004, -0.1, "reflectance", "C2L1"),
        Channel("DEM", None, 10, unit="m"),
    )
    assert scene.read(scene.grid.full)[0][:, 1, 1].tolist() == [3, 1], "the order of the settings, band 2 left out"


def test_nodata_and_saturation_of_one_band(tmp_path: Path) -> None:
    path = three(tmp_path / "a.tif")
    for word, bit in (("nodata", Quality.NODATA), ("saturated", Quality.SATURATED)):
        scene = scene_of(path, described({"name": "a", word: 9}, "b", "c"))
        quality = scene.read(scene.grid.full)[1]
        assert quality[0, 0] == bit
        assert np.count_nonzero(quality) == 1
    one = scene_of(path, described({"name": "a", "nodata": 1}, "b", "c", nodata=9))
    assert np.count_nonzero(one.read(one.grid.full)[1]) == 16, "its own word counts before the file's"


def test_bands_are_found_by_description_by_name_and_by_place(tmp_path: Path) -> None:
    path = three(tmp_path / "a.tif", names=("VV", "VH", "angle"))

    def values(*bands: dict[str, Any] | str) -> list[int]:
        scene = scene_of(path, described(*bands))
        return scene.read(scene.grid.full)[0][:, 1, 1].tolist()

    assert values({"name": "VH", "unit": "dB"}, {"name": "VV", "unit": "dB"}) == [2, 1], "by its own name"
    assert values({"name": "incidence", "description": "angle"}) == [3]
    bare = three(tmp_path / "b.tif")
    scene = scene_of(bare, described({"name": "x", "unit": "m"}, "y", "z"))
    assert [channel.name for channel in scene.channels] == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("bands", "reason"),
    [
        ([{"name": "x", "description": "HH"}], "none of its bands is described as 'HH'; they are described as: a, a, b"),
        ([{"name": "a", "unit": "m"}], "2 of its bands are described as 'a'; give a a position in reader.bands"),
        ([{"name": "x", "position": 4}], "it has 3 bands, so x cannot be the one at position 4"),
        ([{"name": "x", "unit": "m"}], "it has 3 bands where reader.bands names 1 (x); give x a position"),
        ([{"name": "b"}, {"name": "x", "position": 3}], "reader.bands means its band 3 more than once"),
    ],
)
def test_a_file_without_the_bands_that_are_wanted_is_refused(tmp_path: Path, bands: list[dict[str, Any]], reason: str) -> None:
    assert reason in reason_of(three(tmp_path / "a.tif", names=("a", "a", "b")), described(*bands))


@pytest.mark.parametrize(
    ("bands", "reason"),
    [
        (["a", {"name": "a"}], "a band can be named once only, named twice: a"),
        ([{"name": "a", "position": 1}, {"name": "b", "position": 1}], "a position can be named once only, named twice: 1"),
        ([{"name": "a", "scale": 0}], "the scale of a is 0"),
        ([{"name": "a", "position": 1, "description": "x"}], "by its position or by its description, not by both"),
        ([{"name": "a", "position": 0}], "greater than or equal to 1"),
        ([{"name": "a", "wavelength": 490}], "Extra inputs"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(bands: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        described(*bands)


def test_who_is_believed_about_scale_and_offset(tmp_path: Path) -> None:
    path = three(tmp_path / "a.tif")
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = (2, 2, 2), (5, 5, 5)
    bands: tuple[str | DescribedBand, ...] = (DescribedBand(name="a", scale=7), DescribedBand(name="b", offset=1), "c")
    first = scene_of(path, RasterSettings(bands=bands))
    assert [(c.scale, c.offset) for c in first.channels] == [(7, 5), (2, 1), (2, 5)], "the entry, then the file's tags"
    chosen = RasterSettings(bands=bands, radiometry=(Radiometry(match="*.tif", scale=3),))
    assert {(c.scale, c.offset) for c in scene_of(path, chosen).channels} == {(3, 0)}, "a glob before both"


def test_a_time_from_the_path(tmp_path: Path) -> None:
    path = three(tmp_path / "S1_20200607T010800_a.tif")
    time = {"pattern": r"_(\d{8}T\d{6})_"}
    assert scene_of(path, RasterSettings.model_validate({"time": time})).times == ("2020-06-07T01:08:00Z",)
    day = {"pattern": r"_(\d{8})T", "format": "%Y%m%d"}
    assert scene_of(path, RasterSettings.model_validate({"time": day})).times == ("2020-06-07T00:00:00Z",)
    assert scene_of(path).times == ()
    missing = {"pattern": r"-(\d{4})-"}
    assert r"the pattern -(\d{4})- of reader.time is not in it; set reader.time.required=false" in reason_of(
        path, RasterSettings.model_validate({"time": missing})
    )
    assert scene_of(path, RasterSettings.model_validate({"time": {**missing, "required": False}})).times == ()
    wrong = {"pattern": r"_(\d{8})T", "format": "%d%m%Y"}
    assert "gives '20200607', which is no time of the form %d%m%Y" in reason_of(path, RasterSettings.model_validate({"time": wrong}))


def test_a_time_from_a_tag(tmp_path: Path) -> None:
    path = three(tmp_path / "a.tif")
    with rasterio.open(path, "r+") as target:
        target.update_tags(TIFFTAG_DATETIME="2019:04:16 10:00:31", acquired="2019-04-16T12:00:31+02:00")
        target.update_tags(ns="IMAGERY", ACQUISITIONDATETIME="2019-04-16 11:00:31")
    for tag, hour in (("TIFFTAG_DATETIME", 10), ("acquired", 10), ("ACQUISITIONDATETIME", 11)):
        scene = scene_of(path, RasterSettings(time=TimeSource(tag=tag)))
        assert scene.times == (f"2019-04-16T{hour}:00:31Z",)
    assert "the tag TIME of reader.time is not in it" in reason_of(path, RasterSettings(time=TimeSource(tag="TIME")))


@pytest.mark.parametrize(
    ("time", "reason"),
    [
        ({}, "either pattern"),
        ({"pattern": "(a)", "tag": "b"}, "either pattern"),
        ({"pattern": "a"}, "has 0 groups"),
        ({"pattern": "("}, "no regular expression"),
    ],
)
def test_a_source_of_times_that_is_none_is_refused(time: dict[str, str], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TimeSource.model_validate(time)


ETM = {"B1": 485, "B2": 560, "B3": 660, "B4": 835, "B5": 1650, "B7": 2220}


def test_real_etm_chip_with_described_bands() -> None:
    path = DATA / "odd" / "stars" / "L7_ETMs.tif"
    if not path.is_file():
        pytest.skip(f"real files are not at {path.parent}")
    bands = [{"name": f"ETM_{name}", "wavelength_nm": length, "resolution_m": 30, "saturated": 255} for name, length in ETM.items()]
    scene = scene_of(path, described(*bands))
    assert [(channel.name, channel.wavelength_nm) for channel in scene.channels] == [
        (f"ETM_{name}", length) for name, length in ETM.items()
    ]
    pixels, quality = scene.read(scene.grid.full)
    assert set(np.unique(quality)) == {0, Quality.SATURATED}
    np.testing.assert_array_equal(quality > 0, (pixels == 255).any(axis=0))
