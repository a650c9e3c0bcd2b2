"""What cases say together: means with intervals by patient, pretrained less scratch paired by case, and words that claim no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from mae_core.bootstrap import Interval, interval
from mae_core.case_metrics import CaseSettings
from modalities.volume_account import counted
from pipelines.case_scores import Row
from pipelines.progress import console, table

MEAN = "mean of classes"
MEASURES: dict[str, Callable[[Row], float]] = {
    "dice": lambda row: row.scores.dice,
    "hd95_mm": lambda row: row.scores.hd95_mm if row.unit == "mm" else math.nan,
    "hd95_pixels": lambda row: row.scores.hd95_mm if row.unit == "pixel" else math.nan,
    "nsd": lambda row: row.scores.nsd if row.unit == "mm" else math.nan,
    "nsd_pixels": lambda row: row.scores.nsd if row.unit == "pixel" else math.nan,
    "volume_error_relative": lambda row: row.scores.volume_error_relative,
    "volume_error_absolute": lambda row: abs(row.scores.volume_error_relative),
    "volume_error_absolute_ml": lambda row: abs(row.scores.volume_error_ml) if row.axes == 3 else math.nan,
    "lesion_precision": lambda row: row.scores.lesion_precision,
    "lesion_recall": lambda row: row.scores.lesion_recall,
    "lesion_f1": lambda row: row.scores.lesion_f1,
}
"""What is averaged over cases, by the name that it has in `result.json`; in a picture, the error of a volume is that of an area."""

SMALLER_IS_BETTER = ("hd95_mm", "hd95_pixels", "volume_error_absolute", "volume_error_absolute_ml")
PAIRED = {
    "dice": "Dice",
    "hd95_mm": "HD95 (mm)",
    "hd95_pixels": "HD95 (pixels)",
    "nsd": "NSD",
    "nsd_pixels": "NSD (pixels)",
    "lesion_f1": "lesion F1",
}
"""What arms are compared by, and its name in words."""
STATES = ("missed", "invented", "absent")

Table = dict[str, dict[str, dict[str, float]]]
"""Measure, then class (and their mean), then case to a number."""


def summary(found: Mapping[tuple[str, int], Sequence[Row]], settings: CaseSettings) -> dict[str, Any]:
    """Figures of all arms and their difference, as `result.json` holds them.

    A case's number of an arm is the mean over its seeds. Counts of `missed`, `invented` and `absent` are over cases and seeds.
    """
    patients = {row.case: row.patient for rows in found.values() for row in rows}
    arms = list(dict.fromkeys(arm for arm, _ in found))
    tables = {arm: by_case([rows for (own, _), rows in found.items() if own == arm]) for arm in arms}
    names = list(next(iter(tables.values()))["dice"])
    measured = measures_of([row for rows in found.values() for row in rows])

    def over_cases(values: Mapping[str, float]) -> dict[str, Any]:
        cases = sorted(values)
        mean = interval(
            [values[case] for case in cases],
            [patients[case] for case in cases],
            settings.num_resamples,
            settings.confidence,
            settings.seed,
        )
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(mean).items()}

    figures: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "cases": len(patients),
        "patients": len(set(patients.values())),
        "arms": {
            arm: {name: {measure: over_cases(own[measure][name]) for measure in measured} | _states(found, arm, name) for name in names}
            for arm, own in tables.items()
        },
    }
    if arms == ["pretrained", "scratch"]:
        one, other = tables["pretrained"], tables["scratch"]
        figures["difference"] = {
            name: {
                measure: over_cases({case: value - other[measure][name][case] for case, value in one[measure][name].items()})
                for measure in PAIRED
                if measure in measured
            }
            for name in names
        }
    return figures


def measures_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The measures that cases of these kinds can have at all, whatever their classes hold."""
    none = {
        "mm": ("hd95_mm", "nsd"),
        "pixel": ("hd95_pixels", "nsd_pixels"),
        "volume": ("volume_error_absolute_ml",),
    }
    there = {row.unit for row in rows} | {"volume" for row in rows if row.axes == 3}
    missing = {measure for what, measures in none.items() if what not in there for measure in measures}
    return tuple(measure for measure in MEASURES if measure not in missing)


def by_case(seeds: Sequence[Sequence[Row]]) -> Table:
    """Numbers of one arm by measure, class and case, seeds averaged; of several classes also their mean within each case."""
    names = list(dict.fromkeys(row.name for rows in seeds for row in rows))
    out: Table = {}
    for measure, of in MEASURES.items():
        own: dict[str, dict[str, float]] = {}
        for name in names:
            values: dict[str, list[float]] = {}
            for rows in seeds:
                for row in rows:
                    if row.name == name:
                        values.setdefault(row.case, []).append(of(row))
            own[name] = {case: _mean(parts) for case, parts in values.items()}
        if len(names) > 1:
            own[MEAN] = {case: _mean([own[name][case] for name in names]) for case in own[names[0]]}
        out[measure] = own
    return out


def _mean(values: Sequence[float]) -> float:
    """Over those that are there; nan where none is."""
    there = [value for value in values if not math.isnan(value)]
    return float(np.mean(there)) if there else math.nan


def _states(found: Mapping[tuple[str, int], Sequence[Row]], arm: str, name: str) -> dict[str, int]:
    own: list[str] = [row.scores.state for (of, _), rows in found.items() if of == arm for row in rows if name in (row.name, MEAN)]
    return {state: own.count(state) for state in STATES}


def tell_cases(figures: Mapping[str, Any]) -> None:
    """Print means with intervals for every class and arm, what they mean, and what the difference says."""
    settings = figures["settings"]
    confidence = settings["confidence"]
    tolerance = f"{settings['nsd_tolerance_mm']:g}"
    shown: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
        "Dice": ("dice", _cell),
        "HD95 mm": ("hd95_mm", partial(_cell, digits=2)),
        "HD95 pixels": ("hd95_pixels", partial(_cell, digits=2)),
        f"NSD {tolerance} mm": ("nsd", _cell),
        f"NSD {tolerance} pixels": ("nsd_pixels", _cell),
        "size off by": ("volume_error_absolute", partial(_cell, percent=True)),
        "lesion F1": ("lesion_f1", _cell),
    }
    arms = figures["arms"]
    rows = []
    for name, known in next(iter(arms.values())).items():
        first = "mean" if name == MEAN else name
        for title, (measure, cell) in shown.items():
            if measure in known:
                rows.append([first, title, *(cell(arms[arm][name][measure]) for arm in arms)])
                first = ""
        rows.append(["", "mis/inv/abs", *("/".join(str(arms[arm][name][state]) for state in STATES) for arm in arms)])
    what = f"{counted(figures['cases'], 'held-out case')} of {counted(figures['patients'], 'patient')}"
    table(f"{what}, each judged whole", ["class", "", *arms], rows)
    console.print(
        f"In brackets: {confidence:.0%} bootstrap interval of the mean over cases, {settings['num_resamples']} resamples of patients. "
        "Each case is judged on the lattice of its file. mis/inv/abs count cases. missed: in the reference and not predicted; "
        "invented: the other way round; both are Dice 0, NSD 0 and HD95 of the image's diagonal. absent: in neither, and in no mean.",
        markup=False,
    )
    for line in differences(figures):
        console.print(line, markup=False)


def differences(figures: Mapping[str, Any]) -> list[str]:
    """What pretrained less scratch says, a line for each measure; none without both arms."""
    if "difference" not in figures:
        return []
    entries, confidence = figures["difference"], figures["settings"]["confidence"]
    name = MEAN if MEAN in entries else next(iter(entries))
    return [
        f"pretrained − scratch, {PAIRED[measure]}, {name}: {verdict(entry, measure, confidence)}"
        for measure, entry in entries[name].items()
    ]


def fewest_patients(confidence: float) -> int:
    """Patients from which on a difference can be shown at all: with fewer, all lie on one side by chance more often than 1 − confidence."""
    return math.ceil(math.log2(2 / (1 - confidence)) - 1e-9)


def verdict(entry: Mapping[str, Any], measure: str, confidence: float) -> str:
    """A paired difference in words; which arm is better is said only where the interval of enough patients does not contain 0."""
    mean, low, high = (math.nan if entry[key] is None else float(entry[key]) for key in ("mean", "low", "high"))
    found = Interval(mean, low, high, int(entry["cases"]), int(entry["patients"]))
    if not found.cases:
        return "no case has a value in both"
    digits = 2 if measure.startswith("hd95") else 3
    numbers = f"{found.mean:+.{digits}f}"
    pairs = f"{counted(found.cases, 'case')} of {counted(found.patients, 'patient')}"
    if not found.is_known:
        return f"{numbers}, {pairs}: no interval can be given for one patient, so no difference is shown"
    numbers += f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    if found.contains_zero:
        return f"{numbers}, {pairs}: the interval contains 0, so no difference is shown"
    if found.patients < fewest_patients(confidence):
        return f"{numbers}, {pairs}: fewer than {fewest_patients(confidence)} patients, so no difference is shown"
    winner = "pretrained" if (found.mean < 0) == (measure in SMALLER_IS_BETTER) else "scratch"
    return f"{numbers}, {pairs}: {winner} is better"


def _cell(entry: Mapping[str, Any], digits: int = 3, *, percent: bool = False) -> str:
    if entry["mean"] is None:
        return "–"

    def number(value: float) -> str:
        return f"{value:.0%}" if percent else f"{value:.{digits}f}"

    ends = "" if entry["low"] is None else f" [{number(entry['low'])}, {number(entry['high'])}]"
    return number(entry["mean"]) + ends
