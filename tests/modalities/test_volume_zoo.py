"""A zoo of bad files: each gives exactly its reason code, none crashes, none is lost, and no message tells a name."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

from modalities.catalogue import scan
from modalities.medical import MriSettings
from modalities.policies import VolumePolicies
from modalities.reasons import REASONS
from tests.synthetic_volumes import NATIVE, REAL, SPACE, broken, needs_real, save_volume, scan_one, split_scan, texture

NAME = "MILLER_T1w"
LABELS = np.random.default_rng(0).integers(0, 3, SPACE, dtype=np.int16)


def volume(suffix: str = ".nii", values: Any = None, **fields: Any) -> Callable[[Path], Path]:
    """A file of `values` with header fields replaced."""
    return lambda folder: save_volume(folder / (NAME + suffix), texture(SPACE) if values is None else values, **fields)


def damaged(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """A file whose bytes are changed after it was written."""
    return lambda folder: broken(save_volume(folder / (NAME + suffix), texture((20, 20, 20))), change)


def named(name: str, content: bytes) -> Callable[[Path], Path]:
    """A file with this content."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def dwi(b_values: str | None) -> Callable[[Path], Path]:
    """Four volumes of diffusion with or without a file of b-values."""

    def make(folder: Path) -> Path:
        if b_values is not None:
            (folder / "MILLER_dwi.bval").write_text(b_values)
        return save_volume(folder / "MILLER_dwi.nii.gz", texture((*SPACE, 4)))

    return make


def gone(folder: Path) -> Path:
    """A link to nothing."""
    (folder / f"{NAME}.nii").symlink_to(folder / "nowhere")
    return folder / f"{NAME}.nii"


ZOO: Mapping[str, tuple[str, Callable[[Path], Path]]] = {
    "plain file cut short": ("truncated", damaged(".nii", lambda data: data[:-100])),
    "gzip cut short": ("truncated", damaged(".nii.gz", lambda data: data[:-4000])),
    "whole gzip of too few bytes": ("truncated", damaged(".nii.gz", lambda data: gzip.compress(gzip.decompress(data)[:-100]))),
    "gzip with a wrong checksum": ("damaged_gzip", damaged(".nii.gz", lambda data: data[:-8] + b"1234" + data[-4:])),
    "gzip with a hole": ("damaged_gzip", damaged(".nii.gz", lambda data: data[:9000] + bytes(3000) + data[12000:])),
    "much behind the voxels": ("trailing_bytes", damaged(".nii.gz", lambda data: data + gzip.compress(bytes(1 << 21)))),
    "empty file": ("not_nifti", named(f"{NAME}.nii", b"")),
    "text": ("not_nifti", named(f"{NAME}.nii.gz", b"MILLER^ANNA")),
    "another stream in gzip": ("not_nifti", named(f"{NAME}.nii.gz", gzip.compress(b"x" * 1000))),
    "header of a pair": ("half_pair", volume(magic=b"ni1")),
    "link to nothing": ("unreadable", gone),
    "huge size in the header": ("too_large", volume(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])),
    "size that gzip cannot hold": ("impossible_size", volume(".nii.gz", dim=[3, 500, 500, 500, 1, 1, 1, 1])),
    "negative size": ("bad_dim", volume(dim=[3, 9, -7, 8, 1, 1, 1, 1])),
    "no axes": ("bad_dim", volume(dim=[0, 9, 7, 8, 1, 1, 1, 1])),
    "two axes": ("two_d", volume(values=texture((9, 9)))),
    "few slices": ("few_planes", volume(values=texture((9, 9, 2)))),
    "thin field of view": ("small_field", volume(affine=np.diag([1, 1, 0.5, 1]), values=texture((9, 9, 8)))),
    "several volumes": ("four_d", lambda folder: save_volume(folder / "MILLER_bold.nii.gz", texture((*SPACE, 3)))),
    "vectors": ("five_d", volume(values=texture((*SPACE, 1, 3)))),
    "diffusion without b-values": ("b_values_missing", dwi(None)),
    "diffusion with too few b-values": ("b_values_broken", dwi("0 1000 1000")),
    "diffusion with words": ("b_values_broken", dwi("MILLER ^ ANNA 0")),
    "diffusion without b0": ("b_value_absent", dwi("700 1000 1000 2000")),
    "voxel size 0 and no sform": ("bad_pixdim", volume(pixdim=[1, 1, 0, 1, 1, 1, 1, 1], sform_code=0)),
    "negative voxel size": ("bad_pixdim", volume(pixdim=[1, -1, 1, 1, 1, 1, 1, 1])),
    "voxel size NaN": ("bad_pixdim", volume(pixdim=[1, 1, 1, np.nan, 1, 1, 1, 1])),
    "voxels of half a metre": ("absurd_spacing", volume(srow_z=[0, 0, 500, 0], qform_code=0)),
    "affine of zeros": ("bad_affine", volume(srow_x=[0, 0, 0, 0], srow_y=[0, 0, 0, 0], srow_z=[0, 0, 0, 0])),
    "affine with NaN": ("bad_affine", volume(srow_z=[0, 0, np.nan, 0])),
    "two axes that fall together": ("bad_affine", volume(srow_y=[1, 0, 0, 0])),
    "sheared": ("sheared", volume(srow_x=[1, 0.1005, 0, 0])),
    "quaternion longer than 1": ("damaged_header", volume(quatern_b=5, sform_code=0)),
    "unknown voxel type": ("damaged_header", volume(datatype=999)),
    "infinite slope": ("damaged_header", volume(scl_slope=np.inf)),
    "complex voxels": ("voxel_type", volume(values=texture(SPACE).astype(np.complex64))),
    "all zero": ("all_zero", volume(values=np.zeros(SPACE, np.int16))),
    "constant": ("constant", volume(values=np.full(SPACE, 7, np.uint8))),
    "constant foreground": ("constant_foreground", volume(values=np.pad(np.full((5, 5, 5), 0.5, np.float32), 3))),
    "NaN everywhere": ("not_finite", volume(values=np.full(SPACE, np.nan, np.float32))),
    "label map": ("looks_like_labels", volume(values=LABELS)),
    "MGZ": ("other_format", named(f"{NAME}.mgz", b"\x1f\x8b")),
    "MINC": ("other_format", named(f"{NAME}.mnc", b"CDF\x01")),
    "header file": ("other_format", named(f"{NAME}.hdr", bytes(348))),
    "image file": ("other_format", named(f"{NAME}.img", bytes(10))),
}


@pytest.mark.parametrize("kind", ZOO)
def test_every_bad_file_gives_its_code_and_no_name(tmp_path: Path, kind: str) -> None:
    code, make = ZOO[kind]
    scenes, (rejected,) = split_scan([make(tmp_path)], tmp_path, NATIVE)
    assert scenes == []
    assert rejected.code == code, rejected.reason
    assert code in REASONS
    assert rejected.file.startswith("file-")
    assert not {"miller", "anna", tmp_path.name.lower()} & set(rejected.reason.lower().replace("^", " ").replace("_", " ").split())
    assert rejected.unwanted is (code == "other_format"), "a format that is not read is told, but is no failure"


def test_the_whole_zoo_in_one_folder_loses_no_file(tmp_path: Path) -> None:
    wanted: Counter[str] = Counter()
    for number, (code, make) in enumerate(ZOO.values()):
        folder = tmp_path / "zoo" / str(number)
        folder.mkdir(parents=True)
        file = make(folder)
        wanted[code] += file.is_file()  # a link to nothing is no file that is found
    for number in range(3):
        save_volume(tmp_path / "zoo" / "good" / f"sub-{number}_T1w.nii.gz", texture(SPACE, number))
    found = scan(tmp_path / "zoo", NATIVE)
    rejected = Counter(item.code for item in found.rejected)
    assert rejected == Counter({code: count for code, count in wanted.items() if count and code != "other_format"})
    assert (found.num_used, len(found.scenes)) == (3, 3)
    assert len(found.ignored) == 4 + 3, "formats that are not read, and files of b-values"
    assert found.num_used + sum(item.num_files for item in found.rejected) + len(found.ignored) == found.num_files
    assert any(note.startswith("ignored 2 files: Analyze or NIfTI pair: a scan in a format that is not read") for note in found.notes)


USABLE: Mapping[str, tuple[tuple[str, ...], dict[str, str], Callable[[Path], Path]]] = {
    "both codes zero": (("orientation_unknown",), {}, volume(sform_code=0, qform_code=0)),
    "sform and qform apart": (("sform_qform_disagree",), {}, volume(srow_x=[1, 0, 0, 1.5])),
    "sform and qform nearly alike": ((), {}, volume(srow_x=[1, 0, 0, 0.9])),
    "sform and pixdim apart": (("sform_pixdim_disagree",), {}, volume(pixdim=[1, 1, 1, 1.02, 0, 0, 0, 0], qform_code=0)),
    "sform and pixdim nearly alike": ((), {}, volume(pixdim=[1, 1, 1, 1.005, 0, 0, 0, 0], qform_code=0)),
    "voxel size 0 with an sform": (("bad_pixdim",), {"bad_pixdim": "use"}, volume(pixdim=[1, 1, 0, 1, 1, 1, 1, 1])),
    "sheared": (("sheared",), {"sheared": "use"}, volume(srow_x=[1, 0.1005, 0, 0], qform_code=0)),
    "label map": (("looks_like_labels",), {"looks_like_labels": "use"}, volume(values=LABELS)),
    "slope NaN": ((), {}, volume(scl_slope=np.nan, scl_inter=3)),
    "slope 0": ((), {}, volume(scl_slope=0, scl_inter=3)),
    "NIfTI-2": ((), {}, volume(version=2)),
    "one volume in four axes": ((), {}, volume(values=texture((*SPACE, 1)))),
    "one volume in five axes": ((), {}, volume(values=texture((*SPACE, 1, 1)))),
    "repeats of T1w": (("four_d",), {}, volume(values=texture((*SPACE, 2)))),
}


@pytest.mark.parametrize("kind", USABLE)
def test_a_doubt_is_used_with_its_flag_or_rejected_with_its_code_as_the_policy_says(tmp_path: Path, kind: str) -> None:
    flags, policies, make = USABLE[kind]
    path = make(tmp_path)
    scene = scan_one(path, MriSettings(spacing_mm=None, policies=VolumePolicies(**policies)))  # type: ignore[arg-type]
    assert scene.flags == flags
    for flag in set(flags) & set(VolumePolicies.model_fields):
        _, (rejected,) = split_scan([path], tmp_path, MriSettings(spacing_mm=None, policies=VolumePolicies(**{flag: "reject"})))  # type: ignore[arg-type]
        assert rejected.code == flag
        assert rejected.reason.endswith(f"or set reader.policies.{flag}=use")


def test_some_voxels_without_a_number_are_a_policy_too(tmp_path: Path) -> None:
    values = texture(SPACE)
    values[3, 3, 3:5] = np.nan, np.inf
    path = save_volume(tmp_path / "a.nii", values)
    assert scan_one(path).flags == ("not_finite",)
    _, (rejected,) = split_scan([path], tmp_path, MriSettings(spacing_mm=None, policies=VolumePolicies(not_finite="reject")))
    assert (rejected.code, rejected.reason.split(";")[0]) == ("not_finite", "2 of 504 voxels hold no finite number")


def test_a_voxel_size_that_is_none_is_mended_in_labels(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "a.nii", texture(SPACE), np.diag([2.0, 3, 4, 1]), pixdim=[1, 0, np.nan, -4, 0, 0, 0, 0])
    scene = scan_one(path, MriSettings(spacing_mm=None, policies=VolumePolicies(bad_pixdim="use")))
    scene.write_labels(tmp_path / "out.nii.gz", np.ones(scene.grid.space, np.uint8), 0)
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.header["pixdim"][:4].tolist() == [1, 2, 3, 4]
    assert np.array_equal(written.affine, np.diag([2.0, 3, 4, 1]))


def test_a_policy_of_no_code_is_an_error_that_lists_the_codes() -> None:
    with pytest.raises(ValidationError, match=r"foo: no code that has a policy; those that have one: bad_pixdim, looks_like_labels, not_f"):
        MriSettings(policies={"foo": "use"})  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="Input should be 'reject' or 'use'"):
        MriSettings(policies={"sheared": "yes"})  # type: ignore[arg-type]


@needs_real
def test_real_odd_files_have_their_codes() -> None:
    codes = {item.code for item in scan(REAL / "odd" / "nibabel", NATIVE).rejected}
    assert codes == {"four_d", "few_planes"}
    used = scan(REAL / "odd" / "nibabel", MriSettings(spacing_mm=None, four_d={"default": "mean"}, min_planes=4, min_field_mm=0))
    assert sorted(item.code for item in used.rejected) == ["few_planes", "looks_like_labels"]
    assert (len(used.scenes), len(used.ignored), used.num_files) == (3, 4, 9)
    assert sum("four_d" in scene.flags for scene in used.scenes) == 2  # type: ignore[attr-defined]
    kinds = [note for note in used.notes if "not read" in note]
    assert [note.split(": ")[1] for note in kinds] == ["FreeSurfer's MGH", "MINC"]
    brains = scan(REAL / "mri" / "open_ms_mni", NATIVE)
    assert {item.code for item in brains.rejected} == {"looks_like_labels"}
    assert sum(item.num_files for item in brains.rejected) == 2
