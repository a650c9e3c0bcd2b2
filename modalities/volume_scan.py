"""A folder of scans becomes scenes: found by format, judged voxel by voxel, put together by session; all under pseudonyms."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modalities.beside import split_beside
from modalities.bids import BidsTree
from modalities.crosswalk import stands_for
from modalities.dicom import find_dicom
from modalities.duplicates import find_duplicates, in_groups
from modalities.medical import VolumeSettings
from modalities.modality import intensity_notes, settings_for
from modalities.nifti import ENDINGS, find_nifti, find_others, identity_of
from modalities.pseudonyms import Pseudonyms, pseudonyms
from modalities.reasons import REASONS
from modalities.scene import Rejected, SceneError
from modalities.sessions import put_together
from modalities.volume import Found, Refused, VolumeScene, reasons
from modalities.volume_checks import Volume, examine
from modalities.volume_rows import make_rows, session_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scanned:
    """What became of the files of an archive.

    Attributes:
        scenes: Usable ones.
        rejected: Others, under pseudonyms, each with reason and code.
        ignored: Files of another kind; X-ray pictures of a mixed archive are among them.
        notes: Lines to be told.
        rows: A row for every volume that was found, used or not, under pseudonyms: what a catalogue lists.
        names: What each pseudonym stands for. Never written but to a crosswalk that the user asks for.
        licences: See `Catalogue.licences`.
    """

    scenes: tuple[VolumeScene, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[Path, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    licences: tuple[str, ...] = ()


def scan_volumes(
    files: Sequence[Path], folder: Path, settings: VolumeSettings, *, num_workers: int | None = None, progress: Progress | None = None
) -> Scanned:
    """A scene for every usable volume among `files`, and every other one with its reason.

    Reads every file to its end: the checksum of a gzip stream, numbers that are not finite and the z-score need it.

    Args:
        files: Of any kind.
        folder: That they were found in.
        settings: How they are read.
        num_workers: Threads that read and judge; None takes one per processor. The result is the same for any number.
        progress: Told how many volumes of how many are judged.
    """
    names = pseudonyms()
    tree = BidsTree(files, folder, settings.patient_scope)
    nifti = [file for file in files if file.name.lower().endswith(ENDINGS)]
    images, *beside = split_beside(nifti, folder, settings)
    marking = {file for kind in beside for file in kind.files}
    kept, refused = _without_apart([file for file in files if file not in marking], folder, settings, tree)
    images = sorted(set(images) & set(kept))
    patients = {file: identity_of(file, file.relative_to(folder).as_posix(), settings, tree).patient for file in marking}
    found, unread = find_nifti(images, folder, settings, tree)
    dicom = find_dicom(sorted(set(kept) - set(images)), folder, settings)
    others = find_others(dicom.others, folder)
    ignored = sorted({*dicom.others, *dicom.pictures} - {file for item in others for file in item.files})
    found, refused = [*found, *dicom.found], [*refused, *unread, *dicom.refused]

    def judge(item: Found) -> Volume:
        own = settings_for(item, settings)
        defaced, anatomy = (kind.of(item.source.files[0], item.source.header, item.patient, patients) for kind in beside)
        return examine(item, own, defaced, anatomy)

    volumes: list[Volume] = []
    for outcome in _side_by_side(judge, found, settings.max_voxels, num_workers or len(os.sched_getaffinity(0)), progress):
        if isinstance(outcome, Volume):
            volumes.append(outcome)
        else:
            refused.append(outcome)
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
    notes = (*dicom.notes, *together.notes, *unique.notes, *tree.notes(), *(intensity_notes(volumes, settings) if volumes else ()))
    rows = make_rows(found, volumes, scenes, refused, names)
    return Scanned(tuple(scenes), tuple(rejected), tuple(ignored), notes, rows, _names(found, scenes, refused, names), tree.licences())


def _names(found: Sequence[Found], scenes: Sequence[VolumeScene], refused: Sequence[Refused], names: Pseudonyms) -> dict[str, str]:
    """What each pseudonym of an archive stands for: of files and scans, refused or not, of scenes, of patients and of their sessions."""
    known: dict[str, str] = {}
    everything: list[Found | Refused] = [*found, *refused]
    for item in everything:
        files = item.source.files if isinstance(item, Found) else item.files
        known |= {names.of(kind, item.place): stands_for(files, item.place) for kind in ("scan", "file")}
        if item.patient:
            session = session_of(item)
            known[names.of("subject", item.patient)] = item.patient
            known[names.of("session", item.patient, session)] = f"{item.patient} {session}"
    places = {file: item.place for item in found for file in item.source.files}
    for scene in scenes:
        known[scene.name] = " | ".join(stands_for(source.files, places[source.files[0]]) for source in scene.sources)
    return known


def _without_apart(files: Sequence[Path], folder: Path, settings: VolumeSettings, tree: BidsTree) -> tuple[list[Path], list[Refused]]:
    """The files that are read, and those that stand apart in a BIDS dataset."""
    kept, refused = [], []
    for file in files:
        code = tree.apart(file, derivatives=settings.derivatives)
        if code:
            refused.append(Refused((file,), file.relative_to(folder).as_posix(), REASONS[code].text, code, unwanted=True))
        else:
            kept.append(file)
    return kept, refused


def _side_by_side(
    judge: Callable[[Found], Volume], found: Sequence[Found], max_voxels: int, num_threads: int, progress: Progress | None
) -> list[Volume | Refused]:
    """Each volume after a look at all of its voxels, in the order of `found`.

    Unpacking and most of the arithmetic let other threads run. The volumes in hand together have no more voxels than one may have, so that
    memory does not grow with the number of threads.
    """
    room = Room(max_voxels)

    def one(item: Found) -> Volume | Refused:
        try:
            with reasons(), room.of(math.prod(item.source.header.space)):
                return judge(item)
        except SceneError as error:
            told = (item.patient, item.session, item.sequence, item.modality)
            return Refused(item.source.files, item.place, str(error), error.code, error.code == "other_modality", *told)

    with ThreadPoolExecutor(max_workers=num_threads) as threads:
        outcomes = [threads.submit(one, item) for item in found]
        try:
            for done, _ in enumerate(as_completed(outcomes), start=1):
                if progress is not None:
                    progress(done, len(found))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        return [outcome.result() for outcome in outcomes]


class Room:
    """So much of something for several threads; who asks for more than there is gets it alone."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._freed = threading.Condition()

    @contextmanager
    def of(self, amount: int) -> Iterator[None]:
        """Waits until so much is free, and holds it."""
        amount = min(amount, self._size)
        with self._freed:
            self._freed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._freed:
                self._free += amount
                self._freed.notify_all()
