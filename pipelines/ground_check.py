"""A last look at a split, by other means than it was made: how near training tiles come to held-out ones on the ground.

Candidates come from a tree of centres and distances from corners to sides, in the plane that touches the earth halfway between two tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from modalities.ground import Footprints, from_earth_centre
from pipelines.ground_split import SHARED_EDGE, SHARED_SLACK, Sided
from pipelines.tiling_plan import PreparationError, SplitSettings

PORTION = 1 << 15
"""Tiles, or pairs of tiles, that are looked at together."""

BELOW = {"test": ("val", "train"), "val": ("train",)}
"""The sides that must keep away from a side."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Nearest:
    """The two tiles of two sets that come nearest: their rows and the metres between them, 0 where they overlap."""

    distance_m: float
    ours: int
    theirs: int


def refuse_shared_ground(new: Sided, earlier: Sided | None, split: SplitSettings) -> list[str]:
    """What is to be told of tiles that come near to the other side; pairs that an earlier store holds already are not looked at.

    Raises:
        PreparationError: A tile is nearer to one of a side that it must keep away from than the buffer, or shares ground with it.
    """
    shared = SHARED_EDGE if split.unit == "scene" else SHARED_SLACK
    notes = []
    for held, others in BELOW.items():
        pairs = [(new.on((held,)), new.on(others))]
        if earlier is not None:
            pairs += [(new.on((held,)), earlier.on(others)), (earlier.on((held,)), new.on(others))]
        for ours, theirs in pairs:
            found = nearest(ours.prints, theirs.prints, split.buffer_m, shared)
            if found is not None:
                place = ours.prints.latitude[found.ours, 4], ours.prints.longitude[found.ours, 4]
                raise PreparationError(
                    f"a {theirs.sides[found.theirs]} tile lies {found.distance_m:.1f} m from a {held} tile at latitude {place[0]:.5f}, "
                    f"longitude {place[1]:.5f}, prepare.split.buffer_m asks for {split.buffer_m:g}: the split leaks, and no store is "
                    "written. This is a fault of the splitting itself; please report it with the settings, and use prepare.split.unit=scene"
                )
            if split.buffer_m == 0 and shared > 1 and nearest(ours.prints, theirs.prints, 0.0, SHARED_SLACK) is not None:
                sides = f"{theirs.sides[0]} and {held}"
                notes.append(
                    f"{sides} tiles of neighbouring scenes share an edge of up to one voxel; prepare.split.buffer_m keeps them apart"
                )
    return notes


def nearest(ours: Footprints, theirs: Footprints, reach_m: float, shared_voxels: float = 0.0) -> Nearest | None:
    """The pair of tiles that lies nearest on the ground, of those that are nearer than `reach_m` or overlap; None if there is none.

    Args:
        ours, theirs: Footprints; those without a place are left out.
        reach_m: Metres; with 0, only overlaps are looked for.
        shared_voxels: Voxels by which tiles may overlap before it counts, with a reach of 0.
    """
    best: Nearest | None = None
    for i, j in _pairs(ours, theirs, reach_m):
        for start in range(0, len(i), PORTION):
            one, other = i[start : start + PORTION], j[start : start + PORTION]
            flat = _flattened(ours, one, theirs, other)
            if reach_m == 0:
                voxel = np.minimum(ours.voxel_m[one], theirs.voxel_m[other])
                flat = _shrunk(flat[0], shared_voxels * voxel), _shrunk(flat[1], shared_voxels * voxel)
            distance = distances(*flat)
            place = int(np.argmin(distance)) if len(distance) else 0
            close = len(distance) > 0 and (distance[place] < reach_m or distance[place] == 0)
            if close and (best is None or distance[place] < best.distance_m):
                best = Nearest(float(distance[place]), int(one[place]), int(other[place]))
    return best


def distances(ours: Floats, theirs: Floats) -> Floats:
    """Distance between pairs of convex quadrilaterals `(pair, 4, 2)`; 0 where they overlap."""
    apart = np.minimum(_to_sides(ours, theirs), _to_sides(theirs, ours))
    meet = _inside(ours, theirs) | _inside(theirs, ours) | _crossing(ours, theirs)
    return np.asarray(np.where(meet, 0.0, apart))


def _pairs(ours: Footprints, theirs: Footprints, reach_m: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of ours and theirs whose centres are near enough; large tiles apart from small ones."""
    radius, their_radius = (np.linalg.norm(prints.corners - prints.centre[:, None], axis=2).max(axis=1) for prints in (ours, theirs))
    for large in _by_size(their_radius):
        tree = cKDTree(theirs.centre[large])
        for small in _by_size(radius):
            reach = 1.01 * (radius[small].max() + their_radius[large].max() + reach_m) + 1
            for start in range(0, len(small), PORTION):
                part = small[start : start + PORTION]
                found = tree.query_ball_point(ours.centre[part], reach, return_sorted=True)
                counts = np.fromiter(map(len, found), np.int64, len(found))
                if counts.any():
                    yield np.repeat(part, counts), large[np.concatenate([np.asarray(row, np.int64) for row in found if row])]


def _by_size(radius: Floats) -> Iterator[NDArray[np.int64]]:
    placed = np.isfinite(radius)
    classes = np.where(placed, np.log2(np.maximum(np.where(placed, radius, 1), 1)).astype(int), -1)
    for size in np.unique(classes[placed]):
        yield np.flatnonzero(classes == size)


def _flattened(ours: Footprints, one: NDArray[np.int64], theirs: Footprints, other: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Corners of pairs of tiles in the plane that touches the earth between them, in metres."""
    middle = ours.centre[one] + theirs.centre[other]
    up = middle / np.linalg.norm(middle, axis=1, keepdims=True)
    helper = np.eye(3)[np.abs(up).argmin(axis=1)]
    first = helper - (helper * up).sum(axis=1, keepdims=True) * up
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(up, first)
    flat = []
    for prints, rows in ((ours, one), (theirs, other)):
        points = from_earth_centre(prints.latitude[rows, :4], prints.longitude[rows, :4]) - middle[:, None] / 2
        flat.append(np.stack([(points * axis[:, None]).sum(axis=2) for axis in (first, second)], axis=2))
    return flat[0], flat[1]


def _shrunk(corners: Floats, by_m: Floats) -> Floats:
    """Quadrilaterals whose sides are drawn in by at least so much, and a little more for sides that are no straight lines."""
    middle = corners.mean(axis=1, keepdims=True)
    sides = np.linalg.norm(np.roll(corners, -1, axis=1) - corners, axis=2)
    half = np.maximum(sides.min(axis=1) / 2, 1e-9)
    bulge = 4e-4 * sides.max(axis=1) + sides.max(axis=1) ** 2 / 6.371e6 * 10
    kept: Floats = np.clip(1 - (by_m + bulge) / half, 0, 1)[:, None, None]
    return np.asarray(middle + (corners - middle) * kept)


def _to_sides(points: Floats, around: Floats) -> Floats:
    """Shortest way from any corner of the one to any side of the other."""
    side = np.roll(around, -1, axis=1) - around
    way = points[:, :, None] - around[:, None]
    along = (way * side[:, None]).sum(axis=3) / np.maximum((side**2).sum(axis=2), 1e-12)[:, None]
    foot = way - np.clip(along, 0, 1)[..., None] * side[:, None]
    shortest: Floats = np.sqrt((foot**2).sum(axis=3).min(axis=(1, 2)))
    return shortest


def _inside(points: Floats, around: Floats) -> NDArray[np.bool_]:
    """True where any corner of the one, or its middle, lies within the other."""
    points = np.concatenate([points, points.mean(axis=1, keepdims=True)], axis=1)
    side = np.roll(around, -1, axis=1) - around
    turn = _turn(side[:, None], points[:, :, None] - around[:, None])
    within: NDArray[np.bool_] = np.asarray((turn > 0).all(axis=2) | (turn < 0).all(axis=2))
    return np.asarray(np.any(within, axis=1))


def _crossing(ours: Floats, theirs: Floats) -> NDArray[np.bool_]:
    """True where a side of the one crosses a side of the other."""
    a, b = ours[:, :, None], np.roll(ours, -1, axis=1)[:, :, None]
    c, d = theirs[:, None], np.roll(theirs, -1, axis=1)[:, None]
    split = (_turn(b - a, c - a) * _turn(b - a, d - a) < 0) & (_turn(d - c, a - c) * _turn(d - c, b - c) < 0)
    return np.asarray(split.any(axis=(1, 2)))


def _turn(one: Floats, other: Floats) -> Floats:
    turn: Floats = one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0]
    return turn
