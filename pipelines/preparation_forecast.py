"""What a preparation is about to do, said before it starts: scenes, tiles, bytes, room on the disk and how long it may take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from time import monotonic

from mae_core.store_writer import ShardWriter
from modalities.scene import SceneError
from pipelines.preparation_plan import PreparationPlan
from pipelines.shard_task import Refused, ShardTask, reader_of, write_tile
from pipelines.tiling_plan import PreparationError, scene_regions

SAMPLED_TILES = 16
"""Tiles that are written on trial."""

MIN_TASKS = 6
"""With fewer tasks than this a trial would take as long as the work."""

AMPLIFIED = 1.1
"""Blocks unpacked per block above which it is worth saying."""


@dataclass(frozen=True)
class Forecast:
    """What is left to do.

    Attributes:
        num_scenes, num_tiles: Of the tasks that are left.
        num_bytes: Of their tiles, uncompressed; compressed it will be less.
        tile_bytes: Of one whole tile, uncompressed.
        free_bytes: Room on the disk of the store.
        amplification: Blocks that are unpacked per block that there is; more than 1 where a scene's blocks are larger than a region.
        sampled: Scene that was tried; empty if none was.
        work_seconds: How long one process would take; None if nothing was tried.
        num_workers: Processes that share the work; None where a scheduler decides.
    """

    num_scenes: int
    num_tiles: int
    num_bytes: int
    tile_bytes: int
    free_bytes: int
    amplification: float
    sampled: str
    work_seconds: float | None
    num_workers: int | None

    def summary(self) -> str:
        """The forecast in lines for a person."""
        room = f"{_size(self.num_bytes)} uncompressed; {_size(self.free_bytes)} free"
        lines = [f"to do: {self.num_tiles} tiles of {self.num_scenes} scenes, {room}"]
        if self.amplification > AMPLIFIED:
            lines.append(
                f"  blocks of the source are unpacked {self.amplification:.1f} times each, since they are larger than what is read at "
                "once; files with smaller blocks (512 × 512, gdal_translate -of COG) would be read faster"
            )
        if self.work_seconds is not None:
            shared = f"{_time(self.work_seconds)} of work for one process"
            if self.num_workers is not None:
                shared = f"about {_time(self.work_seconds / self.num_workers)} with {self.num_workers} processes ({shared})"
            lines.append(f"  {shared}, from reading one region of {self.sampled} and writing up to {SAMPLED_TILES} tiles of it on trial")
        return "\n".join(lines)


def forecast(plan: PreparationPlan, out: Path, todo: Sequence[ShardTask], num_workers: int | None) -> Forecast:
    """What the tasks that are left come to.

    The time is measured: the middle region of the scene of median size is read and some of its tiles are judged, packed and written
    beside the store, all in this process; reading is scaled by bytes, the rest by tiles.

    Args:
        plan: All that is done.
        out: Folder of the store.
        todo: Tasks that are left.
        num_workers: Processes at work; None where that is not known.
    """
    tiles = [tile for task in todo for tile in task.tiles]
    scenes = {number: scene for task in todo for number, scene in task.scenes.items()}
    cuts = [scene_regions(scene, plan.layout.tile, plan.split, labelled=plan.layout.has_labels)[1] for scene in scenes.values()]
    sampled, seconds = ("", None) if len(todo) < MIN_TASKS else _try(todo, out)
    cores = None if num_workers is None else max(1, min(num_workers, len(todo), os.cpu_count() or 1))
    return Forecast(
        num_scenes=len(scenes),
        num_tiles=len(tiles),
        num_bytes=sum(prod(tile.extent) for tile in tiles) * plan.bytes_per_voxel,
        tile_bytes=prod(plan.layout.tile) * plan.bytes_per_voxel,
        free_bytes=shutil.disk_usage(out).free,
        amplification=sum(cut.touched for cut in cuts) / max(1, sum(cut.blocks for cut in cuts)),
        sampled=sampled,
        work_seconds=seconds,
        num_workers=cores,
    )


def refuse_full_disk(out: Path, plan: PreparationPlan, todo: Sequence[ShardTask]) -> None:
    """Refuses to start where the tiles would not fit uncompressed.

    Raises:
        PreparationError: They would not; the message gives both figures.
    """
    wanted = sum(prod(tile.extent) for task in todo for tile in task.tiles) * plan.bytes_per_voxel
    free = shutil.disk_usage(out).free
    if wanted > free:
        raise PreparationError(
            f"{out} has {free / 2**30:.1f} GiB free, the tiles need up to {wanted / 2**30:.1f} GiB uncompressed: "
            "free some, choose another folder, or prepare fewer scenes"
        )


def _try(todo: Sequence[ShardTask], out: Path) -> tuple[str, float | None]:
    """The scene that was tried and the seconds that all tasks would take; None where it cannot be read."""
    sizes = {number: _read_bytes(task, number) for task in todo for number in task.scenes}
    typical = sorted(sizes, key=lambda number: (sizes[number], number))[len(sizes) // 2]
    tasks = [task for task in todo if typical in task.scenes]
    task = tasks[len(tasks) // 2]
    regions = sorted({tile.region for tile in task.tiles if tile.scene == typical})
    region = regions[len(regions) // 2]
    tiles = [tile for tile in task.tiles if tile.region == region]
    shard = tiles[0].tile // task.layout.tiles_per_shard
    some = [tile for tile in tiles if tile.tile // task.layout.tiles_per_shard == shard][:SAMPLED_TILES]
    folder = out / "progress" / "trial"
    try:
        began = monotonic()
        read = reader_of(task, region)
        between = monotonic()
        with ShardWriter(folder, task.layout, shard) as writer:
            for tile in some:
                with suppress(Refused):
                    write_tile(replace(task, store=folder), tile, read, writer)
        ended = monotonic()
    except SceneError:
        return task.scenes[typical].name, None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    voxels = sum(prod(tile.owned) for tile in tiles)
    share = sum(_owned_bytes(task) for task in todo) / (voxels * _voxel_bytes(task, typical))
    return task.scenes[typical].name, (between - began) * share + (ended - between) / len(some) * sum(len(task.tiles) for task in todo)


def _voxel_bytes(task: ShardTask, number: int) -> int:
    scene = task.scenes[number]
    return len(scene.channels) * scene.dtype.itemsize


def _owned_bytes(task: ShardTask) -> int:
    return sum(prod(tile.owned) * _voxel_bytes(task, tile.scene) for tile in task.tiles)


def _read_bytes(task: ShardTask, number: int) -> int:
    return prod(task.scenes[number].grid.space) * _voxel_bytes(task, number)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
