"""The cut of a scene unpacks as few blocks as any other of its size: compared with all cuts there are."""

from __future__ import annotations

from itertools import combinations, pairwise, product
from math import prod

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pipelines.region_plan
from pipelines.region_plan import budget, cut_axis, cut_regions
from pipelines.tiling_plan import tile_axis

Span = tuple[int, int]


def spans(edges: tuple[int, ...], tiles: list[tuple[int, int, int]]) -> list[Span]:
    return [(tiles[first][0], sum(tiles[after - 1][:2])) for first, after in pairwise(edges)]


def touched(parts: list[Span], block: int) -> int:
    return sum(len({voxel // block for voxel in range(start, stop)}) for start, stop in parts)


def every_cut(num: int) -> list[tuple[int, ...]]:
    inner = [chosen for size in range(num) for chosen in combinations(range(1, num), size)]
    return [(0, *chosen, num) for chosen in inner]


@example(size=17, side=8, block=1, most=2, disjoint=False)
@example(size=22, side=4, block=9, most=2, disjoint=False)
@given(size=st.integers(1, 40), side=st.integers(1, 6), block=st.integers(1, 25), most=st.integers(1, 8), disjoint=st.booleans())
def test_no_cut_of_an_axis_touches_fewer_blocks(size: int, side: int, block: int, most: int, disjoint: bool) -> None:
    tiles = tile_axis(size, side, disjoint=disjoint)[:9]
    cut = cut_axis(tuple(tiles), block, most)
    assert max(after - first for first, after in pairwise(cut.edges)) <= most
    assert cut.touched == touched(spans(cut.edges, tiles), block)
    assert cut.longest == max(stop - start for start, stop in spans(cut.edges, tiles))
    others = [edges for edges in every_cut(len(tiles)) if max(after - first for first, after in pairwise(edges)) <= most]
    best = min(touched(spans(edges, tiles), block) for edges in others)
    assert cut.touched == best


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(2, 4), st.integers(1, 9)), min_size=1, max_size=3), st.integers(1, 200))
def test_regions_partition_the_tiles_and_keep_to_the_budget(axes: list[tuple[int, int, int]], most_bytes: int) -> None:
    lattice = [tile_axis(size, side) for size, side, _ in axes]
    regions = cut_regions(tuple(tuple(tiles) for tiles in lattice), tuple(block for _, _, block in axes), 1, most_bytes)
    seen = [index for box in regions.boxes() for index in product(*box)]
    assert sorted(seen) == list(product(*(range(len(tiles)) for tiles in lattice)))
    volumes = []
    for box in regions.boxes():
        sides = [sum(tiles[part[-1]][:2]) - tiles[part[0]][0] for tiles, part in zip(lattice, box, strict=True)]
        volumes.append((prod(sides), prod(len(part) for part in box)))
    assert all(volume <= most_bytes or count == 1 for volume, count in volumes)
    assert regions.blocks == prod(-(-size // block) for size, _, block in axes)


@pytest.mark.parametrize(
    ("size", "side", "block", "bytes_each", "wanted"),
    [
        ((10980, 10980), (128, 128), (512, 512), 12 * 3 + 1, 22 * 22),
        ((10980, 10980), (128, 128), (1024, 1024), 12 * 3 + 1, 11 * 11),
        ((10980, 10980), (128, 128), (256, 256), 4 * 3 + 1, 43 * 43),
        ((10980, 10980), (128, 128), (1, 10980), 4 * 3 + 1, 10980),
        ((300, 512, 512), (64, 64, 64), (300, 512, 512), 3, 1),
    ],
)
def test_usual_scenes_are_unpacked_once(
    size: tuple[int, ...], side: tuple[int, ...], block: tuple[int, ...], bytes_each: int, wanted: int
) -> None:
    axes = tuple(tuple(tile_axis(*pair)) for pair in zip(size, side, strict=True))
    regions = cut_regions(axes, block, bytes_each, budget(block, bytes_each))
    assert regions.touched == wanted


def test_a_row_of_blocks_that_is_too_much_is_read_in_windows_as_seldom_as_can_be() -> None:
    """Rows of 4096 lines in one block as wide as the scene: 22 bytes a voxel leave 6.1 million voxels, 556 lines, of 45 million."""
    axes = tuple(tuple(tile_axis(size, 128)) for size in (8192, 10980))
    regions = cut_regions(axes, (4096, 10980), 22, pipelines.region_plan.READ_BYTES)
    assert (regions.blocks, regions.touched) == (2, 16)
    assert regions.edges[1] == (0, 86)


def test_a_block_may_make_a_region_larger_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.region_plan, "READ_BYTES", 100)
    assert [budget((side, side), 3) for side in (2, 7, 40)] == [100, 147, 200]
