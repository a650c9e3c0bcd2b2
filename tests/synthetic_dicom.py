"""DICOM files made for tests, with a given geometry, every tag under the test's control."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""RAS+ to DICOM's world and back."""
CLASSES = {"MR": "1.2.840.10008.5.1.4.1.1.4", "CT": "1.2.840.10008.5.1.4.1.1.2", "CR": "1.2.840.10008.5.1.4.1.1.1"} | {
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "MG": "1.2.840.10008.5.1.4.1.1.1.2",
}
ENHANCED = {"MR": "1.2.840.10008.5.1.4.1.1.4.1", "CT": "1.2.840.10008.5.1.4.1.1.2.1"}

AXIAL = np.array([[-0.9, 0, 0, 40], [0, -1.1, 0, 60], [0, 0, 2.5, -30], [0, 0, 0, 1.0]])
SAGITTAL = np.array([[0, 0, 2.5, -30], [-0.9, 0, 0, 60], [0, -1.1, 0, 40], [0, 0, 0, 1.0]])
CORONAL = np.array([[-0.9, 0, 0, 40], [0, 0, -2.5, 20], [0, -1.1, 0, 60], [0, 0, 0, 1.0]])
_TURN = np.array([[0.96, -0.28, 0.0, 0], [0.2688, 0.9216, -0.28, 0], [0.0784, 0.2688, 0.96, 0], [0, 0, 0, 1.0]])
PLANES = {"axial": AXIAL, "sagittal": SAGITTAL, "coronal": CORONAL, "oblique": _TURN @ AXIAL}
"""RAS+ affines of `(column, row, slice)` as scanners make them, slices along the normal; the oblique one is turned about two axes."""


def uid(*names: Any) -> str:
    """A UID that is the same for the same names."""
    return "2.25." + str(int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=12).digest()))


def dicom_image(pixels: NDArray[Any], **tags: Any) -> FileDataset:
    """A data set with `pixels` `(row, column)` or `(frame, row, column)` and the least that makes it an image.

    `tags` come by keyword; None takes one away.
    """
    modality = tags.get("Modality") or "MR"
    instance = uid("instance", pixels.tobytes(), repr(sorted(tags.items())))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = tags.get("SOPClassUID") or CLASSES.get(modality, CLASSES["MR"])
    meta.MediaStorageSOPInstanceUID = tags.get("SOPInstanceUID") or instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    bits = pixels.dtype.itemsize * 8
    wanted: dict[str, Any] = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": uid("study"),
        "SeriesInstanceUID": uid("series"),
        "PatientID": "P1",
        "PatientName": "Made^For^Tests",
        "Modality": modality,
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": np.ascontiguousarray(pixels).tobytes(),
    }
    with config.disable_value_validation():  # so that bad values can be planted
        for key, value in (wanted | tags).items():
            if value is not None:
                setattr(dataset, key, value)
    return dataset


def save(dataset: FileDataset, path: Path) -> Path:
    """Writes a data set as a file of DICOM part 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def place_tags(affine: NDArray[Any], index: int) -> dict[str, Any]:
    """Position, orientation and pixel spacing of slice `index` on a RAS+ lattice `(column, row, slice)`."""
    matrix = LPS @ affine
    spacing = np.linalg.norm(matrix[:3, :2], axis=0)
    corner = matrix @ [0, 0, index, 1]
    return {
        "ImagePositionPatient": [f"{v:.10g}" for v in corner[:3]],
        "ImageOrientationPatient": [f"{v:.10g}" for v in (matrix[:3, :2] / spacing).T.ravel()],
        "PixelSpacing": [f"{v:.10g}" for v in spacing[::-1]],
    }


def write_series(
    folder: Path,
    values: NDArray[Any],
    affine: NDArray[Any],
    change: Callable[[FileDataset, int], None] | None = None,
    seed: int | None = None,
    packed: bool = False,
    **tags: Any,
) -> list[Path]:
    """Writes `values` `(column, row, slice)` on the RAS+ lattice of `affine`, a file a slice, and returns the files in order of the slices.

    Args:
        folder: Where they go.
        values: As stored: the dtype tells bits and sign.
        affine: Index to RAS+ millimetres.
        change: What else is done to each slice's data set, given with its number.
        seed: Gives files shuffled names without an ending; None numbers them.
        packed: Whether pixels are RLE.
        tags: By keyword, of every slice; None takes one away.
    """
    count = values.shape[2]
    names = [f"{k:04}.dcm" for k in range(count)]
    if seed is not None:
        names = [f"f{number:04}" for number in np.random.default_rng(seed).permutation(count)]
    written = []
    for k, name in enumerate(names):
        own = {"InstanceNumber": k + 1, "SOPInstanceUID": uid(str(tags.get("SeriesInstanceUID")), str(folder), k)}
        dataset = dicom_image(np.ascontiguousarray(values[:, :, k].T), **(own | place_tags(affine, k) | tags))
        if change is not None:
            change(dataset, k)
        if packed:
            dataset.compress(RLELossless, generate_instance_uid=False)
        written.append(save(dataset, folder / name))
    return written


def write_enhanced(
    path: Path,
    values: NDArray[Any],
    affine: NDArray[Any],
    order: list[int] | None = None,
    change: Callable[[Dataset, int], None] | None = None,
    **tags: Any,
) -> Path:
    """Writes `values` `(column, row, slice)` as one multi-frame file with functional groups, frames in `order`; see `write_series`."""
    order = list(range(values.shape[2])) if order is None else order
    shared, frames = Dataset(), []
    first = place_tags(affine, 0)
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=first["ImageOrientationPatient"])]
    shared.PixelMeasuresSequence = [_item(PixelSpacing=first["PixelSpacing"])]
    for place, k in enumerate(order):
        frame = Dataset()
        frame.PlanePositionSequence = [_item(ImagePositionPatient=place_tags(affine, k)["ImagePositionPatient"])]
        frame.FrameContentSequence = [_item(InStackPositionNumber=k + 1, DimensionIndexValues=[place + 1])]
        if change is not None:
            change(frame, k)
        frames.append(frame)
    modality = tags.get("Modality") or "MR"
    pixels = np.stack([np.ascontiguousarray(values[:, :, k].T) for k in order])
    own = {"SOPClassUID": ENHANCED[modality], "NumberOfFrames": len(order)}
    dataset = dicom_image(pixels, **(own | tags))
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    return save(dataset, path)


def write_mosaic(path: Path, values: NDArray[Any], affine: NDArray[Any], **tags: Any) -> Path:
    """Writes `values` `(column, row, slice)` as a Siemens mosaic: slices side by side, their number and normal in a CSA header."""
    columns, rows, count = values.shape
    across = int(np.ceil(np.sqrt(count)))
    picture = np.zeros((across * rows, across * columns), values.dtype)
    for k in range(count):
        down, right = divmod(k, across)
        picture[down * rows : (down + 1) * rows, right * columns : (right + 1) * columns] = values[:, :, k].T
    step = (LPS @ affine)[:3, 2]
    distance = float(np.linalg.norm(step))
    corner = LPS @ affine @ [-(across - 1) / 2 * columns, -(across - 1) / 2 * rows, 0, 1]
    place = place_tags(affine, 0) | {"ImagePositionPatient": [f"{v:.10g}" for v in corner[:3]]}
    own = {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"], "SpacingBetweenSlices": f"{distance:.10g}"}
    dataset = dicom_image(picture, **(place | own | tags))
    block = dataset.private_block(0x29, "SIEMENS CSA HEADER", create=True)
    block.add_new(0x10, "OB", _csa({"NumberOfImagesInMosaic": [str(count)], "SliceNormalVector": [f"{v:.8f}" for v in step / distance]}))
    return save(dataset, path)


def _csa(tags: dict[str, list[str]]) -> bytes:
    """A CSA header of the second version with a few tags."""
    parts = [b"SV10\4\3\2\1", struct.pack("<2I", len(tags), 77)]
    for name, items in tags.items():
        parts.append(struct.pack("<64si4s3i", name.encode(), len(items), b"FD", 4, len(items), 77))
        for item in items:
            text = item.encode() + b"\0"
            parts += [struct.pack("<4i", len(text), len(text), 77, len(text)), text, bytes(-len(text) % 4)]
    return b"".join(parts) + bytes(8)


def _item(**tags: Any) -> Dataset:
    item = Dataset()
    for key, value in tags.items():
        setattr(item, key, value)
    return item
