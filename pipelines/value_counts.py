"""Which values the training tiles hold and how often, read from finished shards, a shard a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mae_core.histogram import Histogram
from mae_core.shards import ShardedArray
from mae_core.store_files import LocalFiles
from pipelines.preparation_workers import WorkerSettings, run_tasks, works_here

BYTES_HERE = 512 << 20
"""Less is counted in this process: workers take seconds to start."""


@dataclass(frozen=True)
class CountTask:
    """Tiles of one shard.

    Attributes:
        store: Folder of the store.
        arrays: Layout of `pixels` and `quality`.
        rows: Of the index.
    """

    store: Path
    arrays: Mapping[str, ShardedArray]
    rows: tuple[Mapping[str, Any], ...]


def count_values(store: Path, arrays: Mapping[str, ShardedArray], rows: Iterable[Mapping[str, Any]], settings: WorkerSettings) -> Histogram:
    """The values of some tiles of a store whose shards are finished: of every owned voxel that counts, of every channel it has.

    Raises:
        StoreError: A shard is gone or damaged.
        PreparationError: The workers cannot be had.
    """
    both = {name: arrays[name] for name in ("pixels", "quality")}
    size = both["pixels"].tiles_per_shard
    ordered = sorted(rows, key=lambda row: int(row["tile"]))
    tasks = [CountTask(store, both, tuple(group)) for _, group in groupby(ordered, key=lambda row: int(row["tile"]) // size)]
    pixels = both["pixels"]
    small = len(ordered) * prod(pixels.shape[1:]) * np.dtype(pixels.dtype).itemsize <= BYTES_HERE
    if not tasks:
        return Histogram.empty()
    done = (
        map(count_shard, tasks)
        if small or works_here(settings, len(tasks))
        else run_tasks(count_shard, tasks, settings, store / "progress")
    )
    total, waiting = Histogram.empty(), []
    for part in done:
        waiting.append(part)
        if len(waiting) == 16:
            total, waiting = Histogram.merged([total, *waiting]), []
    return Histogram.merged([total, *waiting])


def count_shard(task: CountTask) -> Histogram:
    """The values of the task's tiles."""
    files = LocalFiles(task.store)
    tiles = [int(row["tile"]) for row in task.rows]
    packed = {name: array.fetch(files, tiles) for name, array in task.arrays.items()}
    room = {name: np.empty(array.shape[1:], array.stored_dtype) for name, array in task.arrays.items()}
    parts: list[Histogram] = []
    for number, (row, tile) in enumerate(zip(task.rows, tiles, strict=True)):
        for name, array in task.arrays.items():
            array.unpack(files, tile, packed[name][number], room[name])
        parts += _tile_parts(row, room["pixels"], room["quality"])
        if len(parts) > 256:
            parts = [Histogram.merged(parts)]
    return Histogram.merged(parts)


def _tile_parts(row: Mapping[str, Any], pixels: np.ndarray, quality: np.ndarray) -> Sequence[Histogram]:
    owned = tuple(slice(0, int(size)) for size in row["owned"])
    counted = quality[owned] == 0
    if not counted.any():
        return []
    facts = zip(pixels, row["present"], row["scale"], row["offset"], strict=True)
    return [
        Histogram.of(number, plane[owned][counted], float(scale), float(offset))
        for number, (plane, present, scale, offset) in enumerate(facts)
        if present
    ]
