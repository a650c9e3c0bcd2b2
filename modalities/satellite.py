"""A folder of mixed satellite products: every file goes to one adapter, and the scenes of all of them to one catalogue."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from modalities.landsat import LandsatSettings, scan_landsat
from modalities.place import Placed, group_by_place, name_apart
from modalities.raster import RasterSettings, scan_rasters
from modalities.raster_bands import DescribedBand
from modalities.scene import AdapterSettings, Rejected, SceneError, matches
from modalities.sentinel1 import Sentinel1Settings, polarisation, scan_sentinel1
from modalities.sentinel2 import Account, Sentinel2Settings, scan_sentinel2
from modalities.sentinel2_bands import split_band
from modalities.sentinel2_images import COMPANIONS, IMAGES

SensorSettings = Annotated[Sentinel2Settings | Sentinel1Settings | LandsatSettings | RasterSettings, Field(discriminator="kind")]
"""How files of one sensor are read, told apart by `kind`."""

ENDINGS = {
    "sentinel2": (*IMAGES, *COMPANIONS),
    "sentinel1": (".tif", ".tiff"),
    "landsat": (".tif", ".tiff"),
    "raster": IMAGES,
}
"""Files that an adapter looks at."""

PRODUCTS = {
    "landsat": re.compile(r"(?:^|[^a-z0-9])(?:l[a-z]0\d_l[12][a-z]{2}_\d{6}_|hls\.[ls]30\.)", re.IGNORECASE),
    "sentinel1": re.compile(r"s1[a-d][_-](?:iw|ew|s\d|wv)", re.IGNORECASE),
    "sentinel2": re.compile(r"s2[a-d]_msi", re.IGNORECASE),
}
"""Names that agencies give to products; one anywhere in a path decides."""

FOLDERS = {
    "sentinel1": re.compile(r"(?:^|[^a-z0-9])(?:s1|sentinel-?1)(?:grd|rtc|hand)?(?=$|[^a-z0-9])", re.IGNORECASE),
    "sentinel2": re.compile(r"(?:^|[^a-z0-9])(?:s2|sentinel-?2)(?:a|b|c|l1c|l2a|hand)?(?=$|[^a-z0-9])", re.IGNORECASE),
    "elevation": re.compile(r"(?:^|[^a-z0-9])(?:dem|dsm|dtm|srtm|elevation)(?=$|[^a-z0-9])", re.IGNORECASE),
}
"""What people call files and folders; the part nearest to the file decides."""


class Source(AdapterSettings):
    """Files whose relative path or name matches one of the globs are read by `reader`."""

    match: tuple[str, ...] = Field(min_length=1)
    reader: SensorSettings

    @field_validator("match", mode="before")
    @classmethod
    def _one_or_several(cls, globs: object) -> object:
        return (globs,) if isinstance(globs, str) else globs

    @property
    def label(self) -> str:
        """The globs, as they are told."""
        return ", ".join(self.match)


class SatelliteSettings(AdapterSettings):
    """How to read a folder of mixed products.

    Attributes:
        sources: Which files are read how; the first match wins. What none matches is recognised by the names of products,
            folders and bands: Landsat and HLS, Sentinel-1, elevation, and else Sentinel-2.
        sentinel2, sentinel1, landsat, elevation: How recognised files are read.
        exclude: Globs of relative paths or file names that are not looked at.
    """

    kind: Literal["satellite"] = "satellite"
    sources: tuple[Source, ...] = ()
    sentinel2: Sentinel2Settings = Sentinel2Settings()
    sentinel1: Sentinel1Settings = Sentinel1Settings()
    landsat: LandsatSettings = LandsatSettings()
    elevation: RasterSettings = RasterSettings(bands=(DescribedBand(name="DEM", position=1, unit="m"),))
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What an adapter made of files: each is in a scene, rejected with a reason, or ignored as of another kind.

    Attributes:
        scenes: Usable scenes.
        rejected: Files that cannot be used.
        ignored: Files of another kind.
        readers: For each scene by name, what read it: `sentinel2`, `elevation`, …, or the globs of a source.
        notes: Lines on what the numbers are taken for, and how that is known.
    """

    scenes: tuple[Placed, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[Path, ...]
    readers: Mapping[str, str]
    notes: tuple[str, ...] = ()


def scan_images(
    files: Sequence[Path],
    folder: Path,
    settings: SatelliteSettings | Sentinel2Settings | Sentinel1Settings | LandsatSettings | RasterSettings,
) -> Found:
    """Scenes of one adapter or of several, each with a name of its own, grouped by the ground that they show whatever the sensor."""
    notes: list[str] = []
    if isinstance(settings, SatelliteSettings):
        scenes, rejected, ignored = [], [], []
        for label, key, reader, own in _shared_out(files, folder, settings):
            try:
                some, reasons, rest, lines = _by_one(own, folder, reader)
            except SceneError as error:
                raise SceneError(str(error).replace("reader.", f"{key}.")) from error
            notes += [line.replace("reader.", f"{key}.") for line in lines]
            scenes += [(scene, label) for scene in some]
            rejected += [replace(item, reason=item.reason.replace("reader.", f"{key}.")) for item in reasons]
            ignored += rest
    else:
        some, rejected, ignored, notes = _by_one(files, folder, settings)
        scenes = [(scene, settings.kind) for scene in some]
    named = name_apart([scene for scene, _ in scenes], folder)
    readers = {scene.name: label for scene, (_, label) in zip(named, scenes, strict=True)}
    return Found(tuple(group_by_place(named)), tuple(rejected), tuple(ignored), readers, tuple(notes))


def recognise(relative: str) -> str:
    """Which of the settings reads a file, by its path: the name of a product, else of a band, else of a folder; else `sentinel2`."""
    parts = [*reversed(relative.split("/"))]
    for part in parts:
        for kind, pattern in PRODUCTS.items():
            if pattern.search(part):
                return kind
    stem = Path(parts[0]).stem
    if split_band(stem):
        return "sentinel2"
    if polarisation(stem):
        return "sentinel1"
    for part in (stem, *parts[1:]):
        for kind, pattern in FOLDERS.items():
            if pattern.search(part):
                return kind
    return "sentinel2"


def _shared_out(files: Iterable[Path], folder: Path, settings: SatelliteSettings) -> list[tuple[str, str, SensorSettings, list[Path]]]:
    """For every reader that has files: what it is called, the key of its settings, these, and its files."""
    readers: dict[str, tuple[str, SensorSettings]] = {
        name: (f"reader.{name}", getattr(settings, name)) for name in ("sentinel2", "sentinel1", "landsat", "elevation")
    }
    for number, source in enumerate(settings.sources):
        readers[f"{number} {source.label}"] = (f"reader.sources[{number}].reader", source.reader)
    shares: defaultdict[str, list[Path]] = defaultdict(list)
    for file in files:
        relative = file.relative_to(folder).as_posix()
        matching = (f"{number} {source.label}" for number, source in enumerate(settings.sources) if matches(relative, *source.match))
        shares[next(matching, None) or recognise(relative)].append(file)
    return [(_label(name, readers[name][1]), *readers[name], own) for name, own in sorted(shares.items())]


def _label(name: str, reader: SensorSettings) -> str:
    number, _, globs = name.partition(" ")
    return f"{reader.kind} ({globs})" if number.isdigit() else name


def _by_one(files: Iterable[Path], folder: Path, settings: SensorSettings) -> tuple[list[Placed], list[Rejected], list[Path], list[str]]:
    candidates: list[Path] = []
    ignored: list[Path] = []
    for file in files:
        relative = file.relative_to(folder).as_posix()
        wanted = file.name.lower().endswith(ENDINGS[settings.kind]) and not matches(relative, *settings.exclude)
        (candidates if wanted else ignored).append(file)
    scenes: Sequence[Placed]
    account = Account()
    match settings:
        case Sentinel2Settings():
            scenes, rejected = scan_sentinel2(candidates, folder, settings, account)
        case Sentinel1Settings():
            scenes, rejected = scan_sentinel1(candidates, folder, settings)
        case LandsatSettings():
            scenes, rejected = scan_landsat(candidates, folder, settings)
        case RasterSettings():
            scenes, rejected = scan_rasters(candidates, folder, settings)
    return list(scenes), rejected, [*ignored, *account.companions], account.notes
