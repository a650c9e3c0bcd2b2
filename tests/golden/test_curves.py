"""The method gives the numbers that it gave: loss curves of twenty steps in two and three axes."""

from __future__ import annotations

import json

import pytest

from tests.golden.make_curves import CURVES, SPACES, STEPS, curve
from tests.synthetic_batches import one_thread

__all__ = ["one_thread"]

TOLERANCE = 1e-6
"""Relative. Not bit for bit, since machines add in another order: one thread or two and AVX2 or none differ by 1.3e-7
here, after twenty steps. An eps, a rounding or a hidden token elsewhere differs by far more."""


@pytest.mark.parametrize("axes", SPACES)
def test_the_curve_is_the_golden_one(axes: int) -> None:
    golden = json.loads(CURVES.read_text(encoding="utf-8"))["losses"][str(axes)]
    assert len(golden) == STEPS
    assert golden[-1] < 0.75 * golden[0], "it learns"
    assert curve(axes) == pytest.approx(golden, rel=TOLERANCE)
