"""`catalogue`: a table of everything in a folder, whose counts add up, and the account of it on the console."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from modalities.volume_rows import COLUMNS
from pipelines.catalogue import main
from tests.synthetic_volumes import OBLIQUE, REAL, broken, head, needs_real, save_volume, texture
from tests.tiny_runs import quick, wide

__all__ = ["quick", "wide"]


def archive(root: Path) -> Path:
    """Two patients, one with two sessions and a copy; a label map, a broken file, a map of the field and a text."""
    stretched = np.diag([1.0, 1.0, 4.0, 1.0])
    save_volume(root / "sub-1" / "ses-a" / "sub-1_ses-a_T1w.nii.gz", head(12), OBLIQUE)
    save_volume(root / "sub-1" / "ses-b" / "sub-1_ses-b_T1w.nii.gz", head(12, 1), stretched, scl_slope=2, scl_inter=-10)
    save_volume(root / "sub-2" / "sub-2_FLAIR.nii.gz", (texture((7, 8, 9)) * 10).astype(np.int16), np.diag([-1.0, -1.0, 1.0, 1.0]))
    save_volume(root / "sub-2" / "copy" / "sub-2_acq-copy_FLAIR.nii", (texture((7, 8, 9)) * 10).astype(np.int16), np.diag([-1.0, -1, 1, 1]))
    save_volume(root / "sub-2" / "sub-2_seg-x.nii.gz", (texture((7, 8, 9)) > 75).astype(np.uint8))
    broken(save_volume(root / "sub-2" / "sub-2_T2w.nii.gz", texture((9, 9, 9))), lambda data: data[:-40])
    save_volume(root / "sub-2" / "fmap" / "sub-2_phasediff.nii.gz", texture((7, 8, 9)))
    (root / "readme.txt").write_text("text")
    return root


def table(out: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in parquet.read_table(out / "catalogue.parquet").to_pylist()]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    assert main(["--data", str(archive(tmp_path / "data")), "--out", str(tmp_path / "out"), "reader.spacing_mm=null"]) == 0
    return tmp_path / "out"


def test_every_volume_has_a_row_and_the_counts_add_up(made: Path) -> None:
    rows = table(made)
    figures = json.loads((made / "result.json").read_text())["figures"]
    assert figures["files"] == {"found": 8, "used": 3, "rejected": 3, "ignored": 2}
    assert figures["volumes"] == {"found": 7, "accepted": 3, "rejected": 3, "ignored": 1}
    assert (figures["patients"], figures["sessions"], figures["scenes"]) == (2, 3, 3)
    assert figures["sequences"] == {"T1w": 2, "FLAIR": 1}
    assert figures["modalities"] == {"MR": 3}
    codes = {"looks_like_labels": 1, "truncated": 1, "fieldmap": 1, "duplicate": 1}
    assert {entry["code"]: entry["scans"] for entry in figures["not_used"]} == codes
    assert figures["duplicates"] == 1
    assert sorted(row["status"] for row in rows) == ["accepted"] * 3 + ["ignored"] + ["rejected"] * 3
    assert all(list(row) == list(COLUMNS) for row in rows)
    assert len({row["scan"] for row in rows}) == 7
    assert all(row["patient"].startswith("subject-") and row["session"].startswith("session-") for row in rows)
    assert [bool(row["scene"]) for row in rows] == [row["status"] == "accepted" for row in rows]


def test_geometry_and_values_are_those_of_the_file(made: Path) -> None:
    by = {(row["sequence"], row["anisotropy"]): row for row in table(made) if row["status"] == "accepted"}
    tilted, stretched = by["T1w", 1.0], by["T1w", 4.0]
    assert (tilted["shape"], tilted["orientation"], tilted["spacing_mm"]) == ([12, 12, 12], "RAS", [1.0, 1.0, 1.0])
    assert tilted["obliquity_deg"] == pytest.approx(np.degrees(np.arccos(0.9216)), abs=0.01)
    assert (stretched["spacing_mm"], stretched["obliquity_deg"], stretched["dtype"]) == ([1.0, 1.0, 4.0], 0.0, "float32")
    values = head(12, 1).astype(np.float64) * 2 - 10
    assert (stretched["value_min"], stretched["value_max"]) == (pytest.approx(values.min()), pytest.approx(values.max()))
    assert 100 < stretched["foreground_mean"] < 200
    assert 0 < stretched["foreground_fraction"] < 0.5
    flair = by["FLAIR", 1.0]
    assert (flair["orientation"], flair["dtype"], flair["shape"]) == ("LPS", "int16", [7, 8, 9])
    assert flair["format"] == "nifti"


def test_a_copy_names_its_original(made: Path) -> None:
    copies = [row for row in table(made) if row["duplicate_of"]]
    (original,) = [row for row in table(made) if row["scan"] == copies[0]["duplicate_of"]]
    assert [row["code"] for row in copies] == ["duplicate"]
    assert original["status"] == "accepted"
    assert (original["voxel_digest"], original["duplicate_of"]) == (copies[0]["voxel_digest"], "")


def test_the_sheet_says_what_the_table_says(made: Path) -> None:
    with (made / "catalogue.csv").open(newline="") as stream:
        sheet = list(csv.DictReader(stream))
    for there, row in zip(sheet, table(made), strict=True):
        assert list(there) == list(COLUMNS)
        assert (there["scan"], there["status"], there["code"]) == (row["scan"], row["status"], row["code"])
        assert there["shape"] == " ".join(map(str, row["shape"]))
        assert there["bytes"] == str(row["bytes"])


def test_any_number_of_threads_and_a_second_time_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    before = [(made / name).read_bytes() for name in ("catalogue.parquet", "catalogue.csv")]
    arguments = ["--data", str(tmp_path / "data"), "reader.spacing_mm=null"]
    for out, threads in ((made, 1), (tmp_path / "other", 5)):
        assert main([*arguments, "--out", str(out), f"num_workers={threads}"]) == 0
        assert [(out / name).read_bytes() for name in ("catalogue.parquet", "catalogue.csv")] == before
        assert sorted(os.listdir(out)) == ["catalogue.csv", "catalogue.parquet", "config.json", "result.json"]  # noqa: PTH208


def test_the_account_is_told_and_names_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(archive(tmp_path / "data")), "--out", str(tmp_path / "out"), "reader.spacing_mm=null"]) == 0
    told = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "8 files found: 3 used in 3 scenes, 3 rejected, 2 of another kind, excluded or not asked for" in lines
    assert "7 volumes found: 3 accepted, 3 rejected, 1 ignored" in lines
    assert "accepted: 2 patients, 3 sessions, 3 scenes" in lines
    assert "MR T1w: 2 scans of 1 patient in 2 sessions" in lines
    assert "spacing 1 × 1 × 1–4 mm" in lines
    assert any(line.startswith("rejected duplicate: 1 volume, such as file-") for line in lines)
    assert any(line.startswith("rejected truncated: 1 volume, such as file-") for line in lines)
    assert any(line.startswith("ignored fieldmap: 1 volume,") for line in lines)
    assert "sub-" not in told


def test_a_folder_without_anything_usable_has_a_catalogue_too(tmp_path: Path) -> None:
    save_volume(tmp_path / "data" / "a.nii", np.zeros((6, 6, 6), np.uint8))
    assert main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    assert [(row["status"], row["code"]) for row in table(tmp_path / "out")] == [("rejected", "all_zero")]


def test_a_folder_of_something_else_is_not_written_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert main(["--data", str(archive(tmp_path / "data")), "--out", str(tmp_path / "out")]) == 1
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["mine.txt"]  # noqa: PTH208


@needs_real
def test_real_dicom_of_many_kinds_is_catalogued_each_by_its_own_modality(tmp_path: Path) -> None:
    assert main(["--data", str(REAL / "dicom" / "torchio_ct"), "--out", str(tmp_path / "ct")]) == 0
    assert [(row["status"], row["modality"], row["sequence"]) for row in table(tmp_path / "ct")] == [("accepted", "CT", "CT")]
    assert main(["--data", str(REAL / "dicom" / "pydicom_files"), "--out", str(tmp_path / "odd")]) == 0
    rows = table(tmp_path / "odd")
    assert all(row["format"] == "dicom" and row["patient"] and row["session"] for row in rows), "of what is refused it is known whose it is"
    assert {row["code"] for row in rows if row["status"] == "rejected"} == {"single_slice"}
    assert {row["code"] for row in rows if row["status"] == "ignored"} == {"not_an_image", "other_modality"}


@needs_real
def test_one_real_brain_in_eight_orders_of_axes_is_used_once(tmp_path: Path) -> None:
    assert main(["--data", str(REAL / "odd" / "nifti_orientations"), "--out", str(tmp_path / "out")]) == 0
    rows = table(tmp_path / "out")
    assert len({row["orientation"] for row in rows}) == len(rows) == 8
    assert len({row["voxel_digest"] for row in rows}) == 1, "one brain in many orders of axes"
    assert sorted(row["code"] for row in rows) == ["", *["duplicate"] * 7]
    assert len({row["duplicate_of"] for row in rows if row["duplicate_of"]}) == 1
