"""Tiles cover every scene once, and nothing that is held out shares ground with what is trained on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.region_plan
from modalities.grid import Grid
from modalities.scene import Channel
from pipelines.tiling_plan import (
    Ground,
    PlannedTile,
    PreparationError,
    SplitSettings,
    held_out_groups,
    overlapping,
    plan_tiles,
    tile_axis,
    tile_grid,
)
from tests.synthetic_scenes import SyntheticScene

sides = st.integers(1, 12)
spaces = st.integers(1, 3).flatmap(lambda axes: st.tuples(*[st.tuples(st.integers(1, 30), sides)] * axes))


def scene(name: str, space: tuple[int, ...], group: str = "here", matrix: np.ndarray | None = None, frame: str = "") -> SyntheticScene:
    matrix = np.eye(len(space) + 1) if matrix is None else matrix
    return SyntheticScene(name, group, Path(), Grid.from_matrix(space, matrix, frame, "m"), (), np.dtype("uint8"))


def ground_of(scenes: list[SyntheticScene], tiles: list[PlannedTile]) -> Ground:
    grids = [(tile_grid(scenes[tile.scene], tile), scenes[tile.scene].group) for tile in tiles]
    rows = [{"frame": grid.frame, "affine": grid.matrix.ravel(), "extent": grid.space} for grid, _ in grids]
    return Ground.of_rows(rows, [group for _, group in grids])


@given(spaces)
def test_owned_boxes_partition_a_scene(axes: tuple[tuple[int, int], ...]) -> None:
    space, tile = (tuple(pair) for pair in zip(*axes, strict=True))
    owned, covered = np.zeros(space, int), np.zeros(space, int)
    tiles = plan_tiles([scene("s", space)], tile, SplitSettings(block_tiles=2))
    for planned in tiles:
        assert planned.extent == tuple(min(size, side) for size, side in axes), "every tile is full where the scene is large enough"
        assert all(own <= size for own, size in zip(planned.owned, planned.extent, strict=True))
        owned[tuple(slice(start, start + size) for start, size in zip(planned.origin, planned.owned, strict=True))] += 1
        assert covered[planned.window].shape == planned.extent
        covered[planned.window] += 1
    assert (owned == 1).all()
    assert covered.min() >= 1
    assert len(tiles) == prod(-(-size // side) for size, side in axes), "no more tiles than are needed"


@given(spaces)
def test_tiles_of_blocks_do_not_touch_and_lose_nothing(axes: tuple[tuple[int, int], ...]) -> None:
    space, tile = (tuple(pair) for pair in zip(*axes, strict=True))
    covered = np.zeros(space, int)
    for planned in plan_tiles([scene("s", space)], tile, SplitSettings(unit="block")):
        assert planned.owned == planned.extent
        assert all(0 < size <= side for size, side in zip(planned.extent, tile, strict=True))
        covered[planned.window] += 1
    assert (covered == 1).all()


def test_tiles_lie_at_multiples_of_their_size_and_the_last_ends_at_the_edge() -> None:
    tiles = plan_tiles([scene("a", (10, 4)), scene("b", (3, 4))], (4, 4), SplitSettings(block_tiles=2))
    assert [tile.tile for tile in tiles] == [0, 1, 2, 3]
    assert [tile.scene for tile in tiles] == [0, 0, 0, 1]
    assert [tile.region for tile in tiles] == [0, 0, 0, 1]
    assert [tile.origin for tile in tiles] == [(0, 0), (4, 0), (6, 0), (0, 0)]
    assert [tile.owned for tile in tiles] == [(4, 4), (2, 4), (4, 4), (3, 4)]
    assert [tile.block for tile in tiles] == [(0, 0), (0, 0), (1, 0), (0, 0)]


def test_disjoint_tiles_lie_at_multiples_too_and_the_last_is_no_sliver() -> None:
    assert tile_axis(11, 4, disjoint=True) == [(0, 4, 4), (4, 4, 4), (8, 3, 3)]
    assert tile_axis(9, 4, disjoint=True) == [(0, 4, 4), (4, 3, 3), (7, 2, 2)], "the last two share what one voxel would be left of"
    assert tile_axis(10, 4, disjoint=True)[-1] == (8, 2, 2)


@pytest.mark.parametrize("shard", [1, 3, 4, 50])
def test_a_region_begins_a_shard_or_is_packed_into_one_whole(shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tiles of 2×2 bytes fill the budget."""
    monkeypatch.setattr(pipelines.region_plan, "READ_BYTES", 16)
    scenes = [scene("a", (6, 8)), scene("b", (2, 2)), scene("c", (4, 2)), scene("d", (2, 2)), scene("e", (4, 4))]
    tiles = plan_tiles(scenes, (2, 2), SplitSettings(), shard)
    sizes = Counter(tile.region for tile in tiles)
    assert list(sizes.values()) == [4, 4, 4, 1, 2, 1, 4]
    shards: dict[int, set[int]] = {}
    for tile in tiles:
        shards.setdefault(tile.tile // shard, set()).add(tile.region)
    whole = [len([number for number, regions in shards.items() if region in regions]) for region in sizes]
    assert whole == [-(-size // shard) for size in sizes.values()], "a region takes as few shards as it can"
    assert all(len(regions) == 1 or max(sizes[region] for region in regions) < shard for regions in shards.values())
    assert [tile.tile for tile in tiles] == sorted({tile.tile for tile in tiles})
    assert plan_tiles(scenes, (2, 2), SplitSettings(), shard, 5 * shard) == [replace(tile, tile=tile.tile + 5 * shard) for tile in tiles]


def test_a_tile_knows_its_place() -> None:
    matrix = np.array([[0, -10.0, 500], [20, 0, 700], [0, 0, 1]])
    [*_, last] = plan_tiles([scene("a", (10, 4), matrix=matrix)], (4, 4), SplitSettings(block_tiles=2))
    assert tile_grid(scene("a", (10, 4), matrix=matrix), last).world((1, 2)) == scene("a", (10, 4), matrix=matrix).grid.world((7, 2))


def coarse(space: tuple[int, ...], *footprints: int) -> SyntheticScene:
    channels = tuple(Channel(f"B{number}", footprint=footprint) for number, footprint in enumerate(footprints))
    return replace(scene("native", space), channels=channels)


@given(st.integers(1, 3), st.lists(st.integers(1, 70), min_size=2, max_size=3), st.sampled_from(["scene", "block"]))
def test_no_tile_cuts_a_measurement_of_a_coarse_channel(tiles_a_side: int, space: list[int], unit: Literal["scene", "block"]) -> None:
    """20 m and 60 m channels on a 10 m grid: a tile begins and ends between blocks of 6; a time axis has no blocks."""
    side = 6 * tiles_a_side
    tile = (4, side, side)[-len(space) :]
    covered = np.zeros(space, int)
    for planned in plan_tiles([coarse(tuple(space), 1, 2, 6)], tile, SplitSettings(unit=unit)):
        covered[planned.window] += 1
        for start, extent, size in list(zip(planned.origin, planned.extent, space, strict=True))[-2:]:
            assert start % 6 == 0
            assert extent % 6 == 0 or size < 6
    whole = tuple(slice(0, size if axis < len(space) - 2 or size < 6 else size // 6 * 6) for axis, size in enumerate(space))
    assert (covered[whole] > 0).all()
    covered[whole] = 0
    assert not covered.any(), "a last part of a measurement is left out"


def test_a_tile_that_cuts_measurements_is_refused_with_one_that_does_not() -> None:
    with pytest.raises(
        PreparationError, match=r"\(128, 128\) voxels cut measurements of scene native: channel B2 .* every 6 .*\[126, 126\]"
    ):
        plan_tiles([coarse((500, 500), 1, 2, 6)], (128, 128), SplitSettings())
    assert len(plan_tiles([coarse((500, 500), 1, 2)], (128, 128), SplitSettings())) == 16


def test_another_number_of_axes_is_refused() -> None:
    with pytest.raises(PreparationError, match=r"scene b has 3 axes \(3, 4, 5\), prepare.tile has 2"):
        plan_tiles([scene("b", (3, 4, 5))], (4, 4), SplitSettings(block_tiles=2))


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 50), min_size=2, max_size=12),
    st.floats(0.01, 0.9),
    st.integers(0, 5),
)
def test_enough_is_held_out_and_something_is_left(sizes: dict[str, int], fraction: float, seed: int) -> None:
    split = SplitSettings(val_fraction=fraction, seed=seed)
    held = held_out_groups(sizes, split)
    assert 1 <= len(held) < len(sizes)
    assert sum(sizes[name] for name in held) >= fraction * sum(sizes.values()) or len(held) == len(sizes) - 1
    assert held == held_out_groups(dict(reversed(sizes.items())), split), "the order of the scenes does not matter"


def test_the_seed_draws_the_groups() -> None:
    sizes = {f"patient {number}": 1 for number in range(50)}
    draws = {held_out_groups(sizes, SplitSettings(seed=seed)) for seed in range(5)}
    assert len(draws) == 5
    assert held_out_groups(sizes, SplitSettings(val_fraction=0)) == frozenset()
    assert {len(draw) for draw in draws} == {5}


def test_one_group_cannot_be_held_out() -> None:
    with pytest.raises(PreparationError, match=r"one group \(a\).*prepare.split.unit=block.*val_fraction=0"):
        held_out_groups({"a": 7}, SplitSettings())
    with pytest.raises(PreparationError, match="block_tiles smaller"):
        held_out_groups({"a block 0-0": 7}, SplitSettings(unit="block"))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_overlap_is_found_as_by_painting_the_ground(data: st.DataObject) -> None:
    shift = data.draw(st.integers(-6, 6))
    moved = np.array([[1.0, 0, shift], [0, -1, 5], [0, 0, 1]])
    scenes = [scene("a", (12, 9)), scene("b", (10, 7), matrix=moved), scene("c", (12, 9), group="elsewhere")]
    tiles = plan_tiles(scenes, (4, 3), SplitSettings(block_tiles=1))
    held = data.draw(st.sets(st.sampled_from(tiles), min_size=1, max_size=5))

    def ground(tile: PlannedTile) -> set[tuple[str, float, float]]:
        own = scenes[tile.scene]
        return {(own.group, *own.grid.window(tile.window).world(index)) for index in np.ndindex(*tile.extent)}  # type: ignore[misc]

    taken = set().union(*(ground(tile) for tile in held))
    train = [tile for tile in tiles if tile not in held]
    found = overlapping(ground_of(scenes, train), ground_of(scenes, sorted(held, key=lambda tile: tile.tile)))
    assert found.tolist() == [bool(ground(tile) & taken) for tile in train]


def test_blocks_of_a_place_in_two_frames_are_refused() -> None:
    scenes = [scene("a", (4, 4), frame="EPSG:32632"), scene("b", (4, 4), frame="EPSG:32633")]
    tiles = plan_tiles(scenes, (4, 4), SplitSettings(block_tiles=1))
    with pytest.raises(PreparationError, match=r"2 different frames.*unit=scene"):
        overlapping(ground_of(scenes, tiles[:1]), ground_of(scenes, tiles[1:]))
