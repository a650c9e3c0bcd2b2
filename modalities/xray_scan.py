"""A folder of X-ray pictures becomes scenes under pseudonyms, each normalised over what was exposed; others are refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modalities.duplicates import find_duplicate_pictures
from modalities.grey_png import SIGNATURE, png_space
from modalities.grid import Grid
from modalities.intensity import ends, robust_mean_std
from modalities.medical import XraySettings
from modalities.nifti import patient_of
from modalities.pseudonyms import Pseudonyms, pseudonyms
from modalities.scene import Channel, Rejected, SceneError
from modalities.spacing import Respacing
from modalities.volume import reasons
from modalities.voxel_digest import voxel_digest
from modalities.xray import FoundPicture, PngPicture, XrayScene, exposed_of
from modalities.xray_dicom import find_dicom_picture


@dataclass(frozen=True)
class ScannedPictures:
    """What became of the files of an archive: see `volume_scan.Scanned`."""

    scenes: tuple[XrayScene, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[Path, ...] = field(repr=False)
    notes: tuple[str, ...]


def scan_xrays(files: Sequence[Path], folder: Path, settings: XraySettings) -> ScannedPictures:
    """A scene for every usable picture among `files`, and every other one with its reason. Reads every picture whole."""
    names = pseudonyms()
    places: dict[str, str] = {}
    scenes: list[XrayScene] = []
    rejected: list[Rejected] = []
    ignored: list[Path] = []
    unknown = 0
    for file in files:
        place = file.relative_to(folder).as_posix()
        try:
            with reasons():
                found = find_picture(file, place, settings)
                if found is None:
                    ignored.append(file)
                    continue
                scenes.append(examine_picture(found, settings, names))
                places[scenes[-1].name] = place
                unknown += found.spacing_mm is None
        except SceneError as error:
            rejected.append(Rejected(names.of("file", place), str(error), error.code == "other_modality", error.code))
    scenes, copies, told = find_duplicate_pictures(scenes, settings.duplicates)
    rejected += [Rejected(names.of("file", places[name]), reason, False, "duplicate") for name, reason in copies.items()]
    how = {"zscore": "z-score", "percentile": "0.5 to 99.5 percentile as 0 to 1, cut there,"}[settings.intensity]
    notes = [f"X-ray pictures are normalised one by one: {how} over what was exposed (reader.intensity); display windows: {settings.voi}"]
    if unknown:
        notes.append(f"nobody says how large a pixel is in {unknown} pictures: their lattice counts in pixels")
    return ScannedPictures(tuple(scenes), tuple(rejected), tuple(ignored), (*notes, *told))


def find_picture(file: Path, place: str, settings: XraySettings) -> FoundPicture | None:
    """What the beginning of a file says of its picture; None for a file of another kind.

    Raises:
        SceneError: It cannot be used; without its name.
    """
    with file.open("rb") as stream:
        first = stream.read(len(SIGNATURE))
    if first == SIGNATURE:
        space = png_space(file)
        return FoundPicture(PngPicture(file, space), space, place, patient_of(place, settings.group_pattern))
    return find_dicom_picture(file, place, settings)


def examine_picture(found: FoundPicture, settings: XraySettings, names: Pseudonyms) -> XrayScene:
    """The scene of a picture after a look at all of its pixels.

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
    low, high = _shown(found) if settings.voi == "window" else (-np.inf, np.inf)
    bottom, top = ends(np.clip(seen, low, high))
    sign = float(np.sign(found.slope)) * (-1 if found.is_inverted else 1)
    if settings.intensity == "zscore":
        middle, width = robust_mean_std(np.clip(seen, low, high))
    else:
        middle, width, low, high = bottom if sign > 0 else top, top - bottom, bottom, top
    if width == 0:
        raise SceneError(f"what was exposed is constant ({middle:g})", "constant_foreground")
    scale = sign / width
    unit = "z-score" if settings.intensity == "zscore" else "percentile"
    rows, columns = spacing
    matrix = np.array([[0, columns, columns / 2], [rows, 0, rows / 2], [0, 0, 1.0]])
    return XrayScene(
        name=names.of("scan", found.place),
        group=names.of("subject", found.patient),
        picture=found.picture,
        grid=Grid.from_matrix(respacing.target, matrix @ respacing.matrix, "", "index" if found.spacing_mm is None else "mm"),
        channels=(Channel(found.channel, scale=scale, offset=-middle * scale, unit=unit),),
        voxel_digests=(voxel_digest(stored, np.isfinite(stored), sign * abs(found.slope), found.intercept),),
        dtype=stored.dtype,
        respacing=respacing,
        low=low,
        high=high,
    )


def _shown(found: FoundPicture) -> tuple[float, float]:
    """The window in stored values, rising; everything where there is none."""
    if found.window is None:
        return -np.inf, np.inf
    low, high = sorted((value - found.intercept) / found.slope for value in found.window)
    return low, high
