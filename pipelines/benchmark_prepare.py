"""A preparation against the least that it has to do, by others' means, with as many processes, in the same run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from mae_core.settings import Settings, to_plain
from mae_core.store import TileStore
from modalities.catalogue import Catalogue, ReaderSettings, scan
from modalities.scene import SceneError
from pipelines.benchmark_ceiling import Ceiling, ceiling_workers, packing_units, unpacking_units, write_image
from pipelines.benchmark_machine import description
from pipelines.benchmark_report import busy_note, ratios
from pipelines.command_line import run
from pipelines.preparation import PreparationError, PreparationReport, PrepareSettings, prepare
from pipelines.preparation_workers import GDAL_LIMITS, StandingWorkers, standing_workers
from pipelines.prepare import for_modality, store_attributes
from pipelines.progress import console, table
from pipelines.run_folder import RunError, write_json
from pipelines.tiling_plan import scene_regions

DESCRIPTION = (
    "prepare: files to tile store, against rasterio or nibabel unpacking the same files and zarr-python packing the same tiles, with as "
    "many processes; no quality and no statistics there. Ratios, not absolute times, are to be compared"
)
NAMES = OURS, STARTED, CEILING = "prepare", "prepare, workers started", "unpack and pack"


class ImageSettings(Settings):
    """The image that is made where no data are given: a tiled GeoTIFF of 16 bits, smooth fields and noise."""

    size: int = Field(1024, ge=64, description="Rows and columns")
    bands: int = Field(4, ge=1, description="Bands")
    block: int = Field(256, ge=16, multiple_of=16, description="Rows and columns of a block of the file")


class PrepareBenchSettings(Settings):
    """Settings of `benchmark prepare`."""

    out: Path | None = Field(None, description="JSON file to write the figures to")
    modality: Literal["sentinel2", "raster", "mri"] = Field("raster", description="Which adapter reads the files")
    data: Path | None = Field(None, description="Folder of files, searched to its depth, or one file; none: an image is made")
    image: ImageSettings = ImageSettings()
    reader: ReaderSettings
    prepare: PrepareSettings
    rounds: int = Field(3, ge=1, description="Turns; in each, all that is compared is done once")
    scratch: Path | None = Field(None, description="Where stores are written and removed again (default: the system's place for such)")

    @model_validator(mode="before")
    @classmethod
    def _by_modality(cls, values: dict[str, Any]) -> dict[str, Any]:
        return for_modality(values, values.get("modality", "raster"))

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.prepare.num_workers < 1 or self.prepare.scheduler is not None or self.prepare.cluster.kind != "local":
            raise ValueError("what is measured is worker processes of this machine: prepare.num_workers from 1, no scheduler, no cluster")
        return self


@dataclass
class Rounds:
    """What was measured, by what was done, one figure a round.

    Attributes:
        seconds: By the clock.
        processor_seconds: Of all processes at work together, of the workers and of this one; it bears other load on the machine.
        ceilings: The ceiling in its parts.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in NAMES})
    processor_seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in NAMES[1:]})
    ceilings: list[Ceiling] = field(default_factory=list)


class Bench:
    """The scenes, and one turn of each of what is compared, in a folder of its own."""

    def __init__(self, settings: PrepareBenchSettings, folder: Path, workers: StandingWorkers) -> None:
        self.settings = settings
        self._folder = folder
        self._workers = workers
        self.catalogue = self._catalogue()
        self.store = folder / "first"
        self.report = self._prepare(self.store, standing=True)
        self.units = unpacking_units(file for scene in self.catalogue.scenes for file in scene.files)
        if not self.units:
            raise RunError("no GeoTIFF, JPEG 2000 or NIfTI among the files, so there is nothing to compare with")

    def _catalogue(self) -> Catalogue:
        settings = self.settings
        data = settings.data
        if data is None:
            data = self._folder / "image.tif"
            write_image(data, settings.image.size, settings.image.bands, settings.image.block)
        return scan(data, settings.reader)

    def _prepare(self, out: Path, *, standing: bool) -> PreparationReport:
        settings = self.settings.prepare
        if standing:
            settings = settings.model_copy(update={"scheduler": self._workers.address})
        return prepare(self.catalogue, out, settings, attributes=store_attributes(self.settings.reader, len(settings.tile)))

    def seconds(self, *, standing: bool) -> float:
        """Of a preparation, by workers that stand ready or by its own.

        Raises:
            RunError: Its store is not the first one's.
        """
        out = self._folder / "again"
        began = perf_counter()
        report = self._prepare(out, standing=standing)
        seconds = perf_counter() - began
        shutil.rmtree(out)
        if report.digest != self.report.digest:
            raise RunError(f"no rate is reported: the store has digest {report.digest[:12]}, the first had {self.report.digest[:12]}")
        return seconds

    def blocks(self) -> dict[str, int]:
        """Blocks of the scenes' files that the regions touch, and blocks that are there."""
        settings = self.settings.prepare
        regions = [scene_regions(scene, settings.tile, settings.split, labelled=False)[1] for scene in self.catalogue.scenes]
        return {"touched": sum(each.touched for each in regions), "there": sum(each.blocks for each in regions)}

    def race(self) -> Rounds:
        """All rounds."""
        rounds = Rounds()
        with ceiling_workers(self.settings.prepare.num_workers, GDAL_LIMITS) as others:
            for _ in range(self.settings.rounds):
                copy = self._folder / "copy"
                ceiling = others.do([*self.units, *packing_units(self.store, copy)])
                shutil.rmtree(copy)
                before = process_time() + self._workers.processor_seconds()
                ours = self.seconds(standing=True)
                processor = process_time() + self._workers.processor_seconds() - before
                rounds.ceilings.append(ceiling)
                for name, wall in zip(NAMES, (self.seconds(standing=False), ours, ceiling.unpack + ceiling.pack), strict=True):
                    rounds.seconds[name].append(wall)
                rounds.processor_seconds[STARTED].append(processor)
                rounds.processor_seconds[CEILING].append(ceiling.processor_seconds)
        return rounds


def work(settings: PrepareBenchSettings) -> int:
    """Do it."""
    machine = description(torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="terravox-", dir=settings.scratch) as folder, standing_workers(settings.prepare) as workers:
        bench = Bench(settings, Path(folder), workers)
        rounds = bench.race()
        data = facts(bench)
        found = {
            "verb": "benchmark",
            "subject": "prepare",
            "machine": machine,
            "num_workers": settings.prepare.num_workers,
            "data": data,
            "seconds": rounds.seconds,
            "processor_seconds": rounds.processor_seconds,
            "megabytes_per_second": {name: data["pixel_bytes"] / 1e6 / median(each) for name, each in rounds.seconds.items()},
            "ceiling_seconds": {name: median(getattr(each, name) for each in rounds.ceilings) for name in ("unpack", "pack")},
            "of_ceiling": {name: ratios(rounds.seconds, [name])[name][CEILING] for name in (OURS, STARTED)},
            "of_ceiling_by_processor": ratios(rounds.processor_seconds, [STARTED])[STARTED][CEILING],
            "peak_bytes_of_workers": workers.peak_bytes(),
            "blocks": bench.blocks(),
            "config": to_plain(settings),
        }
    tell(found)
    if settings.out is not None:
        write_json(settings.out, found)
        console.print(f"written to {settings.out}")
    return 0


def facts(bench: Bench) -> dict[str, int]:
    """What was prepared, in numbers; `pixel_bytes` are those of the tiles in the store, unpacked."""
    store = TileStore.open(bench.store, verify="sizes")
    files = {unit.file for unit in bench.units}
    return {
        "scenes": len(bench.catalogue.scenes),
        "files": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
        "tiles": len(store),
        "pixel_bytes": len(store) * len(store.channels) * store.dtype.itemsize * prod(store.space),
        "store_bytes": bench.report.num_bytes,
    }


def tell(found: Mapping[str, Any]) -> None:
    """Print all of it."""
    data, blocks = found["data"], found["blocks"]
    rows = []
    for name, each in found["seconds"].items():
        processor = found["processor_seconds"].get(name)
        time = f"{median(processor):.2f}" if processor else "–"
        share = _share(found["of_ceiling"].get(name))
        rows.append((name, f"{median(each):.2f}", time, f"{found['megabytes_per_second'][name]:.4g}", share))
    title = (
        f"{data['tiles']} tiles, {data['pixel_bytes'] / 1e6:.4g} MB of pixels, from {data['files']} files of "
        f"{data['file_bytes'] / 1e6:.4g} MB; {found['num_workers']} worker processes, {found['machine']['name']}"
    )
    table(title, ("what", "s", "processor s", "MB/s of stored pixels", f"of {CEILING}"), rows)
    parts = found["ceiling_seconds"]
    console.print(f"by processor time, which other load does not change: {_share(found['of_ceiling_by_processor'])} of {CEILING}")
    console.print(
        f"{CEILING}: {parts['unpack']:.2f} s and {parts['pack']:.2f} s | blocks unpacked {blocks['touched']} of {blocks['there']} there "
        f"({blocks['touched'] / blocks['there']:.3f} each) | peak memory of a worker "
        + ", ".join(f"{peak / 2**20:.0f}" for peak in found["peak_bytes_of_workers"])
        + " MiB"
    )
    if note := busy_note(found["machine"]):
        console.print(note)


def _share(found: Mapping[str, float] | None) -> str:
    """Middle of the rounds, least and most."""
    return f"{found['median']:.2f} ({found['least']:.2f}–{found['most']:.2f})" if found else "1"


def check(settings: PrepareBenchSettings) -> list[str]:
    """Problems that only the disk can tell."""
    return [f"data = {settings.data}: does not exist"] if settings.data is not None and not settings.data.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subject; its exit code."""
    return run(
        "benchmark",
        PrepareBenchSettings,
        work,
        check=check,
        description=DESCRIPTION,
        # a single scene cannot be held out, and for the rate it is no matter
        defaults={"prepare.split.val_fraction": 0.0},
        expected=(RunError, SceneError, PreparationError),
        argv=argv,
    )
