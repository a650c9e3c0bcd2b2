"""X-ray pictures in DICOM (CR, DX, MG): one frame, its spacing, which way its grey values run and the window it would be shown with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.dicom_facts import Facts, StoredPixels
from modalities.dicom_file import begins_as, read_facts
from modalities.dicom_pixels import check_pixels, read_pixels
from modalities.medical import XraySettings
from modalities.nifti_file import MAX_SPACING_MM, MIN_SPACING_MM
from modalities.scene import SceneError
from modalities.xray import FoundPicture

WANTED = ("CR", "DX", "MG")


@dataclass(frozen=True)
class DicomPicture:
    """The pixels of a DICOM file of one frame."""

    pixels: StoredPixels = field(repr=False)
    padding: int | None = None

    @property
    def path(self) -> Path:
        """See `Picture.path`."""
        return self.pixels.path

    def stored(self) -> NDArray[Any]:
        """See `Picture.stored`."""
        return np.asarray(read_pixels(self.pixels)[0])


def find_dicom_picture(file: Path, place: str, settings: XraySettings) -> FoundPicture | None:
    """What the header of a DICOM file says of its picture; None for a DICOMDIR and for what is no DICOM.

    Raises:
        SceneError: It cannot be used; without its name or any value of it.
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
    _check(facts, settings)
    frame, pixels = facts.frames[0], facts.pixels
    spacing = frame.spacing or facts.imager_spacing
    known = spacing is not None and all(MIN_SPACING_MM <= part <= MAX_SPACING_MM for part in spacing)
    window = None
    if facts.window is not None:
        center, width = facts.window
        window = (center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)  # PS3.3, C.11.2.1.2.1
    return FoundPicture(
        picture=DicomPicture(pixels, facts.padding),
        space=(pixels.rows, pixels.columns),
        place=place,
        patient=facts.patient.casefold() or f"study {facts.study}",
        channel="MG" if facts.modality == "MG" else "XR",
        spacing_mm=(spacing[1], spacing[0]) if known and spacing is not None else None,
        slope=frame.slope,
        intercept=frame.intercept,
        is_inverted=pixels.photometric == "MONOCHROME1",
        window=window,
    )


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
    check_pixels(facts.pixels)
