"""Values of DICOM series: scaled slice by slice, signed, inverted, unpacked from every transfer syntax; parts of a series told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset

from modalities.catalogue import every_file, scan
from modalities.dicom import DicomFolder, find_dicom
from modalities.dicom_file import read_facts
from modalities.dicom_pixels import read_pixels
from modalities.dicom_sequence import sequence_of, words_of
from modalities.medical import CtSettings, MriSettings
from tests.synthetic_dicom import AXIAL, dicom_image, save, uid, write_enhanced, write_series
from tests.synthetic_volumes import NATIVE, REAL, needs_real, texture

VALUES = texture((7, 6, 8)).astype(np.int16)
SAMPLES = REAL / "dicom" / "pydicom_files"


def found_in(folder: Path, settings: MriSettings | CtSettings = NATIVE) -> DicomFolder:
    return find_dicom(every_file(folder), folder, settings)


def physical(folder: Path, settings: MriSettings | CtSettings = NATIVE) -> tuple[NDArray[Any], str]:
    """Physical values of the one volume of a folder, and its stored type."""
    result = found_in(folder, settings)
    assert not result.refused, result.refused
    (found,) = result.found
    header = found.source.header
    stored = found.source.stored()
    assert stored.dtype == np.dtype(header.dtype)
    return stored.astype(np.float64) * header.slope + header.intercept, header.dtype


def test_slices_are_scaled_each_in_its_own_way(tmp_path: Path) -> None:
    def scaled(dataset: FileDataset, k: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 + k / 4, -10 * k

    write_series(tmp_path / "own", VALUES, AXIAL, scaled)
    values, dtype = physical(tmp_path / "own")
    assert dtype == "<f4"
    assert np.array_equal(values, VALUES * (1 + np.arange(8) / 4) - 10 * np.arange(8))
    write_series(tmp_path / "same", VALUES, AXIAL, RescaleSlope=2, RescaleIntercept=-1024, Modality="CT")
    values, dtype = physical(tmp_path / "same", CtSettings())
    assert dtype == "<i2"
    assert np.array_equal(values, VALUES * 2.0 - 1024)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_types_and_signs_are_kept(tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    values = np.random.default_rng(0).integers(np.iinfo(dtype).min, np.iinfo(dtype).max, VALUES.shape, dtype)
    write_series(tmp_path, values, AXIAL)
    stored = found_in(tmp_path).found[0].source.stored()
    assert stored.dtype == dtype
    assert np.array_equal(stored, values)


@pytest.mark.parametrize(("signed", "wanted"), [(0, 0x0ABC), (1, 0x0ABC - 0x1000)])
def test_bits_above_those_stored_are_dropped_or_are_the_sign(tmp_path: Path, signed: int, wanted: int) -> None:
    values = np.full(VALUES.shape, 0x5ABC, np.uint16)
    write_series(tmp_path, values, AXIAL, BitsStored=12, HighBit=11, PixelRepresentation=signed)
    assert np.unique(found_in(tmp_path).found[0].source.stored()).tolist() == [wanted]


@pytest.mark.parametrize(("dtype", "mirrored"), [(np.uint16, 4095), (np.int16, -1)])
def test_monochrome1_of_mr_is_turned_to_bright_where_the_picture_is(tmp_path: Path, dtype: type[Any], mirrored: int) -> None:
    values = VALUES.astype(dtype)
    write_series(tmp_path, values, AXIAL, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11, RescaleSlope=2)
    assert np.array_equal(physical(tmp_path)[0], 2.0 * (mirrored - VALUES.astype(float)))
    (scene,) = scan(tmp_path, NATIVE).scenes
    brightness = scene.read(scene.grid.full)[0][0].astype(float) * scene.channels[0].scale
    assert np.corrcoef(brightness.ravel(), scene.header.to_canonical(VALUES).ravel())[0, 1] < -0.99


def test_monochrome1_of_ct_stays_in_hounsfield_units(tmp_path: Path) -> None:
    write_series(tmp_path, VALUES, AXIAL, PhotometricInterpretation="MONOCHROME1", Modality="CT", RescaleIntercept=-1024)
    assert np.array_equal(physical(tmp_path, CtSettings())[0], VALUES - 1024.0)


def test_rle_is_unpacked(tmp_path: Path) -> None:
    write_series(tmp_path, VALUES, AXIAL, packed=True)
    assert np.array_equal(physical(tmp_path)[0], VALUES)


@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "DeflatedExplicitVRLittleEndian"])
def test_every_lossless_syntax_gives_the_same_values(tmp_path: Path, syntax: str) -> None:
    values = texture((40, 36, 3)).astype(np.uint16)
    for file in write_series(tmp_path, values, AXIAL):
        if syntax.startswith("Deflated"):
            dataset = pydicom.dcmread(file)
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
            dataset.save_as(file, enforce_file_format=True)
            continue
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(file))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(file))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID != pydicom.uid.ExplicitVRLittleEndian
    assert np.array_equal(physical(tmp_path)[0], values)


@needs_real
def test_real_compressed_files_equal_the_uncompressed_one() -> None:
    plain = read_pixels(read_facts(SAMPLES / "MR_small.dcm").pixels)
    assert (plain.shape, plain.dtype) == ((1, 64, 64), np.int16)
    for name in ("RLE", "bigendian", "implicit", "jp2klossless"):
        assert np.array_equal(read_pixels(read_facts(SAMPLES / f"MR_small_{name}.dcm").pixels), plain), name
    for name in ("693_J2KI", "CT_small", "JPEG2000", "examples_overlay"):
        facts = read_facts(SAMPLES / f"{name}.dcm")
        other = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(facts.pixels.path)))
        values = read_pixels(facts.pixels) * facts.frames[0].slope + facts.frames[0].intercept
        assert np.array_equal(values.reshape(other.shape), other), name


def test_echoes_directions_and_sizes_of_a_series_are_volumes_of_their_own(tmp_path: Path) -> None:
    same = {"SeriesInstanceUID": uid("one")}
    sagittal = np.array([[0, 0, 2.5, -30], [-0.9, 0, 0, 60], [0, -1.1, 0, 40], [0, 0, 0, 1.0]])
    write_series(tmp_path / "a", VALUES, AXIAL, EchoTime="10", **same)
    write_series(tmp_path / "b", VALUES + 1, AXIAL, EchoTime="80", **same)
    write_series(tmp_path / "c", VALUES + 2, sagittal, EchoTime="10", **same)
    write_series(tmp_path / "d", VALUES[:5] + 3, AXIAL, EchoTime="10", **same)
    write_series(tmp_path / "e", VALUES + 4, AXIAL, EchoTime="10", ImageType=["DERIVED", "SECONDARY", "MPR"], **same)
    write_series(tmp_path / "f", VALUES + 5, AXIAL * [0.5, 1, 1, 1], EchoTime="10", **same)
    result = found_in(tmp_path)
    assert not result.refused
    assert len({item.place for item in result.found}) == 6
    assert sorted(item.source.stored().min() - VALUES.min() for item in result.found) == [
        0,
        1,
        2,
        3 + VALUES[:5].min() - VALUES.min(),
        4,
        5,
    ]


def test_moments_are_told_by_time_or_by_what_came_first(tmp_path: Path) -> None:
    for moment in (2, 0, 1):
        tags = {"SeriesInstanceUID": uid("t")}
        write_series(tmp_path / "t" / str(moment), VALUES + moment, AXIAL, TemporalPositionIdentifier=moment + 1, **tags)

        def later(dataset: FileDataset, k: int, moment: int = moment) -> None:
            dataset.InstanceNumber = moment * 8 + k + 1

        write_series(tmp_path / "n" / str(moment), VALUES + moment, AXIAL, later, SeriesInstanceUID=uid("n"))
    for name in "tn":
        (refused,) = found_in(tmp_path / name).refused
        assert (refused.code, len(refused.files)) == ("time_series", 24)
        first = found_in(tmp_path / name, MriSettings(four_d={"default": "first"}))
        assert np.array_equal(first.found[0].source.stored(), VALUES)
        assert first.found[0].flags == ("four_d",)
        assert [(item.code, len(item.files), item.unwanted) for item in first.refused] == [("time_series", 16, True)]
        assert np.array_equal(physical(tmp_path / name, MriSettings(four_d={"default": "mean"}))[0], VALUES + 1)


def test_diffusion_is_split_by_b_value_and_the_one_that_is_asked_for_is_used(tmp_path: Path) -> None:
    for number, b_value in enumerate((0, 0, 1000, 1000)):
        gradient = [float(number == 2), float(number == 3), 0.0]
        tags = {"DiffusionBValue": float(b_value), "DiffusionGradientOrientation": gradient, "AcquisitionNumber": number + 1}
        write_series(tmp_path / str(number), VALUES + 2 * number, AXIAL, **tags)
    result = found_in(tmp_path)
    assert [(item.sequence, item.source.num_moments) for item in result.found] == [("dwi", 2)]
    assert np.array_equal(result.found[0].source.stored(), VALUES + 1)
    assert [(item.code, len(item.files)) for item in result.refused] == [("b_value_absent", 16)]
    (found,) = found_in(tmp_path, MriSettings(four_d={"dwi": "b1000"})).found
    assert np.array_equal(found.source.stored(), VALUES + 5)


def test_inversion_times_make_volumes_of_their_own(tmp_path: Path) -> None:
    for number in range(2):
        write_series(tmp_path / str(number), VALUES + number, AXIAL, InversionTime=f"{500 + number * 900}")
    assert [item.source.stored().min() - VALUES.min() for item in found_in(tmp_path).found] == [0, 1]


def test_frames_of_one_file_are_scaled_and_told_apart_by_their_groups(tmp_path: Path) -> None:
    def groups(frame: Dataset, k: int) -> None:
        values, diffusion = Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept = 1 + k, k
        diffusion.DiffusionBValue = 0.0
        frame.PixelValueTransformationSequence, frame.MRDiffusionSequence = [values], [diffusion]

    write_enhanced(tmp_path / "x", VALUES, AXIAL, [3, 0, 1, 2, 7, 6, 5, 4], groups, SeriesDescription="ep2d_diff")
    assert np.array_equal(physical(tmp_path)[0], VALUES * (1.0 + np.arange(8)) + np.arange(8))
    assert found_in(tmp_path).found[0].sequence == "dwi"


@needs_real
@pytest.mark.parametrize(("folder", "reference"), [("20180918GE", "DCM2NIIX_regression_test_4"), ("20180918Si", "EPI_PE=AP_3")])
def test_real_time_series_and_mosaic_equal_the_reference_of_dcm2niix(folder: str, reference: str) -> None:
    root = REAL / "dicom" / "dcm_qa_nih"
    image = nib.load(root / "Ref" / f"{reference}.nii")
    result = found_in(root / "In" / folder, MriSettings(four_d={"default": "first"}))
    header = result.found[0].source.header
    other = nib.as_closest_canonical(nib.Nifti1Image(image.get_fdata()[..., 0], image.affine))
    assert np.array_equal(header.to_canonical(result.found[0].source.stored()), other.get_fdata())
    assert np.abs(header.canonical.matrix - other.affine).max() < 1e-4


@pytest.mark.parametrize(
    ("wanted", "description", "tags"),
    [
        ("T1w", "t1_mprage_sag_p2_iso", {}),
        ("T1ce", "AX T1 POST", {}),
        ("T1ce", "T1w", {"ContrastBolusAgent": "10ml"}),
        ("T1w", "T1 pre contrast", {"ContrastBolusAgent": "10ml"}),
        ("T2w", "T2_TSE_tra", {}),
        ("FLAIR", "AX T2 FLAIR", {}),
        ("T1w", "Sag T1 FLAIR", {}),
        ("T2star", "AX T2* GRE", {}),
        ("swi", "SWI_Images", {}),
        ("adc", "ep2d_diff_ADC", {}),
        ("dwi", "DWI b1000", {}),
        ("PD", "PD axial", {}),
        ("angio", "3D TOF", {}),
        ("MR", "T1 map", {}),
        ("MR", "Mr T1Jones", {}),
        ("MR", "", {}),
        ("T1w", "", {"ScanningSequence": "SE", "EchoTime": "10", "RepetitionTime": "500"}),
        ("T2w", "", {"ScanningSequence": "SE", "EchoTime": "100", "RepetitionTime": "4000"}),
        ("PD", "", {"ScanningSequence": "SE", "EchoTime": "15", "RepetitionTime": "3000"}),
        ("FLAIR", "", {"ScanningSequence": ["SE", "IR"], "EchoTime": "90", "RepetitionTime": "9000", "InversionTime": "2500"}),
        ("T1w", "", {"ScanningSequence": ["GR", "IR"], "EchoTime": "3", "RepetitionTime": "2000", "InversionTime": "900"}),
        ("MR", "", {"ScanningSequence": "GR", "EchoTime": "3", "RepetitionTime": "20"}),
        ("dwi", "", {"DiffusionBValue": 1000.0}),
        ("adc", "", {"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]}),
    ],
)
def test_a_sequence_is_named_by_words_of_a_closed_list_or_by_physics(tmp_path: Path, wanted: str, description: str, tags: Any) -> None:
    path = save(dicom_image(VALUES[:, :, 0].T, SeriesDescription=description, **tags), tmp_path / "x")
    facts = read_facts(path)
    assert sequence_of(facts, facts.frames[0]) == wanted
    assert "Jones" not in repr(words_of("T1 Jones")) + repr(facts)


def test_patients_and_sessions_are_those_of_the_header(tmp_path: Path) -> None:
    for number, tags in enumerate(
        [
            {"PatientID": "A"},
            {"PatientID": "a ", "StudyInstanceUID": uid(2)},
            {"PatientID": "A", "IssuerOfPatientID": "elsewhere"},
            {"PatientID": None, "StudyInstanceUID": uid(3)},
            {"PatientID": "", "StudyInstanceUID": uid(4)},
        ]
    ):
        write_series(tmp_path / str(number), VALUES + number, AXIAL, SeriesInstanceUID=f"2.25.1{number}", **tags)
    result = found_in(tmp_path)
    patients = [item.patient for item in result.found]
    assert patients[0] == patients[1] == "a"
    assert len(set(patients)) == 4
    assert len({item.session for item in result.found}) == 4
    assert result.notes == ("2 DICOM studies name no patient (PatientID is empty): each counts as a patient of its own",)
    assert [item.sequence for item in found_in(tmp_path, MriSettings(sequence="T9")).found] == ["T9"] * 5
