"""Polygons and points on the pixels of an image: read from well-known binary, carried to its grid, burnt block by block."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.features import rasterize

from modalities.grid import Grid, Window
from modalities.label_raster import carry
from modalities.raster_file import same_frame
from modalities.scene import SceneError

POINT, POLYGON, COLLECTIONS = 1, 3, (4, 6, 7)
"""Kinds of well-known binary (OGC 06-103r4, 8.2): points, polygons, and what holds several of them."""

FINEST = 2.0**16
"""Corners are kept to 1/65536 of a pixel, so that moving them by whole pixels into a block loses nothing."""

BENT = 0.1
"""Pixels by which a straight edge of the file may miss its way in the image's CRS before it gets a corner more."""

ROUNDS = 12
CIRCLE = 64
"""Corners of the disc around a point."""


class ShapeError(ValueError):
    """A geometry cannot be drawn; its argument is what it is, in words that can be counted."""


@dataclass(frozen=True, eq=False)
class Shapes:
    """Parts (points and polygons) of many features, flat, so that all corners are carried at once.

    Attributes:
        corners: `(corner, 2)`, x and y.
        ring_starts: First corner of each ring, and the number of corners.
        ring_part: Part that each ring belongs to, rising; the first ring of a polygon is its outline.
        part_feature: Feature that each part belongs to.
        part_is_point: True for points, whose one ring is one corner.
    """

    corners: NDArray[np.float64]
    ring_starts: NDArray[np.int64]
    ring_part: NDArray[np.int64]
    part_feature: NDArray[np.int64]
    part_is_point: NDArray[np.bool_]

    @cached_property
    def boxes(self) -> NDArray[np.float64]:
        """Least x, least y, greatest x, greatest y of each part, `(part, 4)`."""
        if not len(self.part_feature):
            return np.zeros((0, 4))
        starts = self.ring_starts[np.searchsorted(self.ring_part, np.arange(len(self.part_feature)))]
        least, greatest = (how.reduceat(self.corners, starts) for how in (np.minimum, np.maximum))
        return np.concatenate([least, greatest], axis=1)

    def only(self, kept: NDArray[np.bool_]) -> Shapes:
        """The parts for which `kept` is true."""
        rings = kept[self.ring_part]
        lengths = np.diff(self.ring_starts)
        number = np.cumsum(kept) - 1
        return Shapes(
            self.corners[np.repeat(rings, lengths)],
            np.concatenate([[0], np.cumsum(lengths[rings])]).astype(np.int64),
            number[self.ring_part[rings]],
            self.part_feature[kept],
            self.part_is_point[kept],
        )


def parse(geometries: Sequence[bytes | None]) -> tuple[Shapes, dict[str, int]]:
    """The parts of geometries in well-known binary, and how many geometries cannot be drawn, by what they are."""
    rings: list[NDArray[np.float64]] = []
    ring_part: list[int] = []
    part_feature: list[int] = []
    is_point: list[bool] = []
    refused: dict[str, int] = {}
    for feature, geometry in enumerate(geometries):
        try:
            parts = list(_parts(geometry or b""))
        except ShapeError as error:
            refused[str(error)] = refused.get(str(error), 0) + 1
            continue
        for point, own in parts:
            ring_part += [len(part_feature)] * len(own)
            rings += own
            part_feature.append(feature)
            is_point.append(point)
    corners = np.concatenate(rings) if rings else np.zeros((0, 2))
    starts = np.concatenate([[0], np.cumsum([len(ring) for ring in rings])]).astype(np.int64)
    of_ring, of_part = np.array(ring_part, dtype=np.int64), np.array(part_feature, dtype=np.int64)
    return Shapes(corners, starts, of_ring, of_part, np.array(is_point, dtype=bool)), refused


def _parts(geometry: bytes) -> Iterator[tuple[bool, list[NDArray[np.float64]]]]:
    """Whether it is a point, and its rings, of every part of a geometry in two dimensions."""
    place = 0

    def number() -> int:
        nonlocal place
        place += 4
        return int(struct.unpack_from("<I" if little else ">I", geometry, place - 4)[0])

    def corners(count: int) -> NDArray[np.float64]:
        nonlocal place
        found = np.frombuffer(geometry, "<f8" if little else ">f8", 2 * count, place).reshape(count, 2).astype(np.float64)
        place += 16 * count
        return found

    left, found_any = 1 if geometry else 0, False
    while left:
        left -= 1
        little = geometry[place] == 1
        place += 1
        kind = number()
        if kind in COLLECTIONS:
            left += number()
            continue
        if kind not in (POINT, POLYGON):
            raise ShapeError("neither polygon nor point" if kind in (2, 5) else "curved or of several dimensions")
        rings = [corners(1)] if kind == POINT else [corners(number()) for _ in range(number())]
        if not rings or not len(rings[0]) or np.isnan(rings[0]).all():
            continue
        if not all(np.isfinite(ring).all() for ring in rings):
            raise ShapeError("not finite")
        if kind == POLYGON and _area(rings[0]) == 0:
            raise ShapeError("a polygon without area")
        found_any = True
        yield kind == POINT, [ring for ring in rings if len(ring)]
    if not found_any:
        raise ShapeError("empty")


def _area(ring: NDArray[np.float64]) -> float:
    x, y = (ring - ring[0]).T
    return abs(float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])))


def on_grid(shapes: Shapes, frame: str, grid: Grid, radius_m: float) -> Shapes:
    """The parts in pixels of a grid, x before y from its outer corner; what the grid's CRS does not reach is left out.

    An edge that is straight in the file's CRS is bent in another one; it gets corners until it is right to 0.1 pixels. Around each
    point lies a disc of `radius_m`.
    """
    away = not same_frame(frame, grid.frame)

    def to_pixels(corners: NDArray[np.float64]) -> NDArray[np.float64]:
        world = carry(frame, grid.frame, *corners.T) if away else corners.T
        matrix = grid.matrix
        with np.errstate(invalid="ignore"):
            index = np.linalg.inv(matrix[:2, :2]) @ (world - matrix[:2, 2:])
        return np.round((index[::-1].T + 0.5) * FINEST) / FINEST

    pixels = to_pixels(shapes.corners)
    for _ in range(ROUNDS if away else 0):
        inner = np.ones(len(pixels) - 1, dtype=bool)
        inner[shapes.ring_starts[1:-1] - 1] = False
        first = np.flatnonzero(inner)
        middle = (shapes.corners[first] + shapes.corners[first + 1]) / 2
        exact = to_pixels(middle)
        with np.errstate(invalid="ignore"):
            bent = np.abs(exact - (pixels[first] + pixels[first + 1]) / 2).max(axis=1, initial=0) > BENT
        bent &= np.isfinite(exact).all(axis=1)
        if not bent.any():
            break
        after = first[bent] + 1
        pixels = np.insert(pixels, after, exact[bent], axis=0)
        starts = shapes.ring_starts + np.searchsorted(after, shapes.ring_starts, side="right")
        corners = np.insert(shapes.corners, after, middle[bent], axis=0)
        shapes = Shapes(corners, starts, shapes.ring_part, shapes.part_feature, shapes.part_is_point)
    reached = np.ones(len(shapes.part_feature), dtype=bool)
    reached[np.repeat(shapes.ring_part, np.diff(shapes.ring_starts))[~np.isfinite(pixels).all(axis=1)]] = False
    found = Shapes(pixels, shapes.ring_starts, shapes.ring_part, shapes.part_feature, shapes.part_is_point).only(reached)
    return _with_discs(found, grid, radius_m) if radius_m and found.part_is_point.any() else found


def metres_per_unit(grid: Grid) -> NDArray[np.float64]:
    """Metres along x and y of one unit of a grid's CRS, for degrees at its middle latitude (GRS 80, to some centimetres in 100 m).

    Raises:
        SceneError: The grid has no CRS.
    """
    if not grid.frame:
        raise SceneError("the image has no CRS, so nobody knows how many metres a pixel has; give label_options.radius_m=0")
    crs = CRS.from_user_input(grid.frame)
    if not crs.is_geographic:
        return np.full(2, crs.linear_units_factor[1], dtype=np.float64)
    latitude = np.deg2rad(grid.world(tuple((size - 1) / 2 for size in grid.space))[1])
    along_x = 111412.84 * np.cos(latitude) - 93.5 * np.cos(3 * latitude)
    return np.array([along_x, 111132.92 - 559.82 * np.cos(2 * latitude) + 1.175 * np.cos(4 * latitude)])


def _with_discs(shapes: Shapes, grid: Grid, radius_m: float) -> Shapes:
    """Every point followed by a disc around it; the point stays, so that a disc between pixel centres is not lost."""
    turn = 2 * np.pi * np.arange(CIRCLE + 1) / CIRCLE
    # The polygon has the area of the circle.
    radius = radius_m * np.sqrt(2 * np.pi / CIRCLE / np.sin(2 * np.pi / CIRCLE))
    world = radius * np.stack([np.cos(turn), np.sin(turn)]) / metres_per_unit(grid)[:, None]
    ring = np.round((np.linalg.inv(grid.matrix[:2, :2]) @ world)[::-1].T * FINEST) / FINEST
    rings: list[NDArray[np.float64]] = []
    ring_part: list[int] = []
    feature: list[int] = []
    is_point: list[bool] = []
    for number, (start, stop, part) in enumerate(zip(shapes.ring_starts, shapes.ring_starts[1:], shapes.ring_part, strict=False)):
        corners, point = shapes.corners[start:stop], bool(shapes.part_is_point[part])
        if not number or part != shapes.ring_part[number - 1]:
            feature.append(int(shapes.part_feature[part]))
            is_point.append(point)
        rings.append(corners)
        ring_part.append(len(feature) - 1)
        if point:
            feature.append(feature[-1])
            is_point.append(False)
            rings.append(corners + ring)
            ring_part.append(len(feature) - 1)
    starts = np.concatenate([[0], np.cumsum([len(own) for own in rings])]).astype(np.int64)
    return Shapes(np.concatenate(rings), starts, np.array(ring_part), np.array(feature), np.array(is_point))


def burn(
    shapes: Shapes, values: NDArray[np.int64], window: Window, empty: int, *, all_touched: bool, by_value: int = 0
) -> NDArray[np.int32]:
    """Value of the last feature that covers each pixel of a window, `empty` where none does.

    Args:
        shapes: In pixels of the grid that the window is of.
        values: Of each feature; a later feature lies on top.
        window: Rows and columns.
        empty: Value of what is not covered.
        all_touched: Whether a polygon covers every pixel that it touches, or those whose centre lies in it. A point covers its pixel.
        by_value: 1 for the highest value in place of the last one, -1 for the lowest.
    """
    rows, columns = window
    size = (rows.stop - rows.start, columns.stop - columns.start)
    left, top, right, bottom = shapes.boxes.T
    near = (left <= columns.stop) & (right >= columns.start) & (top <= rows.stop) & (bottom >= rows.start)
    if not near.any():
        return np.full(size, empty, np.int32)
    found: Iterable[tuple[dict[str, Any], int]] = _geometries(shapes.only(near), values, (columns.start, rows.start))
    if by_value:
        found = sorted(found, key=lambda pair: by_value * pair[1])
    return np.asarray(rasterize(found, size, empty, all_touched=all_touched, dtype="int32"))


def _geometries(shapes: Shapes, values: NDArray[np.int64], origin: tuple[int, int]) -> Iterator[tuple[dict[str, Any], int]]:
    corners = shapes.corners - np.array(origin)
    first = np.searchsorted(shapes.ring_part, np.arange(len(shapes.part_feature) + 1))
    for part, (feature, point) in enumerate(zip(shapes.part_feature, shapes.part_is_point, strict=True)):
        starts = shapes.ring_starts[first[part] : first[part + 1] + 1]
        rings = [corners[start:stop].tolist() for start, stop in pairwise(starts)]
        kind, places = ("Point", rings[0][0]) if point else ("Polygon", rings)
        yield {"type": kind, "coordinates": places}, int(values[feature])
