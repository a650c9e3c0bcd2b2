"""How the stored values of a scan are read: what they become, to what they are cut, which voxels are body, out of view or left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modalities.beside import MOST_DEFACED, Marks
from modalities.hounsfield import LEAST_HU, ct_body, hounsfield
from modalities.intensity import foreground
from modalities.nifti_file import VolumeHeader
from modalities.scene import SceneError


@dataclass(frozen=True)
class Canonical:
    """The voxels of a scan in RAS+ order.

    Attributes:
        stored: As stored, with 0 for what is not finite.
        finite: Where there is a number.
        outside: Where the scanner did not look; None for nowhere.
        excluded: What is left out by choice; None for nothing.
        body: What is not air, out of view or left out.
    """

    stored: NDArray[np.generic]
    finite: NDArray[np.bool_]
    outside: NDArray[np.bool_] | None
    excluded: NDArray[np.bool_] | None
    body: NDArray[np.bool_]

    @property
    def known(self) -> NDArray[np.bool_]:
        """Where there is a value that may be used."""
        return _without(self.finite, self.outside, self.excluded)


@dataclass(frozen=True)
class Reading:
    """What becomes of the stored values of a scan.

    Attributes:
        kind: `mri` leaves them as they are; `ct` turns them into HU.
        low, high: What comes out is cut to these.
        defaced, anatomy: Files that mark voxels, if there are any.
    """

    kind: Literal["mri", "ct"]
    low: float = -np.inf
    high: float = np.inf
    defaced: Marks | None = None
    anatomy: Marks | None = None

    def sort(self, stored: NDArray[Any], like: VolumeHeader, source: VolumeHeader) -> Canonical:
        """What each voxel is, of values in the RAS+ order of `like`; those that are not finite become 0 in place.

        Raises:
            SceneError: A file that marks voxels has changed, is damaged, or marks what cannot be meant.
        """
        finite = np.isfinite(stored)
        outside = None
        if self.kind == "ct":
            least = (LEAST_HU - source.intercept) / source.slope
            outside = finite & (stored < least if source.slope > 0 else stored > least)
        excluded = None if self.defaced is None else self._defaced(self.defaced, like)
        if self.anatomy is not None:
            body = self.anatomy.read(like) & _without(finite, outside, excluded)
            stored[~finite] = 0
        elif self.kind == "ct":
            stored[~finite] = 0
            body = ct_body(hounsfield(stored, source.slope, source.intercept), _without(finite, outside, excluded))
        else:
            dark_air = stored if source.slope > 0 else -stored.astype(np.float32)
            body = foreground(dark_air, None if excluded is None else ~excluded)
            stored[~finite] = 0
        return Canonical(stored, finite, outside, excluded, body)

    def values(self, stored: NDArray[np.generic], source: VolumeHeader) -> NDArray[np.generic]:
        """What is resampled: HU of CT, else the stored values themselves."""
        return hounsfield(stored, source.slope, source.intercept) if self.kind == "ct" else stored

    def cut(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values cut to the limits, in their own dtype."""
        low, high = self.low, self.high
        if values.dtype.kind in "iu":
            bounds = np.iinfo(values.dtype)
            low, high = max(np.ceil(low), bounds.min), min(np.floor(high), bounds.max)
        if (low, high) == (-np.inf, np.inf):
            return values
        return np.asarray(np.clip(values, values.dtype.type(low), values.dtype.type(high)))

    @staticmethod
    def _defaced(marks: Marks, like: VolumeHeader) -> NDArray[np.bool_]:
        excluded = marks.read(like)
        if excluded.mean() > MOST_DEFACED:
            other = "not_zero" if marks.by_zero else "zero"
            raise SceneError(
                f"the file that marks a face marks {excluded.mean():.0%} of all voxels; if it marks what was kept, set "
                f"reader.defaced_where={other}",
                "marks_most",
            )
        return excluded


def _without(voxels: NDArray[np.bool_], *others: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Voxels that are in none of the others; the very array where there are no others, for it is large."""
    for other in others:
        voxels = voxels if other is None else voxels & ~other
    return voxels
