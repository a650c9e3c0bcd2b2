"""The channels of a store or a scene are found among those of a model, told in a table, and refused where they hold something else."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mae_core.bands import Band, BandError, BandSettings, Matching, bands_of, differences_of, match_bands, strange_values
from mae_core.export import Description
from mae_core.settings import Settings
from mae_core.store import TileStore
from modalities.scene import Scene
from pipelines.progress import console, table
from pipelines.run_folder import RunError

REMEDY = {
    "sentinel2": "give what its metadata say, or set reader.radiometry (scale and offset) or reader.levels",
    "raster": "set the scale and offset of the reader: reader.radiometry, or scale, offset and unit in reader.bands",
    "satellite": "set the levels, scale and offset of the sensor's reader, such as reader.sentinel2.levels or reader.sentinel1.unit",
    "sentinel1": "say what the files hold with reader.unit (dB, power or amplitude) and reader.level",
    "mri": "feed volumes through the reader that the model was trained with: reader.kind=mri, and leave out changes in reader",
    "xray": "feed pictures through the reader that the model was trained with: reader.kind=xray, and leave out changes in reader",
    "ct": "feed CT in HU through the reader that the model was trained with: reader.kind=ct, and leave out changes in reader",
}
SCAN_UNITS = ("z-score", "percentile", "HU")
OF_SCANS = "; scans are named by reader.sequence_names (by file) or reader.sequence (all), and put together by reader.sequences"
"""What is more to do where channels are sequences of scans."""
WINDOWS, SIDE = 3, 64
"""Windows per axis, and voxels per axis of a window, that a scene's values are sampled from."""


class PredictBandSettings(Settings):
    """How the channels of scenes are found among those of a segmenter."""

    match: Literal["as_trained", "name", "wavelength"] = Field(
        "as_trained",
        description="name: channels of the same name; wavelength: what is left by nearest wavelength, too; or as in fine-tuning",
    )
    max_distance_nm: float | None = Field(
        None, gt=0, description="Channels whose wavelengths differ by more are not matched (default: as in fine-tuning)"
    )
    accept_units: bool = Field(False, description="Feed data in other units, of another level or range than the model's; it is recorded")

    def for_model(self, about: Description) -> BandSettings:
        """These settings, what they leave open being the model's."""
        own = about.bands
        match = own.match if self.match == "as_trained" else self.match
        return BandSettings(match=match, max_distance_nm=self.max_distance_nm or own.max_distance_nm, accept_units=self.accept_units)


def model_bands(about: Description) -> tuple[Band, ...]:
    """The bands that a model was trained on."""
    count = len(about.channels)
    units, levels = about.units or ("",) * count, about.levels or ((),) * count
    waves = about.wavelengths_nm or (None,) * count
    footprints = about.encoder.footprints
    return tuple(
        Band(name, wave, unit, level, footprints.get(name, 1))
        for name, wave, unit, level in zip(about.channels, waves, units, levels, strict=True)
    )


def scene_bands(scene: Scene) -> tuple[Band, ...]:
    """The bands of a scene."""
    return tuple(
        Band(channel.name, channel.wavelength_nm, channel.unit, (channel.level,) if channel.level else (), channel.footprint)
        for channel in scene.channels
    )


def described(channels: Sequence[Band]) -> dict[str, Any]:
    """What a model's description says of its bands beside their names."""
    return {
        "units": tuple(band.unit for band in channels),
        "levels": tuple(band.levels for band in channels),
        "wavelengths_nm": tuple(band.wavelength_nm for band in channels),
    }


def store_matching(about: Description, store: TileStore, settings: BandSettings) -> Matching:
    """The channels of a store for a model, checked by unit, level, native resolution and values.

    Raises:
        RunError: Nothing is in common, or the data hold something else and it was not accepted.
    """
    matching = matched(model_bands(about), bands_of(store.attributes["channels"]), settings)
    found = store.statistics
    there = {
        name: (float(middle), float(spread))
        for name, count, middle, spread in zip(store.channels, found.count, found.mean, found.std, strict=True)
        if count
    }
    refuse(about, matching, there, settings, store.label)
    return matching


def scene_matching(about: Description, scene: Scene, settings: BandSettings) -> Matching:
    """The channels of a scene for a model, checked by unit, level, native resolution and values sampled from the scene.

    Raises:
        RunError: Nothing is in common, or the scene holds something else and it was not accepted.
    """
    matching = matched(model_bands(about), scene_bands(scene), settings)
    refuse(about, matching, sampled(scene, about.no_value), settings, scene.name)
    return matching


def matched(model: Sequence[Band], data: Sequence[Band], settings: BandSettings) -> Matching:
    """`match_bands`, its error being one of a run."""
    try:
        return match_bands(model, data, settings)
    except BandError as error:
        raise RunError(f"{error}{OF_SCANS if any(band.unit in SCAN_UNITS for band in data) else ''}") from error


def refuse(about: Description, matching: Matching, values: Mapping[str, tuple[float, float]], settings: BandSettings, where: str) -> None:
    """Refuse data in other units, of another level, or whose values say so; where it is accepted, say what is.

    Raises:
        RunError: They are, with what to set.
    """
    far, narrow = strange_values(matching, values, about.mean, about.std)
    found = [*differences_of(matching), *(f"{line}: other units" for line in (*far, *narrow))]
    if not found:
        return
    if settings.accept_units:
        console.print(f"[yellow]{where}: accepted because of bands.accept_units[/]: {found[0]}" + more(found))
        return
    remedy = REMEDY.get(about.modality, "set the scale and offset of the reader")
    if any("voxels along an axis" in line for line in found):
        remedy = "read them at the same resolution as the model's training data (leave the reader's changes out)"
    raise RunError(f"{where}: {found[0]}{more(found)}; {remedy}. To feed it all the same: bands.accept_units=true")


def more(lines: Sequence[str]) -> str:
    """How many lines are not shown after the first."""
    return f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""


def tell_bands(matching: Matching, title: str = "channels") -> None:
    """Print which channel is which; one line where all have the same name and none is missing or left over."""
    if not matching.absent and not matching.unknown and all(one.name == two.name for one, two in matching.pairs):
        console.print(f"{title}: all {len(matching.model)} channels of the model are there under their names")
        return
    table(title, ["model", "data", "how"], matching.table())


def sampled(scene: Scene, no_value: int) -> dict[str, tuple[float, float]]:
    """Median and spread of the physical values of each channel in some windows of a scene; channels without any are left out.

    The spread is half the distance between the 16th and the 84th percentile, which is the standard deviation of normal values.
    """
    axes = []
    at_once = all(size <= block for size, block in zip(scene.grid.space, scene.block, strict=True))
    for size in scene.grid.space:
        if at_once:  # any window would unpack all of it
            axes.append([slice(0, size)])
            continue
        count = min(WINDOWS, -(-size // SIDE))
        starts = np.linspace(0, max(size - SIDE, 0), count).astype(int)
        axes.append([slice(int(start), min(int(start) + SIDE, size)) for start in starts])
    parts: list[list[NDArray[np.float64]]] = [[] for _ in scene.channels]
    for window in itertools.product(*axes):
        pixels, quality = scene.read(window)
        there = (quality & no_value) == 0
        for number, values in enumerate(pixels):
            parts[number].append(values[there].astype(np.float64))
    found = {}
    for channel, chosen in zip(scene.channels, parts, strict=True):
        values = np.concatenate(chosen) * channel.scale + channel.offset
        values = values[np.isfinite(values)]
        if len(values):
            low, middle, high = np.percentile(values, [16, 50, 84])
            found[channel.name] = (float(middle), float(high - low) / 2)
    return found
