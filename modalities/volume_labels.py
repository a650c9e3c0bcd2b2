"""Label volumes find the scans that they belong to: by name, by session, by patient; never by guess between several."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modalities.label_file import LabelOptions
from modalities.nifti import ENDINGS, patient_of
from modalities.nifti_file import read_header
from modalities.scene import Rejected, SceneError, matches
from modalities.sessions import session_folder
from modalities.volume import VolumeScene, about

SUFFIXES = ("_labels", "_label", "_dseg", "_seg", "_mask")
"""What the name of a label file may go on with behind that of its image."""

_SESSION = re.compile(r"(?i)(?:^|[/_])(ses-[a-z0-9+]+)")


@dataclass(frozen=True)
class _Place:
    """What the path of a file says.

    Attributes:
        patient: What names the patient; where the pattern names nobody, the path without its sequence.
        is_named: Whether the pattern named the patient.
        session: Of the patient: BIDS's, else the folders below the one that names the patient.
        folder: That the file is in.
    """

    patient: str = field(repr=False)
    is_named: bool
    session: str = field(repr=False)
    folder: str = field(repr=False)

    def names_patient_of(self, scan: _Place) -> bool:
        """Whether both paths name the same patient."""
        return self.is_named and scan.is_named and self.patient == scan.patient


@dataclass(frozen=True)
class LabelFolder:
    """Label volumes in a folder and how they are named.

    Attributes:
        folder: That they are in.
        files: All that could be labels.
        options: How they are named.
        group_pattern: As of `VolumeSettings`.
    """

    folder: Path = field(repr=False)
    files: tuple[Path, ...] = field(repr=False)
    options: LabelOptions
    group_pattern: str

    def match(self, scenes: Sequence[VolumeScene], data: Path) -> tuple[list[tuple[VolumeScene, Path]], list[Rejected]]:
        """Scenes with the label file of each, and those that have none.

        In this order: a file of the same name as one of the scene's (`label_options.rename` changes the image's first); the only one of
        the session; the only one of a patient who has one session; the only one at all. Only the first may lie on another grid, and is an
        error then. A file whose path names another patient is never taken.

        Args:
            scenes: Of a catalogue.
            data: Folder that their files were found in.

        Raises:
            SceneError: Several files could be meant, or one would serve several patients.
        """
        base = Path(os.path.commonpath([data, self.folder]))  # the folder that is given can be the one that names the patient
        stems = {scene.name: self._stems(scene) for scene in scenes}
        labels = _Labels.of({file: self._place(file, self.folder, base) for file in self.files}, set().union(*stems.values()))
        places = {scene.name: self._place(scene.files[0], data, base) for scene in scenes}
        sessions: defaultdict[str, set[str]] = defaultdict(set)
        for place in places.values():
            sessions[place.patient].add(place.session)
        pairs: list[tuple[VolumeScene, Path]] = []
        without: list[Rejected] = []
        patients: dict[Path, str] = {}
        for scene in scenes:
            place = places[scene.name]
            file, reason = labels.file_of(scene, place, stems[scene.name], is_only_session=len(sessions[place.patient]) == 1)
            if file is None:
                without.append(Rejected(scene.name, reason))
            elif patients.setdefault(file, scene.group) != scene.group:
                raise SceneError(
                    f"one label file would label scans of several patients, one of them {scene.name}; name each label file like its image, "
                    "or set reader.group_pattern so that both paths name the patient"
                )
            else:
                pairs.append((scene, file))
        return pairs, without

    def _stems(self, scene: VolumeScene) -> set[str]:
        """What a label file is called that has the name of a scene or one of its scans."""
        rename = self.options.rename
        stems = {file.name.split(".")[0] for file in scene.files}
        return {scene.name, *(re.sub(rename[0], rename[1], stem) if rename else stem for stem in stems)}

    def _place(self, file: Path, folder: Path, base: Path) -> _Place:
        relative, inside = file.relative_to(base).as_posix(), file.relative_to(folder).as_posix()
        named = re.search(self.group_pattern, relative)
        if named is None:
            return _Place(patient_of(inside, self.group_pattern), is_named=False, session="", folder=session_folder(inside))
        session = _SESSION.search(relative)
        below = relative[relative.find("/", named.end()) + 1 :] if "/" in relative[named.end() :] else relative
        told = session[1].casefold() if session else session_folder(below)
        return _Place(patient_of(relative, self.group_pattern), is_named=True, session=told, folder=session_folder(inside))


@dataclass(frozen=True)
class _Labels:
    """Label files, to be looked up.

    Attributes:
        places: What the path of each says.
        by_stem: Files by name, whole and without `SUFFIXES`.
        by_patient: Files that have the name of no scan, by patient, and where none is named by folder, too.
    """

    places: Mapping[Path, _Place] = field(repr=False)
    by_stem: Mapping[str, Sequence[Path]] = field(repr=False)
    by_patient: Mapping[str, Sequence[Path]] = field(repr=False)

    @classmethod
    def of(cls, places: Mapping[Path, _Place], scans: Collection[str]) -> _Labels:
        """The files of `places`; `scans` are the names that the labels of some scan would have."""
        by_stem: defaultdict[str, list[Path]] = defaultdict(list)
        by_patient: defaultdict[str, list[Path]] = defaultdict(list)
        for file, place in places.items():
            stems = _stems_of(file)
            for stem in stems:
                by_stem[stem].append(file)
            if not stems & set(scans):
                for patient in {place.patient} if place.is_named else {place.patient, place.folder} - {""}:
                    by_patient[patient].append(file)
        return cls(places, by_stem, by_patient)

    def file_of(self, scene: VolumeScene, place: _Place, stems: Collection[str], *, is_only_session: bool) -> tuple[Path | None, str]:
        """The label file of a scene, or why there is none."""
        named = [file for file in dict.fromkeys(file for stem in stems for file in self.by_stem.get(stem, ())) if self._may(file, place)]
        if named:
            closer = [file for file in named if self.places[file].names_patient_of(place)]
            closest = [file for file in closer if self.places[file].session == place.session]
            return _only(scene, closest or closer or named, "of the same name"), ""
        same = [file for file in self.by_patient.get(place.patient, ()) if self._may(file, place)]
        of_session = [file for file in same if self.places[file].session == place.session]
        every = [file for file in self.places if self._may(file, place)] if len(self.places) == 1 else []
        for found, how in ((of_session, "of its session"), (same if is_only_session else [], "of its patient"), (every, "there is")):
            if found:
                fitting = [file for file in found if _covers(file, scene)]
                return (_only(scene, fitting, how), "") if fitting else (None, f"no label file {how} lies on its lattice")
        return None, "no label file of the same name, session or patient"

    def _may(self, file: Path, place: _Place) -> bool:
        """Whether no other patient is named by the path of a label file."""
        own = self.places[file]
        return not (own.is_named and place.is_named) or own.patient == place.patient


def _only(scene: VolumeScene, files: Sequence[Path], how: str) -> Path:
    if len(files) > 1:
        raise SceneError(
            f"{scene.name} has {len(files)} label files {how}; say which are meant with label_options.files, such as *lesion*.nii.gz, "
            "or by label_options.rename"
        )
    return files[0]


def _covers(file: Path, scene: VolumeScene) -> bool:
    with about(f"labels of {scene.name}"):
        return read_header(file).covers(scene.header)


def label_volumes(files: Sequence[Path], folder: Path, scenes: Sequence[VolumeScene], options: LabelOptions) -> tuple[Path, ...]:
    """The files in a folder that can be labels of volumes: those that `label_options.files` means, and no scan."""
    scans = {file for scene in scenes for file in scene.files}
    volumes = [file for file in files if file.name.lower().endswith(ENDINGS) and file not in scans]
    return tuple(file for file in volumes if not options.files or matches(file.relative_to(folder).as_posix(), options.files))


def _stems_of(file: Path) -> set[str]:
    """The name of a label file up to the first dot, and without what it goes on with behind its image's."""
    whole = stem = file.name.split(".")[0]
    for ending in SUFFIXES:
        stem = stem.removesuffix(ending)
    return {whole, stem}
