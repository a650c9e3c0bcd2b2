"""CT in Hounsfield units: exact values, the window, what the scanner did not see, air; and scans of another modality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modalities.catalogue import scan
from modalities.hounsfield import ct_body, hounsfield
from modalities.medical import CtSettings, MriSettings
from modalities.quality import Quality
from modalities.volume_scan import scan_volumes
from tests.synthetic_volumes import REAL, head, save_volume, texture

NATIVE_CT = CtSettings(spacing_mm=None)


def chest(size: int = 32) -> NDArray[np.int16]:
    """Tissue in air with two lungs that end where the volume ends, a thin table below, and -2000 beyond the scanner's circle."""
    x, y, _ = np.indices((size, size, 12))
    middle = (size - 1) / 2
    rng = np.random.default_rng(0)
    values = rng.normal(-1000, 8, x.shape)
    values[np.hypot(x - middle, (y - middle) * 1.4) < size * 0.35] = 40
    for side in (-1, 1):
        values[np.hypot(x - middle - side * size * 0.16, y - middle) < size * 0.11] = -820
    values[size // 4 : size // 2, 5, :2] = 100
    values[np.hypot(x - middle, y - middle) > size * 0.5] = -2000
    return np.asarray(values.round().astype(np.int16))


@given(st.integers(-3000, 3000), st.integers(1, 3), st.integers(-1024, 0))
def test_whole_numbers_stay_exact_in_16_bits(value: int, slope: int, intercept: int) -> None:
    for dtype in (np.int16, np.int32, np.float32):
        found = hounsfield(np.array([value, 7], dtype), slope, intercept)
        assert found.dtype == np.int16
        assert found.tolist() == [value * slope + intercept, 7 * slope + intercept]
    assert hounsfield(np.array([value], np.int16), slope, intercept + 0.25).dtype == np.float32


def test_values_come_in_hu_cut_to_the_window(tmp_path: Path) -> None:
    stored = (chest().astype(np.int32) + 1024).clip(0, 4095).astype(np.uint16)
    path = save_volume(tmp_path / "chest_ct.nii.gz", stored, scl_slope=1, scl_inter=-1024)
    catalogue = scan(path, CtSettings(spacing_mm=None, window_hu=(-900, 30)))
    (scene,) = catalogue.scenes
    (channel,) = scene.channels
    assert (channel.name, channel.scale, channel.offset, channel.unit) == ("CT", 1.0, 0.0, "HU")
    values, _ = scene.read(scene.grid.full)
    assert values.dtype == scene.dtype == np.int16
    assert np.array_equal(values[0], (stored.astype(int) - 1024).clip(-900, 30))
    assert any("cut to -900…30" in note for note in catalogue.notes)


def test_what_the_scanner_did_not_see_is_out_of_view_and_mixes_with_nothing(tmp_path: Path) -> None:
    values = chest()
    path = save_volume(tmp_path / "a.nii.gz", values)
    (scene,) = scan(path, NATIVE_CT).scenes
    _, quality = scene.read(scene.grid.full)
    assert np.array_equal(quality == Quality.OUTSIDE, values == -2000)
    (coarse,) = scan(path, CtSettings(spacing_mm=(1.5, 1.5, 1.0), window_hu=(-1024, 1000))).scenes
    pixels, quality = coarse.read(coarse.grid.full)
    assert pixels[0][quality & Quality.OUTSIDE == 0].min() > -1060


def test_air_and_a_table_are_background_and_lungs_are_not() -> None:
    values = chest()
    body = ct_body(values, values > -1500)
    assert not body[values < -950].any()
    assert not body[8:16, 5].any(), "a table"
    assert body[(values == 40) | (values == -820)].all()
    values[16, :20, 11] = values[8:24, 16, 11] = -1000
    assert ct_body(values, values > -1500)[..., :11][(values == -820)[..., :11]].all(), "an open mouth lets no air into other planes"
    lung = np.full((12, 12, 12), -840, np.int16)
    assert ct_body(lung, np.ones(lung.shape, bool)).all(), "a crop from inside a lung"


@pytest.mark.parametrize(("name", "kind"), [("sub-01_T1w.nii.gz", "ct"), ("sub-01_ct.nii.gz", "mri"), ("sub-01_pet.nii.gz", "mri")])
def test_a_scan_that_says_another_modality_is_not_wanted(tmp_path: Path, name: str, kind: str) -> None:
    save_volume(tmp_path / name, texture((8, 8, 8)))
    settings = NATIVE_CT if kind == "ct" else MriSettings(spacing_mm=None)
    (rejected,) = scan_volumes([tmp_path / name], tmp_path, settings).rejected
    assert rejected.unwanted
    assert rejected.code == "other_modality"


def test_values_that_contradict_the_settings_are_warned_of_and_kept(tmp_path: Path) -> None:
    save_volume(tmp_path / "a.nii.gz", chest())
    save_volume(tmp_path / "b.nii.gz", head())
    for settings, wanted in ((MriSettings(spacing_mm=None), "looks_like_ct"), (NATIVE_CT, "looks_like_mri")):
        found = scan_volumes(sorted(tmp_path.glob("*")), tmp_path, settings)
        assert len(found.scenes) == 2
        assert sum(wanted in scene.flags for scene in found.scenes) == 1
        assert [note for note in found.notes if f"warning ({wanted}): the values of 1 scans" in note]


@pytest.mark.skipif(not (REAL / "mri").is_dir(), reason="needs ../shared/data/mri")
def test_no_real_mri_is_taken_for_ct() -> None:
    folder = REAL / "mri"
    files = [*sorted(folder.glob("ptbp_tissue/JLF/ilist1.nii.gz")), *sorted(folder.glob("msd_hippocampus/images/hippocampus_21*.nii.gz"))]
    found = scan_volumes(files, folder, MriSettings())
    assert found.scenes
    assert not any("looks_like_ct" in scene.flags for scene in found.scenes)
    assert all("looks_like_mri" in scene.flags for scene in scan_volumes(files, folder, CtSettings(window_hu=(0, 3000))).scenes)


@pytest.mark.parametrize("window", [(100, -100), (-2000, 100), (0, 40000)])
def test_a_window_that_is_none_is_refused(window: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="two rising numbers from -1024 to 32767 HU"):
        CtSettings(window_hu=window)
