"""Label volumes find their scans by name, session and patient, and nothing is guessed; no message names a file."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from pydantic import ValidationError

from modalities.catalogue import scan
from modalities.label_file import LabelOptions
from modalities.labels import Labelling, match_labels
from modalities.medical import MriSettings
from modalities.scene import SceneError
from modalities.volume import VolumeLabels
from tests.synthetic_volumes import REAL, SPACE, needs_real, save_volume, texture

EACH = MriSettings(spacing_mm=None)
TOGETHER = EACH.model_copy(update={"sequences": "session"})
MARKS = np.random.default_rng(0).integers(0, 2, SPACE).astype(np.uint8)


def scans(folder: Path, *names: str) -> Path:
    for name in names:
        save_volume(folder / f"{name}.nii.gz", texture(SPACE, crc32(f"{folder.name}/{name}".encode())))  # no two scans are copies
    return folder


def labels(folder: Path, *names: str) -> Path:
    for name in names:
        save_volume(folder / f"{name}.nii.gz", MARKS)
    return folder


def matched(data: Path, where: Path, settings: MriSettings = EACH, **options: object) -> Labelling:
    catalogue = scan(data, settings.model_copy(update={"exclude": (str(options["files"]),)}) if options.get("files") else settings)
    return match_labels(catalogue, where, LabelOptions.model_validate(options), (), settings.group_pattern)


def files(found: Labelling) -> dict[str, str]:
    """The last two parts of the path of each scene's label file, by those of its first scan."""
    pairs = {}
    for scene, own in found.pairs:
        assert isinstance(own, VolumeLabels)
        pairs["/".join(scene.files[0].parts[-2:])] = "/".join(own.path.parts[-2:])
        assert np.array_equal(own.read(scene.grid.full), MARKS)
    return pairs


def test_the_only_label_file_of_a_session_serves_all_its_scans_or_the_scene_of_all(tmp_path: Path) -> None:
    """Label files lie beside the images, are called alike in all folders, and one has a name that tells a sequence."""
    for patient in ("patient07", "patient19"):
        scans(tmp_path / "MNI" / patient, "T1_N4", "FLAIR_N4")
        labels(tmp_path / "MNI" / patient, "GOLD_STANDARD_regtoFLAIR")
    found = matched(tmp_path, tmp_path, files="GOLD_*")
    assert files(found) == {
        f"{patient}/{name}_N4.nii.gz": f"{patient}/GOLD_STANDARD_regtoFLAIR.nii.gz"
        for patient in ("patient07", "patient19")
        for name in ("FLAIR", "T1")
    }
    assert found.notes == ["4 scans are labelled by 2 of the label files"]
    for options in ({}, {"files": "GOLD_*"}, {"files": "*/patient*/GOLD*"}):
        together = matched(tmp_path, tmp_path, TOGETHER, **options)
        assert len(files(together)) == 2
        assert [len(scene.channels) for scene, _ in together.pairs] == [2, 2]
    inside = matched(tmp_path, tmp_path / "MNI", TOGETHER)
    assert files(inside) == files(together), "whatever folder is given"


def test_labels_of_bids_derivatives_belong_to_the_session(tmp_path: Path) -> None:
    for session in ("ses-1", "ses-2"):
        scans(tmp_path / f"raw/sub-01/{session}/anat", f"sub-01_{session}_T1w", f"sub-01_{session}_FLAIR")
        folder = tmp_path / f"derivatives/manual/sub-01/{session}/anat"
        labels(folder, f"sub-01_{session}_space-orig_label-lesion_mask", f"sub-01_{session}_space-orig_desc-brain_mask")
    scans(tmp_path / "raw/sub-02/anat", "sub-02_T1w")
    labels(tmp_path / "derivatives/manual/sub-02/anat", "sub-02_label-lesion_mask")
    found = matched(tmp_path / "raw", tmp_path / "derivatives", TOGETHER, files="*_label-lesion_mask.nii.gz")
    assert sorted(files(found).values()) == [
        "anat/sub-01_ses-1_space-orig_label-lesion_mask.nii.gz",
        "anat/sub-01_ses-2_space-orig_label-lesion_mask.nii.gz",
        "anat/sub-02_label-lesion_mask.nii.gz",
    ]
    with pytest.raises(
        SceneError, match=r"^scan-\w+ has 2 label files of its session; say which are meant with label_options\.files"
    ) as told:
        matched(tmp_path / "raw", tmp_path / "derivatives", TOGETHER)
    assert "sub-01" not in str(told.value)
    (tmp_path / "derivatives/manual/sub-01/ses-2/anat/sub-01_ses-2_space-orig_label-lesion_mask.nii.gz").unlink()
    lacking = matched(tmp_path / "raw", tmp_path / "derivatives", TOGETHER, files="*_label-lesion_mask.nii.gz")
    assert [item.reason for item in lacking.without] == ["no label file of the same name, session or patient"]
    assert lacking.without[0].file.startswith("scan-")


def test_names_that_differ_by_a_rule_are_matched_by_it(tmp_path: Path) -> None:
    scans(tmp_path, "ilist1", "ilist2", "ilist10")
    labels(tmp_path, "slist1", "slist2", "slist10")
    found = matched(tmp_path, tmp_path, files="slist*", rename=("^ilist", "slist"))
    assert {one.split("/")[1]: two.split("/")[1] for one, two in files(found).items()} == {
        f"ilist{number}.nii.gz": f"slist{number}.nii.gz" for number in (1, 2, 10)
    }
    with pytest.raises(SceneError, match="no label volume belongs to a scan: 3 label files of 6 files there and 3 scans"):
        matched(tmp_path, tmp_path, files="slist*")
    with pytest.raises(ValidationError, match="not a regular expression and its replacement"):
        LabelOptions(rename=("(", "x"))
    with pytest.raises(ValidationError, match="not a regular expression and its replacement"):
        LabelOptions(rename=("a", r"\1"))


def test_a_file_of_the_same_name_goes_before_others_and_a_folder_of_one_patient_is_one(tmp_path: Path) -> None:
    scans(tmp_path / "a", "case1_T1", "case2_T1")
    labels(tmp_path / "b", "case1_T1_seg", "case2_T1", "case3_T1_mask")
    assert {one[2:]: two[2:] for one, two in files(matched(tmp_path / "a", tmp_path / "b")).items()} == {
        "case1_T1.nii.gz": "case1_T1_seg.nii.gz",
        "case2_T1.nii.gz": "case2_T1.nii.gz",
    }
    for number in ("1001", "1002"):
        scans(tmp_path / "c" / number, "T1", "T2")
        labels(tmp_path / "c" / number, "rater")
    assert files(matched(tmp_path / "c", tmp_path / "c", TOGETHER)) == {
        "1001/T1.nii.gz": "1001/rater.nii.gz",
        "1002/T1.nii.gz": "1002/rater.nii.gz",
    }


def test_labels_of_another_patient_are_never_taken_though_they_have_the_name_and_the_grid(tmp_path: Path) -> None:
    data = scans(tmp_path / "data/patient07", "brain").parent
    scans(tmp_path / "data/patient08", "brain")
    labels(tmp_path / "labels/patient19", "brain")
    with pytest.raises(SceneError, match=r"no label volume belongs to a scan: 1 label files and 2 scans; the first without: no label file"):
        matched(data, tmp_path / "labels")
    labels(tmp_path / "labels/patient07", "brain")
    found = matched(data, tmp_path / "labels")
    assert files(found) == {"patient07/brain.nii.gz": "patient07/brain.nii.gz"}
    assert len(found.without) == 1
    one = labels(tmp_path / "one", "rater") / "rater.nii.gz"
    with pytest.raises(SceneError, match=r"^one label file would label scans of several patients, one of them scan-\w+; name each"):
        matched(data, one)
    assert files(matched(data / "patient07", one)) == {"patient07/brain.nii.gz": "one/rater.nii.gz"}


def test_a_scan_on_another_lattice_than_its_sessions_labels_has_none_and_by_name_is_an_error(tmp_path: Path) -> None:
    scans(tmp_path / "sub-1", "sub-1_T1w")
    save_volume(tmp_path / "sub-1/sub-1_bold.nii.gz", texture((5, 5, 5)))
    labels(tmp_path / "sub-1", "sub-1_dseg")
    found = matched(tmp_path, tmp_path)
    assert files(found) == {"sub-1/sub-1_T1w.nii.gz": "sub-1/sub-1_dseg.nii.gz"}
    assert [item.reason for item in found.without] == ["no label file of its session lies on its lattice"]
    labels(tmp_path / "sub-1", "sub-1_bold_dseg")
    with pytest.raises(SceneError, match=r"labels of scan-\w+: shape \(9, 7, 8\) with affine") as told:
        matched(tmp_path, tmp_path)
    assert told.value.code == "labels_elsewhere"


@needs_real
def test_real_lesions_lie_beside_their_three_sequences() -> None:
    folder = REAL / "mri" / "open_ms_mni"
    found = match_labels(scan(folder / "MNI/patient19", TOGETHER.model_copy(update={"exclude": ("GOLD*",)})), folder)
    [(scene, own)] = found.pairs
    assert [channel.name for channel in scene.channels] == ["FLAIR", "T1w", "T2w"]
    assert 0.006 < own.read(scene.grid.full).mean() < 0.008
