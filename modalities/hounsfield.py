"""CT in Hounsfield units: the values of a scan, what lies beyond its field of view, and where the body is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

LEAST_HU = -1500.0
"""No tissue, no air and hardly a streak lies below: scanners fill what lies beyond the circle that they saw with -2000, -3024 or -32768."""
TISSUE_HU = -500.0
"""Halfway between air and water: what is darker may be air."""
AIR_HU = -900.0
"""A dark region whose mean lies above is lung or bowel and no air around a body."""
SMALL_FRACTION = 0.02
"""What is not air and hangs together is no body if it is smaller than this share of the largest such part: a table, a tube, a cushion."""
_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[:, 1, 1] = _IN_PLANE[1, :, 1] = True


def hounsfield(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """Finite stored values in HU: int16 where all are whole (what no tissue has is cut to the ends of its range), else float32."""
    exact = stored.dtype.kind in "iu" and slope == round(slope) and intercept == round(intercept)
    narrow = exact and stored.dtype.itemsize <= 2 and abs(slope) <= 1 << 14 and abs(intercept) <= 1 << 30
    wide: NDArray[Any] = stored.astype(np.int32 if narrow else np.float64)
    wide *= int(slope) if narrow else slope
    wide += int(intercept) if narrow else intercept
    np.clip(wide, -32768, 32767, out=wide)
    return wide.astype(np.int16 if exact or np.array_equal(wide, np.rint(wide)) else np.float32)


def ct_body(values: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True where there is a body, for values `(x, y, z)` in HU, z being the axis along the body.

    Air is darker than `TISSUE_HU`, is connected to the border of its plane through dark voxels of that plane, and has a mean below
    `AIR_HU`. So lungs that end where the volume ends are no air, nor is a crop from inside a lung. What is not known lets air pass and
    is no body. Of what is left, parts that are smaller than `SMALL_FRACTION` of the largest are no body either; a table that touches
    the patient stays.
    """
    dark = ~known | (values < TISSUE_HU)
    regions, num_regions = ndimage.label(dark, _IN_PLANE)
    at_border = np.zeros(num_regions + 1, dtype=bool)
    for edge in (regions[0], regions[-1], regions[:, 0], regions[:, -1]):
        at_border[np.unique(edge)] = True
    counts = np.bincount(regions[known], minlength=num_regions + 1)
    sums = np.bincount(regions[known], weights=values[known], minlength=num_regions + 1)
    is_air = at_border & (sums <= AIR_HU * counts)
    is_air[0] = False
    body = known & ~is_air[regions]
    parts, num_parts = ndimage.label(body)
    sizes = np.bincount(parts.reshape(-1), minlength=num_parts + 1)
    sizes[0] = 0
    is_body = sizes >= SMALL_FRACTION * sizes.max()
    is_body[0] = False
    return np.asarray(is_body[parts], dtype=np.bool_)


def looks_like_ct(physical: NDArray[Any]) -> bool:
    """Whether finite values have what CT in HU has and MRI has not: some at -900 or below, and the most frequent ones near -1000."""
    if physical.min() > AIR_HU:
        return False
    counts, edges = np.histogram(physical, bins=np.arange(-1550, 1551, 100))
    place = int(counts.argmax())
    return bool(edges[place] >= -1150 and edges[place] <= -950)
