"""A folder of files becomes a catalogue: what is used, what is not, and why. The counts add up to the files found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from modalities.landsat import LandsatSettings
from modalities.medical import CtSettings, MriSettings, ScanSettings, VolumeSettings, XraySettings
from modalities.patient_scan import scan_patients
from modalities.patients import of_patients
from modalities.raster import RasterSettings
from modalities.safe import METADATA
from modalities.satellite import SatelliteSettings, scan_images
from modalities.scene import Rejected, Scene, SceneError, matches
from modalities.sentinel1 import Sentinel1Settings
from modalities.sentinel2 import Sentinel2Settings
from modalities.series import SeriesSettings, scan_series
from modalities.stac import files_of
from modalities.volume_scan import Progress

ImageSettings = SatelliteSettings | Sentinel2Settings | Sentinel1Settings | LandsatSettings | RasterSettings | SeriesSettings
ReaderSettings = Annotated[ImageSettings | MriSettings | CtSettings | XraySettings, Field(discriminator="kind")]
"""One of the adapters' settings, told apart by `kind`."""

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|/vsi")
"""An address, whose second slash `Path` has taken away, or one of GDAL's virtual file systems."""


@dataclass(frozen=True)
class Catalogue:
    """What was found in a folder.

    Attributes:
        root: The folder (or the single file) that was scanned.
        scenes: Usable scenes, sorted by name.
        rejected: Files of the right kind that cannot be used, each with its reason.
        ignored: Files of another kind, excluded by the settings, or of channels that are not asked for; relative paths.
        num_files: All files found; equal to used + rejected + ignored.
        readers: What read each scene, by its name: `sentinel2`, `elevation`, …
        notes: Lines on what the numbers in the scenes are taken for, and how that is known.
        rows: Of scans, one for each that was found, under pseudonyms.
        names: Of scans, what each pseudonym stands for; goes nowhere but into a crosswalk that is asked for.
        kind: Of the reader's settings.
        licences: That BIDS datasets in the folder state, each once; empty where there are none.
    """

    root: Path = field(repr=False)
    scenes: tuple[Scene, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[str, ...] = field(repr=False)
    num_files: int
    readers: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    kind: str = ""
    licences: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What a message calls the folder: its path, but for the scans of patients, whose folders can be called like them."""
        return "--data" if of_patients(self.kind) else str(self.root)

    @property
    def num_used(self) -> int:
        """Files that scenes are read from, each once: a mask of clouds may serve several."""
        return len({file for scene in self.scenes for file in scene.files})


def scan(
    root: Path,
    settings: ImageSettings | VolumeSettings | XraySettings,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
    need_usable: bool = True,
) -> Catalogue:
    """Catalogue of a folder (searched to its depth) or of a single file.

    A product's metadata file stands for the product, and a STAC item for itself and the files that it leads to.

    Args:
        root: The folder or file.
        settings: How it is read.
        num_workers, progress: As of `scan_volumes`, for scans of patients.
        need_usable: Whether a folder without any usable file is an error.

    Raises:
        SceneError: `root` does not exist, or holds no usable file; the message counts the reasons.
    """
    label = "--data" if of_patients(settings.kind) else str(root)
    if REMOTE.match(str(root)):
        raise SceneError(f"{label} is not on this machine, and nothing remote is read; fetch it and give its folder")
    if not root.exists():
        raise SceneError(f"{label} does not exist; --data wants a folder of files or one file")
    root = root.absolute()  # a worker elsewhere opens the same files from another folder
    folder = root if root.is_dir() else root.parent
    found = _with_listed(root, folder) if isinstance(settings, ScanSettings) else _with_described(root, folder)
    kept: list[Path] = []
    ignored: list[Path] = []
    for file in found:
        (ignored if matches(file.relative_to(folder).as_posix(), *settings.exclude) else kept).append(file)
    scenes: Sequence[Scene]
    rejected: Sequence[Rejected]
    rows: tuple[Mapping[str, Any], ...] = ()
    names: Mapping[str, str] = {}
    readers: Mapping[str, str] = {}
    licences: tuple[str, ...] = ()
    if isinstance(settings, VolumeSettings | XraySettings):
        archive = scan_patients(kept, folder, settings, num_workers=num_workers, progress=progress)
        ignored += archive.ignored
        scenes, rejected, notes, rows, names = archive.scenes, archive.rejected, archive.notes, archive.rows, archive.names
        licences = archive.licences
    else:
        images = scan_series(kept, folder, settings) if isinstance(settings, SeriesSettings) else scan_images(kept, folder, settings)
        ignored += images.ignored
        scenes, rejected, readers = images.scenes, images.rejected, images.readers
        notes = images.notes
    unwanted = [item for item in rejected if item.unwanted]
    catalogue = Catalogue(
        root,
        tuple(sorted(scenes, key=lambda scene: scene.name)),
        tuple(sorted((item for item in rejected if not item.unwanted), key=lambda item: item.file)),
        tuple(
            sorted(
                [
                    *(file.relative_to(folder).as_posix() for file in ignored),
                    *(item.file for item in unwanted for _ in range(item.num_files)),
                ]
            )
        ),
        len(found),
        readers,
        (*notes, *_not_asked_for(unwanted)),
        rows,
        names,
        settings.kind,
        licences,
    )
    _check(catalogue, need_usable)
    return catalogue


def _with_listed(root: Path, folder: Path) -> list[Path]:
    """The files of a folder, or one file; a DICOMDIR stands for the disc that it lies on."""
    return every_file(folder if root.name.upper() == "DICOMDIR" else root)


def _with_described(root: Path, folder: Path) -> list[Path]:
    if METADATA.fullmatch(root.name):
        return every_file(folder)
    if root.suffix.lower() == ".json" and root.is_file():
        return sorted({root, *files_of(root, frozenset(every_file(folder)))})
    return every_file(root)


def _not_asked_for(unwanted: Sequence[Rejected]) -> list[str]:
    counts: Counter[str] = Counter()
    for item in unwanted:
        counts[item.reason] += item.num_files
    return [f"ignored {count} files: {reason}" for reason, count in sorted(counts.items())]


def every_file(root: Path) -> list[Path]:
    """The file itself, or all files of a folder to its depth, sorted; hidden ones are left out."""
    if root.is_file():
        return [root]
    return sorted(file for file in root.rglob("*") if file.is_file() and not file.name.startswith("."))


def _check(catalogue: Catalogue, need_usable: bool) -> None:
    total = catalogue.num_used + sum(item.num_files for item in catalogue.rejected) + len(catalogue.ignored)
    if total != catalogue.num_files:
        raise AssertionError(f"the catalogue of {catalogue.label} lost files: {total} accounted of {catalogue.num_files}")
    if need_usable and not catalogue.scenes:
        counts = Counter(item.reason for item in catalogue.rejected).most_common()
        first = {item.reason: item.file for item in reversed(catalogue.rejected)}
        lines = "".join(f"\n  {first[reason]}{f' and {count - 1} more' if count > 1 else ''}: {reason}" for reason, count in counts[:10])
        more = f"\n  … and {len(counts) - 10} more reasons" if len(counts) > 10 else ""
        notes = "".join(f"\n  {note}" for note in catalogue.notes)
        raise SceneError(
            f"{catalogue.label} holds nothing usable as {catalogue.kind}: {catalogue.num_files} files found, "
            f"{len(catalogue.rejected)} rejected, {len(catalogue.ignored)} of another kind, excluded or not asked for.{lines}{more}{notes}"
        )
