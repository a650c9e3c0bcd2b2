"""How well one case is segmented, class by class, as radiologists ask: Dice, HD95, NSD, volumes and lesions, in millimetres.

A case is one scan at its native resolution, in any number of axes up to three. Dice, HD95 and NSD are MONAI's numbers
(`compute_dice`, `compute_hausdorff_distance` with percentile 95 and both directions, `compute_surface_dice` over boundary voxels).

What holds where a class is empty (after Metrics Reloaded, Maier-Hein et al. 2024, and the BraTS challenges):

| reference | prediction | state      | Dice, NSD, lesion F1 | HD95                | volume error       | in the means             |
|-----------|------------|------------|----------------------|---------------------|--------------------|--------------------------|
| present   | present    | `both`     | measured             | measured            | measured           | yes                      |
| present   | empty      | `missed`   | 0                    | image diagonal, mm  | relative: -1       | yes, and counted apart   |
| empty     | present    | `invented` | 0                    | image diagonal, mm  | relative: none     | yes, and counted apart   |
| empty     | empty      | `absent`   | none                 | none                | none               | in no mean, counted apart|

MONAI gives nan or infinity for the distances of the last three rows and 1 for Dice of the last one where it is told to.
A value that there is none of is nan here and an empty cell in a table, never a number that stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from jaxtyping import Bool, Integer
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage
from scipy.spatial import KDTree

from mae_core.settings import Settings

ROUNDING_MM = 1e-4
"""A header may say 1.0000001 mm where 1 mm is meant; a tolerance of 1 mm is not to miss every neighbour for that."""

State = Literal["both", "missed", "invented", "absent"]


class CaseSettings(Settings):
    """How cases are judged."""

    nsd_tolerance_mm: float = Field(
        1.0, ge=0, description="Distance up to which a boundary voxel is right in NSD (surface Dice); pixels in a picture of unknown size"
    )
    lesion_neighbours: Literal["corners", "faces"] = Field(
        "corners", description="Voxels of one lesion touch by a corner at least (26 neighbours in 3-D), or by a face (6)"
    )
    lesion_overlap_fraction: float = Field(
        0.0, ge=0, lt=1, description="A lesion counts as hit when more than this share of its voxels, and one at least, is hit"
    )
    num_resamples: int = Field(2000, ge=100, description="Of patients, for the intervals")
    confidence: float = Field(0.95, gt=0, lt=1, description="Of the intervals")
    seed: int = Field(0, ge=0, description="Of the resampling")


@dataclass(frozen=True)
class CaseScores:
    """What one class of one case is judged by; nan where there is no such value (see the table above).

    Attributes:
        dice: Twice the voxels in common over the voxels of both.
        hd95_mm: Of each boundary the 95th percentile of the distances to the other; the larger of the two.
        nsd: Share of the voxels of both boundaries that are no further than the tolerance from the other.
        reference_ml, predicted_ml: Volumes.
        volume_error_ml: Predicted less reference.
        volume_error_relative: The same over the reference.
        reference_lesions, predicted_lesions: Connected components.
        lesion_precision: Share of predicted lesions that hit the reference; nan where nothing is predicted.
        lesion_recall: Share of reference lesions that are hit; nan where the reference is empty.
        lesion_f1: Harmonic mean of both; 0 where one of them has no value.
    """

    dice: float
    hd95_mm: float
    nsd: float
    reference_ml: float
    predicted_ml: float
    volume_error_ml: float
    volume_error_relative: float
    reference_lesions: float
    predicted_lesions: float
    lesion_precision: float
    lesion_recall: float
    lesion_f1: float

    @property
    def state(self) -> State:
        """Which row of the table holds."""
        if self.reference_ml > 0:
            return "both" if self.predicted_ml > 0 else "missed"
        return "invented" if self.predicted_ml > 0 else "absent"


NAMES: tuple[str, ...] = tuple(field.name for field in fields(CaseScores))
"""Of the scores, in the order in which they are written."""


def judge_case(
    predicted: Integer[np.ndarray, "*space"],
    reference: Integer[np.ndarray, "*space"],
    spacing_mm: Sequence[float],
    values: Sequence[int],
    settings: CaseSettings,
) -> dict[int, CaseScores]:
    """Scores of some classes.

    Args:
        predicted, reference: Class numbers on one lattice. Voxels whose reference is not among `values` have no label and belong to
            nothing, in both.
        spacing_mm: Of the lattice.
        values: Class numbers that count; 0 is background, which is not judged.
        settings: How.

    Raises:
        ValueError: The arrays are not of one shape, or the spacing is not that of their axes.
    """
    if predicted.shape != reference.shape or len(spacing_mm) != reference.ndim:
        raise ValueError(f"predicted {predicted.shape}, reference {reference.shape} and spacing {tuple(spacing_mm)} do not fit each other")
    counted = np.isin(reference, list(values))
    return {value: judge((predicted == value) & counted, reference == value, spacing_mm, settings) for value in values if value != 0}


def judge(
    predicted: Bool[np.ndarray, "*space"], reference: Bool[np.ndarray, "*space"], spacing_mm: Sequence[float], settings: CaseSettings
) -> CaseScores:
    """Scores of one class. Only the box around both objects is looked at, which changes no number."""
    sizes = [int(np.count_nonzero(part)) for part in (reference, predicted)]
    voxel_ml = math.prod(spacing_mm) / 1000
    reference_ml, predicted_ml = (size * voxel_ml for size in sizes)
    none = math.nan
    if not any(sizes):
        return CaseScores(none, none, none, 0.0, 0.0, none, none, 0.0, 0.0, none, none, none)
    box = around(reference | predicted)
    reference_part, predicted_part = reference[box], predicted[box]
    hit = int(np.count_nonzero(reference_part & predicted_part))
    if all(sizes):
        hd95_mm, nsd = distances(predicted_part, reference_part, spacing_mm, settings.nsd_tolerance_mm)
    else:
        hd95_mm, nsd = diagonal_mm(reference.shape, spacing_mm), 0.0
    found, num_reference = hits(reference_part, predicted_part, settings)
    right, num_predicted = hits(predicted_part, reference_part, settings)
    recall = found / num_reference if num_reference else none
    precision = right / num_predicted if num_predicted else none
    both = recall + precision
    return CaseScores(
        dice=2 * hit / sum(sizes),
        hd95_mm=hd95_mm,
        nsd=nsd,
        reference_ml=reference_ml,
        predicted_ml=predicted_ml,
        volume_error_ml=predicted_ml - reference_ml,
        volume_error_relative=sizes[1] / sizes[0] - 1 if sizes[0] else none,
        reference_lesions=float(num_reference),
        predicted_lesions=float(num_predicted),
        lesion_precision=precision,
        lesion_recall=recall,
        lesion_f1=2 * recall * precision / both if both > 0 else 0.0,
    )


def around(present: Bool[np.ndarray, "*space"]) -> tuple[slice, ...]:
    """The smallest box that holds all voxels; there is at least one."""
    axes = range(present.ndim)
    lines = [np.asarray(present.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    return tuple(slice(int(line.argmax()), len(line) - int(line[::-1].argmax())) for line in lines)


def largest(present: Bool[np.ndarray, "*space"]) -> Bool[np.ndarray, "*space"]:
    """The largest connected component, corners touching; the first of several."""
    numbered, count = ndimage.label(present, structure=np.ones((3,) * present.ndim))
    return np.asarray(numbered == np.bincount(numbered.ravel())[1:].argmax() + 1) if count else present


def distances(
    predicted: Bool[np.ndarray, "*space"], reference: Bool[np.ndarray, "*space"], spacing_mm: Sequence[float], tolerance_mm: float
) -> tuple[float, float]:
    """HD95 in mm and NSD of two objects that both exist.

    A boundary is the voxels of an object with a face to what is none of it, or to the end of the image. MONAI's functions give the
    same numbers (tested) and look for the nearest voxels once for each of the two.
    """
    one, other = (boundary(part) * np.asarray(spacing_mm, dtype=np.float64) for part in (predicted, reference))
    there, back = KDTree(other, leafsize=32).query(one)[0], KDTree(one, leafsize=32).query(other)[0]
    near = sum(int(np.count_nonzero(part <= tolerance_mm + ROUNDING_MM)) for part in (there, back))
    return float(max(np.percentile(there, 95), np.percentile(back, 95))), near / (len(there) + len(back))


def boundary(present: Bool[np.ndarray, "*space"]) -> Integer[np.ndarray, "voxel axis"]:
    """Indices of the voxels of an object that have a face to something else."""
    inner: NDArray[np.bool_] = ndimage.binary_erosion(present)
    return np.argwhere(present & ~inner)


def diagonal_mm(space: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Length of the diagonal of an image: no two of its voxels are further apart."""
    return math.hypot(*(size * spacing for size, spacing in zip(space, spacing_mm, strict=True)))


def hits(lesions: Bool[np.ndarray, "*space"], other: Bool[np.ndarray, "*space"], settings: CaseSettings) -> tuple[int, int]:
    """How many connected components of `lesions` are hit by `other`, and how many there are."""
    touching = ndimage.generate_binary_structure(lesions.ndim, lesions.ndim if settings.lesion_neighbours == "corners" else 1)
    numbered: NDArray[np.int32]
    numbered, count = ndimage.label(lesions, structure=touching)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    shared = np.bincount(numbered[other], minlength=count + 1)[1:]
    return int(np.count_nonzero((shared > 0) & (shared > settings.lesion_overlap_fraction * sizes))), int(count)
