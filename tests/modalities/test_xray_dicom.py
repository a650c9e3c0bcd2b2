"""X-ray pictures in DICOM: inversion, rescale, window, spacing, padding; and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence as DicomSequence

from modalities.dicom_grey import Window
from modalities.medical import XraySettings
from modalities.quality import Quality
from modalities.xray import XrayScene
from modalities.xray_scan import scan_xrays
from tests.synthetic_dicom import dicom_image, save
from tests.synthetic_pictures import shades


def scene_of(path: Path, **settings: Any) -> XrayScene:
    (scene,) = scan_xrays([path], path.parent, XraySettings(**settings)).scenes
    return scene


def fed(scene: XrayScene) -> np.ndarray[Any, Any]:
    pixels, _ = scene.read(scene.grid.full)
    return np.asarray(pixels[0] * scene.channels[0].scale + scene.channels[0].offset)


@pytest.mark.parametrize("intensity", ["zscore", "percentile"])
def test_the_same_picture_is_fed_the_same_whichever_way_its_grey_values_run(tmp_path: Path, intensity: str) -> None:
    values = shades()
    plain = save(dicom_image(values, Modality="DX"), tmp_path / "one")
    inverted = save(
        dicom_image((4095 - values).astype(np.uint16), Modality="CR", PhotometricInterpretation="MONOCHROME1"), tmp_path / "two"
    )
    one, two = scene_of(plain, intensity=intensity), scene_of(inverted, intensity=intensity)
    assert two.dtype == np.uint16
    assert fed(one) == pytest.approx(fed(two), abs=1e-6)
    assert np.corrcoef(fed(two).ravel(), values.ravel())[0, 1] > 0.99


def test_the_display_window_cuts_only_where_it_is_asked_for(tmp_path: Path) -> None:
    tags = {"RescaleSlope": "2", "RescaleIntercept": "-100", "WindowCenter": "3600.5", "WindowWidth": "801"}
    path = save(dicom_image(shades(), Modality="DX", **tags), tmp_path / "a.dcm")
    assert np.array_equal(scene_of(path).read((slice(0, 24), slice(0, 20)))[0][0], shades())
    cut = scene_of(path, voi="window")
    pixels, _ = cut.read(cut.grid.full)
    assert np.array_equal(pixels[0], shades().clip(1650, 2050)), "3200 and 4000 as stored"


def test_pixels_have_the_size_that_the_header_says_row_first(tmp_path: Path) -> None:
    both = {"PixelSpacing": ["0.2", "0.1"], "ImagerPixelSpacing": ["0.25", "0.125"]}
    scene = scene_of(save(dicom_image(shades(), Modality="CR", **both), tmp_path / "a"))
    assert (scene.grid.unit, scene.grid.spacing) == ("mm", pytest.approx((0.2, 0.1)))
    del both["PixelSpacing"]
    at_detector = save(dicom_image(shades(), Modality="CR", **both), tmp_path / "b")
    assert scene_of(at_detector).grid.spacing == pytest.approx((0.25, 0.125))
    coarse = scene_of(at_detector, spacing_mm=(0.5, 0.25))
    assert coarse.grid.space == (12, 10)
    labels = np.full(coarse.grid.space, 3, np.uint8)
    coarse.write_labels(tmp_path / "out.png", labels, 0)
    assert coarse.open_labels(tmp_path / "out.png").respacing.source == (24, 20)


def test_padding_is_out_of_view_and_in_no_statistic(tmp_path: Path) -> None:
    values = shades()
    values[8:12, 8:12] = 9999
    path = save(dicom_image(values, Modality="DX", PixelPaddingValue=9999), tmp_path / "a")
    scene = scene_of(path)
    _, quality = scene.read(scene.grid.full)
    assert np.array_equal(quality == Quality.OUTSIDE, values == 9999)
    assert fed(scene)[quality == 0].std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"Modality": "MR"}, "other_modality"),
        ({"BurnedInAnnotation": "YES"}, "burned_in"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"RescaleSlope": "0"}, "damaged_header"),
        ({"NumberOfFrames": 2, "Rows": 12}, "several_frames"),
    ],
)
def test_what_is_no_x_ray_picture_to_be_used_is_refused_with_a_code(tmp_path: Path, tags: dict[str, Any], code: str) -> None:
    path = save(dicom_image(shades(), **({"Modality": "DX"} | tags)), tmp_path / "Surname.dcm")
    found = scan_xrays([path], tmp_path, XraySettings())
    (rejected,) = found.rejected
    assert not found.scenes
    assert rejected.code == code
    assert rejected.unwanted == (code == "other_modality")
    assert "Surname" not in repr(found)
    if code == "burned_in":
        assert scan_xrays([path], tmp_path, XraySettings(burned_in="use")).scenes


def table(values: np.ndarray[Any, Any], first: int, bits: int = 16) -> DicomSequence:
    """A sequence of one lookup table."""
    item = Dataset()
    item.LUTDescriptor = [len(values) % 65536, first, bits]
    item.add_new("LUTData", "US", [int(value) for value in values])
    return DicomSequence([item])


CURVE = np.round(4095 * np.linspace(0, 1, 1200) ** 0.4).astype(np.uint16)
"""Entries of a table that is no straight line."""
GIVEN: dict[str, dict[str, Any]] = {
    "rescale": {"RescaleSlope": "1.5", "RescaleIntercept": "-100"},
    "modality LUT": {"ModalityLUTSequence": table(CURVE, 1100)},
    "eight bits": {"ModalityLUTSequence": table(CURVE // 16, 1100, 8)},
}
SHOWN: dict[str, dict[str, Any]] = {
    "LINEAR": {"WindowCenter": "1800.5", "WindowWidth": "801"},
    "LINEAR_EXACT": {"WindowCenter": "1800", "WindowWidth": "900", "VOILUTFunction": "LINEAR_EXACT"},
    "SIGMOID": {"WindowCenter": ["1800", "7"], "WindowWidth": ["700", "9"], "VOILUTFunction": "SIGMOID"},
    "VOI LUT": {"VOILUTSequence": table(CURVE[:900], 1300, 12)},
    "both": {"VOILUTSequence": table(CURVE[:900], 1300, 12), "WindowCenter": "1800.5", "WindowWidth": "801"},
}


@pytest.mark.parametrize("given", GIVEN)
def test_what_stored_values_stand_for_is_what_pydicom_makes_of_them(tmp_path: Path, given: str) -> None:
    dataset = dicom_image(shades(), Modality="DX", **GIVEN[given])
    scene = scene_of(save(dataset, tmp_path / "a"))
    pixels, _ = scene.read(scene.grid.full)
    wanted = apply_modality_lut(shades(), dataset)
    slope, intercept = (1.5, -100) if given == "rescale" else (1, 0)
    assert np.array_equal(pixels[0] * slope + intercept, wanted)


@pytest.mark.parametrize("voi", ["window", "lut"])
@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("given", ["rescale", "modality LUT"])
def test_what_is_shown_is_what_pydicom_shows(tmp_path: Path, given: str, shown: str, voi: str) -> None:
    dataset = dicom_image(shades(), Modality="DX", **GIVEN[given], **SHOWN[shown])
    meant = apply_modality_lut(shades(), dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a VOI LUT over a slope that is no whole number
        wanted = apply_voi_lut(meant, dataset, prefer_lut=voi == "lut").astype(float)
    scene = scene_of(save(dataset, tmp_path / "a"), voi=voi)
    pixels, _ = scene.read(scene.grid.full)
    values = pixels[0].astype(float)
    if shown == "VOI LUT" or (shown == "both" and voi == "lut"):
        assert np.array_equal(values, wanted)
        return
    bottom, top = (-100, 1.5 * 65535 - 100) if given == "rescale" else (0, 65535)
    if shown == "SIGMOID":
        assert pixels.dtype == np.float32
        assert values * (top - bottom) + bottom == pytest.approx(wanted, rel=1e-6, abs=0.02)
        return
    low, high = (1350, 2250) if shown == "LINEAR_EXACT" else (1400, 2200)
    slope, intercept = (1.5, -100) if given == "rescale" else (1, 0)
    share = (values * slope + intercept - low) / (high - low)
    assert share * (top - bottom) + bottom == pytest.approx(wanted, abs=(top - bottom) / (high - low) * slope)
    assert np.ptp(values) < np.ptp(meant / slope), "it was cut"


def test_monochrome1_and_an_inverse_presentation_turn_once_and_last(tmp_path: Path) -> None:
    look = {**SHOWN["VOI LUT"], "Modality": "DX"}
    plain = scene_of(save(dicom_image(shades(), **look), tmp_path / "plain"), voi="lut")
    both = {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}
    for name, tags in {
        "both": both,
        "one": {"PhotometricInterpretation": "MONOCHROME1"},
        "other": {"PresentationLUTShape": "INVERSE"},
    }.items():
        turned = scene_of(save(dicom_image(shades(), **look, **tags), tmp_path / name), voi="lut")
        assert np.array_equal(turned.read(turned.grid.full)[0], plain.read(plain.grid.full)[0]), "turned when it is fed, not before"
        assert fed(turned) == pytest.approx(-fed(plain), abs=1e-6)


def test_padding_is_told_by_stored_values_whatever_they_stand_for(tmp_path: Path) -> None:
    values = shades()
    values[8:12, 8:12] = 1150
    values[3, 3] = 1100
    path = save(dicom_image(values, Modality="DX", PixelPaddingValue=1150, **GIVEN["modality LUT"]), tmp_path / "a")
    scene = scene_of(path, voi="lut")
    assert np.array_equal(scene.read(scene.grid.full)[1] == Quality.OUTSIDE, values == 1150)


@pytest.mark.parametrize(
    ("tags", "voi", "code"),
    [
        ({"ModalityLUTSequence": table(CURVE, 0, 8)}, "none", "damaged_header"),
        ({"VOILUTSequence": table(CURVE, 0, 8)}, "lut", "damaged_header"),
        ({"VOILUTSequence": table(CURVE, 0, 8)}, "none", ""),
        ({"WindowCenter": "5", "WindowWidth": "9", "VOILUTFunction": "CURVED"}, "window", "damaged_header"),
        ({"WindowCenter": "5", "WindowWidth": "9", "VOILUTFunction": "CURVED"}, "none", ""),
    ],
)
def test_a_damaged_table_or_window_is_refused_where_it_is_needed(tmp_path: Path, tags: dict[str, Any], voi: Any, code: str) -> None:
    path = save(dicom_image(shades(), Modality="DX", **tags), tmp_path / "a")
    found = scan_xrays([path], tmp_path, XraySettings(voi=voi))
    assert [item.code for item in found.rejected] == ([code] if code else [])


@pytest.mark.parametrize("shown", ["LINEAR", "LINEAR_EXACT"])
def test_the_ends_of_a_window_are_those_between_which_pydicom_draws_a_line(shown: str) -> None:
    values = np.arange(1200, 2400, 0.125)
    dataset = dicom_image(shades(), **SHOWN[shown])
    center, width = float(SHOWN[shown]["WindowCenter"]), float(SHOWN[shown]["WindowWidth"])
    low, high = Window(center, width, shown).ends
    share = np.clip((values - low) / (high - low), 0, 1)
    assert share * 65535 == pytest.approx(apply_voi_lut(values, dataset), abs=1e-6)
