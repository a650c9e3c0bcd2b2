"""NIfTI files as volumes: one file is one sequence of one session; what is in its name, and its voxels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modalities.bids import NUMBERS, BidsTree, Identity
from modalities.four_d import chosen_volumes
from modalities.medical import VolumeSettings
from modalities.nifti_file import VolumeHeader, read_header, read_stored, write_like
from modalities.reasons import REASONS
from modalities.scene import SceneError, matches
from modalities.volume import Found, Refused, reasons

ENDINGS = (".nii", ".nii.gz")
_OTHERS = {
    **dict.fromkeys((".mgz", ".mgh"), "FreeSurfer's MGH"),
    ".mnc": "MINC",
    **dict.fromkeys((".nrrd", ".nhdr"), "NRRD"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImage"),
    **dict.fromkeys((".hdr", ".img", ".hdr.gz", ".img.gz"), "Analyze or NIfTI pair"),
}
"""Endings of scans that are not read."""
_SEQUENCES = {"t1": "T1w", "t1w": "T1w", "t2": "T2w", "t2w": "T2w", "flair": "FLAIR", "pd": "PD", "pdw": "PD"} | {
    name.lower(): name for name in ("T1ce", "T2star", "bold", "dwi", "adc", "swi", "angio")
}
_TOKEN = re.compile(rf"(?i)(?<![a-z0-9])({'|'.join(_SEQUENCES)})(?![a-z0-9])")
_OTHER = re.compile(r"(?i)(?<![a-z0-9])(ct|pet)(?![a-z0-9])")
_ENTITY = re.compile(r"(?i)(?<![a-z0-9])(space|acq|desc|from|to|ref|rec)-[a-z0-9]+")
"""BIDS entities whose value may name a sequence other than the file's."""

_OTHER_CHANNELS = {"CT": "CT", "PT": "PET"}


@dataclass(frozen=True)
class NiftiSource:
    """A NIfTI file that holds one volume.

    A file is read whole, because nobody can begin in the middle of a gzip stream.

    Attributes:
        path: The file.
        header: What it said when it was scanned.
        volumes: Which of its volumes it is the mean of.
    """

    path: Path = field(repr=False)
    header: VolumeHeader
    volumes: tuple[int, ...] = (0,)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `VolumeSource.files`."""
        return (self.path,)

    @property
    def flags(self) -> tuple[str, ...]:
        """What is doubtful about it."""
        return (*self.header.flags, *["four_d"] * (self.header.num_volumes > 1))

    def stored(self) -> NDArray[np.generic]:
        """See `VolumeSource.stored`."""
        self.refuse_changed()
        return read_stored(self.path, self.header, self.volumes)

    def refuse_changed(self) -> None:
        """See `VolumeSource.refuse_changed`."""
        if read_header(self.path) != self.header:
            raise SceneError("its header has changed since it was scanned; scan again", "changed")

    def write_like(self, path: Path, values: NDArray[np.generic], slope: float = 1.0) -> None:
        """See `VolumeSource.write_like`: the affine, codes, units and NIfTI version of the file; the same labels give the same bytes."""
        write_like(self.path, path, values, slope)


def find_nifti(files: Sequence[Path], folder: Path, settings: VolumeSettings, tree: BidsTree) -> tuple[list[Found], list[Refused]]:
    """The volume in every NIfTI file among `files` by its header alone, and the files whose header cannot be used."""
    found, refused = [], []
    for file in files:
        relative = file.relative_to(folder).as_posix()
        about = identity_of(file, relative, settings, tree)
        told = (about.patient, about.session, about.sequence, about.modality)
        if about.unused:
            refused.append(Refused((file,), relative, REASONS[about.unused].text, about.unused, True, *told))
            continue
        try:
            with reasons():
                source = nifti_source(file, about.sequence, settings)
        except SceneError as error:
            refused.append(Refused((file,), relative, str(error), error.code, False, *told))
            continue
        flags = (*source.flags, *about.flags)
        found.append(Found(source, relative, *told[:3], flags, about.modality, tuple(sorted(about.acquisition.items()))))
    return found, refused


def identity_of(file: Path, relative: str, settings: VolumeSettings, tree: BidsTree) -> Identity:
    """What settings, the path of a file and its sidecars say: by BIDS where its name is one, else by the patterns of plain folders."""
    told = tree.identity(file)
    if told is None:
        fields, broken = tree.beside(file)
        told = Identity(
            patient=tree.patient(file, patient_of(relative, settings.group_pattern)),
            session=tree.session(file),
            sequence="",
            modality=str(fields.get("Modality", "")),
            flags=("sidecar_broken",) if broken else (),
            acquisition={ours: fields[theirs] for theirs, ours in NUMBERS.items() if theirs in fields},
        )
    chosen = next((name for glob, name in settings.sequence_names.items() if matches(relative, glob)), None) or settings.sequence
    modality = told.modality or modality_of(relative)
    return replace(told, modality=modality, sequence=chosen or told.sequence or _OTHER_CHANNELS.get(modality) or sequence_of(relative))


def nifti_source(file: Path, sequence: str, settings: VolumeSettings) -> NiftiSource:
    """A file's header, and which of its volumes are to be read.

    Raises:
        SceneError: It cannot be used; without its name.
    """
    header = read_header(file)
    return NiftiSource(file, header, chosen_volumes(file, header.num_volumes, sequence, settings.four_d))


def find_others(files: Sequence[Path], folder: Path) -> list[Refused]:
    """Scans among `files` that are in a format which is not read, told by the endings of their names."""
    found = []
    for file in files:
        kind = next((kind for ending, kind in _OTHERS.items() if file.name.lower().endswith(ending)), None)
        if kind is not None:
            reason = f"{kind}: a scan in a format that is not read; convert it to .nii.gz"
            found.append(Refused((file,), file.relative_to(folder).as_posix(), reason, "other_format", unwanted=True))
    return found


def patient_of(relative: str, pattern: str) -> str:
    """What names the patient in a relative path: the first group of `pattern` that matched, else the path without its sequence."""
    found = re.search(pattern, relative)
    named = next((text for text in found.groups() if text), None) if found else None
    if named is not None:
        return named.casefold()
    return without_sequence(re.sub(r"(?i)\.nii(\.gz)?$", "", relative))


def without_sequence(relative: str) -> str:
    """A path without what names a sequence in it (`T1`, `FLAIR`)."""
    parts = [_TOKEN.sub("", part).strip("_-. ") for part in relative.split("/")]
    return "/".join(part for part in parts if part)


def sequence_of(relative: str) -> str:
    """The sequence that a file's name tells (`T1w`, `FLAIR`), else the innermost folder that is called like one, else `MR`."""
    *folders, name = relative.split("/")
    found = [*(part for part in folders if part.lower() in _SEQUENCES), *_TOKEN.findall(_ENTITY.sub("", name))]
    return _SEQUENCES[found[-1].lower()] if found else "MR"


def modality_of(relative: str) -> str:
    """`CT`, `PT` or `MR` where a word of a file's name, or a folder that is called like a sequence, tells it; else empty."""
    other = _OTHER.findall(relative.rpartition("/")[2])
    if other:
        return {"ct": "CT", "pet": "PT"}[other[-1].lower()]
    return "" if sequence_of(relative) == "MR" else "MR"
