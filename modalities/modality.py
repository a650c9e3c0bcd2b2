"""Whether a scan is of the modality that was asked for, and what is told of intensities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from modalities.medical import CtSettings, MedicalSettings, MriSettings, VolumeSettings
from modalities.scene import SceneError
from modalities.volume import Found
from modalities.volume_checks import Volume

_DOUBTS = {
    "looks_like_mri": "never go below 0, as MRI does not and CT in HU does; read MRI with kind mri, or repair the rescale intercept",
    "looks_like_ct": "hold mostly -1000, as CT in HU does; read CT with kind ct",
}


def refuse_other(found: Found, settings: VolumeSettings) -> None:
    """Stops at a scan whose file says that it is of another modality; one that says nothing is what the settings say.

    Raises:
        SceneError: It is of another one.
    """
    wanted = "CT" if isinstance(settings, CtSettings) else "MR"
    if found.modality and found.modality != wanted:
        raise SceneError(f"it is {found.modality}, and the reader wants {wanted}", "other_modality")


def settings_for(found: Found, settings: VolumeSettings) -> VolumeSettings:
    """The settings that a scan is read with: those that were given, or of a mixed archive those of its modality; MRI where nobody says.

    Raises:
        SceneError: It is of a modality that they do not read.
    """
    if isinstance(settings, MedicalSettings):
        own = CtSettings if found.modality == "CT" else MriSettings
        settings = own(**settings.model_dump(exclude={"kind"}))
    refuse_other(found, settings)
    return settings


def intensity_notes(volumes: Sequence[Volume], settings: VolumeSettings) -> Iterator[str]:
    """Lines on how values are normalised, which files beside scans were used, and what is doubtful about values."""
    if isinstance(settings, CtSettings):
        low, high = settings.window_hu
        yield f"CT is read in HU and cut to {low:g}…{high:g} (reader.window_hu)"
    elif isinstance(settings, MriSettings):
        how = {"zscore": "z-score", "percentile": "0.5 to 99.5 percentile as 0 to 1, cut there,"}[settings.intensity]
        yield f"MRI is normalised scan by scan: {how} over the foreground (reader.intensity)"
    for name, given in (("defaced", settings.defaced), ("anatomy", settings.anatomy)):
        if given:
            count = sum(getattr(volume.reading, name) is not None for volume in volumes)
            yield f"reader.{name}: a file was found for {count} of {len(volumes)} scans"
    flags = Counter(flag for volume in volumes for flag in volume.flags)
    for flag, what in _DOUBTS.items():
        if flags[flag]:
            yield f"warning ({flag}): the values of {flags[flag]} scans {what}; nothing was changed"
