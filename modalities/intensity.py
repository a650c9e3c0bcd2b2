"""Where a body is in a volume, and how bright it is: what turns arbitrary MRI units into a z-score."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

AIR_LEVEL = 0.1
"""Air is darker than this share of the way from the 0.1 to the 99 percentile."""
AIR_BORDER_FRACTION = 0.1
"""A dark region is air only if it covers at least this share of the volume's border."""


def foreground(values: NDArray[Any]) -> NDArray[np.bool_]:
    """True where there is a body, False where there is air, for an array of any number of axes.

    Air is dark (below `AIR_LEVEL` of the way from the 0.1 to the 99 percentile of finite values), is connected to the
    border of the volume through dark voxels that share a face, and covers `AIR_BORDER_FRACTION` of that border. So a dark
    ventricle is no air, the zeros of a skull-stripped brain are, and a crop from inside a head has none: there, dark fluid
    touches the border in patches of up to 7 % of it, while air around a head or a brain covers more than 90 %.
    A voxel that is not finite lets air pass and is itself never foreground.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return np.asarray(finite)
    known = values[finite]
    low, high = (float(v) for v in np.percentile(known, (0.1, 99.0)))
    if high <= low:
        high = float(known.max())
    dark = ~finite | (values < low + AIR_LEVEL * (high - low))
    regions, num_regions = ndimage.label(dark)
    border = np.ones(values.shape, dtype=bool)
    border[tuple(slice(1, -1) for _ in values.shape)] = False
    share = np.bincount(regions[border], minlength=num_regions + 1) / np.count_nonzero(border)
    is_air = share >= AIR_BORDER_FRACTION
    is_air[0] = False
    return np.asarray(finite & ~is_air[regions], dtype=np.bool_)


def robust_mean_std(values: NDArray[Any]) -> tuple[float, float]:
    """Mean and standard deviation of finite `values` between their 0.5 and 99.5 percentile; the deviation of a constant is 0."""
    low, high = np.percentile(values, (0.5, 99.5))
    core = values[(values >= low) & (values <= high)].astype(np.float64)
    mean, std = float(core.mean()), float(core.std())
    return mean, 0.0 if std <= 1e-7 * abs(mean) else std


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
