"""Channels are found by name first and by wavelength where that is asked for; other units do not pass, and honest scenes do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core.bands import Band, BandError, BandSettings, Matching, bands_of, differences_of, match_bands, strange_values

SENTINEL = {"B02": 492.4, "B03": 559.8, "B04": 664.6, "B08": 832.8, "B8A": 864.7, "B11": 1613.7, "B12": 2202.4}
LANDSAT = {"OLI_B2": 482.0, "OLI_B3": 561.4, "OLI_B4": 654.6, "OLI_B5": 864.7, "OLI_B6": 1608.9, "OLI_B7": 2200.7}
NEAR = BandSettings(match="wavelength")
MODEL = tuple(Band(name, wave, "reflectance", ("L2A",)) for name, wave in SENTINEL.items())
OTHER = tuple(Band(name, wave, "reflectance") for name, wave in LANDSAT.items())


def fed(*bands: str, **values: tuple[float, float]) -> tuple[Matching, dict[str, tuple[float, float]]]:
    """Channels of a model and of the data alike, without units, and the data's values."""
    both = tuple(Band(name) for name in bands or tuple(values))
    return match_bands(both, both, BandSettings()), values


def test_a_store_says_what_its_bands_are_and_what_it_does_not_say_is_unknown() -> None:
    said = {"name": "B05", "wavelength_nm": 704.1, "unit": "reflectance", "level": "L2A", "footprint": 2, "resolution_m": 20.0}
    assert bands_of([said, {"name": "A"}]) == (Band("B05", 704.1, "reflectance", ("L2A",), 2), Band("A"))
    assert bands_of([{"name": "A", "level": "L1C", "levels": ["L1C", "L2A"]}])[0].levels == ("L1C", "L2A")


def test_by_name_alone_nothing_else_is_fed() -> None:
    data = (Band("B04", 660.0), Band("nir", 864.7), Band("B02", 490.0))
    found = match_bands(MODEL, data, BandSettings())
    assert found.columns == (2, -1, 0, -1, -1, -1, -1)
    assert found.unknown == ("nir",)
    assert found.absent == ("B03", "B08", "B8A", "B11", "B12")
    assert found.names == ("B04", "nir", "B02")
    assert ["B08", "absent", "not in the sum"] in found.table()
    assert found.table()[-1] == ["none", "nir", "not known to the model, not fed"]


def test_by_wavelength_the_nearest_pair_goes_first_and_no_channel_is_fed_twice() -> None:
    found = match_bands(MODEL, OTHER, NEAR)
    assert {one.name: two.name for one, two in found.pairs} == {
        "B02": "OLI_B2",
        "B03": "OLI_B3",
        "B04": "OLI_B4",
        "B8A": "OLI_B5",  # 864.7 is B8A; B08, 32 nm away, stays absent
        "B11": "OLI_B6",
        "B12": "OLI_B7",
    }
    assert found.absent == ("B08",)
    assert match_bands(MODEL, OTHER, BandSettings(match="wavelength", max_distance_nm=40)) == found, "OLI_B5 is taken"
    assert ["B02", "OLI_B2", "482 nm for 492.4 nm"] in found.table()
    assert found.names == ("B02", "B03", "B04", "B8A", "B11", "B12")
    assert match_bands(MODEL, OTHER, BandSettings(match="wavelength", max_distance_nm=1)).columns.count(-1) == 6


def test_a_name_goes_before_a_nearer_wavelength() -> None:
    data = (Band("x", 492.4), Band("B02", 480.0))
    assert match_bands(MODEL, data, NEAR).columns[0] == 1


def test_what_has_no_wavelength_is_not_matched_by_it() -> None:
    with pytest.raises(BandError, match=r"\['VV'\] and the model knows \['VH'\]: none in common; .* or raise bands\.max_distance_nm"):
        match_bands([Band("VH")], [Band("VV")], NEAR)
    with pytest.raises(BandError, match=r"none in common; name them alike in the reader's settings, or set bands\.match=wavelength"):
        match_bands(MODEL, OTHER, BandSettings())


@given(st.permutations(OTHER), st.permutations(MODEL))
def test_the_order_of_channels_decides_nothing(data: list[Band], model: list[Band]) -> None:
    wanted = {one.name: two.name for one, two in match_bands(MODEL, OTHER, NEAR).pairs}
    found = match_bands(model, data, NEAR)
    assert {one.name: two.name for one, two in found.pairs} == wanted
    assert sorted(column for column in found.columns if column >= 0) == sorted(set(found.columns) - {-1}), "no place twice"


def test_units_levels_and_resolutions_that_differ_are_told_and_unknown_ones_are_not() -> None:
    one = Band("B05", None, "reflectance", ("L2A",), 2)
    other = Band("B05", None, "DN", ("L1C",), 1)
    assert differences_of(match_bands([one], [other], BandSettings())) == [
        "channel B05 is in DN here, and the model was trained on reflectance",
        "channel B05 is of level L1C here, and the model was trained on L2A",
        "channel B05 has a measurement in every 1 voxels along an axis here, and the model was trained with 2",
    ]
    unknown = Band("B05", None, "", (), 2)
    assert differences_of(match_bands([one], [unknown], BandSettings())) == []
    assert differences_of(match_bands([unknown], [one], BandSettings())) == []
    both = Band("B05", None, "reflectance", ("L1C", "L2A"), 2)
    assert differences_of(match_bands([both], [one], BandSettings())) == []
    assert "L1C" in differences_of(match_bands([one], [both], BandSettings()))[0], "a level that the model has not seen"


@pytest.mark.parametrize(
    ("middle", "spread", "mean", "std"),
    [(1500.0, 800.0, 0.15, 0.08), (60.0, 30.0, 0.15, 0.08), (-12.0, 4.0, 0.1, 0.15), (300.0, 200.0, 0.0, 1.0), (16.0, 9.0, 0.16, 0.09)],
    ids=["integers", "8 bits", "dB for power", "MRI as stored", "percent"],
)
def test_values_on_another_scale_are_far_even_where_units_are_said_to_be_the_same(
    middle: float, spread: float, mean: float, std: float
) -> None:
    matching, values = fed(B04=(middle, spread))
    far, _ = strange_values(matching, values, [mean], [std])
    assert far == [f"channel B04 has values of {middle:.4g} ± {spread:.2g} here, and the model was trained on {mean:.4g} ± {std:.2g}"]
    same = match_bands([Band("B04", unit="reflectance")], [Band("B04", unit="reflectance")], BandSettings())
    assert strange_values(same, values, [mean], [std])[0] == far


def test_reflectance_for_integers_is_narrow() -> None:
    matching, values = fed(B04=(0.15, 0.08), B08=(0.25, 0.1))
    assert len(strange_values(matching, values, [1500.0, 2500.0], [800.0, 900.0])[1]) == 2


@pytest.mark.parametrize(
    ("middle", "spread", "mean", "std"),
    [(0.85, 0.05, 0.1, 0.08), (0.02, 0.002, 0.25, 0.1), (0.0, 0.0, 0.1, 0.08), (-22.0, 1.5, -11.0, 4.0), (0.6, 0.02, 0.15, 0.08)],
    ids=["snow", "open water", "constant", "calm sea in dB", "cloud"],
)
def test_honest_scenes_pass(middle: float, spread: float, mean: float, std: float) -> None:
    matching, values = fed(B04=(middle, spread))
    assert strange_values(matching, values, [mean], [std]) == ([], [])


def test_one_narrow_channel_among_several_is_a_flat_scene_and_known_units_may_be_narrow() -> None:
    matching, values = fed(A=(0.1, 1e-5), B=(0.1, 0.05), C=(0.1, 0.05))
    assert strange_values(matching, values, [0.1] * 3, [0.08] * 3) == ([], [])
    metres = match_bands([Band("DEM", unit="m")], [Band("DEM", unit="m")], BandSettings())
    assert strange_values(metres, {"DEM": (3.0, 0.5)}, [600.0], [800.0]) == ([], [])


def test_channels_without_a_value_are_not_judged() -> None:
    matching, _ = fed("A", "B")
    assert strange_values(matching, {"B": (math.pi, 1.0)}, [0.0, 3.0], [1.0, 1.0]) == ([], [])
