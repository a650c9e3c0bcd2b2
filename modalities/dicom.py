"""DICOM series as volumes: the files of a folder, whatever they are called, become volumes on a lattice, or are refused with a reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.dicom_facts import Facts, StoredPixels
from modalities.dicom_file import begins_as, named_files, read_facts
from modalities.dicom_mosaic import cut
from modalities.dicom_pixels import check_pixels, read_pixels, refuse_changed
from modalities.dicom_sequence import sequence_of
from modalities.dicom_series import Plane, Stack, stacks_of
from modalities.four_d import chosen_moments
from modalities.grid import Grid
from modalities.medical import VolumeSettings
from modalities.nifti_file import VolumeHeader, write_on
from modalities.scene import SceneError
from modalities.volume import Found, Refused, reasons

WANTED = {"mri": ("MR",), "ct": ("CT",), "medical": ("MR", "CT")}
"""Modalities that each kind of settings asks for."""
PICTURES = {"medical": ("CR", "DX", "MG")}
"""Modalities that are left to the reader of X-ray pictures."""


@dataclass(frozen=True)
class DicomFolder:
    """What became of files: volumes and refused ones of DICOM, and files of another kind.

    Attributes:
        found, refused: See `Found` and `Refused`.
        others: Files that are no DICOM, and DICOMDIRs, which only list files.
        pictures: X-ray pictures of a mixed archive, which make no volumes.
        notes: Lines to be told.
    """

    found: tuple[Found, ...]
    refused: tuple[Refused, ...]
    others: tuple[Path, ...] = field(repr=False)
    pictures: tuple[Path, ...] = field(repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """Where a slice of a volume comes from.

    Attributes:
        index: Its place along the normal.
        file: Number of its file among those of the volume.
        frame: Its place in the file.
        slope, intercept: Of its values.
    """

    index: int
    file: int
    frame: int
    slope: float
    intercept: float


@dataclass(frozen=True)
class DicomSource:
    """The files of a volume and which of their frames are its slices, in their order along the normal.

    Attributes:
        pixels: Of each file.
        slices: Of every moment that the volume is the mean of.
        header: See `VolumeSource.header`. Where slices are scaled differently, values are stored as physical ones; means likewise.
        num_mosaic: Slices in a picture of a mosaic, 0 for others.
        num_moments: Of how many moments it is the mean.
    """

    pixels: tuple[StoredPixels, ...] = field(repr=False)
    slices: tuple[Slice, ...] = field(repr=False)
    header: VolumeHeader
    num_mosaic: int = 0
    num_moments: int = 1

    @property
    def files(self) -> tuple[Path, ...]:
        """See `VolumeSource.files`."""
        return tuple(pixels.path for pixels in self.pixels)

    def stored(self) -> NDArray[np.generic]:
        """See `VolumeSource.stored`."""
        values: NDArray[Any] = np.zeros(self.header.space, np.dtype(self.header.dtype), order="F")
        places = defaultdict(list)
        for part in self.slices:
            places[part.file].append(part)
        for number, pixels in enumerate(self.pixels):
            frames = read_pixels(pixels)
            frames = cut(frames[0], self.num_mosaic) if self.num_mosaic else frames
            for part in places[number]:
                values[:, :, part.index] += self._scaled(frames[part.frame], part).T
        return values if self.num_moments == 1 else values / np.float32(self.num_moments)

    def refuse_changed(self) -> None:
        """See `VolumeSource.refuse_changed`: told by size and time of every file."""
        for pixels in self.pixels:
            refuse_changed(pixels)

    def write_like(self, path: Path, values: NDArray[np.generic], slope: float = 1.0) -> None:
        """See `VolumeSource.write_like`: NIfTI in the order (column, row, slice), in millimetres, sform and qform code 1."""
        write_on(self.header, path, values, slope)

    def _scaled(self, frame: NDArray[np.generic], part: Slice) -> NDArray[Any]:
        if np.dtype(self.header.dtype).kind != "f":
            return frame
        return frame.astype(np.float64) * part.slope + part.intercept


def find_dicom(files: Sequence[Path], folder: Path, settings: VolumeSettings) -> DicomFolder:
    """The volumes in those of `files` that are DICOM, by their headers alone; every header is read once."""
    everything, refused, others, directories = _read(files, folder)
    known = [facts for facts in everything if facts.modality not in PICTURES.get(settings.kind, ())]
    pictures = tuple(facts.pixels.path for facts in everything if facts.modality in PICTURES.get(settings.kind, ()))
    notes = _missing_from(directories, files)
    series: defaultdict[str, list[Facts]] = defaultdict(list)
    turned_down: defaultdict[tuple[str, str, str, bool], list[Path]] = defaultdict(list)
    for facts in known:
        try:
            _check(facts, settings)
            series[facts.series].append(facts)
        except SceneError as error:
            turned_down[facts.series, str(error), error.code, error.code in UNWANTED].append(facts.pixels.path)
    refused += [Refused(tuple(paths), f"{name}/{code}", text, code, new) for (name, text, code, new), paths in turned_down.items()]
    found: list[Found] = []
    for name, members in sorted(series.items()):
        originals, copies = _originals(members)
        if copies:
            paths = tuple(facts.pixels.path for facts in copies)
            refused.append(
                Refused(paths, f"{name}/copies", "the same image as another file (SOPInstanceUID), which stands for both", "copied_file")
            )
        stacks, unfit = stacks_of(name, originals)
        for part in unfit:
            refused.append(Refused(_paths(plane.facts for plane in part.planes), part.place, part.reason, part.code, part.unwanted))
        is_diffusion = any(frame.b_value for facts in originals for frame in facts.frames)
        for moments in stacks:
            try:
                found.append(_found(moments, is_diffusion, settings))
                refused += _left_out(moments, found[-1])
            except SceneError as error:
                paths = _paths(plane.facts for moment in moments for plane in moment.planes)
                refused.append(Refused(paths, moments[0].place, str(error), error.code))
    nameless = len({facts.study for facts in known if not facts.patient and facts.modality in WANTED[settings.kind]})
    if nameless:
        notes += (f"{nameless} DICOM studies name no patient (PatientID is empty): each counts as a patient of its own",)
    of_file = {facts.pixels.path: facts for facts in known}
    refused = [_with_patient(item, of_file.get(item.files[0])) for item in refused]
    return DicomFolder(tuple(found), tuple(refused), tuple(sorted([*others, *directories])), pictures, notes)


UNWANTED = ("other_modality", "not_an_image")
"""Codes of files that are sound and not asked for."""


def _read(files: Sequence[Path], folder: Path) -> tuple[list[Facts], list[Refused], list[Path], list[Path]]:
    """Facts, files that cannot be read, files of another kind, DICOMDIRs."""
    known, refused, others, directories = [], [], [], []
    for file in files:
        begin = "marked"
        try:
            with reasons():
                begin = begins_as(file)
                if begin == "other":
                    others.append(file)
                else:
                    known.append(read_facts(file))
        except SceneError as error:
            if error.code == "dicomdir":
                directories.append(file)
            elif begin == "bare":
                others.append(file)
            else:
                refused.append(Refused((file,), file.relative_to(folder).as_posix(), str(error), error.code))
    return known, refused, others, directories


def _check(facts: Facts, settings: VolumeSettings) -> None:
    """Refuses a file that no volume of the wanted kind can be made of."""
    wanted = WANTED[settings.kind]
    if facts.modality not in wanted:
        if not facts.pixels.keyword or facts.modality in ("SEG", "PR", "KO", "SR", "RTSTRUCT", "RTDOSE", "RTPLAN", "REG"):
            raise SceneError(f"modality {facts.named_modality}: no image, or one that was made from others", "not_an_image")
        raise SceneError(
            f"modality {facts.named_modality}, while {' or '.join(wanted)} is asked for (kind: {settings.kind})", "other_modality"
        )
    if facts.burned_in:
        raise SceneError("it says that writing is burned into its picture (BurnedInAnnotation), which may name a person", "burned_in")
    if not facts.series:
        raise SceneError("no SeriesInstanceUID, so nobody knows what it belongs to; export it again", "no_series")
    if any(frame.slope == 0 for frame in facts.frames):
        raise SceneError("RescaleSlope is 0, which makes all values equal; export it again", "damaged_header")
    if len(facts.frames) not in (1, facts.pixels.num_frames) and not facts.is_mosaic:
        raise SceneError(f"{len(facts.frames)} descriptions of {facts.pixels.num_frames} frames; export it again", "damaged_header")
    if len(facts.frames) == 1 and facts.pixels.num_frames > 1:
        raise SceneError(f"{facts.pixels.num_frames} frames without functional groups, so nobody knows where they lie", "no_position")
    check_pixels(facts.pixels)


def _originals(members: Sequence[Facts]) -> tuple[list[Facts], list[Facts]]:
    """Files, and those that say they are the same image as an earlier one and have its place and shape."""
    first: dict[str, Facts] = {}
    originals: list[Facts] = []
    copies: list[Facts] = []
    for facts in sorted(members, key=lambda facts: facts.pixels.path):
        known = first.setdefault(facts.instance, facts) if facts.instance else facts
        same = known is not facts and known.frames == facts.frames
        (copies if same else originals).append(facts)
    return originals, copies


def _found(moments: Sequence[Stack], is_diffusion: bool, settings: VolumeSettings) -> Found:
    """A volume that was not yet judged: of several moments, the one or the mean that `settings.four_d` asks for."""
    first = moments[0].planes[0]
    sequence = settings.sequence or sequence_of(first.facts, first.frame, is_diffusion)
    chosen = [moments[number] for number in chosen_moments([_b_value(stack) for stack in moments], sequence, settings.four_d)]
    files = list({plane.facts.pixels: None for stack in chosen for plane in stack.planes})
    number = {pixels: index for index, pixels in enumerate(files)}
    slices = tuple(
        Slice(index, number[plane.facts.pixels], plane.frame.number, *_rescale(plane))
        for stack in chosen
        for index, plane in enumerate(stack.planes)
    )
    is_stored = len(chosen) == 1 and len({(part.slope, part.intercept) for part in slices}) == 1
    slope, intercept = (slices[0].slope, slices[0].intercept) if is_stored else (1.0, 0.0)
    dtype = check_pixels(files[0]) if is_stored else np.dtype(np.float32)
    num_mosaic = len(first.facts.frames) if first.facts.is_mosaic else 0
    grid = Grid.from_matrix((*_shape(files[0], num_mosaic), len(chosen[0].planes)), chosen[0].affine, "RAS+", "mm")
    header = VolumeHeader(grid.space, grid.affine, dtype.str, slope, intercept, 0, chosen[0].flags)
    source = DicomSource(tuple(files), slices, header, num_mosaic, len(chosen))
    patient = _patient_of(first.facts)
    flags = (*chosen[0].flags, *["four_d"] * (len(moments) > 1))
    return Found(source, chosen[0].place, patient, first.facts.study, sequence, flags, first.facts.modality)


def _left_out(moments: Sequence[Stack], used: Found) -> list[Refused]:
    """The files of other moments than those that are used."""
    paths = set(_paths(plane.facts for stack in moments for plane in stack.planes)) - set(used.source.files)
    reason = "another moment or b-value than the one of its series that is used (reader.four_d)"
    return [Refused(tuple(sorted(paths)), f"{used.place}/others", reason, "time_series", unwanted=True)] if paths else []


def _b_value(stack: Stack) -> float | None:
    return stack.planes[0].frame.b_value


def _patient_of(facts: Facts) -> str:
    """What names the patient; where nobody does, each study is a patient of its own."""
    return facts.patient.casefold() or f"study {facts.study}"


def _with_patient(item: Refused, facts: Facts | None) -> Refused:
    """What is refused, with whose it is; of a file that could not be read nobody knows."""
    if facts is None:
        return item
    return replace(item, patient=_patient_of(facts), session=facts.study, modality=facts.named_modality)


def _rescale(plane: Plane) -> tuple[float, float]:
    """Slope and intercept to values that are bright where the picture is: of MR, MONOCHROME1 is turned; HU are what they are."""
    facts, slope, intercept = plane.facts, plane.frame.slope, plane.frame.intercept
    if facts.pixels.photometric != "MONOCHROME1" or facts.modality == "CT":
        return slope, intercept
    mirrored = -1 if facts.pixels.signed else 2**facts.pixels.bits_stored - 1  # lowest + highest stored value
    return -slope, slope * mirrored + intercept


def _shape(pixels: StoredPixels, num_mosaic: int) -> tuple[int, int]:
    """Columns and rows of a slice."""
    if not num_mosaic:
        return pixels.columns, pixels.rows
    rows, columns = cut(np.empty((pixels.rows, pixels.columns), np.uint8), num_mosaic).shape[1:]
    return columns, rows


def _missing_from(directories: Sequence[Path], files: Sequence[Path]) -> tuple[str, ...]:
    """How many files the DICOMDIRs name that are not there; names on discs are in capitals, whatever the copy has."""
    if not directories:
        return ()
    there = {file.as_posix().casefold() for file in files}
    named = {directory.parent.joinpath(*parts).as_posix().casefold() for directory in directories for parts in named_files(directory)}
    counts = Counter(name in there for name in named)
    lost = f", {counts[False]} of which are not there: copy the disc again" if counts[False] else ""
    return (f"{len(directories)} DICOMDIR, which name {len(named)} files{lost}",)


def _paths(facts: Iterable[Facts]) -> tuple[Path, ...]:
    """Files, each once."""
    return tuple({item.pixels.path: None for item in facts})
