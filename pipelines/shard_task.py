"""What one dask task does: reads a region of a scene once, judges and measures its tiles, writes their shards and a record of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.store_folder import sha256_of
from mae_core.store_writer import ShardWriter, StoreLayout, write_file
from modalities.grid import Window
from modalities.quality import NO_VALUE, Quality
from modalities.scene import LabelMap, Scene, SceneError
from pipelines.tiling_plan import PlannedTile, PreparationError, tile_grid

TOO_LITTLE = "too little valid data"
TOO_CLOUDY = "too cloudy"
CLOUDED = int(Quality.CLOUD | Quality.EXCLUDED)
NO_LABEL = "no label"
EXACT = 2**53
"""Whole numbers up to this are float64 without rounding, so their sums are the same in whatever order they are added, and quick."""

Planes = tuple[NDArray[np.generic], NDArray[np.uint8], NDArray[np.int64] | None]
"""Pixels, quality and, where the scene has them, class numbers of a window."""

Reader = Callable[[Window], Planes]
Record = dict[str, Any]
Stamps = tuple[tuple[int, int], ...]
"""Bytes and time of the last change, in ns, of each file of a scene."""


@dataclass(frozen=True)
class Keep:
    """Which tiles are kept, by shares of their real voxels.

    Attributes:
        min_valid_fraction: That count.
        max_cloud_fraction: Under a cloud, its shadow or its border.
    """

    min_valid_fraction: float
    max_cloud_fraction: float = 1.0


@dataclass(frozen=True)
class ShardTask:
    """All that is needed to write whole shards, on any machine that sees the files and the store's folder.

    Attributes:
        store: Folder of the store.
        layout: Of the arrays.
        plan: Digest of the plan, kept in the record.
        tiles: Candidate tiles of the shards, by rising id: of one region, or of all small ones that are packed into one shard.
        scenes, labels: Those that the tiles are of, by position in the plan; a scene may have no labels.
        stamps: What the files of each scene were like when the plan was made.
        keep: Which tiles are thrown away.
    """

    store: Path
    layout: StoreLayout
    plan: str
    tiles: tuple[PlannedTile, ...]
    scenes: Mapping[int, Scene]
    labels: Mapping[int, LabelMap]
    stamps: Mapping[int, Stamps]
    keep: Keep

    @property
    def shards(self) -> tuple[int, ...]:
        """The shards that the task writes, rising."""
        return tuple(sorted({tile.tile // self.layout.tiles_per_shard for tile in self.tiles}))

    def only(self, shards: Collection[int]) -> ShardTask:
        """The task without the tiles of other shards."""
        kept = tuple(tile for tile in self.tiles if tile.tile // self.layout.tiles_per_shard in shards)
        return replace(self, tiles=kept)


class Refused(Exception):  # noqa: N818 - not an error: a tile that is thrown away on purpose
    """A tile holds too little; its argument is the reason that it is counted under."""


def run_task(task: ShardTask) -> list[Record]:
    """Writes each shard and then its record, and gives the records.

    A record has `rows` (columns of the index plus `moments` and `classes`), `discarded` (tiles by reason), `failed` (tile, scene and
    reason where a scene could not be read) and `files` (bytes and sha256).

    Raises:
        OSError: The disk is full or the folder cannot be written.
        PreparationError: The files of a scene have changed since the plan was made; no tile of it is written.
    """
    records: list[Record] = []
    read: Reader | None = None
    region = -1
    for shard, group in groupby(task.tiles, key=lambda tile: tile.tile // task.layout.tiles_per_shard):
        tiles = list(group)
        scenes = sorted({tile.scene for tile in tiles})
        rows: list[dict[str, Any]] = []
        failed: list[dict[str, Any]] = []
        discarded: Counter[str] = Counter()
        with ShardWriter(task.store, task.layout, shard) as writer:
            for tile in tiles:
                if read is None or tile.region != region:
                    _refuse_changed(task, tile.scene)
                    read = None  # the box that is done with goes before the next one comes
                    region, read = tile.region, reader_of(task, tile.region)
                try:
                    rows.append(write_tile(task, tile, read, writer))
                except Refused as refused:
                    discarded[str(refused)] += 1
                except SceneError as error:
                    failed.append({"tile": tile.tile, "scene": task.scenes[tile.scene].name, "reason": str(error)})
            for scene in scenes:
                _refuse_changed(task, scene)
        record: Record = {
            "plan": task.plan,
            "shard": shard,
            "rows": rows,
            "failed": failed,
            "discarded": dict(discarded),
            "files": writer.files,
            "stamps": {task.scenes[scene].name: task.stamps[scene] for scene in scenes},
        }
        write_file(record_path(task.store, shard), json.dumps(record, allow_nan=False).encode())
        records.append(record)
    return records


def record_path(store: Path, shard: int) -> Path:
    """Where the record of a finished shard lies while the store is being prepared."""
    return store / "progress" / f"shard-{shard:05d}.json"


def finished_record(task: ShardTask, shard: int) -> Record | None:
    """The record of a shard that was finished under this plan, from files that are as they were, and whose own files still are too."""
    try:
        record: Record = json.loads(record_path(task.store, shard).read_bytes())
        whole = record["plan"] == task.plan and not record["failed"]
        now = {scene.name: [list(stamp) for stamp in task.stamps[number]] for number, scene in task.scenes.items()}
        same = whole and all(stamps == now[name] for name, stamps in record["stamps"].items())
        same = same and all(sha256_of(task.store / name) == entry["sha256"] for name, entry in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if same else None


def stamps_of(scene: Scene) -> Stamps:
    """What the files of a scene are like now.

    Raises:
        OSError: A file is gone.
    """
    states = [file.stat() for file in scene.files]
    return tuple((state.st_size, state.st_mtime_ns) for state in states)


def _refuse_changed(task: ShardTask, number: int) -> None:
    """Stops where a file of a scene is not what the plan was made from; names the scene alone, since a file's name may be a patient's."""
    scene = task.scenes[number]
    for place, (file, (size, changed_ns)) in enumerate(zip(scene.files, task.stamps[number], strict=True), 1):
        try:
            state = file.stat()
        except OSError as error:
            what = f"cannot be looked at any more ({error.strerror})"
        else:
            if (state.st_size, state.st_mtime_ns) == (size, changed_ns):
                continue
            grown = f"has {state.st_size} bytes, where it had {size}"
            what = grown if state.st_size != size else "was written to, though it has as many bytes as before"
        raise PreparationError(
            f"scene {scene.name} changed while it was prepared: file {place} of {len(scene.files)} {what}. Nothing of it is taken from now "
            "on and finished shards are kept. Wait until the archive is at rest and run again: if the file is as it was, the rest is "
            "done; if it stays changed, delete what is unfinished or choose another --out"
        )


def measure(pixels: NDArray[np.generic], counted: NDArray[np.bool_], scale: float, offset: float) -> tuple[int, float, float, Any, Any]:
    """Count, mean, sum of squared distances from it, min and max of the physical value of one channel where `counted`."""
    chosen = pixels.reshape(-1) if counted.all() else pixels[counted]
    if not chosen.size:
        return 0, 0.0, 0.0, None, None
    ends = chosen.min(), chosen.max()
    values = chosen.astype(np.float64)
    if chosen.dtype.kind in "iu" and chosen.size * max(abs(int(end)) for end in ends) ** 2 <= EXACT:
        total = int(values.sum())
        mean = total / chosen.size
        m2 = (chosen.size * int(np.dot(values, values)) - total**2) / chosen.size
    else:
        mean = float(values.mean())
        m2 = float(np.square(values - mean).sum())
    low, high = sorted(float(end) * scale + offset for end in ends)
    return chosen.size, mean * scale + offset, m2 * scale**2, low, high


def write_tile(task: ShardTask, planned: PlannedTile, read: Reader, writer: ShardWriter) -> dict[str, Any]:
    """Writes a tile and gives its row.

    Raises:
        Refused: It holds too little.
        SceneError: It cannot be read, or holds what a store cannot.
        OSError: It cannot be written.
    """
    scene, layout = task.scenes[planned.scene], task.layout
    given, quality, numbers = read(planned.window)
    labels, ignore = None, 255
    if layout.has_labels:
        labels = np.full(planned.extent, -1, np.int16)
    if numbers is not None:
        labels, ignore = _class_numbers(numbers, scene.name), NO_VALUE
    fraction = float(np.count_nonzero((quality & ignore) == 0)) / prod(planned.extent)
    cloudy = float(np.count_nonzero(quality & CLOUDED)) / prod(planned.extent)
    if cloudy > task.keep.max_cloud_fraction:
        raise Refused(TOO_CLOUDY)
    if fraction < task.keep.min_valid_fraction:
        raise Refused(TOO_LITTLE)
    if planned.scene in task.labels and labels is not None and not (labels >= 0).any():
        raise Refused(NO_LABEL)
    row = _row(scene, planned, layout) | {"valid_fraction": fraction, "cloud_fraction": cloudy, "classes": _classes(labels)}
    pixels = np.zeros((len(layout.channels), *layout.tile), layout.dtype)
    inside = tuple(slice(0, size) for size in planned.extent)
    for place, channel in enumerate(scene.channels):
        pixels[layout.channels.index(channel.name)][inside] = given[place]
    row["moments"] = _moments(pixels[(slice(None), *inside)], quality, planned, row)
    padding = [(0, side - size) for side, size in zip(layout.tile, planned.extent, strict=True)]
    full = planned.extent == layout.tile  # to pad by nothing costs more than to pack the flags
    writer.add(
        planned.tile,
        pixels,
        quality if full else np.pad(quality, padding, constant_values=int(Quality.PADDING)),
        labels if full or labels is None else np.pad(labels, padding, constant_values=-1),
    )
    return row


def _row(scene: Scene, planned: PlannedTile, layout: StoreLayout) -> dict[str, Any]:
    by_name = {channel.name: channel for channel in scene.channels}
    grid = tile_grid(scene, planned)
    times = scene.times[planned.window[0]] if len(scene.times) > 1 else scene.times
    return {
        "tile": planned.tile,
        "scene": scene.name,
        "origin": list(planned.origin),
        "extent": list(planned.extent),
        "owned": list(planned.owned),
        "affine": [float(value) for value in grid.matrix.ravel()],
        "frame": grid.frame,
        "unit": grid.unit,
        "time": times[0] if times else "",
        "times": list(times) if len(scene.times) > 1 else [],
        "present": [name in by_name for name in layout.channels],
        "scale": [by_name[name].scale if name in by_name else 1.0 for name in layout.channels],
        "offset": [by_name[name].offset if name in by_name else 0.0 for name in layout.channels],
        "voxel_digests": list(scene.voxel_digests),
    }


def _moments(
    pixels: NDArray[np.generic], quality: NDArray[np.uint8], planned: PlannedTile, row: Mapping[str, Any]
) -> dict[str, list[float | None]]:
    """Per channel, over the owned voxels that count; a channel that the scene does not have counts nothing."""
    owned = tuple(slice(0, size) for size in planned.owned)
    counted = quality[owned] == 0
    columns = []
    for plane, scale, offset, present in zip(pixels, row["scale"], row["offset"], row["present"], strict=True):
        columns.append(measure(plane[owned], counted & present, scale, offset))
        if not np.isfinite(columns[-1][2]):
            raise SceneError(f"scene {row['scene']} gives values that are not finite where quality is 0, in {planned.window}")
    return {name: list(column) for name, column in zip(("count", "mean", "m2", "min", "max"), zip(*columns, strict=True), strict=True)}


def _classes(labels: NDArray[np.int16] | None) -> list[int]:
    return [] if labels is None else [int(value) for value in np.unique(labels) if value >= 0]


def _class_numbers(numbers: NDArray[np.int64], scene: str) -> NDArray[np.int16]:
    if numbers.min() < -1 or numbers.max() > np.iinfo(np.int16).max:
        raise SceneError(f"labels of {scene} run from {numbers.min()} to {numbers.max()}; class numbers are 0 to 32767, -1 for none")
    return numbers.astype(np.int16)


def reader_of(task: ShardTask, region: int) -> Reader:
    """Gives windows of what the tiles of a region cover, which is read once; window by window where a part of it cannot be read."""
    tiles = [tile for tile in task.tiles if tile.region == region]
    scene, labels = task.scenes[tiles[0].scene], task.labels.get(tiles[0].scene)

    def read(window: Window) -> Planes:
        try:
            return *scene.read(window), None if labels is None else labels.read(window)
        except OSError as error:
            raise SceneError(f"scene {scene.name} cannot be read in {window}: {error.strerror or type(error).__name__}") from error

    low = np.min([tile.origin for tile in tiles], axis=0).tolist()
    high = np.max([np.add(tile.origin, tile.extent) for tile in tiles], axis=0).tolist()
    try:
        whole = read(tuple(slice(start, stop) for start, stop in zip(low, high, strict=True)))
    except SceneError:
        return read

    def cut(window: Window) -> Planes:
        inside = tuple(slice(part.start - start, part.stop - start) for part, start in zip(window, low, strict=True))
        pixels, quality, numbers = whole
        return pixels[(slice(None), *inside)], quality[inside], None if numbers is None else numbers[inside]

    return cut


def shard_tasks(
    template: ShardTask, tiles: list[PlannedTile], scenes: tuple[Scene, ...], labels: Mapping[int, LabelMap]
) -> Iterator[ShardTask]:
    """One task per region that fills a shard, and one per shard that smaller regions are packed into, each with the scenes it needs."""
    size = template.layout.tiles_per_shard
    tiles_of = Counter(tile.region for tile in tiles)

    def owner(tile: PlannedTile) -> tuple[str, int]:
        return ("region", tile.region) if tiles_of[tile.region] >= size else ("shard", tile.tile // size)

    for _, group in groupby(tiles, key=owner):
        ours = tuple(group)
        numbers = sorted({tile.scene for tile in ours})
        yield replace(
            template,
            tiles=ours,
            scenes={number: scenes[number] for number in numbers},
            labels={number: labels[number] for number in numbers if number in labels},
            stamps={number: template.stamps[number] for number in numbers},
        )
