"""Cases are judged on the lattice of their files, come out as rows, and are summed up in words that claim no more than the interval."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from mae_core.bands import BandSettings
from mae_core.case_metrics import NAMES, CaseScores, CaseSettings, judge_case
from mae_core.export import Description
from mae_core.heads import Segmenter
from mae_core.labelling import Labeller
from modalities.catalogue import scan
from modalities.labels import WithoutSome, match_labels
from modalities.medical import MriSettings
from pipelines.case_report import MEAN, by_case, fewest_patients, summary, tell_cases, verdict
from pipelines.case_scores import COLUMNS, Case, Judge, Row, held_out_cases, plain_rows, rows_from, table_of, write_csv
from pipelines.label_scene import source_of
from tests.synthetic_segmenter import random_segmenter
from tests.synthetic_volumes import OBLIQUE, save_volume
from tests.tiny_runs import ALONE, quick, wide

__all__ = ["quick", "wide"]

FEW = CaseSettings(num_resamples=200)


def scores(**changes: float) -> CaseScores:
    """A case of Dice 0.5 with everything there."""
    usual = dict.fromkeys(NAMES, 1.0) | {"dice": 0.5, "volume_error_relative": 0.0, "volume_error_ml": 0.0}
    return CaseScores(**{**usual, **changes})


def row(case: int, dice: float, name: str = "lesion", **changes: float) -> Row:
    return Row(f"scan-{case}", f"subject-{case}", 1, name, scores(dice=dice, **changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Case], Segmenter, Description, Path]:
    """Two oblique volumes of 1 × 1 × 3 mm that are read at 2 mm, with labels 0, 7 and 300; a segmenter of random weights."""
    folder = tmp_path_factory.mktemp("cases")
    affine = OBLIQUE @ np.diag([1, 1, 3, 1])
    for number in range(2):
        random = np.random.default_rng(number)
        classes = np.kron(random.choice([0, 7, 300], (4, 3, 2), p=[0.5, 0.3, 0.2]), np.ones((5, 5, 5), int))
        save_volume(
            folder / "images" / f"p{number}.nii.gz", (100 + classes + random.normal(0, 9, classes.shape)).astype(np.float32), affine
        )
        save_volume(folder / "labels" / f"p{number}.nii.gz", classes.astype(np.int16), affine)
    reader = MriSettings(spacing_mm=(2.0, 2.0, 2.0))
    labelling = match_labels(scan(folder / "images", reader), folder / "labels", None, (9,))
    assert all(isinstance(found, WithoutSome) for _, found in labelling.pairs)
    cases = held_out_cases([scene.name for scene, _ in labelling.pairs], labelling.pairs)
    model, about = random_segmenter(((0, "rest"), (7, "edema"), (300, "core")), reader)
    return cases, model, about, folder


def test_cases_are_judged_against_the_very_voxels_of_their_label_files(world: tuple[list[Case], Segmenter, Description, Path]) -> None:
    cases, model, about, folder = world
    rows = Judge(about, 0.25, BandSettings(), 4, FEW, ALONE).rows(model, cases)
    assert [(found.value, found.name) for found in rows] == [(7, "edema"), (300, "core")] * 2, "background is not judged"
    few = about.model_copy(update={"classes": ((0, "rest"), (1, "edema"), (2, "core"))})
    for case, own in zip(cases, (rows[:2], rows[2:]), strict=True):
        file = next(file for file in (folder / "labels").iterdir() if file.name == case.scene.files[0].name)
        reference = np.asarray(nib.load(file).dataobj)
        place = folder / "predicted.nii.gz"
        case.scene.write_labels(place, Labeller(model, few, 0.25, 0, 4).label(source_of(case.scene, ("MR",))), 0)
        predicted = np.array([0, 7, 300])[np.asarray(nib.load(place).dataobj)]
        assert len(np.unique(predicted)) > 1, "a model that sees something"
        wanted = judge_case(predicted, reference.astype(np.int64), (1.0, 1.0, 3.0), (0, 7, 300), FEW)
        for found in own:
            np.testing.assert_allclose(list(vars(found.scores).values()), list(vars(wanted[found.value]).values()), rtol=1e-6)
        assert {found.case for found in own} == {case.scene.name}
        assert {found.patient for found in own} == {case.scene.group}


def test_two_processes_judge_every_case_once(world: tuple[list[Case], Segmenter, Description, Path]) -> None:
    """What each would add to the sum, added here: no case is judged twice, none is left out."""
    cases, model, about, _ = world
    alone = Judge(about, 0.25, BandSettings(), 4, FEW, ALONE)
    seen: list[str] = []
    parts = []
    for rank in range(2):
        judge = replace(alone, parallel=_Half(rank, 2, torch.device("cpu")))
        parts.append(judge.rows(model, cases, lambda scene, predicted, reference: seen.append(scene.name)))
    assert seen == [case.scene.name for case in cases]
    whole = alone.rows(model, cases)
    for one, other, both in zip(*parts, whole, strict=True):
        total = np.array(list(vars(one.scores).values())) + np.array(list(vars(other.scores).values()))
        np.testing.assert_array_equal(total, list(vars(both.scores).values()))


class _Half(type(ALONE)):  # type: ignore[misc]
    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


def test_only_scans_of_the_judged_side_are_cases(world: tuple[list[Case], Segmenter, Description, Path]) -> None:
    cases = world[0]
    pairs: list[Any] = [(case.scene, case.labels) for case in reversed(cases)]
    assert held_out_cases([case.scene.name for case in cases], pairs) == cases, "in an order of their own"
    assert held_out_cases([cases[1].scene.name], pairs) == cases[1:]


def test_rows_come_back_and_a_value_that_is_none_is_an_empty_cell(tmp_path: Path) -> None:
    rows = [row(1, 0.123456789), row(2, math.nan, hd95_mm=math.nan, reference_ml=0.0, predicted_ml=0.0)]
    back = rows_from(plain_rows(rows))
    np.testing.assert_array_equal(
        [list(vars(found.scores).values()) for found in back], [list(vars(found.scores).values()) for found in rows]
    )
    assert [replace(found, scores=rows[0].scores) for found in back] == [replace(found, scores=rows[0].scores) for found in rows]
    write_csv(tmp_path / "cases.csv", table_of({("scratch", 3): rows}))
    with (tmp_path / "cases.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert tuple(found[0]) == COLUMNS
    assert [(line["arm"], line["seed"], line["case"], line["dice"], line["state"]) for line in found] == [
        ("scratch", "3", "scan-1", "0.123457", "both"),
        ("scratch", "3", "scan-2", "", "absent"),
    ]


def test_a_case_is_the_mean_of_its_seeds_and_classes_and_absent_ones_are_in_none() -> None:
    first = [row(1, 0.2, "a"), row(1, 0.6, "b"), row(2, math.nan, "a"), row(2, 0.5, "b")]
    second = [row(1, 0.4, "a"), row(1, 0.6, "b"), row(2, math.nan, "a"), row(2, 0.7, "b")]
    found = by_case([first, second])["dice"]
    assert found["a"]["scan-1"] == pytest.approx(0.3)
    assert math.isnan(found["a"]["scan-2"])
    assert found[MEAN] == pytest.approx({"scan-1": 0.45, "scan-2": 0.6})
    assert MEAN not in by_case([[row(1, 0.5)]])["dice"], "one class is its own mean"


def both_arms(gain: list[float]) -> dict[str, Any]:
    """Figures of two arms whose Dice differs by so much from case to case."""
    scratch = [row(number, 0.4, hd95_mm=5.0) for number in range(len(gain))]
    pretrained = [row(number, 0.4 + more, hd95_mm=5.0 - more) for number, more in enumerate(gain)]
    return summary({("pretrained", 0): pretrained, ("scratch", 0): scratch}, FEW)


def test_better_is_said_only_where_the_interval_leaves_out_zero(capsys: pytest.CaptureFixture[str]) -> None:
    tell_cases(both_arms([0.1, 0.2, 0.1, 0.2, 0.15, 0.15]))
    told = capsys.readouterr().out
    assert "pretrained − scratch, Dice, lesion: +0.150 [" in told
    assert told.count("6 cases of 6 patients: pretrained is better") == 2, "a larger Dice and a smaller HD95"
    tell_cases(both_arms([0.2, -0.2, 0.1, -0.1, 0.05]))
    told = capsys.readouterr().out
    assert "better" not in told
    assert "the interval contains 0, so no difference is shown" in told
    assert "0.400" in told
    assert "NSD 1 mm" in told
    tell_cases(both_arms([-0.1, -0.2, -0.1, -0.1, -0.1, -0.1]))
    assert "6 cases of 6 patients: scratch is better" in capsys.readouterr().out
    tell_cases(both_arms([-0.1, -0.2, -0.1, -0.1, -0.1]))
    told = capsys.readouterr().out
    assert "better" not in told, "of five, all lie on one side by chance in 1 of 16 trials"
    assert "5 cases of 5 patients: fewer than 6 patients, so no difference is shown" in told
    assert fewest_patients(0.9) == 5


def test_one_patient_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tell_cases(both_arms([0.3]))
    told = capsys.readouterr().out
    assert "better" not in told
    assert "no interval can be given for one patient" in told


def test_differences_are_paired_by_case() -> None:
    """Both arms vary a lot from case to case and differ by the same everywhere: the interval of the difference has no width."""
    base = (0.1, 0.5, 0.9, 0.2, 0.4, 0.6)
    scratch = [row(number, value) for number, value in enumerate(base)]
    pretrained = [row(number, value + 0.05) for number, value in enumerate(base)]
    figures = summary({("pretrained", 0): pretrained, ("scratch", 0): scratch}, FEW)
    found = figures["difference"]["lesion"]["dice"]
    assert (found["low"], found["high"]) == pytest.approx((0.05, 0.05))
    own = figures["arms"]["scratch"]["lesion"]["dice"]
    assert own["high"] - own["low"] > 0.3
    assert "pretrained is better" in verdict(found, "dice", 0.95)


def test_missed_invented_and_absent_cases_are_counted() -> None:
    rows = [
        row(1, 0.5),
        row(2, 0.0, predicted_ml=0.0),
        row(3, 0.0, reference_ml=0.0, volume_error_relative=math.nan),
        row(4, math.nan, reference_ml=0.0, predicted_ml=0.0),
    ]
    figures = summary({("scratch", 0): rows}, FEW)["arms"]["scratch"]["lesion"]
    assert (figures["missed"], figures["invented"], figures["absent"]) == (1, 1, 1)
    assert figures["dice"]["mean"] == pytest.approx(0.5 / 3), "the missed and the invented one count as 0, the absent one not at all"
