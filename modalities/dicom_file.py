"""One DICOM file: whether it is one, and its facts from a fixed list of tags, read once and without its pixels.

Nothing else of the header is looked at. pydicom's warnings quote values, so none is shown.
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import pydicom
from pydicom import config
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from modalities.dicom_enhanced import enhanced_frames
from modalities.dicom_facts import Facts, Frame, StoredPixels
from modalities.dicom_grey import lut_of, window_of
from modalities.dicom_mosaic import mosaic_frames
from modalities.dicom_sequence import words_of
from modalities.dicom_values import MISREAD, number_of, numbers_of, several, text_of, texts_of, value_of, whole_of
from modalities.scene import SceneError

DIRECTORY = "1.2.840.10008.1.3.10"
"""Class of a DICOMDIR."""
CSA_HEADER = 0x00291010
_PIXELS = {0x00080010: "", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_UNTOLD = 0xFFFFFFFF
_B_VALUES = {
    0x0019100C: (0x00190010, "SIEMENS MR HEADER"),
    0x00431039: (0x00430010, "GEMS_PARM_01"),
    0x20011003: (0x20010010, "Philips Imaging DD 001"),
}
"""Private tags for the b-value, each with the tag and the text of who made it."""
_GE_PARTS = (0x0043102F, 0x00430010, "GEMS_PARM_01", ("M", "P", "R", "I"))
"""GE's private tag for magnitude, phase, real and imaginary part, likewise, and what its numbers mean."""
_TAGS: tuple[str | int, ...] = (
    *("ImageType", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality"),
    *("PatientID", "IssuerOfPatientID", "SeriesDescription", "ProtocolName", "ContrastBolusAgent", "BurnedInAnnotation"),
    *("SpecificCharacterSet", "ScanningSequence", "RepetitionTime", "EchoTime", "EchoNumbers", "InversionTime", "FlipAngle"),
    *("DiffusionBValue", "DiffusionGradientOrientation", "TemporalPositionIdentifier", "AcquisitionNumber", "InstanceNumber"),
    *("AcquisitionTime", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing"),
    *("SpacingBetweenSlices", "SliceThickness", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue"),
    *("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "LossyImageCompression", "PresentationLUTShape"),
    *("ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", 0x00290010, CSA_HEADER),
    *_B_VALUES,
    _GE_PARTS[0],
    *(creator for creator, _ in _B_VALUES.values()),
)


def begins_as(path: Path) -> Literal["marked", "bare", "other"]:
    """What a file is by its content: `marked` as DICOM behind a preamble, `bare` where only its first element looks like DICOM's."""
    with path.open("rb") as stream:
        begin = stream.read(132)
    if begin[128:] == b"DICM":
        return "marked"
    if len(begin) < 132 or begin[1] or begin[0] not in (2, 8) or begin[3]:
        return "other"  # than group 0x0002 or 0x0008, little-endian, element below 0x0100
    explicit = re.fullmatch(rb"[A-Z]{2}", begin[4:6]) is not None
    length = int.from_bytes(begin[6:8] if explicit else begin[4:8], "little")
    return "bare" if length <= 1 << 10 else "other"


def read_facts(path: Path) -> Facts:
    """The facts of a DICOM file.

    Raises:
        SceneError: It is a DICOMDIR (code `dicomdir`), or its header cannot be read; no value of it is told.
    """
    with path.open("rb") as stream, quiet():
        try:
            dataset = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=list(_TAGS))
            return _facts(dataset, _layout(dataset, stream, path))
        except MISREAD as error:
            if isinstance(error, SceneError):
                raise
            raise SceneError("its DICOM header cannot be read; export it again", "damaged_header") from None


def named_files(path: Path) -> list[tuple[str, ...]]:
    """The files that a DICOMDIR names: parts of paths that begin in its folder."""
    with quiet():
        try:
            records = several(pydicom.dcmread(path, force=True).get("DirectoryRecordSequence"))
            names = [tuple(str(part) for part in several(value_of(record, "ReferencedFileID"))) for record in records]
        except MISREAD:
            return []
    return [name for name in names if name]


@contextmanager
def quiet() -> Iterator[None]:
    """Lets pydicom say nothing: its warnings and log lines quote the values that it stumbles over."""
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _layout(dataset: Any, stream: IO[bytes], path: Path) -> StoredPixels:
    """How pixels lie; the stream stands at the element that holds them, or at its end."""
    status = path.stat()
    implicit, little = dataset.original_encoding
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", "")) if getattr(dataset, "file_meta", None) else ""
    plain = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    keyword, offset, num_bytes = "PixelData", -1, -1
    if syntax != DeflatedExplicitVRLittleEndian:
        head = stream.read(8 if implicit else 12)
        order = "<" if little else ">"
        group, element = struct.unpack(f"{order}HH", head[:4]) if len(head) >= 8 else (0x0008, 0x0010)
        keyword = _PIXELS.get(group << 16 | element, "")
        if keyword and len(head) == (8 if implicit else 12):
            num_bytes = struct.unpack(f"{order}I", head[-4:])[0]
        offset, num_bytes = min(stream.tell(), status.st_size), -1 if num_bytes == _UNTOLD else num_bytes
    bits = whole_of(dataset, "BitsAllocated")
    stored = whole_of(dataset, "BitsStored", bits)
    return StoredPixels(
        path=path,
        size=status.st_size,
        changed_ns=status.st_mtime_ns,
        rows=whole_of(dataset, "Rows"),
        columns=whole_of(dataset, "Columns"),
        num_frames=max(1, whole_of(dataset, "NumberOfFrames", 1)),
        bits_allocated=bits,
        bits_stored=stored,
        high_bit=whole_of(dataset, "HighBit", stored - 1),
        signed=bool(whole_of(dataset, "PixelRepresentation")),
        samples=whole_of(dataset, "SamplesPerPixel", 1),
        photometric=text_of(dataset, "PhotometricInterpretation").upper(),
        syntax=syntax or str(plain),
        keyword=keyword,
        offset=offset,
        num_bytes=num_bytes,
    )


def _facts(dataset: Any, layout: StoredPixels) -> Facts:
    sop_class = text_of(dataset, "SOPClassUID")
    if DIRECTORY in (sop_class, str(getattr(dataset, "file_meta", {}).get("MediaStorageSOPClassUID", ""))):
        raise SceneError("a DICOMDIR, which lists other files", "dicomdir")
    if not sop_class and not (layout.rows and layout.keyword):
        raise SceneError("its DICOM header cannot be read; export it again", "damaged_header")
    issuer, patient = text_of(dataset, "IssuerOfPatientID"), text_of(dataset, "PatientID")
    is_mosaic = "MOSAIC" in texts_of(dataset, "ImageType")
    frames: tuple[Frame, ...] = (_frame(dataset),)
    if value_of(dataset, "PerFrameFunctionalGroupsSequence") is not None:
        frames = enhanced_frames(dataset, frames[0])
    elif is_mosaic:
        frames = mosaic_frames(dataset, frames[0], value_of(dataset, CSA_HEADER), layout)
    return Facts(
        instance=text_of(dataset, "SOPInstanceUID"),
        series=text_of(dataset, "SeriesInstanceUID"),
        study=text_of(dataset, "StudyInstanceUID"),
        patient=f"{issuer}/{patient}" if issuer and patient else patient,
        modality=text_of(dataset, "Modality").upper(),
        burned_in=text_of(dataset, "BurnedInAnnotation").upper() == "YES",
        lossy=text_of(dataset, "LossyImageCompression") == "01",
        is_mosaic=is_mosaic,
        pixels=layout,
        frames=frames,
        words=words_of(text_of(dataset, "SeriesDescription")) or words_of(text_of(dataset, "ProtocolName")),
        scanning=texts_of(dataset, "ScanningSequence"),
        repetition_ms=number_of(dataset, "RepetitionTime"),
        has_agent=bool(text_of(dataset, "ContrastBolusAgent")),
        imager_spacing=_across(numbers_of(dataset, "ImagerPixelSpacing", 2)),
        modality_lut=lut_of(dataset, "ModalityLUTSequence"),
        window=window_of(dataset),
        voi_lut=lut_of(dataset, "VOILUTSequence"),
        inverse=text_of(dataset, "PresentationLUTShape").upper() == "INVERSE",
        padding=None if value_of(dataset, "PixelPaddingValue") is None else int(number_of(dataset, "PixelPaddingValue")),
    )


def _frame(dataset: Any) -> Frame:
    """The plane that the tags at the top of a file speak of."""
    slope, intercept = (numbers_of(dataset, keyword, 1) for keyword in ("RescaleSlope", "RescaleIntercept"))
    temporal = value_of(dataset, "TemporalPositionIdentifier")
    return Frame(
        number=0,
        position=numbers_of(dataset, "ImagePositionPatient", 3),
        orientation=numbers_of(dataset, "ImageOrientationPatient", 6),
        spacing=_across(numbers_of(dataset, "PixelSpacing", 2)),
        slope=slope[0] if slope else 1.0,
        intercept=intercept[0] if intercept else 0.0,
        image_type=(*texts_of(dataset, "ImageType"), *_ge_part(dataset)),
        echo=(number_of(dataset, "EchoNumbers"), number_of(dataset, "EchoTime")),
        b_value=_b_value(dataset),
        contrast=(number_of(dataset, "InversionTime"), number_of(dataset, "FlipAngle")),
        gradient=tuple(round(float(part), 3) for part in several(value_of(dataset, "DiffusionGradientOrientation"))),
        temporal=None if temporal is None else int(number_of(dataset, "TemporalPositionIdentifier")),
        order=(number_of(dataset, "AcquisitionNumber"), number_of(dataset, "InstanceNumber"), _seconds(dataset)),
    )


def _across(rows_columns: tuple[float, ...] | None) -> tuple[float, float] | None:
    """Between columns and between rows: the tag gives the distance between rows first."""
    return None if rows_columns is None else (rows_columns[1], rows_columns[0])


def _b_value(dataset: Any) -> float | None:
    if value_of(dataset, "DiffusionBValue") is not None:
        return number_of(dataset, "DiffusionBValue")
    for tag, (creator, name) in _B_VALUES.items():
        if text_of(dataset, creator) == name and value_of(dataset, tag) is not None:
            return number_of(dataset, tag) % 100_000  # GE adds 10^9 in some versions
    return None


def _ge_part(dataset: Any) -> tuple[str, ...]:
    tag, creator, name, parts = _GE_PARTS
    number = number_of(dataset, tag, -1) if text_of(dataset, creator) == name else -1
    return (parts[int(number)],) if number in range(len(parts)) else ()


def _seconds(dataset: Any) -> float:
    """Time of day of the acquisition."""
    found = re.match(r"(\d\d)(\d\d)(\d\d(?:\.\d+)?)", text_of(dataset, "AcquisitionTime"))
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else 0.0
