"""Labels of NIfTI scenes: read in any order, written back in the geometry of the source."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from modalities.medical import MriSettings
from modalities.scene import SceneError, fingerprint
from tests.synthetic_volumes import (
    OBLIQUE,
    REAL,
    SPACE,
    broken,
    dice,
    needs_real,
    orientations,
    save_volume,
    scan_one,
    split_scan,
    texture,
    turned,
    world,
)


def test_labels_of_any_order_type_and_scale_come_to_the_scene(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).integers(0, 4, SPACE)
    scene = scan_one(
        save_volume(
            tmp_path / "a.nii.gz", turned(texture(SPACE), OBLIQUE, orientations()[19])[0], turned(labels, OBLIQUE, orientations()[19])[1]
        )
    )
    for number, dtype in ((0, np.uint8), (11, np.float32), (29, np.int64), (47, np.float64)):
        stored, affine = turned(labels.astype(dtype), OBLIQUE, orientations()[number])
        found = scene.open_labels(save_volume(tmp_path / "l.nii.gz", stored, affine)).read(scene.grid.full)
        assert found.dtype == np.int64
        assert np.array_equal(found, labels)
    window = (slice(1, 4), slice(2, 3), slice(0, 8))
    halves = save_volume(tmp_path / "l.nii.gz", (labels * 2).astype(np.uint8), OBLIQUE, scl_slope=0.5, scl_inter=0)
    assert np.array_equal(pickle.loads(pickle.dumps(scene.open_labels(halves))).read(window), labels[window])


def test_labels_follow_the_scene_to_its_spacing(tmp_path: Path) -> None:
    affine = np.diag([1.0, 2.0, 5.0, 1])
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", texture((8, 8, 8)), affine), MriSettings())
    labels = np.arange(512, dtype=np.int16).reshape(8, 8, 8)
    found = scene.open_labels(save_volume(tmp_path / "l.nii.gz", labels, affine)).read(scene.grid.full)
    assert found.shape == scene.grid.space == (8, 15, 36)
    place = np.rint(np.linalg.inv(affine) @ np.vstack([world(scene.grid.space, scene.grid.matrix).reshape(3, -1), np.ones(found.size)]))
    assert np.array_equal(found.ravel(), labels[tuple(place[:3].astype(int))])
    native = scan_one(scene.files[0]).open_labels(tmp_path / "l.nii.gz")
    assert np.array_equal(native.read((slice(0, 8),) * 3), labels)


def test_labels_that_do_not_belong_are_an_error_that_says_why(tmp_path: Path) -> None:
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", texture(SPACE)))
    ones = np.ones(SPACE, np.uint8)
    shifted = np.eye(4)
    shifted[0, 3] = 0.5
    other = (
        r"^labels of scan-[0-9a-f]{{16}}: shape .* with affine \[\[1.0, 0.0, 0.0, {}\], .* is another grid than the image's "
        r"of shape \(9, 7, 8\) .*resample them"
    )
    with pytest.raises(SceneError, match=other.format("0.5")) as elsewhere:
        scene.open_labels(save_volume(tmp_path / "l.nii.gz", ones, shifted))
    assert elsewhere.value.code == "labels_elsewhere"
    with pytest.raises(SceneError, match=other.format("0.0")):
        scene.open_labels(save_volume(tmp_path / "l.nii.gz", ones[1:]))
    for wrong in (0.5, np.nan, np.inf):
        with pytest.raises(
            SceneError, match=r"^labels of scan-[0-9a-f]{16}: 504 voxels hold no whole number, but labels are class numbers"
        ):
            scene.open_labels(save_volume(tmp_path / "l.nii.gz", np.full(SPACE, wrong, np.float32)))
    with pytest.raises(SceneError, match=r"^labels of scan-[0-9a-f]{16}: truncated"):
        scene.open_labels(broken(save_volume(tmp_path / "l.nii.gz", ones), lambda data: data[:-9]))
    with pytest.raises(SceneError, match=r"^labels of scan-[0-9a-f]{16}: cannot be read: No such file or directory$"):
        scene.open_labels(tmp_path / "gone.nii")


@pytest.mark.parametrize("version", [1, 2])
def test_written_labels_keep_everything_that_says_where_they_are(tmp_path: Path, version: int) -> None:
    fields = {"sform_code": 4, "qform_code": 2, "xyzt_units": 10, "descrip": b"private", "scl_slope": 3, "scl_inter": 0}
    path = save_volume(tmp_path / "a.nii", texture((*SPACE, 1)), OBLIQUE @ np.diag([2, 1.5, 3, 1]), version, **fields)
    scene = scan_one(path)
    labels = np.random.default_rng(0).integers(0, 255, scene.grid.space, dtype=np.uint8)
    scene.write_labels(tmp_path / "out.nii.gz", labels, 0)
    written, source = nib.load(tmp_path / "out.nii.gz"), nib.load(path)
    assert type(written) is (nib.Nifti1Image if version == 1 else nib.Nifti2Image)
    assert written.get_data_dtype() == np.uint8
    for key in ("sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
        assert np.array_equal(written.header[key], source.header[key]), key
    assert np.array_equal(written.affine, source.affine)
    assert np.array_equal(written.get_qform(), source.get_qform())
    assert bytes(written.header["descrip"]).strip(b"\0") == b""
    assert np.array_equal(written.get_fdata(), scene.header.from_canonical(labels))
    assert np.array_equal(scene.open_labels(tmp_path / "out.nii.gz").read(scene.grid.full), labels)


def test_the_same_labels_give_the_same_bytes_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scan_one(save_volume(tmp_path / "in" / "a.nii.gz", texture(SPACE)))
    labels = np.ones(SPACE, np.uint8)
    out = tmp_path / "out"
    out.mkdir()
    scene.write_labels(out / "one.nii.gz", labels, 0)
    scene.write_labels(out / "two.nii.gz", labels, 0)
    assert (out / "one.nii.gz").read_bytes() == (out / "two.nii.gz").read_bytes()
    assert (out / "one.nii.gz").read_bytes()[3:8] == bytes(5), "neither a name nor a time in the head of the gzip stream"
    before = fingerprint([out / "one.nii.gz"])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        scene.write_labels(out / "one.nii.gz", labels * 2, 0)
    assert sorted(file.name for file in out.iterdir()) == ["one.nii.gz", "two.nii.gz"]
    assert fingerprint([out / "one.nii.gz"]) == before


def test_labels_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", texture(SPACE)))
    with pytest.raises(SceneError, match=r"out\.nii: labels of a volume are written as \.nii\.gz"):
        scene.write_labels(tmp_path / "out.nii", np.ones(SPACE, np.uint8), 0)
    for wrong, no_label in ((np.ones((2, 2, 2), np.uint8), 0), (np.ones(SPACE, np.int64), 0), (np.ones(SPACE, np.uint8), 256)):
        with pytest.raises(SceneError, match=r"out\.nii\.gz: got labels .* wanted uint8 of shape \(9, 7, 8\) and a number from 0 to 255"):
            scene.write_labels(tmp_path / "out.nii.gz", wrong, no_label)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 5.0), (0.8, 0.8, 3.0), (0.7, 0.7, 0.7)])
def test_anisotropic_labels_survive_the_way_there_and_back(tmp_path: Path, spacing: tuple[float, float, float]) -> None:
    affine = OBLIQUE @ np.diag([*spacing, 1.0])
    space = tuple(round(60 / mm) for mm in spacing)
    centre = world(space, affine).reshape(3, -1).mean(axis=1).reshape(3, 1, 1, 1)
    labels = (np.linalg.norm(world(space, affine) - centre, axis=0) < 22).astype(np.uint8)
    stored, turned_affine = turned(texture(space), affine, orientations()[13])
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", stored, turned_affine), MriSettings())
    there = scene.open_labels(save_volume(tmp_path / "l.nii.gz", labels, affine)).read(scene.grid.full)
    scene.write_labels(tmp_path / "out.nii.gz", there.astype(np.uint8), 0)
    back = np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj)
    assert back.shape == stored.shape
    assert dice(back == 1, turned(labels, affine, orientations()[13])[0] == 1) >= 0.98


@needs_real
def test_real_hippocampus_crops_scan_whole_and_labels_return_bit_for_bit(tmp_path: Path) -> None:
    folder = REAL / "mri" / "msd_hippocampus"
    files = sorted(folder.glob("*/hippocampus_0*.nii.gz"))
    scenes, rejected = split_scan(files, folder, MriSettings())
    images = [file for file in files if file.parent.name == "images"]
    assert [scene.files[0] for scene in scenes] == images
    assert {item.reason.split(";")[0] for item in rejected} == {"looks like a label map (3 values)"}
    assert {str(scene.dtype) for scene in scenes} == {"uint8", "float32"}
    assert len({scene.group for scene in scenes}) == len(scenes)
    for scene in scenes[:12]:
        source = folder / "labels" / scene.files[0].name
        labels = scene.open_labels(source).read(scene.grid.full)
        scene.write_labels(tmp_path / "out.nii.gz", labels.astype(np.uint8), 0)
        written, image = nib.load(tmp_path / "out.nii.gz"), nib.load(scene.files[0])
        assert np.array_equal(np.asarray(written.dataobj), np.asarray(nib.load(source).dataobj))
        assert np.array_equal(written.affine, image.affine)


@needs_real
def test_real_slab_in_psr_order_takes_its_float_labels(tmp_path: Path) -> None:
    folder = REAL / "mri" / "ptbp_tissue" / "JLF"
    scene = scan_one(folder / "ilist1.nii.gz", MriSettings())
    assert scene.grid.space == (182, 217, 18)
    found = scene.open_labels(folder / "slist1.nii.gz").read(scene.grid.full)
    assert np.unique(found).tolist() == [0, 1, 2, 3, 4]
    scene.write_labels(tmp_path / "out.nii.gz", found.astype(np.uint8), 0)
    written = nib.load(tmp_path / "out.nii.gz")
    assert nib.aff2axcodes(written.affine) == ("P", "S", "R")
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 2)
    assert np.array_equal(written.get_fdata(), nib.load(folder / "slist1.nii.gz").get_fdata())
    with pytest.raises(SceneError, match="is another grid than the image's"):
        scene.open_labels(REAL / "odd" / "hippocampus_unpaired" / "labels" / "hippocampus_010.nii.gz")
