"""Ways of reading a store that its loader is compared with: the plain file, unpacking alone, and other libraries, crop by crop or whole."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.store import PackedTiles, TileStore

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Crops:
    """Crops that are asked for in a drawn order, as the loader's samples are.

    Attributes:
        store: Where they are.
        tiles: Tile of each crop.
        boxes: Its place in the tile.
    """

    store: TileStore
    tiles: NDArray[np.int64]
    boxes: tuple[Box, ...]


def drawn_crops(store: TileStore, crop: Sequence[int], number: int, seed: int) -> Crops:
    """Some crops at random places of random training tiles."""
    rng = np.random.default_rng(seed)
    tiles = store.index.tile[rng.choice(store.rows("train"), number)]
    room = np.array(store.space) - np.array(crop)
    origins = rng.integers(0, room + 1, (number, len(room)))
    boxes = tuple(tuple(slice(int(low), int(low) + size) for low, size in zip(origin, crop, strict=True)) for origin in origins)
    return Crops(store, tiles, boxes)


def read_files(store: TileStore, rows: NDArray[np.int64]) -> int:
    """Bytes of the shards of some rows, read front to back into one piece of memory and thrown away."""
    room, total = bytearray(16 << 20), 0
    for file in shard_files(store, rows):
        handle = os.open(file, os.O_RDONLY)
        try:
            while done := os.readv(handle, [room]):
                total += done
        finally:
            os.close(handle)
    return total


def forget_files(store: TileStore, rows: NDArray[np.int64]) -> bool:
    """Ask the system to drop the shards of some rows from its page cache; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in shard_files(store, rows):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return True


def shard_files(store: TileStore, rows: NDArray[np.int64]) -> list[str]:
    """Files that hold some rows of a store in one folder."""
    return [f"{store.label}/{array.key(int(shard))}" for shard in np.unique(store.shards[rows]).tolist() for array in store.arrays.values()]


def unpack_all(store: TileStore, rows: NDArray[np.int64], packed: PackedTiles, rooms: Sequence[dict[str, NDArray[Any]]]) -> None:
    """Unpack packed tiles that are in memory, a thread a room, into memory that holds a batch: what no loader can outrun."""

    def share(number: int) -> None:
        room, own = rooms[number], rows[number :: len(rooms)].tolist()
        size = len(next(iter(room.values())))
        for start in range(0, len(own), size):
            for error in store.unpack(own[start : start + size], packed, room).values():
                raise error

    if len(rooms) == 1:
        share(0)
        return
    with ThreadPoolExecutor(len(rooms)) as pool:
        list(pool.map(share, range(len(rooms))))


def zarr_crops(crops: Crops, threads: int) -> None:
    """Each crop by itself through zarr-python, as a plain dataset class does it."""
    import zarr

    group = zarr.open_group(crops.store.label, mode="r")
    arrays: list[Any] = [group[name] for name in crops.store.arrays]

    def one(number: int) -> list[Any]:
        box = crops.boxes[number]
        return [array[(int(crops.tiles[number]), *[slice(None)] * (array.ndim - 1 - len(box)), *box)] for array in arrays]

    if threads == 1:
        for number in range(len(crops.boxes)):
            one(number)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(len(crops.boxes))))


def zarr_shards(store: TileStore, threads: int) -> None:
    """Shard after shard through zarr-python."""
    import zarr

    group = zarr.open_group(store.label, mode="r")
    _by_shard(store, [group[name] for name in store.arrays], lambda part: part, threads)


def tensorstore_shards(store: TileStore, threads: int) -> None:
    """Shard after shard through tensorstore, which has threads of its own."""
    import tensorstore

    limits = tensorstore.Context({"data_copy_concurrency": {"limit": threads}, "file_io_concurrency": {"limit": threads}})
    arrays = [
        tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store.label}/{name}"}}, read=True, context=limits
        ).result()
        for name in store.arrays
    ]
    _by_shard(store, arrays, lambda part: part.read().result(), 1)


def _by_shard(store: TileStore, arrays: Sequence[Any], read: Callable[[Any], Any], threads: int) -> None:
    size, end = store.arrays["pixels"].tiles_per_shard, store.arrays["pixels"].shape[0]
    starts = range(0, end, size)

    def one(start: int) -> None:
        for array in arrays:
            read(array[start : min(start + size, end)])

    if threads == 1:
        for start in starts:
            one(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, starts))


@contextmanager
def zarrs_pipeline() -> Iterator[None]:
    """zarr-python with the codec pipeline of zarrs (Rust)."""
    import zarr
    import zarrs  # noqa: F401 - it must be there

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield


def installed(name: str) -> str | None:
    """Version of a library; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_bytes() -> int | None:
    """Bytes that this process has read so far, from files and pipes; None where the system does not tell."""
    try:
        with open("/proc/self/io") as stream:  # noqa: PTH123 - no path of a user
            return int(dict(line.split(": ") for line in stream.read().splitlines())["rchar"])
    except (OSError, KeyError, ValueError):
        return None
