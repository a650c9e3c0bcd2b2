"""Which volumes of a file that holds several become a scan: the first, the mean of all, or those of one b-value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from modalities.scene import SceneError

DEFAULT = "default"
FOUR_D = {DEFAULT: "reject", "T1w": "first", "T1ce": "first", "T2w": "first", "PD": "first", "FLAIR": "first", "dwi": "b0"}
"""By sequence. A second volume of these is a repeat or another echo, so it is left out; a mean would blur where the head has moved."""
B_VALUE_TOLERANCE = 50.0
"""In s/mm²: scanners reach a shell within about so much, and a b0 of most of them is not exactly 0."""
_HOW = re.compile(r"reject|first|mean|b(\d+)")


def with_defaults(given: Mapping[str, str]) -> dict[str, str]:
    """What to do by sequence, where `given` leaves some out.

    Raises:
        ValueError: A word that is none.
    """
    for sequence, how in given.items():
        if not _HOW.fullmatch(how):
            raise ValueError(f"{sequence}: {how} is none of reject, first, mean, or b and a b-value in s/mm² (b0, b1000)")
    return FOUR_D | dict(given)


def chosen_volumes(file: Path, num_volumes: int, sequence: str, four_d: Mapping[str, str]) -> tuple[int, ...]:
    """Numbers of the volumes of which the scan is the mean, rising.

    Raises:
        SceneError: None is to be used, or the b-values beside the file do not say which.
    """
    if num_volumes == 1:
        return (0,)
    how, key = policy_of(sequence, four_d)
    found = _HOW.fullmatch(how)
    if how == "reject" or found is None:
        raise SceneError(f"4-D with {num_volumes} volumes: split it, or set reader.four_d.{key} to first, mean or a b-value (b0)", "four_d")
    if how == "first":
        return (0,)
    if how == "mean":
        return tuple(range(num_volumes))
    return _of_b_value(_b_values(file, num_volumes), float(found[1]))


def policy_of(sequence: str, four_d: Mapping[str, str]) -> tuple[str, str]:
    """What is done with several volumes of a sequence, and under which key of the settings that stands."""
    key = sequence if sequence in four_d else DEFAULT
    return four_d[key], key


def chosen_moments(b_values: Sequence[float | None], sequence: str, four_d: Mapping[str, str]) -> tuple[int, ...]:
    """As `chosen_volumes`, of images at the same positions whose b-values stand in their headers; None where one says nothing.

    Raises:
        SceneError: None is to be used, or the b-values do not say which.
    """
    how, key = policy_of(sequence, four_d)
    if len(b_values) == 1 or how == "first":
        return (0,)
    if how == "mean":
        return tuple(range(len(b_values)))
    if how == "reject":
        raise SceneError(
            f"{len(b_values)} images at every position (moments or directions of diffusion); set reader.four_d.{key} to first, mean or b0",
            "time_series",
        )
    known = [value for value in b_values if value is not None]
    if len(known) < len(b_values):
        raise SceneError("diffusion without b-values in its headers; set reader.four_d.dwi to first or mean", "b_values_missing")
    return _of_b_value(known, float(how[1:]))


def _of_b_value(values: list[float], wanted: float) -> tuple[int, ...]:
    chosen = tuple(place for place, value in enumerate(values) if abs(value - wanted) <= B_VALUE_TOLERANCE)
    if not chosen:
        there = sorted({round(value) for value in values})
        raise SceneError(
            f"no volume here has a b-value within {B_VALUE_TOLERANCE:g} of {wanted:g} s/mm²; there are {there[:12]}; set reader.four_d.dwi",
            "b_value_absent",
        )
    return chosen


def _b_values(file: Path, num_volumes: int) -> list[float]:
    """Of the file of the same name that ends in .bval, one for each volume."""
    sidecar = file.with_name(re.sub(r"(?i)\.nii(\.gz)?$", "", file.name) + ".bval")
    if not sidecar.is_file():
        raise SceneError(
            f"4-D with {num_volumes} volumes and no .bval file beside it; give one, or set reader.four_d.dwi to first or mean",
            "b_values_missing",
        )
    words = sidecar.read_bytes()[: 1 << 20].split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    if len(values) != num_volumes or not np.isfinite(values).all() or min(values) < 0:
        raise SceneError(
            f"the .bval file beside it has {len(words)} words and not one b-value for each of {num_volumes} volumes; repair it",
            "b_values_broken",
        )
    return values
