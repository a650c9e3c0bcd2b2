"""What the channels of some data are to a model: which is which, by name or by wavelength, and whether they hold the same quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from mae_core.settings import Settings

FAR = 10.0
"""Values whose middle is farther from the model's mean than this many times its standard deviation, and its mean, are in other units.

Snow and clouds in a model of dark scenes stay within it; reflectance and its stored integers differ by a factor of 250 to 10 000."""
NARROW = 1 / 300
"""Values that spread less than this share of the model's standard deviation are in other units, if most channels do so."""


class BandError(ValueError):
    """Data cannot be fed to a model; the message says which channel, what it is, what was wanted and what to do."""


class BandSettings(Settings):
    """How the channels of data are found among those of a model."""

    match: Literal["name", "wavelength"] = Field(
        "name", description="name: channels of the same name; wavelength: what is left is matched by nearest wavelength, too"
    )
    max_distance_nm: float = Field(25.0, gt=0, description="Channels whose wavelengths differ by more are not matched")
    accept_units: bool = Field(False, description="Feed data in other units, of another level or range than the model's; it is recorded")


@dataclass(frozen=True)
class Band:
    """A channel, as far as it matters to a model.

    Attributes:
        name: Its own.
        wavelength_nm: Centre wavelength; None where there is none.
        unit: Of the physical value; empty where nobody said.
        levels: Processing levels; empty where nobody said.
        footprint: Voxels along an axis that hold one measurement.
    """

    name: str
    wavelength_nm: float | None = None
    unit: str = ""
    levels: tuple[str, ...] = ()
    footprint: int = 1


def bands_of(channels: Sequence[Mapping[str, Any]]) -> tuple[Band, ...]:
    """The bands that a store's attribute `channels` lists."""
    found = []
    for channel in channels:
        level = channel.get("level", "")
        levels = tuple(channel.get("levels", ())) or ((level,) if level else ())
        wavelength = channel.get("wavelength_nm")
        found.append(Band(channel["name"], wavelength, channel.get("unit", ""), levels, int(channel.get("footprint", 1))))
    return tuple(found)


@dataclass(frozen=True)
class Matching:
    """Which channel of the data each channel of a model is fed.

    Attributes:
        model, data: All channels of both, in their orders.
        columns: For each channel of the model its place in the data, -1 for an absent one; no place comes twice.
    """

    model: tuple[Band, ...]
    data: tuple[Band, ...]
    columns: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[Band, Band]]:
        """Bands of the model and of the data that are one."""
        return [(band, self.data[column]) for band, column in zip(self.model, self.columns, strict=True) if column >= 0]

    @property
    def names(self) -> tuple[str, ...]:
        """The data's channels under the model's names; those that the model does not know keep their own."""
        known = {column: band.name for band, column in zip(self.model, self.columns, strict=True)}
        return tuple(known.get(number, band.name) for number, band in enumerate(self.data))

    @property
    def unknown(self) -> tuple[str, ...]:
        """Channels of the data that the model does not know."""
        return tuple(band.name for number, band in enumerate(self.data) if number not in self.columns)

    @property
    def absent(self) -> tuple[str, ...]:
        """Channels of the model that the data lack."""
        return tuple(band.name for band, column in zip(self.model, self.columns, strict=True) if column < 0)

    def table(self) -> list[list[str]]:
        """Rows (channel of the model, channel of the data, how it was found)."""
        rows = []
        for band, column in zip(self.model, self.columns, strict=True):
            if column < 0:
                rows.append([band.name, "absent", "not in the sum"])
                continue
            other = self.data[column]
            how = "same name" if other.name == band.name else f"{_nm(other)} for {_nm(band)}"
            rows.append([band.name, other.name, how])
        return rows + [["none", name, "not known to the model, not fed"] for name in self.unknown]


def match_bands(model: Sequence[Band], data: Sequence[Band], settings: BandSettings) -> Matching:
    """Channels by name first; then, if the settings say so, what is left by nearest wavelength, the nearest pair first.

    Raises:
        BandError: Nothing is in common.
    """
    places = {band.name: number for number, band in enumerate(data)}
    columns = [places.get(band.name, -1) for band in model]
    if settings.match == "wavelength":
        near = sorted(
            (abs(band.wavelength_nm - other.wavelength_nm), row, column)
            for row, band in enumerate(model)
            for column, other in enumerate(data)
            if columns[row] < 0 and column not in columns and band.wavelength_nm is not None and other.wavelength_nm is not None
        )
        for distance, row, column in near:
            if distance <= settings.max_distance_nm and columns[row] < 0 and column not in columns:
                columns[row] = column
    if all(column < 0 for column in columns):
        remedy = "name them alike in the reader's settings" + (
            ", or set bands.match=wavelength" if settings.match == "name" else ", or raise bands.max_distance_nm"
        )
        raise BandError(
            f"the data have channels {[band.name for band in data]} and the model knows {[band.name for band in model]}: "
            f"none in common; {remedy}"
        )
    return Matching(tuple(model), tuple(data), tuple(columns))


def differences_of(matching: Matching) -> list[str]:
    """Units, levels and native resolutions that are known on both sides and differ, one line per channel."""
    found = []
    for model, data in matching.pairs:
        if model.unit and data.unit and model.unit != data.unit:
            found.append(f"channel {data.name} is in {data.unit} here, and the model was trained on {model.unit}")
        new = [level for level in data.levels if level not in model.levels]
        if model.levels and new:
            found.append(f"channel {data.name} is of level {', '.join(new)} here, and the model was trained on {', '.join(model.levels)}")
        if model.footprint != data.footprint:
            found.append(
                f"channel {data.name} has a measurement in every {data.footprint} voxels along an axis here, and the model was "
                f"trained with {model.footprint}"
            )
    return found


def strange_values(
    matching: Matching, fed: Mapping[str, tuple[float, float]], mean: Sequence[float], std: Sequence[float]
) -> tuple[list[str], list[str]]:
    """Channels of the data whose values cannot be what the model was trained on: too far away, and too narrow. One line each.

    Where units are known and the same, values may be as narrow as they are: flat land is low land in metres, too.

    Args:
        matching: Which channel is which.
        fed: Middle and spread of the data's physical values, by the data's names; channels without values are left out.
        mean, std: Of the model's training data, in its order.
    """
    far, narrow, judged = [], [], 0
    for number, (band, column) in enumerate(zip(matching.model, matching.columns, strict=True)):
        other = matching.data[column]
        if column < 0 or other.name not in fed:
            continue
        middle, spread = fed[other.name]
        words = f"channel {other.name} has values of {middle:.4g} ± {spread:.2g} here, and the model was trained on "
        words += f"{mean[number]:.4g} ± {std[number]:.2g}"
        if abs(middle - mean[number]) > FAR * max(std[number], abs(mean[number])):
            far.append(words)
        if not (band.unit and band.unit == other.unit):
            judged += 1
            if 0 < spread < NARROW * std[number]:
                narrow.append(words)
    return far, narrow if 2 * len(narrow) > judged else []


def _nm(band: Band) -> str:
    return f"{band.wavelength_nm:g} nm"
