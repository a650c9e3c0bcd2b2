"""Copies of a scan under other names are found, one is kept, and the patients whom they bear the name of are one."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalities.catalogue import scan
from modalities.duplicates import joined
from modalities.medical import MriSettings, XraySettings
from modalities.volume_scan import Scanned, scan_volumes
from modalities.xray_scan import scan_xrays
from tests.synthetic_dicom import dicom_image, save
from tests.synthetic_pictures import save_png, shades
from tests.synthetic_volumes import OBLIQUE, REAL, head, needs_real, orientations, save_volume, turned

REFUSE = MriSettings(spacing_mm=None)
KEEP = REFUSE.model_copy(update={"duplicates": "keep"})


def found(folder: Path, settings: MriSettings = REFUSE) -> Scanned:
    return scan_volumes(sorted(folder.rglob("*.nii*")), folder, settings)


def archive(folder: Path) -> Path:
    """Patients 1 and 2 of one data set, 2 with two sessions; in another data set a copy of 2's second session is called 9."""
    save_volume(folder / "one" / "sub-1_T1w.nii.gz", head(seed=1))
    save_volume(folder / "one" / "sub-2" / "ses-1" / "sub-2_ses-1_T1w.nii.gz", head(seed=2))
    save_volume(folder / "one" / "sub-2" / "ses-2" / "sub-2_ses-2_T1w.nii.gz", head(seed=3), OBLIQUE)
    values, affine = turned(head(seed=3) * 4, OBLIQUE, orientations()[29])
    save_volume(folder / "other" / "sub-9_T1w.nii", values.astype(np.float64), affine, version=2)
    save_volume(folder / "other" / "sub-9_FLAIR.nii", head(seed=4))
    return folder


def test_a_renamed_turned_and_rescaled_copy_is_refused_under_the_pseudonym_of_what_is_kept(tmp_path: Path) -> None:
    scanned = found(archive(tmp_path))
    assert len(scanned.scenes) == 4
    (copy,) = scanned.rejected
    assert (copy.code, copy.num_files, copy.unwanted) == ("duplicate", 1, False)
    kept = [scene.name for scene in scanned.scenes if scene.name in copy.reason]
    assert copy.reason == f"the same voxels as {kept[0]}, which is kept"
    assert scanned.notes[0] == "1 copy of 1 scan is there under another name and is left out (reader.duplicates=refuse)"
    catalogue = scan(tmp_path, REFUSE)
    assert (catalogue.num_files, catalogue.num_used, len(catalogue.rejected)) == (5, 4, 1)


@pytest.mark.parametrize("settings", [REFUSE, KEEP])
def test_both_sessions_the_copy_and_what_else_bears_its_name_are_one_patient(tmp_path: Path, settings: MriSettings) -> None:
    scanned = found(archive(tmp_path), settings)
    groups = [scene.group for scene in scanned.scenes]
    assert len(groups) == {"refuse": 4, "keep": 5}[settings.duplicates]
    assert sorted(groups.count(group) for group in set(groups)) == [1, len(groups) - 1]
    joined_group = max(set(groups), key=groups.count)
    alone = {scene.group for scene in found(tmp_path / "one", settings).scenes} | {
        scene.group for scene in found(tmp_path / "other", settings).scenes
    }
    assert joined_group in alone, "called like one of its members, so that it is known elsewhere"
    assert f"2 patients share a scan and stay on one side of every split as {joined_group}" in scanned.notes[1]


def test_of_copies_the_one_whose_orientation_is_known_is_kept(tmp_path: Path) -> None:
    save_volume(tmp_path / "a_T1w.nii.gz", head(), sform_code=0, qform_code=0)
    save_volume(tmp_path / "b_T1w.nii.gz", head())
    (scene,) = found(tmp_path).scenes
    assert scene.flags == ()
    (tmp_path / "b_T1w.nii.gz").unlink()
    assert found(tmp_path).scenes[0].flags == ("orientation_unknown",)


def test_a_copy_whose_axes_lie_half_way_is_found_on_either_side_of_the_tie(tmp_path: Path) -> None:
    """At 45 degrees rounding decides which axis is nearer to R and which to A."""
    for number, degrees in enumerate((44.999, 45.0, 45.001)):
        turn = np.deg2rad(degrees)
        affine = np.eye(4)
        affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        save_volume(tmp_path / f"sub-{number}_T1w.nii.gz", head()[:, :-3], affine)
    scanned = found(tmp_path)
    assert (len(scanned.scenes), [item.code for item in scanned.rejected]) == (1, ["duplicate"] * 2)


def test_no_name_of_a_patient_or_file_is_told(tmp_path: Path) -> None:
    scanned = found(archive(tmp_path))
    words = " ".join([*scanned.notes, *(item.reason + item.file for item in scanned.rejected), repr(scanned)])
    assert not [name for name in ("sub-", "ses-", "T1w.nii", str(tmp_path)) if name in words]


@given(links=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=8))
def test_what_is_linked_has_one_name_and_what_is_not_has_none(links: list[list[int]]) -> None:
    groups = joined([[str(name) for name in link] for link in links])
    reach = {str(name): {str(name)} for name in range(10)}
    for _ in range(10):
        for link in links:
            union = set().union(*(reach[str(name)] for name in link))
            for name in union:
                reach[name] |= union
    assert groups == {name: min(others) for name, others in reach.items() if len(others) > 1}
    assert groups == joined([[str(name) for name in link] for link in reversed(links)])


@needs_real
def test_real_copies_in_eight_orientations_are_one_scan() -> None:
    scanned = found(REAL / "odd" / "nifti_orientations")
    assert (len(scanned.scenes), {item.code for item in scanned.rejected}, len(scanned.rejected)) == (1, {"duplicate"}, 7)


@needs_real
def test_no_two_real_scans_are_taken_for_one(tmp_path: Path) -> None:
    images = sorted((REAL / "mri" / "msd_hippocampus" / "images").glob("*.nii.gz"))[:30]
    again = tmp_path / "again_T1w.nii.gz"
    first = nib.load(images[7])
    nib.save(nib.Nifti1Image(np.flip(np.asarray(first.dataobj), 1).astype(np.float32), first.affine), again)
    scanned = scan_volumes(images, images[0].parent, REFUSE)
    assert not [item for item in scanned.rejected if item.code == "duplicate"]
    digests = {scene.voxel_digests for scene in scanned.scenes}
    assert len(digests) == len(scanned.scenes) == 30
    assert found(tmp_path).scenes[0].voxel_digests in digests


def test_copies_of_a_picture_are_found_whichever_way_its_grey_values_run(tmp_path: Path) -> None:
    values = shades()
    save(dicom_image(values, Modality="DX", PatientID="one"), tmp_path / "a")
    other = (4095 - values).astype(np.uint16)
    save(dicom_image(other, Modality="CR", PhotometricInterpretation="MONOCHROME1", PatientID="two"), tmp_path / "b")
    save_png(tmp_path / "sub-3.png", values[:, ::-1].astype(np.uint16))
    save_png(tmp_path / "sub-4.png", values[:-1].astype(np.uint16))
    files = sorted(tmp_path.iterdir())
    found_pictures = scan_xrays(files, tmp_path, XraySettings())
    assert (len(found_pictures.scenes), [item.code for item in found_pictures.rejected]) == (2, ["duplicate"] * 2)
    assert "3 patients share a scan and stay on one side of every split" in found_pictures.notes[-1]
    kept = scan_xrays(files, tmp_path, XraySettings(duplicates="keep"))
    groups = [scene.group for scene in kept.scenes]
    assert (len(groups), len(set(groups))) == (4, 2)
