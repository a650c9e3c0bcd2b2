"""BIDS trees: names, datasets, sidecars, and what stands apart; nothing but a closed list of fields is ever read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modalities.bids import BidsTree, parse
from modalities.catalogue import Catalogue, scan
from modalities.medical import MriSettings
from tests.synthetic_volumes import save_volume, texture

ANY = MriSettings(spacing_mm=None)


def dataset(root: Path, name: str) -> Path:
    """The folder of an empty dataset."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text(json.dumps({"Name": name, "BIDSVersion": "1.10.0"}))
    return root


def volume(root: Path, name: str, seed: int = 0) -> Path:
    return save_volume(root / name, texture((6, 6, 6), seed))


def rows(root: Path, settings: MriSettings = ANY) -> dict[str, dict[str, Any]]:
    """The rows of a scan by the name of the file, which only a test may know."""
    catalogue: Catalogue = scan(root, settings, need_usable=False)
    from modalities.pseudonyms import pseudonyms

    names = {
        pseudonyms().of("file", file.relative_to(root).as_posix()): file.relative_to(root).as_posix()
        for file in root.rglob("*")
        if file.is_file()
    }
    return {names[row["file"]]: dict(row) for row in catalogue.rows}


@pytest.mark.parametrize(
    ("name", "entities", "suffix"),
    [
        ("sub-A7x_T1w.nii.gz", {"sub": "A7x"}, "T1w"),
        (
            "sub-01_ses-pre_acq-mprage_ce-gd_rec-norm_dir-AP_run-2_echo-1_part-mag_space-MNI_desc-x_T1w.nii",
            {
                "sub": "01",
                "ses": "pre",
                "acq": "mprage",
                "ce": "gd",
                "rec": "norm",
                "dir": "AP",
                "run": "2",
                "echo": "1",
                "part": "mag",
                "space": "MNI",
                "desc": "x",
            },
            "T1w",
        ),
        ("sub-01_run-1_ses-b_FLAIR.nii.gz", {"sub": "01", "run": "1", "ses": "b"}, "FLAIR"),
    ],
)
def test_a_name_is_read_whatever_the_order_of_its_entities(name: str, entities: dict[str, str], suffix: str) -> None:
    found = parse(name)
    assert found is not None
    assert (found.entities, found.suffix) == (entities, suffix)


@pytest.mark.parametrize(
    "name", ["T1w.nii.gz", "sub-01.nii.gz", "ses-1_T1w.nii", "sub-0 1_T1w.nii", "sub-1_sub-2_T1w.nii", "sub-1_x_T1w.nii", "sub-1_T1-w.nii"]
)
def test_other_names_are_none_of_bids(name: str) -> None:
    assert parse(name) is None


@pytest.mark.parametrize(
    ("name", "sequence", "modality", "code"),
    [
        ("sub-a_T1w", "T1w", "MR", ""),
        ("sub-a_ce-gadolinium_T1w", "T1ce", "MR", ""),
        ("sub-a_ce-none_T1w", "T1w", "MR", ""),
        ("sub-a_acq-T1_T2w", "T2w", "MR", ""),
        ("sub-a_PDw", "PD", "MR", ""),
        ("sub-a_T2starw", "T2star", "MR", ""),
        ("sub-a_task-rest_bold", "bold", "MR", ""),
        ("sub-a_ct", "CT", "CT", ""),
        ("sub-a_CT", "CT", "CT", ""),
        ("sub-a_pet", "PET", "PT", ""),
        ("sub-a_part-mag_T1w", "T1w", "MR", ""),
        ("sub-a_part-phase_T1w", "T1w", "MR", "phase"),
        ("sub-a_phasediff", "MR", "", "fieldmap"),
        ("fmap/sub-a_T1w", "T1w", "MR", "fieldmap"),
        ("sub-a_task-rest_sbref", "MR", "", "reference_scan"),
        ("sub-a_label-L_desc-T1lesion_mask", "MR", "", "labels"),
        ("sub-a_dseg", "MR", "", "labels"),
        ("plain_T1", "T1w", "MR", ""),
        ("plain", "MR", "", ""),
        ("plain_ct", "CT", "CT", ""),
    ],
)
def test_suffix_and_entities_name_sequence_and_modality(tmp_path: Path, name: str, sequence: str, modality: str, code: str) -> None:
    volume(tmp_path, f"{name}.nii.gz")
    (row,) = rows(tmp_path).values()
    assert (row["sequence"], row["modality"]) == (sequence, modality)
    if code:
        assert (row["status"], row["code"]) == ("ignored", code)


def two_datasets(root: Path) -> Path:
    """Two datasets with a patient of one label, sidecars at every level, derivatives, sources, code and an ignored file."""
    one, two = dataset(root / "one", "one"), dataset(root / "two", "two")
    for number, name in enumerate(
        ("sub-Ab1/ses-x/anat/sub-Ab1_ses-x_T1w", "sub-Ab1/ses-y/anat/sub-Ab1_ses-y_T1w", "sub-02/anat/sub-02_T1w")
    ):
        volume(one, f"{name}.nii.gz", number)
    volume(one, "sub-02/dwi/sub-02_dwi.nii.gz", 3)
    volume(two, "sub-Ab1/anat/sub-Ab1_T1w.nii.gz", 4)
    volume(two, "sub-Ab1/anat/sub-Ab1_acq-old_T1w.nii.gz", 5)
    (two / ".bidsignore").write_text("# old ones\n*_acq-old_*\n")
    (one / "T1w.json").write_text(json.dumps({"EchoTime": 0.003, "MagneticFieldStrength": 3, "InstitutionName": "Saint Secret"}))
    (one / "sub-02" / "sub-02_T1w.json").write_text(json.dumps({"EchoTime": 0.004, "RepetitionTime": "two", "FlipAngle": True}))
    (one / "sub-02" / "anat" / "sub-02_acq-x_T1w.json").write_text(json.dumps({"EchoTime": 9}))
    (one / "sub-Ab1" / "ses-y" / "anat" / "sub-Ab1_ses-y_T1w.json").write_text("{broken")
    dataset(one / "derivatives" / "prep", "prep")
    volume(one, "derivatives/prep/sub-02/anat/sub-02_space-MNI_desc-preproc_T1w.nii.gz", 6)
    save_volume(one / "derivatives" / "prep" / "sub-02" / "anat" / "sub-02_desc-brain_mask.nii.gz", texture((6, 6, 6), 7))
    volume(one, "sourcedata/sub-02/x.nii.gz", 8)
    (one / "sourcedata" / "sub-02" / "notes.txt").write_text("x")
    volume(one, "code/atlas.nii", 9)
    (one / "participants.tsv").write_text("participant_id\tname\nsub-02\tSecret\n")
    return root


def test_two_datasets_are_told_apart_and_no_file_is_lost(tmp_path: Path) -> None:
    found = rows(two_datasets(tmp_path))
    ours = {name: row for name, row in found.items() if row["status"] == "accepted"}
    assert sorted(name.rpartition("/")[2] for name in ours) == [
        *("sub-02_T1w.nii.gz", "sub-02_dwi.nii.gz", "sub-Ab1_T1w.nii.gz", "sub-Ab1_ses-x_T1w.nii.gz", "sub-Ab1_ses-y_T1w.nii.gz"),
    ]
    x, y = (found[f"one/sub-Ab1/ses-{s}/anat/sub-Ab1_ses-{s}_T1w.nii.gz"] for s in "xy")
    assert x["patient"] == y["patient"]
    assert x["session"] != y["session"]
    other = found["two/sub-Ab1/anat/sub-Ab1_T1w.nii.gz"]
    assert other["patient"] != x["patient"]
    anat, dwi = found["one/sub-02/anat/sub-02_T1w.nii.gz"], found["one/sub-02/dwi/sub-02_dwi.nii.gz"]
    assert anat["session"] == dwi["session"], "without ses- all scans of a patient are one session"
    codes = {name: row["code"] for name, row in found.items() if row["status"] != "accepted"}
    assert codes == {
        "one/derivatives/prep/sub-02/anat/sub-02_space-MNI_desc-preproc_T1w.nii.gz": "derivative",
        "one/derivatives/prep/sub-02/anat/sub-02_desc-brain_mask.nii.gz": "derivative",
        "one/sourcedata/sub-02/x.nii.gz": "source_data",
        "one/code/atlas.nii": "not_data",
        "two/sub-Ab1/anat/sub-Ab1_acq-old_T1w.nii.gz": "bidsignore",
    }
    archive = rows(tmp_path, MriSettings(spacing_mm=None, patient_scope="archive"))
    assert (
        archive["two/sub-Ab1/anat/sub-Ab1_T1w.nii.gz"]["patient"] == archive["one/sub-Ab1/ses-x/anat/sub-Ab1_ses-x_T1w.nii.gz"]["patient"]
    )


def test_derivatives_are_read_where_they_are_asked_for_and_belong_to_the_same_patient(tmp_path: Path) -> None:
    found = rows(two_datasets(tmp_path), MriSettings(spacing_mm=None, derivatives=True))
    derived = found["one/derivatives/prep/sub-02/anat/sub-02_space-MNI_desc-preproc_T1w.nii.gz"]
    assert derived["status"] == "accepted"
    assert derived["patient"] == found["one/sub-02/anat/sub-02_T1w.nii.gz"]["patient"]
    assert found["one/derivatives/prep/sub-02/anat/sub-02_desc-brain_mask.nii.gz"]["code"] == "labels"


def test_a_folder_of_derivatives_is_read_where_it_is_given_itself(tmp_path: Path) -> None:
    found = rows(two_datasets(tmp_path) / "one" / "derivatives" / "prep")
    assert found["sub-02/anat/sub-02_space-MNI_desc-preproc_T1w.nii.gz"]["status"] == "accepted"


def test_patients_of_a_dataset_keep_their_pseudonyms_when_it_is_moved_or_scanned_alone(tmp_path: Path) -> None:
    together = rows(two_datasets(tmp_path))["one/sub-02/anat/sub-02_T1w.nii.gz"]
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    alone = rows(tmp_path / "elsewhere")["sub-02/anat/sub-02_T1w.nii.gz"]
    assert (alone["patient"], alone["session"]) == (together["patient"], together["session"])


def test_sidecars_are_inherited_and_only_numbers_of_a_closed_list_come_out(tmp_path: Path) -> None:
    found = rows(two_datasets(tmp_path))
    x, y = (found[f"one/sub-Ab1/ses-{s}/anat/sub-Ab1_ses-{s}_T1w.nii.gz"] for s in "xy")
    assert (x["echo_time_s"], x["field_strength_t"], x["repetition_time_s"]) == (0.003, 3.0, None)
    near = found["one/sub-02/anat/sub-02_T1w.nii.gz"]
    assert (near["echo_time_s"], near["field_strength_t"]) == (0.004, 3.0), "the nearest wins, and of acq-x nothing is taken"
    assert (near["repetition_time_s"], near["flip_angle_deg"]) == (None, None), "a text and a truth value are no numbers"
    assert found["one/sub-02/dwi/sub-02_dwi.nii.gz"]["echo_time_s"] is None
    assert (x["flags"], y["flags"]) == ((), ("sidecar_broken",))
    assert y["echo_time_s"] == 0.003, "what the others say stands"
    assert "Secret" not in repr(found)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"EchoTime": NaN, "Modality": "MR; Mr Secret"}'])
def test_no_content_of_a_sidecar_stops_a_scan(tmp_path: Path, content: bytes) -> None:
    volume(tmp_path, "sub-1/anat/sub-1_T1w.nii")
    (tmp_path / "sub-1" / "anat" / "sub-1_T1w.json").write_bytes(content)
    (row,) = rows(tmp_path).values()
    assert (row["status"], row["echo_time_s"], row["modality"]) == ("accepted", None, "MR")
    assert row["flags"] == (() if content.startswith(b"{") else ("sidecar_broken",))


def test_the_sidecar_of_a_plain_name_tells_the_modality(tmp_path: Path) -> None:
    volume(tmp_path, "scan_3.nii.gz")
    (tmp_path / "scan_3.json").write_text(json.dumps({"Modality": "CT", "PatientName": "Secret"}))
    (row,) = rows(tmp_path).values()
    assert row["modality"] == "CT"


def test_datasets_with_one_description_share_their_patients_and_it_is_told(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        volume(dataset(tmp_path / name, "template"), "sub-1/anat/sub-1_T1w.nii", number)
    catalogue = scan(tmp_path, ANY)
    assert len({row["patient"] for row in catalogue.rows}) == 1
    assert any("1 BIDS datasets have the dataset_description.json of another one" in note for note in catalogue.notes)


@pytest.mark.parametrize(
    ("pattern", "hits", "misses"),
    [
        ("*_bold.nii", "sub-1/func/sub-1_bold.nii", "sub-1/func/sub-1_bold.nii.gz"),
        ("extra/", "extra/sub-1_T1w.nii", "extras/sub-1_T1w.nii"),
        ("sub-1/**/x*.nii", "sub-1/a/b/x1.nii", "sub-2/a/x1.nii"),
        ("/y?.nii", "y1.nii", "a/y1.nii"),
        ("*\n!keep.nii", "a/lose.nii", "a/keep.nii"),
    ],
)
def test_bidsignore_is_read_as_git_reads_its_own(tmp_path: Path, pattern: str, hits: str, misses: str) -> None:
    dataset(tmp_path, "one")
    (tmp_path / ".bidsignore").write_text(pattern)
    files = [tmp_path / "dataset_description.json", tmp_path / hits, tmp_path / misses]
    tree = BidsTree(files, tmp_path)
    assert [tree.apart(file, derivatives=False) for file in files[1:]] == ["bidsignore", ""]
