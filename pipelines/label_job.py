"""What the labelling of all scenes of a call has in common, and what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mae_core.bands import BandSettings, Matching
from mae_core.labelling import Labeller

STEPS = 250
"""Probabilities in bytes are in parts of this; 255 says that there is none."""

Stored = Literal["none", "uint8", "float32"]
"""How probabilities are written."""


@dataclass(frozen=True)
class Job:
    """What all scenes of a call have in common.

    Attributes:
        labeller: Labels them.
        weights: Digest of the model's weights.
        model: Its registered version or the name of its run.
        bands: How the channels of a scene are found among the model's.
        probabilities: How they are written beside the labels.
        sheets: Whether a picture of every scan is written beside its labels.
        dicom_seg: Whether the labels of DICOM series are written as DICOM-SEG, too.
        show: Is given every such picture with the pseudonym of its scan.
        compress: Of rasters.
        memory_bytes: For the rows that are at work; wider scenes are labelled in strips of columns.
        software: Name and version of this program.
    """

    labeller: Labeller
    weights: str
    model: str
    bands: BandSettings
    probabilities: Stored
    compress: Literal["deflate", "zstd"]
    memory_bytes: int
    software: str
    sheets: bool = False
    dicom_seg: bool = False
    show: Callable[[str, NDArray[np.uint8]], None] | None = None


@dataclass(frozen=True)
class Labelled:
    """What became of a scene.

    Attributes:
        counts: Voxels by class name.
        rows: Rows that were there already, by an earlier call with the same model, data and settings.
        is_kept: Whether all of it was.
        matching: Which of its channels was fed as which.
    """

    counts: dict[str, int]
    matching: Matching
    rows: int = 0
    is_kept: bool = False
