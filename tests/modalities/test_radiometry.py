from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modalities.radiometry import BORDER, ENOUGH, Sample, judge, look, summarise
from modalities.raster_file import BandFile
from modalities.sentinel2_bands import BANDS
from tests.synthetic_products import reflectance
from tests.synthetic_rasters import band_of, north_up, write_raster

SURFACE = [name for name in BANDS if name != "B10"]


def samples_of(level: str, added: int = 0, names: list[str] | None = None) -> dict[str, Sample]:
    numbers = {name: np.rint(reflectance(name, level) * 1e4 + added).astype(np.uint16).ravel() for name in names or BANDS}
    return {name: summarise(values) for name, values in numbers.items() if level == "L1C" or name != "B10"}


def flat(low: float, median: float | None = None, high: float | None = None) -> Sample:
    return Sample(10_000, low, low, median or low, high or median or low, 0.15, 1000)


def written(tmp_path: Path, bands: dict[str, NDArray[np.uint16]]) -> list[BandFile]:
    return [
        replace(band_of(write_raster(tmp_path / f"{name}.tif", values[None], north_up()), name), nodata=0.0)
        for name, values in bands.items()
    ]


@pytest.mark.parametrize("level", ["L1C", "L2A"])
@pytest.mark.parametrize(("added", "answer"), [(0, "no"), (1000, "yes")])
def test_the_same_ground_with_and_without_a_thousand(level: str, added: int, answer: str) -> None:
    assert judge(samples_of(level, added), level).plus_1000 == answer
    assert judge(samples_of(level, added), "").plus_1000 == answer
    without_sixty = [name for name in SURFACE if name not in ("B01", "B09")]
    assert judge(samples_of(level, added, without_sixty), level).plus_1000 == answer


@given(st.floats(1500, 9000), st.sampled_from(["L2A", ""]))
def test_nothing_dark_in_sight_tells_nothing(brightness: float, level: str) -> None:
    assert judge({name: flat(brightness) for name in SURFACE}, level).plus_1000 == "unknown"


@given(st.lists(st.floats(0, 20_000), min_size=12, max_size=12), st.sampled_from(["L1C", "L2A", ""]))
def test_one_answer_excludes_the_other(lows: list[float], level: str) -> None:
    """An image that says no with 1000 taken off says no again; one that says yes never has a band below the floor."""
    image = {name: flat(low) for name, low in zip(SURFACE, lows, strict=True)}
    verdict = judge(image, level)
    if verdict.plus_1000 == "yes":
        assert min(sample.low for name, sample in image.items() if level == "L1C" or name != "B09") >= 900
    darker = {name: replace(flat(max(low - 1000, 0)), sixteen_bits=0.1) for name, low in zip(SURFACE, lows, strict=True)}
    if verdict.plus_1000 == "no" and not judge(darker, level).wrong_scale:
        assert judge(darker, level).plus_1000 == "no"


def test_what_a_few_pixels_and_b09_say_is_not_enough() -> None:
    over_water = {name: flat(1005) for name in SURFACE} | {"B09": flat(500, 800)}
    assert judge(over_water, "L2A").plus_1000 == "yes"
    in_shadow = over_water | {"B02": flat(590, 1300)}
    assert judge(in_shadow, "L2A").plus_1000 == "unknown"
    assert judge(in_shadow | {"B03": flat(590, 1300)}, "L2A").plus_1000 == "no"
    assert judge({}, "L2A").plus_1000 == "unknown"
    assert judge({"B09": flat(100)}, "L2A").plus_1000 == "unknown"


def test_air_alone_is_brighter_than_that() -> None:
    """A field without shadow at the top of the atmosphere: near 1000 in blue without anything added."""
    field = {"B02": flat(1020), "B03": flat(930), "B04": flat(935), "B08": flat(1230), "B11": flat(2270), "B12": flat(1270)}
    assert judge(field, "L1C").plus_1000 == "no"
    assert judge(field, "").plus_1000 == "unknown"
    assert judge(field | {"B10": flat(10)}, "").plus_1000 == "no"
    desert = {"B02": flat(1400), "B03": flat(2000), "B04": flat(3000), "B08": flat(3500), "B12": flat(4000)}
    assert judge(desert, "L2A").plus_1000 == "unknown"
    assert judge(desert | {"B10": flat(1010)}, "L1C").plus_1000 == "yes"


def test_numbers_on_another_scale_are_told_with_the_remedy() -> None:
    numbers = {
        name: (reflectance(name, "L2A") + 0.001 * np.random.default_rng(0).random(reflectance(name, "L2A").shape)) for name in SURFACE
    }
    numbers["B08"][96:] *= 2.2
    for values, words in (
        (
            {name: np.rint(v * 1e3) for name, v in numbers.items()},
            "probably reflectance · 1000; say reader.layouts=[{match: …, scale: 0.001",
        ),
        (
            {name: np.rint(np.rint(v * 1e4) * 6.5535) for name, v in numbers.items()},
            "reflectance · 65535; say reader.layouts=[{match: …, scale: 1.5259",
        ),
    ):
        stored = {name: v.astype(np.uint16) for name, v in values.items()}
        assert words in judge({name: summarise(v.ravel()) for name, v in stored.items()}).wrong_scale, words
    floats = {name: summarise(v.astype(np.float32).ravel()) for name, v in numbers.items()}
    assert (
        "its numbers are reflectance itself, not · 10000; say reader.layouts=[{match: …, scale: 1, offset: 0}]" in judge(floats).wrong_scale
    )
    picture = {name: summarise((v * 255).astype(np.uint8).ravel()) for name, v in numbers.items()}
    assert "its numbers are of 8 bits, a picture" in judge(picture).wrong_scale
    assert "brighter than snow" in judge({name: flat(16_500) for name in SURFACE}).wrong_scale
    infrared = {"B02": flat(4000), "B04": flat(5000), "B08": flat(14_000)}
    assert "cloud or snow it is not" in judge(infrared).wrong_scale
    assert not judge({"B02": flat(9000), "B04": flat(9500), "B08": flat(11_500)}).wrong_scale
    for added in (0, 1000):
        for level in ("L1C", "L2A"):
            assert not judge(samples_of(level, added), level).wrong_scale


def test_a_band_darker_than_b10_is_another_order() -> None:
    right = samples_of("L1C")
    assert not judge(right).wrong_order
    names = [*(name for name in BANDS if name != "B8A"), "B8A"]
    assert "the bands are in another order" in judge(dict(zip(names, right.values(), strict=True))).wrong_order
    cirrus = {name: flat(sample.low + 1500) for name, sample in right.items()}
    assert not judge(cirrus).wrong_order


def test_nodata_and_what_resampling_mixed_with_it_are_not_looked_at(tmp_path: Path) -> None:
    values = np.full((60, 60), 2000, np.uint16)
    values[:, :20] = 0
    values[:, 20 : 20 + BORDER] = 300
    found = look(written(tmp_path, {"B02": values, "B03": np.zeros((60, 60), np.uint16)}))
    assert list(found) == ["B02"]
    assert (found["B02"].lowest, found["B02"].count) == (2000, 60 * (40 - BORDER))
    few = np.zeros((60, 60), np.uint16)
    few[:16, : ENOUGH // 16] = 1
    assert look(written(tmp_path, {"B04": few})) == {}


def test_a_large_image_is_looked_at_in_parts_and_a_broken_band_says_nothing(tmp_path: Path) -> None:
    values = np.full((1200, 900), 2000, np.uint16)
    values[600:640, 450:490] = 5
    bands = written(tmp_path, {"B02": values, "B03": values})
    bands[1].path.write_bytes(bands[1].path.read_bytes()[:4000])
    found = look(bands)
    assert list(found) == ["B02"]
    assert found["B02"].count == 9 * 192 * 192
    assert found["B02"].lowest == 5
