"""The pixels of a DICOM file as stored numbers, whatever their transfer syntax; what cannot be decoded says in words what is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import config
from pydicom.pixels import get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from modalities.dicom_facts import StoredPixels
from modalities.dicom_file import quiet
from modalities.dicom_values import MISREAD
from modalities.scene import SceneError

COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")


def check_pixels(pixels: StoredPixels) -> np.dtype[np.generic]:
    """Type of the stored values of pixels that can be decoded here.

    Raises:
        SceneError: There are none, they are no grey values, or no decoder for them is installed.
    """
    if not pixels.keyword:
        raise SceneError("no pixel data; export it again", "no_pixels")
    if pixels.photometric in COLOURS or pixels.samples != 1:
        raise SceneError("a colour picture, while grey values are wanted", "colour")
    if pixels.photometric == "PALETTE COLOR":
        raise SceneError("a picture by a palette, while grey values are wanted", "colour")
    layout = f"{pixels.bits_stored} of {pixels.bits_allocated} bits, highest bit {pixels.high_bit}"
    if (
        pixels.keyword != "PixelData"
        or pixels.bits_allocated not in (8, 16, 32)
        or not 1 <= pixels.bits_stored <= pixels.bits_allocated
        or pixels.high_bit != pixels.bits_stored - 1
        or min(pixels.rows, pixels.columns) < 1
    ):
        raise SceneError(f"pixels of {layout} on {pixels.rows} x {pixels.columns} are not supported; convert it", "pixel_layout")
    if pixels.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise SceneError("nobody knows what its pixels mean (PhotometricInterpretation); export it again", "pixel_layout")
    _decoder(pixels)
    return np.dtype(f"{'i' if pixels.signed else 'u'}{pixels.bits_allocated // 8}")


def read_pixels(pixels: StoredPixels) -> NDArray[np.generic]:
    """Stored values `(frame, row, column)` of a file, without rescaling: unused bits are dropped, the sign is kept.

    Raises:
        SceneError: The file has changed since its header was read, ends early, or cannot be decoded; without any value of it.
        OSError: It cannot be read.
    """
    refuse_changed(pixels)
    dtype = check_pixels(pixels)
    if pixels.num_bytes > 0 and pixels.offset + pixels.num_bytes > pixels.size:
        raise SceneError(
            f"truncated: {pixels.size - pixels.offset} of {pixels.num_bytes} bytes of pixels; copy it again",
            "truncated",
        )
    shape = (pixels.num_frames, pixels.rows, pixels.columns)
    plain = not _uid(pixels).is_encapsulated
    wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if plain and 0 <= pixels.num_bytes < wanted:
        raise SceneError(f"truncated: {pixels.num_bytes} of {wanted} bytes of pixels; copy it again", "truncated")
    with quiet():
        try:
            values: NDArray[Any] = _decoded(pixels)
        except (*MISREAD, RuntimeError, MemoryError) as error:
            if isinstance(error, SceneError):
                raise
            raise SceneError(f"its pixels ({_syntax(pixels)}) cannot be decoded; copy it again", "damaged_pixels") from None
    if values.size != np.prod(shape, dtype=object):
        raise SceneError(f"truncated: {values.size} of {np.prod(shape, dtype=object)} pixels; copy it again", "truncated")
    return values.reshape(shape).astype(dtype, copy=False)


def refuse_changed(pixels: StoredPixels) -> None:
    """Stops where a file is another than when its header was read."""
    status = pixels.path.stat()
    if (status.st_size, status.st_mtime_ns) != (pixels.size, pixels.changed_ns):
        raise SceneError("a file of it has changed since it was scanned; scan again", "changed")


def _decoder(pixels: StoredPixels) -> Any:
    with quiet():
        try:
            decoder = get_decoder(_uid(pixels))
        except NotImplementedError:
            decoder = None
    if decoder is None or not decoder.is_available:
        raise SceneError(
            f"no decoder for {_syntax(pixels)} is installed; pip install 'terravox[dicom]', or export it uncompressed", "no_decoder"
        )
    return decoder


def _decoded(pixels: StoredPixels) -> Any:
    if pixels.syntax == DeflatedExplicitVRLittleEndian:
        return _decoder(pixels).as_array(pydicom.dcmread(pixels.path, force=True), raw=True)[0]
    with pixels.path.open("rb") as stream:
        stream.seek(pixels.offset)
        source: Any = stream.read(pixels.num_bytes) if pixels.num_bytes > 0 else stream
        return _decoder(pixels).as_array(
            source,
            raw=True,
            transfer_syntax_uid=_uid(pixels),
            rows=pixels.rows,
            columns=pixels.columns,
            samples_per_pixel=1,
            number_of_frames=pixels.num_frames,
            photometric_interpretation=pixels.photometric,
            bits_allocated=pixels.bits_allocated,
            bits_stored=pixels.bits_stored,
            pixel_representation=int(pixels.signed),
            pixel_keyword="PixelData",
            pixel_vr="OW",
        )[0]


def _uid(pixels: StoredPixels) -> UID:
    """Of the transfer syntax, not checked: pydicom's warning would quote it."""
    return UID(pixels.syntax, config.IGNORE)


def _syntax(pixels: StoredPixels) -> str:
    """The transfer syntax in words; of one that DICOM does not know, nothing."""
    known = _uid(pixels)
    return known.name if known.name != pixels.syntax and known.is_transfer_syntax and not known.is_private else "an unknown transfer syntax"
