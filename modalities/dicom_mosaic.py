"""The slices of a Siemens mosaic: a picture that holds those of a volume side by side; where each lies and is to be cut.

Geometry as in nibabel's notes on DICOM mosaics: the position in the header is that of a picture as large as the mosaic around
the same centre, so it is moved to where the first slice begins; number and normal of the slices stand in the private CSA header.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.dicom_facts import Frame, StoredPixels
from modalities.dicom_values import MISREAD, number_of
from modalities.scene import SceneError


def mosaic_frames(dataset: Any, whole: Frame, csa_header: Any, layout: StoredPixels) -> tuple[Frame, ...]:
    """The slices of a mosaic in the order in which they lie in it.

    Raises:
        SceneError: The private header is gone or does not fit; nothing of it is told.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel says here that its readers are experimental; of them, only that of the CSA header is used
        from nibabel.nicom import csareader
    try:
        tags = csareader.read(csa_header)["tags"]
        count = int(tags["NumberOfImagesInMosaic"]["items"][0])
        normal = np.array([float(part) for part in tags["SliceNormalVector"]["items"]])
    except (*MISREAD, csareader.CSAError):
        count, normal = 0, np.zeros(0)
    distance = number_of(dataset, "SpacingBetweenSlices") or number_of(dataset, "SliceThickness")
    across = mosaic_side(count)
    if count < 1 or normal.shape != (3,) or layout.rows % across or layout.columns % across or distance <= 0:
        raise SceneError("a mosaic whose private header with number and direction of its slices is missing; export it again", "mosaic")
    if whole.position is None or whole.orientation is None or whole.spacing is None:
        return tuple(replace(whole, number=k) for k in range(count))
    sizes = np.array([layout.columns, layout.rows], float)
    lost = (sizes - sizes / across) / 2 * whole.spacing
    corner = np.array(whole.position) + lost @ np.reshape(whole.orientation, (2, 3))
    return tuple(replace(whole, number=k, position=tuple((corner + k * distance * normal).tolist())) for k in range(count))


def mosaic_side(count: int) -> int:
    """Slices along a side of the square."""
    return max(1, int(np.ceil(np.sqrt(count))))


def cut(picture: NDArray[np.generic], count: int) -> NDArray[np.generic]:
    """The slices `(slice, row, column)` of a picture `(row, column)` that holds `count` of them, row by row."""
    across = mosaic_side(count)
    rows, columns = picture.shape[0] // across, picture.shape[1] // across
    tiles = picture.reshape(across, rows, across, columns).swapaxes(1, 2).reshape(-1, rows, columns)
    return tiles[:count]
