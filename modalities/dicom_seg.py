"""Labels of a DICOM series as DICOM-SEG, a segment for each class, frame upon frame of the series. The home of highdicom.

A segmentation belongs to its images: the standard wants the patient's name, id, birth date and the UIDs of study and images in
it. Such a file names a patient; it is written on demand only, and readable by its owner alone (mode 0600).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from modalities.dicom import DicomSource
from modalities.dicom_file import quiet
from modalities.scene import SceneError
from modalities.volume import VolumeSource
from modalities.whole_file import OWN, written_whole

CODE = ("85756007", "SCT", "Tissue")
"""Category and type of every segment: nobody said what a class is, so the most general is given; its name is the segment's label."""
MAX_LABEL = 64
EMPTY = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime")


def refuse_no_dicom(source: VolumeSource) -> DicomSource:
    """The source, if a segmentation can be written for it.

    Raises:
        SceneError: It is no DICOM series, or one whose slices are parts of a picture, or highdicom is not installed.
    """
    if not isinstance(source, DicomSource):
        raise SceneError(
            "dicom_seg=true wants a DICOM series, which a segmentation refers to, and this scan is none; leave it out", "no_segmentation"
        )
    if source.num_mosaic:
        raise SceneError(
            "slices of a mosaic are no frames that a DICOM segmentation could refer to; leave out dicom_seg", "no_segmentation"
        )
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise SceneError("dicom_seg=true needs highdicom; pip install 'terravox[dicom]'", "no_segmentation") from None
    return source


def write_dicom_seg(path: Path, source: VolumeSource, labels: NDArray[np.uint8], classes: Sequence[tuple[int, str]], software: str) -> None:
    """Write class numbers `(column, row, slice)` of a series as a binary DICOM segmentation, whole or not at all.

    Args:
        path: File to write.
        source: The series.
        labels: On its lattice, in its order.
        classes: Number and name; 0 is background and no segment.
        software: Name and version of this program.

    Raises:
        SceneError: See `refuse_no_dicom`; or the series lacks what the standard asks for. Without any value of it.
    """
    series = refuse_no_dicom(source)
    series.refuse_changed()
    shown = [(value, name) for value, name in classes if value != 0]
    numbers = np.zeros(256, np.uint8)
    numbers[[value for value, _ in shown]] = np.arange(1, len(shown) + 1)
    frames = np.stack([numbers[labels[:, :, place]].T for place in range(len(series.slices))])
    with quiet():
        images = [pydicom.dcmread(pixels.path, stop_before_pixels=True) for pixels in series.pixels]
        if len(images) == 1 and len(series.slices) > 1:
            ordered, frames = images, frames[np.argsort([part.frame for part in series.slices])]
        else:
            ordered = [images[part.file] for part in series.slices]
        for image in images:
            _fill_empty(image, series.header.grid.spacing[2])
        try:
            found = _segmentation(ordered, frames, [name for _, name in shown], series.header.grid.spacing, software)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            lacking = f" ({error.name})" if isinstance(error, AttributeError) and error.name else ""
            raise SceneError(
                f"no DICOM segmentation can be made for this series, which lacks what the standard asks for{lacking}; leave out dicom_seg",
                "no_segmentation",
            ) from None
        _save(found, path)


def _fill_empty(image: Any, thickness_mm: float) -> None:
    """Put in what may be empty in an image (type 2) and is asked for all the same; nothing that is there is changed."""
    for keyword in EMPTY:
        if keyword not in image:
            setattr(image, keyword, "")
    groups = [*image.get("SharedFunctionalGroupsSequence", []), *image.get("PerFrameFunctionalGroupsSequence", [])]
    measures = [part for group in groups for part in group.get("PixelMeasuresSequence", [])]
    for part in measures or [image]:
        if "SliceThickness" not in part:
            part.SliceThickness = thickness_mm


def _segmentation(images: Sequence[Any], frames: NDArray[np.uint8], names: Sequence[str], spacing: tuple[float, ...], software: str) -> Any:
    """The segmentation of frames in the order of the images, `spacing` being that of columns, rows and slices in mm."""
    from highdicom import UID, AlgorithmIdentificationSequence, PixelMeasuresSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
    from highdicom.sr import CodedConcept

    program, _, version = software.partition(" ")
    code = CodedConcept(*CODE)
    algorithm = AlgorithmIdentificationSequence(program, CodedConcept("123110", "DCM", "Artificial Intelligence"), version or "0")
    segments = [
        SegmentDescription(number, name[:MAX_LABEL], code, code, SegmentAlgorithmTypeValues.AUTOMATIC, algorithm)
        for number, name in enumerate(names, start=1)
    ]
    return Segmentation(
        source_images=images,
        pixel_array=frames,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=UID(),
        series_number=1000,
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer=program,
        manufacturer_model_name=program,
        software_versions=software,
        device_serial_number="0",
        content_label="SEGMENTATION",
        pixel_measures=PixelMeasuresSequence((spacing[1], spacing[0]), spacing[2], spacing[2]),
        content_description="research use only, not a medical device",
    )


def _save(dataset: Any, path: Path) -> None:
    with written_whole(path, OWN) as stream:
        dataset.save_as(stream)
