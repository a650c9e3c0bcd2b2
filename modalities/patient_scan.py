"""An archive of patients becomes scenes, whether it holds volumes, X-ray pictures or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modalities.duplicates import in_groups, joined
from modalities.medical import MedicalSettings, VolumeSettings, XraySettings
from modalities.scene import Rejected, Scene
from modalities.volume_rows import in_order
from modalities.volume_scan import Progress, Scanned, scan_volumes
from modalities.xray_scan import ScannedPictures, scan_xrays


@dataclass(frozen=True)
class ScannedArchive:
    """What became of the files of an archive: see `volume_scan.Scanned`."""

    scenes: tuple[Scene, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[Path, ...] = field(repr=False)
    notes: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    names: Mapping[str, str] = field(repr=False)
    licences: tuple[str, ...] = ()


def scan_patients(
    files: Sequence[Path],
    folder: Path,
    settings: VolumeSettings | XraySettings,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> ScannedArchive:
    """A scene for everything usable among `files`, and every other one with its reason; see `scan_volumes` and `scan_xrays`."""
    if isinstance(settings, XraySettings):
        return _as_one(scan_xrays(files, folder, settings, progress))
    volumes = scan_volumes(files, folder, settings, num_workers=num_workers, progress=progress)
    if not isinstance(settings, MedicalSettings):
        return _as_one(volumes)
    pictures = scan_xrays(volumes.ignored, folder, settings)
    scenes, rows = _joined(volumes, pictures)
    return ScannedArchive(
        scenes,
        (*volumes.rejected, *pictures.rejected),
        pictures.ignored,
        (*volumes.notes, *pictures.notes),
        rows,
        {**volumes.names, **pictures.names},
        volumes.licences,
    )


def _as_one(scanned: Scanned | ScannedPictures) -> ScannedArchive:
    licences = scanned.licences if isinstance(scanned, Scanned) else ()
    return ScannedArchive(scanned.scenes, scanned.rejected, scanned.ignored, scanned.notes, scanned.rows, scanned.names, licences)


def _joined(volumes: Scanned, pictures: ScannedPictures) -> tuple[tuple[Scene, ...], tuple[Mapping[str, Any], ...]]:
    """Scenes and rows of both, in which patients who share a volume or a picture are called alike."""
    several = [*(scene.patients for scene in volumes.scenes), *(scene.patients for scene in pictures.scenes)]
    groups = joined([patients for patients in several if patients])
    rows = [{**row, "group": groups.get(row["group"], row["group"])} for row in (*volumes.rows, *pictures.rows)]
    return (*in_groups(volumes.scenes, groups), *in_groups(pictures.scenes, groups)), in_order(rows)
