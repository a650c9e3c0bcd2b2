"""An encoder of ours with other bands, and how it is fed: bands that both have keep weights and statistics, new ones begin as is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from mae_core.band_transfer import NewBands, transfer_bands
from mae_core.bands import Band, BandSettings, Matching
from mae_core.encoders import AnyEncoder, AnyEncoderSettings, build_encoder
from mae_core.export import Description
from mae_core.histogram import PERCENTS
from mae_core.settings import Settings, to_plain
from mae_core.vit import EncoderSettings
from mae_core.weights import Transfer
from modalities.landsat import INSTRUMENTS
from modalities.patients import of_patients
from pipelines.bands import described, matched, model_bands
from pipelines.run_folder import RunError, reader_of, without_patterns


class NewBandSettings(Settings):
    """What a conversion to other bands has to know of bands that the encoder does not have."""

    weights: NewBands = Field(
        "nearest",
        description="Their weights: of the nearest wavelength (divided among all bands that carry them), the mean over all bands, zeros, "
        "or random; copy: of the only channel, such as one sequence, divided among all",
    )
    wavelengths_nm: dict[str, float] = Field({}, description="Centre wavelengths by name, of bands that are not Sentinel-2's or Landsat's")
    statistics: dict[str, tuple[float, float]] = Field(
        {}, description="Mean and standard deviation by name, in the units of the reader (default: of the band of the nearest wavelength)"
    )
    footprints: dict[str, int] = Field({}, description="Voxels along an axis that hold one measurement, by name (default: 1)")
    match: BandSettings = BandSettings()


@dataclass(frozen=True)
class Rebanded:
    """An encoder with other bands.

    Attributes:
        encoder, about: It and how it is fed.
        transfer: What became of every tensor.
        matching: Which band of the old encoder each band is; the old ones take the part of the data.
        borrowed: For each new band the old one whose mean, deviation, unit and levels it was given.
        how: Why that one.
    """

    encoder: AnyEncoder
    about: Description
    transfer: Transfer
    matching: Matching
    borrowed: dict[str, str]
    how: str = "nearest wavelength"

    def rows(self) -> list[list[str]]:
        """Band, where its statistics are from, mean, standard deviation, unit."""
        kept = {new.name: old.name for new, old in self.matching.pairs}
        units = self.about.units or ("",) * len(self.about.channels)
        found = []
        for name, mean, std, unit in zip(self.about.channels, self.about.mean, self.about.std, units, strict=True):
            source = kept.get(name) or (f"{self.borrowed[name]}, {self.how}" if name in self.borrowed else "given")
            found.append([name, source, f"{mean:.4g}", f"{std:.4g}", unit or "not said"])
        return found


def rebanded(
    encoder: AnyEncoder, about: Description, channels: Sequence[str], new: NewBandSettings, changes: Mapping[str, Any]
) -> Rebanded:
    """An encoder whose bands are `channels`; the reader's settings are the old encoder's with these bands and `changes`, or those alone
    where they name another kind.

    Raises:
        RunError: Settings name bands that are not new, or what they leave open cannot be known.
        WeightsError: A tensor cannot be accounted for.
    """
    old = model_bands(about)
    waves = {name: band.wavelength_nm for name, band in INSTRUMENTS.items()} | new.wavelengths_nm
    known = {band.name: band for band in old}
    bare = tuple(known.get(name) or Band(name, waves.get(name)) for name in channels)
    matching = _one_for_all(bare, old) if new.weights == "copy" else matched(bare, old, new.match)
    kept = {band.name: other for band, other in matching.pairs}
    fresh = [name for name in channels if name not in kept]
    _check(new, fresh)
    near = {name: old[0] if new.weights == "copy" else _nearest(waves.get(name), old) for name in fresh}
    bands = tuple(_band(band, kept.get(band.name) or near.get(band.name), new.footprints, band.name in kept) for band in bare)
    statistics = _statistics(about, bands, kept, near, new)
    names = {name: other.name for name, other in kept.items()}
    settings = _encoder_settings(about, bands, names, near)
    try:
        target = build_encoder(settings, channels)
    except ValueError as error:
        raise RunError(f"channels={list(channels)} with the settings of the encoder: {error}") from error
    transfer = transfer_bands(encoder, target, names, (old, bands), new.weights)
    percents = dict(zip(about.channels, about.percentiles, strict=True)) if about.percentiles else {}
    reader = {} if "kind" in changes else dict(about.reader)
    if sorted(reader.get("channels") or ()) == sorted(about.channels):
        reader["channels"] = list(channels)
    if reader.get("sequence") in about.channels and len(channels) > 1:
        reader["sequence"] = None  # it named every file like the one channel that there was
    told = about.model_copy(
        update={
            "channels": tuple(channels),
            "mean": tuple(mean for mean, _ in statistics),
            "std": tuple(std for _, std in statistics),
            "percentiles": tuple(percents[names[name]] if name in names else (None,) * len(PERCENTS) for name in channels)
            if percents
            else (),
            "encoder": settings,
            "modality": changes.get("kind", about.modality),
            "reader": reader,
            **described(bands),
        }
    )
    own = to_plain(reader_of(told, changes))
    told = told.model_copy(update={"reader": without_patterns(own) if of_patients(told.modality) else own})
    borrowed = {name: other.name for name, other in near.items() if other is not None and name not in new.statistics}
    how = "of which it is a copy" if new.weights == "copy" else "nearest wavelength"
    return Rebanded(target.eval(), told, transfer, matching, borrowed, how)


def _one_for_all(bands: Sequence[Band], old: Sequence[Band]) -> Matching:
    """Which band the one old band is, by its name; it can be none of them.

    Raises:
        RunError: There are several old ones.
    """
    if len(old) > 1:
        raise RunError(
            f"new.weights=copy is for an encoder of one channel, and this has {len(old)}: {', '.join(band.name for band in old)}; give "
            "nearest, mean, zero or random"
        )
    return Matching(tuple(bands), tuple(old), tuple(0 if band.name == old[0].name else -1 for band in bands))


def _check(new: NewBandSettings, fresh: Sequence[str]) -> None:
    for key in ("statistics", "footprints"):
        strange = [name for name in getattr(new, key) if name not in fresh]
        if strange:
            raise RunError(f"new.{key} names {strange}, and only {list(fresh)} are new; bands that the encoder has keep their own")


def _nearest(wavelength: float | None, old: Sequence[Band]) -> Band | None:
    known = [(abs(band.wavelength_nm - wavelength), band.name, band) for band in old if band.wavelength_nm and wavelength]
    return min(known)[2] if known else None


def _band(band: Band, other: Band | None, footprints: Mapping[str, int], kept: bool) -> Band:
    """A band of the new encoder, which holds the quantity of an old one; its own wavelength is not changed."""
    if other is None:
        return Band(band.name, band.wavelength_nm, footprint=footprints.get(band.name, 1))
    return Band(band.name, band.wavelength_nm, other.unit, other.levels, other.footprint if kept else footprints.get(band.name, 1))


def _statistics(
    about: Description, bands: Sequence[Band], kept: Mapping[str, Band], near: Mapping[str, Band | None], new: NewBandSettings
) -> list[tuple[float, float]]:
    """Mean and standard deviation of each band."""
    own = dict(zip(about.channels, zip(about.mean, about.std, strict=True), strict=True))
    found = []
    for band in bands:
        source = kept.get(band.name) or near.get(band.name)
        if band.name in new.statistics:
            found.append(new.statistics[band.name])
        elif source is not None:
            found.append(own[source.name])
        else:
            raise RunError(
                f"nothing is known of band {band.name}: give new.wavelengths_nm.{band.name}=NM to take the statistics of the nearest band, "
                f"or new.statistics.{band.name}=[MEAN,STD]"
            )
    wrong = [band.name for band, (_, std) in zip(bands, found, strict=True) if not std > 0]
    if wrong:
        raise RunError(f"new.statistics of {wrong} have a standard deviation that is not above 0")
    return found


def _encoder_settings(
    about: Description, bands: Sequence[Band], names: Mapping[str, str], near: Mapping[str, Band | None]
) -> AnyEncoderSettings:
    """The encoder's settings with other bands; a new band joins the channel group of the nearest one, or has one of its own."""
    settings = about.encoder
    footprints = {band.name: band.footprint for band in bands if band.footprint > 1}
    if not isinstance(settings, EncoderSettings):
        return settings
    groups = settings.groups
    if groups and groups != "each":
        sizes = {band.name: band.footprint for band in bands}
        place = {name: number for number, group in enumerate(groups) for name in group}
        members: dict[object, list[str]] = {number: [] for number in range(len(groups))}
        for band in bands:
            other = near.get(band.name)
            old = names.get(band.name) or (other.name if other is not None and other.footprint == sizes[band.name] else None)
            members.setdefault(place[old] if old else band.name, []).append(band.name)
        groups = tuple(tuple(group) for group in members.values() if group)
    return settings.model_copy(update={"footprints": footprints, "groups": groups})
