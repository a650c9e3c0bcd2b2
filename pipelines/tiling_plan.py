"""Where tiles lie, which shard holds them and which side of the split they are on: plain functions, no file is touched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mae_core.settings import Settings
from modalities.grid import Grid, Window
from modalities.scene import Scene

OVERLAP_SLACK = 0.01
"""Voxels by which a tile's box is drawn in before two are compared, so that neighbours do not meet by rounding."""


class PreparationError(RuntimeError):
    """A tile store cannot be prepared. The message says where, what came, what was wanted and what to do."""


class SplitSettings(Settings):
    """How tiles are held out: whole groups, or blocks of neighbouring tiles for few big scenes."""

    unit: Literal["scene", "block"] = Field("scene", description="What is not divided: a scene's group (patient, place), or a block of it")
    val_fraction: float = Field(0.1, ge=0, lt=1, description="Share of the tiles that is held out at least; 0 holds out nothing")
    block_tiles: int = Field(4, ge=1, description="Side of a block in tiles, for unit=block")
    seed: int = Field(0, description="Draws which groups are held out")


@dataclass(frozen=True)
class PlannedTile:
    """A place where a tile may be written.

    Attributes:
        tile: Stable id: position in scene name order, then raster order.
        scene: Position of its scene in the sorted scenes.
        block: Index of its block on the scene's tile lattice, for `unit: block`.
        origin: First voxel per axis.
        extent: Real data per axis; smaller than the tile where the scene is.
        owned: Leading part of the extent that no later tile repeats.
    """

    tile: int
    scene: int
    block: tuple[int, ...]
    origin: tuple[int, ...]
    extent: tuple[int, ...]
    owned: tuple[int, ...]

    @property
    def window(self) -> Window:
        """The real data as a window of the scene."""
        return tuple(slice(start, start + size) for start, size in zip(self.origin, self.extent, strict=True))


def tile_axis(size: int, tile: int, *, disjoint: bool = False) -> list[tuple[int, int, int]]:
    """Origin, extent and owned size of each tile along an axis: as few tiles as cover it, evenly spaced.

    Tiles are full and overlap a little, or are `disjoint` and up to a voxel less than evenly divided, the rest being padded.
    An axis shorter than a tile has one tile, which is padded later. Owned parts follow one another without gap or overlap.
    """
    if size <= tile:
        return [(0, size, size)]
    count = -(-size // tile)
    if disjoint:
        edges = [size * k // count for k in range(count + 1)]
        return [(start, stop - start, stop - start) for start, stop in pairwise(edges)]
    origins = [(2 * k * (size - tile) + count - 1) // (2 * (count - 1)) for k in range(count)]
    owned = [after - before for before, after in pairwise(origins)] + [tile]
    return [(origin, tile, own) for origin, own in zip(origins, owned, strict=True)]


def tile_scene(
    space: tuple[int, ...], tile: tuple[int, ...], *, disjoint: bool = False
) -> Iterator[tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]]:
    """Lattice index and, per axis, origin, extent and owned size of every tile of a scene, in raster order."""
    axes = [list(enumerate(tile_axis(size, side, disjoint=disjoint))) for size, side in zip(space, tile, strict=True)]
    for place in product(*axes):
        yield tuple(index for index, _ in place), tuple(part for _, part in place)


def plan_tiles(scenes: Sequence[Scene], tile: tuple[int, ...], split: SplitSettings) -> list[PlannedTile]:
    """Every candidate tile of scenes sorted by name; its position in the list is its id.

    Tiles of a scene that is divided in blocks are disjoint, so that no block sees into another.

    Raises:
        PreparationError: A scene has another number of axes than the tile.
    """
    planned: list[PlannedTile] = []
    for number, scene in enumerate(scenes):
        if len(scene.grid.space) != len(tile):
            raise PreparationError(
                f"scene {scene.name} has {len(scene.grid.space)} axes {scene.grid.space}, prepare.tile has {len(tile)}: {tile}; "
                "give one size per axis"
            )
        for index, parts in tile_scene(scene.grid.space, tile, disjoint=split.unit == "block"):
            origin, extent, owned = zip(*parts, strict=True)
            block = tuple(place // split.block_tiles for place in index)
            planned.append(PlannedTile(len(planned), number, block, origin, extent, owned))
    return planned


def split_group(scene: Scene, tile: PlannedTile, settings: SplitSettings) -> str:
    """Name of what is not divided: the scene's group, or a block of it."""
    if settings.unit == "scene":
        return scene.group
    return f"{scene.group} block {'-'.join(str(place) for place in tile.block)}"


def held_out_groups(sizes: dict[str, int], settings: SplitSettings) -> frozenset[str]:
    """The groups that are held out, given the number of tiles of each.

    Groups are ordered by a hash of seed and name and taken from the front until `val_fraction` of the tiles is held out; at least
    one is taken and at least one is left to train on. A group's place in the order does not depend on the others.

    Raises:
        PreparationError: There is only one group.
    """
    if settings.val_fraction == 0:
        return frozenset()
    if len(sizes) < 2:
        more = "make prepare.tile or prepare.split.block_tiles smaller"
        todo = more if settings.unit == "block" else "set prepare.split.unit=block to hold out parts of it"
        raise PreparationError(
            f"all tiles are of one group ({', '.join(sizes) or 'none'}), so none can be held out: {todo}, or val_fraction=0"
        )
    order = sorted(sizes, key=lambda group: (_rank(settings.seed, group), group))
    wanted = settings.val_fraction * sum(sizes.values())
    before = accumulate((sizes[group] for group in order), initial=0)
    return frozenset(group for group, held in zip(order[:-1], before, strict=False) if held == 0 or held < wanted)


def overlapping(scenes: Sequence[Scene], train: Sequence[PlannedTile], val: Sequence[PlannedTile]) -> set[int]:
    """Ids of training tiles that share ground with a held-out tile of the same place (scene group), in world coordinates.

    Raises:
        PreparationError: Two scenes of a place speak of different frames, so that their tiles cannot be compared.
    """
    leaks: set[int] = set()
    for group in sorted({scenes[tile.scene].group for tile in val}):
        ours = [tile for tile in train if scenes[tile.scene].group == group]
        theirs = [tile for tile in val if scenes[tile.scene].group == group]
        frames = {scenes[tile.scene].grid.frame for tile in [*ours, *theirs]}
        if len(frames) > 1:
            names = ", ".join(sorted(frame[:40] for frame in frames))
            raise PreparationError(
                f"scenes of {group} lie in {len(frames)} different frames ({names}), so blocks of it "
                "cannot be kept apart: use prepare.split.unit=scene, or prepare them one by one"
            )
        if ours and theirs:
            low, high = _boxes(scenes, ours)
            hit = np.zeros(len(ours), dtype=bool)
            for floor, top in zip(*_boxes(scenes, theirs), strict=True):
                hit |= ((low < top) & (high > floor)).all(axis=1)
            leaks |= {tile.tile for tile, leaks_out in zip(ours, hit, strict=True) if leaks_out}
    return leaks


def tile_grid(scene: Scene, tile: PlannedTile) -> Grid:
    """The tile's own lattice in the world."""
    return scene.grid.window(tile.window)


def _rank(seed: int, group: str) -> bytes:
    return hashlib.blake2b(f"{seed}\n{group}".encode(), digest_size=16).digest()


def _boxes(scenes: Sequence[Scene], tiles: Sequence[PlannedTile]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper world corner `(tile, axis)` of boxes around tiles; a voxel reaches half a step around its centre."""
    matrices = np.stack([scenes[tile.scene].grid.matrix for tile in tiles])
    size = np.array([tile.extent for tile in tiles], dtype=np.float64)
    centre = np.array([tile.origin for tile in tiles]) + (size - 1) / 2
    middle = np.einsum("tij,tj->ti", matrices[:, :-1, :-1], centre) + matrices[:, :-1, -1]
    half = np.einsum("tij,tj->ti", np.abs(matrices[:, :-1, :-1]), size / 2 - OVERLAP_SLACK)
    return middle - half, middle + half
