"""DICOM series in space: array and affine equal those of independent readers, whatever the files are called."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import dcm2niix
import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray

from modalities.catalogue import every_file
from modalities.dicom import DicomFolder, find_dicom
from modalities.medical import CtSettings, VolumeSettings
from modalities.volume import Found, VolumeScene
from modalities.volume_scan import scan_volumes
from tests.synthetic_dicom import LPS, PLANES, write_enhanced, write_mosaic, write_series
from tests.synthetic_volumes import NATIVE, REAL, needs_real, world

SPACE = (9, 7, 6)
REAL_MRI = REAL / "dicom" / "brain_tumor_study3" / "Study3"


def by_position(space: tuple[int, ...], affine: NDArray[Any]) -> NDArray[np.int16]:
    """Values that tell where they were measured: a mix of world coordinates, different in every voxel."""
    return np.rint(np.tensordot([11.0, 7.0, 3.0], world(space, affine), 1) * 20).astype(np.int16)


def found_in(folder: Path, settings: VolumeSettings = NATIVE) -> DicomFolder:
    return find_dicom(every_file(folder), folder, settings)


def only(folder: Path, settings: VolumeSettings = NATIVE) -> Found:
    """The one volume of a folder."""
    result = found_in(folder, settings)
    assert not result.refused, result.refused
    (found,) = result.found
    return found


def physical(found: Found) -> NDArray[np.float64]:
    header = found.source.header
    return found.source.stored().astype(np.float64) * header.slope + header.intercept


def by_simpleitk(folder: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Array `(column, row, slice)` and RAS+ affine as GDCM orders the files of a folder."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return of_simpleitk(reader.Execute())


def of_simpleitk(image: SimpleITK.Image) -> tuple[NDArray[Any], NDArray[np.float64]]:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).T, LPS @ affine


def by_dcm2niix(folder: Path, out: Path) -> list[nib.Nifti1Image]:
    out.mkdir()
    command = [dcm2niix.bin, "-z", "n", "-b", "n", "-o", str(out), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return [nib.load(file) for file in sorted(out.glob("*.nii"))]


def assert_same_volume(found: Found, values: NDArray[Any], affine: NDArray[Any]) -> None:
    """Equal voxels in RAS+ order, and affines within 1e-4 mm."""
    header = found.source.header
    other = nib.as_closest_canonical(nib.Nifti1Image(np.asarray(values, np.float64), affine))
    assert np.array_equal(header.to_canonical(physical(found)), other.get_fdata())
    assert np.abs(header.canonical.matrix - other.affine).max() < 1e-4


@pytest.mark.parametrize("plane", PLANES)
def test_a_series_equals_what_independent_readers_make_of_it(tmp_path: Path, plane: str) -> None:
    affine = PLANES[plane]
    values = by_position(SPACE, affine)
    write_series(tmp_path / "in", values, affine, seed=3, InstanceNumber=None, RescaleSlope=2, RescaleIntercept=-7)
    found = only(tmp_path / "in")
    header = found.source.header
    assert np.array_equal(found.source.stored(), values)
    assert (header.dtype, header.slope, header.intercept) == ("<i2", 2.0, -7.0)
    assert np.abs(header.grid.matrix - affine).max() < 1e-6
    assert_same_volume(found, *by_simpleitk(tmp_path / "in"))
    (image,) = by_dcm2niix(tmp_path / "in", tmp_path / "out")
    assert_same_volume(found, image.get_fdata(), image.affine)


@pytest.mark.parametrize("plane", PLANES)
def test_a_slice_stack_from_the_other_end_is_the_same_volume(tmp_path: Path, plane: str) -> None:
    affine = PLANES[plane]
    values = by_position(SPACE, affine)
    write_series(tmp_path / "in", values[:, :, ::-1], affine @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 5], [0, 0, 0, 1]])
    assert_same_volume(only(tmp_path / "in"), values, affine)


@pytest.mark.parametrize("plane", PLANES)
def test_frames_of_a_file_in_any_order_are_the_same_volume(tmp_path: Path, plane: str) -> None:
    affine = PLANES[plane]
    values = by_position(SPACE, affine)
    write_enhanced(tmp_path / "in" / "x", values, affine, [4, 2, 5, 0, 1, 3])
    found = only(tmp_path / "in")
    assert np.array_equal(found.source.stored(), values)
    assert np.abs(found.source.header.grid.matrix - affine).max() < 1e-6
    image = SimpleITK.ReadImage(str(write_enhanced(tmp_path / "in order", values, affine)))
    assert_same_volume(found, *of_simpleitk(image))


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("plane", PLANES)
def test_a_mosaic_is_cut_into_its_slices_each_in_its_place(tmp_path: Path, plane: str, count: int) -> None:
    affine = PLANES[plane]
    values = by_position((*SPACE[:2], count), affine)
    write_mosaic(tmp_path / "in" / "x", values, affine)
    found = only(tmp_path / "in")
    assert np.array_equal(found.source.stored(), values)
    assert np.abs(found.source.header.grid.matrix - affine).max() < 1e-5


@needs_real
def test_a_real_ct_equals_what_independent_readers_make_of_it(tmp_path: Path) -> None:
    folder = REAL / "dicom" / "torchio_ct" / "dicom"
    found = only(folder, CtSettings())
    assert_same_volume(found, *by_simpleitk(folder))
    (image,) = by_dcm2niix(folder, tmp_path / "out")
    assert_same_volume(found, image.get_fdata(), image.affine)


@needs_real
@pytest.mark.parametrize("name", ["11-T1post-18670", "36468-FLAIRreg-58706", "11_HCropVolume"])
def test_a_real_mri_equals_what_independent_readers_make_of_it(tmp_path: Path, name: str) -> None:
    found = only(REAL_MRI / name)
    assert_same_volume(found, *by_simpleitk(REAL_MRI / name))
    (image,) = by_dcm2niix(REAL_MRI / name, tmp_path / "out")
    assert_same_volume(found, image.get_fdata(), image.affine)


def test_a_scene_of_a_series_reads_writes_and_takes_labels(tmp_path: Path) -> None:
    affine = PLANES["oblique"]
    values = by_position(SPACE, affine)
    write_series(tmp_path / "in", values, affine, seed=1, PatientID="A", StudyInstanceUID="1.2.3")
    (scene,) = scan_volumes(every_file(tmp_path / "in"), tmp_path / "in", NATIVE).scenes
    assert isinstance(scene, VolumeScene)
    pixels, _ = scene.read(scene.grid.full)
    assert np.array_equal(pixels[0], scene.header.to_canonical(values))
    labels = (pixels[0] > np.median(pixels[0])).astype(np.uint8)
    scene.write_labels(tmp_path / "labels.nii.gz", labels, 0)
    written = nib.load(tmp_path / "labels.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), values > np.median(values))
    assert np.abs(written.affine - affine).max() < 1e-5
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 1)
    assert np.abs(written.header.get_qform() - affine).max() < 1e-4
    assert written.header.get_xyzt_units()[0] == "mm"
    back = scene.open_labels(tmp_path / "labels.nii.gz")
    assert np.array_equal(back.read(scene.grid.full), labels)
