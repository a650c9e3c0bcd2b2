"""What cases say together: means with intervals by patient, pretrained less scratch paired by case, and words that claim no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mae_core.bootstrap import Interval, interval
from mae_core.case_metrics import CaseScores, CaseSettings
from pipelines.case_scores import Row
from pipelines.progress import console, table

MEAN = "mean of classes"
MEASURES: dict[str, Callable[[CaseScores], float]] = {
    "dice": lambda scores: scores.dice,
    "hd95_mm": lambda scores: scores.hd95_mm,
    "nsd": lambda scores: scores.nsd,
    "volume_error_relative": lambda scores: scores.volume_error_relative,
    "volume_error_absolute": lambda scores: abs(scores.volume_error_relative),
    "volume_error_absolute_ml": lambda scores: abs(scores.volume_error_ml),
    "lesion_precision": lambda scores: scores.lesion_precision,
    "lesion_recall": lambda scores: scores.lesion_recall,
    "lesion_f1": lambda scores: scores.lesion_f1,
}
"""What is averaged over cases, by the name that it has in `result.json`."""

SMALLER_IS_BETTER = ("hd95_mm", "volume_error_absolute", "volume_error_absolute_ml")
PAIRED = ("dice", "hd95_mm", "nsd", "lesion_f1")
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
            arm: {name: {measure: over_cases(own[measure][name]) for measure in MEASURES} | _states(found, arm, name) for name in names}
            for arm, own in tables.items()
        },
    }
    if arms == ["pretrained", "scratch"]:
        one, other = tables["pretrained"], tables["scratch"]
        figures["difference"] = {
            name: {
                measure: over_cases({case: value - other[measure][name][case] for case, value in one[measure][name].items()})
                for measure in PAIRED
            }
            for name in names
        }
    return figures


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
                        values.setdefault(row.case, []).append(of(row.scores))
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
    shown: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "Dice": lambda entry: _cell(entry["dice"]),
        "HD95 mm": lambda entry: _cell(entry["hd95_mm"], 2),
        f"NSD {settings['nsd_tolerance_mm']:g} mm": lambda entry: _cell(entry["nsd"]),
        "volume off by": lambda entry: _cell(entry["volume_error_absolute"], percent=True),
        "lesion F1": lambda entry: _cell(entry["lesion_f1"]),
        "/".join(STATES): lambda entry: "/".join(str(entry[state]) for state in STATES),
    }
    arms = figures["arms"]
    rows = [
        [("mean" if name == MEAN else name) if number == 0 else "", title, *(cell(arms[arm][name]) for arm in arms)]
        for name in next(iter(arms.values()))
        for number, (title, cell) in enumerate(shown.items())
    ]
    table(f"{figures['cases']} held-out cases of {figures['patients']} patients, each judged whole", ["class", "", *arms], rows)
    console.print(
        f"In brackets: {confidence:.0%} bootstrap interval of the mean over cases, {settings['num_resamples']} resamples of patients. "
        "Each case is judged on the lattice of its file. missed: in the reference and not predicted; invented: the other way round; "
        "both are Dice 0, NSD 0 and HD95 of the image's diagonal. absent: in neither, and in no mean.",
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
    told = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "nsd": "NSD", "lesion_f1": "lesion F1"}
    return [f"pretrained − scratch, {told[measure]}, {name}: {verdict(entries[name][measure], measure, confidence)}" for measure in PAIRED]


def fewest_patients(confidence: float) -> int:
    """Patients from which on a difference can be shown at all: with fewer, all lie on one side by chance more often than 1 − confidence."""
    return math.ceil(math.log2(2 / (1 - confidence)) - 1e-9)


def verdict(entry: Mapping[str, Any], measure: str, confidence: float) -> str:
    """A paired difference in words; which arm is better is said only where the interval of enough patients does not contain 0."""
    mean, low, high = (math.nan if entry[key] is None else float(entry[key]) for key in ("mean", "low", "high"))
    found = Interval(mean, low, high, int(entry["cases"]), int(entry["patients"]))
    if not found.cases:
        return "no case has a value in both"
    digits = 2 if measure == "hd95_mm" else 3
    numbers = f"{found.mean:+.{digits}f}"
    pairs = f"{found.cases} cases of {found.patients} patients"
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
