"""Where an array lies in the world: its size, its affine and the frame the affine speaks of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Window = tuple[slice, ...]
"""One slice with explicit start and stop per spatial axis, in array order."""


@dataclass(frozen=True)
class Grid:
    """The lattice of a scene.

    `affine` maps homogeneous array indices to world coordinates and is `(n + 1, n + 1)` for `n` spatial axes.
    Index 0 is the **centre** of the first voxel in every modality (rasterio's corner convention is converted
    on reading and on writing), so `affine @ (i, j, ..., 1)` is a place that was measured.
    Axes are in array order: `(row, column)` for rasters, `(x, y, z)` in RAS+ for volumes.

    Attributes:
        space: Number of voxels per spatial axis.
        affine: Rows of the index-to-world matrix, as nested tuples so that a grid can be hashed and pickled.
        frame: What world coordinates mean: a CRS as WKT or `EPSG:…` for rasters, `"RAS+"` for volumes, `""` if unknown.
        unit: Unit of world coordinates: `"m"`, `"degree"`, `"mm"` or `"index"` where nothing is known.
    """

    space: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    frame: str
    unit: str

    def __post_init__(self) -> None:
        size = len(self.space) + 1
        if not self.space or any(n < 1 for n in self.space):
            raise ValueError(f"a grid needs at least one voxel on every axis, got space {self.space}")
        if len(self.affine) != size or any(len(row) != size for row in self.affine):
            raise ValueError(f"a grid of {size - 1} axes needs a {size}×{size} affine, got {self.affine}")
        if not np.isfinite(np.asarray(self.affine)).all():
            raise ValueError(f"the affine holds values that are not finite: {self.affine}")

    @staticmethod
    def from_matrix(space: tuple[int, ...], matrix: NDArray[np.floating], frame: str, unit: str) -> Grid:
        """A grid from a numpy matrix."""
        rows = tuple(tuple(float(v) for v in row) for row in np.asarray(matrix, dtype=np.float64))
        return Grid(tuple(int(n) for n in space), rows, frame, unit)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The affine as an array of shape `(n + 1, n + 1)`."""
        return np.asarray(self.affine, dtype=np.float64)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between neighbouring voxel centres along each array axis, in `unit`."""
        return tuple(float(v) for v in np.linalg.norm(self.matrix[:-1, :-1], axis=0))

    def world(self, index: tuple[float, ...]) -> tuple[float, ...]:
        """World coordinates of an array index; fractions lie between voxel centres."""
        return tuple(float(v) for v in (self.matrix @ np.asarray([*index, 1.0]))[:-1])

    def window(self, window: Window) -> Grid:
        """The grid of a window of this one: same frame, origin moved to the window's first voxel."""
        start = [part.start for part in window]
        matrix = self.matrix.copy()
        matrix[:-1, -1] = self.world(tuple(start))
        return Grid.from_matrix(tuple(part.stop - part.start for part in window), matrix, self.frame, self.unit)

    @property
    def full(self) -> Window:
        """The window that covers the whole grid."""
        return tuple(slice(0, n) for n in self.space)
