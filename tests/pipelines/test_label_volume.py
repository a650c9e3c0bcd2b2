"""Scans become label files on their own lattice, with class names beside them, and on demand probabilities and a sheet."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mae_core.export import save_model
from mae_core.figures import read_picture
from modalities.medical import MriSettings
from modalities.patients import RESEARCH_USE
from pipelines import predict
from tests.synthetic_segmenter import random_segmenter
from tests.synthetic_volumes import OBLIQUE, save_volume, texture
from tests.tiny_runs import logged_sheets, quick, shared_tracking

__all__ = ["quick"]

AFFINE = OBLIQUE @ np.diag([1, -1, 3, 1])
SPACE = (18, 14, 9)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of random weights, and two oblique scans with thick slices."""
    folder = tmp_path_factory.mktemp("segmenter")
    model, about = random_segmenter(((0, "rest"), (3, "edema"), (9, "core")), MriSettings(spacing_mm=(2.0, 2.0, 2.0)))
    save_model(folder / "model", model, about)
    for number in range(2):
        save_volume(folder / "scans" / f"MUSTERMANN-{number}.nii.gz", texture(SPACE, number), AFFINE)
    return folder


def labelled(run_folder: Path, factory: pytest.TempPathFactory, data: str, out: Path, *more: str) -> None:
    words = ["--model", str(run_folder), "--data", str(run_folder / data), "--out", str(out), "device=cpu", "overlap=0.1"]
    assert predict.main([*words, f"tracking.uri={shared_tracking(factory)}", *more]) == 0


def test_a_folder_of_scans_gets_labels_names_probabilities_and_sheets_under_pseudonyms(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    labelled(run_folder, tmp_path_factory, "scans", tmp_path, "probabilities=float32", "sheets=true")
    stems = sorted(path.name.removesuffix("_labels.nii.gz") for path in tmp_path.glob("*_labels.nii.gz"))
    assert len(stems) == 2
    endings = ("_labels.nii.gz", "_labels.tsv", "_labels.json", "_probabilities.nii.gz", "_sheet.png")
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}{ending}" for stem in stems for ending in endings} | {"result.json"}
    assert all(stem.startswith("scan-") for stem in stems)
    for stem in stems:
        labels, chances = (nib.load(tmp_path / f"{stem}{name}.nii.gz") for name in ("_labels", "_probabilities"))
        assert labels.shape == SPACE
        assert chances.shape == (*SPACE, 3)
        for found in (labels, chances):
            np.testing.assert_array_equal(found.affine, nib.load(run_folder / "scans" / "MUSTERMANN-0.nii.gz").affine)
            np.testing.assert_allclose(found.header.get_zooms()[:3], (1, 1, 3), rtol=1e-6)
        assert int(labels.header["intent_code"]) == 1002, "label"
        assert int(chances.header["intent_code"]) == 0
        values, parts = np.asarray(labels.dataobj), np.asarray(chances.dataobj)
        assert parts.dtype == np.float32
        np.testing.assert_array_equal(np.array([0, 3, 9])[parts.argmax(axis=-1)], values)
        np.testing.assert_allclose(parts.sum(axis=-1), 1, atol=1e-5)
        assert len(np.unique(values)) > 1


def test_sheets_are_logged_only_where_pictures_of_patients_are_asked_for(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    uri = shared_tracking(tmp_path_factory)
    for asked, wanted in (("null", False), ("false", False), ("true", True)):
        out = tmp_path / asked
        labelled(
            run_folder,
            tmp_path_factory,
            "scans/MUSTERMANN-0.nii.gz",
            out / "map_labels.nii.gz",
            "sheets=true",
            f"tracking.log_images={asked}",
        )
        told = json.loads((out / "map_labels.nii.gz.result.json").read_text())
        scan = json.loads((out / "map_labels.json").read_text())["Scan"]
        sheet = read_picture(out / "map_sheet.png")
        logged = logged_sheets(uri, told["mlflow"]["run_id"])
        assert sorted(logged) == ([scan] if wanted else [])
        assert all(np.array_equal(read_picture(path), sheet) for path in logged.values())


def test_names_and_colours_stand_in_a_table_and_what_the_labels_are_for_beside_it(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    out = tmp_path / "map_labels.nii.gz"
    labelled(run_folder, tmp_path_factory, "scans/MUSTERMANN-1.nii.gz", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "map_labels.json",
        "map_labels.nii.gz",
        "map_labels.nii.gz.result.json",
        "map_labels.tsv",
    ], "neither sheet nor probabilities, which nobody asked for"
    with (tmp_path / "map_labels.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [(row["index"], row["name"]) for row in rows] == [("0", "rest"), ("3", "edema"), ("9", "core")]
    assert len({row["color"] for row in rows}) == 3
    told = json.loads((tmp_path / "map_labels.json").read_text())
    assert told["Classes"] == {"0": "rest", "3": "edema", "9": "core"}
    assert told["Use"] == RESEARCH_USE
    assert len(told["ModelWeightsSha256"]) == 64
    assert told["Scan"].startswith("scan-")


def test_probabilities_in_bytes_are_those_in_parts_of_250(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    for how in ("float32", "uint8"):
        labelled(run_folder, tmp_path_factory, "scans/MUSTERMANN-0.nii.gz", tmp_path / how / "map_labels.nii.gz", f"probabilities={how}")
    exact, parts = (nib.load(tmp_path / how / "map_probabilities.nii.gz") for how in ("float32", "uint8"))
    assert parts.get_data_dtype() == np.uint8
    np.testing.assert_allclose(parts.get_fdata(), exact.get_fdata(), atol=0.5 / 250 + 1e-6)


def test_no_file_names_the_patient(run_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    labelled(run_folder, tmp_path_factory, "scans", tmp_path / "out", "sheets=true")
    for path in (tmp_path / "out").iterdir():
        assert "MUSTERMANN" not in path.name
        assert b"MUSTERMANN" not in path.read_bytes()


def test_a_dicom_segmentation_of_nifti_is_refused(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--model",
        str(run_folder),
        "--data",
        str(run_folder / "scans"),
        "--out",
        str(tmp_path / "out"),
        "device=cpu",
        "dicom_seg=true",
    ]
    assert predict.main([*words, f"tracking.uri={shared_tracking(tmp_path_factory)}"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "dicom_seg=true wants a DICOM series" in told
    assert "MUSTERMANN" not in told
    assert not list((tmp_path / "out").glob("*.dcm"))
