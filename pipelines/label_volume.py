"""One scan becomes label files on its own lattice: class numbers, what they are called, and on demand probabilities, a sheet, DICOM-SEG."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.bands import Matching
from mae_core.case_sheet import PALETTE, CasePicture, Rgb, case_sheet
from mae_core.export import Description
from mae_core.figures import read_picture, save_picture
from mae_core.labelling import Source
from mae_core.tracking import Tracker
from modalities.dicom_seg import refuse_no_dicom, write_dicom_seg
from modalities.patients import RESEARCH_USE
from modalities.volume import VolumeScene, canonical
from pipelines.label_job import STEPS, Job, Labelled, Stored


def label_volume(
    job: Job, scene: VolumeScene, source: Source, matching: Matching, place: Path, progress: Callable[[int], None]
) -> Labelled:
    """Label a scan, which is held in memory.

    Raises:
        SceneError: It cannot be read, or the files not written.
    """
    about = job.labeller.description
    known = dict(about.classes)
    if job.dicom_seg:
        refuse_no_dicom(scene.sources[0])
    labels = np.empty(source.space, np.uint8)
    wanted = job.probabilities != "none"
    chances = np.empty((len(about.classes) if wanted else 0, *source.space), np.uint8 if job.probabilities == "uint8" else np.float32)
    for band in job.labeller.bands(source, slice(0, source.space[-1])):
        labels[band.window] = band.labels
        if wanted:
            chances[(slice(None), *band.window)] = in_volume(band.probabilities, job.probabilities)
        progress(band.window[0].stop * (labels.size // len(labels)))
    scene.write_labels(place, labels, job.labeller.no_label)
    write_names(job, scene, place)
    if wanted:
        scene.write_probabilities(beside(place, "_probabilities.nii.gz"), chances, 1 / STEPS if job.probabilities == "uint8" else 1.0)
    if job.dicom_seg:
        write_dicom_seg(beside(place, "_seg.dcm"), scene.sources[0], scene.native(labels), about.classes, job.software)
    if job.sheets:
        sheet = case_sheet(picture_of(scene, about, scene.native(labels)))
        save_picture(sheet, beside(place, "_sheet.png"))
        if job.show is not None:
            job.show(scene.name, sheet)
    values, numbers = np.unique(labels, return_counts=True)
    return Labelled({known.get(int(value), "no value"): int(number) for value, number in zip(values, numbers, strict=True)}, matching)


def beside(place: Path, ending: str) -> Path:
    """Name of another file that belongs to a label file."""
    return place.with_name(place.name.removesuffix(".nii.gz").removesuffix("_labels") + ending)


def in_volume(probabilities: NDArray[np.float32], how: Stored) -> NDArray[np.float32 | np.uint8]:
    """Probabilities as they are stored: fp32, NaN where the scan has no value, or bytes in parts of `STEPS`, 0 in all classes there."""
    if how == "float32":
        return probabilities
    return np.rint(np.nan_to_num(probabilities, nan=0.0) * STEPS).astype(np.uint8)


def write_names(job: Job, scene: VolumeScene, place: Path) -> None:
    """Write what the numbers of a label file mean beside it.

    A table with index, name and colour, as BIDS has it for a `dseg`, and a JSON file with the model, its classes and what it is for.
    """
    about = job.labeller.description
    colours = class_colours(about)
    stem = place.name.removesuffix(".nii.gz")
    rows = [(value, name, "#{:02x}{:02x}{:02x}".format(*colours[value])) for value, name in about.classes if value in colours]
    if job.labeller.no_label not in dict(about.classes):
        rows.insert(0, (job.labeller.no_label, "no value", "#000000"))
    with place.with_name(f"{stem}.tsv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(("index", "name", "color"))
        writer.writerows(rows)
    facts: dict[str, Any] = {
        "Description": "class of every voxel, on the lattice of the scan",
        "Scan": scene.name,
        "Manual": False,
        "Classes": {str(value): name for value, name in about.classes},
        "NoLabel": job.labeller.no_label,
        "Model": job.model if job.model.startswith("models:/") else "",
        "ModelWeightsSha256": job.weights,
        "Software": job.software,
        "Use": RESEARCH_USE,
    }
    place.with_name(f"{stem}.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sheet(
    about: Description, folder: Path, scene: VolumeScene, predicted: NDArray[np.integer[Any]], reference: NDArray[np.integer[Any]]
) -> None:
    """Write the sheet of a held-out scan under its pseudonym."""
    save_picture(case_sheet(picture_of(scene, about, predicted, reference)), folder / f"{scene.name}.png")


def log_sheets(tracker: Tracker, folder: Path, scenes: Iterable[str], step: int) -> None:
    """Log the sheets that `write_sheet` left in a folder, whichever process wrote them, where pictures of patients are asked for."""
    for name in scenes if tracker.images else ():
        log_sheet(tracker, step, name, read_picture(folder / f"{name}.png"))


def log_sheet(tracker: Tracker, step: int, scene: str, sheet: NDArray[np.uint8]) -> None:
    """Log the sheet of a scan under its pseudonym, where pictures of patients are asked for."""
    tracker.image(f"sheet/{scene}", sheet, step)


def class_colours(about: Description) -> dict[int, Rgb]:
    """Colour of each class: the model's where it has some, else of the palette; class 0 is black."""
    if about.colours:
        return {value: colour for (value, _), colour in zip(about.classes, about.colours, strict=True)}
    shown = [value for value, _ in about.classes if value != 0]
    return {0: (0, 0, 0)} | {value: PALETTE[number % len(PALETTE)] for number, value in enumerate(shown)}


def picture_of(
    scene: VolumeScene, about: Description, predicted: NDArray[np.integer[Any]], reference: NDArray[np.integer[Any]] | None = None
) -> CasePicture:
    """A scan at its native resolution with class numbers in the order of its first file, all turned to RAS+."""
    header = scene.header
    volume = canonical(scene.sources[0], header, scene.readings[0])
    sign = -1.0 if header.slope < 0 else 1.0
    return CasePicture(
        title=scene.name,
        image=np.where(volume.finite, volume.stored, np.nan).astype(np.float32) * np.float32(sign),
        predicted=header.to_canonical(predicted).astype(np.int64),
        reference=None if reference is None else header.to_canonical(reference).astype(np.int64),
        spacing_mm=tuple(float(size) for size in header.canonical.spacing),
        names=dict(about.classes),
        colours=class_colours(about),
    )
