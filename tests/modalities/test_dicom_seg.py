"""A DICOM segmentation lies where its series lies, whatever reads it; what has no series is refused."""

from __future__ import annotations

from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from modalities.catalogue import every_file
from modalities.dicom_seg import write_dicom_seg
from modalities.scene import SceneError
from modalities.volume import VolumeScene
from modalities.volume_scan import scan_volumes
from tests.synthetic_dicom import LPS, PLANES, uid, write_enhanced, write_series
from tests.synthetic_volumes import NATIVE, REAL, needs_real, save_volume, scan_one, texture

SPACE = (9, 7, 6)
CLASSES = ((0, "rest"), (3, "edema"), (200, "core"))
STUDY = {
    "FrameOfReferenceUID": uid("frame"),
    "StudyInstanceUID": uid("a study"),
    "SeriesInstanceUID": uid("a series"),
    "PatientID": "MUSTERMANN-7",
    "PatientName": "Mustermann^Max",
    "PatientBirthDate": "19700101",
    "PatientSex": "O",
    "AccessionNumber": "1",
    "StudyID": "1",
    "StudyDate": "20200101",
    "StudyTime": "120000",
}


def scene_in(folder: Path) -> VolumeScene:
    (scene,) = scan_volumes(every_file(folder), folder, NATIVE).scenes
    return scene


def drawn() -> NDArray[np.uint8]:
    """Class numbers `(column, row, slice)` without any symmetry; one slice holds nothing."""
    labels = np.random.default_rng(0).choice(np.array([0, 3, 200], np.uint8), SPACE, p=[0.5, 0.3, 0.2])
    labels[:, :, 2] = 0
    return labels


def by_position(file: Path) -> dict[tuple[float, ...], dict[int, NDArray[np.uint8]]]:
    """Frames of a segmentation as pydicom alone reads them: bits by rounded position of their corner and number of their segment."""
    dataset = pydicom.dcmread(file)
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    frames = bits[: dataset.NumberOfFrames * dataset.Rows * dataset.Columns].reshape(-1, dataset.Rows, dataset.Columns)
    found: dict[tuple[float, ...], dict[int, NDArray[np.uint8]]] = {}
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        corner = tuple(round(float(part), 3) for part in group.PlanePositionSequence[0].ImagePositionPatient)
        found.setdefault(corner, {})[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber] = frame
    return found


@pytest.mark.parametrize("plane", ["oblique", "sagittal"])
@pytest.mark.parametrize("kind", ["files", "frames"])
def test_every_frame_lies_where_its_slice_lies(tmp_path: Path, plane: str, kind: str) -> None:
    affine = PLANES[plane]
    values = (texture(SPACE) * 10).astype(np.int16)
    if kind == "files":
        write_series(tmp_path / "in", values, affine, seed=5, **STUDY)
    else:
        write_enhanced(tmp_path / "in" / "x", values, affine, [4, 2, 5, 0, 1, 3], **STUDY)
    scene, labels, out = scene_in(tmp_path / "in"), drawn(), tmp_path / "seg.dcm"
    write_dicom_seg(out, scene.sources[0], labels, CLASSES, "terravox 1.0")
    found = by_position(out)
    for place in range(SPACE[2]):
        corner = tuple(round(float(part), 3) for part in (LPS @ affine @ [0, 0, place, 1])[:3])
        for number, value in ((1, 3), (2, 200)):
            wanted = (labels[:, :, place] == value).T
            np.testing.assert_array_equal(found.get(corner, {}).get(number, np.zeros_like(wanted)), wanted)
    volume = highdicom.seg.segread(out).get_volume(combine_segments=True)
    back = LPS @ volume.affine
    numbers = np.array([0, 3, 200])[volume.array]
    index = np.argwhere(numbers)
    there = (np.linalg.inv(affine) @ back @ np.c_[index, np.ones(len(index))].T)[:3].T
    assert np.abs(there - np.rint(there)).max() < 1e-3
    assert len(index) == np.count_nonzero(labels)
    np.testing.assert_array_equal(labels[tuple(np.rint(there).astype(int).T)], numbers[tuple(index.T)])


def test_it_belongs_to_its_series_names_its_classes_and_is_for_its_owner(tmp_path: Path) -> None:
    write_series(tmp_path / "in", (texture(SPACE) * 10).astype(np.int16), PLANES["axial"], **STUDY)
    out = tmp_path / "seg.dcm"
    write_dicom_seg(out, scene_in(tmp_path / "in").sources[0], drawn(), CLASSES, "terravox 1.0")
    assert out.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["seg.dcm"]
    dataset = pydicom.dcmread(out)
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert dataset[keyword].value == STUDY[keyword], "the standard wants it"
    assert dataset.SeriesInstanceUID != STUDY["SeriesInstanceUID"]
    assert [segment.SegmentLabel for segment in dataset.SegmentSequence] == ["edema", "core"]
    assert {segment.SegmentAlgorithmType for segment in dataset.SegmentSequence} == {"AUTOMATIC"}
    assert dataset.ContentDescription == "research use only, not a medical device"
    assert dataset.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"


def test_a_scan_that_is_no_series_is_refused(tmp_path: Path) -> None:
    scene = scan_one(save_volume(tmp_path / "MUSTERMANN.nii.gz", texture(SPACE)))
    with pytest.raises(SceneError, match="dicom_seg=true wants a DICOM series") as caught:
        write_dicom_seg(tmp_path / "seg.dcm", scene.sources[0], drawn(), CLASSES, "terravox 1.0")
    assert caught.value.code == "no_segmentation"
    assert not (tmp_path / "seg.dcm").exists()


def test_a_series_that_lacks_what_the_standard_asks_for_is_refused_without_its_values(tmp_path: Path) -> None:
    write_series(tmp_path / "in", (texture(SPACE) * 10).astype(np.int16), PLANES["axial"], **(STUDY | {"FrameOfReferenceUID": None}))
    with pytest.raises(SceneError, match="lacks what the standard asks for") as caught:
        write_dicom_seg(tmp_path / "seg.dcm", scene_in(tmp_path / "in").sources[0], drawn(), CLASSES, "terravox 1.0")
    assert "MUSTERMANN" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not (tmp_path / "seg.dcm").exists()


@needs_real
def test_a_real_series_takes_a_segmentation(tmp_path: Path) -> None:
    scene = scene_in(REAL / "dicom" / "brain_tumor_study3" / "Study3" / "11_HCropVolume")
    labels = np.zeros(scene.header.space, np.uint8)
    labels[3:9, 5:8, 2:4] = 3
    write_dicom_seg(tmp_path / "seg.dcm", scene.sources[0], labels, CLASSES, "terravox 1.0")
    volume = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    index = np.argwhere(volume.array == 1)
    there = np.linalg.inv(scene.header.grid.matrix) @ LPS @ volume.affine @ np.c_[index, np.ones(len(index))].T
    assert sorted(map(tuple, np.rint(there[:3].T).astype(int))) == sorted(map(tuple, np.argwhere(labels == 3)))
