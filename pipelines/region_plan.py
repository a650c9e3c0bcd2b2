"""How a scene is cut into regions: boxes of tiles that are read at once, so that its blocks are unpacked as seldom as can be."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from math import prod

READ_BYTES = 128 << 20
"""Most bytes of pixels, flags and labels of a region, as they are read; what a worker needs beside them follows from it."""

AxisTile = tuple[int, int, int]
"""Origin, extent and owned size of a tile along an axis."""


@dataclass(frozen=True)
class AxisCut:
    """One way to cut an axis.

    Attributes:
        edges: Number of the first tile of each part, and at the end the number of tiles.
        longest: Voxels of the longest part.
        touched: Blocks that the parts touch, one that several touch counted for each.
    """

    edges: tuple[int, ...]
    longest: int
    touched: int


@dataclass(frozen=True)
class Regions:
    """How a scene is cut.

    Attributes:
        edges: Per axis, as in `AxisCut`.
        touched: Blocks that are unpacked when every region is read once.
        blocks: Blocks of the scene.
    """

    edges: tuple[tuple[int, ...], ...]
    touched: int
    blocks: int

    def boxes(self) -> Iterator[tuple[range, ...]]:
        """Per region, the numbers of its tiles along each axis; regions in raster order."""
        return product(*([range(*pair) for pair in pairwise(edges)] for edges in self.edges))


def budget(block: tuple[int, ...], voxel_bytes: int) -> int:
    """Bytes that a region may have: `READ_BYTES`, or one block where that is more, up to twice as much.

    A source unpacks its block whole, so a region as large spares the others; a compressed volume is one block.
    """
    return min(max(READ_BYTES, prod(block) * voxel_bytes), 2 * READ_BYTES)


@lru_cache(maxsize=256)
def cut_regions(axes: tuple[tuple[AxisTile, ...], ...], block: tuple[int, ...], voxel_bytes: int, most_bytes: int) -> Regions:
    """The cut that unpacks the fewest blocks, and of those the one with the fewest regions.

    A region is the box of its tiles, so blocks and voxels factor over the axes: it is enough to know for each axis the best cut for
    every longest part. A single tile is a region even where it is more than `most_bytes`.
    """
    choices = [_cuts(tiles, side) for tiles, side in zip(axes, block, strict=True)]
    fitting = [cuts for cuts in product(*choices) if prod(cut.longest for cut in cuts) * voxel_bytes <= most_bytes]
    best = min(fitting or [tuple(cuts[0] for cuts in choices)], key=_cost)
    sizes = [tiles[-1][0] + tiles[-1][1] for tiles in axes]
    return Regions(
        tuple(cut.edges for cut in best),
        prod(cut.touched for cut in best),
        prod(-(-size // side) for size, side in zip(sizes, block, strict=True)),
    )


def cut_axis(tiles: tuple[AxisTile, ...], block: int, most: int) -> AxisCut:
    """The cut of an axis in parts of at most `most` tiles that touches the fewest blocks.

    A tile that begins where a block does and the tile before it ends is a place to cut that costs nothing. Parts end at the last such
    place within reach; where there is none, the way to the next is divided evenly, the longer parts last, so that a tile that is moved
    back over the one before is not cut off from it. That is the best there is: between two free places that lie `way` tiles apart,
    any cut has at least `ceil(way / most) - 1` edges.
    """
    free = [number for number in range(1, len(tiles)) if tiles[number][0] % block == 0 and sum(tiles[number - 1][:2]) == tiles[number][0]]
    free.append(len(tiles))
    edges = [0]
    while edges[-1] < len(tiles):
        start = edges[-1]
        next_free, last_reached = bisect_right(free, start), bisect_right(free, start + most) - 1
        way = free[max(next_free, last_reached)] - start
        parts = -(-way // most)
        edges += [start + way * part // parts for part in range(1, parts + 1)]
    spans = [(tiles[first][0], tiles[after - 1][0] + tiles[after - 1][1]) for first, after in pairwise(edges)]
    return AxisCut(
        tuple(edges),
        max(stop - start for start, stop in spans),
        sum(-(-stop // block) - start // block for start, stop in spans),
    )


def _cuts(tiles: tuple[AxisTile, ...], block: int) -> list[AxisCut]:
    """The cuts worth looking at, by rising length: a longer part must spare blocks or parts."""
    kept: list[AxisCut] = []
    for most in range(1, len(tiles) + 1):
        cut = cut_axis(tiles, block, most)
        if not kept or cut.touched < kept[-1].touched or len(cut.edges) < len(kept[-1].edges):
            kept.append(cut)
    return kept


def _cost(cuts: tuple[AxisCut, ...]) -> tuple[int, int, tuple[tuple[int, ...], ...]]:
    return prod(cut.touched for cut in cuts), prod(len(cut.edges) - 1 for cut in cuts), tuple(cut.edges for cut in cuts)
