"""A scan has one digest under every name, orientation, unit and voxel type, and no two scans share one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modalities import voxel_digest as module
from modalities.voxel_digest import voxel_digest
from tests.synthetic_volumes import orientations, turned


def digest(values: NDArray[Any], slope: float = 1.0, intercept: float = 0.0) -> str:
    return voxel_digest(values, np.isfinite(values), slope, intercept)


def counts(seed: int = 0, space: tuple[int, ...] = (6, 5, 7)) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-900, 3000, space).astype(np.int16)


@pytest.mark.parametrize("space", [(6, 5, 7), (5, 5, 5)])
def test_all_48_orders_of_the_axes_have_one_digest(space: tuple[int, ...]) -> None:
    values = counts(space=space)
    assert {digest(turned(values, np.eye(4), turn)[0]) for turn in orientations()} == {digest(values)}
    noise = np.random.default_rng(1).normal(size=space).astype(np.float32)
    assert {digest(turned(noise, np.eye(4), turn)[0]) for turn in orientations()} == {digest(noise)}


def test_an_array_that_is_its_own_mirror_image_leaves_a_choice_that_changes_nothing() -> None:
    half = counts()
    ball = np.concatenate([half, half[::-1]])
    odd = ball.copy()
    odd[0, 0, 0], odd[-1, 0, 0], odd[0, 1, 0], odd[-1, 1, 0] = 1, 2, 2, 1  # the sums over planes still are those of their mirror image
    for values in (ball, odd, np.arange(27).reshape(3, 3, 3) % 2):
        assert {digest(turned(np.ascontiguousarray(values), np.eye(4), turn)[0]) for turn in orientations()} == {digest(values)}
    assert digest(ball) != digest(odd)


@given(
    slope=st.floats(1e-3, 1e3, allow_nan=False),
    intercept=st.floats(-1e3, 1e3, allow_nan=False),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_a_copy_in_other_units_or_another_type_has_the_digest_of_the_whole_numbers(
    slope: float, intercept: float, dtype: type, seed: int
) -> None:
    stored = counts(seed)
    assert digest(stored, slope, intercept) == digest(stored)
    assert digest(stored, float(np.float32(slope))) == digest(stored), "a NIfTI file keeps the slope in 32 bits"
    copy = (stored.astype(np.float64) * slope).astype(dtype)
    assert digest(copy) == digest(stored)
    assert digest(-stored, -slope) == digest(stored), "an inverted scan"
    assert digest((stored + 900).astype(np.uint16)) == digest(stored.astype(np.int32)) == digest(stored)


def test_a_slope_below_zero_is_another_order() -> None:
    assert digest(counts(), -1.0) != digest(counts())


def test_neither_the_sign_of_zero_nor_what_a_nan_carries_counts() -> None:
    values = np.random.default_rng(0).normal(size=(6, 5, 7)).astype(np.float32)
    values[0, 0] = 0.0
    values[1, 1] = np.nan
    other = values.copy()
    other[0, 0] = -0.0
    other[1, 1] = np.array([0x7FC12345], np.uint32).view(np.float32)[0]
    infinite = np.where(np.isnan(values), np.inf, values)
    assert digest(other) == digest(values) == digest(infinite) == digest(np.where(np.isnan(values), -np.inf, values))
    assert digest(np.nan_to_num(values)) != digest(values)


@given(place=st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 6)))
def test_a_single_voxel_makes_another_scan(place: tuple[int, int, int]) -> None:
    values = counts()
    other = values.copy()
    other[place] = 3001
    assert digest(other) != digest(values)
    assert digest(values[:-1]) != digest(values)
    assert digest(values.reshape(6, 7, 5)) != digest(values)


def test_more_values_than_sixteen_bits_hold_are_told_apart_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(100, 10, (6, 5, 7)).astype(np.float32)
    few = digest(values)
    monkeypatch.setattr(module, "MOST_LEVELS", 100)
    assert digest(values) != few
    assert {digest(turned(values, np.eye(4), turn)[0]) for turn in orientations()} == {digest(values)}
    assert digest(values.astype(np.float64)) == digest(values) == digest(values / 4, 4.0)
    zeros = np.where(values > 100, values, np.float32(0))
    assert digest(np.where(zeros == 0, np.float32(-0.0), zeros)) == digest(zeros)
