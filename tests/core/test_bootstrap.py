"""Intervals by patient: as wide as theory says, blind to how often a patient was scanned, the same for the same seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mae_core.bootstrap import interval


def test_the_interval_of_many_patients_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    found = interval(values.tolist(), [f"p{number}" for number in range(400)], 4000, 0.95, 0)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    narrow = interval(values.tolist(), [f"p{number}" for number in range(400)], 4000, 0.5, 0)
    assert found.low < narrow.low < narrow.high < found.high


def test_ten_scans_of_a_patient_are_one_patient() -> None:
    """Copies of every case make a naive interval narrower by the root of ten, this one not at all."""
    values = np.random.default_rng(1).normal(0, 1, 30)
    names = [f"p{number}" for number in range(30)]
    once = interval(values.tolist(), names, 1000, 0.95, 3)
    often = interval(np.repeat(values, 10).tolist(), np.repeat(names, 10).tolist(), 1000, 0.95, 3)
    assert (often.mean, often.low, often.high) == pytest.approx((once.mean, once.low, once.high))
    assert (often.cases, often.patients, once.cases) == (300, 30, 30)


def test_patients_with_more_scans_weigh_more_in_the_mean() -> None:
    assert interval([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"], 100, 0.9, 0).mean == 0.75


def test_cases_without_value_are_in_no_mean() -> None:
    found = interval([0.2, math.nan, 0.4], ["a", "b", "c"], 100, 0.9, 0)
    assert (found.mean, found.cases, found.patients) == (pytest.approx(0.3), 2, 2)
    none = interval([math.nan], ["a"], 100, 0.9, 0)
    assert math.isnan(none.mean)
    assert (none.cases, none.is_known) == (0, False)


def test_one_patient_gives_a_mean_and_no_interval() -> None:
    found = interval([0.2, 0.4], ["a", "a"], 100, 0.9, 0)
    assert found.mean == pytest.approx(0.3)
    assert not found.is_known
    assert found.contains_zero, "nothing can be said of the sign"


def test_zero_lies_inside_or_not() -> None:
    names = list("abcdefgh")
    assert interval([-1, 1, -1, 1, -1, 1, -1, 1], names, 500, 0.95, 0).contains_zero
    assert not interval([1, 2, 1, 2, 1, 2, 1, 2], names, 500, 0.95, 0).contains_zero


def test_the_same_seed_gives_the_same_interval() -> None:
    values, names = np.random.default_rng(2).random(9).tolist(), list("abcdefghi")
    assert interval(values, names, 300, 0.95, 5) == interval(values, names, 300, 0.95, 5)
    assert interval(values, names, 300, 0.95, 5) != interval(values, names, 300, 0.95, 6)
