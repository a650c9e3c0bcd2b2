"""Scores of a case are MONAI's and what geometry says they must be, whatever the spacing; empty classes follow the stated table."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray

from mae_core.case_metrics import NAMES, CaseScores, CaseSettings, diagonal_mm, hits, judge, judge_case

PLAIN = CaseSettings()


def box(space: Sequence[int], start: Sequence[int], size: Sequence[int]) -> NDArray[np.bool_]:
    out = np.zeros(space, dtype=bool)
    out[tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))] = True
    return out


def ball(space: Sequence[int], spacing: Sequence[float], centre_mm: Sequence[float], radius_mm: float) -> NDArray[np.bool_]:
    places = np.meshgrid(*(np.arange(size) * step for size, step in zip(space, spacing, strict=True)), indexing="ij")
    squared = sum((place - middle) ** 2 for place, middle in zip(places, centre_mm, strict=True))
    return np.asarray(squared <= radius_mm**2)


def monai_numbers(predicted: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float], tolerance: float) -> list[float]:
    """Dice, HD95 and NSD of whole volumes, straight from MONAI."""
    guess, true = (torch.from_numpy(part)[None, None].float() for part in (predicted, reference))
    dice = compute_dice(guess, true, include_background=True)
    with warnings.catch_warnings():  # MONAI 1.6 calls a function of its own with an argument that it is about to take away
        warnings.simplefilter("ignore", FutureWarning)
        hd95 = compute_hausdorff_distance(guess, true, include_background=True, percentile=95, spacing=list(spacing))
        nsd = compute_surface_dice(guess, true, [tolerance], include_background=True, spacing=list(spacing))
    return [float(dice), float(hd95), float(nsd)]


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1.0, 1.0, 1.0), (0.5, 0.7, 5.0), (3.0, 1.0, 0.25)]), st.sampled_from([0.6, 1.0, 2.5]))
@settings(max_examples=25, deadline=None)
def test_scores_of_whole_volumes_are_those_of_monai(seed: int, spacing: tuple[float, float, float], tolerance: float) -> None:
    """Blobs anywhere, also at the border of the volume, so that cropping to both changes nothing."""
    random = np.random.default_rng(seed)
    space = (17, 12, 9)
    extent = np.array(space) * spacing
    shapes = [ball(space, spacing, random.uniform(0, extent), random.uniform(1.5, 5) * min(spacing)) for _ in range(4)]
    predicted, reference = shapes[0] | shapes[1], shapes[2] | shapes[3]
    predicted[tuple(random.integers(0, space))] = True
    reference[tuple(random.integers(0, space))] = True
    found = judge(predicted, reference, spacing, CaseSettings(nsd_tolerance_mm=tolerance))
    np.testing.assert_allclose([found.dice, found.hd95_mm, found.nsd], monai_numbers(predicted, reference, spacing, tolerance), 1e-6, 1e-6)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 4.0)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_box_that_is_shifted_by_its_own_size_is_wrong_by_that_in_mm(axis: int, spacing: tuple[float, float, float]) -> None:
    size = (6, 6, 6)
    space = [size[number] * (3 if number == axis else 1) for number in range(3)]
    start = [size[number] if number == axis else 0 for number in range(3)]
    predicted, reference = box(space, start, size), box(space, (0, 0, 0), size)
    found = judge(predicted, reference, spacing, PLAIN)
    assert found.dice == 0
    assert found.hd95_mm == pytest.approx(6 * spacing[axis]), "the far side of each lies one box away"
    assert found.reference_ml == found.predicted_ml == pytest.approx(216 * math.prod(spacing) / 1000)
    assert found.volume_error_relative == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 2.0)])
def test_a_larger_ball_around_a_smaller_is_wrong_by_the_difference_of_their_radii(spacing: tuple[float, float, float]) -> None:
    space = [round(40 / step) + 1 for step in spacing]
    small, large = (ball(space, spacing, (20, 20, 20), radius) for radius in (8, 14))
    found = judge(large, small, spacing, PLAIN)
    assert found.hd95_mm == pytest.approx(6, abs=max(spacing))
    assert found.nsd == 0
    assert judge(large, small, spacing, CaseSettings(nsd_tolerance_mm=6 + max(spacing))).nsd == 1
    assert found.dice == pytest.approx(2 * 8**3 / (8**3 + 14**3), rel=0.03)
    assert found.reference_ml == pytest.approx(4 / 3 * math.pi * 0.8**3, rel=0.03)
    assert found.volume_error_ml == pytest.approx(4 / 3 * math.pi * (1.4**3 - 0.8**3), rel=0.03)
    assert found.volume_error_relative == pytest.approx((14 / 8) ** 3 - 1, rel=0.04)


def test_a_perfect_prediction_is_perfect() -> None:
    whole = box((9, 8, 7), (2, 0, 1), (4, 8, 3))
    found = judge(whole, whole, (1.0, 2.0, 3.0), PLAIN)
    assert (found.dice, found.hd95_mm, found.nsd, found.volume_error_ml, found.volume_error_relative) == (1, 0, 1, 0, 0)
    assert (found.lesion_precision, found.lesion_recall, found.lesion_f1, found.state) == (1, 1, 1, "both")


def test_what_is_empty_follows_the_table() -> None:
    spacing = (1.0, 1.0, 5.0)
    empty, some = np.zeros((10, 10, 4), dtype=bool), box((10, 10, 4), (1, 1, 1), (2, 2, 1))
    diagonal = math.sqrt(100 + 100 + 400)
    assert diagonal_mm(empty.shape, spacing) == pytest.approx(diagonal)
    missed, invented, absent = judge(empty, some, spacing, PLAIN), judge(some, empty, spacing, PLAIN), judge(empty, empty, spacing, PLAIN)
    assert [case.state for case in (missed, invented, absent)] == ["missed", "invented", "absent"]
    for case in (missed, invented):
        assert (case.dice, case.nsd, case.lesion_f1) == (0, 0, 0)
        assert case.hd95_mm == pytest.approx(diagonal)
    assert missed.volume_error_relative == -1
    assert math.isnan(invented.volume_error_relative)
    assert invented.volume_error_ml == pytest.approx(0.02)
    assert (missed.lesion_recall, invented.lesion_precision) == (0, 0)
    assert math.isnan(missed.lesion_precision)
    assert math.isnan(invented.lesion_recall)
    none = {name for name in NAMES if math.isnan(getattr(absent, name))}
    assert set(NAMES) - none == {"reference_ml", "predicted_ml", "reference_lesions", "predicted_lesions"}


def test_lesions_are_counted_one_by_one() -> None:
    space = (20, 8, 8)
    reference = box(space, (0, 0, 0), (3, 3, 3)) | box(space, (6, 0, 0), (4, 4, 4)) | box(space, (14, 5, 5), (2, 2, 2))
    predicted = box(space, (2, 2, 2), (3, 3, 3)) | box(space, (6, 0, 0), (4, 4, 4)) | box(space, (18, 0, 0), (1, 1, 1))
    found = judge(predicted, reference, (1.0, 1.0, 1.0), PLAIN)
    assert (found.reference_lesions, found.predicted_lesions) == (3, 3)
    assert (found.lesion_recall, found.lesion_precision, found.lesion_f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    strict = judge(predicted, reference, (1.0, 1.0, 1.0), CaseSettings(lesion_overlap_fraction=0.1))
    assert (strict.lesion_recall, strict.lesion_precision) == pytest.approx((1 / 3, 1 / 3)), "1 of 27 voxels is no hit any more"


def test_voxels_that_touch_at_a_corner_are_one_lesion_or_two_as_it_is_set() -> None:
    corner = box((4, 4, 4), (0, 0, 0), (2, 2, 2)) | box((4, 4, 4), (2, 2, 2), (2, 2, 2))
    assert hits(corner, corner, PLAIN) == (1, 1)
    assert hits(corner, corner, CaseSettings(lesion_neighbours="faces")) == (2, 2)


def test_every_class_is_judged_against_the_rest_and_voxels_without_label_belong_to_nothing() -> None:
    reference = np.zeros((12, 6), dtype=np.int64)
    reference[:4], reference[4:8], reference[8:] = 1, 2, -1
    predicted = np.where(reference == -1, 2, reference)
    found = judge_case(predicted, reference, (1.0, 1.0), (0, 1, 2, 7), PLAIN)
    assert list(found) == [1, 2, 7], "background is not judged"
    assert (found[1].dice, found[2].dice, found[7].state) == (1, 1, "absent")
    ignored = judge_case(predicted, reference, (1.0, 1.0), (0, 2), PLAIN)
    assert list(ignored) == [2]
    assert ignored[2].dice == 1
    assert judge_case(predicted, np.maximum(reference, 0), (1.0, 1.0), (0, 1, 2), PLAIN)[2].dice == pytest.approx(2 / 3)


def test_a_line_has_distances_too() -> None:
    one, other = np.arange(20) // 5 == 1, np.arange(20) // 5 == 2
    assert judge(one, other, (2.0,), PLAIN).hd95_mm == pytest.approx(2 + 0.95 * 8), "its two ends lie 2 and 10 mm away"


def test_a_spacing_that_a_header_rounds_moves_no_voxel_over_the_tolerance() -> None:
    whole, grown = box((9, 9, 9), (3, 3, 3), (3, 3, 3)), box((9, 9, 9), (2, 3, 3), (5, 3, 3))
    rounded = float(np.nextafter(np.float32(1), np.float32(2)))
    assert judge(grown, whole, (rounded,) * 3, PLAIN).nsd == judge(grown, whole, (1.0,) * 3, PLAIN).nsd == 1


def test_a_spacing_of_other_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predicted \(2, 2\), reference \(2, 2\) and spacing \(1.0, 1.0, 1.0\) do not fit"):
        judge_case(np.zeros((2, 2), dtype=int), np.zeros((2, 2), dtype=int), (1.0, 1.0, 1.0), (1,), PLAIN)


def test_names_are_the_fields_in_order() -> None:
    assert NAMES[0] == "dice"
    assert tuple(vars(CaseScores(*map(float, range(len(NAMES)))))) == NAMES
