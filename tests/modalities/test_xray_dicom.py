"""X-ray pictures in DICOM: inversion, rescale, window, spacing, padding; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
