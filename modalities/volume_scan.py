"""A folder of scans becomes scenes: found by format, judged voxel by voxel, put together by session; all under pseudonyms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modalities.beside import split_beside
from modalities.crosswalk import stands_for
from modalities.dicom import find_dicom
from modalities.duplicates import find_duplicates, in_groups
from modalities.medical import VolumeSettings
from modalities.modality import intensity_notes, refuse_other
from modalities.nifti import ENDINGS, find_nifti, find_others, patient_of
from modalities.pseudonyms import Pseudonyms, pseudonyms
from modalities.scene import Rejected, SceneError
from modalities.sessions import put_together
from modalities.volume import Found, Refused, VolumeScene, reasons
from modalities.volume_checks import Volume, examine


@dataclass(frozen=True)
class Scanned:
    """What became of the files of an archive.

    Attributes:
        scenes: Usable ones.
        rejected: Others, under pseudonyms, each with reason and code.
        ignored: Files of another kind.
        notes: Lines to be told.
        rows: A row for every volume that was found, used or not, under pseudonyms: what a catalogue lists.
        names: What each pseudonym stands for. Never written but to a crosswalk that the user asks for.
    """

    scenes: tuple[VolumeScene, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[Path, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, repr=False)


def scan_volumes(files: Sequence[Path], folder: Path, settings: VolumeSettings) -> Scanned:
    """A scene for every usable volume among `files`, and every other one with its reason.

    Reads every file to its end: the checksum of a gzip stream, numbers that are not finite and the z-score need it.
    """
    names = pseudonyms()
    nifti = [file for file in files if file.name.lower().endswith(ENDINGS)]
    images, *beside = split_beside(nifti, folder, settings)
    patients = {file: patient_of(file.relative_to(folder).as_posix(), settings.group_pattern) for kind in beside for file in kind.files}
    found, refused = find_nifti(images, folder, settings)
    dicom = find_dicom(sorted(set(files) - set(nifti)), folder, settings)
    others = find_others(dicom.others, folder)
    ignored = sorted(set(dicom.others) - {file for item in others for file in item.files})
    found, refused = [*found, *dicom.found], [*refused, *dicom.refused]
    volumes: list[Volume] = []
    for item in found:
        try:
            with reasons():
                refuse_other(item, settings)
                defaced, anatomy = (kind.of(item.source.files[0], item.source.header, item.patient, patients) for kind in beside)
                volumes.append(examine(item, settings, defaced, anatomy))
        except SceneError as error:
            refused.append(Refused(item.source.files, item.place, str(error), error.code, error.code == "other_modality"))
    unique = find_duplicates(volumes, settings.duplicates, names)
    together = put_together(unique.volumes, settings, names)
    refused += [*unique.refused, *together.refused, *others]
    scenes = in_groups(together.scenes, unique.groups)
    used = {file for scene in together.scenes for file in scene.files}
    for kind in beside:
        lost = [file for file in kind.files if file not in used]
        reason = f"marks {kind.what} of no scan that is used"
        refused += [Refused((file,), file.relative_to(folder).as_posix(), reason, "marks_nothing") for file in lost]
    rejected = []
    for missed in refused:
        own = set(missed.files) - used  # a file that holds several volumes counts once
        used |= own
        rejected.append(Rejected(names.of("file", missed.place), missed.reason, missed.unwanted, missed.code, len(own)))
    notes = (*dicom.notes, *together.notes, *unique.notes, *intensity_notes(volumes, settings))
    known = _names([item.found for item in volumes], scenes, refused, names)
    return Scanned(tuple(scenes), tuple(rejected), tuple(ignored), notes, names=known)


def _names(found: Sequence[Found], scenes: Sequence[VolumeScene], refused: Sequence[Refused], names: Pseudonyms) -> dict[str, str]:
    """What each pseudonym of an archive stands for: of files that are refused, of scenes, of patients and of their sessions."""
    known = {names.of("file", item.place): stands_for(item.files, item.place) for item in refused}
    places = {file: item.place for item in found for file in item.source.files}
    for scene in scenes:
        known[scene.name] = " | ".join(stands_for(source.files, places[source.files[0]]) for source in scene.sources)
    known |= {names.of("subject", item.patient): item.patient for item in found}
    return known | {names.of("session", item.patient, item.session): f"{item.patient} {item.session}" for item in found if item.session}
