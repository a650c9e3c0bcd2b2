"""The order of samples is a function of seed and step: not of threads, prefetch, micro-batches or the number of processes."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_core.augment import RawBatch
from mae_core.loader import LoaderError, LoaderSettings, Stream, fixed_batches
from mae_core.parallel import Parallel
from mae_core.store import StoreError, TileStore
from mae_core.store_files import LocalFiles
from tests.tiny_runs import ALONE, shared_store

Name = tuple[int, int, int]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


def stream(store: TileStore, parallel: Parallel = ALONE, seed: int = 3, **settings: Any) -> Stream:
    return Stream(store, store.rows("train"), LoaderSettings(**{"global_batch_size": 4, **settings}), seed, parallel)


def rank(number: int, world: int) -> Parallel:
    """A process of many, without a process group: the stream asks only for its number."""
    return Parallel(number, world, torch.device("cpu"))


def named(batches: list[RawBatch]) -> list[Name]:
    """Epoch, tile and repeat of each sample in order."""
    parts = [torch.stack([raw.sample.epoch, raw.sample.tile, raw.sample.repeat], dim=1) for raw in batches]
    return [tuple(row) for row in torch.cat(parts).tolist()]


def drawn(chosen: Stream, first: int, last: int) -> list[list[Name]]:
    """Samples of each step."""
    return [named(batches) for batches, _ in chosen.steps(first, last)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"crops_per_tile": 2}, {"micro_batch_size": 1, "prefetch": 3}])
def test_the_processes_share_each_step_whatever_their_number(store: TileStore, world: int, settings: dict[str, int]) -> None:
    alone = drawn(stream(store, **settings), 0, 9)
    shares = [drawn(stream(store, rank(number, world), **settings), 0, 9) for number in range(world)]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize(
    "settings", [{"num_threads": 1}, {"num_threads": 4}, {"prefetch": 1}, {"prefetch": 9}, {"micro_batch_size": 1}, {"micro_batch_size": 2}]
)
def test_threads_prefetch_and_micro_batches_change_nothing(store: TileStore, settings: dict[str, int]) -> None:
    assert drawn(stream(store, **settings), 0, 7) == drawn(stream(store), 0, 7)


def test_micro_batches_have_their_size_and_make_up_the_share(store: TileStore) -> None:
    chosen = stream(store, rank(1, 2), global_batch_size=8, micro_batch_size=2)
    assert chosen.micro_batches == 2
    for batches, waited in chosen.steps(0, 2):
        assert [len(raw.pixels) for raw in batches] == [2, 2]
        assert waited >= 0


@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_holds_every_tile_as_often_as_asked_and_no_other(store: TileStore, repeats: int) -> None:
    tiles = store.index.tile[store.rows("train")].tolist()
    size = len(tiles) * repeats
    flat = list(chain(*drawn(stream(store, crops_per_tile=repeats), 0, 2 * size // 4)))
    for epoch in (0, 1):
        part = flat[epoch * size : (epoch + 1) * size]
        assert Counter(part) == Counter((epoch, tile, repeat) for tile in tiles for repeat in range(repeats))
    orders = [[tile for _, tile, _ in flat[start : start + size]] for start in (0, size)]
    assert orders[0] != orders[1]


def test_another_seed_gives_another_order_of_the_same_tiles(store: TileStore) -> None:
    size = len(store.rows("train"))
    first, second = (list(chain(*drawn(stream(store, seed=seed), 0, size // 4))) for seed in (3, 4))
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize("step", [1, 4, 8])
def test_begun_at_a_step_it_is_the_tail_of_the_whole_stream(store: TileStore, step: int) -> None:
    assert drawn(stream(store, crops_per_tile=2), step, 9) == drawn(stream(store, crops_per_tile=2), 0, 9)[step:]
    assert drawn(stream(store), 9, 9) == []


def test_a_sample_is_its_tile_as_it_is_stored(store: TileStore) -> None:
    row_of = {int(tile): row for row, tile in enumerate(store.index.tile)}
    for batches, _ in stream(store, crops_per_tile=2, micro_batch_size=2).steps(0, 3):
        for raw in batches:
            assert raw.labels is None
            assert raw.place is not None
            assert (len(raw.pixels), raw.place.tolist()) == (1, [0, 0]), "two crops, one tile unpacked"
            for place, number in enumerate(raw.sample.tile.tolist()):
                tile = store.read(row_of[number])
                assert np.array_equal(raw.pixels[0].numpy(), tile.pixels)
                assert np.array_equal(raw.quality[0].numpy(), tile.quality)
                assert (raw.scale[place].tolist(), raw.offset[place].tolist()) == (tile.scale.tolist(), tile.offset.tolist())
                assert tuple(raw.extent[place].tolist()) == tile.extent


def test_left_early_the_threads_stop(store: TileStore) -> None:
    batches = stream(store, prefetch=8).steps(0, 1000)
    next(batches)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_a_changed_chunk_stops_the_stream_and_is_named(store: TileStore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    array = store.arrays["pixels"]
    tile = int(store.index.tile[store.rows("train")[0]])
    shard, place = divmod(tile, array.tiles_per_shard)
    offset, length = (int(value) for value in array.read_index(LocalFiles(store.path), shard)[place])
    file = tmp_path / "store" / array.key(shard)
    data = bytearray(file.read_bytes())
    data[offset + length // 2] ^= 1
    file.write_bytes(data)
    spoilt = TileStore.open(tmp_path / "store", "sizes")
    with pytest.raises(StoreError, match=rf"pixels shard .*: the chunk of tile {tile} fails its crc32c"):
        drawn(stream(spoilt), 0, len(store.rows("train")))


def test_what_cannot_be_divided_is_told(store: TileStore) -> None:
    with pytest.raises(LoaderError, match=r"loader\.global_batch_size=4 cannot be divided among 3 processes"):
        stream(store, rank(0, 3))
    with pytest.raises(LoaderError, match=r"loader\.micro_batch_size=4 does not divide a process's share of 2 samples"):
        stream(store, rank(0, 2), micro_batch_size=4)
    with pytest.raises(LoaderError, match="there is no tile to train on"):
        Stream(store, np.empty(0, np.int64), LoaderSettings(), 0, ALONE)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_held_out_rows_are_divided_without_loss_and_always_the_same(store: TileStore, world: int) -> None:
    rows = store.rows("val")
    tiles: list[int] = []
    for number in range(world):
        own = [named(list(fixed_batches(store, rows, 2, rank(number, world)))) for _ in range(2) if len(rows[number::world])]
        assert not own or own[0] == own[1]
        tiles += [tile for _, tile, _ in own[0]] if own else []
    assert sorted(tiles) == store.index.tile[rows].tolist()
