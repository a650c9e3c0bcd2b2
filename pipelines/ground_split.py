"""What lies together on the ground stays on one side: blocks of the globe, named regions, and who is too near to whom.

Blocks are squares of one lattice for all scenes, whatever their CRS or zone: rows of equal height from pole to pole, each cut into as
many equal parts as keep a part as wide as it is high in the row's middle (a sinusoidal lattice). So a place has the same block in every
projection, a row closes at the date line, and a pole lies in a row like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.ground import Footprints, footprints
from pipelines.tiling_plan import Ground, SplitSettings, overlapping

SIDES = ("test", "val", "train")
"""Sides of the split; a tile that is too near to one of an earlier side is left out."""

HALF_TURN_KM = 20_015.1
"""From pole to pole, on a sphere of 6371 km."""

SMALLEST_DEGREE = 1e-7
"""Places are rounded to a centimetre before they get a block, so that the last bit of a projection decides nothing."""

SHARED_EDGE = 1.01
"""Voxels by which tiles of scenes that are held out whole may overlap, where no buffer is asked for: products of one series share an
edge row with their neighbours."""

SHARED_SLACK = 0.01
"""The same for blocks, whose tiles share nothing but rounding."""

EARTH_M = 6.371e6
MOST_PAIRS = 1 << 20
Booleans = NDArray[np.bool_]


def block_names(latitude: NDArray[np.float64], longitude: NDArray[np.float64], block_km: float) -> list[str]:
    """The block of each place, `ground 10 km 1530-212`; places without a latitude get an empty name."""
    known = np.isfinite(latitude) & np.isfinite(longitude)
    north, east = (np.rint(np.where(known, values, 0) / SMALLEST_DEGREE) * SMALLEST_DEGREE for values in (latitude, longitude))
    num_rows = max(1, round(HALF_TURN_KM / block_km))
    row = np.clip(np.floor((north + 90) / 180 * num_rows), 0, num_rows - 1).astype(np.int64)
    middle = np.deg2rad((row + 0.5) / num_rows * 180 - 90)
    num_columns = np.maximum(1, np.rint(2 * num_rows * np.cos(middle))).astype(np.int64)
    column = np.floor((east + 180) / 360 * num_columns).astype(np.int64) % num_columns
    return [f"ground {block_km:g} km {i}-{j}" if there else "" for i, j, there in zip(row, column, known, strict=True)]


def region_names(scenes: Sequence[str], prints: Footprints, regions: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """The named region that each tile is of, the first that fits; empty where none does.

    A tile is of a box when its footprint reaches into it, so that nothing of the box is on any other side.
    """
    found = np.full(len(scenes), "", dtype=object)
    for name, region in regions.items():
        if isinstance(region[0], str):
            matches = {scene: any(fnmatchcase(scene, pattern) for pattern in region) for scene in set(scenes)}
            inside = np.array([matches[scene] for scene in scenes], dtype=bool)
        else:
            inside = _reaches(prints, *region)
        found[inside & (found == "")] = name
    return found.tolist()


def _reaches(prints: Footprints, west: float, south: float, east: float, north: float) -> Booleans:
    """True for each footprint that shares ground with a box; one around a pole reaches every longitude."""
    placed = prints.placed
    middle = prints.longitude[:, 4:]
    way = np.where(placed[:, None], (prints.longitude - middle + 180) % 360 - 180, 0)
    low, high = way.min(axis=1), way.max(axis=1)
    polar = high - low > 180
    top, bottom = prints.latitude.max(axis=1), prints.latitude.min(axis=1)
    top, bottom = np.where(polar & (top > 0), 90, top), np.where(polar & (top < 0), -90, bottom)
    width = (east - west) % 360 or 360.0
    start = (middle[:, 0] + low - west) % 360  # where the footprint begins, counted from the box's western edge
    across = polar | (start < width) | (start + high - low > 360)
    return np.asarray(placed & across & (bottom < north) & (top > south))


@dataclass(frozen=True, eq=False)
class Sided:
    """Tiles, where they lie, and the side that each is on.

    Attributes:
        ground: In the coordinates of their own frames.
        prints: On the globe.
        sides: `test`, `val` or `train`.
    """

    ground: Ground
    prints: Footprints
    sides: NDArray[np.object_]

    @staticmethod
    def of(ground: Ground, sides: Sequence[str]) -> Sided:
        """Of tiles whose footprints are to be found."""
        return Sided(ground, footprints(ground.frames, ground.affines, ground.extents), np.array(sides, dtype=object))

    def rows(self, chosen: NDArray[np.int64] | Booleans) -> Sided:
        """Some of them."""
        return Sided(self.ground.rows(chosen), self.prints.rows(chosen), self.sides[chosen])

    def on(self, sides: Sequence[str]) -> Sided:
        """Those of some sides."""
        return self.rows(np.isin(self.sides.astype(str), sides))


def leaks(new: Sided, earlier: Sided | None, split: SplitSettings) -> tuple[Booleans, Booleans]:
    """True for each new tile that is too near to a held-out one, and for each that would be held out too near to an earlier other.

    Held out comes before trained on, and a named region before both; what an earlier store holds comes before all that is new.
    """
    near_held, near_earlier = np.zeros(len(new.sides), bool), np.zeros(len(new.sides), bool)
    for place, side in enumerate(SIDES):
        ours = np.flatnonzero(new.sides == side)
        if earlier is not None and place < len(SIDES) - 1:
            near_earlier[ours] = _near(new.rows(ours), earlier.on(SIDES[place + 1 :]), split)
        ours = ours[~near_earlier[ours]]
        kept = new.rows(~near_held & ~near_earlier).on(SIDES[:place])
        for theirs in (kept, *(() if earlier is None else (earlier.on(SIDES[:place]),))):
            near_held[ours] |= _near(new.rows(ours), theirs, split)
    return near_held, near_earlier


def _near(ours: Sided, theirs: Sided, split: SplitSettings) -> Booleans:
    if not len(ours.sides) or not len(theirs.sides):
        return np.zeros(len(ours.sides), bool)
    shared = SHARED_EDGE if split.unit == "scene" else SHARED_SLACK
    near = too_near(ours.prints, theirs.prints, split.buffer_m, shared)
    return near | overlapping(ours.ground, theirs.ground) if split.unit == "block" else near


def too_near(ours: Footprints, theirs: Footprints, buffer_m: float, shared_voxels: float) -> Booleans:
    """True for each of our tiles that lies nearer than the buffer to one of theirs; tiles without a place are near to nothing.

    Distances are taken as a little too short rather than too long: along the sides of the footprints in a plane that touches the earth,
    so that a corner that points at another counts as its larger coordinate, and with an allowance for sides that are no straight lines.

    Args:
        ours, theirs: Footprints.
        buffer_m: Metres; with 0, tiles are too near where they overlap.
        shared_voxels: Voxels by which they may overlap, with a buffer of 0.
    """
    near = np.zeros(len(ours.voxel_m), bool)
    mine, places = _distinct(ours)
    others, _ = _distinct(theirs)
    hit = np.zeros(len(mine), bool)
    own, other = ours.rows(mine), theirs.rows(others)
    radius, their_radius = _radius(own), _radius(other)
    slack, their_slack = _slack(own, radius), _slack(other, their_radius)
    for i, j in _candidates(own.centre, radius, other.centre, their_radius, buffer_m, hit):
        gap = _gap(own.corners[i], other.corners[j], own.centre[i])
        allowed = slack[i] + their_slack[j]
        limit = buffer_m + allowed if buffer_m else -(allowed + shared_voxels * np.minimum(own.voxel_m[i], other.voxel_m[j]))
        hit[i[gap < limit]] = True
    near[ours.placed] = hit[places]
    return near


def _distinct(prints: Footprints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A row of each footprint, and for every row that has a place, which of them is its: all dates of a scene have the same."""
    placed = np.flatnonzero(prints.placed)
    keys = np.ascontiguousarray(prints.corners[placed].reshape(len(placed), 12).round(3))
    _, first, inverse = np.unique(keys.view([("", keys.dtype)] * 12).ravel(), return_index=True, return_inverse=True)
    return placed[first].astype(np.int64), inverse.astype(np.int64)


def _radius(prints: Footprints) -> NDArray[np.float64]:
    radius: NDArray[np.float64] = np.linalg.norm(prints.corners - prints.centre[:, None], axis=2).max(axis=1, initial=0.0)
    return radius


def _slack(prints: Footprints, radius: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much the sides of a footprint may differ from straight lines: most for a parallel near a pole."""
    steep = np.minimum(np.abs(np.tan(np.deg2rad(prints.latitude[:, 4]))), 20)
    slack: NDArray[np.float64] = 1e-4 * radius + radius**2 / (2 * EARTH_M) * (steep + 0.1)
    return slack


def _candidates(
    ours: NDArray[np.float64],
    radius: NDArray[np.float64],
    theirs: NDArray[np.float64],
    their_radius: NDArray[np.float64],
    buffer_m: float,
    hit: Booleans,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs that may be too near, a part at a time; ours whose middle is nearer than the buffer are hit, and hit ones looked at no more.

    Places are sorted into cubes as wide as two tiles can reach, and only neighbouring cubes are compared; tiles of very different sizes
    apart from each other, so that few large ones do not make all cubes large.
    """
    classes, their_classes = (np.floor(np.log2(np.maximum(sizes, 1))).astype(int) for sizes in (radius, their_radius))
    for size, other in product(np.unique(classes), np.unique(their_classes)):
        here, there = np.flatnonzero(classes == size), np.flatnonzero(their_classes == other)
        cell = 1.01 * (radius[here].max() + their_radius[there].max() + buffer_m) + 16
        mine, other_keys = np.floor(ours[here] / cell).astype(np.int64), _cube(np.floor(theirs[there] / cell).astype(np.int64))
        order = np.argsort(other_keys, kind="stable")
        for step in sorted(product((-1, 0, 1), repeat=3), key=lambda step: sum(map(abs, step))):
            left = np.flatnonzero(~hit[here])
            keys = _cube(mine[left] + np.array(step))
            first, after = (np.searchsorted(other_keys[order], keys, side=side) for side in ("left", "right"))
            for low, high in _portions(after - first):
                counts = (after - first)[low:high]
                i = np.repeat(here[left[low:high]], counts)
                within = np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
                j = there[order[np.repeat(first[low:high], counts) + within]]
                apart = np.linalg.norm(ours[i] - theirs[j], axis=1)
                hit[i[apart < buffer_m]] = True
                close = (apart < (radius[i] + their_radius[j] + buffer_m) * 1.01 + 1) & ~hit[i]
                yield i[close], j[close]


def _cube(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each cube."""
    keys: NDArray[np.int64] = ((index[:, 0] + (1 << 20)) << 42) + ((index[:, 1] + (1 << 20)) << 21) + (index[:, 2] + (1 << 20))
    return keys


def _portions(counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that have about `MOST_PAIRS` pairs together."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts) and ends[-1] > (ends[start - 1] if start else 0):
        stop = max(start + 1, int(np.searchsorted(ends, (ends[start - 1] if start else 0) + MOST_PAIRS)))
        yield start, stop
        start = stop


def _gap(ours: NDArray[np.float64], theirs: NDArray[np.float64], middle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metres between footprints along the side that separates them best, in the plane that touches the earth at `middle`.

    It is never more than their distance; below zero they overlap, by so much.
    """
    up = middle / np.linalg.norm(middle, axis=1, keepdims=True)
    aside = np.cross(up, np.where(np.abs(up[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]]))
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    plane = np.stack([aside, np.cross(up, aside)], axis=1)
    flat = [np.einsum("pij,pkj->pki", plane, corners - middle[:, None]) for corners in (ours, theirs)]
    sides = np.concatenate([np.roll(corners, -1, axis=1) - corners for corners in flat], axis=1)
    across = np.stack([-sides[..., 1], sides[..., 0]], axis=-1)
    across /= np.maximum(np.linalg.norm(across, axis=2, keepdims=True), 1e-9)
    one, other = (np.einsum("psi,pki->psk", across, corners) for corners in flat)
    gaps = np.maximum(other.min(axis=2) - one.max(axis=2), one.min(axis=2) - other.max(axis=2))
    gap: NDArray[np.float64] = gaps.max(axis=1)
    return gap
