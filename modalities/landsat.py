"""Landsat Collection 2 (Level 1 and 2) and HLS 2.0 products: one file a band, quality in bits, scale from the metadata."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from modalities.class_band import Bits, ClassBand, Widening, class_band
from modalities.landsat_metadata import LandsatMetadata, read_metadata
from modalities.place import name_apart
from modalities.quality import Quality
from modalities.raster import RasterScene, assemble, with_classes
from modalities.raster_file import BandFile, RasterFile, inspect
from modalities.resample import Resampling
from modalities.scene import AdapterSettings, Channel, Rejected, SceneError, utc
from modalities.sentinel2_bands import BANDS as SENTINEL2


@dataclass(frozen=True)
class Band:
    """A band of an instrument.

    Attributes:
        wavelength_nm: Centre wavelength.
        resolution_m: Of the pixels that are delivered; thermal bands are resampled to 30 m before that.
        usual: Whether it is read where nobody names channels: a reflectance of the surface at 30 m.
    """

    wavelength_nm: float
    resolution_m: float = 30.0
    usual: bool = True


OLI = {
    **{i + 1: Band(nm) for i, nm in enumerate((442.96, 482.04, 561.41, 654.59, 864.67, 1608.86, 2200.73))},
    8: Band(589.5, 15, usual=False),
    9: Band(1373.43, usual=False),
    10: Band(10895, usual=False),
    11: Band(12005, usual=False),
}
"""Landsat 8 and 9: Barsi et al. 2014, table 1; 8 panchromatic, 9 cirrus, 10 and 11 thermal."""

TM = {number: Band(nm, usual=number != 6) for number, nm in ((1, 485), (2, 560), (3, 660), (4, 830), (5, 1650), (6, 11450), (7, 2215))}
"""Landsat 4 and 5: middles of the bands that USGS names; 6 thermal."""

ETM = {**TM, 4: Band(835), 7: Band(2220), 8: Band(710, 15, usual=False)}
"""Landsat 7: the same; 8 panchromatic."""

NOT_USUAL_IN_S30 = ("B09", "B10")
"""Water vapour and cirrus: they show the air."""

INSTRUMENTS = {
    **{f"OLI_B{number}": band for number, band in OLI.items()},
    **{f"ETM_B{number}": band for number, band in ETM.items()},
    **{f"TM_B{number}": band for number, band in TM.items()},
    **{name: Band(band.wavelength_nm, usual=name not in NOT_USUAL_IN_S30) for name, band in SENTINEL2.items()},
}
"""Channels in the order of scenes; HLS S30 has Sentinel-2's bands at 30 m."""

THERMAL = ("OLI_B10", "OLI_B11", "ETM_B6", "TM_B6")
SURFACE_REFLECTANCE = (2.75e-5, -0.2)
SURFACE_KELVIN = (0.00341802, 149.0)
"""Scale and offset of every Level-2 product of Collection 2 (USGS, Level 2 Science Product Guides)."""

HLS_REFLECTANCE = (1e-4, 0.0)
HLS_KELVIN = (0.01, 273.15)
"""HLS 2.0 stores brightness temperature in hundredths of a degree Celsius."""

BadClass = Literal["dilated_cloud", "cirrus", "cloud", "cloud_shadow", "snow", "water", "high_aerosol"]

QA_PIXEL: dict[BadClass, Bits] = {
    "dilated_cloud": Bits(1, Quality.EXCLUDED),
    "cirrus": Bits(2, Quality.CLOUD),
    "cloud": Bits(3, Quality.CLOUD),
    "cloud_shadow": Bits(4, Quality.CLOUD),
    "snow": Bits(5, Quality.EXCLUDED),
    "water": Bits(7, Quality.EXCLUDED),
}
"""Of Collection 2; bit 0 is fill. The confidences in bits 8 … 15 say high where these bits are set."""

FMASK: dict[BadClass, Bits] = {
    "cirrus": Bits(0, Quality.CLOUD),
    "cloud": Bits(1, Quality.CLOUD),
    "dilated_cloud": Bits(2, Quality.EXCLUDED),
    "cloud_shadow": Bits(3, Quality.CLOUD),
    "snow": Bits(4, Quality.EXCLUDED),
    "water": Bits(5, Quality.EXCLUDED),
    "high_aerosol": Bits(6, Quality.EXCLUDED, count=2, at_least=3),
}
"""Of HLS 2.0, where bit 0 is reserved and never set, bit 2 means "beside cloud or shadow" and 255 is fill."""

_LANDSAT = re.compile(r"((L[A-Z])0(\d)_(L[12])[A-Z]{2}_\d{6}_(\d{8})_\d{8}_(\d\d)_(?:RT|T1|T2|A1|A2))_(\w+)\.tiff?", re.IGNORECASE)
_HLS = re.compile(r"(HLS\.(L30|S30)\.T\d{2}[A-Z]{3}\.(\d{7}T\d{6})\.v(\d+)\.\d+)\.(\w+)\.tiff?", re.IGNORECASE)
_BAND = re.compile(r"(?:(SR|ST)_)?B(\d{1,2}|8A)")


class LandsatQuality(Widening):
    """What is done with QA_PIXEL, QA_RADSAT and Fmask. Fill, saturation and dropped pixels never count.

    Attributes:
        use: Whether the files are looked at; without, only the bands' own fill is known.
        bad: What does not count. Snow, water and high aerosol (HLS only) are data unless they are listed.
    """

    use: bool = True
    bad: tuple[BadClass, ...] = ("dilated_cloud", "cirrus", "cloud", "cloud_shadow")


class LandsatSettings(AdapterSettings):
    """How to read Landsat Collection 2 and HLS.

    Attributes:
        channels: Bands to read, in the order of a scene's channels: `OLI_B2` (Landsat 8 and 9, HLS L30), `ETM_B1`, `TM_B1`, and
            `B02` (HLS S30). A scene has those of its instrument. Without them, all reflectances of the surface at 30 m. Thermal bands
            are in kelvin and in Level 2 and HLS only.
        quality: What is done with the bits of quality.
        resampling: How the panchromatic band and the others come together: interpolated, or each pixel as it is.
        exclude: Globs of relative paths or file names that are not looked at.
        min_channels: A scene with fewer is rejected.
    """

    kind: Literal["landsat"] = "landsat"
    channels: tuple[str, ...] | None = Field(None, min_length=1)
    quality: LandsatQuality = LandsatQuality()
    resampling: Resampling = "bilinear"
    exclude: tuple[str, ...] = ()
    min_channels: int = Field(1, ge=1)

    @field_validator("channels")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = [name for name in names or () if name not in INSTRUMENTS]
        if unknown:
            raise ValueError(f"no band of Landsat or HLS: {', '.join(unknown)}; the bands are {', '.join(INSTRUMENTS)}")
        if len(set(names or ())) < len(names or ()):
            raise ValueError(f"a band can be named once only, got {', '.join(names or ())}")
        return names


@dataclass(frozen=True)
class _Product:
    """What the names of a product's files say: its identifier, instrument (`OLI`, `ETM`, `TM` or `MSI`), level and date."""

    identifier: str
    instrument: str
    level: str
    date: str

    @property
    def is_hls(self) -> bool:
        return self.level == "HLS"


def _parse(name: str) -> tuple[_Product, str]:
    """Product and layer (`SR_B4`, `QA_PIXEL`, `Fmask`) that a file name speaks of.

    Raises:
        SceneError: It speaks of none that is read here.
    """
    if found := _HLS.fullmatch(name):
        if found[4] != "2":
            raise SceneError(f"it is of HLS version {found[4]}; only version 2 is read")
        date = utc(datetime.strptime(found[3], "%Y%jT%H%M%S"))  # noqa: DTZ007
        return _Product(found[1], "OLI" if found[2].upper() == "L30" else "MSI", "HLS", date), found[5]
    if not (found := _LANDSAT.fullmatch(name)):
        forms = "LC08_L2SP_…_SR_B4.TIF of Landsat Collection 2 or HLS.L30.T….v2.0.B04.tif of HLS"
        raise SceneError(f"its name is not of the form {forms}; other rasters are read with reader.kind=raster and described bands")
    if found[6] != "02":
        raise SceneError(f"it is of Landsat Collection {int(found[6])}, whose numbers and bits mean something else; download Collection 2")
    sensor, satellite = found[2].upper(), int(found[3])
    instrument = {"LC": "OLI", "LO": "OLI", "LE": "ETM", "LT": "TM" if satellite < 8 else ""}.get(sensor, "")
    if not instrument:
        raise SceneError(f"{sensor}0{satellite} is {'MSS' if sensor == 'LM' else 'thermal only'}; OLI, ETM+ and TM are read")
    return _Product(found[1], instrument, f"C2{found[4].upper()}", utc(datetime.strptime(found[5], "%Y%m%d"))), found[7].upper()  # noqa: DTZ007


def _channel_name(product: _Product, layer: str) -> str | None:
    """The channel of a layer, known or not among the instruments; None for a layer that is no band."""
    found = _BAND.fullmatch(layer.upper())
    if not found or (found[1] is not None) != (product.level == "C2L2"):
        return None
    if product.instrument == "MSI":
        return "B8A" if found[2] == "8A" else f"B{int(found[2]):02d}"
    return None if found[2] == "8A" else f"{product.instrument}_B{int(found[2])}"


def scan_landsat(files: Iterable[Path], folder: Path, settings: LandsatSettings) -> tuple[list[RasterScene], list[Rejected]]:
    """A scene for every product and a reason for every file that is in none.

    Files whose names begin with the same product identifier, in one folder, are one product. The metadata file lies beside
    them; Level 1 needs it, Level 2 has one scale for all products, and without the file its time is the midnight of its date.
    """
    rejected: list[Rejected] = []
    products: defaultdict[tuple[Path, _Product], dict[str, Path]] = defaultdict(dict)
    for path in sorted(files):
        try:
            product, layer = _parse(path.name)
            first = products[path.parent, product].setdefault(layer, path)
            if first is not path:
                raise SceneError(f"{layer} of its product is read from {first.name}")  # noqa: TRY301
        except (SceneError, ValueError) as error:
            rejected.append(Rejected(path.relative_to(folder).as_posix(), str(error)))
    scenes: list[RasterScene] = []
    for (place, product), layers in products.items():
        reader = _Reader(product, layers, folder, settings)
        try:
            scenes.append(reader.scene(read_metadata(place, product.identifier)))
        except SceneError as error:
            reader.reject(layers.values(), str(error))
        for path, reason in reader.rejected.items():
            rejected.append(Rejected(path.relative_to(folder).as_posix(), reason, path in reader.unwanted))
    return name_apart(scenes, folder), rejected


class _Reader:
    """One product on its way to a scene, and the files of it that are not used."""

    def __init__(self, product: _Product, layers: Mapping[str, Path], folder: Path, settings: LandsatSettings) -> None:
        self.product, self.layers, self.folder, self.settings = product, layers, folder, settings
        self.rejected: dict[Path, str] = {}
        self.unwanted: set[Path] = set()

    def reject(self, paths: Iterable[Path], reason: str) -> None:
        for path in paths:
            self.rejected.setdefault(path, reason)

    def scene(self, metadata: LandsatMetadata | None) -> RasterScene:
        """The product's bands under its quality.

        Raises:
            SceneError: It cannot be used as a whole.
        """
        bands: dict[str, BandFile] = {}
        for layer, path in self.layers.items():
            try:
                if layer not in ("QA_PIXEL", "QA_RADSAT", "Fmask"):
                    band = self._band(layer, path, metadata)
                    bands[band.channel.name] = band
            except SceneError as error:
                self.reject([path], str(error))
        self._enough(list(bands))
        order = self.settings.channels or INSTRUMENTS
        place = next(iter(self.layers.values())).parent.relative_to(self.folder)
        own = place if place.name == self.product.identifier else place / self.product.identifier
        scene, left = assemble(own.as_posix(), [bands[name] for name in order if name in bands], self.settings.resampling)
        for band, reason in left:
            self.reject([band.path], reason)
        self._enough([channel.name for channel in scene.channels])
        scene = with_classes(scene, *self._quality(list(bands)))
        return replace(scene, times=(metadata.time if metadata else self.product.date,))

    def _enough(self, names: list[str]) -> None:
        if len(names) < self.settings.min_channels:
            wanted = f"at least {self.settings.min_channels} are wanted (reader.min_channels)"
            raise SceneError(f"its product has {len(names)} of the wanted channels ({', '.join(names) or 'none'}), {wanted}")

    def _band(self, layer: str, path: Path, metadata: LandsatMetadata | None) -> BandFile:
        name = _channel_name(self.product, layer)
        known = INSTRUMENTS.get(name or "")
        if name is None or known is None:
            raise SceneError(f"{layer} is a layer of its product that no channel is made of")
        if name not in self.settings.channels if self.settings.channels else not known.usual:
            self.unwanted.add(path)
            raise SceneError(f"band {name} is not among the wanted channels")
        file = inspect(path, path.name)
        if file.count != 1:
            raise SceneError(f"it has {file.count} bands, where a file of its product has one")
        scale, offset = self._scaling(name, layer, metadata)
        own = (file.scales[0], file.offsets[0])
        if own != (1.0, 0.0) and not (math.isclose(own[0], scale, rel_tol=1e-4) and own[1] in (0.0, offset)):
            raise SceneError(
                f"its own tags say scale {own[0]:g} and offset {own[1]:g}, its product {scale:g} and {offset:g}; remove the tags"
            )
        unit = "K" if name in THERMAL else "reflectance"
        channel = Channel(name, known.wavelength_nm, known.resolution_m, scale, offset, unit, self.product.level)
        fill = -9999.0 if self.product.is_hls else 0.0
        nodata = fill if file.nodata[0] is None else file.nodata[0]
        return BandFile(path, file.indexes[0], channel, file.grid, file.dtypes[0], nodata, block=file.block)

    def _scaling(self, name: str, layer: str, metadata: LandsatMetadata | None) -> tuple[float, float]:
        """Scale and offset to reflectance or kelvin; the sun of Level 1 is that of the scene's centre."""
        thermal = name in THERMAL
        if self.product.is_hls:
            return HLS_KELVIN if thermal else HLS_REFLECTANCE
        if self.product.level == "C2L2":
            if metadata is None:
                return SURFACE_KELVIN if thermal else SURFACE_REFLECTANCE
            group, of = ("TEMPERATURE", layer) if thermal else ("REFLECTANCE", layer.removeprefix("SR_B"))
            group_name = f"LEVEL2_SURFACE_{group}_PARAMETERS"
            return metadata.number(group_name, f"{group}_MULT_BAND_{of}"), metadata.number(group_name, f"{group}_ADD_BAND_{of}")
        if thermal:
            raise SceneError("radiance of a thermal band is no linear function of kelvin; take the temperature (ST) of the Level-2 product")
        if metadata is None:
            raise SceneError(f"Level 1 needs {self.product.identifier}_MTL.json (or .xml, .txt) beside it, which says how it is scaled")
        elevation = metadata.number("IMAGE_ATTRIBUTES", "SUN_ELEVATION")
        if not 0 < elevation <= 90:
            raise SceneError(f"{metadata.file} says that the sun stood at {elevation}°; a reflectance needs it above the horizon")
        rescaling, number = "LEVEL1_RADIOMETRIC_RESCALING", layer.removeprefix("B")
        sun = math.sin(math.radians(elevation))
        scale, offset = (metadata.number(rescaling, f"REFLECTANCE_{part}_BAND_{number}") for part in ("MULT", "ADD"))
        return scale / sun, offset / sun

    def _quality(self, channels: list[str]) -> list[ClassBand]:
        """Maps of bits of the product; its fill, clouds and saturation.

        Raises:
            SceneError: The map of clouds is not there, or damaged.
        """
        wanted = self.settings.quality
        main = "Fmask" if self.product.is_hls else "QA_PIXEL"
        maps = {layer: path for layer, path in self.layers.items() if layer in ("QA_PIXEL", "QA_RADSAT", "Fmask")}
        if not wanted.use:
            self.reject(maps.values(), "reader.quality.use=false")
            return []
        if main not in maps:
            raise SceneError(f"its product has no {main}, which says what is cloud; download it, or set reader.quality.use=false")
        table = FMASK if self.product.is_hls else QA_PIXEL
        bits = {main: [table[name] for name in wanted.bad if name in table]}
        if not self.product.is_hls:
            bits[main].append(Bits(0, Quality.NODATA))
            bits["QA_RADSAT"] = _saturation(self.product.instrument, channels)
        made = []
        for layer, path in maps.items():
            file = _map(path)
            band = class_band(file, 0, {}, bits[layer], wanted.reach(file.grid, path.name) if layer == main else (0.0, 0.0))
            fill = {"Fmask": 255.0, "QA_PIXEL": 1.0}.get(layer)
            made.append(replace(band, band=replace(band.band, nodata=fill)))
        return made


def _map(path: Path) -> RasterFile:
    try:
        return inspect(path, path.name, colour_table=True)
    except SceneError as error:
        raise SceneError(f"{path.name} of its product cannot be used: {error}") from error


def _saturation(instrument: str, channels: list[str]) -> list[Bits]:
    """Bits of QA_RADSAT: bit n - 1 is band n; for ETM+ band 6 is in bits 5 (low gain) and 8 (high gain)."""
    numbers = [int(name.partition("_B")[2]) for name in channels]
    bits = [Bits(number - 1, Quality.SATURATED) for number in numbers if number <= 7 or (instrument == "OLI" and number == 9)]
    if instrument == "ETM" and 6 in numbers:
        bits.append(Bits(8, Quality.SATURATED))
    other = Bits(11, Quality.EXCLUDED) if instrument == "OLI" else Bits(9, Quality.NODATA)  # hidden by terrain; a detector without a value
    return [*bits, other]
