"""Scenes become a tile store, in parallel with dask; interrupted and started again it finishes the rest.

One task owns one shard of every array, so nothing is written by two, and the plan fixes which tiles a shard holds; so the store is
the same whatever the number of workers, the order in which they finish and the number of times the run was killed.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, field_validator

from mae_core.settings import Settings
from modalities.scene import LabelMap, Scene
from pipelines.preparation_folder import cannot_write, claimed, finished_manifest
from pipelines.preparation_plan import PreparationPlan, make_plan
from pipelines.preparation_report import PreparationReport, finish_store, report_of
from pipelines.shard_task import Record, ShardTask, finished_record, run_task
from pipelines.tiling_plan import PreparationError, SplitSettings

__all__ = ["PreparationError", "PreparationReport", "PrepareSettings", "prepare"]

GDAL_LIMITS = {"GDAL_NUM_THREADS": "1", "GDAL_CACHEMAX": "256"}
"""One thread and 256 MiB of cache per worker: dask does not see the memory that GDAL holds."""


CONNECT_TIMEOUT_S = 30
"""How long a dask scheduler has to answer."""


class PrepareSettings(Settings):
    """How scenes are cut into tiles and written."""

    tile: tuple[int, ...] = Field(
        (), max_length=3, description="Size of a tile per spatial axis, in voxels; empty: 128 for images, 64 for volumes, by the verb"
    )
    tiles_per_shard: int = Field(32, ge=1, description="Tiles in one file; one task writes one file")
    min_valid_fraction: float = Field(0.25, ge=0, le=1, description="Tiles with a smaller share of counted voxels are thrown away")
    max_rejected_fraction: float = Field(0.2, ge=0, le=1, description="Share of unreadable scenes above which the store is not finished")
    split: SplitSettings = SplitSettings()
    num_workers: int = Field(
        2, ge=0, description="Worker processes on this machine; 0, or a single shard, is worked in this process without dask"
    )
    memory_limit: str = Field("2GiB", description="Memory of a worker; above it dask pauses and then restarts the worker")
    scheduler: str | None = Field(
        None,
        description="Address of a running dask scheduler instead of workers of our own. Its workers must see the same folders. "
        "tcp:// is neither encrypted nor authenticated and runs what it is sent: use tls:// or a network of your own",
    )

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
) -> PreparationReport:
    """Writes the tile store of a catalogue and says what became of every tile; a finished store of the same plan is left as it is.

    With workers of its own, the calling script needs `if __name__ == "__main__":`, since they are spawned.

    Args:
        catalogue: Its scenes are taken in the order of their names.
        out: Folder of the store: new, empty, or one that an earlier run of the same plan left.
        settings: How.
        labels: Label maps by scene name; a scene that has one keeps only tiles with a label.
        attributes: Kept in the store's metadata; `kind` says the modality, `axes` names the spatial axes.
        progress: Called with shards done and shards in all, first when the work starts.

    Raises:
        PreparationError: The folder is taken, the disk too small, too many scenes fail, nothing is left, or a worker dies.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    plan = make_plan(catalogue.scenes, settings.tile, settings, labels or {}, attributes or {})
    manifest = finished_manifest(out, plan)
    if manifest is not None:
        return report_of(out, manifest, already_done=True, seconds=time.monotonic() - started)
    with claimed(out, plan):
        records = _write_shards(plan, out, settings, progress or _silent)
        try:
            return finish_store(out, plan, records, settings.max_rejected_fraction, started)
        except OSError as error:
            raise cannot_write(out, error) from error


def _write_shards(plan: PreparationPlan, out: Path, settings: PrepareSettings, progress: Callable[[int, int], None]) -> list[Record]:
    """Records of all shards by rising number; those that an earlier run finished are kept."""
    records: dict[int, Record] = {}
    todo: list[ShardTask] = []
    for task in plan.tasks(out, settings.min_valid_fraction):
        record = finished_record(out, task.shard, plan.digest)
        if record is None:
            todo.append(task)
        else:
            records[task.shard] = record
    _check_disk(out, plan, todo)
    total = plan.layout.num_shards
    progress(len(records), total)
    alone = settings.scheduler is None and (settings.num_workers == 0 or len(todo) == 1)
    run = _run_here(todo) if alone else _run_dask(todo, settings)
    with contextlib.closing(run):
        for record in run:
            records[record["shard"]] = record
            progress(len(records), total)
    return [records[shard] for shard in range(total)]


def _run_here(tasks: Iterable[ShardTask]) -> Generator[Record]:
    for task in tasks:
        try:
            yield run_task(task)
        except OSError as error:
            raise cannot_write(task.store, error) from error


def _run_dask(tasks: list[ShardTask], settings: PrepareSettings) -> Generator[Record]:
    """Records as they are finished; one task per worker thread is in flight, so that a worker that dies blames no other task."""
    if not tasks:
        return
    from distributed import KilledWorker, as_completed

    with _client(settings, len(tasks)) as client:
        waiting = iter(tasks)
        names = {}

        def submit(in_flight: int) -> list[Any]:
            started = []
            for task in islice(waiting, max(1, sum(client.nthreads().values())) - in_flight):
                started.append(client.submit(run_task, task, key=f"shard-{task.plan[:12]}-{task.shard}", pure=False))
                names[started[-1].key] = f"shard {task.shard} of {task.store} (scenes {', '.join(s.name for s in task.scenes.values())})"
            return started

        running = as_completed(submit(0), loop=client.loop)
        for future in running:
            try:
                yield future.result()
            except KilledWorker as error:
                raise PreparationError(
                    f"the worker that writes {names[future.key]} died again and again, most likely for want of memory "
                    f"({settings.memory_limit} each): raise prepare.memory_limit, or lower prepare.num_workers or prepare.tile"
                ) from error
            except OSError as error:
                raise cannot_write(tasks[0].store, error) from error
            running.update(submit(running.count()))


@contextlib.contextmanager
def _client(settings: PrepareSettings, num_tasks: int) -> Iterator[Any]:
    """A dask client of the scheduler that was named, or of a cluster of our own: on this machine only, encrypted, without dashboard."""
    import dask
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        if settings.scheduler is not None:
            try:
                yield stack.enter_context(Client(settings.scheduler, timeout=CONNECT_TIMEOUT_S, set_as_default=False))
            except (OSError, TimeoutError) as error:
                raise PreparationError(
                    f"no dask scheduler answers at {settings.scheduler} ({error}); start it or check the address"
                ) from error
            return
        stack.enter_context(dask.config.set({"distributed.scheduler.http.routes": []}))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="terravox-"))
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=min(settings.num_workers, num_tasks),
                threads_per_worker=1,
                processes=True,
                memory_limit=settings.memory_limit,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                security=True,
                local_directory=scratch,
                silence_logs=logging.CRITICAL,
                env=GDAL_LIMITS,
            )
        )
        yield stack.enter_context(Client(cluster, set_as_default=False))


def _check_disk(out: Path, plan: PreparationPlan, todo: Iterable[ShardTask]) -> None:
    """Refuses to start where the tiles would not fit uncompressed."""
    wanted = sum(prod(tile.extent) * plan.bytes_per_voxel for task in todo for tile in task.tiles)
    free = shutil.disk_usage(out).free
    if wanted > free:
        raise PreparationError(
            f"{out} has {free / 2**30:.1f} GiB free, the tiles need up to {wanted / 2**30:.1f} GiB uncompressed: "
            "free some, choose another folder, or prepare fewer scenes"
        )


def _silent(done: int, total: int) -> None:
    del done, total
