"""A folder of X-ray pictures becomes scenes under pseudonyms, each normalised over what was exposed; others are refused with a reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.crosswalk import stands_for
from modalities.duplicates import find_duplicate_pictures
from modalities.grey_png import SIGNATURE, png_space
from modalities.grid import Grid
from modalities.intensity import ends, robust_mean_std
from modalities.medical import MedicalSettings, ScanSettings, XraySettings
from modalities.nifti import patient_of
from modalities.pseudonyms import Pseudonyms, pseudonyms
from modalities.reasons import REASONS
from modalities.scene import Channel, Rejected, SceneError
from modalities.spacing import Respacing
from modalities.volume import Refused, reasons
from modalities.volume_account import counted
from modalities.volume_checks import Values
from modalities.volume_rows import session_of
from modalities.voxel_digest import voxel_digest
from modalities.xray import FoundPicture, PngPicture, XrayScene, exposed_of
from modalities.xray_dicom import find_dicom_picture
from modalities.xray_rows import Judged, make_picture_rows


@dataclass(frozen=True)
class ScannedPictures:
    """What became of the files of an archive: see `volume_scan.Scanned`."""

    scenes: tuple[XrayScene, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[Path, ...] = field(repr=False)
    notes: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, repr=False)


def scan_xrays(
    files: Sequence[Path], folder: Path, settings: XraySettings | MedicalSettings, progress: Callable[[int, int], None] | None = None
) -> ScannedPictures:
    """A scene for every usable picture among `files`, and every other one with its reason. Reads every picture whole.

    Args:
        files: Of any kind.
        folder: That they were found in.
        settings: How they are read; those of a mixed archive, in which a PNG may be anything, take X-ray pictures in DICOM alone.
        progress: Told how many of how many files are done.
    """
    names = pseudonyms()
    own = settings if isinstance(settings, XraySettings) else XraySettings(**{name: getattr(settings, name) for name in SHARED})
    found: list[FoundPicture] = []
    judged: dict[str, Judged] = {}
    refused: list[Refused] = []
    ignored: list[Path] = []
    for done, file in enumerate(files, start=1):
        place = file.relative_to(folder).as_posix()
        picture: FoundPicture | Refused | None = None
        try:
            with reasons():
                picture = find_picture(file, place, own, is_mixed=own is not settings)
                if isinstance(picture, FoundPicture):
                    found.append(picture)
                    seen = examine_picture(picture, own, names)
                    judged[seen.scene.name] = seen
                elif picture is None:
                    ignored.append(file)
                else:
                    refused.append(picture)
        except SceneError as error:
            told = (picture.patient, picture.session, picture.channel, picture.modality) if isinstance(picture, FoundPicture) else ()
            refused.append(Refused((file,), place, str(error), error.code, error.code == "other_modality", *told))
        if progress is not None:
            progress(done, len(files))
    refused = _by_series(refused)
    scenes, copies, told_copies = find_duplicate_pictures([one.scene for one in judged.values()], own.duplicates)
    for name, reason in copies.items():
        source = judged[name].found
        refused.append(Refused((source.picture.path,), source.place, reason, "duplicate", False, source.patient, source.session))
    rejected = [Rejected(names.of("file", item.place), item.reason, item.unwanted, item.code, len(item.files)) for item in refused]
    notes = (*_notes([judged[scene.name] for scene in scenes], own), *told_copies)
    rows = make_picture_rows(found, judged, scenes, refused, names)
    return ScannedPictures(tuple(scenes), tuple(rejected), tuple(ignored), notes, rows, _names(found, refused, names))


SHARED = tuple(ScanSettings.model_fields.keys() - {"kind"})
"""Settings that all archives of patients share."""


def find_picture(file: Path, place: str, settings: XraySettings, *, is_mixed: bool = False) -> FoundPicture | Refused | None:
    """What the beginning of a file says of its picture, or why it is not used; None for a file of another kind.

    `is_mixed`: Nobody has said that pictures which do not say it themselves are X-ray pictures.

    Raises:
        SceneError: It cannot be read; without its name.
    """
    with file.open("rb") as stream:
        first = stream.read(len(SIGNATURE))
    if first != SIGNATURE:
        return find_dicom_picture(file, place, settings)
    patient = patient_of(place, settings.group_pattern)
    if is_mixed:
        return Refused((file,), place, REASONS["unsaid_picture"].text, "unsaid_picture", unwanted=True, patient=patient)
    space = png_space(file)
    return FoundPicture(PngPicture(file, space), space, place, patient, flags=("no_spacing",))


def examine_picture(found: FoundPicture, settings: XraySettings, names: Pseudonyms) -> Judged:
    """A picture after a look at all of its pixels.

    Raises:
        SceneError: It cannot be used; without any name.
    """
    if settings.spacing_mm is not None and found.spacing_mm is None:
        raise SceneError("nobody says how large its pixels are; set reader.spacing_mm=null to take them as they are", "no_spacing")
    spacing = found.spacing_mm or (1.0, 1.0)
    respacing = Respacing.to(found.space, spacing, settings.spacing_mm)
    for space, what in ((found.space, "stored"), (respacing.target, f"at {settings.spacing_mm} mm")):
        if np.prod(space, dtype=object) > settings.max_pixels:
            raise SceneError(f"{space} pixels {what} are more than max_pixels={settings.max_pixels}", "too_large")
    stored = found.picture.stored()
    exposed = exposed_of(stored, found.picture.padding)
    seen = stored[exposed]
    if not seen.size or seen.min() == seen.max():
        raise SceneError("constant: all pixels that were exposed hold the same value", "constant")
    meant, fed = found.picture.meant(stored), found.picture.fed(stored)
    turned = -1.0 if found.is_inverted else 1.0
    channel, low, high = _normalised(fed[exposed], found, settings, turned)
    rows, columns = spacing
    matrix = np.array([[0, columns, columns / 2], [rows, 0, rows / 2], [0, 0, 1.0]])
    scene = XrayScene(
        name=names.of("scan", found.place),
        group=names.of("subject", found.patient),
        picture=found.picture,
        grid=Grid.from_matrix(respacing.target, matrix @ respacing.matrix, "", "index" if found.spacing_mm is None else "mm"),
        channels=(channel,),
        voxel_digests=(voxel_digest(meant, np.isfinite(meant), turned * found.slope, found.intercept),),
        dtype=fed.dtype,
        respacing=respacing,
        low=low,
        high=high,
    )
    return Judged(found, scene, stored.dtype, _values(meant, exposed, found), float(np.count_nonzero(exposed) / exposed.size))


def _normalised(seen: NDArray[Any], found: FoundPicture, settings: XraySettings, turned: float) -> tuple[Channel, float, float]:
    """How what is fed becomes what a model sees, by what was exposed; and to what it is cut before."""
    low, high = _window(found)
    seen = np.clip(seen, low, high)
    bottom, top = ends(seen)
    sign = turned if found.is_shown else turned * float(np.sign(found.slope))
    if settings.intensity == "zscore":
        middle, width = robust_mean_std(seen)
    else:
        middle, width, low, high = bottom if sign > 0 else top, top - bottom, bottom, top
    if width == 0:
        raise SceneError(f"what was exposed is constant ({middle:g})", "constant_foreground")
    scale = sign / width
    unit = "z-score" if settings.intensity == "zscore" else "percentile"
    return Channel(found.channel, scale=scale, offset=-middle * scale, unit=unit), low, high


def _window(found: FoundPicture) -> tuple[float, float]:
    """What is cut to, in `picture.meant`, rising; everything where there is no window."""
    if found.window is None:
        return -np.inf, np.inf
    low, high = sorted((value - found.intercept) / found.slope for value in found.window)
    return low, high


def _values(meant: NDArray[Any], exposed: NDArray[np.bool_], found: FoundPicture) -> Values:
    both = sorted(float(end) * found.slope + found.intercept for end in (meant.min(), meant.max()))
    seen = meant[exposed]
    mean, deviation = float(seen.mean(dtype=np.float64)), float(seen.std(dtype=np.float64))
    return Values(both[0], both[1], mean * found.slope + found.intercept, deviation * abs(found.slope))


def _by_series(refused: Sequence[Refused]) -> list[Refused]:
    """What is refused, with the files of a series that nobody asked for as one."""
    together: defaultdict[tuple[str, str], list[Refused]] = defaultdict(list)
    for item in refused:
        together[item.place, item.reason].append(item)
    return [replace(first, files=tuple(file for item in (first, *others) for file in item.files)) for first, *others in together.values()]


def _names(found: Sequence[FoundPicture], refused: Sequence[Refused], names: Pseudonyms) -> dict[str, str]:
    """What each pseudonym stands for, as `volume_scan` tells it."""
    known: dict[str, str] = {}
    everything: list[FoundPicture | Refused] = [*found, *refused]
    for item in everything:
        files = (item.picture.path,) if isinstance(item, FoundPicture) else item.files
        known |= {names.of(kind, item.place): stands_for(files, item.place) for kind in ("scan", "file")}
        if item.patient:
            known[names.of("subject", item.patient)] = item.patient
            known[names.of("session", item.patient, session_of(item))] = f"{item.patient} {session_of(item)}"
    return known


def _notes(judged: Sequence[Judged], settings: XraySettings) -> list[str]:
    """Lines on what the values of pictures are brought to, and on what nobody says of them."""
    if not judged:
        return []
    how = {"zscore": "z-score", "percentile": "0.5 to 99.5 percentile as 0 to 1, cut there,"}[settings.intensity]
    notes = [f"X-ray pictures are normalised one by one: {how} over what was exposed (reader.intensity); display windows: {settings.voi}"]
    unknown = sum(one.found.spacing_mm is None for one in judged)
    if unknown:
        notes.append(f"nobody says how large a pixel is in {counted(unknown, 'picture')}: their lattice counts in pixels")
    return notes
