"""Foreground and robust intensity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalities.intensity import foreground, num_classes, robust_mean_std
from modalities.nifti_file import read_header, read_stored
from tests.synthetic_volumes import REAL, head, texture

MRI = REAL / "mri"


def test_air_is_found_and_a_dark_hole_inside_is_not_air() -> None:
    values = head(24)
    body = foreground(values)
    radius = np.sqrt(sum((axis - 11.5) ** 2 for axis in np.indices(values.shape)))
    assert body[radius < 24 * 0.4].all()
    assert not body[radius >= 24 * 0.4].any()


def test_zeros_around_a_skull_stripped_brain_are_air_even_when_the_brain_is_tiny() -> None:
    values = np.zeros((30, 30, 30), np.float32)
    values[10:15, 10:15, 10:15] = texture((5, 5, 5))
    assert np.array_equal(foreground(values), values > 0)
    values[:] = 0
    values[14:16, 14:16, 14:16] = 7
    assert np.array_equal(foreground(values), values > 0)


def test_a_crop_from_inside_a_head_has_no_air() -> None:
    values = texture((20, 20, 20))
    values[:4, :4, :10] = 0
    assert foreground(values).all()


def test_air_takes_what_does_not_matter_to_it_in_no_account() -> None:
    values = head(24)
    body = foreground(values)
    assert np.array_equal(foreground(values * 1e4 - 500), body)
    values[12, 12, 12] = 1e6
    assert np.array_equal(foreground(values), body)


def test_what_is_not_finite_is_no_foreground_and_lets_air_pass() -> None:
    values = head(24)
    body = foreground(values)
    values[0] = values[-1] = values[:, 0] = values[:, -1] = np.nan
    values[:, :, 0] = values[:, :, -1] = np.inf
    assert np.array_equal(foreground(values), body & np.isfinite(values))
    assert not foreground(np.full((4, 4), np.nan, np.float32)).any()


@given(st.integers(1, 3), st.integers(0, 2**16))
def test_any_number_of_axes(num_axes: int, seed: int) -> None:
    values = np.zeros((12,) * num_axes, np.float32)
    inner = (slice(3, 9),) * num_axes
    values[inner] = texture((6,) * num_axes, seed)
    assert np.array_equal(foreground(values), values > 0)


def test_robust_mean_and_deviation_leave_outliers_out() -> None:
    values = np.random.default_rng(0).normal(10, 2, 20_000)
    values[:50] = 1e9
    mean, std = robust_mean_std(values)
    assert mean == pytest.approx(10, abs=0.1)
    assert std == pytest.approx(2, rel=0.05)
    assert robust_mean_std(np.full(100, 0.1, np.float32))[1] == 0


def test_label_maps_are_told_from_images() -> None:
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[3, 3, 3] = 7
    assert num_classes(labels) == 2
    assert num_classes(labels.astype(np.float32)) == 2
    assert num_classes(labels * 0.5) is None
    assert num_classes(np.arange(16)) == 16
    assert num_classes(np.arange(17)) is None
    assert num_classes(np.array([0, np.nan])) is None
    rare = np.zeros(100_000, np.int16)
    rare[1:41] = np.arange(40)
    assert num_classes(rare) is None


@pytest.mark.skipif(not MRI.is_dir(), reason="needs ../shared/data/mri")
@pytest.mark.parametrize(
    ("pattern", "num_files", "low", "high"),
    [
        ("msd_hippocampus/images/hippocampus_21*.nii.gz", 5, 1.0, 1.0),
        ("open_ms_mni/MNI/patient07/T1*.nii.gz", 1, 0.13, 0.16),
        ("ptbp_tissue/JLF/ilist*.nii.gz", 8, 0.27, 0.30),
        ("nilearn_mni152/*.nii.gz", 1, 0.21, 0.22),
    ],
)
def test_share_of_foreground_in_real_volumes(pattern: str, num_files: int, low: float, high: float) -> None:
    files = sorted(MRI.glob(pattern))
    assert len(files) == num_files
    for file in files:
        share = foreground(read_stored(file, read_header(file))).mean()
        assert low <= share <= high, file.name
