"""Radar backscatter of Sentinel-1 in dB: GRD and RTC images, one file a polarisation or one file of several."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from modalities.grid import Grid, Window
from modalities.quality import Quality
from modalities.raster import Radiometry, RasterScene, radiometry
from modalities.raster_file import BROKEN, BandFile, RasterFile, inspect, opened, plain
from modalities.scene import AdapterSettings, Channel, LabelMap, Rejected, SceneError, utc

Stored = Literal["dB", "power", "amplitude"]
Polarisation = Literal["VV", "VH", "HH", "HV"]

POLARISATIONS: tuple[Polarisation, ...] = ("VV", "VH", "HH", "HV")
LIKE = ("VV", "HH")
"""Sent and received alike: the stronger echo, in which a border of noise stands out."""

NOTHING = (0.0, -32768.0)
"""What stands for nothing in the products and tools that are about, whether or not the file says so."""

PLAUSIBLE_DB = (-45.0, 10.0)
"""Between these lies the median of any real image: oceans at grazing angles to city centres."""

SAMPLED_BLOCKS = 16

_POLARISATION = re.compile(r"(?:^|[^A-Za-z0-9])(vv|vh|hh|hv)(?=$|[^A-Za-z0-9])", re.IGNORECASE)
_TIME = re.compile(r"S1[A-D]_.*?(\d{8}T\d{6})")
_LEVEL = re.compile(r"(?:^|[^a-z0-9])(?:s1)?(grd|rtc)(?=$|[^a-z]|[hmf]_)", re.IGNORECASE)
_PRODUCT_FILE = re.compile(r"s1[a-d]-(?:iw\d?|ew\d?|s\d|wv\d?)-(?:grd|slc)-", re.IGNORECASE)
_WORDS: Mapping[Stored, re.Pattern[str]] = {
    "dB": re.compile(r"(?:^|[^a-z])(?:db|decibels?)(?=$|[^a-z])", re.IGNORECASE),
    "power": re.compile(r"(?:^|[^a-z])(?:power|intensity)(?=$|[^a-z])", re.IGNORECASE),
    "amplitude": re.compile(r"(?:^|[^a-z])amplitude(?=$|[^a-z])", re.IGNORECASE),
}


class Sentinel1Settings(AdapterSettings):
    """How to read Sentinel-1.

    Attributes:
        channels: Polarisations to read, in the order of the scene's channels. A scene may lack some of them.
        bands: Polarisations by position, for files of several bands that do not name them. Never guessed.
        unit: What the stored numbers are; left out, a file must say so, or values below zero do, which only dB has.
        level: `GRD` or `RTC`, where names do not say so.
        radiometry: Scale and offset by file that come before `unit`; the first match wins over the tags.
        floor_db: Power at or below this is raised to it, since zero and the negative rest of a noise correction have no logarithm.
        border_noise_db: VV and HH of GRD below this are the noise at the border of a swath; null keeps them.
        exclude: Globs of relative paths or file names that are not looked at.
        min_channels: A scene with fewer of `channels` is rejected.
    """

    kind: Literal["sentinel1"] = "sentinel1"
    channels: tuple[Polarisation, ...] = Field(POLARISATIONS, min_length=1)
    bands: tuple[Polarisation, ...] | None = Field(None, min_length=1)
    unit: Stored | None = None
    level: Literal["", "GRD", "RTC"] = ""
    radiometry: tuple[Radiometry, ...] = ()
    floor_db: float = Field(-50.0, lt=0)
    border_noise_db: float | None = -30.0
    exclude: tuple[str, ...] = ()
    min_channels: int = Field(1, ge=1, le=4)

    @field_validator("channels", "bands")
    @classmethod
    def _once(cls, names: tuple[Polarisation, ...] | None) -> tuple[Polarisation, ...] | None:
        if names is not None and len(set(names)) < len(names):
            raise ValueError(f"a polarisation can be named once only, got {', '.join(names)}")
        return names


@dataclass(frozen=True)
class Sentinel1Scene:
    """Backscatter in dB, float32, whatever the files hold.

    `NODATA` is flagged where any polarisation has the file's nodata value, 0 or -32768, `OUTSIDE` where a GRD has the
    noise of a swath's border. Power is turned into dB after the file's scale and offset.

    Attributes:
        name, group: As of every scene.
        source: The numbers as they are stored.
        stored: What these are.
        evidence: How that is known, in words.
        times: When it was acquired; empty where neither names nor tags say.
        floor_db, border_noise_db: See the settings.
    """

    name: str
    group: str
    source: RasterScene
    stored: Stored
    evidence: str
    times: tuple[str, ...] = ()
    floor_db: float = -50.0
    border_noise_db: float | None = -30.0
    label_suffix: str = field(default=".tif", init=False)
    voxel_digests: tuple[str, ...] = field(default=(), init=False)
    patients: tuple[str, ...] = field(default=(), init=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the polarisations, each once."""
        return self.source.files

    @property
    def grid(self) -> Grid:
        """The lattice that all polarisations share."""
        return self.source.grid

    @property
    def block(self) -> tuple[int, ...]:
        """That of the files."""
        return self.source.block

    @property
    def channels(self) -> tuple[Channel, ...]:
        """One per polarisation, in dB."""
        return tuple(replace(channel, scale=1.0, offset=0.0, unit="dB") for channel in self.source.channels)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Always float32."""
        return np.dtype(np.float32)

    def read(self, window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        """Backscatter in dB `(channel, row, column)` and quality `(row, column)`."""
        stored, quality = self.source.read(window)
        quality = quality | np.where(np.isin(stored, NOTHING).any(axis=0), np.uint8(Quality.NODATA), np.uint8(0))
        values = np.empty(stored.shape, np.float32)
        for place, channel in enumerate(self.source.channels):
            values[place] = to_db(stored[place].astype(np.float64) * channel.scale + channel.offset, self.stored, self.floor_db)
            if self.border_noise_db is not None and channel.level == "GRD" and channel.name in LIKE:
                noise = (values[place] < self.border_noise_db) & (quality == 0)
                quality |= np.where(noise, np.uint8(Quality.OUTSIDE), np.uint8(0))
        return values, quality

    def open_labels(self, path: Path) -> LabelMap:
        """The class numbers in a raster on this scene's lattice."""
        return self.source.open_labels(path)

    def write_labels(self, path: Path, labels: NDArray[np.uint8], no_label: int) -> None:
        """A GeoTIFF on the lattice of the files."""
        self.source.write_labels(path, labels, no_label)


def to_db(values: NDArray[np.floating], stored: Stored, floor_db: float) -> NDArray[np.floating]:
    """10·log10 of power, 20·log10 of amplitude, at least `floor_db`; dB as they are. NaN stays NaN."""
    if stored == "dB":
        return values
    per_decade = {"power": 10.0, "amplitude": 20.0}[stored]
    converted: NDArray[np.floating] = per_decade * np.log10(np.maximum(values, 10.0 ** (floor_db / per_decade)))
    return converted


def polarisation(text: str) -> tuple[Polarisation, str] | None:
    """The last polarisation that a name speaks of, and the rest that the files of one scene share."""
    found = list(_POLARISATION.finditer(text))
    if not found:
        return None
    name = next(known for known in POLARISATIONS if known == found[-1][1].upper())
    return name, (text[: found[-1].start()] + text[found[-1].end() :]).strip("_-. ")


def scan_sentinel1(files: Iterable[Path], folder: Path, settings: Sentinel1Settings) -> tuple[list[Sentinel1Scene], list[Rejected]]:
    """Scenes of the files and a reason for every file that is in none.

    Files of one band whose names hold a polarisation (`VV.tif`, `S1A_…_VH.tif`, `iw-vv.rtc.tiff`) make one scene per folder
    and rest of the name. A part of every file is read, to find out or to check what its numbers are.
    """
    scan = _Scan(folder, settings)
    for path in sorted(files):
        try:
            scan.add(path)
        except SceneError as error:
            scan.reject(path, str(error))
    for (place, rest), bands in sorted(scan.joined.items()):
        scan.join("/".join(part for part in (place, rest) if part not in ("", ".")) or folder.resolve().name or "scene", bands)
    return scan.scenes, scan.rejected


@dataclass(frozen=True)
class _Band:
    """A polarisation in a file, with what its numbers were found to be."""

    file: BandFile
    stored: Stored
    evidence: str
    times: tuple[str, ...]


class _Scan:
    """Scenes, open ends and rejections while a folder is gone through."""

    def __init__(self, folder: Path, settings: Sentinel1Settings) -> None:
        self.folder, self.settings = folder, settings
        self.scenes: list[Sentinel1Scene] = []
        self.rejected: list[Rejected] = []
        self.joined: defaultdict[tuple[str, str], list[_Band]] = defaultdict(list)

    def reject(self, path: Path, reason: str) -> None:
        self.rejected.append(Rejected(path.relative_to(self.folder).as_posix(), reason))

    def add(self, path: Path) -> None:
        """Take a file into the scene that it belongs to.

        Raises:
            SceneError: It belongs to none.
        """
        if _PRODUCT_FILE.match(path.name):
            raise SceneError("it is a band of a .SAFE product: not calibrated and on no map grid; make a terrain-corrected GeoTIFF of it")
        file = inspect(path, path.relative_to(self.folder).as_posix())
        stem = Path(file.relative).stem
        split = polarisation(stem)
        if split and file.count == 1:
            if split[0] not in self.settings.channels:
                self.rejected.append(Rejected(file.relative, f"polarisation {split[0]} is not among the wanted channels", unwanted=True))
                return
            self.joined[Path(file.relative).parent.as_posix(), split[1]] += self._bands(file, (split[0],))
            return
        names = _names(file, self.settings.bands)
        bands = {band.file.channel.name: band for band in self._bands(file, names)}
        wanted = [bands[name] for name in self.settings.channels if name in bands]
        if not wanted:
            raise SceneError(f"none of its bands ({', '.join(name for name in names if name)}) is among the wanted channels")
        if len(wanted) < self.settings.min_channels:
            raise SceneError(self._too_few(wanted))
        self.scenes.append(self._scene(Path(file.relative).with_suffix("").as_posix(), wanted))

    def join(self, name: str, bands: list[_Band]) -> None:
        """One scene of the files of a folder, in the order of the wanted channels; all lie on one grid and are stored alike."""
        chosen: dict[str, _Band] = {}
        for band in bands:
            first = chosen.setdefault(band.file.channel.name, band)
            if first is not band:
                self.reject(band.file.path, f"{band.file.channel.name} is read from {first.file.path.name}")
        ordered = [chosen[channel] for channel in self.settings.channels if channel in chosen]
        kept = []
        for band in ordered:
            first = ordered[0]
            if band.file.grid != first.file.grid:
                self.reject(band.file.path, f"it does not lie on the grid of {first.file.path.name}; warp it to that grid")
            elif band.stored != first.stored:
                self.reject(band.file.path, f"it holds {band.stored} where {first.file.path.name} holds {first.stored}")
            else:
                kept.append(band)
        if len(kept) < self.settings.min_channels:
            for band in kept:
                self.reject(band.file.path, self._too_few(kept))
            return
        self.scenes.append(self._scene(name, kept))

    def _bands(self, file: RasterFile, names: tuple[str, ...]) -> list[_Band]:
        """The named bands of a file.

        Raises:
            SceneError: What its numbers are is not known, or they are not what they are said to be.
        """
        level = self.settings.level or _level(file.relative)
        found = []
        for position, name in enumerate(names):
            if name:
                scale, offset = radiometry(file, position, self.settings.radiometry)
                channel = Channel(name, None, file.resolution_m, scale, offset, "", level)
                nodata, dtype = file.nodata[position], file.dtypes[position]
                found.append(BandFile(file.path, file.indexes[position], channel, file.grid, dtype, nodata, block=file.block))
        stored, evidence, times = _look(file, found, self.settings)
        return [_Band(band, stored, evidence, times) for band in found]

    def _scene(self, name: str, bands: list[_Band]) -> Sentinel1Scene:
        first = bands[0]
        source = RasterScene(name, name, first.file.grid, tuple(band.file for band in bands))
        chosen = self.settings
        return Sentinel1Scene(name, name, source, first.stored, first.evidence, first.times, chosen.floor_db, chosen.border_noise_db)

    def _too_few(self, bands: list[_Band]) -> str:
        names = ", ".join(band.file.channel.name for band in bands) or "none"
        return f"its scene has {len(bands)} of the wanted channels ({names}), reader.min_channels is {self.settings.min_channels}"


def _names(file: RasterFile, by_position: tuple[Polarisation, ...] | None) -> tuple[str, ...]:
    """Polarisation per position, empty for what is described as something else (an angle of incidence)."""
    split = [polarisation(text) for text in file.descriptions]
    known = [found[0] for found in split if found]
    if known and len(set(known)) == len(known):
        return tuple(found[0] if found else "" for found in split)
    if file.count == 1:
        raise SceneError("neither its name nor its band's description says which polarisation (VV, VH, HH, HV) it is")
    if by_position is None:
        raise SceneError(f"its {file.count} bands do not say their polarisations: name them with reader.bands, such as [VV, VH]")
    if len(by_position) != file.count:
        raise SceneError(f"it has {file.count} bands where reader.bands names {len(by_position)} ({', '.join(by_position)})")
    return by_position


def _level(relative: str) -> str:
    found = _LEVEL.findall(relative.replace("/", " "))
    return str(found[-1]).upper() if found else ""


def _times(relative: str, tags: Mapping[str, str]) -> tuple[str, ...]:
    """Start of the acquisition: by the last name of a product in the path, else by the file's own `datetime`."""
    named = [found for part in relative.split("/") for found in _TIME.findall(part)]
    try:
        return (utc(datetime.strptime(f"{named[-1]}Z", "%Y%m%dT%H%M%S%z") if named else datetime.fromisoformat(tags.get("datetime", ""))),)
    except ValueError:
        return ()


def _look(file: RasterFile, bands: list[BandFile], settings: Sentinel1Settings) -> tuple[Stored, str, tuple[str, ...]]:
    """What the numbers of a file are, how that is known, and when they were acquired.

    Raises:
        SceneError: It cannot be told, or the numbers contradict it.
    """
    try:
        with opened(file.path) as source:
            tags = source.tags()
            texts = [Path(file.relative).stem, *source.units, *source.descriptions, tags.get("units", ""), tags.get("unit", "")]
            windows = [window for _, window in source.block_windows(1)]
            spread = np.unique(np.linspace(0, len(windows) - 1, SAMPLED_BLOCKS).astype(int))
            planes = [[source.read(band.index, window=windows[i]).ravel() for i in spread] for band in bands]
    except BROKEN as error:
        raise SceneError(f"it cannot be read ({plain(error, file.path)})") from error
    values = np.concatenate([_physical(np.concatenate(parts), band) for parts, band in zip(planes, bands, strict=True)])
    if not values.size:
        raise SceneError("nothing but nodata was found in it")
    said = [stored for stored, words in _WORDS.items() if any(text and words.search(text) for text in texts)]
    negative = float((values < 0).mean())
    if settings.unit:
        stored, evidence = settings.unit, "reader.unit says so"
    elif len(said) == 1:
        stored, evidence = said[0], "the file's name or description says so"
    elif negative > 0.5:
        stored, evidence = "dB", "most values are below zero, which power and amplitude never are"
    else:
        raise SceneError(
            f"nothing says what its numbers are (median {np.median(values):.4g}, {negative:.0%} below zero): set reader.unit to "
            "power, amplitude or dB"
        )
    _refuse_implausible(values, negative, stored, evidence, settings.floor_db)
    return stored, evidence, _times(file.relative, tags)


def _refuse_implausible(values: NDArray[np.floating], negative: float, stored: Stored, evidence: str, floor_db: float) -> None:
    """Raises where no radar image of the earth has such numbers in this unit."""
    median = float(np.median(to_db(values, stored, floor_db)))
    low, high = PLAUSIBLE_DB
    todo = "set reader.unit to what they are, or reader.radiometry to their scale and offset"
    if stored != "dB" and negative > 0.05:
        raise SceneError(f"it is said to hold {stored} ({evidence}), but {negative:.0%} of its values are below zero; {todo}")
    if stored == "dB" and negative == 0:
        raise SceneError(f"it is said to hold dB ({evidence}), but no value is below zero (median {np.median(values):.4g}); {todo}")
    if not low <= median <= high:
        raise SceneError(f"as {stored} ({evidence}) its median is {median:.0f} dB, where any image has {low:.0f} to {high:.0f}; {todo}")


def _physical(stored: NDArray[np.generic], band: BandFile) -> NDArray[np.float64]:
    """The values that are not nothing, scaled."""
    wide = stored.astype(np.float64)
    nothing = (*NOTHING, *(() if band.nodata is None or band.nodata == "nan" else (float(band.nodata),)))
    kept: NDArray[np.float64] = wide[np.isfinite(wide) & ~np.isin(wide, nothing)]
    return kept * band.channel.scale + band.channel.offset
