"""Sentinel-2 in its plain forms: one file a band, joined by name, or one file of named bands. No product metadata is read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from modalities.raster import Radiometry, RasterScene, assemble, name_uniquely, radiometry
from modalities.raster_file import BROKEN, BandFile, RasterFile, holds_only, inspect, plain
from modalities.scene import AdapterSettings, Channel, Rejected, SceneError

NODATA, SATURATED = 0.0, 65535.0
"""The SPECIAL_VALUE entries of every Sentinel-2 product."""


@dataclass(frozen=True)
class Band:
    """A band of the instrument: centre wavelength of Sentinel-2A and native ground sampling distance."""

    wavelength_nm: float
    resolution_m: float


BANDS = {
    "B01": Band(442.7, 60),
    "B02": Band(492.4, 10),
    "B03": Band(559.8, 10),
    "B04": Band(664.6, 10),
    "B05": Band(704.1, 20),
    "B06": Band(740.5, 20),
    "B07": Band(782.8, 20),
    "B08": Band(832.8, 10),
    "B8A": Band(864.7, 20),
    "B09": Band(945.1, 60),
    "B10": Band(1373.5, 60),
    "B11": Band(1613.7, 20),
    "B12": Band(2202.4, 20),
}
"""The 13 bands in the order of the product (ESA, Sentinel-2 MSI spectral responses, S2A)."""

WORDS = {
    "coastal": "B01",
    "coastalaerosol": "B01",
    "blue": "B02",
    "green": "B03",
    "red": "B04",
    "rededge1": "B05",
    "rededge2": "B06",
    "rededge3": "B07",
    "nir": "B08",
    "nir08": "B8A",
    "nirnarrow": "B8A",
    "narrownir": "B8A",
    "nir09": "B09",
    "watervapour": "B09",
    "watervapor": "B09",
    "cirrus": "B10",
    "swir1": "B11",
    "swir16": "B11",
    "swir2": "B12",
    "swir22": "B12",
}
"""Common names in band descriptions (STAC's `eo:common_name` and what GDAL's users write), without spaces."""

_CODE = re.compile(r"b(?:and)?[ _-]?0?([1-9]|1[0-2]|8a)", re.IGNORECASE)
_IN_FILE_NAME = re.compile(r"(?:^|[^a-z0-9])(b(?:and)?0?(?:[1-9]|1[0-2]|8a))(?:_(?:10|20|60)m)?(?=$|[ _-]*\([^()]*\)$)", re.IGNORECASE)
_BY_RESOLUTION = re.compile(r"R(10|20|60)m")


class Sentinel2Settings(AdapterSettings):
    """How to read Sentinel-2.

    Attributes:
        channels: Bands to read, in the order of the scene's channels. A scene may lack some of them.
        bands: Bands by position, for files of several bands that have no names of Sentinel-2 bands.
        scale, offset: Reflectance = stored number · scale + offset, where the file has no tags of its own. Products since
            baseline 04.00 that were not harmonised want an offset of -0.1.
        radiometry: Scale and offset by file; the first match wins over the tags and over `scale` and `offset`.
        exclude: Globs of relative paths or file names that are not looked at.
        min_channels: A scene with fewer of `channels` is rejected.
    """

    kind: Literal["sentinel2"] = "sentinel2"
    channels: tuple[str, ...] = Field(("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"), min_length=1)
    bands: tuple[str, ...] | None = Field(None, min_length=1)
    scale: float = Field(1e-4, gt=0)
    offset: float = 0.0
    radiometry: tuple[Radiometry, ...] = ()
    exclude: tuple[str, ...] = ()
    min_channels: int = Field(1, ge=1)

    @field_validator("channels", "bands")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is None:
            return None
        found = [band_name(name) for name in names]
        unknown = [name for name, band in zip(names, found, strict=True) if band is None]
        if unknown:
            raise ValueError(f"no Sentinel-2 band: {', '.join(unknown)}; the bands are {', '.join(BANDS)}")
        if len(set(found)) < len(found):
            raise ValueError(f"a band can be named once only, got {', '.join(names)}")
        return tuple(band for band in found if band)

    @model_validator(mode="after")
    def _enough(self) -> Sentinel2Settings:
        if self.min_channels > len(self.channels):
            raise ValueError(f"min_channels is {self.min_channels}, but only {len(self.channels)} channels are wanted")
        return self


def band_name(text: str) -> str | None:
    """The band that a description or a file name speaks of, as `B02` or `B8A`; None when it names none for sure.

    Understood are a code by itself or before other words (`B2`, `b02`, `band 2`, `B4, central wavelength 665 nm`), a
    code at the end of a file name (`T48QUE_20200223_B02_10m.jp2`, `…_L2A_B8A_(Raw).tiff`) and the words of `WORDS`.
    """
    words = text.strip().lower()
    common = WORDS.get(re.sub(r"[ _-]", "", words))
    if common:
        return common
    found = re.match(_CODE.pattern + r"(?=$|[\s,:;(_]| - )", words)
    if found:
        return _canonical(found[1])
    split = split_band(Path(text).stem if Path(text).suffix.lower() in (".tif", ".tiff", ".jp2") else text)
    return split[0] if split and not band_name(split[1]) else None


def split_band(stem: str) -> tuple[str, str] | None:
    """The band at the end of a file name without ending, and the rest that the files of one scene share."""
    found = _IN_FILE_NAME.search(stem)
    if not found:
        return None
    code = _CODE.fullmatch(found[1])
    rest = stem[: found.start()] + stem[found.end() :]
    return (_canonical(code[1]), rest.strip("_-. ")) if code else None


def _canonical(number: str) -> str:
    return "B8A" if number.lower() == "8a" else f"B{int(number):02d}"


def scan_sentinel2(files: Iterable[Path], folder: Path, settings: Sentinel2Settings) -> tuple[list[RasterScene], list[Rejected]]:
    """Scenes of the files and a reason for every file that is in none.

    Files of one band whose names end in a band make one scene per folder and rest of the name (`R10m`, `R20m` and
    `R60m` count as one folder); of several resolutions of a band the finest is taken. A second band of only 0 and 1
    beside such a band says where there is data. A scene that lies in the scanned folder under bare band names
    (`B02.tif`) has that folder's name.
    """
    scan = _Scan(folder, settings)
    for path in sorted(files):
        try:
            scan.add(inspect(path, path.relative_to(folder).as_posix()))
        except SceneError as error:
            scan.reject(path, str(error))
    for (place, rest), bands in sorted(scan.joined.items()):
        scan.join("/".join(part for part in (place, rest) if part not in ("", ".")) or folder.resolve().name or "scene", bands)
    return name_uniquely(scan.scenes, folder), scan.rejected


class _Scan:
    """Scenes, open ends and rejections while a folder is gone through."""

    def __init__(self, folder: Path, settings: Sentinel2Settings) -> None:
        self.folder, self.settings = folder, settings
        self.scenes: list[RasterScene] = []
        self.rejected: list[Rejected] = []
        self.joined: defaultdict[tuple[str, str], list[BandFile]] = defaultdict(list)

    def reject(self, path: Path, reason: str) -> None:
        self.rejected.append(Rejected(path.relative_to(self.folder).as_posix(), reason))

    def add(self, file: RasterFile) -> None:
        """Take a file into the scene that it belongs to.

        Raises:
            SceneError: It belongs to none.
        """
        split = split_band(Path(file.relative).stem)
        validity = _validity(file) if split and file.count == 2 else None
        if split and (file.count == 1 or validity):
            band, rest = split
            if band not in self.settings.channels:
                raise SceneError(f"band {band} is not among the wanted channels")
            place = Path(file.relative).parent
            place = place.parent if _BY_RESOLUTION.fullmatch(place.name) else place
            self.joined[place.as_posix(), rest].append(self._band(file, 0, band, validity))
            return
        names = _names(file, self.settings.bands)
        wanted = [self._band(file, names.index(band), band) for band in self.settings.channels if band in names]
        if not wanted:
            raise SceneError(f"none of its bands ({', '.join(name for name in names if name)}) is among the wanted channels")
        if len(wanted) < self.settings.min_channels:
            raise SceneError(self._too_few(wanted))
        name = Path(file.relative).with_suffix("").as_posix()
        self.scenes.append(RasterScene(name, name, file.grid, tuple(wanted)))

    def join(self, name: str, bands: list[BandFile]) -> None:
        """One scene of the bands, in the order of the wanted channels."""
        chosen: dict[str, BandFile] = {}
        for band in sorted(bands, key=lambda band: (float(np.prod(band.grid.spacing)), band.path)):
            first = chosen.setdefault(band.channel.name, band)
            if first is not band:
                same = first.grid.spacing == band.grid.spacing
                self.reject(band.path, f"band {band.channel.name} is read from {first.path.name}{'' if same else ', which is finer'}")
        scene, left = assemble(name, [chosen[channel] for channel in self.settings.channels if channel in chosen])
        for band, reason in left:
            self.reject(band.path, reason)
        if len(scene.bands) < self.settings.min_channels:
            for band in scene.bands:
                self.reject(band.path, self._too_few(list(scene.bands)))
            return
        self.scenes.append(scene)

    def _band(self, file: RasterFile, position: int, name: str, validity_index: int | None = None) -> BandFile:
        chosen = self.settings
        scale, offset = radiometry(file, position, chosen.radiometry, (chosen.scale, chosen.offset))
        channel = Channel(name, BANDS[name].wavelength_nm, BANDS[name].resolution_m, scale, offset)
        nodata, dtype = file.nodata[position], file.dtypes[position]
        band = BandFile(file.path, file.indexes[position], channel, file.grid, dtype, NODATA if nodata is None else nodata)
        saturated = SATURATED if dtype == "uint16" else None
        return replace(band, saturated=saturated, validity_index=validity_index, block=file.block)

    def _too_few(self, bands: list[BandFile]) -> str:
        names = ", ".join(band.channel.name for band in bands)
        return f"its scene has {len(bands)} of the wanted channels ({names}), reader.min_channels is {self.settings.min_channels}"


def _validity(file: RasterFile) -> int | None:
    """Number of the file's second band if it holds nothing but 0 and 1."""
    try:
        return file.indexes[1] if holds_only(file.path, file.indexes[1], (0, 1)) else None
    except BROKEN as error:
        raise SceneError(f"its second band cannot be read ({plain(error, file.path)})") from error


def _names(file: RasterFile, by_position: tuple[str, ...] | None) -> tuple[str, ...]:
    """Band per position, empty for what is described as something else (a QA band).

    `Band 1`, `Band 2`, … counted up are what a writer puts where it knows no names, so they name nothing.
    """
    counted = [f"band{i + 1}" for i in range(file.count)]
    nothing = [re.sub(r"[ _-]", "", text.lower()) for text in file.descriptions] == counted
    found = [band_name(text) for text in file.descriptions]
    known = [band for band in found if band]
    if all(file.descriptions) and known and not nothing and len(set(known)) == len(known):
        return tuple(band or "" for band in found)
    if file.count == 1:
        raise SceneError("neither the end of its name nor its band's description says which Sentinel-2 band (B01 … B12) it is")
    if by_position is None:
        raise SceneError(f"its {file.count} bands have no names: name them with reader.bands=[...]")
    if len(by_position) != file.count:
        raise SceneError(f"it has {file.count} bands where reader.bands names {len(by_position)} ({', '.join(by_position)})")
    return by_position
