"""A sheet shows the right of the patient on the left, both outlines where the object is, in the shape that the spacing gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mae_core import case_sheet as sheets
from mae_core.case_sheet import PALETTE, REFERENCE, VIEWS, CasePicture, case_sheet

SPACE = (30, 24, 20)


def case(**changes: Any) -> CasePicture:
    """A dark volume with a small object that lies right, anterior and superior, and a reference one voxel beside it."""
    predicted = np.zeros(SPACE, np.int64)
    predicted[22:26, 16:20, 13:17] = 1
    image = np.random.default_rng(0).uniform(0, 1, SPACE).astype(np.float32)
    usual = {
        "title": "scan-00",
        "image": image,
        "predicted": predicted,
        "reference": np.roll(predicted, 1, 0),
        "spacing_mm": (1.0, 1.0, 1.0),
        "names": {1: "lesion"},
        "colours": {},
    }
    return CasePicture(**{**usual, **changes})


def places(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.int64]:
    """Rows and columns of the pixels of about a colour."""
    return np.argwhere(np.abs(picture.astype(int) - colour).max(axis=2) < 40)


CYAN = tuple(bytes.fromhex(REFERENCE[1:]))


def test_the_right_of_the_patient_is_on_the_left_and_the_front_of_the_head_up_or_left() -> None:
    plane = np.zeros(SPACE, np.int64)
    plane[-1, -1, -1] = 1
    for view in VIEWS:
        seen = sheets._plane(plane, view, SPACE[view.fixed] - 1)
        assert seen.shape == (SPACE[view.down], SPACE[view.across])
        assert np.argwhere(seen).tolist() == [[0, 0]], f"{view.name}: right, anterior and superior lie at the upper left"
    assert [view.letters for view in VIEWS] == ["RLAP", "RLSI", "APSI"]


def test_both_outlines_are_drawn_and_the_object_is_enlarged_where_it_is_small() -> None:
    picture = case_sheet(case())
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    lesion, reference = places(picture, PALETTE[0]), places(picture, CYAN)
    assert len(lesion) > 300
    assert len(reference) > 200
    first = lesion[(lesion[:, 0] < picture.shape[0] // 2) & (lesion[:, 1] < picture.shape[1] // 3)]
    assert first[:, 1].mean() < picture.shape[1] / 6, "right of the patient, left in the axial plane"
    large = case(predicted=np.ones(SPACE, np.int64), reference=None)
    assert case_sheet(large).shape[0] < picture.shape[0], "nothing to enlarge"
    assert not len(places(case_sheet(large), CYAN))


def test_planes_go_through_the_largest_object_of_the_reference() -> None:
    reference = np.zeros(SPACE, np.int64)
    reference[2:5, 2:5, 2:5], reference[20, 20, 18] = 1, 1
    predicted = np.zeros(SPACE, np.int64)
    predicted[10:20, 10:20, 10:20] = 1
    with_reference = case_sheet(case(predicted=predicted, reference=reference))
    assert len(places(with_reference, CYAN)) > 200
    assert not len(places(with_reference[: with_reference.shape[0] // 2], PALETTE[0])) or len(places(with_reference, PALETTE[0])) < 300
    empty = case_sheet(case(predicted=predicted, reference=np.zeros(SPACE, np.int64)))
    assert len(places(empty, PALETTE[0])) > 300, "an empty reference: through what was predicted"


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 4.0), (0.5, 2.0, 1.0)])
def test_a_plane_is_as_wide_and_high_as_its_millimetres(spacing: tuple[float, float, float]) -> None:
    """A bright volume in a dark picture: the sides of each plane have the ratio of its millimetres."""
    picture = case_sheet(case(image=np.ones(SPACE, np.float32), predicted=np.zeros(SPACE, np.int64), reference=None, spacing_mm=spacing))
    third = picture.shape[1] // 3
    for number, view in enumerate(VIEWS):
        bright = picture[:, number * third : (number + 1) * third].min(axis=2) > 200
        high, wide = (int((bright.sum(axis=axis) > 30).sum()) for axis in (1, 0))
        wanted = SPACE[view.down] * spacing[view.down] / (SPACE[view.across] * spacing[view.across])
        assert high / wide == pytest.approx(wanted, rel=0.05), view.name


def test_a_scan_without_any_object_or_any_number_has_a_sheet() -> None:
    nothing = np.zeros(SPACE, np.int64)
    assert case_sheet(case(predicted=nothing, reference=None)).std() > 0
    assert case_sheet(case(predicted=nothing, reference=nothing, image=np.zeros(SPACE, np.float32))).shape[2] == 3


def test_many_classes_are_named_up_to_a_number() -> None:
    many = np.zeros(SPACE, np.int64)
    many[:, 0, 0] = np.arange(30)
    lines = sheets._legend(case(predicted=many, names={number: f"part {number}" for number in range(30)}))
    assert [line.get_label() for line in lines][-2:] == ["and 17 more", "reference"]
    assert lines[0].get_label() == "part 1"
    own = sheets._legend(case(colours={1: (1, 2, 3)}))[0]
    assert own.get_color() == "#010203"
