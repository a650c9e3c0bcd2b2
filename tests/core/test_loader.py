"""The order of samples is a function of seed and step: not of threads, prefetch, micro-batches or the number of processes."""

from __future__ import annotations

import shutil
import threading
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


def spoilt(store: TileStore, folder: Path, number: int) -> tuple[TileStore, list[int]]:
    """A copy of which a byte is changed in the pixels of the first training tiles; and those tiles."""
    shutil.copytree(store.path, folder)
    array = store.arrays["pixels"]
    tiles = store.index.tile[store.rows("train")[:number]].tolist()
    for tile in tiles:
        shard, place = divmod(tile, array.tiles_per_shard)
        offset, length = (int(value) for value in array.read_index(LocalFiles(store.path), shard)[place])
        file = folder / array.key(shard)
        data = bytearray(file.read_bytes())
        data[offset + length // 2] ^= 1
        file.write_bytes(data)
    return TileStore.open(folder, "sizes"), tiles


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"crops_per_tile": 2}, {"micro_batch_size": 1, "prefetch": 3}])
def test_the_processes_share_each_step_whatever_their_number(store: TileStore, world: int, settings: dict[str, int]) -> None:
    alone = drawn(stream(store, **settings), 0, 9)
    shares = [drawn(stream(store, rank(number, world), **settings), 0, 9) for number in range(world)]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize(
    "settings", [{"num_threads": 1}, {"num_threads": 7}, {"prefetch": 1}, {"prefetch": 9}, {"micro_batch_size": 1}, {"micro_batch_size": 2}]
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
    other, (tile,) = spoilt(store, tmp_path / "store", 1)
    with pytest.raises(StoreError, match=rf"pixels shard .*: the chunk of tile {tile} fails its crc32c"):
        drawn(stream(other), 0, len(store.rows("train")))


def shard_runs(store: TileStore, names: list[Name]) -> list[int]:
    """Shards of consecutive samples, repetitions left out."""
    shard_of = dict(zip(store.index.tile.tolist(), store.shards.tolist(), strict=True))
    runs: list[int] = []
    for _, tile, _ in names:
        runs += [shard_of[tile]] if not runs or runs[-1] != shard_of[tile] else []
    return runs


def test_in_a_window_of_one_shard_an_epoch_goes_shard_by_shard_in_a_drawn_order(store: TileStore) -> None:
    size = len(store.rows("train"))
    flat = list(chain(*drawn(stream(store, global_batch_size=1, window_shards=1), 0, 3 * size)))
    epochs = [flat[start : start + size] for start in range(0, 3 * size, size)]
    shards = sorted(set(store.shards[store.rows("train")].tolist()))
    assert len(shards) > 2
    orders = [shard_runs(store, epoch) for epoch in epochs]
    assert [sorted(order) for order in orders] == [shards] * 3, "each shard once"
    assert orders[0] != orders[1] or orders[1] != orders[2]
    within = [[name for name in epoch if store.shards[np.flatnonzero(store.index.tile == name[1])][0] == shards[0]] for epoch in epochs]
    assert len({tuple(tile for _, tile, _ in part) for part in within}) > 1, "tiles of a shard are mixed anew"
    mixed = list(chain(*drawn(stream(store, global_batch_size=1, window_shards=2), 0, size)))
    assert len(shard_runs(store, mixed)) > len(shards), "tiles of the shards of a window are mixed with one another"


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("settings", [{"window_shards": 1}, {"window_shards": 2, "crops_per_tile": 3, "num_threads": 3}])
def test_windows_too_are_the_same_for_any_number_of_processes(store: TileStore, world: int, settings: dict[str, int]) -> None:
    alone = drawn(stream(store, **settings), 2, 19)
    shares = [drawn(stream(store, rank(number, world), **settings), 2, 19) for number in range(world)]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone


def test_each_shard_is_read_once_an_epoch_and_no_further_ahead_than_the_next_window(
    store: TileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []
    fetch = TileStore.fetch

    def counted(self: TileStore, rows: Any) -> Any:
        read.append(tuple(sorted(set(self.shards[rows].tolist()))))
        return fetch(self, rows)

    monkeypatch.setattr(TileStore, "fetch", counted)
    rows = store.rows("train")
    chosen = stream(store, global_batch_size=1, window_shards=1, prefetch=1, num_threads=1)
    shard_of = dict(zip(store.index.tile.tolist(), store.shards.tolist(), strict=True))
    order: list[int] = []
    for batches, _ in chosen.steps(0, 2 * len(rows)):
        shard = shard_of[named(batches)[0][1]]
        order += [shard] if not order or order[-1] != shard else []
        assert len(read) <= len(order) + 2, "the window at work, the next one, and one that a batch read ahead has begun"
    assert all(len(shards) == 1 for shards in read)
    assert Counter(shards[0] for shards in read) == Counter(dict.fromkeys(set(order), 2))


def test_left_early_nothing_more_is_read(store: TileStore) -> None:
    batches = stream(store, window_shards=1, prefetch=2).steps(0, 1000)
    next(batches)
    batches.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_damage_that_is_tolerated_is_named_counted_and_fed_as_invalid(store: TileStore, tmp_path: Path) -> None:
    other, tiles = spoilt(store, tmp_path / "store", 2)
    chosen = stream(other, max_damaged_tiles=2)
    size = len(store.rows("train"))
    row_of = {int(tile): row for row, tile in enumerate(store.index.tile)}
    assert chosen.damage() == {"data/damaged_tiles": 0}
    for batches, _ in chosen.steps(0, 2 * size // 4):
        for raw in batches:
            for place, number in enumerate(raw.sample.tile.tolist()):
                if number in tiles:
                    assert not raw.complete
                    assert (raw.quality[place] == store.no_value).all()
                    assert not raw.pixels[place].any()
                else:
                    assert np.array_equal(raw.pixels[place].numpy(), store.read(row_of[number]).pixels)
    assert sorted(chosen.damaged) == sorted(tiles)
    assert all(f"the chunk of tile {tile} fails its crc32c" in chosen.damaged[tile] for tile in tiles)
    assert chosen.damage() == {"data/damaged_tiles": 2}
    with pytest.raises(StoreError, match=r"fails its crc32c.*that makes 2 damaged tiles, loader\.max_damaged_tiles allows 1"):
        drawn(stream(other, max_damaged_tiles=1), 0, size)


def test_a_shard_that_is_gone_is_damage_of_each_of_its_tiles(store: TileStore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    other = TileStore.open(tmp_path / "store", "sizes")
    array, shard = store.arrays["quality"], int(store.shards[store.rows("train")[0]])
    (tmp_path / "store" / array.key(shard)).unlink()
    chosen = stream(other, max_damaged_tiles=100)
    drawn(chosen, 0, len(store.rows("train")) // 4)
    assert sorted(chosen.damaged) == [int(store.index.tile[row]) for row in store.rows("train") if store.shards[row] == shard]
    assert all("cannot be read: No such file" in why for why in chosen.damaged.values())


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
