"""One volume is read to its end and judged: what cannot be used is refused with a reason code, what is doubtful is flagged."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modalities.intensity import num_classes, robust_mean_std
from modalities.medical import MriSettings
from modalities.scene import Channel, SceneError
from modalities.spacing import Respacing
from modalities.volume import Canonical, Found, canonical


@dataclass(frozen=True)
class Volume:
    """A scan that was read to its end and can be used.

    Attributes:
        found: Where it comes from.
        channel: Its name, and how stored values are normalised.
        dtype: Of its values.
        respacing: From its lattice to that of its scene.
        flags: What is doubtful.
        num_not_finite: Voxels without a number.
        foreground_fraction: Share that is not air.
        voxel_digest: Of its physical values in RAS+ order.
    """

    found: Found
    channel: Channel
    dtype: np.dtype[np.generic]
    respacing: Respacing
    flags: tuple[str, ...]
    num_not_finite: int
    foreground_fraction: float
    voxel_digest: str


def examine(found: Found, settings: MriSettings) -> Volume:
    """A volume after a look at all of its voxels.

    Raises:
        SceneError: It cannot be used; without any name.
    """
    header = found.source.header
    if "orientation_unknown" in found.flags and settings.orientation_unknown == "reject":
        raise SceneError(
            "orientation unknown: sform and qform code are both 0; repair the header or set orientation_unknown=use_affine",
            "orientation_unknown",
        )
    if min(header.space) < settings.min_planes:
        raise SceneError(f"{min(header.space)} planes on an axis of {header.space}; min_planes is {settings.min_planes}", "few_planes")
    lattice = header.canonical
    respacing = Respacing.to(lattice.space, lattice.spacing, settings.spacing_mm)
    for space, what in ((header.space, "stored"), (respacing.target, f"at {settings.spacing_mm} mm")):
        if np.prod(space, dtype=object) > settings.max_voxels:
            raise SceneError(f"{space} voxels {what} are more than max_voxels={settings.max_voxels}", "too_large")
    volume = canonical(found.source, header)
    num_finite = int(np.count_nonzero(volume.finite))
    mean, std = _brightness(volume, num_finite)
    scale = float(np.sign(header.slope)) / std
    return Volume(
        found=found,
        channel=Channel(found.sequence, scale=scale, offset=-mean * scale),
        dtype=volume.stored.dtype,
        respacing=respacing,
        flags=found.flags if num_finite == volume.finite.size else (*found.flags, "not_finite"),
        num_not_finite=volume.finite.size - num_finite,
        foreground_fraction=float(np.count_nonzero(volume.body) / volume.body.size),
        voxel_digest=voxel_digest(volume, header.slope, header.intercept),
    )


def _brightness(volume: Canonical, num_finite: int) -> tuple[float, float]:
    """Mean and deviation of the stored values of the foreground."""
    if not num_finite:
        raise SceneError("no voxel holds a finite number", "not_finite")
    low, high = volume.stored[volume.finite].min(), volume.stored[volume.finite].max()
    if low == high:
        raise SceneError("all voxels are zero" if low == 0 else f"constant: all voxels hold {low}", "constant")
    classes = num_classes(volume.stored)
    if classes is not None:
        raise SceneError(
            f"looks like a label map ({classes} values); keep labels in a folder of their own or exclude them", "looks_like_labels"
        )
    mean, std = robust_mean_std(volume.stored[volume.body])
    if std == 0.0:
        raise SceneError(f"the foreground is constant ({mean:g})", "constant_foreground")
    return mean, std


def voxel_digest(volume: Canonical, slope: float, intercept: float) -> str:
    """Digest of the physical values as float32 in RAS+ order: the same for a copy under another name, in another orientation or format.

    It is not keyed, so that sites can find each other's scans by it; who has the very scan can tell whether it is among those of a model.
    """
    digest = hashlib.blake2b(str(volume.stored.shape).encode(), digest_size=16)
    for plane, finite in zip(volume.stored, volume.finite, strict=True):
        physical: NDArray[np.float32] = (plane.astype(np.float64) * slope + intercept).astype(np.float32)
        digest.update(np.ascontiguousarray(np.where(finite, physical, np.float32(np.nan)) + np.float32(0)).tobytes())
    return digest.hexdigest()
