"""A folder of NIfTI files: patients, sequences, and every file that cannot be used with its reason."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

from modalities.medical import MriSettings
from modalities.policies import VolumePolicies
from tests.synthetic_volumes import (
    NATIVE,
    REAL,
    SPACE,
    broken,
    needs_real,
    reason,
    save_volume,
    scan_one,
    split_scan,
    texture,
)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("sub-A1/ses-1/anat/sub-A1_ses-1_T1w.nii.gz", "sub-A1/ses-2/anat/sub-A1_ses-2_FLAIR.nii.gz", True),
        ("sub-A1/anat/x.nii", "sub-A2/anat/x.nii", False),
        ("MNI/patient07/T1_N4.nii.gz", "MNI/patient07/FLAIR_N4.nii.gz", True),
        ("MNI/patient07/T1_N4.nii.gz", "MNI/Patient07/T1_N4.nii.gz", True),
        ("MNI/patient07/T1_N4.nii.gz", "MNI/patient19/T1_N4.nii.gz", False),
        ("a/case1_T1.nii.gz", "a/case1_T2.nii.gz", True),
        ("T1/case1.nii.gz", "T2/case1.nii", True),
        ("1001/T1.nii.gz", "1002/T1.nii.gz", False),
        ("1001/T1.nii.gz", "1001/FLAIR.nii.gz", True),
        ("images/hippocampus_001.nii.gz", "images/hippocampus_003.nii.gz", False),
    ],
)
def test_files_of_a_patient_share_a_group(tmp_path: Path, one: str, other: str, same: bool) -> None:
    files = [save_volume(tmp_path / name, texture((5, 5, 5), seed)) for seed, name in enumerate((one, other))]
    scenes, _ = split_scan(files, tmp_path, NATIVE)
    assert (scenes[0].group == scenes[1].group) is same
    assert scenes[0].name != scenes[1].name


def test_pattern_and_sequence_can_be_set(tmp_path: Path) -> None:
    files = [save_volume(tmp_path / name, texture((5, 5, 5), seed)) for seed, name in enumerate(("x_77_a_T2.nii", "y_77_b.nii"))]
    scenes, _ = split_scan(files, tmp_path, MriSettings(group_pattern=r"_(\d+)_", sequence="T1ce", spacing_mm=None))
    assert scenes[0].group == scenes[1].group
    assert [scene.channels[0].name for scene in scenes] == ["T1ce", "T1ce"]


@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("sub-01_T1w", "T1w"),
        ("x_t1", "T1w"),
        ("T1W.3", "T1w"),
        ("x-T2", "T2w"),
        ("FLAIR_N4_regtoT1", "FLAIR"),
        ("sub-1_space-T1w_desc-T2_FLAIR", "FLAIR"),
        ("sub-1_FLAIR_space-T1w", "FLAIR"),
        ("t2_like_T1", "T1w"),
        ("PD_1", "PD"),
        ("sub-1_task-rest_bold", "bold"),
        ("scan_0001", "MR"),
        ("RT1_ST2X", "MR"),
    ],
)
def test_sequence_comes_from_the_file_name(tmp_path: Path, name: str, sequence: str) -> None:
    assert scan_one(save_volume(tmp_path / f"{name}.nii.gz", texture((5, 5, 5)))).channels[0].name == sequence


def test_names_and_groups_are_the_same_on_every_machine(tmp_path: Path) -> None:
    scenes, _ = split_scan([save_volume(tmp_path / "a" / "sub-01_T1w.nii.gz", texture((5, 5, 5)))], tmp_path, NATIVE)
    assert (scenes[0].name, scenes[0].group) == ("scan-07fb62301b0034b0", "subject-eb30e25c96bfe1fc")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("group_pattern", "(", "not a regular expression"),
        ("group_pattern", "sub", "needs a group in parentheses"),
        ("spacing_mm", (1, 0, 1), "greater than or equal to 0.01"),
        ("min_planes", 0, "greater than or equal to 1"),
        ("spacing", 1, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_are_named(key: str, value: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        MriSettings(**{key: value})


@pytest.mark.parametrize(
    ("text", "values", "fields"),
    [
        ("4-D with 3 volumes: split it", texture((6, 6, 6, 3)), {}),
        ("5-D of shape (6, 6, 6, 1, 2): split it", texture((6, 6, 6, 1, 2)), {}),
        ("2-D of shape (6, 6)", texture((6, 6)), {}),
        ("4 planes on an axis of (9, 4, 9); min_planes is 5", texture((9, 4, 9)), {}),
        ("all voxels are zero", np.zeros(SPACE, np.int16), {}),
        ("constant: all voxels hold 7", np.full(SPACE, 7, np.uint8), {}),
        ("constant: all voxels hold 0.5", np.full(SPACE, 0.5, np.float32), {}),
        ("no voxel holds a finite number", np.full(SPACE, np.nan, np.float32), {}),
        ("the foreground is constant (0.5)", np.pad(np.full((5, 5, 5), 0.5, np.float32), 3), {}),
        ("looks like a label map (3 values)", np.random.default_rng(0).integers(0, 3, SPACE, dtype=np.int16), {}),
        ("looks like a label map (3 values)", np.random.default_rng(0).integers(0, 3, SPACE).astype(np.float32), {}),
        ("is zero, negative or not finite", texture(SPACE), {"pixdim": [1, 1, 0, 1, 1, 1, 1, 1]}),
        ("pixdim [-1.0, 1.0, 1.0] is zero, negative", texture(SPACE), {"pixdim": [1, -1, 1, 1, 1, 1, 1, 1], "qform_code": 0}),
        ("spacing [1.0, 1.0, 500.0] mm is not between", texture(SPACE), {"srow_z": [0, 0, 500, 0]}),
        ("the affine cannot be inverted", texture(SPACE), {"srow_z": [0, 0, 0, 0]}),
        ("the affine cannot be inverted", texture(SPACE), {"srow_y": [1, 0, 0, 0], "qform_code": 0}),
        ("the affine is not finite", texture(SPACE), {"srow_z": [0, 0, np.nan, 0]}),
        ("the affine is sheared: the cosine between two axes is 0.100", texture(SPACE), {"srow_x": [1, 0.1005, 0, 0]}),
        ("the header is damaged: ", texture(SPACE), {"quatern_b": 5, "sform_code": 0}),
        ("the header is damaged: no voxel type has the number 999", texture(SPACE), {"datatype": 999}),
        ("the header is damaged: slope inf", texture(SPACE), {"scl_slope": np.inf}),
        ("the header is damaged: ", texture(SPACE), {"vox_offset": 1e12}),
        ("is no array shape", texture(SPACE), {"dim": [3, 9, -7, 8, 1, 1, 1, 1]}),
        ("is no array shape", texture(SPACE), {"dim": [3, 0, 7, 8, 1, 1, 1, 1]}),
        ("voxels of type complex64 are not supported", texture(SPACE).astype(np.complex64), {}),
        ("half of a .hdr/.img pair", texture(SPACE), {"magic": b"ni1"}),
        ("not NIfTI", texture(SPACE), {"magic": b""}),
    ],
)
def test_a_file_that_cannot_be_used_is_rejected_with_its_reason(tmp_path: Path, text: str, values: Any, fields: dict[str, Any]) -> None:
    for name in ("a.nii", "b.nii.gz"):
        assert text in reason(save_volume(tmp_path / name, values, **fields))


def test_damaged_files_are_rejected_with_their_reason(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        return save_volume(tmp_path / name, texture((20, 20, 20)))

    assert "truncated: the header states 32352 bytes, the file has 32000" in reason(broken(fresh("a.nii"), lambda data: data[:32000]))
    assert "truncated: the gzip stream ends early" in reason(broken(fresh("b.nii.gz"), lambda data: data[:-4000]))
    assert "damaged gzip: CRC check failed" in reason(broken(fresh("c.nii.gz"), lambda data: data[:-8] + b"1234" + data[-4:]))
    assert "damaged gzip: " in reason(broken(fresh("d.nii.gz"), lambda data: data[:9000] + bytes(3000) + data[12000:]))
    short = gzip.compress(gzip.decompress(fresh("e.nii.gz").read_bytes())[:-100])
    assert "truncated: 31900 of 32000 bytes of voxels" in reason(broken(tmp_path / "e.nii.gz", lambda _: short))
    assert "not NIfTI" in reason(broken(fresh("f.nii"), lambda _: b"hello"))
    assert "not NIfTI" in reason(broken(fresh("g.nii"), lambda _: b""))
    assert "not NIfTI" in reason(broken(fresh("h.nii.gz"), lambda _: gzip.compress(b"x" * 1000)))
    fresh("i.nii").unlink()
    assert "cannot be read: No such file" in reason(tmp_path / "i.nii")


def test_what_would_fill_the_memory_is_rejected_from_the_header(tmp_path: Path) -> None:
    small = texture((8, 8, 8))
    assert "max_voxels=500" in reason(save_volume(tmp_path / "a.nii", small), MriSettings(max_voxels=500))
    assert "at (0.1, 0.1, 0.1) mm are more than max_voxels=1000" in reason(
        tmp_path / "a.nii", MriSettings(max_voxels=1000, spacing_mm=(0.1,) * 3)
    )
    huge = {"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}
    assert "more than max_voxels=268435456" in reason(save_volume(tmp_path / "b.nii.gz", small, **huge))
    lying = {"dim": [3, 500, 500, 500, 1, 1, 1, 1]}
    assert "bytes of gzip cannot hold" in reason(save_volume(tmp_path / "c.nii.gz", small, **lying))
    assert "truncated: the header states" in reason(save_volume(tmp_path / "d.nii", small, **lying))
    bomb = save_volume(tmp_path / "e.nii.gz", small)
    bomb.write_bytes(bomb.read_bytes() + gzip.compress(bytes(1 << 21)))
    assert "more than 1048576 bytes follow the 2048 that the header states" in reason(bomb)
    padded = save_volume(tmp_path / "f.nii.gz", small)
    padded.write_bytes(padded.read_bytes() + gzip.compress(bytes(1 << 10)))
    assert scan_one(padded).grid.space == (8, 8, 8)


def test_unknown_orientation_is_flagged_or_rejected_never_silent(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "a.nii.gz", texture(SPACE), sform_code=0, qform_code=0)
    scene = scan_one(path)
    assert scene.flags == ("orientation_unknown",)
    assert "sform and qform code are both 0" in reason(path, MriSettings(policies=VolumePolicies(orientation_unknown="reject")))
    scene.write_labels(tmp_path / "out.nii.gz", np.ones(scene.grid.space, np.uint8), 0)
    written = nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(written.affine, nib.load(path).affine)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (0, 0)


def test_good_and_bad_files_are_told_apart_and_none_is_lost(tmp_path: Path) -> None:
    files = [save_volume(tmp_path / f"{i}.nii.gz", texture((5, 5, 5), i)) for i in range(4)]
    broken(files[2], lambda data: data[:-20])
    scenes, rejected = split_scan(files, tmp_path, NATIVE)
    assert [scene.files[0].name for scene in scenes] == ["0.nii.gz", "1.nii.gz", "3.nii.gz"]
    assert [(item.file[:5], item.code) for item in rejected] == [("file-", "truncated")]


def test_a_fourth_axis_of_one_is_no_axis(tmp_path: Path) -> None:
    values = texture((*SPACE, 1))
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", values))
    assert np.array_equal(scene.read(scene.grid.full)[0][0], values[..., 0])


@needs_real
def test_real_odd_volumes_are_used_or_rejected_for_the_right_reason() -> None:
    folder = REAL / "odd" / "nibabel"
    files = sorted([*folder.glob("*.nii"), *folder.glob("*.nii.gz")])
    scenes, rejected = split_scan(files, folder, MriSettings())
    assert [scene.files[0].name for scene in scenes] == ["anatomical.nii"]
    assert scenes[0].dtype == np.int16
    assert scenes[0].grid.space == (65, 81, 49)
    assert sorted(item.reason.split(":")[0] for item in rejected) == [
        "4 planes on an axis of (4, 5, 7); min_planes is 5",
        "4-D with 2 volumes",
        "4-D with 2 volumes",
        "4-D with 20 volumes",
    ]


@needs_real
def test_real_labels_without_an_image_are_told_by_their_look() -> None:
    folder = REAL / "odd" / "hippocampus_unpaired"
    scenes, rejected = split_scan([folder / "labels" / "hippocampus_010.nii.gz"], folder, MriSettings())
    assert scenes == []
    assert "looks like a label map (3 values)" in rejected[0].reason
