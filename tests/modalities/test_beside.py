"""Files beside scans that mark faces or anatomy: which belongs to which, what they do to voxels, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.catalogue import scan
from modalities.medical import MriSettings
from modalities.quality import Quality
from modalities.volume import VolumeScene
from modalities.volume_scan import Scanned, scan_volumes
from tests.synthetic_volumes import head, save_volume, turned

FACE = "*_desc-deface_mask.nii.gz"
LATTICE = np.diag([1.0, 1.0, 1.0, 1.0])
TURN = np.array([[1, -1], [0, 1], [2, 1]], float)


def face(size: int = 24) -> NDArray[np.uint8]:
    """Voxels of a corner of the head."""
    marked = np.zeros((size,) * 3, np.uint8)
    marked[6:18, 15:, 4:12] = 1
    return marked


def scanned(folder: Path, **settings: Any) -> Scanned:
    return scan_volumes(sorted(folder.rglob("*.nii*")), folder, MriSettings(**({"spacing_mm": None} | settings)))


def only(found: Scanned) -> VolumeScene:
    assert not found.rejected, found.rejected
    (scene,) = found.scenes
    return scene


def test_a_face_is_left_out_of_values_statistics_and_neighbours(tmp_path: Path) -> None:
    for rubbish, name in ((100.0, "one"), (1e30, "two"), (np.nan, "three")):
        values = head()
        values[face() == 1] = rubbish
        save_volume(tmp_path / name / "sub-1_ses-1_T1w.nii.gz", values, LATTICE)
        marked, affine = turned(face(), LATTICE, TURN)
        save_volume(tmp_path / name / "sub-1_ses-1_desc-deface_mask.nii.gz", marked, affine)
    for spacing in (None, (1.3, 1.3, 1.3), (2.0, 2.0, 2.0)):
        scenes = [only(scanned(tmp_path / name, spacing_mm=spacing, defaced=FACE)) for name in ("one", "two", "three")]
        pixels, quality = scenes[0].read(scenes[0].grid.full)
        for scene in scenes[1:]:
            assert scene.channels == scenes[0].channels
            others, flags = scene.read(scene.grid.full)
            assert np.array_equal(others, pixels)
            excluded = flags & Quality.EXCLUDED > 0
            assert np.array_equal(excluded, quality & Quality.EXCLUDED > 0)
            assert not pixels[0][excluded].any(), "no face is in a store"
        if spacing is None:
            assert np.array_equal(quality == Quality.EXCLUDED, face() == 1)
            assert len(scenes[0].files) == 2


def test_the_mask_that_was_kept_marks_by_zero_and_the_other_way_round_is_refused(tmp_path: Path) -> None:
    save_volume(tmp_path / "a_T1w.nii.gz", head())
    save_volume(tmp_path / "a_desc-deface_mask.nii.gz", 1 - face())
    kept = only(scanned(tmp_path, defaced=FACE, defaced_where="zero"))
    assert np.array_equal(kept.read(kept.grid.full)[1] == Quality.EXCLUDED, face() == 1)
    found = scanned(tmp_path, defaced=FACE)
    assert not found.scenes
    assert {item.code for item in found.rejected} == {"marks_most", "marks_nothing"}
    assert any("set reader.defaced_where=zero" in item.reason for item in found.rejected)


def test_anatomy_is_where_intensities_are_normalised_and_its_outside_is_background(tmp_path: Path) -> None:
    values = head()
    brain = np.zeros(values.shape, np.uint8)
    brain[8:16, 8:16, 8:16] = 1
    values[brain == 1] += 40
    save_volume(tmp_path / "a_T1w.nii.gz", values)
    save_volume(tmp_path / "a_brain.nii.gz", brain)
    scene = only(scanned(tmp_path, anatomy="*_brain.nii.gz"))
    pixels, quality = scene.read(scene.grid.full)
    assert np.array_equal(quality == Quality.BACKGROUND, brain == 0)
    assert np.array_equal(pixels[0], values), "what lies outside is fed"
    fed = pixels[0][brain == 1] * scene.channels[0].scale + scene.channels[0].offset
    assert abs(np.median(fed)) < 0.5
    save_volume(tmp_path / "a_desc-deface_mask.nii.gz", face())
    both = only(scanned(tmp_path, anatomy="*_brain.nii.gz", defaced=FACE))
    assert both.foreground_fraction == (brain * (1 - face())).mean()
    (tmp_path / "a_desc-deface_mask.nii.gz").unlink()
    save_volume(tmp_path / "a_brain.nii.gz", brain * 0)
    assert {item.code for item in scanned(tmp_path, anatomy="*_brain.nii.gz").rejected} == {"no_foreground", "marks_nothing"}


def test_files_find_the_scans_of_their_session_and_all_are_counted(tmp_path: Path) -> None:
    for patient in "12":
        for session in "12":
            start = f"sub-{patient}_ses-{session}"
            values = head(seed=int(patient) * 2 + int(session))
            save_volume(tmp_path / f"sub-{patient}" / f"{start}_T1w.nii.gz", values)
            save_volume(tmp_path / f"sub-{patient}" / f"{start}_FLAIR.nii.gz", values + 7)
            if session == "1":
                save_volume(tmp_path / "derivatives" / f"{start}_desc-deface_mask.nii.gz", face() * int(patient))
    save_volume(tmp_path / "sub-3_desc-deface_mask.nii.gz", face())
    catalogue = scan(tmp_path, MriSettings(spacing_mm=None, defaced=FACE))
    marked = [scene for scene in catalogue.scenes if len(scene.files) == 2]
    assert len(catalogue.scenes) == 8
    assert len(marked) == 4
    assert len({scene.files[1] for scene in marked}) == 2
    assert all(scene.files[1].name.startswith(scene.files[0].name[:11]) for scene in marked)
    assert catalogue.num_used == 10
    assert [item.code for item in catalogue.rejected] == ["marks_nothing"]
    assert "reader.defaced: a file was found for 4 of 8 scans" in catalogue.notes


def test_one_file_for_a_folder_serves_its_scans_and_no_other(tmp_path: Path) -> None:
    for number, patient in enumerate("ab"):
        save_volume(tmp_path / patient / "T1.nii.gz", head(seed=number))
    save_volume(tmp_path / "derivatives" / "sub-1" / "T1_desc-deface_mask.nii.gz", face())
    for number in "12":
        save_volume(tmp_path / f"sub-{number}" / "T1.nii.gz", head(seed=5 + int(number)))
    assert [len(scene.files) for scene in scanned(tmp_path, defaced=FACE).scenes].count(2) == 1, "elsewhere, of the same patient alone"
    for place in ("derivatives/sub-1/T1_desc-deface_mask", "sub-1/T1", "sub-2/T1"):
        (tmp_path / f"{place}.nii.gz").unlink()
    save_volume(tmp_path / "a" / "face.nii.gz", face())
    found = scanned(tmp_path, defaced="face.nii.gz")
    assert sorted(len(scene.files) for scene in found.scenes) == [1, 2]


def test_a_file_on_another_lattice_or_one_too_many_refuses_the_scan_without_any_name(tmp_path: Path) -> None:
    save_volume(tmp_path / "Surname_T1w.nii.gz", head())
    save_volume(tmp_path / "Surname_desc-deface_mask.nii.gz", face(), np.diag([1, 1, 1.5, 1]))
    found = scanned(tmp_path, defaced=FACE)
    assert not found.scenes
    assert {item.code for item in found.rejected} == {"marks_elsewhere", "marks_nothing"}
    assert "Surname" not in repr(found)
    save_volume(tmp_path / "p" / "Surname_desc-deface_mask.nii.gz", face())
    save_volume(tmp_path / "q" / "Surname_desc-deface_mask.nii.gz", face())
    (tmp_path / "Surname_desc-deface_mask.nii.gz").unlink()
    pattern = r"(Surname)"
    assert "marks_ambiguous" in {item.code for item in scanned(tmp_path, defaced=FACE, group_pattern=pattern).rejected}
