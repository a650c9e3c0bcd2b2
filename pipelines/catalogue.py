"""A folder of scans becomes a table of everything in it, used or not and why, under pseudonyms."""

from __future__ import annotations

import csv
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mae_core.settings import Settings, default_kind, flatten
from mae_core.tracking import TrackingSettings
from modalities.catalogue import Catalogue, scan
from modalities.medical import CtSettings, MedicalSettings, MriSettings, XraySettings
from modalities.pseudonyms import pseudonyms
from modalities.scene import Scene, SceneError
from modalities.volume_account import by_reason, by_sequence, counted, flags, num_distinct, num_status
from modalities.volume_rows import COLUMNS
from pipelines.command_line import run
from pipelines.crosswalk_option import CrosswalkPath, refuse_crosswalk, refuse_inside, tell_crosswalk
from pipelines.frozen_split import DrawSettings, FrozenSplit, Group, all_names, freeze, refuse_place, write_split
from pipelines.prepare import tell_catalogue
from pipelines.progress import console, counting
from pipelines.run_folder import RunError, begin, finish, recorded
from pipelines.tiling_plan import PreparationError
from pipelines.withheld import missing_paths

DESCRIPTION = "a folder of scans becomes a table: a row per volume or picture, used or not and why, under pseudonyms; nothing is copied"
TABLE, SHEET = "catalogue.parquet", "catalogue.csv"
EXPECTED = (SceneError, RunError, PreparationError)


class CatalogueVerb(Settings):
    """Settings of `catalogue`."""

    data: Path = Field(description="Folder of scans, searched to its depth, or one file")
    out: Path = Field(description="Folder of the catalogue; one that is there is made anew")
    reader: Annotated[MedicalSettings | MriSettings | CtSettings | XraySettings, Field(discriminator="kind"), default_kind("medical")] = (
        Field(
            default_factory=MedicalSettings,
            description="What is catalogued as usable: medical takes every scan by its own modality, and of pictures those in DICOM; "
            "one modality as prepare does",
        )
    )
    crosswalk: CrosswalkPath = None
    split: Path | None = Field(
        None, description="File to write, which prepare.split.file takes: the side of every patient, drawn now and frozen; ends in .json"
    )
    draw: DrawSettings = DrawSettings()
    num_workers: int | None = Field(None, ge=1, description="Threads that read and judge volumes; null: one per processor")


def work(settings: CatalogueVerb) -> int:
    """Do it."""
    refuse_inside(settings.data, settings.reader.kind, out=settings.out, crosswalk=settings.crosswalk, split=settings.split)
    config = {name: value for name, value in recorded(settings, settings.reader.kind).items() if name != "split"}
    if settings.split is not None:
        refuse_place(settings.split)
    refuse_crosswalk(settings.crosswalk, settings.reader.kind, settings.out, TrackingSettings())
    begin(settings.out, "catalogue", config, may_differ=flatten(config))
    started = time.monotonic()
    with counting("reading", "scans") as progress:
        catalogue = scan(settings.data, settings.reader, num_workers=settings.num_workers, progress=progress, need_usable=False)
    seconds = time.monotonic() - started
    tell_catalogue(catalogue)
    tell_crosswalk(settings.crosswalk, catalogue, settings.out, TrackingSettings())
    write_tables(settings.out, catalogue.rows)
    result: dict[str, Any] = {"figures": figures(catalogue, seconds)}
    if settings.split is not None:
        frozen = split_of(catalogue, settings.draw)
        write_split(settings.split, frozen)
        result["split"] = {"sha256": frozen.digest, **frozen.counts()}
        console.print(f"split: {frozen.words}")
    finish(settings.out, "catalogue", config, result)
    console.print(f"{counted(len(catalogue.rows), 'scan')} in {seconds:.1f} s; [bold]catalogue ready[/]: {settings.out / TABLE}, {SHEET}")
    return 0


def figures(catalogue: Catalogue, seconds: float) -> dict[str, Any]:
    """The counts of a catalogue, which add up: files used, rejected and ignored to those found, volumes and pictures likewise.

    Raises:
        AssertionError: They do not.
    """
    rows = catalogue.rows
    accepted = [row for row in rows if row["status"] == "accepted"]
    files = {
        "found": catalogue.num_files,
        "used": catalogue.num_used,
        "rejected": sum(item.num_files for item in catalogue.rejected),
        "ignored": len(catalogue.ignored),
    }
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("volume", "picture")}
    scans = {
        f"{kind}s": {"found": len(own), **{status: num_status(own, status) for status in ("accepted", "rejected", "ignored")}}
        for kind, own in kinds.items()
    }
    if sum(map(len, kinds.values())) != len(rows):
        raise AssertionError("the catalogue holds something that is neither a volume nor a picture")
    for counts in (files, *scans.values()):
        if sum(counts.values()) != 2 * counts["found"]:
            raise AssertionError(f"the counts of the catalogue do not add up: {counts}")
    return {
        "files": files,
        **scans,
        "patients": num_distinct(accepted, "patient"),
        "sessions": num_distinct(accepted, "session"),
        "scenes": len(catalogue.scenes),
        "sequences": dict(Counter(row["sequence"] for row in accepted).most_common()),
        "modalities": dict(Counter(row["modality"] or "unknown" for row in accepted).most_common()),
        "by_sequence": [vars(entry) for entry in by_sequence(rows)],
        "flags": flags(rows),
        "not_used": [vars(entry) for entry in by_reason(rows)],
        "duplicates": sum(bool(row["duplicate_of"]) for row in rows),
        "seconds": round(seconds, 3),
    }


def split_of(catalogue: Catalogue, settings: DrawSettings) -> FrozenSplit:
    """The split of the patients whose scans can be used, by the number of these.

    Raises:
        PreparationError: There are too few of them.
    """
    scenes: defaultdict[str, list[Scene]] = defaultdict(list)
    for scene in catalogue.scenes:
        scenes[scene.group].append(scene)
    groups = []
    for group, found in sorted(scenes.items()):
        scans = [scan for scene in found for scan in scene.voxel_digests]
        groups.append(Group(all_names(group, found[0].patients), frozenset(scans), len(scans)))
    return freeze(groups, settings, pseudonyms().fingerprint)


def write_tables(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as Parquet and as CSV, each whole or not at all; lists are separated by spaces in the CSV."""
    import pyarrow as pa
    from pyarrow import parquet

    types = {
        "text": pa.string(),
        "texts": pa.list_(pa.string()),
        "number": pa.int64(),
        "numbers": pa.list_(pa.int32()),
        "decimal": pa.float64(),
        "decimals": pa.list_(pa.float64()),
    }
    schema = pa.schema([(column, types[what]) for column, what in COLUMNS.items()])
    content = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    _whole(out / TABLE, lambda aside: parquet.write_table(content, aside))
    _whole(out / SHEET, lambda aside: _write_csv(aside, rows))


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows([_cell(row[column]) for column in COLUMNS] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def _whole(file: Path, write: Callable[[Path], None]) -> None:
    aside = file.with_name(f"{file.name}.tmp")
    try:
        write(aside)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def check(settings: CatalogueVerb) -> list[str]:
    """Problems that only the disk can tell."""
    return missing_paths(settings.reader.kind, {"data": settings.data})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run("catalogue", CatalogueVerb, work, check=check, description=DESCRIPTION, expected=EXPECTED, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
