"""Scenes become a tile store, in parallel with dask; interrupted and started again it finishes the rest.

One task owns whole shards of every array, so nothing is written by two, and the plan fixes which tiles a shard holds; so the store
is the same whatever the number of workers, the order in which they finish and the number of times the run was killed. A task reads
the region of a scene that its shards are made of once.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, field_validator

from mae_core.chunks import Compression
from mae_core.launch import launched
from mae_core.settings import Settings
from modalities.scene import LabelMap, Scene
from pipelines.preparation_folder import JustFinishedError, cannot_write, claimed, finished_store, tidy
from pipelines.preparation_forecast import Forecast, forecast, refuse_full_disk
from pipelines.preparation_plan import PreparationPlan, make_plan
from pipelines.preparation_report import PreparationReport, failures, finish_store, refuse_failed, report_of
from pipelines.preparation_workers import ClusterSettings, LocalCluster, run_tasks, works_here
from pipelines.shard_task import Keep, Record, ShardTask, finished_record, run_task
from pipelines.statements import StatementSettings
from pipelines.tiling_plan import PreparationError, SplitSettings
from pipelines.withheld import WithheldError, discreet, is_private, trace_of

__all__ = ["PreparationError", "PreparationReport", "PrepareSettings", "prepare"]


class PrepareSettings(Settings):
    """How scenes are cut into tiles and written."""

    tile: tuple[int, ...] = Field(
        (), max_length=3, description="Size of a tile per spatial axis, in voxels; empty: 128 for images, 64 for volumes, by the verb"
    )
    tiles_per_shard: int = Field(32, ge=1, description="Tiles in one file at most")
    compression: Compression = Field("fast", description="fast: what unpacks fastest; small: packed tighter, unpacked more slowly")
    min_valid_fraction: float = Field(0.25, ge=0, le=1, description="Tiles with a smaller share of counted voxels are thrown away")
    max_cloud_fraction: float = Field(
        1.0, ge=0, le=1, description="Tiles with a larger share of voxels under a cloud, its shadow or its border are thrown away"
    )
    max_rejected_fraction: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of scenes that cannot be read above which the store is not finished, and of damaged files of scans above which "
        "it is not begun",
    )
    mix_levels: bool = Field(False, description="Whether one channel may come in several processing levels, such as B02 of L1C and of L2A")
    split: SplitSettings = SplitSettings()
    states: StatementSettings = StatementSettings()
    num_workers: int = Field(
        2, ge=0, description="Worker processes on this machine; 0, or a single task, is worked in this process without dask"
    )
    memory_limit: str = Field("2GiB", description="Memory of a worker; above it dask pauses and then restarts the worker")
    scheduler: str | None = Field(
        None,
        description="Address of a running dask scheduler instead of workers of our own. Its workers must see the same folders. "
        "tcp:// is neither encrypted nor authenticated and runs what it is sent: use tls:// or a network of your own",
    )
    cluster: ClusterSettings = Field(LocalCluster(), description="Where workers of our own run")

    @field_validator("tile")
    @classmethod
    def _sizes(cls, tile: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in tile):
            raise ValueError("a tile has at least one voxel on every axis")
        return tile


class HasScenes(Protocol):
    """What is prepared: a `modalities.catalogue.Catalogue`, or anything with scenes."""

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """Usable scenes, each name once."""
        ...


def prepare(
    catalogue: HasScenes,
    out: Path,
    settings: PrepareSettings,
    *,
    labels: Mapping[str, LabelMap] | None = None,
    attributes: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[Forecast], None] | None = None,
) -> PreparationReport:
    """Writes the tile store of a catalogue and says what became of every tile.

    A finished store of the same settings takes in the scenes that it does not have and is left as it is where there are none.
    With workers of its own, the calling script needs `if __name__ == "__main__":`, since they are spawned.

    Args:
        catalogue: Its scenes are taken in the order of their names.
        out: Folder of the store: new, empty, one that an earlier run of the same plan left, or a finished store.
        settings: How.
        labels: Label maps by scene name; a scene that has one keeps only tiles with a label.
        attributes: Kept in the store's metadata; `kind` says the modality, `axes` names the spatial axes.
        progress: Called with tiles done and tiles in all, first when the work starts.
        announce: Called before that with what is about to be done, if there is anything; a part of it is tried for that.

    Raises:
        PreparationError: The folder is taken, the disk too small, too many scenes fail, nothing is left, a worker dies, a file
            changes meanwhile, or one that is in the store has changed.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    earlier = finished_store(out)
    plan = make_plan(catalogue.scenes, settings.tile, settings, labels or {}, attributes or {}, earlier)
    if earlier is not None and not plan.tiles:
        tidy(out, earlier)
        return report_of(out, earlier.store.manifest, seconds=time.monotonic() - started, grown=plan.grown)
    try:
        with claimed(out, plan):
            records = _write_shards(plan, out, settings, progress or _silent, announce)
            return finish_store(out, plan, records, started, settings)
    except PreparationError as error:
        finished = isinstance(error, JustFinishedError) or (earlier is None and (out / "manifest.json").is_file())
        if launched(os.environ).world == 1 or not finished:
            raise
    return prepare(catalogue, out, settings, labels=labels, attributes=attributes, progress=progress, announce=announce)


def _write_shards(
    plan: PreparationPlan,
    out: Path,
    settings: PrepareSettings,
    progress: Callable[[int, int], None],
    announce: Callable[[Forecast], None] | None,
) -> list[Record]:
    """Records of all shards by rising number; those that an earlier run finished are kept."""
    records: dict[int, Record] = {}
    failed: dict[str, str] = {}
    todo: list[ShardTask] = []
    for task in plan.tasks(out, Keep(settings.min_valid_fraction, settings.max_cloud_fraction)):
        found = {shard: record for shard in task.shards if (record := finished_record(task, shard))}
        records |= found
        if len(found) < len(task.shards):
            todo.append(task.only(set(task.shards) - found.keys()))
    refuse_full_disk(out, plan, todo)
    if announce is not None:
        announce(forecast(plan, out, todo, num_processes(settings)))
    progress(_num_tiles(records.values()), len(plan.tiles))
    alone = works_here(settings, len(todo))
    work = _write_shards_of_patients if is_private(str(plan.attributes.get("kind", ""))) else _write_shards_of
    run = (work(task) for task in todo) if alone else run_tasks(work, todo, settings, out / "progress", _described)
    with contextlib.closing(run):
        for done in run:
            records |= {record["shard"]: record for record in done}
            failed |= failures(done)
            refuse_failed(plan, failed, settings.max_rejected_fraction)
            progress(_num_tiles(records.values()), len(plan.tiles))
    return [records[shard] for shard in sorted(records)]


def _write_shards_of(task: ShardTask) -> list[Record]:
    """The records of a task; where the folder cannot be written, the error says so in whatever process it was."""
    try:
        return run_task(task)
    except OSError as error:
        raise cannot_write(task.store, error) from error


def _write_shards_of_patients(task: ShardTask) -> list[Record]:
    """The same, in a process whose log may be read by others: an unexpected error comes out without its message."""
    try:
        with discreet(private=True):
            return _write_shards_of(task)
    except PreparationError as error:
        raise PreparationError(str(error)) from None
    except Exception as error:
        raise WithheldError(trace_of(error)) from None


def _num_tiles(records: Iterable[Record]) -> int:
    """Candidate tiles that shards are done with, whatever became of them."""
    return sum(len(record["rows"]) + len(record["failed"]) + sum(record["discarded"].values()) for record in records)


def num_processes(settings: PrepareSettings) -> int | None:
    """Processes that the settings ask for; None where a scheduler that runs already decides."""
    if settings.scheduler is not None:
        return None
    if isinstance(settings.cluster, LocalCluster):
        return max(1, settings.num_workers)
    return settings.cluster.num_jobs * settings.cluster.cores


def _described(task: ShardTask) -> str:
    shards = task.shards
    named = f"shard {shards[0]}" if len(shards) == 1 else f"shards {shards[0]} to {shards[-1]}"
    return f"{named} of {task.store} (scenes {', '.join(scene.name for scene in task.scenes.values())})"


def _silent(done: int, total: int) -> None:
    del done, total
