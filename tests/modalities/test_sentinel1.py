"""Radar in dB, whatever the files hold; and what they hold is never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from modalities.quality import Quality
from modalities.sentinel1 import Sentinel1Scene, Sentinel1Settings, polarisation, scan_sentinel1, to_db
from tests.synthetic_rasters import check_scene, north_up, write_raster

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "satellite"
PRODUCT = "S1A_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904_03CFBA_D457"
POWER = Sentinel1Settings(unit="power")


def found_in(folder: Path, chosen: Sentinel1Settings | None = None) -> tuple[list[Sentinel1Scene], dict[str, str]]:
    files = sorted(folder.rglob("*.tif*"))
    scenes, rejected = scan_sentinel1(files, folder, chosen or Sentinel1Settings())
    assert sum(len(scene.files) for scene in scenes) + len(rejected) == len(files)
    return scenes, {item.file: item.reason for item in rejected}


def backscatter(num_bands: int = 2, size: int = 24) -> NDArray[np.float32]:
    """Power of a plausible image, a third lower in each further band."""
    drawn = np.random.default_rng(5).gamma(4, 0.02, (num_bands, size, size))
    return (drawn / 3 ** np.arange(num_bands)[:, None, None]).astype(np.float32)


def decibels(values: Any) -> Any:
    return (10 * np.log10(values)).astype(np.float32)


def save(path: Path, values: Any, **profile: Any) -> Path:
    return write_raster(path, values if values.ndim == 3 else values[None], north_up(), **profile)


def save_pair(folder: Path, values: Any, stem: str = "{}.tif") -> None:
    for name, plane in zip(("VV", "VH"), values, strict=True):
        save(folder / stem.format(name), plane)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("VV", ("VV", "")),
        ("S1A_IW_GRDH_1SDV_20170613T165043_33UUP_70_48_VH", ("VH", "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_70_48")),
        ("iw-hh.rtc", ("HH", "iw.rtc")),
        ("Sigma0_VV_db", ("VV", "Sigma0_db")),
        ("survey", None),
        ("B04", None),
    ],
)
def test_polarisations_in_names(text: str, found: tuple[str, str] | None) -> None:
    assert polarisation(text) == found


@given(power=st.floats(1e-4, 10), floor=st.floats(-49, -41))
def test_power_and_amplitude_are_the_same_backscatter(power: float, floor: float) -> None:
    values = np.array([power, 0.0, -1e-3])
    by_power = to_db(values, "power", floor)
    np.testing.assert_allclose(by_power[1:], floor)
    np.testing.assert_allclose(by_power[0], 10 * np.log10(power))
    np.testing.assert_allclose(to_db(np.sqrt(np.maximum(values, 0)), "amplitude", floor), by_power)
    np.testing.assert_array_equal(to_db(by_power, "dB", floor), by_power)


@pytest.mark.parametrize("stored", ["dB", "power", "amplitude"])
def test_two_files_become_one_scene_in_decibels(tmp_path: Path, stored: str) -> None:
    power = backscatter()
    save_pair(tmp_path / PRODUCT, {"dB": decibels(power), "power": power, "amplitude": np.sqrt(power)}[stored])
    chosen = Sentinel1Settings() if stored == "dB" else Sentinel1Settings.model_validate({"unit": stored})
    (scene,), rejected = found_in(tmp_path, chosen)
    assert rejected == {}
    check_scene(scene)
    assert (scene.name, scene.times) == (PRODUCT, ("2020-06-07T01:08:00Z",))
    told = [(channel.name, channel.unit, channel.level, channel.scale, channel.offset) for channel in scene.channels]
    assert told == [(name, "dB", "GRD", 1.0, 0.0) for name in ("VV", "VH")]
    pixels, quality = scene.read(scene.grid.full)
    np.testing.assert_allclose(np.asarray(pixels, np.float32)[:, quality == 0], decibels(power)[:, quality == 0], atol=1e-4)
    assert (quality == 0).mean() > 0.95
    assert scene.dtype == np.float32


def test_linear_numbers_are_refused_until_their_unit_is_said(tmp_path: Path) -> None:
    save_pair(tmp_path, backscatter())
    scenes, rejected = found_in(tmp_path)
    assert scenes == []
    assert "nothing says what its numbers are (median 0.0" in rejected["VV.tif"]
    assert "set reader.unit to power, amplitude or dB" in rejected["VV.tif"]


@pytest.mark.parametrize(
    ("stored", "said", "reason"),
    [
        (decibels(backscatter()), "power", "of its values are below zero"),
        (backscatter(), "dB", "no value is below zero"),
        (backscatter() * 1e6, "amplitude", "its median is 9"),
        (decibels(backscatter()) * 100, "dB", "its median is -1"),
    ],
)
def test_a_unit_that_the_numbers_contradict_is_refused(tmp_path: Path, stored: Any, said: str, reason: str) -> None:
    save_pair(tmp_path, stored.astype(np.float32))
    scenes, rejected = found_in(tmp_path, Sentinel1Settings.model_validate({"unit": said}))
    assert scenes == []
    assert reason in rejected["VV.tif"]
    assert "reader.unit says so" in rejected["VV.tif"]


def test_a_description_says_the_unit_and_the_order(tmp_path: Path) -> None:
    power = backscatter()
    save(tmp_path / "scene.tif", power, names=("Gamma0_VH_power", "Gamma0_VV_power"))
    (scene,), _ = found_in(tmp_path)
    assert [channel.name for channel in scene.channels] == ["VV", "VH"]
    pixels, _ = scene.read(scene.grid.full)
    np.testing.assert_allclose(pixels, decibels(power)[::-1], atol=1e-4)
    assert scene.evidence == "the file's name or description says so"


def test_bands_without_names_are_named_or_refused(tmp_path: Path) -> None:
    save(tmp_path / "S1RTC" / "chip.tif", decibels(backscatter()))
    scenes, rejected = found_in(tmp_path)
    assert scenes == []
    assert rejected == {"S1RTC/chip.tif": "its 2 bands do not say their polarisations: name them with reader.bands, such as [VV, VH]"}
    (scene,), _ = found_in(tmp_path, Sentinel1Settings(bands=("VH", "VV"), channels=("VV",)))
    assert [(channel.name, channel.level) for channel in scene.channels] == [("VV", "RTC")]
    np.testing.assert_array_equal(scene.read(scene.grid.full)[0][0], decibels(backscatter())[1])
    _, rejected = found_in(tmp_path, Sentinel1Settings(bands=("VV",)))
    assert "it has 2 bands where reader.bands names 1 (VV)" in rejected["S1RTC/chip.tif"]


def test_nothing_is_flagged_whatever_stands_for_it(tmp_path: Path) -> None:
    values = decibels(backscatter())
    values[0, 2, 3], values[1, 4, 5], values[0, 6, 7], values[1, 8, 9] = 0, -32768, np.nan, -9999
    save_pair(tmp_path / "RTC", values)
    for path in (tmp_path / "RTC").iterdir():
        with rasterio.open(path, "r+") as file:
            file.nodata = -9999
    (scene,), _ = found_in(tmp_path)
    check_scene(scene)
    _, quality = scene.read(scene.grid.full)
    flagged = {(int(row), int(column)): Quality(int(quality[row, column])) for row, column in np.argwhere(quality)}
    nothing = Quality.NODATA
    assert flagged == {(2, 3): nothing, (4, 5): nothing, (6, 7): Quality.NOT_FINITE, (8, 9): nothing}


def test_the_noise_at_a_border_is_flagged_in_like_polarisations_of_grd_only(tmp_path: Path) -> None:
    values = decibels(backscatter())
    values[0, :, 0], values[1, :, 1] = -41, -41
    for folder in (PRODUCT, "RTC"):
        save_pair(tmp_path / folder, values)
    for chosen, flagged in ((Sentinel1Settings(), 24), (Sentinel1Settings(border_noise_db=None), 0)):
        by_name = {scene.name: scene for scene in found_in(tmp_path, chosen)[0]}
        quality = by_name[PRODUCT].read(by_name[PRODUCT].grid.full)[1]
        assert (np.count_nonzero(quality), np.count_nonzero(quality[:, 0])) == (flagged, flagged)
        assert set(quality[quality > 0]) <= {int(Quality.OUTSIDE)}
        assert not by_name["RTC"].read(by_name["RTC"].grid.full)[1].any()


def test_what_does_not_go_together_is_left_out_with_a_reason(tmp_path: Path) -> None:
    power = backscatter()
    save(tmp_path / "a" / "VV.tif", decibels(power[0]))
    save(tmp_path / "a" / "VH_power.tif", power[1])
    save(tmp_path / "b" / "VV.tif", decibels(power[0]))
    save(tmp_path / "b" / "VH.tif", decibels(power[1, :12]))
    save(tmp_path / "c" / "s1a-iw-grd-vv-20200607t010800-20200607t010825-032904-03cfba-001.tiff", power[0])
    save(tmp_path / "d" / "VV.tif", np.zeros((8, 8), np.float32))
    scenes, rejected = found_in(tmp_path)
    assert [(scene.name, len(scene.channels)) for scene in scenes] == [("a", 1), ("a/power", 1), ("b", 1)]
    assert rejected["b/VH.tif"] == "it does not lie on the grid of VV.tif; warp it to that grid"
    assert "not calibrated" in rejected["c/s1a-iw-grd-vv-20200607t010800-20200607t010825-032904-03cfba-001.tiff"]
    assert rejected["d/VV.tif"] == "nothing but nodata was found in it"
    scenes, rejected = found_in(tmp_path, Sentinel1Settings(channels=("VH",), min_channels=1))
    assert rejected["a/VV.tif"] == "polarisation VV is not among the wanted channels"
    scenes, rejected = found_in(tmp_path, Sentinel1Settings(min_channels=2))
    assert scenes == []
    assert rejected["a/VV.tif"] == "its scene has 1 of the wanted channels (VV), reader.min_channels is 2"


def test_settings() -> None:
    for wrong in ({"channels": ["VV", "VV"]}, {"channels": ["XX"]}, {"unit": "linear"}, {"floor_db": 3.0}):
        with pytest.raises(ValidationError):
            Sentinel1Settings.model_validate(wrong)


@pytest.mark.skipif(not DATA.is_dir(), reason="real files at ../shared/data are missing")
def test_real_chips(tmp_path: Path) -> None:
    scenes, rejected = found_in(DATA / "ssl4eo_s12_0000200" / "SSL4EO-S12" / "s1")
    assert rejected == {}
    assert [scene.times for scene in scenes] == [("2020-06-07T01:08:00Z",), ("2020-09-03T13:12:12Z",)]
    for scene in scenes:
        check_scene(scene)
        pixels, quality = scene.read(scene.grid.full)
        assert not quality.any()
        assert pixels[0].mean() > pixels[1].mean() + 5, "VV is stronger than VH"
    scenes, rejected = found_in(DATA / "terramind_examples" / "S1RTC", Sentinel1Settings(bands=("VV", "VH"), level="RTC"))
    assert rejected == {}
    assert [scene.times[0][:10] for scene in scenes] == ["2021-07-21", "2023-06-10", "2020-04-11"]
    for scene in scenes:
        pixels, _ = scene.read(scene.grid.full)
        assert pixels[0].mean() > pixels[1].mean() + 4, "VV comes first"
        grid = scene.grid
        scene.write_labels(tmp_path / "labels.tif", np.ones(grid.space, np.uint8), 0)
        assert (scene.open_labels(tmp_path / "labels.tif").read(grid.full) == 1).all()
