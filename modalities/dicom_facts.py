"""What is known of a DICOM file without its pixels: the facts that decide where its frames belong, and none that names a person but ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from modalities.dicom_grey import Lut, Window

MODALITIES = frozenset({"MR", "CT", "CR", "DX", "MG", "PT", "NM", "US", "XA", "RF", "OT", "SC", "SEG", "PR", "KO", "SR"}) | {
    "RTSTRUCT",
    "RTDOSE",
    "RTPLAN",
    "RTIMAGE",
    "REG",
    "DOC",
    "ES",
    "SM",
    "OPT",
    "IO",
    "PX",
}
"""Modalities that a message may name; the tag holds free text in some files."""


@dataclass(frozen=True)
class StoredPixels:
    """Where the pixels of a file are, and how they are laid down.

    Attributes:
        path, size, changed_ns: The file, its bytes and when it was last written.
        rows, columns, num_frames: Shape; a mosaic's is that of the whole picture.
        bits_allocated, bits_stored, high_bit, signed: Of one value.
        samples: Values per pixel, 1 for grey.
        photometric: `MONOCHROME1`, `MONOCHROME2`, `RGB`, …
        syntax: UID of the transfer syntax.
        keyword: Element that holds the pixels; empty where there is none.
        offset: Byte where its value begins; -1 in a deflated file.
        num_bytes: Length of the value; -1 where it is told by its items alone.
    """

    path: Path = field(repr=False)
    size: int
    changed_ns: int
    rows: int
    columns: int
    num_frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    samples: int
    photometric: str
    syntax: str
    keyword: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Frame:
    """One plane: where it lies and what tells it apart from others of its series.

    Attributes:
        number: Its place in the file, from 0.
        position: Centre of its first pixel in DICOM's world (L, P, S), millimetres.
        orientation: Unit vectors along a row and along a column, in that world.
        spacing: Millimetres between columns and between rows.
        slope, intercept: Physical value = stored · slope + intercept.
        image_type: As in the tag.
        echo: Number and time (ms) of the echo, 0 where unknown.
        b_value: Of diffusion, s/mm²; None where nobody said.
        contrast: Inversion time (ms) and flip angle (degrees), 0 where unknown.
        gradient: Direction of diffusion; empty where nobody said.
        temporal: Number of the time point; None where nobody said.
        order: Acquisition number, instance number and time of day of the acquisition in seconds, as far as known: what came first.
    """

    number: int
    position: tuple[float, ...] | None = field(default=None, repr=False)
    orientation: tuple[float, ...] | None = None
    spacing: tuple[float, float] | None = None
    slope: float = 1.0
    intercept: float = 0.0
    image_type: tuple[str, ...] = field(default=(), repr=False)
    echo: tuple[float, float] = (0, 0.0)
    b_value: float | None = None
    contrast: tuple[float, float] = (0.0, 0.0)
    gradient: tuple[float, ...] = ()
    temporal: int | None = None
    order: tuple[float, float, float] = field(default=(0, 0, 0.0), repr=False)


@dataclass(frozen=True)
class Facts:
    """Of one file.

    Attributes:
        instance, series, study, patient: What names them: UIDs, and id with issuer. They leave this program in no form but a keyed hash.
        modality: `MR`, `CT`, `DX`, …; as in the tag.
        burned_in: Whether it says that writing is burned into the picture.
        lossy: Whether it was compressed with loss at some time.
        is_mosaic: Whether each picture holds many slices side by side.
        pixels: Where they are.
        frames: Its planes; of a file without functional groups, one, whatever `pixels.num_frames` says.
        words: Words of the closed vocabulary of `dicom_sequence` that its descriptions hold.
        scanning: Kinds of scanning sequence (`SE`, `GR`, `IR`, `EP`).
        repetition_ms: Repetition time, 0 where unknown.
        has_agent: Whether a contrast agent is named.
        imager_spacing: Millimetres between columns and rows at the detector (X-ray).
        modality_lut: What stored values stand for, where it is no slope and intercept.
        window, voi_lut: The first display window, and the first table that stands in its place.
        inverse: Whether the presentation is said to be inverse (`PresentationLUTShape`).
        padding: Stored value of pixels outside of the picture.
    """

    instance: str = field(repr=False)
    series: str = field(repr=False)
    study: str = field(repr=False)
    patient: str = field(repr=False)
    modality: str = field(repr=False)
    burned_in: bool
    lossy: bool
    is_mosaic: bool
    pixels: StoredPixels
    frames: tuple[Frame, ...]
    words: frozenset[str]
    scanning: tuple[str, ...]
    repetition_ms: float
    has_agent: bool
    imager_spacing: tuple[float, float] | None
    modality_lut: Lut | None
    window: Window | None
    voi_lut: Lut | None
    inverse: bool
    padding: int | None

    @property
    def named_modality(self) -> str:
        """The modality where it is a known one, for a message."""
        return self.modality if self.modality in MODALITIES else "an unknown one"
