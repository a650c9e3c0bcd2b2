"""DICOM files that make no volume: each refused with its reason code, none lost, nothing of a header told."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import config
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.fileset import FileSet
from pydicom.uid import JPEGLosslessSV1

from modalities.catalogue import every_file, scan
from modalities.dicom import find_dicom
from modalities.medical import CtSettings, MriSettings
from modalities.reasons import REASONS
from modalities.scene import SceneError
from modalities.volume_scan import scan_volumes
from tests.synthetic_dicom import AXIAL, dicom_image, place_tags, save, uid, write_enhanced, write_series
from tests.synthetic_volumes import NATIVE, REAL, broken, needs_real, save_volume, texture

VALUES = texture((7, 6, 8)).astype(np.int16)
SECRET = "Secret^Name"
Change = Callable[[FileDataset, int], None]


def refusals(folder: Path, settings: MriSettings | CtSettings = NATIVE) -> dict[str, int]:
    """Files by reason code; every file is in a volume, refused, or of another kind, once."""
    files = every_file(folder)
    result = find_dicom(files, folder, settings)
    used = [file for item in result.found for file in item.source.files]
    assert sorted([*used, *(file for item in result.refused for file in item.files), *result.others]) == files
    for item in result.refused:
        assert item.code in REASONS
        told = f"{item.reason}{item!r}"
        assert not any(word in told for word in (SECRET, "2.25.", "P1", str(folder), "0003"))
    return dict(sum((Counter({item.code: len(item.files)}) for item in result.refused), Counter()))


def drop(index: int) -> Change:
    def change(dataset: FileDataset, k: int) -> None:
        if k >= index:
            dataset.ImagePositionPatient = place_tags(AXIAL, k + 1)["ImagePositionPatient"]

    return change


def moved(by: Callable[[int], tuple[float, float, float]]) -> Change:
    def change(dataset: FileDataset, k: int) -> None:
        place = [float(a) + b for a, b in zip(place_tags(AXIAL, k)["ImagePositionPatient"], by(k), strict=True)]
        dataset.ImagePositionPatient = place

    return change


def repeated(dataset: FileDataset, k: int) -> None:
    if k == 5:
        dataset.ImagePositionPatient = place_tags(AXIAL, 4)["ImagePositionPatient"]


def no_length(dataset: FileDataset, k: int) -> None:
    dataset.ImageOrientationPatient = [1, 0, 0, 0.5, 0.5, 0]


def as_jpeg(dataset: FileDataset, k: int) -> None:
    dataset.PixelData = encapsulate([b"\xff\xd8 no picture \xff\xd9"])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1


def as_film(dataset: FileDataset, k: int) -> None:
    as_jpeg(dataset, k)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"


@pytest.mark.parametrize(
    ("code", "tags", "change"),
    [
        ("missing_slice", {}, drop(3)),
        ("duplicate_slice", {}, repeated),
        ("uneven_spacing", {}, moved(lambda k: (0, 0, 0.4 * (k == 3)))),
        ("uneven_spacing", {}, moved(lambda k: (3.0 * (k == 3), 0, 0))),
        ("gantry_tilt", {}, moved(lambda k: (0, 0.5 * k, 0))),
        ("no_position", {"ImagePositionPatient": None}, None),
        ("no_position", {"ImageOrientationPatient": None}, None),
        ("no_spacing", {"PixelSpacing": None}, None),
        ("absurd_spacing", {"PixelSpacing": [0.9, 500]}, None),
        ("bad_orientation", {}, no_length),
        ("damaged_header", {"PixelSpacing": [1, 1, 1]}, None),
        ("damaged_header", {"RescaleSlope": "0"}, None),
        ("no_pixels", {"PixelData": None}, None),
        ("no_series", {"SeriesInstanceUID": None}, None),
        ("burned_in", {"BurnedInAnnotation": "YES"}, None),
        ("colour", {"PhotometricInterpretation": "PALETTE COLOR"}, None),
        ("colour", {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, None),
        ("pixel_layout", {"HighBit": 14}, None),
        ("pixel_layout", {"BitsAllocated": 12}, None),
        ("localizer", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, None),
        ("not_magnitude", {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}, None),
        ("mosaic", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, None),
        ("other_modality", {"Modality": "CT"}, None),
        ("not_an_image", {"Modality": "SEG"}, None),
        ("not_an_image", {"Modality": "RTSTRUCT", "PixelData": None}, None),
        ("other_modality", {"Modality": "DOE"}, None),
        ("no_decoder", {}, as_film),
    ],
)
def test_a_series_that_makes_no_volume_is_refused_whole(tmp_path: Path, code: str, tags: dict[str, Any], change: Change | None) -> None:
    with config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom on what is planted here
        write_series(tmp_path, VALUES, AXIAL, change, PatientName=SECRET, SeriesDescription=SECRET, **tags)
    assert refusals(tmp_path) == {code: 8}


def test_what_is_missing_or_to_be_done_is_said_in_words(tmp_path: Path) -> None:
    write_series(tmp_path / "a", VALUES, AXIAL, as_film)
    write_series(tmp_path / "b", VALUES, AXIAL, drop(3), SeriesInstanceUID=uid("b"))
    write_series(tmp_path / "c", VALUES, AXIAL, moved(lambda k: (0, 0.5 * k, 0)), SeriesInstanceUID=uid("c"))
    reasons = {item.code: item.reason for item in find_dicom(every_file(tmp_path), tmp_path, NATIVE).refused}
    assert "MPEG2 Main Profile" in reasons["no_decoder"]
    assert "pip install 'terravox[dicom]'" in reasons["no_decoder"]
    assert reasons["missing_slice"].startswith("1 slices are missing between 8 that lie 2.500 mm apart")
    assert reasons["gantry_tilt"].startswith("slices are stacked 11.3 degrees off their normal")


def test_pixels_that_cannot_be_read_are_refused_when_they_are_read(tmp_path: Path) -> None:
    cut, jpeg, late = (tmp_path / name for name in ("cut", "jpeg", "late"))
    broken(write_series(cut, VALUES, AXIAL)[4], lambda data: data[:-20])
    write_series(jpeg, VALUES, AXIAL, as_jpeg)
    codes = {folder.name: [item.code for item in scan_volumes(every_file(folder), folder, NATIVE).rejected] for folder in (cut, jpeg)}
    assert codes == {"cut": ["truncated"], "jpeg": ["damaged_pixels"]}
    files = write_series(late, VALUES, AXIAL)
    (found,) = find_dicom(files, late, NATIVE).found
    found.source.stored()
    os.utime(files[2], ns=(1, 1))
    for read in (found.source.stored, found.source.refuse_changed):
        with pytest.raises(SceneError, match="has changed since it was scanned") as caught:
            read()
        assert caught.value.code == "changed"


def test_tenths_of_a_millimetre_in_positions_are_noted_and_no_reason_to_refuse(tmp_path: Path) -> None:
    write_series(tmp_path, VALUES, AXIAL, moved(lambda k: (0, 0, 0.1 * (k == 3))))
    (found,) = find_dicom(every_file(tmp_path), tmp_path, NATIVE).found
    assert found.flags == ("uneven_slices",)


def test_series_in_one_folder_are_told_apart_and_nothing_is_lost(tmp_path: Path) -> None:
    write_series(tmp_path / "x", VALUES, AXIAL, seed=1, SeriesInstanceUID=uid(1))
    write_series(tmp_path / "x" / "y", VALUES + 1, AXIAL, SeriesInstanceUID=uid(2), StudyInstanceUID=uid("other"))
    write_series(tmp_path / "x" / "ct", VALUES, AXIAL, SeriesInstanceUID=uid(3), Modality="CT")
    save_volume(tmp_path / "sub-1_T1w.nii.gz", texture((6, 6, 6), 5))
    (tmp_path / "notes.txt").write_text("no scan")
    (tmp_path / "zeros").write_bytes(bytes(4000))
    (tmp_path / "bare").write_bytes(b"\x08\x00\x05\x00CS\x04\x00" + bytes(4000))
    (tmp_path / ".hidden").write_bytes(b"")
    catalogue = scan(tmp_path, NATIVE)
    assert [len(scene.files) for scene in catalogue.scenes] in ([8, 8, 1], [8, 1, 8], [1, 8, 8])
    assert (catalogue.num_files, catalogue.num_used, len(catalogue.rejected), len(catalogue.ignored)) == (28, 17, 0, 11)
    assert "ignored 8 files: modality CT, while MR is asked for (kind: mri)" in catalogue.notes
    assert len({scene.group for scene in catalogue.scenes}) == 2
    assert [item.modality for item in find_dicom(every_file(tmp_path), tmp_path, CtSettings()).found] == ["CT"]


def test_files_without_preamble_are_dicom_by_what_they_hold(tmp_path: Path) -> None:
    for path in write_series(tmp_path, VALUES, AXIAL, seed=2):
        data = path.read_bytes()
        length = 144 + int.from_bytes(data[140:144], "little")  # preamble, mark, group 2
        path.write_bytes(data[length:])
    (found,) = find_dicom(every_file(tmp_path), tmp_path, NATIVE).found
    assert np.array_equal(found.source.stored(), VALUES)


def test_a_copied_file_is_used_once(tmp_path: Path) -> None:
    files = write_series(tmp_path, VALUES, AXIAL)
    (tmp_path / "z_copy").write_bytes(files[3].read_bytes())
    assert refusals(tmp_path) == {"copied_file": 1}
    assert len(find_dicom(every_file(tmp_path), tmp_path, NATIVE).found) == 1


def test_a_dicomdir_is_no_scan_and_says_what_is_missing(tmp_path: Path) -> None:
    files = write_series(tmp_path / "in", VALUES, AXIAL, StudyDate="20200101", StudyTime="101010", StudyID="1", SeriesNumber=1)
    disc = FileSet()
    for file in files:
        disc.add(file)
    disc.write(tmp_path / "disc")
    disc._stage["t"].cleanup()
    result = find_dicom(every_file(tmp_path / "disc"), tmp_path / "disc", NATIVE)
    assert [file.name for file in result.others] == ["DICOMDIR"]
    assert result.notes == ("1 DICOMDIR, which name 8 files",)
    assert len(result.found) == 1
    assert scan(tmp_path / "disc" / "DICOMDIR", NATIVE).num_used == 8
    every_file(tmp_path / "disc")[3].unlink()
    notes = find_dicom(every_file(tmp_path / "disc"), tmp_path / "disc", NATIVE).notes
    assert notes == ("1 DICOMDIR, which name 8 files, 1 of which are not there: copy the disc again",)


def test_a_file_of_several_volumes_is_counted_once(tmp_path: Path) -> None:
    both = np.concatenate([VALUES, VALUES[:, :, :4]], axis=2)

    def second(dataset: Dataset, k: int) -> None:
        dataset.MREchoSequence = [Dataset()]
        dataset.MREchoSequence[0].EffectiveEchoTime = 20.0 if k < 8 else 80.0
        if k >= 8:
            place = place_tags(AXIAL, [0, 1, 2, 4][k - 8])["ImagePositionPatient"]
            dataset.PlanePositionSequence[0].ImagePositionPatient = place

    write_enhanced(tmp_path / "both", both, AXIAL, change=second)
    catalogue = scan(tmp_path, NATIVE)
    assert (len(catalogue.scenes), catalogue.num_used, [item.num_files for item in catalogue.rejected]) == (1, 1, [0])
    assert [item.code for item in catalogue.rejected] == ["missing_slice"]


def test_an_image_without_functional_groups_has_no_place(tmp_path: Path) -> None:
    save(dicom_image(np.ones((4, 6, 7), np.uint8), NumberOfFrames=4), tmp_path / "a")
    assert refusals(tmp_path) == {"no_position": 1}


def test_damaged_bytes_never_raise_or_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_series(tmp_path / "in", VALUES, AXIAL, PatientName=SECRET, EchoTime="12")[0]
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(120):
        damaged = bytearray(data)
        for place in rng.integers(140, len(data), 6):
            damaged[place] = rng.integers(256)
        file.write_bytes(bytes(damaged[: rng.integers(150, len(data))] if number % 2 else damaged))
        result = find_dicom([file], tmp_path, NATIVE)
        assert len(result.found) + len(result.refused) + len(result.others) == 1
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


@needs_real
def test_real_odd_files_have_the_right_reason() -> None:
    folder = REAL / "dicom" / "pydicom_files"
    result = find_dicom(every_file(folder), folder, NATIVE)
    assert not result.found
    codes: dict[str, set[str]] = {}
    for item in result.refused:
        codes.setdefault(item.code, set()).update(file.name for file in item.files)
    assert codes == {
        "single_slice": {"MR_small.dcm", "examples_overlay.dcm"},
        "copied_file": {f"MR_{name}.dcm" for name in ("small_RLE", "small_bigendian", "small_implicit", "small_jp2klossless", "truncated")},
        "not_an_image": {"rtstruct.dcm", "rtdose.dcm", "liver_1frame.dcm"},
        "other_modality": {"CT_small.dcm", "693_J2KI.dcm", "JPEG2000.dcm", "examples_palette.dcm"},
    }
    assert {file.name for file in result.others} == {"SOURCE.md", "LICENSE.upstream", "no_meta.dcm"}, "the last begins with a stray byte"
