"""Where a body is in a volume, and how bright it is: what turns arbitrary MRI units into a z-score or a share of its range."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

AIR_LEVEL = 0.1
"""Air is darker than this share of the way from the 0.1 to the 99 percentile."""
ENDS = (0.5, 99.5)
"""Percentiles between which the values of a body are taken for its own."""
PART = 1 << 20
AIR_BORDER_FRACTION = 0.1
"""A dark region is air only if it covers at least this share of the volume's border."""


def foreground(values: NDArray[Any], known: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """True where there is a body, False where there is air, for an array of any number of axes.

    Air is dark (below `AIR_LEVEL` of the way from the 0.1 to the 99 percentile of finite values), is connected to the
    border of the volume through dark voxels that share a face, and covers `AIR_BORDER_FRACTION` of that border. So a dark
    ventricle is no air, the zeros of a skull-stripped brain are, and a crop from inside a head has none: there, dark fluid
    touches the border in patches of up to 7 % of it, while air around a head or a brain covers more than 90 %.
    A voxel that is not finite lets air pass and is itself never foreground.

    Args:
        values: Of which the sign is such that air is dark.
        known: Where values are looked at, the others being neither air nor body nor a way for air; None: everywhere.
    """
    finite = np.isfinite(values)
    counted = finite if known is None else finite & known
    if not counted.any():
        return np.asarray(counted)
    chosen = values if counted.all() else values[counted]
    low, high = (float(v) for v in np.percentile(chosen, (0.1, 99.0)))
    if high <= low:
        high = float(chosen.max())
    del chosen  # as large as the volume, and so is what comes next
    dark = values < low + AIR_LEVEL * (high - low)
    dark |= ~finite
    if known is not None:
        dark &= known
    regions, num_regions = ndimage.label(dark)
    del dark
    border = np.ones(values.shape, dtype=bool)
    border[tuple(slice(1, -1) for _ in values.shape)] = False
    share = np.bincount(regions[border], minlength=num_regions + 1) / np.count_nonzero(border)
    del border
    is_air = share >= AIR_BORDER_FRACTION
    is_air[0] = False
    body = is_air[regions]
    np.logical_not(body, out=body)
    body &= counted
    return np.asarray(body)


def robust_mean_std(values: NDArray[Any]) -> tuple[float, float]:
    """Mean and standard deviation of finite `values` between their 0.5 and 99.5 percentile; the deviation of a constant is 0.

    Works through them in parts, since a volume in 64 bits may be eight times as large as it is stored.
    """
    low, high = np.percentile(values, ENDS)
    flat = values.reshape(-1)
    parts = [flat[start : start + PART] for start in range(0, flat.size, PART)]
    cores = [part[(part >= low) & (part <= high)] for part in parts]
    count = sum(core.size for core in cores)
    mean = sum(float(core.sum(dtype=np.float64)) for core in cores) / count
    std = np.sqrt(sum(float(np.square(core - mean, dtype=np.float64).sum()) for core in cores) / count)
    return mean, 0.0 if std <= 1e-7 * abs(mean) else float(std)


def ends(values: NDArray[Any]) -> tuple[float, float]:
    """The 0.5 and the 99.5 percentile of finite `values`, both among the values themselves."""
    low, high = np.percentile(values, ENDS[0], method="lower"), np.percentile(values, ENDS[1], method="higher")
    return float(low), float(high)


def num_classes(values: NDArray[Any], limit: int = 16) -> int | None:
    """Number of distinct values where they are whole and at most `limit`, as in a label map; None for an image.

    A few thousand voxels settle it for an image; all of them are looked at only where those leave it open.
    """
    flat = values.reshape(-1)
    sample = flat[:: max(1, flat.size // 4096)]
    for part in (sample, flat):
        distinct = np.unique(part)
        if len(distinct) > limit or not np.isfinite(distinct).all() or (distinct != np.rint(distinct)).any():
            return None
    return len(distinct)
