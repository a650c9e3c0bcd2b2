"""Held-out scans and pictures are labelled whole and judged on the lattice of their files, one row for each case and class."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mae_core.bands import BandSettings
from mae_core.case_metrics import NAMES, CaseScores, CaseSettings, judge_case
from mae_core.export import Description
from mae_core.heads import Segmenter
from mae_core.labelling import Labeller
from mae_core.parallel import Parallel
from modalities.labels import WithoutSome
from modalities.scene import LabelMap, Scene
from modalities.volume import VolumeLabels, VolumeScene
from modalities.xray import XrayLabels, XrayScene
from pipelines.bands import matched, model_bands, scene_bands
from pipelines.label_scene import source_of

Unit = Literal["mm", "pixel"]

NO_CLASS = 255
"""In a map of class indices: the scene has no value there."""


@dataclass(frozen=True)
class Case:
    """A held-out scan or X-ray picture and its reference."""

    scene: VolumeScene | XrayScene
    labels: VolumeLabels | XrayLabels

    @property
    def unit(self) -> Unit:
        """Of distances in it."""
        return "mm" if isinstance(self.scene, VolumeScene) or self.scene.grid.unit == "mm" else "pixel"


@dataclass(frozen=True)
class Row:
    """What one class of one case is judged by.

    Attributes:
        case, patient: Pseudonyms.
        value, name: Of the class.
        scores: Its numbers; where the unit is a pixel, what is called mm in them counts pixels.
        unit: Of distances: a pixel where nobody knows how large one is.
        axes: 2 of a picture, which has no volume: what is called ml in its scores tells no more than whether there is anything.
    """

    case: str
    patient: str
    value: int
    name: str
    scores: CaseScores
    unit: Unit = "mm"
    axes: int = 3


Look = Callable[[VolumeScene, NDArray[np.int64], NDArray[np.int64]], None]
"""Is shown a scan with the class numbers predicted and those of the reference, in the order of the file."""


def held_out_cases(scenes: Iterable[str], pairs: Sequence[tuple[Scene, LabelMap]]) -> list[Case]:
    """The volumes and pictures among the scenes of some tiles, with their labels; in a fixed order."""
    wanted = set(scenes)
    cases = []
    for scene, found in pairs:
        labels = found.labels if isinstance(found, WithoutSome) else found
        if scene.name in wanted and isinstance(scene, VolumeScene | XrayScene) and isinstance(labels, VolumeLabels | XrayLabels):
            cases.append(Case(scene, labels))
    return sorted(cases, key=lambda case: case.scene.name)


@dataclass(frozen=True)
class Judge:
    """Judges a model case by case.

    Attributes:
        about: How the model is fed, its classes in the order of the scores.
        overlap: Of neighbouring crops.
        bands: How a scene's channels are found among the model's.
        batch_size: Crops that are predicted at once.
        settings: Of the scores.
        parallel: The processes divide the cases among them.
    """

    about: Description
    overlap: float
    bands: BandSettings
    batch_size: int
    settings: CaseSettings
    parallel: Parallel

    def rows(self, model: Segmenter, cases: Sequence[Case], look: Look | None = None) -> list[Row]:
        """Rows of all cases, the same in every process.

        Raises:
            SceneError: A file cannot be read any more.
        """
        values = [value for value, _ in self.about.classes]
        judged = [(value, name) for value, name in self.about.classes if value != 0]
        found = torch.zeros(len(cases), len(judged), len(NAMES), dtype=torch.float64)
        for number in range(self.parallel.rank, len(cases), self.parallel.world):
            case = cases[number]
            predicted, reference = self.predicted(model, case.scene), case.labels.native().astype(np.int64)
            scores = judge_case(predicted, reference, spacing_of(case.scene), values, self.settings)
            for place, (value, _) in enumerate(judged):
                found[number, place] = torch.tensor([getattr(scores[value], name) for name in NAMES], dtype=torch.float64)
            if look is not None and isinstance(case.scene, VolumeScene):
                look(case.scene, predicted, reference)
        every = self.parallel.sum(found.to(self.parallel.device)).cpu()
        return [
            Row(
                *(case.scene.name, case.scene.group, value, name, CaseScores(*every[number, place].tolist())),
                unit=case.unit,
                axes=len(case.scene.grid.space),
            )
            for number, case in enumerate(cases)
            for place, (value, name) in enumerate(judged)
        ]

    def predicted(self, model: Segmenter, scene: VolumeScene | XrayScene) -> NDArray[np.int64]:
        """Class numbers on the lattice of the scene's first file, in its order; -1 where the scene has no value."""
        about = self.about
        places = about.model_copy(update={"classes": tuple((place, name) for place, (_, name) in enumerate(about.classes))})
        labeller = Labeller(model, places, self.overlap, NO_CLASS, self.batch_size)
        names = matched(model_bands(about), scene_bands(scene), self.bands).names
        native = scene.native(labeller.label(source_of(scene, names)))
        numbers = np.full(NO_CLASS + 1, -1, np.int64)
        numbers[: len(about.classes)] = [value for value, _ in about.classes]
        return numbers[native]


def spacing_of(scene: VolumeScene | XrayScene) -> tuple[float, ...]:
    """Millimetres between voxels along the axes of the scene's first file; 1 where nobody knows how large a pixel is."""
    if isinstance(scene, XrayScene):
        return scene.spacing
    return tuple(float(size) for size in scene.header.grid.spacing)


def plain_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows as JSON and CSV hold them: a value that there is none of is None."""
    return [
        {"case": row.case, "patient": row.patient, "class": row.value, "name": row.name, "state": row.scores.state}
        | {"unit": row.unit, "axes": row.axes}
        | {name: None if math.isnan(value) else value for name, value in vars(row.scores).items()}
        for row in rows
    ]


def rows_from(plain: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows that `plain_rows` gave."""
    return [
        Row(
            str(row["case"]),
            str(row["patient"]),
            int(row["class"]),
            str(row["name"]),
            CaseScores(*(math.nan if row[name] is None else float(row[name]) for name in NAMES)),
            row.get("unit", "mm"),
            int(row.get("axes", 3)),
        )
        for row in plain
    ]


IN_PIXELS = {"hd95_mm": "hd95_pixels", "nsd": "nsd_pixels"}
"""What a score is called where distances are counted in pixels."""
COLUMNS = ("arm", "seed", "case", "patient", "class", "name", "state", *NAMES, *IN_PIXELS.values())
"""Of `cases.csv`."""


def table_of(found: Mapping[tuple[str, int], Sequence[Row]]) -> dict[str, list[str]]:
    """Columns of `cases.csv` as texts, from the rows by arm and seed; numbers with six digits, nothing where there is no value."""
    rows = [{"arm": arm, "seed": seed, **_named(row)} for (arm, seed), own in found.items() for row in plain_rows(own)]
    return {name: [_text(row.get(name)) for row in rows] for name in COLUMNS}


def write_csv(path: Path, columns: Mapping[str, Sequence[str]]) -> None:
    """Write a table, whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    aside.replace(path)


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in which every number stands under its own unit: a picture has no volume, and none in mm where nobody knows its pixels."""
    names = IN_PIXELS if row["unit"] == "pixel" else {}
    return {names.get(name, name): value for name, value in row.items() if row["axes"] == 3 or not name.endswith("_ml")}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
