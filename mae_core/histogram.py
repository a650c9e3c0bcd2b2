"""How often each value occurs in each channel: counted in parts, added in any order, asked for percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from numpy.typing import NDArray

PERCENTS = (1, 2, 25, 50, 75, 98, 99)
"""Percentiles that are told of a channel."""

WHOLE_BITS, REAL_BITS = 16, 11
"""Bits after the leading one that values are rounded to: enough to tell all values of a 16-bit image from each other (8e-6 of a value),
and 2048 values an octave (2.4e-4 of a value) for real and wider numbers, of which no two need be alike."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Rounded physical values and how often each occurs, by rising channel and value.

    Counts are whole numbers and rounding looks at one value alone, so parts give the same in whatever order and number they come.
    """

    channel: Int32[np.ndarray, " entry"]
    value: Float32[np.ndarray, " entry"]
    count: Int64[np.ndarray, " entry"]

    @staticmethod
    def empty() -> Histogram:
        """Of nothing."""
        return Histogram(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int64))

    @staticmethod
    def of(channel: int, stored: NDArray[np.generic], scale: float, offset: float) -> Histogram:
        """Of the stored values of one channel that count; physical value = stored · scale + offset."""
        whole = stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2
        values: NDArray[Any] = stored.ravel()
        counts: NDArray[Any] = np.ones(stored.size, np.int64)
        if whole and stored.dtype.kind == "u":
            found = np.bincount(values)
            values = np.flatnonzero(found)
            counts = found[values].astype(np.int64)
        elif whole:
            values, counts = np.unique(values, return_counts=True)
        physical = rounded(values.astype(np.float64) * scale + offset, WHOLE_BITS if whole else REAL_BITS)
        return _added(np.full(len(physical), channel, np.int32), physical, counts.astype(np.int64))

    @staticmethod
    def merged(parts: Sequence[Histogram]) -> Histogram:
        """Of what all parts are of."""
        columns = [np.concatenate([getattr(part, name) for part in (*parts, Histogram.empty())]) for name in ("channel", "value", "count")]
        return _added(*columns)

    def moved(self, places: NDArray[np.int64]) -> Histogram:
        """The same with channel `i` as channel `places[i]`."""
        return _added(places[self.channel].astype(np.int32), self.value, self.count)

    def percentiles(self, num_channels: int) -> Float64[np.ndarray, "channel percent"]:
        """`PERCENTS` of each channel, linear between neighbours as numpy's; NaN for a channel without a value."""
        out = np.full((num_channels, len(PERCENTS)), np.nan)
        for number in range(num_channels):
            start, stop = np.searchsorted(self.channel, [number, number + 1])
            if start < stop:
                values, ends = self.value[start:stop].astype(np.float64), np.cumsum(self.count[start:stop])
                place = np.array(PERCENTS) / 100 * (int(ends[-1]) - 1)
                low, high = (values[np.searchsorted(ends, rank, side="right")] for rank in (np.floor(place), np.ceil(place)))
                out[number] = low + (high - low) * (place - np.floor(place))
        return out


def rounded(values: NDArray[np.float64], bits: int) -> NDArray[np.float32]:
    """Values as float32 with so many bits after the leading one, the nearest such; zero has no sign."""
    single = np.clip(values, np.finfo(np.float32).min / 2, np.finfo(np.float32).max / 2).astype(np.float32)
    drop = 23 - bits
    words = single.view(np.uint32).astype(np.uint64)
    kept = ((words + np.uint64(1 << (drop - 1))) >> np.uint64(drop) << np.uint64(drop)).astype(np.uint32)
    near: NDArray[np.float32] = kept.view(np.float32) + np.float32(0)
    return near


def _added(channel: NDArray[np.int32], value: NDArray[np.float32], count: NDArray[np.int64]) -> Histogram:
    """Entries of one channel and value as one."""
    order = np.lexsort((value, channel))
    channel, value, count = channel[order], value[order], count[order]
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(channel) != 0) | (np.diff(value) != 0)
    first = np.flatnonzero(new)
    total = np.add.reduceat(count, first) if len(first) else count
    return Histogram(channel[first], value[first], total.astype(np.int64))
