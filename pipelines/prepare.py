"""Files become a tile store: scan a folder, tile its scenes, compute statistics, divide training from held-out groups."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from rich.markup import escape

from mae_core.settings import Settings, to_plain
from mae_core.store import TileStore
from mae_core.tracking import Tracker, TrackingError, TrackingSettings
from modalities.account import account
from modalities.catalogue import Catalogue, ReaderSettings, scan
from modalities.patients import PSEUDONYM_KEY, of_patients
from modalities.pseudonyms import pseudonyms
from modalities.quality import NO_VALUE, Quality
from modalities.scene import LabelMap, SceneError
from pipelines.command_line import run
from pipelines.crosswalk_option import CrosswalkPath, refuse_crosswalk, refuse_inside, tell_crosswalk
from pipelines.preparation import PreparationError, PreparationReport, PrepareSettings, prepare
from pipelines.preparation_extension import listed
from pipelines.preparation_forecast import Forecast
from pipelines.preparation_report import refuse_damaged
from pipelines.preparation_workers import missing
from pipelines.progress import console, counting, table
from pipelines.run_folder import finish, public, recorded, without_patterns
from pipelines.scan_account import tell_scans
from pipelines.statements import stated
from pipelines.store_facts import tell_values, value_columns
from pipelines.tracked import tell_pending
from pipelines.withheld import missing_paths

DESCRIPTION = "files become a tile store (zarr) with quality flags, statistics, index, split and checksums"
IMAGES = ("satellite", "sentinel2", "sentinel1", "landsat", "raster")
VOLUMES = ("mri", "ct")
TILES = {**dict.fromkeys(IMAGES, (128, 128)), **dict.fromkeys(VOLUMES, (64, 64, 64)), "xray": (256, 256)}
AXES = {2: ("y", "x"), 3: ("x", "y", "z")}
SERIES_AXES = ("time", "y", "x")


class PrepareVerb(Settings):
    """Settings of `prepare`."""

    modality: Literal["satellite", "sentinel2", "sentinel1", "landsat", "raster", "series", "mri", "ct", "xray"] = Field(
        description="Which adapter reads the files"
    )
    data: Path = Field(description="Folder of files, searched to its depth, or one file")
    out: Path = Field(description="Folder of the store to write")
    reader: ReaderSettings
    prepare: PrepareSettings
    scheduler: str | None = Field(None, description="Address of a running dask scheduler; short for prepare.scheduler")
    tracking: TrackingSettings = TrackingSettings(system_metrics=False)
    crosswalk: CrosswalkPath = None

    @model_validator(mode="before")
    @classmethod
    def _by_modality(cls, values: dict[str, Any]) -> dict[str, Any]:
        filled = for_modality(values, values.get("modality"))
        if filled.get("scheduler"):
            filled["prepare"]["scheduler"] = filled["scheduler"]
        return filled

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.reader.kind != self.modality:
            raise ValueError(f"reader.kind is {self.reader.kind} and modality is {self.modality}; leave reader.kind out")
        return self


def for_modality(values: Mapping[str, Any], modality: Any) -> dict[str, Any]:
    """Settings with the reader's kind and the tile size filled in by modality where they are left out."""
    filled = dict(values)
    filled["reader"] = {"kind": modality, **dict(filled.get("reader") or {})}
    filled["prepare"] = dict(filled.get("prepare") or {})
    if not filled["prepare"].get("tile"):
        filled["prepare"]["tile"] = usual_tile(modality, filled["reader"])
    return filled


def usual_tile(modality: Any, reader: Mapping[str, Any]) -> tuple[int, ...]:
    """Size of a tile where none is set; a series is as long as its settings say. Empty for what is no modality."""
    if modality == "series":
        return (int(reader["dates"]), *TILES["satellite"]) if str(reader.get("dates", "")).isdecimal() else ()
    return TILES.get(modality, ())


def store_attributes(reader: ReaderSettings, axes: int) -> dict[str, Any]:
    """What a store tells about where its tiles come from."""
    return {
        "kind": reader.kind,
        "axes": list(SERIES_AXES if reader.kind == "series" else AXES[axes]),
        "reader": without_patterns(to_plain(reader)) if of_patients(reader.kind) else to_plain(reader),
        **({PSEUDONYM_KEY: pseudonyms().fingerprint} if of_patients(reader.kind) else {}),
        "no_value": NO_VALUE,
        "quality_bits": {flag.name: int(flag) for flag in Quality if flag},
    }


def prepare_store(
    catalogue: Catalogue,
    out: Path,
    reader: ReaderSettings,
    settings: PrepareSettings,
    labels: Mapping[str, LabelMap] | None = None,
    more: Mapping[str, Any] | None = None,
) -> PreparationReport:
    """Prepare a store and tell what was used and what was thrown away; a finished store of the same plan is left as it is.

    `more` is what the store tells beside what all stores do.
    """
    tell_catalogue(catalogue)
    refuse_damaged(catalogue.rejected, catalogue.num_used, settings.max_rejected_fraction)
    attributes = store_attributes(reader, len(settings.tile)) | dict(more or {}) | stated(catalogue, settings.states)
    with counting("preparing", "tiles") as progress:

        def announce(forecast: Forecast) -> None:
            progress.unit_bytes = forecast.tile_bytes
            console.print(forecast.summary())

        report = prepare(catalogue, out, settings, labels=labels, attributes=attributes, progress=progress, announce=announce)
    tell_report(report)
    tell_values(TileStore.open(out, verify="sizes"))
    return report


def scan_told(data: Path, reader: ReaderSettings, num_workers: int) -> Catalogue:
    """The catalogue of a folder, with a bar while scans are read."""
    with counting("reading", "scans") as progress:
        return scan(data, reader, num_workers=max(1, num_workers), progress=progress)


def tell_catalogue(catalogue: Catalogue) -> None:
    """Print how many files are used, and the reasons of those that are not."""
    console.print(
        f"[bold]{catalogue.num_files} files found[/]: {catalogue.num_used} used in {len(catalogue.scenes)} scenes, "
        f"{len(catalogue.rejected)} rejected, {len(catalogue.ignored)} of another kind, excluded or not asked for"
    )
    if catalogue.readers:
        tell_account(catalogue)
    for note in catalogue.notes:
        console.print(note)
    if catalogue.rows:
        tell_scans(catalogue.rows)
    elif catalogue.rejected:
        reasons = Counter(item.reason for item in catalogue.rejected)
        first = {item.reason: item.file for item in reversed(catalogue.rejected)}
        table("rejected", ("reason", "files", "first"), [(reason, str(count), first[reason]) for reason, count in reasons.most_common(12)])
        if len(reasons) > 12:
            console.print(f"… and {len(reasons) - 12} more reasons; result.json has them all")


def tell_account(catalogue: Catalogue) -> None:
    """Print what each adapter found: how many, of what level, when, where, which channels in which units."""
    for entry in account(catalogue):
        head = f"[bold]{escape(entry.reader)}[/]: {entry.scenes} scenes of {entry.places} places, from {entry.files} files"
        lines = {
            "level": entry.levels,
            "acquired": entry.dates,
            "CRS": entry.frames,
            "channels": entry.channels,
            "radiometry": entry.radiometry,
        }
        console.print(head + "".join(f"\n  {name:<10} {escape(text)}" for name, text in lines.items() if text))


def tell_report(report: PreparationReport) -> None:
    """Print what became of the tiles."""
    if report.already_done:
        console.print(f"store {report.path.name} is already prepared from the same data; nothing was done again")
    if report.added:
        console.print(f"{len(report.added)} scenes were added to an earlier store; what it held stays as it was")
    if report.gone:
        console.print(
            f"[yellow]{len(report.gone)} scenes of the store are no longer in the data[/], their tiles stay: {listed(report.gone)}"
        )
    rows = [("accepted", str(report.accepted)), *((f"discarded: {why}", str(count)) for why, count in report.discarded.items())]
    table("tiles", ("what", "tiles"), [*rows, ("found", str(report.found))])
    for scene, reason in report.quarantined.items():
        console.print(f"[yellow]scene {scene} left out[/]: {reason}")
    for note in report.notes:
        console.print(note)
    rate = f"; {report.done} tiles at {report.done / max(report.seconds, 1e-6):.0f} tiles/s" if report.done else ""
    sides = ", ".join(f"{side} {count} tiles of {report.groups.get(side, 0)} groups" for side, count in report.tiles.items())
    console.print(f"{sides}; {report.num_bytes / 1e6:.1f} MB in {report.seconds:.1f} s{rate}; digest {report.digest[:12]}")


def work(settings: PrepareVerb) -> int:
    """Do it."""
    from mae_core.store_sheet import sheet_to

    refuse_inside(settings.data, settings.modality, out=settings.out, crosswalk=settings.crosswalk)
    refuse_crosswalk(settings.crosswalk, settings.modality, settings.out, settings.tracking)
    catalogue = scan_told(settings.data, settings.reader, settings.prepare.num_workers)
    tell_crosswalk(settings.crosswalk, catalogue, settings.out, settings.tracking)
    report = prepare_store(catalogue, settings.out, settings.reader, settings.prepare)
    counts = {"accepted": report.accepted, "found": report.found, **report.tiles}
    with Tracker(settings.tracking, settings.out, of_patients=of_patients(settings.modality), passing=True, say=console.print).run(
        f"prepare-{settings.out.name}", None, public(settings, settings.modality), {"source": "pipelines/prepare.py"}
    ) as tracker:
        tracker.metrics({f"tiles/{name}": count for name, count in counts.items()}, 0)
        store = TileStore.open(settings.out, verify="sizes")
        sheet_to(tracker, store)
        tracker.table("channels.json", value_columns(store))
        tracker.dataset(settings.modality, report.digest, "prepared", {"tiles": str(report.accepted)})
    facts: dict[str, Any] = {
        "figures": {"tiles": {**counts, "discarded": dict(report.discarded)}, "bytes": report.num_bytes, "seconds": report.seconds},
        "files": {"found": catalogue.num_files, "used": catalogue.num_used, "ignored": len(catalogue.ignored)},
        "rejected": [{"file": item.file, "reason": item.reason, "code": item.code} for item in catalogue.rejected],
        "digests": {"store": report.digest},
        "mlflow": tracker.facts(),
    }
    finish(settings.out, "prepare", recorded(settings, settings.modality), facts)
    console.print(f"[bold]store ready[/]: {settings.out}")
    tell_pending(facts["mlflow"], settings.out)
    return 0


def check(settings: PrepareVerb) -> list[str]:
    """Problems that only the disk can tell."""
    return [*missing_paths(settings.modality, {"data": settings.data}), *missing(settings.prepare)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run(
        "prepare",
        PrepareVerb,
        work,
        check=check,
        description=DESCRIPTION,
        expected=(SceneError, PreparationError, TrackingError),
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
