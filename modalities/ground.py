"""Where lattices lie on the globe, whatever CRS they are in: latitude and longitude of centres, corners on the ellipsoid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rasterio.warp import transform

from modalities.grid import Grid
from modalities.raster_file import BROKEN, quiet

UNPLACED = ("", "RAS+")
"""Frames of which equal coordinates do not mean equal ground: each body, and each image without a place, has its own."""

SEMI_MAJOR_M, ECCENTRICITY2 = 6_378_137.0, 6.694379990141e-3
"""The ellipsoid of WGS 84."""

WIDEST_M = 3_000_000.0
"""A footprint with a longer diagonal is no place: its corners do not tell what it covers."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Footprints:
    """What tiles cover on the ellipsoid; rows without a place are NaN throughout.

    Attributes:
        latitude, longitude: `(row, 5)` in degrees: of the four corners, going round, and of the centre.
        corners: `(row, 4, 3)`: corners in metres from the middle of the earth.
        centre: `(row, 3)`, likewise.
        voxel_m: `(row,)`: the shorter side of a voxel on the ground.
    """

    latitude: Floats
    longitude: Floats
    corners: Floats
    centre: Floats
    voxel_m: Floats

    @property
    def placed(self) -> NDArray[np.bool_]:
        """True where a row has a place."""
        return np.isfinite(self.centre[:, 0])

    def rows(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Footprints:
        """Some of the rows."""
        return Footprints(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def on_globe(frame: str, x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """Latitude and longitude of places in a frame, in degrees on WGS 84, longitude from -180 up to 180; NaN where there is none.

    Rounded to 1e-9 degrees (a tenth of a millimetre), so that another build of PROJ gives the same.
    """
    east, north = np.asarray(x, np.float64), np.asarray(y, np.float64)
    nothing = np.full(east.shape, np.nan)
    if frame in UNPLACED:
        return nothing, nothing.copy()
    try:
        with quiet():
            found = transform(frame, "EPSG:4326", east.ravel().tolist(), north.ravel().tolist())
    except BROKEN:
        return nothing, nothing.copy()
    longitude, latitude = (np.asarray(values, np.float64).reshape(east.shape) for values in found[:2])
    known = np.isfinite(longitude) & np.isfinite(latitude) & (np.abs(latitude) <= 90 + 1e-9)
    longitude = np.where(known, (np.where(known, longitude, 0) + 180) % 360 - 180, np.nan).round(9)
    return np.where(known, np.clip(latitude, -90, 90), np.nan).round(9), np.where(longitude >= 180, longitude - 360, longitude)


def centres(frames: ArrayLike, affines: ArrayLike, extents: ArrayLike) -> tuple[Floats, Floats]:
    """Latitude and longitude of the middle of tiles; NaN where a tile has no place.

    Args:
        frames: CRS of each, as `Grid.frame`.
        affines: `(row, (axes + 1)²)`: index to world.
        extents: `(row, axis)`: voxels.
    """
    flat, size = _flat(affines, extents)
    world = np.einsum("rij,rj->ri", flat[:, :, :2], (size - 1) / 2) + flat[:, :, 2]
    latitude, longitude = _by_frame(frames, world)
    return latitude, longitude


def footprints(frames: ArrayLike, affines: ArrayLike, extents: ArrayLike) -> Footprints:
    """What tiles cover; a voxel reaches half a step around its centre. The arguments are those of `centres`."""
    flat, size = _flat(affines, extents)
    ends = np.stack([np.zeros_like(size), size], axis=1) - 0.5
    round_about = [ends[:, [i, j], [0, 1]] for i, j in ((0, 0), (0, 1), (1, 1), (1, 0))]
    index = np.stack([*round_about, (size - 1) / 2], axis=1)
    world = np.einsum("rij,rpj->rpi", flat[:, :, :2], index) + flat[:, None, :, 2]
    latitude, longitude = _by_frame(frames, world)
    points = from_earth_centre(latitude, longitude)
    with np.errstate(invalid="ignore"):
        wide = np.linalg.norm(points[:, :2] - points[:, 2:4], axis=2).max(axis=1) > WIDEST_M
    unknown = wide | ~np.isfinite(points).all(axis=(1, 2))
    for values in (latitude, longitude, points):
        values[unknown] = np.nan
    sides = np.linalg.norm(points[:, [1, 3]] - points[:, :1], axis=2) / size[:, ::-1]
    return Footprints(latitude, longitude, points[:, :4], points[:, 4], sides.min(axis=1))


def from_earth_centre(latitude: Floats, longitude: Floats) -> Floats:
    """Places on the ellipsoid `(…, 3)`, in metres from the middle of the earth."""
    north, east = np.deg2rad(latitude), np.deg2rad(longitude)
    radius = SEMI_MAJOR_M / np.sqrt(1 - ECCENTRICITY2 * np.sin(north) ** 2)
    flat = radius * np.cos(north)
    return np.stack([flat * np.cos(east), flat * np.sin(east), radius * (1 - ECCENTRICITY2) * np.sin(north)], axis=-1)


def _flat(affines: ArrayLike, extents: ArrayLike) -> tuple[Floats, Floats]:
    """Row and column of the last two axes to x and y, `(row, 2, 3)`, and how many there are, `(row, 2)`.

    A series has a time axis besides, which has a world coordinate of its own; x and y are the two that rows and columns move.
    """
    size = np.asarray(extents, np.float64)
    axes = size.shape[1] if size.ndim == 2 else 2
    size = size.reshape(-1, axes)
    if axes == 1:  # a line lies nowhere
        return np.full((len(size), 2, 3), np.nan), np.ones((len(size), 2))
    matrices = np.asarray(affines, np.float64).reshape(len(size), axes + 1, axes + 1)
    moved = np.abs(matrices[:, :axes, axes - 2 : axes]).sum(axis=2)
    world = np.sort(np.argsort(-moved, axis=1, kind="stable")[:, :2], axis=1)
    rows = np.take_along_axis(matrices, world[:, :, None], axis=1)
    return rows[:, :, axes - 2 :], size[:, -2:]


def _by_frame(frames: ArrayLike, world: Floats) -> tuple[Floats, Floats]:
    """Latitude and longitude of places `(row, …, 2)`, each row in its own frame."""
    names = np.asarray(frames, dtype=object)
    latitude, longitude = np.full(world.shape[:-1], np.nan), np.full(world.shape[:-1], np.nan)
    for frame in sorted({str(name) for name in names}):
        chosen = np.flatnonzero(names == frame)
        latitude[chosen], longitude[chosen] = on_globe(frame, world[chosen, ..., 0], world[chosen, ..., 1])
    return latitude, longitude


def metres_apart(grid: Grid) -> tuple[float, ...]:
    """`Grid.spacing`, in the grid's unit; but steps in degrees as metres on the ground in the grid's middle."""
    if grid.unit != "degree" or len(grid.space) < 2:
        return grid.spacing
    flat, size = _flat(grid.matrix[None], np.array([grid.space]))
    longitude, latitude = flat[0, :, :2] @ ((size[0] - 1) / 2) + flat[0, :, 2]
    half = flat[0, :, :2].T / 2
    points = np.stack([np.array([longitude, latitude]) - half, np.array([longitude, latitude]) + half])
    ends = from_earth_centre(points[..., 1], points[..., 0])
    return *grid.spacing[:-2], *(float(step) for step in np.linalg.norm(ends[1] - ends[0], axis=1))
