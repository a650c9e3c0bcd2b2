"""X-ray pictures are cases like scans: judged on the pixels of their files, in mm only where somebody says how large a pixel is."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from mae_core.bands import BandSettings
from mae_core.case_metrics import CaseSettings, judge_case
from modalities.catalogue import scan
from modalities.grey_png import read_png
from modalities.labels import match_labels
from modalities.medical import XraySettings
from pipelines.case_report import summary, tell_cases
from pipelines.case_scores import Case, Judge, held_out_cases, plain_rows, rows_from, table_of, write_csv
from tests.synthetic_dicom import dicom_image, save
from tests.synthetic_pictures import save_png, shades
from tests.synthetic_segmenter import random_segmenter
from tests.tiny_runs import ALONE, quick

__all__ = ["quick"]

FEW = CaseSettings(num_resamples=200)


def cases_of(folder: Path, *, is_measured: bool) -> list[Case]:
    """Two pictures with labels 0, 7 and 9; measured ones have pixels of 0.5 × 0.25 mm and are read at 1 × 1 mm."""
    for number in range(2):
        values = shades((40, 64), number)
        classes = np.kron(np.random.default_rng(number).choice([0, 7, 9], (4, 4)), np.ones((10, 16), int))
        values = (values + 300 * classes).astype(np.uint16)
        if is_measured:
            tags = {"PixelSpacing": ["0.5", "0.25"], "PatientID": f"p{number}"}
            save(dicom_image(values, Modality="DX", **tags), folder / "images" / f"p{number}.dcm")
        else:
            save_png(folder / "images" / f"p{number}.png", values)
        save_png(folder / "labels" / f"p{number}.png", classes.astype(np.uint8))
    reader = XraySettings(spacing_mm=(1.0, 1.0) if is_measured else None)
    labelling = match_labels(scan(folder / "images", reader), folder / "labels", None, ())
    return held_out_cases([scene.name for scene, _ in labelling.pairs], labelling.pairs)


@pytest.mark.parametrize("is_measured", [True, False])
def test_pictures_are_judged_on_the_pixels_of_their_files_in_their_own_unit(
    tmp_path: Path, is_measured: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = cases_of(tmp_path, is_measured=is_measured)
    model, about = random_segmenter(((0, "rest"), (7, "lung"), (9, "heart")), XraySettings())
    judge = Judge(about, 0.25, BandSettings(), 4, FEW, ALONE)
    rows = judge.rows(model, cases)
    assert len(rows) == 4
    spacing = (0.5, 0.25) if is_measured else (1.0, 1.0)
    for number, case in enumerate(cases):
        predicted, reference = judge.predicted(model, case.scene), case.labels.native().astype(np.int64)
        assert predicted.shape == reference.shape == (40, 64)
        assert any(np.array_equal(reference, read_png(file)) for file in (tmp_path / "labels").iterdir())
        wanted = judge_case(predicted, reference, spacing, (0, 7, 9), FEW)
        for row in rows[2 * number : 2 * number + 2]:
            np.testing.assert_allclose(list(vars(row.scores).values()), list(vars(wanted[row.value]).values()), rtol=1e-6)
            assert (row.unit, row.axes) == ("mm" if is_measured else "pixel", 2)
    assert [plain_rows([row]) for row in rows_from(plain_rows(rows))] == [plain_rows([row]) for row in rows]
    write_csv(tmp_path / "cases.csv", table_of({("scratch", 0): rows}))
    with (tmp_path / "cases.csv").open(newline="") as stream:
        line = next(csv.DictReader(stream))
    there, empty = ("hd95_mm", "hd95_pixels") if is_measured else ("hd95_pixels", "hd95_mm")
    assert (bool(line[there]), line[empty], line["reference_ml"], line["volume_error_ml"]) == (True, "", "", "")
    figures = summary({("scratch", 0): rows}, FEW)
    entry = figures["arms"]["scratch"]["lung"]
    assert there in entry
    assert not {empty, "volume_error_absolute_ml"} & set(entry)
    tell_cases(figures)
    told = capsys.readouterr().out
    assert ("HD95 mm" in told, "HD95 pixels" in told) == (is_measured, not is_measured)
    assert "mis/inv/abs" in told
    assert "2 held-out cases of 2 patients" in told
