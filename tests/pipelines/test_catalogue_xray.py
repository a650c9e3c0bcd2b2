"""`catalogue` of X-ray pictures, alone and among volumes: a row each, counts that add up, and no name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from modalities.grey_png import read_png
from modalities.volume_rows import COLUMNS
from pipelines.catalogue import main
from tests.planted import IDENTIFIERS, digests, found_in, named_in, texts_of
from tests.synthetic_dicom import AXIAL, dicom_image, save, write_series
from tests.synthetic_pictures import save_png, shades
from tests.synthetic_volumes import head
from tests.tiny_runs import quick, wide

__all__ = ["quick", "wide"]


def pictures(root: Path) -> Path:
    """Of three patients: two views, one of them twice; one with writing in it; PNGs, one of them coloured; a film of two frames."""
    both = {"PixelSpacing": ["0.2", "0.1"], "PatientID": "Ada", "RescaleSlope": "2", "RescaleIntercept": "-100"}
    save(dicom_image(shades(), Modality="DX", **both), root / "Ada" / "view1")
    save(dicom_image(shades(seed=1), Modality="CR", PatientID="Ada", LossyImageCompression="01"), root / "Ada" / "view2")
    save(dicom_image(shades(), Modality="DX", PatientID="Ada", StudyInstanceUID="1.2.3"), root / "Ada" / "again")
    save(dicom_image(shades(seed=2), Modality="MG", PatientID="Bob", BurnedInAnnotation="YES"), root / "Bob" / "a")
    save(dicom_image(shades(), Modality="DX", PatientID="Bob", NumberOfFrames=2, Rows=12), root / "Bob" / "b")
    save_png(root / "sub-7" / "lateral.png", shades(seed=3))
    save_png(root / "sub-7" / "coloured.png", np.stack([shades(), shades(), shades() + 1]))
    (root / "Ada" / "letter.txt").write_text("text")
    return root


def catalogued(tmp_path: Path, data: Path, *words: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    out = tmp_path / "out"
    assert main(["--data", str(data), "--out", str(out), *words]) == 0
    rows = [dict(row) for row in parquet.read_table(out / "catalogue.parquet").to_pylist()]
    return rows, json.loads((out / "result.json").read_text())["figures"]


def test_every_picture_has_a_row_with_its_geometry_and_the_counts_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reader.kind=xray", f"split={tmp_path / 'split.json'}", f"crosswalk={tmp_path / 'walk.csv'}", "draw.test_fraction=0"]
    rows, figures = catalogued(tmp_path, pictures(tmp_path / "data"), *words)
    assert figures["files"] == {"found": 8, "used": 3, "rejected": 4, "ignored": 1}
    assert figures["pictures"] == {"found": 7, "accepted": 3, "rejected": 4, "ignored": 0}
    assert figures["volumes"]["found"] == 0
    assert (figures["patients"], figures["sessions"], figures["modalities"]) == (2, 2, {"DX": 1, "CR": 1, "unknown": 1})
    assert {entry["code"]: entry["scans"] for entry in figures["not_used"]} == dict.fromkeys(
        ("burned_in", "several_frames", "colour", "duplicate"), 1
    )
    assert all(list(row) == list(COLUMNS) and row["kind"] == "picture" and row["patient"] and row["session"] for row in rows)
    assert len({row["patient"] for row in rows}) == 3
    by = {(row["modality"], row["status"]): row for row in rows}
    measured = by["DX", "accepted"]
    assert (measured["shape"], measured["spacing_mm"], measured["anisotropy"]) == ([24, 20], [0.2, 0.1], 2.0)
    assert (measured["format"], measured["dtype"], measured["sequence"], measured["orientation"]) == ("dicom", "uint16", "XR", "")
    physical = shades() * 2.0 - 100
    assert (measured["value_min"], measured["value_max"]) == (physical.min(), physical.max())
    assert (measured["foreground_mean"], measured["foreground_std"]) == (pytest.approx(physical.mean()), pytest.approx(physical.std()))
    assert by["CR", "accepted"]["flags"] == ["lossy", "no_spacing"]
    assert (by["", "accepted"]["format"], by["", "accepted"]["spacing_mm"]) == ("png", [])
    (copy,) = [row for row in rows if row["code"] == "duplicate"]
    assert [row["status"] for row in rows if row["scan"] == copy["duplicate_of"]] == ["accepted"]
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "7 X-ray pictures found: 3 accepted, 4 rejected, 0 ignored" in told
    assert "accepted: 2 patients, 2 sessions, 3 scenes" in told
    assert "CR XR: 1 scan of 1 patient in 1 session" in told
    assert "spacing unknown (1)" in told
    assert any(line.startswith("rejected burned_in: 1 picture, such as file-") for line in told)
    assert not any(name in "".join(told) for name in ("Ada", "Bob", "sub-7", "lateral"))
    split = json.loads((tmp_path / "split.json").read_text())
    assert {name for row in rows if row["status"] == "accepted" for name in [row["group"]]} == set(split["groups"])
    with (tmp_path / "walk.csv").open(newline="") as stream:
        walk = {row["pseudonym"]: row["stands_for"] for row in csv.DictReader(stream)}
    assert {row["patient"]: walk[row["patient"]] for row in rows if row["modality"] == "MG"} == {by["MG", "rejected"]["patient"]: "bob"}
    assert all(row[name] in walk for row in rows for name in ("patient", "session", "scan", "file"))


def test_a_mixed_archive_lists_volumes_and_pictures_and_a_patient_of_both_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(tmp_path / "data")
    write_series(root / "Ada" / "brain", head(12).astype(np.int16), AXIAL, Modality="MR", PatientID="Ada", SeriesInstanceUID="1.2.9")
    rows, figures = catalogued(tmp_path, root, "reader.spacing_mm=null")
    assert figures["volumes"] == {"found": 1, "accepted": 1, "rejected": 0, "ignored": 0}
    assert figures["pictures"] == {"found": 7, "accepted": 2, "rejected": 3, "ignored": 2}
    assert figures["files"] == {"found": 20, "used": 14, "rejected": 3, "ignored": 3}
    assert {(row["code"], row["kind"]) for row in rows if row["status"] == "ignored"} == {("unsaid_picture", "picture")}
    (brain,) = [row for row in rows if row["kind"] == "volume"]
    assert {row["group"] for row in rows if row["status"] == "accepted"} == {brain["group"]}
    assert rows == sorted(rows, key=lambda row: (row["patient"], row["session"], row["scan"]))
    told = capsys.readouterr().out
    assert "1 volume found" in told
    assert "7 X-ray pictures found" in told


def test_patients_who_share_a_picture_are_one_in_their_volumes_too(tmp_path: Path) -> None:
    for name, seed in (("Ada", 0), ("Bob", 1), ("Cid", 2)):
        uid = f"1.2.{seed}"
        write_series(tmp_path / "data" / name, head(12, seed).astype(np.int16), AXIAL, PatientID=name, SeriesInstanceUID=uid)
    for name in ("Ada", "Bob"):
        save(dicom_image(shades(), Modality="DX", PatientID=name), tmp_path / "data" / name / "chest")
    rows, _ = catalogued(tmp_path, tmp_path / "data", "reader.spacing_mm=null")
    groups = {row["patient"]: row["group"] for row in rows if row["kind"] == "volume"}
    assert (len(groups), len(set(groups.values()))) == (3, 2)
    assert set(groups.values()) <= set(groups)


def test_scans_that_no_picture_was_asked_of_are_ignored_series_by_series(tmp_path: Path) -> None:
    write_series(tmp_path / "data" / "brain", head(12).astype(np.int16), AXIAL, Modality="MR")
    save_png(tmp_path / "data" / "a.png", shades())
    assert read_png(tmp_path / "data" / "a.png").shape == (24, 20)
    rows, figures = catalogued(tmp_path, tmp_path / "data", "reader.kind=xray")
    assert figures["files"] == {"found": 13, "used": 1, "rejected": 0, "ignored": 12}
    assert sorted((row["status"], row["code"], row["num_files"]) for row in rows) == [
        ("accepted", "", 1),
        ("ignored", "other_modality", 12),
    ]


def test_no_identifier_of_a_picture_is_written_or_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    held = IDENTIFIERS
    folder = tmp_path / "archive" / held["folder"] / held["patient name"]
    own = {
        "PatientID": held["patient id"],
        "PatientName": held["patient name"],
        "PatientBirthDate": held["birth date"],
        "AccessionNumber": held["accession number"],
        "StudyInstanceUID": held["study uid"],
        "SeriesInstanceUID": held["series uid"],
        "StudyDescription": held["study description"],
        "ImageComments": held["comment"],
    }
    broken = [{}, {"WindowCenter": "5", "WindowWidth": "9", "VOILUTFunction": held["comment"]}, {"Rows": 12}]
    for number, tags in enumerate(broken):
        save(dicom_image(shades(seed=number), Modality="DX", **own, **tags), folder / f"{held['file']}{number}.dcm")
    save(dicom_image(shades(), **{**own, "Modality": held["comment"].upper()[:16]}), folder / "other")
    save_png(folder / f"{held['file']}.png", np.stack([shades(), shades(), shades() + 1]))
    (folder / f"{held['label file']}.dcm").write_bytes((folder / f"{held['file']}0.dcm").read_bytes()[:-500])
    for kind in ("xray", "medical"):
        words = [f"reader.kind={kind}", *(["reader.voi=lut"] if kind == "xray" else [])]
        assert main(["--data", str(tmp_path / "archive"), "--out", str(tmp_path / "made" / kind), *words]) == 0
    told = capfd.readouterr()
    assert not named_in((told.out + told.err).encode(), digests(texts_of(tmp_path / "archive")))
    assert not found_in([tmp_path / "made"], digests(texts_of(tmp_path / "archive")))
    assert named_in((folder / f"{held['file']}0.dcm").read_bytes()), "they are there to be found"
