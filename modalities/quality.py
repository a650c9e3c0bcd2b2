"""Per-voxel quality flags. Zero is good; every bit names one reason not to count a voxel."""

from __future__ import annotations

from enum import IntFlag


class Quality(IntFlag):
    """Bits of the `quality` array (uint8) that every scene delivers beside its pixels.

    All bits but `BACKGROUND` mean that there is no trustworthy value: the voxel is fed as zero and counts nowhere.
    `BACKGROUND` (air around a body) is a true value that is fed, but is in no statistic and no pretraining loss.
    """

    GOOD = 0
    NODATA = 1
    NOT_FINITE = 2
    OUTSIDE = 4
    """Outside the footprint or the field of view, for instance where a resampled volume has no source."""
    PADDING = 8
    """Added to fill a tile; set by the tile writer, never by an adapter."""
    SATURATED = 16
    CLOUD = 32
    """Cloud, cloud shadow or cirrus, by a class map or mask that came with the scene."""
    EXCLUDED = 64
    """Left out by choice: the border by which clouds are widened, a defaced face."""
    BACKGROUND = 128


NO_VALUE = 255 & ~int(Quality.BACKGROUND)
"""The bits under which the stored value means nothing and is replaced by zero before it is fed."""
