"""Where tiles lie, which shard holds them and which side of the split they are on: plain functions, no file is touched."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise, product
from math import lcm, prod
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from mae_core.settings import Settings
from modalities.grid import Grid, Window
from modalities.scene import Scene
from pipelines.region_plan import AxisTile, Regions, budget, cut_regions

OVERLAP_SLACK = 0.01
"""Voxels by which a tile's box is drawn in before two are compared, so that neighbours do not meet by rounding."""


class PreparationError(RuntimeError):
    """A tile store cannot be prepared. The message says where, what came, what was wanted and what to do."""


class SplitSettings(Settings):
    """How tiles are held out: whole groups, or blocks of neighbouring tiles for few big scenes."""

    unit: Literal["scene", "block", "ground"] = Field(
        "scene",
        description="What is not divided: a scene's group (patient, place), a block of it, or a square on the ground with all scenes in it",
    )
    val_fraction: float = Field(0.1, ge=0, lt=1, description="Share of the tiles that is held out at least; 0 holds out nothing")
    block_tiles: int = Field(4, ge=1, description="Side of a block in tiles, for unit=block")
    block_km: float = Field(10.0, gt=0, le=2000, description="Side of a square on the ground, for unit=ground")
    buffer_m: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Metres on the ground that lie between training and held-out tiles at least; nearer ones are left out",
    )
    regions: dict[str, tuple[float, float, float, float] | tuple[str, ...]] = Field(
        {},
        description="Held out whole as the side `test`, by a name of their own: [west, south, east, north] in degrees, or globs of "
        "scenes' names",
    )
    seed: int = Field(0, description="Draws which groups are held out")
    hold_out_first: tuple[str, ...] = Field((), description="Groups, by pseudonym or name, that are held out before all others are drawn")
    never_hold_out: tuple[str, ...] = Field((), description="Groups that are held out only where there are no others")
    file: Path | None = Field(
        None,
        description="A frozen split, made by `store split` or `catalogue --split`: which groups are on which side; nothing is "
        "drawn then (unit=scene only)",
    )
    unknown: Literal["refuse", "train"] = Field("refuse", description="What becomes of groups that the frozen split does not know")

    @model_validator(mode="after")
    def _frozen_alone(self) -> Self:
        if self.file is not None and (self.unit != "scene" or self.regions or self.hold_out_first or self.never_hold_out):
            raise ValueError("file says the side of whole groups: leave out unit, regions, hold_out_first and never_hold_out")
        return self

    @field_validator("regions")
    @classmethod
    def _boxes(cls, regions: dict[str, Any]) -> dict[str, Any]:
        for name, region in regions.items():
            if not region or not name.strip():
                raise ValueError(f"region {name!r} is empty; give [west, south, east, north] or globs of scenes' names")
            if isinstance(region[0], str):
                continue
            west, south, east, north = region
            if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90) or west == east:
                raise ValueError(
                    f"region {name} is {list(region)}; give [west, south, east, north] in degrees, south below north "
                    "(west may lie east of east, where a box crosses the date line)"
                )
        return regions

    def document(self) -> dict[str, Any]:
        """The settings for a plan; what came later is left out at its default, so that stores from before it can still grow."""
        later = {"block_km", "buffer_m", "regions", "hold_out_first", "never_hold_out", "unknown"}
        found = self.model_dump(mode="json", exclude={"file"})  # a path is nobody's business; what it holds is told by its digest
        return {key: value for key, value in found.items() if key not in later or value != type(self).model_fields[key].default}


@dataclass(frozen=True)
class PlannedTile:
    """A place where a tile may be written.

    Attributes:
        tile: Stable id: rises in the order of scene names, then of regions, then of rows; not every number is taken.
        scene: Position of its scene in the sorted scenes.
        region: Number of the box of tiles that it is read with, counted over all scenes.
        block: Index of its block on the scene's tile lattice, for `unit: block`.
        origin: First voxel per axis.
        extent: Real data per axis; smaller than the tile where the scene is.
        owned: Leading part of the extent that no later tile repeats.
    """

    tile: int
    scene: int
    region: int
    block: tuple[int, ...]
    origin: tuple[int, ...]
    extent: tuple[int, ...]
    owned: tuple[int, ...]

    @property
    def window(self) -> Window:
        """The real data as a window of the scene."""
        return tuple(slice(start, start + size) for start, size in zip(self.origin, self.extent, strict=True))


def tile_axis(size: int, tile: int, *, disjoint: bool = False, step: int = 1) -> list[AxisTile]:
    """Origin, extent and owned size of each tile along an axis: as few tiles as cover it, at multiples of the tile size.

    The last one is moved back to end at the edge and repeats a part of the one before; where tiles are `disjoint` it is shorter
    instead and padded later, and if less than half a tile were left for it, the last two share what is left evenly: a sliver is
    all padding. An axis shorter than a tile has one tile, which is padded. Owned parts follow one another without gap or overlap.
    All edges lie at multiples of `step`, which the tile size is one of; voxels behind the last multiple are in no tile.
    """
    size = size // step * step or size
    if size <= tile:
        return [(0, size, size)]
    edges = [*range(0, size, tile), size]
    if disjoint and 2 * (size - edges[-2]) < tile:
        edges[-2] = -(-(edges[-3] + size) // (2 * step)) * step
    if disjoint:
        return [(start, stop - start, stop - start) for start, stop in pairwise(edges)]
    edges[-2] = size - tile
    return [(start, tile, stop - start) for start, stop in pairwise(edges)]


def scene_regions(scene: Scene, tile: tuple[int, ...], split: SplitSettings, *, labelled: bool) -> tuple[list[list[AxisTile]], Regions]:
    """The tiles of a scene along each axis, and how it is cut into the regions that are read at once.

    Raises:
        PreparationError: The scene has another number of axes than the tile, or the tile cuts measurements of a coarse channel.
    """
    if len(scene.grid.space) != len(tile):
        raise PreparationError(
            f"scene {scene.name} has {len(scene.grid.space)} axes {scene.grid.space}, prepare.tile has {len(tile)}: {tile}; "
            "give one size per axis"
        )
    measurement = lcm(*(channel.footprint for channel in scene.channels))
    steps = [1] * (len(tile) - 2) + [measurement] * min(len(tile), 2)
    if any(side % step for side, step in zip(tile, steps, strict=True)):
        coarse = max(scene.channels, key=lambda channel: channel.footprint)
        near = [max(step, round(side / step) * step) for side, step in zip(tile, steps, strict=True)]
        raise PreparationError(
            f"tiles of {tile} voxels cut measurements of scene {scene.name}: channel {coarse.name} has one in every {coarse.footprint} "
            f"voxels along an axis, all channels together in every {measurement}. Set prepare.tile to multiples of it, such as {near}, or "
            "bring the bands to one grid with reader.resampling=bilinear"
        )
    sizes = zip(scene.grid.space, tile, steps, strict=True)
    axes = [tile_axis(size, side, disjoint=split.unit == "block", step=step) for size, side, step in sizes]
    voxel_bytes = len(scene.channels) * (scene.dtype.itemsize + 1) + (9 if labelled else 1)
    most = budget(scene.block, voxel_bytes)
    return axes, cut_regions(tuple(tuple(tiles) for tiles in axes), scene.block, voxel_bytes, most)


def plan_tiles(
    scenes: Sequence[Scene], tile: tuple[int, ...], split: SplitSettings, shard: int = 1, first: int = 0, *, labelled: bool = False
) -> list[PlannedTile]:
    """Every candidate tile of scenes sorted by name, by rising id.

    A region with at least `shard` tiles begins a shard of its own, and ids are left out at the end of its last one; smaller regions
    are packed into one shard as long as they fit whole. So no region is read by two tasks that own whole shards.
    Tiles of a scene that is divided in blocks are disjoint, so that no block sees into another.

    Args:
        scenes: What is tiled.
        tile: Size per axis.
        split: How tiles are held out.
        shard: Tiles in a shard.
        first: The first id; a multiple of `shard`.
        labelled: Whether labels are read with the pixels.

    Raises:
        PreparationError: A scene has another number of axes than the tile.
    """
    planned: list[PlannedTile] = []
    number, region, packing = first, -1, True
    for place, scene in enumerate(scenes):
        axes, regions = scene_regions(scene, tile, split, labelled=labelled)
        for box in regions.boxes():
            region += 1
            size = prod(len(part) for part in box)
            if not packing or size >= shard or size > -number % shard:
                number += -number % shard
            packing = size < shard
            for index in product(*box):
                origin, extent, owned = zip(*(tiles[k] for tiles, k in zip(axes, index, strict=True)), strict=True)
                block = tuple(k // split.block_tiles for k in index)
                planned.append(PlannedTile(number, place, region, block, origin, extent, owned))
                number += 1
    return planned


def split_group(group: str, tile: PlannedTile, settings: SplitSettings) -> str:
    """Name of what is not divided: the scene's group, or a block of it; for `unit: ground`, what it is where a tile has no place."""
    if settings.unit != "block":
        return group
    return f"{group} block {'-'.join(str(place) for place in tile.block)}"


def held_out_groups(sizes: dict[str, int], settings: SplitSettings) -> frozenset[str]:
    """The groups that are held out, given the number of tiles of each.

    Groups are ordered by a hash of seed and name and taken from the front until `val_fraction` of the tiles is held out; at least
    one is taken and at least one is left to train on. A group's place in the order does not depend on the others, but for those that
    the settings hold out first or never; where there are no others than those, they are drawn as usual.

    Raises:
        PreparationError: There is only one group.
    """
    if settings.val_fraction == 0:
        return frozenset()
    if len(sizes) < 2:
        more = {
            "scene": "set prepare.split.unit=block, or ground for places on the globe, to hold out parts of it",
            "block": "make prepare.tile or prepare.split.block_tiles smaller",
            "ground": f"make prepare.split.block_km smaller than {settings.block_km:g}, or set prepare.split.unit=block",
        }
        todo = more[settings.unit]
        raise PreparationError(
            f"all tiles are of one group ({', '.join(sizes) or 'none'}), so none can be held out: {todo}, or val_fraction=0"
        )
    order = drawing_order(sizes, settings)
    wanted = settings.val_fraction * sum(sizes.values())
    before = accumulate((sizes[group] for group in order), initial=0)
    most = order if len(order) < len(sizes) else order[:-1]
    return frozenset(group for group, held in zip(most, before, strict=False) if held == 0 or held < wanted)


def drawing_order(groups: Collection[str], settings: SplitSettings) -> list[str]:
    """Groups that may be held out, in the order in which they are: those that go first, then the others, without those that never do.

    Where nothing but groups that never do is left, these.
    """
    first, never = set(settings.hold_out_first), set(settings.never_hold_out) - set(settings.hold_out_first)
    order = group_order(groups, settings.seed)
    free = [group for group in order if group in first] + [group for group in order if group not in first | never]
    return free or order


def group_order(groups: Iterable[str], seed: int) -> list[str]:
    """Groups in the order in which they are held out: by a hash of seed and name."""
    return sorted(groups, key=lambda group: (hashlib.blake2b(f"{seed}\n{group}".encode(), digest_size=16).digest(), group))


@dataclass(frozen=True, eq=False)
class Ground:
    """Where tiles lie, as columns of equal length.

    Attributes:
        places: What shows the same ground: only tiles of one place are compared.
        frames: What world coordinates mean.
        affines: `(tile, (axes + 1)²)`: index to world.
        extents: `(tile, axis)`: real data.
    """

    places: NDArray[np.str_]
    frames: NDArray[np.str_]
    affines: NDArray[np.float64]
    extents: NDArray[np.int64]

    @staticmethod
    def of_rows(rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> Ground:
        """Of rows of an index, whose places are given."""
        frames = np.array([row["frame"] for row in rows], dtype=np.str_)
        affines = np.array([row["affine"] for row in rows], dtype=np.float64)
        return Ground(np.array(places, dtype=np.str_), frames, affines, np.array([row["extent"] for row in rows], dtype=np.int64))

    def rows(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Ground:
        """Some of the tiles."""
        return Ground(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def joined(self, other: Ground) -> Ground:
        """These tiles and then the others."""
        if not len(self.places):
            return other
        if not len(other.places):
            return self
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return Ground(*(np.concatenate(pair) for pair in pairs))

    def boxes(self, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper world corner `(tile, axis)` of boxes around tiles; a voxel reaches half a step around its centre."""
        size = self.extents[chosen].astype(np.float64)
        matrices = self.affines[chosen].reshape(len(size), size.shape[1] + 1, -1)
        middle = np.einsum("tij,tj->ti", matrices[:, :-1, :-1], (size - 1) / 2) + matrices[:, :-1, -1]
        half = np.einsum("tij,tj->ti", np.abs(matrices[:, :-1, :-1]), size / 2 - OVERLAP_SLACK)
        return middle - half, middle + half


def overlapping(ours: Ground, theirs: Ground) -> NDArray[np.bool_]:
    """True for each of our tiles that shares ground with one of theirs of the same place, in world coordinates.

    Raises:
        PreparationError: Tiles of a place speak of different frames, so that they cannot be compared.
    """
    hit = np.zeros(len(ours.places), dtype=bool)
    places, numbers = np.unique(np.concatenate([ours.places, theirs.places]), return_inverse=True)
    our_places, their_places = np.split(numbers, [len(hit)])  # whole numbers, because names are slow to compare
    for number in np.intersect1d(our_places, their_places):
        place, here, there = places[number], our_places == number, their_places == number
        frames = np.union1d(ours.frames[here], theirs.frames[there])
        if len(frames) > 1:
            names = ", ".join(frame[:40] for frame in frames)
            raise PreparationError(
                f"scenes of {place} lie in {len(frames)} different frames ({names}), so blocks of it "
                "cannot be kept apart: use prepare.split.unit=scene, or prepare them one by one"
            )
        low, high = ours.boxes(here)
        found = np.zeros(len(low), dtype=bool)
        for floor, top in zip(*theirs.boxes(there), strict=True):
            found |= ((low < top) & (high > floor)).all(axis=1)
        hit[here] = found
    return hit


def tile_grid(scene: Scene, tile: PlannedTile) -> Grid:
    """The tile's own lattice in the world."""
    return scene.grid.window(tile.window)
