"""Raw batches from a tile store, in an order that is a pure function of the seed and the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from mae_core.augment import RawBatch
from mae_core.context import only_spacing
from mae_core.masking import STREAM_ORDER, Sample, counter_bits
from mae_core.parallel import Parallel
from mae_core.settings import Settings
from mae_core.store import TileStore


class LoaderSettings(Settings):
    """How samples are drawn and read."""

    global_batch_size: int = Field(64, ge=1, description="Samples of one update, over all processes")
    micro_batch_size: int | None = Field(None, ge=1, description="Samples at once on a process (default: its whole share)")
    repeats: int = Field(1, ge=1, description="Crops drawn from a tile each time it is read (repeated sampling)")
    num_threads: int = Field(2, ge=1, description="Threads that read and decode tiles")
    prefetch: int = Field(4, ge=1, description="Micro-batches that are read ahead")


class LoaderError(ValueError):
    """The loader's settings do not fit the processes or the store; the message names the setting."""


@dataclass(frozen=True)
class Stream:
    """The endless stream of samples of a run.

    Sample `p` of the stream belongs to epoch `p // size`; an epoch holds every tile `repeats` times, in an order
    drawn from (seed, epoch). Step `s` takes samples `s·G … (s + 1)·G − 1` for a global batch of `G`, divided among
    the processes; so the data's state is `s`, and any number of processes sees the same samples.
    """

    store: TileStore
    rows: NDArray[np.int64]
    settings: LoaderSettings
    seed: int
    parallel: Parallel

    def __post_init__(self) -> None:
        share, left = divmod(self.settings.global_batch_size, self.parallel.world)
        if left:
            raise LoaderError(
                f"loader.global_batch_size={self.settings.global_batch_size} cannot be divided among {self.parallel.world} processes"
            )
        if share % (self.settings.micro_batch_size or share):
            raise LoaderError(
                f"loader.micro_batch_size={self.settings.micro_batch_size} does not divide a process's share of {share} samples"
            )
        if not len(self.rows):
            raise LoaderError("there is no tile to train on")

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a process computes for one update."""
        share = self.settings.global_batch_size // self.parallel.world
        return share // (self.settings.micro_batch_size or share)

    def samples(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], Sample]:
        """Store rows and names of samples at positions of the stream."""
        size = len(self.rows) * self.settings.repeats
        epoch, within = np.divmod(positions, size)
        row = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(epoch):
            chosen = epoch == number
            row[chosen] = self.rows[self._order(int(number))[within[chosen] // self.settings.repeats]]
        tile = self.store.index.tile[row]
        names = (torch.from_numpy(part) for part in (epoch, tile, within % self.settings.repeats))
        return row, Sample(*names)

    def steps(self, first: int, last: int) -> Iterator[tuple[list[RawBatch], float]]:
        """Micro-batches of each step from `first` to `last - 1`, with the seconds that were spent waiting for them."""
        share = self.settings.global_batch_size // self.parallel.world
        micro = share // self.micro_batches
        starts = (
            step * self.settings.global_batch_size + self.parallel.rank * share + number * micro
            for step in range(first, last)
            for number in range(self.micro_batches)
        )
        with ThreadPoolExecutor(self.settings.num_threads, thread_name_prefix="loader") as pool:
            ahead: deque[Future[RawBatch]] = deque()
            try:
                for _ in range(first, last):
                    waited, batches = 0.0, []
                    for _ in range(self.micro_batches):
                        while len(ahead) < self.settings.prefetch and (start := next(starts, None)) is not None:
                            ahead.append(pool.submit(self.read, np.arange(start, start + micro)))
                        began = perf_counter()
                        batches.append(ahead.popleft().result())
                        waited += perf_counter() - began
                    yield batches, waited
            finally:
                for future in ahead:
                    future.cancel()

    def read(self, positions: NDArray[np.int64]) -> RawBatch:
        """The raw batch of samples at positions of the stream; a tile that several of them share is read once.

        Raises:
            StoreError: A chunk is missing or damaged; the message names it.
        """
        rows, sample = self.samples(positions)
        return read_rows(self.store, rows, sample)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        keys = counter_bits(self.seed, STREAM_ORDER, epoch, torch.from_numpy(self.store.index.tile[self.rows]))
        order: NDArray[np.int64] = torch.argsort(keys, stable=True).numpy()
        return order


def read_rows(store: TileStore, rows: NDArray[np.int64], sample: Sample) -> RawBatch:
    """The raw batch of some rows of a store's index."""
    unique, place = np.unique(rows, return_inverse=True)
    tiles = [store.read(int(row)) for row in unique]
    chosen = [tiles[index] for index in place]
    labels = None
    if chosen[0].labels is not None:
        labels = torch.from_numpy(np.stack([np.asarray(tile.labels) for tile in chosen]))
    pixels, quality = np.stack([tile.pixels for tile in chosen]), np.stack([tile.quality for tile in chosen])
    present = np.stack([tile.present for tile in chosen])
    whole = all(tuple(tile.extent) == store.space for tile in chosen)
    return RawBatch(
        pixels=torch.from_numpy(pixels),
        quality=torch.from_numpy(quality),
        labels=labels,
        present=torch.from_numpy(present),
        scale=torch.from_numpy(np.stack([tile.scale for tile in chosen])),
        offset=torch.from_numpy(np.stack([tile.offset for tile in chosen])),
        extent=torch.tensor([tile.extent for tile in chosen]),
        sample=sample,
        context=only_spacing(torch.from_numpy(spacings(store, rows))),
        complete=whole and not quality.any() and bool(present.all()),
    )


def spacings(store: TileStore, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Distance between voxels along each axis of some tiles, in the store's unit, `(row, axis)`."""
    axes = len(store.space)
    matrices = store.index.affine[rows].reshape(-1, axes + 1, axes + 1)
    steps: NDArray[np.float32] = np.linalg.norm(matrices[:, :axes, :axes], axis=1).astype(np.float32)
    return steps


def fixed_batches(store: TileStore, rows: NDArray[np.int64], batch_size: int, parallel: Parallel) -> Iterator[RawBatch]:
    """Batches of the same rows in the same order at every call, for evaluation; each process reads its own share."""
    own = rows[parallel.rank :: parallel.world]
    for start in range(0, len(own), batch_size):
        part = own[start : start + batch_size]
        zero = torch.zeros(len(part), dtype=torch.int64)
        yield read_rows(store, part, Sample(zero, torch.from_numpy(store.index.tile[part]), zero))
