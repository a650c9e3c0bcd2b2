"""A lattice at another spacing over the same place, and arrays carried there and back. Any number of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SAME_SPACING_MM = 1e-3
"""Spacings that differ by no more are the same."""
ANISOTROPY = 3.0
"""Where the largest spacing is more than this many times the smallest, its axis runs through the slices (nnU-Net's threshold)."""
PREFILTER_STEP = 1.5
"""An axis whose voxels grow by more than this factor is smoothed first."""


@dataclass(frozen=True)
class Respacing:
    """How a source lattice and a target lattice lie to each other: index in source = start + step · index in target.

    Attributes:
        source: Voxels per axis of the source lattice.
        target: Voxels per axis of the target lattice.
        start: Where the centre of the target's first voxel lies, in source voxels.
        step: Size of a target voxel in source voxels.
        nearest_axis: The axis along which values come from the nearest voxel instead of from between two; None: there is none.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    start: tuple[float, ...]
    step: tuple[float, ...]
    nearest_axis: int | None = None

    @staticmethod
    def to(space: tuple[int, ...], spacing_mm: Sequence[float], wanted_mm: Sequence[float] | None, is_nearest: bool = False) -> Respacing:
        """The largest lattice of spacing `wanted_mm` between the outermost voxel centres of the source, with the same middle.

        Every target voxel lies between measured source voxels, so nothing is extrapolated, and every source voxel is less than
        half a target voxel away from one, so labels find their way back. Axes that have the wanted spacing (within
        `SAME_SPACING_MM`) stay as they are; None keeps all.

        `is_nearest`: Where slices are thick (`ANISOTROPY`) and come closer together, each keeps its values up to half way to the next
        one. What is not said here is linear along every axis.
        """
        target, start, step = [], [], []
        for num, has, wants in zip(space, spacing_mm, spacing_mm if wanted_mm is None else wanted_mm, strict=True):
            ratio = 1.0 if abs(has - wants) <= SAME_SPACING_MM else wants / has
            count = num if ratio == 1.0 else int(np.floor((num - 1) / ratio + 1e-6)) + 1
            target.append(count)
            step.append(ratio)
            start.append((num - 1 - (count - 1) * ratio) / 2)
        through = int(np.argmax(spacing_mm))
        is_apart = is_nearest and max(spacing_mm) > ANISOTROPY * min(spacing_mm) and step[through] < 1
        return Respacing(tuple(space), tuple(target), tuple(start), tuple(step), through if is_apart else None)

    @property
    def is_identity(self) -> bool:
        """Whether both lattices are the same."""
        return all(step == 1.0 for step in self.step)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """Homogeneous matrix from target index to source index: `source affine @ matrix` is the target's affine."""
        matrix = np.diag([*self.step, 1.0])
        matrix[:-1, -1] = self.start
        return matrix

    def linear(self, values: NDArray[Any], finite: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """`values` on the target lattice in their own dtype (integers rounded), and where they are finite.

        Linear interpolation, but for `nearest_axis`; an axis whose step is above `PREFILTER_STEP` is first smoothed by a Gaussian with a
        standard deviation of (step − 1) / 2 source voxels against aliasing. Cubic would ring at the border of a head, and leave the range
        of integers. Values that are not finite have no weight, and a target voxel in which they would have had more than half of it is
        not finite either and holds 0.
        """
        if self.is_identity:
            return values, finite
        is_wide = values.dtype.kind in "iu" and values.dtype.itemsize > 2
        work = values.astype(np.float64 if is_wide else np.float32)
        if finite.all():
            return _cast(self._interpolate(work), values.dtype), np.ones(self.target, dtype=np.bool_)
        weight = self._interpolate(finite.astype(work.dtype))
        work[~finite] = 0
        known = weight >= 0.5
        return _cast(np.where(known, self._interpolate(work) / np.maximum(weight, 0.5), 0), values.dtype), known

    def nearest(self, values: NDArray[Any]) -> NDArray[Any]:
        """`values` of the source lattice on the target lattice, each from the nearest voxel."""
        return self._pick(values, [b + s * np.arange(n) for b, s, n in zip(self.start, self.step, self.target, strict=True)])

    def nearest_back(self, values: NDArray[Any]) -> NDArray[Any]:
        """`values` of the target lattice on the source lattice, each from the nearest voxel."""
        return self._pick(values, [(np.arange(n) - b) / s for b, s, n in zip(self.start, self.step, self.source, strict=True)])

    def _pick(self, values: NDArray[Any], places: list[NDArray[Any]]) -> NDArray[Any]:
        if self.is_identity:
            return values
        index = [np.clip(np.rint(place), 0, size - 1).astype(np.intp) for place, size in zip(places, values.shape, strict=True)]
        return values[np.ix_(*index)]

    def _interpolate(self, work: NDArray[Any]) -> NDArray[Any]:
        start, step, space = list(self.start), list(self.step), list(self.target)
        if self.nearest_axis is not None:
            start[self.nearest_axis], step[self.nearest_axis], space[self.nearest_axis] = 0.0, 1.0, self.source[self.nearest_axis]
        sigma = [(size - 1) / 2 if size > PREFILTER_STEP else 0.0 for size in step]
        smooth = ndimage.gaussian_filter(work, sigma, mode="nearest") if any(sigma) else work
        result: NDArray[Any] = ndimage.affine_transform(
            smooth, np.asarray(step), offset=start, output_shape=tuple(space), order=1, mode="nearest", prefilter=False
        )
        return result if self.nearest_axis is None else np.take(result, self._index(self.nearest_axis), self.nearest_axis)

    def _index(self, axis: int) -> NDArray[np.intp]:
        """The source voxel that is nearest to each of the target's, along an axis."""
        places = self.start[axis] + self.step[axis] * np.arange(self.target[axis])
        return np.asarray(np.clip(np.rint(places), 0, self.source[axis] - 1), np.intp)


def _cast(values: NDArray[Any], dtype: np.dtype[np.generic]) -> NDArray[Any]:
    return (np.rint(values) if dtype.kind in "iu" else values).astype(dtype)
