"""Scenes that show the same ground are one group, whatever their CRS and sensor; and each has a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from rasterio.warp import transform_bounds

from modalities.grid import Grid
from modalities.raster_file import BROKEN
from modalities.scene import Scene

SHARED_GROUND = 0.05
"""Scenes that share more than this part of the smaller one's footprint show the same place."""


class Placed(Scene, Protocol):
    """A scene that is a frozen dataclass with the fields `name` and `group`, as those of all images are."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


S = TypeVar("S", bound=Placed)


def name_apart(scenes: Sequence[S], folder: Path) -> list[S]:
    """The scenes, those of one name renamed after their first file with its ending."""
    seen = Counter(scene.name for scene in scenes)
    full = [scene.name if seen[scene.name] == 1 else scene.files[0].relative_to(folder).as_posix() for scene in scenes]
    return [replace(scene, name=name, group=name) for scene, name in zip(scenes, full, strict=True)]


def group_by_place(scenes: Sequence[S]) -> list[S]:
    """The scenes with `group` set so that all that show the same ground share one, named after its first member.

    Two scenes show the same ground when their footprints share more than 5 % of the smaller one, which leaves
    neighbours with a common edge row apart. Footprints are compared in their own CRS where it is the same, else as
    boxes of longitude and latitude. A scene without a place is a group by itself.
    """
    order = sorted(scenes, key=lambda scene: scene.name)
    boxes: dict[Grid, int] = {}
    member = {scene.name: boxes.setdefault(scene.grid, len(boxes)) if scene.grid.frame else -1 for scene in order}
    grids = list(boxes)
    root = list(range(len(grids)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for one, other in _overlapping(grids):
        root[find(one)] = find(other)
    first: dict[int, str] = {}
    group = {name: first.setdefault(find(i), name) if i >= 0 else name for name, i in member.items()}
    return [replace(scene, group=group[scene.name]) for scene in scenes]


Box = tuple[float, float, float, float]
"""West, south, east, north."""


def _overlapping(grids: list[Grid]) -> Iterator[tuple[int, int]]:
    """Pairs of grids that share ground, by a sweep from west to east over their boxes on the globe."""
    own = [_footprint(grid) for grid in grids]
    globe = [(*turned, i) for i, grid in enumerate(grids) for turned in _on_globe(grid.frame, own[i])]
    active: list[tuple[float, float, float, float, int]] = []
    for west, south, east, north, i in sorted(globe):
        active = [box for box in active if box[2] > west]
        for box in active:
            j = box[4]
            alike = grids[i].frame == grids[j].frame and grids[i].unit != "degree"
            if j != i and (_shares(own[i], own[j]) if alike else _shares((west, south, east, north), box[:4])):
                yield i, j
        active.append((west, south, east, north, i))


def _footprint(grid: Grid) -> Box:
    rows, columns = grid.space
    corners = np.array([grid.world((row - 0.5, column - 0.5)) for row in (0, rows) for column in (0, columns)])
    (west, south), (east, north) = corners.min(axis=0), corners.max(axis=0)
    return float(west), float(south), float(east), float(north)


def _on_globe(frame: str, box: Box) -> list[Box]:
    """The box in longitude and latitude, beginning within -180 … 180, once more 360° to the west where it crosses the date line.

    Empty where it has none.
    """
    try:
        west, south, east, north = transform_bounds(frame, "EPSG:4326", *box)
    except BROKEN:
        return []
    if not np.isfinite([west, south, east, north]).all():
        return []
    turn = 360.0 * np.floor((west + 180) / 360)
    west, east = west - turn, east - turn + (360.0 if east < west else 0.0)
    return [(west, south, east, north)] + ([(west - 360, south, east - 360, north)] if east > 180 else [])


def _shares(one: Box, other: Box) -> bool:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width > 0 and height > 0 and width * height > SHARED_GROUND * smaller
