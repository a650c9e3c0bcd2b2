"""X-ray pictures in DICOM (CR, DX, MG): one frame, its spacing, what its grey values stand for and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.dicom_facts import Facts, StoredPixels
from modalities.dicom_file import begins_as, read_facts
from modalities.dicom_grey import Lut, Window
from modalities.dicom_pixels import check_pixels, read_pixels
from modalities.medical import XraySettings
from modalities.nifti_file import MAX_SPACING_MM, MIN_SPACING_MM
from modalities.scene import SceneError
from modalities.volume import Refused
from modalities.xray import FoundPicture

WANTED = ("CR", "DX", "MG")


@dataclass(frozen=True)
class DicomPicture:
    """The pixels of a DICOM file of one frame.

    Attributes:
        pixels: Where they are.
        padding: See `Picture.padding`; a stored value.
        lut: What stored values stand for; None: themselves.
        slope, intercept: Physical value = that · slope + intercept.
        shown: What physical values are shown as, where that is asked for and is no straight line.
    """

    pixels: StoredPixels = field(repr=False)
    padding: int | None = None
    lut: Lut | None = None
    slope: float = 1.0
    intercept: float = 0.0
    shown: Lut | Window | None = None

    @property
    def path(self) -> Path:
        """See `Picture.path`."""
        return self.pixels.path

    def stored(self) -> NDArray[Any]:
        """See `Picture.stored`."""
        return np.asarray(read_pixels(self.pixels)[0])

    def meant(self, stored: NDArray[Any]) -> NDArray[Any]:
        """See `Picture.meant`."""
        return stored if self.lut is None else self.lut.of(stored)

    def fed(self, stored: NDArray[Any]) -> NDArray[Any]:
        """See `Picture.fed`."""
        meant = self.meant(stored)
        return meant if self.shown is None else self.shown.of(meant * self.slope + self.intercept)


def find_dicom_picture(file: Path, place: str, settings: XraySettings) -> FoundPicture | Refused | None:
    """What the header of a DICOM file says of its picture, or why it cannot be used; None for a DICOMDIR and for what is no DICOM.

    Raises:
        SceneError: Its header cannot be read; without its name or any value of it.
    """
    begin = begins_as(file)
    if begin == "other":
        return None
    try:
        facts = read_facts(file)
    except SceneError as error:
        if error.code == "dicomdir" or begin == "bare":
            return None
        raise
    patient = facts.patient.casefold() or f"study {facts.study}"
    channel = "MG" if facts.modality == "MG" else "XR"
    try:
        _check(facts, settings)
        window, shown = _display(facts, settings)
    except SceneError as error:
        unwanted = error.code == "other_modality"
        name, sequence = (f"{facts.series}/{error.code}", "") if unwanted else (place, channel)
        return Refused((file,), name, str(error), error.code, unwanted, patient, facts.study, sequence, facts.named_modality)
    frame, pixels = facts.frames[0], facts.pixels
    slope, intercept = (frame.slope, frame.intercept) if facts.modality_lut is None else (1.0, 0.0)
    spacing = frame.spacing or facts.imager_spacing
    known = spacing is not None and all(MIN_SPACING_MM <= part <= MAX_SPACING_MM for part in spacing)
    flags = {"burned_in": facts.burned_in, "lossy": facts.lossy, "no_spacing": not known}
    return FoundPicture(
        picture=DicomPicture(pixels, facts.padding, facts.modality_lut, slope, intercept, shown),
        space=(pixels.rows, pixels.columns),
        place=place,
        patient=patient,
        session=facts.study,
        channel=channel,
        modality=facts.modality,
        flags=tuple(flag for flag, is_so in flags.items() if is_so),
        spacing_mm=(spacing[1], spacing[0]) if known and spacing is not None else None,
        slope=slope,
        intercept=intercept,
        is_inverted=pixels.photometric == "MONOCHROME1" or facts.inverse,  # two ways to say one thing: turned once
        window=window,
        is_shown=shown is not None,
    )


def _display(facts: Facts, settings: XraySettings) -> tuple[tuple[float, float] | None, Lut | Window | None]:
    """To what physical values are cut, and through what they go where that is no straight line; both None where nothing is asked for.

    Raises:
        SceneError: What is asked for is there and cannot be understood.
    """
    first, second = (facts.window, facts.voi_lut) if settings.voi == "window" else (facts.voi_lut, facts.window)
    chosen = None if settings.voi == "none" else first or second
    if isinstance(chosen, Window) and chosen.is_sound and chosen.function != "SIGMOID":
        return chosen.ends, None
    if (isinstance(chosen, Window) and not chosen.is_sound) or (isinstance(chosen, Lut) and not chosen.entries):
        raise SceneError("its display window or lookup table is damaged; export it again, or set reader.voi=none", "damaged_header")
    return None, chosen


def _check(facts: Facts, settings: XraySettings) -> None:
    """Refuses a file that is no X-ray picture, or one not to be used."""
    if facts.modality not in WANTED:
        raise SceneError(f"modality {facts.named_modality}, while {', '.join(WANTED)} are asked for (kind: xray)", "other_modality")
    if facts.burned_in and settings.burned_in == "reject":
        raise SceneError(
            "it says that writing is burned into its picture (BurnedInAnnotation), which may name a person; have it removed, or set "
            "reader.burned_in=use",
            "burned_in",
        )
    if facts.pixels.num_frames != 1:
        raise SceneError(f"{facts.pixels.num_frames} frames, while one picture is wanted", "several_frames")
    if facts.frames[0].slope == 0:
        raise SceneError("RescaleSlope is 0, which makes all values equal; export it again", "damaged_header")
    if facts.modality_lut is not None and not facts.modality_lut.entries:
        raise SceneError(
            "its modality lookup table is damaged, so nobody knows what its values stand for; export it again", "damaged_header"
        )
    check_pixels(facts.pixels)
