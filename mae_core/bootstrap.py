"""Means over cases with intervals by patient, and paired differences: patients are drawn anew, with all of their cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over cases and how far it may be off.

    Attributes:
        mean: Over cases that have a value; nan where none has.
        low, high: Ends of the interval; nan where there are fewer than two patients, of which none can be drawn anew.
        cases, patients: How many have a value.
    """

    mean: float
    low: float
    high: float
    cases: int
    patients: int

    @property
    def is_known(self) -> bool:
        """Whether there is an interval at all."""
        return not math.isnan(self.low)

    @property
    def contains_zero(self) -> bool:
        """Whether nothing can be said of the sign: 0 lies in the interval, or there is none."""
        return not self.is_known or self.low <= 0 <= self.high


def interval(values: Sequence[float], patients: Sequence[str], num_resamples: int, confidence: float, seed: int) -> Interval:
    """The mean of the values that are not nan, with a percentile bootstrap interval by patient.

    In each of the resamples as many patients as there are are drawn with replacement, each with all of its cases
    (Efron and Tibshirani 1993, chapter 13). The same input gives the same interval.

    Args:
        values: One per case; nan for none.
        patients: Whose case it is.
        num_resamples: How often patients are drawn.
        confidence: Share of the resamples between the ends.
        seed: Of the draws.
    """
    every = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(every)
    if not there.any():
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    kept = every[there]
    names, number = np.unique(np.asarray(patients, dtype=str)[there], return_inverse=True)
    mean, many = float(kept.mean()), len(names)
    if many < 2:
        return Interval(mean, math.nan, math.nan, len(kept), many)
    sums, counts = np.bincount(number, weights=kept), np.bincount(number)
    random = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    step = max(1, (1 << 22) // many)  # resamples at once, so that memory is bounded whatever the number of patients
    for start in range(0, num_resamples, step):
        drawn = random.integers(0, many, (min(step, num_resamples - start), many))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), len(kept), many)
