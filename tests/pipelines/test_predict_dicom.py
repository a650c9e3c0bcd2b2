"""`predict` gives a DICOM series a segmentation that says what its label file says, voxel by voxel, and is for its owner alone."""

from __future__ import annotations

from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest

from mae_core.export import save_model
from modalities.medical import MriSettings
from pipelines import predict
from tests.modalities.test_dicom_seg import STUDY, by_position
from tests.synthetic_dicom import LPS, PLANES, write_series
from tests.synthetic_segmenter import random_segmenter
from tests.synthetic_volumes import texture
from tests.tiny_runs import quick, shared_tracking

__all__ = ["quick"]

SPACE = (18, 14, 9)
CLASSES = ((0, "rest"), (3, "edema"), (9, "core"))


def test_the_verb_writes_a_segmentation_that_says_what_the_label_file_says(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    affine = PLANES["oblique"]
    write_series(tmp_path / "in" / "MUSTERMANN", (texture(SPACE) * 10).astype(np.int16), affine, seed=3, **STUDY)
    model, about = random_segmenter(CLASSES, MriSettings(spacing_mm=(2.0, 2.0, 2.0)))
    save_model(tmp_path / "run" / "model", model, about)
    words = {"model": tmp_path / "run", "data": tmp_path / "in", "out": tmp_path / "out", "tracking.uri": shared_tracking(tmp_path_factory)}
    assert predict.main([*(f"{key}={value}" for key, value in words.items()), "device=cpu", "overlap=0.1", "dicom_seg=true"]) == 0

    (segmentation,) = (tmp_path / "out").glob("*.dcm")
    (label_file,) = (tmp_path / "out").glob("*_labels.nii.gz")
    stem = label_file.name.removesuffix("_labels.nii.gz")
    assert segmentation.name == f"{stem}_seg.dcm"
    assert stem.startswith("scan-")
    assert segmentation.stat().st_mode & 0o777 == 0o600
    labels = nib.load(label_file)
    np.testing.assert_allclose(labels.affine, affine, atol=1e-4)
    values = np.asarray(labels.dataobj)
    assert set(np.unique(values)) == {0, 3, 9}, "a map of one class would show nothing"

    frames = by_position(segmentation)
    for place in range(SPACE[2]):
        corner = tuple(round(float(part), 3) for part in (LPS @ affine @ [0, 0, place, 1])[:3])
        for number, value in ((1, 3), (2, 9)):
            wanted = (values[:, :, place] == value).T
            np.testing.assert_array_equal(frames.get(corner, {}).get(number, np.zeros_like(wanted)), wanted)
    read = highdicom.seg.segread(segmentation)
    assert [read.get_segment_description(number).segment_label for number in read.segment_numbers] == ["edema", "core"]
    dataset = pydicom.dcmread(segmentation, stop_before_pixels=True)
    assert (dataset.Modality, dataset.PatientID) == ("SEG", STUDY["PatientID"])
    assert dataset.SoftwareVersions.startswith("terravox ")

    said = capfd.readouterr()
    assert "MUSTERMANN" not in (said.out + said.err).upper()
    for path in (tmp_path / "out").iterdir():
        assert "MUSTERMANN" not in path.name
        assert (path == segmentation) == (b"MUSTERMANN" in path.read_bytes()), "the segmentation alone names the patient"
