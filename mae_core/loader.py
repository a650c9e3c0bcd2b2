"""Raw batches from a tile store, in an order that is a pure function of the seed and the step.

Shards are read whole and in turn, and tiles are mixed with those of `window_shards` shards at a time: a *window*. A window's shards are
drawn anew each epoch. Packed tiles of a window and of the next one are in memory, unpacked ones of `prefetch` batches: no more, however
large the store. Reading and unpacking happen in threads, which the codecs let run beside one another. Spawned processes that hand nothing
over load 0.8 to 1.1 times as fast on two cores (`python pipelines/benchmark.py load`), and would have to hand everything over.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mae_core.augment import RawBatch
from mae_core.context import Context, days_and_years, metres_per_degree
from mae_core.masking import STREAM_ORDER, STREAM_WINDOW, Sample, counter_bits
from mae_core.memory import recycled
from mae_core.parallel import Parallel
from mae_core.settings import Settings
from mae_core.shards import StoreError
from mae_core.store import PackedTiles, TileStore


class LoaderSettings(Settings):
    """How samples are drawn and read."""

    global_batch_size: int = Field(64, ge=1, description="Samples of one update, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="Samples at once on a process (default: its whole share)")
    crops_per_tile: int = Field(1, ge=1, description="Crops drawn from a tile each time it is read (repeated sampling)")
    window_shards: int = Field(
        16, ge=1, description="Shards whose tiles are mixed with one another; they are read whole, one after another"
    )
    num_threads: int = Field(2, ge=1, description="Threads that read shards and unpack tiles")
    prefetch: int = Field(4, ge=1, description="Micro-batches that are read ahead")
    max_damaged_tiles: int = Field(
        0, ge=0, description="Tiles that may turn out damaged before the run stops; they are named, counted and fed as wholly invalid"
    )


UNMEASURED = ("index", "")
"""Units of lattices of which nobody said how far apart their voxels are."""

METRES = {"kilometre": 1000.0, "foot": 0.3048, "US survey foot": 1200 / 3937}
"""Units of world coordinates that are neither metres nor millimetres, by the names that a CRS gives them."""


class LoaderError(ValueError):
    """The loader's settings do not fit the processes or the store; the message names the setting."""


def share_of(settings: LoaderSettings, world: int) -> int:
    """Samples of an update that each of so many processes sees.

    Raises:
        LoaderError: They cannot be divided so.
    """
    share, left = divmod(settings.global_batch_size, world)
    if left:
        raise LoaderError(f"loader.global_batch_size={settings.global_batch_size} cannot be divided among {world} processes")
    if share % (settings.micro_batch_size or share):
        raise LoaderError(f"loader.micro_batch_size={settings.micro_batch_size} does not divide a process's share of {share} samples")
    return share


@dataclass(frozen=True, eq=False)
class Epoch:
    """The order of an epoch.

    Attributes:
        order: Places in the stream's rows, `(tile,)`.
        window_ends: Position behind the last tile of each window.
    """

    order: NDArray[np.int64]
    window_ends: NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """The endless stream of samples of a run.

    Sample `p` of the stream belongs to epoch `p // size`; an epoch holds every tile `crops_per_tile` times, in an order
    drawn from (seed, epoch). Step `s` takes samples `s·G … (s + 1)·G − 1` for a global batch of `G`, divided among
    the processes; so the data's state is `s`, and any number of processes sees the same samples.

    Attributes:
        store: What is read.
        rows: Rows of its index that are drawn from.
        settings: How.
        seed: Of the order.
        parallel: Which share is this process's.
        damaged: Tiles that this process found damaged, with what was wrong.
    """

    store: TileStore
    rows: NDArray[np.int64]
    settings: LoaderSettings
    seed: int
    parallel: Parallel
    damaged: dict[int, str] = field(default_factory=dict, init=False, compare=False)
    _epochs: dict[int, Epoch] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        share_of(self.settings, self.parallel.world)
        if not len(self.rows):
            raise LoaderError("there is no tile to train on")

    @property
    def share(self) -> int:
        """Samples of a step that are this process's."""
        return self.settings.global_batch_size // self.parallel.world

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a process computes for one update."""
        return self.share // (self.settings.micro_batch_size or self.share)

    def epoch(self, number: int) -> Epoch:
        """The order of an epoch: shards in a drawn order, cut into windows; in each window, tiles in a drawn order."""
        if number not in self._epochs:
            shards, shard_of = np.unique(self.store.shards[self.rows], return_inverse=True)
            turn = torch.argsort(counter_bits(self.seed, STREAM_WINDOW, number, torch.from_numpy(shards)), stable=True).numpy()
            window = np.empty(len(shards), np.int64)
            window[turn] = np.arange(len(shards)) // self.settings.window_shards
            keys = counter_bits(self.seed, STREAM_ORDER, number, torch.from_numpy(self.store.index.tile[self.rows])).numpy()
            order = np.lexsort((keys, window[shard_of]))
            for old in [known for known in tuple(self._epochs) if known < number - 1]:
                del self._epochs[old]
            self._epochs[number] = Epoch(order, np.cumsum(np.bincount(window[shard_of])))
        return self._epochs[number]

    def samples(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], Sample]:
        """Store rows and names of samples at positions of the stream."""
        crops = self.settings.crops_per_tile
        epoch, within = np.divmod(positions, len(self.rows) * crops)
        row = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(epoch):
            chosen = epoch == number
            row[chosen] = self.rows[self.epoch(int(number)).order[within[chosen] // crops]]
        tile = self.store.index.tile[row]
        names = (torch.from_numpy(part) for part in (epoch, tile, within % crops))
        return row, Sample(*names)

    def steps(self, first: int, last: int) -> Generator[tuple[list[RawBatch], float]]:
        """Micro-batches of each step from `first` to `last - 1`, with the seconds that were spent waiting for them.

        Raises:
            StoreError: More tiles are damaged than `max_damaged_tiles`; the message names the last one.
        """
        micro = self.share // self.micro_batches
        starts = (
            step * self.settings.global_batch_size + self.parallel.rank * self.share + number * micro
            for step in range(first, last)
            for number in range(self.micro_batches)
        )
        with ThreadPoolExecutor(self.settings.num_threads, "loader") as pool:
            windows = _Windows(self, pool, first, last)
            ahead: deque[Future[Any]] = deque()
            try:
                for _ in range(first, last):
                    waited, batches = 0.0, []
                    for _ in range(self.micro_batches):
                        while len(ahead) < self.settings.prefetch and (start := next(starts, None)) is not None:
                            rows, sample = self.samples(np.arange(start, start + micro))
                            parts = windows.holding(start, start + micro - 1, rows)
                            ahead.append(pool.submit(self._batch, rows, sample, parts))
                        began = perf_counter()
                        batches.append(ahead.popleft().result())
                        waited += perf_counter() - began
                    yield batches, waited
            finally:
                for future in (*ahead, *windows.pending()):
                    future.cancel()

    def _batch(self, rows: NDArray[np.int64], sample: Sample, parts: list[Future[PackedTiles]]) -> RawBatch:
        packed: PackedTiles = {name: {} for name in self.store.arrays}
        try:
            for part in parts:
                for name, chunks in part.result().items():
                    packed[name].update(chunks)
            return unpack_rows(self.store, rows, sample, packed, self)
        except MemoryError as error:
            raise LoaderError(
                f"memory of this machine ran out while tiles {sample.tile.tolist()} of {self.store.label} were read ({error}); lower "
                f"loader.prefetch={self.settings.prefetch}, loader.window_shards={self.settings.window_shards} or "
                f"loader.num_threads={self.settings.num_threads} and run again: it goes on from the last checkpoint"
            ) from error

    def damage(self) -> dict[str, float]:
        """Damaged tiles met so far, over all processes; nothing where none is tolerated."""
        if not self.settings.max_damaged_tiles:
            return {}
        return {"data/damaged_tiles": float(self.parallel.sum(torch.tensor(float(len(self.damaged)), device=self.parallel.device)))}

    def tolerate(self, tile: int, error: StoreError) -> None:
        """Note a damaged tile.

        Raises:
            StoreError: It is one too many.
        """
        self.damaged.setdefault(tile, str(error))
        if len(self.damaged) > self.settings.max_damaged_tiles:
            allowed = self.settings.max_damaged_tiles
            more = f"; that makes {len(self.damaged)} damaged tiles, loader.max_damaged_tiles allows {allowed}" if allowed else ""
            raise StoreError(f"{error}{more}") from error


class _Windows:
    """Packed tiles of the windows that are at work, each shard read once; those of the next window are read little by little."""

    def __init__(self, stream: Stream, pool: ThreadPoolExecutor, first: int, last: int) -> None:
        self._stream, self._pool = stream, pool
        size = stream.settings.global_batch_size
        self._range = first * size, last * size
        self._begun: dict[tuple[int, int], dict[int, Future[PackedTiles]]] = {}
        self._waiting: dict[tuple[int, int], deque[NDArray[np.int64]]] = {}

    def holding(self, first: int, last: int, rows: NDArray[np.int64]) -> list[Future[PackedTiles]]:
        """The shards, being read, that hold the rows of a batch from one position to another; older windows are let go.

        What a batch waits for is begun before it, by the same threads, so they never wait for each other in a circle.
        """
        low, high = self._window(first), self._window(last)
        for old in [key for key in self._begun if key < low]:
            del self._begun[old], self._waiting[old]
        wanted, key = [], low
        while key <= high:
            self._begin(key, 1.0)
            wanted.append(key)
            key = self._after(key)
        start, stop = self._positions(high)
        self._begin(key, (last + 1 - start) / (stop - start))
        shards = set(self._stream.store.shards[rows].tolist())
        return [part for window in wanted for shard, part in self._begun[window].items() if shard in shards]

    def pending(self) -> Iterator[Future[Any]]:
        """What may not have been read yet."""
        for parts in self._begun.values():
            yield from parts.values()

    def _window(self, position: int) -> tuple[int, int]:
        """Epoch and window of a position."""
        crops = self._stream.settings.crops_per_tile
        number, within = divmod(position, len(self._stream.rows) * crops)
        return number, int(np.searchsorted(self._stream.epoch(number).window_ends, within // crops, side="right"))

    def _after(self, key: tuple[int, int]) -> tuple[int, int]:
        number, window = key
        return (number, window + 1) if window + 1 < len(self._stream.epoch(number).window_ends) else (number + 1, 0)

    def _positions(self, key: tuple[int, int]) -> tuple[int, int]:
        """First position of a window and the one behind its last."""
        number, window = key
        crops, ends = self._stream.settings.crops_per_tile, self._stream.epoch(number).window_ends
        base = number * len(self._stream.rows)
        return (base + (int(ends[window - 1]) if window else 0)) * crops, (base + int(ends[window])) * crops

    def _begin(self, key: tuple[int, int], fraction: float) -> None:
        """Have a share of the shards of a window read, of those that this process needs."""
        if key not in self._begun:
            self._begun[key], self._waiting[key] = {}, deque(self._shards(key))
        begun, waiting = self._begun[key], self._waiting[key]
        for _ in range(math.ceil((len(begun) + len(waiting)) * fraction) - len(begun)):
            part = waiting.popleft()
            begun[int(self._stream.store.shards[part[0]])] = self._pool.submit(self._stream.store.fetch, part)

    def _shards(self, key: tuple[int, int]) -> list[NDArray[np.int64]]:
        """The rows of a window that this process needs, shard by shard."""
        stream, (start, stop) = self._stream, self._positions(key)
        positions = np.arange(max(start, self._range[0]), min(stop, self._range[1]))
        positions = positions[positions % stream.settings.global_batch_size // stream.share == stream.parallel.rank]
        if not len(positions):
            return []
        rows = np.unique(stream.samples(positions)[0])
        return np.split(rows, np.flatnonzero(np.diff(stream.store.shards[rows])) + 1)


def read_rows(store: TileStore, rows: NDArray[np.int64], sample: Sample) -> RawBatch:
    """The raw batch of some rows of a store's index.

    Raises:
        StoreError: A chunk is missing or damaged; the message names it.
    """
    return unpack_rows(store, rows, sample, store.fetch(rows), None)


def unpack_rows(store: TileStore, rows: NDArray[np.int64], sample: Sample, packed: PackedTiles, stream: Stream | None) -> RawBatch:
    """The raw batch of some rows whose packed tiles are at hand; a tile that several samples share is unpacked once.

    A damaged tile is an error, or, where the stream tolerates it, a tile of which nothing counts.
    """
    unique, places = np.unique(rows, return_inverse=True)
    shared = len(unique) < len(rows)
    unique = unique if shared else rows
    tensors = _room(store, len(unique), pinned=stream is not None and stream.parallel.device.type == "cuda")
    out = {name: tensor.numpy() for name, tensor in tensors.items()}
    for number, error in store.unpack(unique.tolist(), packed, out).items():
        if stream is None:
            raise error
        stream.tolerate(int(store.index.tile[unique[number]]), error)
        out["pixels"][number] = 0
        out["quality"][number] = store.no_value
        if "labels" in out:
            out["labels"][number] = -1
    index = store.index
    present = index.present[rows]
    whole = bool((index.extent[rows] == store.space).all())
    return RawBatch(
        pixels=tensors["pixels"],
        quality=tensors["quality"],
        labels=tensors.get("labels"),
        present=torch.from_numpy(present),
        scale=torch.from_numpy(index.scale[rows].astype(np.float32)),
        offset=torch.from_numpy(index.offset[rows].astype(np.float32)),
        extent=torch.from_numpy(index.extent[rows]),
        sample=sample,
        context=context_of(store, rows),
        complete=whole and bool(present.all()) and not out["quality"].any(),
        place=torch.from_numpy(places) if shared else None,
    )


def _room(store: TileStore, num_tiles: int, *, pinned: bool) -> dict[str, Tensor]:
    """Tensors that tiles are unpacked into, in their stored element types; page-locked where a GPU will fetch them."""
    room = {}
    for name, like in store.empty(0).items():
        shape, dtype = (num_tiles, *like.shape[1:]), torch.from_numpy(like).dtype
        if pinned:  # torch keeps and reuses such memory itself
            room[name] = torch.empty(shape, dtype=dtype, pin_memory=True)
        else:
            room[name] = torch.from_numpy(recycled(math.prod(shape) * dtype.itemsize)).view(dtype).reshape(shape)
    return room


def context_of(store: TileStore, rows: NDArray[np.int64]) -> Context:
    """What the index knows of some tiles besides their voxels; NaN for what it does not know. A series is told by its first date."""
    index, spacing = store.index, torch.from_numpy(spacings(store, rows))
    known = torch.from_numpy(np.array([unit not in UNMEASURED for unit in index.unit[rows]]))
    day, year = days_and_years(index.time[rows].tolist())
    latitude, longitude = (torch.from_numpy(column[rows].astype(np.float32)) for column in (index.latitude, index.longitude))
    return Context(day, year, latitude, longitude, torch.where(known[:, None], spacing, torch.nan), spacing)


def spacings(store: TileStore, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Distance between voxels along each axis of some tiles, `(row, axis)`: in mm for volumes, else in metres on the ground.

    Steps in degrees become metres at the tile's own latitude. Where nothing is known, a voxel is one voxel long.
    """
    axes = len(store.space)
    matrices = store.index.affine[rows].reshape(-1, axes + 1, axes + 1)
    units = store.index.unit[rows].astype(str)
    linear = matrices[:, :axes, :axes].copy()
    degrees = units == "degree"
    if degrees.any():
        middle = (store.index.extent[rows][degrees] - 1) / 2
        places = np.einsum("tij,tj->ti", linear[degrees], middle) + matrices[degrees, :axes, axes]
        linear[degrees, axes - 2 :] *= metres_per_degree(places[:, -1])[:, :, None]
    factors = np.array([METRES.get(unit, 1.0) for unit in units])
    steps: NDArray[np.float32] = (np.linalg.norm(linear, axis=1) * factors[:, None]).astype(np.float32)
    return steps


def fixed_batches(store: TileStore, rows: NDArray[np.int64], batch_size: int, parallel: Parallel) -> Iterator[RawBatch]:
    """Batches of the same rows in the same order at every call, for evaluation; each process reads its own share."""
    own = rows[parallel.rank :: parallel.world]
    for start in range(0, len(own), batch_size):
        part = own[start : start + batch_size]
        zero = torch.zeros(len(part), dtype=torch.int64)
        yield read_rows(store, part, Sample(zero, torch.from_numpy(store.index.tile[part]), zero))
