"""One volume is read to its end and judged: what cannot be used is refused with a reason code, what is doubtful is flagged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from modalities.beside import Marks
from modalities.hounsfield import AIR_HU, looks_like_ct
from modalities.intensity import ends, num_classes, robust_mean_std
from modalities.medical import CtSettings, MriSettings, VolumeSettings
from modalities.reading import Canonical, Reading
from modalities.scene import Channel, SceneError
from modalities.spacing import Respacing
from modalities.volume import Found, canonical
from modalities.voxel_digest import voxel_digest


@dataclass(frozen=True)
class Values:
    """Physical values of a scan: the least and the greatest of all, mean and deviation of its foreground."""

    least: float
    greatest: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class Volume:
    """A scan that was read to its end and can be used.

    Attributes:
        found: Where it comes from.
        reading: What becomes of its stored values.
        channel: Its name, and how values are normalised.
        dtype: Of its values.
        respacing: From its lattice to that of its scene.
        flags: What is doubtful.
        num_not_finite: Voxels without a number.
        foreground_fraction: Share that is not air.
        voxel_digest: Of its values, whatever their order, unit and type in the file: see `modalities.voxel_digest`.
        values: What it holds; for a catalogue.
    """

    found: Found
    reading: Reading
    channel: Channel
    dtype: np.dtype[np.generic]
    respacing: Respacing
    flags: tuple[str, ...]
    num_not_finite: int
    foreground_fraction: float
    voxel_digest: str
    values: Values


def examine(found: Found, settings: VolumeSettings, defaced: Marks | None = None, anatomy: Marks | None = None) -> Volume:
    """A volume after a look at all of its voxels.

    Args:
        found: Which.
        settings: How it is read.
        defaced, anatomy: Files beside it that mark its voxels.

    Raises:
        SceneError: It cannot be used; without any name.
    """
    header = found.source.header
    said = dict(zip(header.flags, header.doubts, strict=False))
    for flag in found.flags:
        settings.policies.judge(flag, said.get(flag, ""))
    if min(header.space) < settings.min_planes:
        raise SceneError(f"{min(header.space)} planes on an axis of {header.space}; min_planes is {settings.min_planes}", "few_planes")
    lattice = header.canonical
    extent = [num * spacing for num, spacing in zip(lattice.space, lattice.spacing, strict=True)]
    if min(extent) < settings.min_field_mm:
        raise SceneError(
            f"a field of view of {[round(mm, 2) for mm in extent]} mm; min_field_mm is {settings.min_field_mm:g}", "small_field"
        )
    respacing = Respacing.to(lattice.space, lattice.spacing, settings.spacing_mm, settings.through_plane == "nearest")
    for space, what in ((header.space, "stored"), (respacing.target, f"at {settings.spacing_mm} mm")):
        if np.prod(space, dtype=object) > settings.max_voxels:
            raise SceneError(f"{space} voxels {what} are more than max_voxels={settings.max_voxels}", "too_large")
    reading = Reading("ct" if isinstance(settings, CtSettings) else "mri", defaced=defaced, anatomy=anatomy)
    volume = canonical(found.source, header, reading)
    num_finite = int(np.count_nonzero(volume.finite))
    _refuse_empty(volume)
    doubts = _doubts_of_values(volume)
    for flag, words in doubts.items():
        settings.policies.judge(flag, words)
    if not volume.body.any():
        raise SceneError("nothing in it is body: all of it is air, out of view, left out, or not marked as anatomy", "no_foreground")
    channel, reading = _normalised(found, volume, reading, settings)
    contradicts = contradiction(volume, found, settings)
    return Volume(
        found=found,
        reading=reading,
        channel=channel,
        dtype=reading.values(volume.stored, header).dtype,
        respacing=respacing,
        flags=(*found.flags, *doubts, *contradicts),
        num_not_finite=volume.finite.size - num_finite,
        foreground_fraction=float(np.count_nonzero(volume.body) / volume.body.size),
        voxel_digest=voxel_digest(volume.stored, volume.finite, header.slope, header.intercept),
        values=_values(volume, header.slope, header.intercept),
    )


def _refuse_empty(volume: Canonical) -> None:
    """Stops at a volume that holds nothing."""
    if not volume.finite.any():
        raise SceneError("no voxel holds a finite number", "not_finite")
    seen = volume.stored if volume.finite.all() else volume.stored[volume.finite]
    low, high = seen.min(), seen.max()
    if low == high == 0:
        raise SceneError("all voxels are zero", "all_zero")
    if low == high:
        raise SceneError(f"constant: all voxels hold {low}", "constant")


def _doubts_of_values(volume: Canonical) -> dict[str, str]:
    """What is doubtful about the values of a volume, each in words."""
    classes = num_classes(volume.stored)
    found = {} if classes is None else {"looks_like_labels": f"looks like a label map ({classes} values)"}
    num_not_finite = int(np.count_nonzero(~volume.finite))
    return found | ({"not_finite": f"{num_not_finite} of {volume.finite.size} voxels hold no finite number"} if num_not_finite else {})


def _normalised(found: Found, volume: Canonical, reading: Reading, settings: VolumeSettings) -> tuple[Channel, Reading]:
    """How its values become those that a model is fed, by the brightness of its body; and to what they are cut before."""
    if isinstance(settings, CtSettings):
        low, high = settings.window_hu
        return Channel(found.sequence, unit="HU"), replace(reading, low=low, high=high)
    is_zscore = not isinstance(settings, MriSettings) or settings.intensity == "zscore"
    body = volume.stored[volume.body]
    sign = float(np.sign(found.source.header.slope))
    low, high = (-np.inf, np.inf) if is_zscore else ends(body)
    middle, width = robust_mean_std(body) if is_zscore else (low if sign > 0 else high, high - low)
    if width == 0.0:
        raise SceneError(f"the foreground is constant ({middle:g})", "constant_foreground")
    scale = sign / width
    unit = "z-score" if is_zscore else "percentile"
    return Channel(found.sequence, scale=scale, offset=-middle * scale, unit=unit), replace(reading, low=low, high=high)


def _values(volume: Canonical, slope: float, intercept: float) -> Values:
    known = volume.stored if volume.finite.all() else volume.stored[volume.finite]
    both = [float(end) * slope + intercept for end in (known.min(), known.max())]
    body = volume.stored[volume.body]
    mean = float(body.mean(dtype=np.float64))
    return Values(min(both), max(both), mean * slope + intercept, float(body.std(dtype=np.float64)) * abs(slope))


def contradiction(volume: Canonical, found: Found, settings: VolumeSettings) -> list[str]:
    """The flag of values that are not what the settings take them for; nothing is changed by it.

    What a file itself calls CT may still have lost its rescale intercept; what it calls MR is not looked at.
    """
    header = found.source.header
    seen = volume.stored if volume.known is volume.finite and volume.finite.all() else volume.stored[volume.known]
    least = min(float(end) * header.slope + header.intercept for end in (seen.min(), seen.max()))
    if isinstance(settings, CtSettings):
        return ["looks_like_mri"] if least >= 0 else []
    if found.modality or least > AIR_HU:
        return []
    return ["looks_like_ct"] if looks_like_ct(seen.astype(np.float32) * header.slope + header.intercept) else []
