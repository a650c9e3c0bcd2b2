"""Dates of one place become one scene with an axis of time; what has no place in a series is told."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modalities.catalogue import Catalogue, scan
from modalities.scene import SceneError
from modalities.sentinel1 import Sentinel1Settings
from modalities.series import SeriesScene, SeriesSettings, most_frequent
from tests.synthetic_rasters import north_up, world_values, write_raster

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "satellite"
SPACE = (16, 20)


def radar_of(**changes: Any) -> SeriesSettings:
    return SeriesSettings.model_validate({"dates": 2, "of": {"kind": "sentinel1", "unit": "dB"}, **changes})


def product(day: int, hour: int = 1) -> str:
    return f"S1A_IW_GRDH_1SDV_202006{day:02d}T{hour:02d}0800_202006{day:02d}T{hour:02d}0825_032904_03CFBA_D457"


def save(folder: Path, day: int, *, shift: float = 0.0, hour: int = 1, names: tuple[str, ...] = ("VV", "VH")) -> None:
    """Values that fall with the day, the band and the place in the world."""
    affine = north_up(x=500_000 + shift)
    for band, name in enumerate(names):
        values = -(world_values(affine, SPACE, band) / 100 + day).astype(np.float32)
        write_raster(folder / product(day, hour) / f"{name}.tif", values[None], affine)


def check_counts(catalogue: Catalogue) -> None:
    assert catalogue.num_used + len(catalogue.rejected) + len(catalogue.ignored) == catalogue.num_files
    assert catalogue.readers.keys() == {scene.name for scene in catalogue.scenes}


def test_dates_are_stacked_in_order_of_time_whatever_their_names(tmp_path: Path) -> None:
    for day in (9, 3):
        save(tmp_path / f"folder{9 - day}", day)
    catalogue = scan(tmp_path, radar_of())
    check_counts(catalogue)
    (scene,) = catalogue.scenes
    assert isinstance(scene, SeriesScene)
    assert scene.times == ("2020-06-03T01:08:00Z", "2020-06-09T01:08:00Z")
    assert scene.grid.space == (2, *SPACE)
    assert scene.block[0] == 1
    pixels, quality = scene.read(scene.grid.full)
    assert not quality.any()
    for place, day in enumerate((3, 9)):
        for band in (0, 1):
            np.testing.assert_allclose(pixels[band, place], -(world_values(north_up(), SPACE, band) / 100 + day), rtol=1e-5)
    window = (slice(1, 2), slice(3, 9), slice(2, 4))
    assert np.array_equal(scene.read(window)[0], pixels[:, 1:2, 3:9, 2:4])
    assert scene.grid.window(window).world((0, 0, 0)) == scene.grid.world((1, 3, 2))
    assert scene.grid.world((1, 0, 0)) == (1.0, *scene.images[0].grid.world((0, 0)))
    assert pickle.loads(pickle.dumps(scene)) == scene
    with pytest.raises(SceneError, match=r"leaves .* which has 2 × 16 × 20 dates, rows and columns"):
        scene.read((slice(0, 3), slice(0, 1), slice(0, 1)))


@pytest.mark.parametrize(("least", "lengths", "left"), [(None, [2, 2], 2), (2, [2, 2], 2)])
def test_runs_of_dates_and_what_is_left_over(tmp_path: Path, least: int | None, lengths: list[int], left: int) -> None:
    for day in range(1, 6):
        save(tmp_path, day)
    catalogue = scan(tmp_path, radar_of(min_dates=least))
    check_counts(catalogue)
    assert [scene.grid.space[0] for scene in catalogue.scenes] == lengths
    assert [item.file for item in catalogue.rejected] == [f"{product(5)}/{name}.tif" for name in ("VH", "VV")][:left]
    assert catalogue.rejected[0].reason == (
        "its place has 5 dates with these channels on this lattice, 1 of which are left over from series of 2, where a series needs 2"
    )


def test_a_shorter_series_where_that_is_allowed(tmp_path: Path) -> None:
    for day in range(1, 6):
        save(tmp_path, day)
    assert [len(scene.times) for scene in scan(tmp_path, radar_of(dates=3, min_dates=2)).scenes] == [3, 2]


def test_what_is_not_alike_is_not_stacked(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 2, hour=1, names=("HH",))
    save(tmp_path, 3, shift=5)
    save(tmp_path / "again", 2)
    save(tmp_path, 4, names=("VV",))
    write_raster(tmp_path / "VV.tif", -world_values(north_up(), SPACE).astype(np.float32)[None] / 100, north_up())
    catalogue = scan(tmp_path, radar_of(of={"kind": "sentinel1", "unit": "dB", "channels": ["VV", "VH"]}))
    check_counts(catalogue)
    assert [scene.times[1][:10] for scene in catalogue.scenes] == ["2020-06-02"]
    reasons = {item.file: item.reason for item in catalogue.rejected}
    assert reasons["VV.tif"] == "when it was acquired is not known, so it has no place in a series"
    assert reasons[f"{product(3)}/VV.tif"] == (
        "its place has 1 dates with these channels on this lattice, where a series needs 2; 3 more images of it lie on another lattice: "
        "warp them to one"
    )
    twice = {reason for file, reason in reasons.items() if product(2) in file and "same place at the same time" in reason}
    assert len(twice) == 1
    assert reasons[f"{product(4)}/VV.tif"].startswith("its place has 1 dates with these channels")


def test_dates_of_different_offset_are_brought_to_physical_values(tmp_path: Path) -> None:
    folder = tmp_path
    stored = np.arange(320, dtype=np.uint16).reshape(1, *SPACE) + 2000
    for day, more in ((1, 0), (2, 1000)):
        name = f"S2A_MSIL2A_202006{day:02d}T032739_N0400_R018_T33TWM_202006{day:02d}T064303"
        write_raster(folder / name / "B02.tif", stored + more, north_up())
    of = {"kind": "sentinel2", "channels": ["B02"], "radiometry": [{"match": "*20200602T032739*", "scale": 1e-4, "offset": -0.1}]}
    images = sorted(scan(folder, SeriesSettings.model_validate({"dates": 2, "of": of}).of).scenes, key=lambda scene: scene.name)
    scene = SeriesScene("x", "x", tuple(images))  # type: ignore[arg-type]
    assert [(channel.scale, channel.offset) for channel in images[1].channels] == [(1e-4, -0.1)]
    assert scene.dtype == np.float32
    assert [(channel.scale, channel.offset) for channel in scene.channels] == [(1.0, 0.0)]
    pixels, _ = scene.read(scene.grid.full)
    np.testing.assert_allclose(pixels[0, 0], pixels[0, 1], rtol=1e-6)
    np.testing.assert_allclose(pixels[0, 0], stored[0] * 1e-4, rtol=1e-6)
    same = SeriesScene("x", "x", (images[0], images[0]))  # type: ignore[arg-type]
    assert same.dtype == np.uint16
    assert same.read(same.grid.full)[0].dtype == np.uint16


def test_labels_are_of_the_place(tmp_path: Path) -> None:
    for day in (1, 2):
        save(tmp_path, day)
    (scene,) = scan(tmp_path, radar_of()).scenes
    drawn = np.random.default_rng(0).integers(1, 4, scene.grid.space).astype(np.uint8)
    scene.write_labels(tmp_path / "labels.tif", drawn, 0)
    read = scene.open_labels(tmp_path / "labels.tif").read((slice(0, 2), slice(2, 9), slice(1, 5)))
    assert np.array_equal(read[0], drawn.min(axis=0)[2:9, 1:5]), "two dates that differ are equally many: the lower number"
    assert np.array_equal(read[0], read[1])
    with pytest.raises(SceneError, match=r"must be uint8 of shape \(2, 16, 20\)"):
        scene.write_labels(tmp_path / "labels.tif", drawn[:1], 0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_the_class_of_most_dates(values: list[int]) -> None:
    best = int(most_frequent(np.array(values, np.uint8)[:, None, None], 0)[0, 0])
    classes = [value for value in values if value]
    assert best == (min(set(classes), key=lambda value: (-classes.count(value), value)) if classes else 0)


def test_settings() -> None:
    mixed = SeriesSettings.model_validate({"dates": 2, "of": {"sentinel1": {"unit": "power"}}}).of
    assert (mixed.kind, mixed.sentinel1.unit if mixed.kind == "satellite" else "") == ("satellite", "power")
    for wrong in ({}, {"dates": 1}, {"dates": 2, "min_dates": 3}, {"dates": 2, "of": {"kind": "mri"}}):
        with pytest.raises(ValidationError):
            SeriesSettings.model_validate(wrong)


@pytest.mark.skipif(not DATA.is_dir(), reason="real files at ../shared/data are missing")
def test_real_dates() -> None:
    catalogue = scan(DATA / "ssl4eo_s12_0000200" / "SSL4EO-S12" / "s1", SeriesSettings(dates=2, of=Sentinel1Settings()))
    check_counts(catalogue)
    (scene,) = catalogue.scenes
    assert scene.times == ("2020-06-07T01:08:00Z", "2020-09-03T13:12:12Z")
    assert scene.grid.space == (2, 264, 264)
    pixels, quality = scene.read(scene.grid.full)
    assert not quality.any()
    assert -20 < pixels[0].mean() < -5
