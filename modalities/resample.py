"""A band of one lattice brought to another of the same frame, by world position, without mixing in invalid voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from modalities.grid import Grid, Window
from modalities.quality import Quality
from modalities.scene import SceneError

Resampling = Literal["bilinear", "native"]
"""How a coarse band comes to a fine grid: interpolated between measurements, or each measurement repeated over what it covers."""

ALIGNED = 0.01
"""Lattices that agree to within this many pixels over their whole extent are taken as the same lattice."""

COARSEST_STEP = 1.5
"""Largest step in source pixels per target pixel: beyond it, linear interpolation would skip source pixels."""


@dataclass(frozen=True)
class AxisMap:
    """Where the voxels of one target axis lie on a source axis: source index = `scale` · target index + `offset`.

    Positions are computed from the absolute target index, never from a window's own, so that any window gives the
    numbers of the whole to the last bit.
    """

    scale: float
    offset: float
    size: int

    @property
    def coincides(self) -> bool:
        """True where every target voxel is a source voxel: a property of the lattices, the same for every window."""
        return abs(self.scale) == 1 and self.offset.is_integer()

    def runs_beside(self, part: slice) -> bool:
        """True where the target indices in `part` are as many source indices, one after another, and all of them there."""
        return self.scale == 1 and self.offset.is_integer() and part.start + self.offset >= 0 and part.stop + self.offset <= self.size

    def positions(self, part: slice) -> NDArray[np.float64]:
        """Source positions of the target indices in `part`; whole numbers are centres of source voxels."""
        return self.scale * np.arange(part.start, part.stop, dtype=np.float64) + self.offset

    def neighbours(self, part: slice) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
        """Lower and upper source voxel of each target index and the share of the upper one, held at the source's edge."""
        position = np.clip(self.positions(part), 0, self.size - 1)
        lower = np.floor(position).astype(np.intp)
        upper_share = position - lower
        return lower, lower + (upper_share > 0), upper_share

    def needed(self, part: slice) -> slice:
        """The source indices that the target indices in `part` are computed from."""
        lower, upper, _ = self.neighbours(part)
        return slice(int(lower.min()), int(upper.max()) + 1)

    def inside(self, part: slice) -> NDArray[np.bool_]:
        """True where the centre of the target voxel lies on a source voxel."""
        position = self.positions(part)
        return (position >= -0.5 - ALIGNED) & (position <= self.size - 0.5 + ALIGNED)


def is_placed(grid: Grid) -> bool:
    """True when a raster's grid says where it lies, false when its coordinates are mere pixel numbers."""
    corner = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
    return bool(grid.frame) or grid.matrix.shape != corner.shape or not np.array_equal(grid.matrix, corner)


def relate(target: Grid, source: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrix and offset that turn indices of `target` into indices of `source`; frames are not compared.

    The offset comes from the difference of the origins, which keeps its digits where eastings and northings have seven.
    """
    inverse = np.linalg.inv(source.matrix[:-1, :-1])
    return inverse @ target.matrix[:-1, :-1], inverse @ (target.matrix[:-1, -1] - source.matrix[:-1, -1])


def align(target: Grid, source: Grid, *, finer: bool = False) -> tuple[AxisMap, ...]:
    """One map per axis from `target` to `source`; the frames are compared by the caller.

    Args:
        target: Lattice to bring something to.
        source: Lattice to bring it from.
        finer: Whether the source may be finer than the target, as it may where classes are only looked up.

    Raises:
        SceneError: The lattices are turned against each other, the source is finer along an axis, the two do not
            overlap, or neither has a place and their sizes differ. The message names no file.
    """
    if not is_placed(target) and not is_placed(source) and target.space != source.space:
        raise SceneError(
            f"its size {source.space} differs from the other bands' {target.space} and none has a georeference to relate them by; "
            "give the files a CRS and an affine"
        )
    linear, offset = relate(target, source)
    turned = np.abs(linear - np.diag(np.diag(linear))) * np.array(target.space)
    if (turned > ALIGNED).any():
        raise SceneError("its lattice is turned or sheared against the other bands'; warp it to their grid")
    axes = tuple(_axis(float(linear[i, i]), float(offset[i]), target.space[i], source.space[i]) for i in range(len(target.space)))
    if not finer and any(abs(axis.scale) > COARSEST_STEP for axis in axes):
        steps = " × ".join(f"{abs(axis.scale):g}" for axis in axes)
        raise SceneError(
            f"its pixels are smaller than those of the scene's finest band ({steps} of them per pixel); average it to that grid"
        )
    if not all(axis.inside(slice(0, n)).any() for axis, n in zip(axes, target.space, strict=True)):
        raise SceneError("it does not overlap the other bands of the scene")
    return axes


def _axis(scale: float, offset: float, target_size: int, size: int) -> AxisMap:
    same = abs(scale - 1) * target_size <= ALIGNED and abs(offset - round(offset)) <= ALIGNED
    return AxisMap(1.0, float(round(offset)), size) if same else AxisMap(round(scale, 12), round(offset, 8), size)


def nearest(axes: tuple[AxisMap, AxisMap], window: Window) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """Source row of every target row, source column of every target column, and where `(row, column)` there is no source."""
    rows, columns = (low + (share > 0.5) for low, _, share in (axis.neighbours(part) for axis, part in zip(axes, window, strict=True)))
    return rows, columns, ~np.logical_and.outer(axes[0].inside(window[0]), axes[1].inside(window[1]))


def bilinear(
    values: NDArray[np.generic], flags: NDArray[np.uint8], axes: tuple[AxisMap, AxisMap], window: Window
) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
    """Values in their own dtype and flags, `(row, column)`, of the target's `window`; what is given, where there is nothing to do.

    A source voxel with any flag has no weight. A target voxel takes the flags of the source voxel it lies on, and
    `OUTSIDE` where there is none; under any flag its value is zero unless the lattices coincide. Integers are rounded.

    Args:
        values: `(row, column)` of the source window `tuple(axis.needed(part) for axis, part in zip(axes, window))`.
        flags: Quality of the same window.
        axes: Rows and columns of the target on the source, from `align`.
        window: Of the target.
    """
    if all(axis.runs_beside(part) for axis, part in zip(axes, window, strict=True)):
        return values, flags
    (low_row, high_row, row_share), (low_col, high_col, col_share) = (a.neighbours(p) for a, p in zip(axes, window, strict=True))
    row_start, col_start = (axis.needed(part).start for axis, part in zip(axes, window, strict=True))
    near_row, near_col, outside = nearest(axes, window)
    near = np.ix_(near_row - row_start, near_col - col_start)
    new_flags = np.where(outside, np.uint8(Quality.OUTSIDE), flags[near])
    if all(axis.coincides for axis in axes):
        return values[near], new_flags
    narrow = values.dtype.itemsize <= (4 if values.dtype.kind == "f" else 2)
    work = np.dtype(np.float32 if narrow else np.float64)
    weight = (flags == 0).astype(work)
    total = np.where(flags == 0, values, 0).astype(work)
    for axis, low, high, share in (
        (0, low_row - row_start, high_row - row_start, row_share),
        (1, low_col - col_start, high_col - col_start, col_share),
    ):
        upper = np.expand_dims(share.astype(work), 1 - axis)
        total = total.take(low, axis) * (1 - upper) + total.take(high, axis) * upper
        weight = weight.take(low, axis) * (1 - upper) + weight.take(high, axis) * upper
    mean = np.where(new_flags == 0, total / np.where(weight > 0, weight, 1), 0)
    return (np.rint(mean) if values.dtype.kind in "iu" else mean).astype(values.dtype), new_flags


def footprint(axes: tuple[AxisMap, AxisMap]) -> int:
    """Target voxels along each axis that one source voxel covers, where whole source voxels cover the target from its first voxel on.

    Raises:
        SceneError: It is no whole number, not the same along both axes, or the lattices are shifted. The message names no file.
    """
    if all(axis.coincides for axis in axes):
        return 1
    steps = [round(1 / axis.scale) for axis in axes]
    drifts = [abs(axis.scale * step - 1) * axis.size for axis, step in zip(axes, steps, strict=True)]
    starts = [axis.offset + 0.5 - axis.scale / 2 for axis in axes]
    shifts = [abs(start - round(start)) for start in starts]
    if steps[0] != steps[1] or steps[0] < 1 or max(*drifts, *shifts) > ALIGNED:
        sizes = " × ".join(f"{1 / axis.scale:.6g}" for axis in axes)
        raise SceneError(
            f"its pixels cannot be kept as they are: one covers {sizes} of the scene's, which begin at its row {starts[0]:.6g} and column "
            f"{starts[1]:.6g}; resampling=native wants whole numbers, alike along both axes. Use resampling=bilinear"
        )
    return steps[0]


def repeated(
    values: NDArray[np.generic], flags: NDArray[np.uint8], axes: tuple[AxisMap, AxisMap], window: Window
) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
    """Values and flags of the target's `window`, each target voxel having those of the source voxel that its centre lies on.

    The arguments are those of `bilinear`. Where there is no source voxel, the flag is `OUTSIDE` and the value that of the nearest.
    """
    if all(axis.runs_beside(part) for axis, part in zip(axes, window, strict=True)):
        return values, flags
    rows, columns, outside = nearest(axes, window)
    row_start, column_start = (axis.needed(part).start for axis, part in zip(axes, window, strict=True))
    near = np.ix_(rows - row_start, columns - column_start)
    return values[near], np.where(outside, np.uint8(Quality.OUTSIDE), flags[near])
