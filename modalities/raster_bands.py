"""What a raster does not say of itself and settings add: what its bands are called and measure, and when it was taken."""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime

from pydantic import Field, model_validator

from modalities.raster_file import RasterFile
from modalities.scene import AdapterSettings, SceneError, utc

TIFF_TIME = "TIFFTAG_DATETIME"
"""The one tag with a form of its own (TIFF 6.0); GDAL gives it this name."""


class DescribedBand(AdapterSettings):
    """One band of a raster: which it is in the file, what it is called and what its numbers mean.

    Attributes:
        name: Of the channel.
        position: Which band of the file it is, from 1 (an alpha band is not counted).
        description: The description that the band has in the file, in place of a position. Without either, it is the band that the
            file describes by `name`, or else the one at this entry's place in the list.
        wavelength_nm: Centre wavelength.
        resolution_m: Native ground sampling distance, in place of the size of the file's pixels.
        unit: Of the physical value: reflectance, dB, power, K, m, ….
        level: Processing, where a name can mean several: L1C, L2A, GRD, ….
        scale, offset: Physical value = stored value · scale + offset, in place of the file's own tags.
        nodata: The stored value that means "nothing here", in place of the file's own.
        saturated: The stored value that means "too bright to tell".
    """

    name: str = Field(min_length=1)
    position: int | None = Field(None, ge=1)
    description: str | None = Field(None, min_length=1)
    wavelength_nm: float | None = Field(None, gt=0)
    resolution_m: float | None = Field(None, gt=0)
    unit: str = ""
    level: str = ""
    scale: float | None = None
    offset: float | None = None
    nodata: float | None = None
    saturated: float | None = None

    @model_validator(mode="after")
    def _one_place(self) -> DescribedBand:
        if self.position is not None and self.description is not None:
            raise ValueError(f"{self.name} is found by its position or by its description, not by both")
        if self.scale == 0:
            raise ValueError(f"the scale of {self.name} is 0, which makes all its values alike")
        return self


class TimeSource(AdapterSettings):
    r"""Where the time of acquisition stands.

    Attributes:
        pattern: Regular expression with one group, searched in a file's path within the scanned folder: `_(\d{8}T\d{6})_`.
        tag: Metadata tag of the file, in place of a pattern. `TIFFTAG_DATETIME` is when the file was written, more often than not.
        format: As of `strptime`: `%Y%m%dT%H%M%S`. Without one, ISO 8601 is expected (and `%Y:%m:%d %H:%M:%S` of `TIFFTAG_DATETIME`).
        required: Whether a file without a time is rejected.

    A time without an offset is UTC, a date without a time its midnight.
    """

    pattern: str | None = None
    tag: str | None = None
    format: str | None = None
    required: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> TimeSource:
        if (self.pattern is None) == (self.tag is None):
            raise ValueError("give either pattern (of the path) or tag (of the file)")
        try:
            groups = re.compile(self.pattern or "()").groups
        except re.error as error:
            raise ValueError(f"{self.pattern} is no regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"{self.pattern} has {groups} groups in parentheses; exactly one is wanted, around the time")
        return self

    def read(self, file: RasterFile) -> tuple[str, ...]:
        """`Scene.times` of a file.

        Raises:
            SceneError: There is no time, or it does not read as one.
        """
        try:
            return (self._time(file),)
        except ValueError as error:
            if self.required:
                raise SceneError(f"{error}; set reader.time.required=false to take it without a time") from error
            return ()

    def _time(self, file: RasterFile) -> str:
        if self.pattern is not None:
            found = re.search(self.pattern, file.relative)
            text, where = (found[1] if found else None), f"the pattern {self.pattern} of reader.time"
        else:
            text, where = file.tags.get(self.tag or ""), f"the tag {self.tag} of reader.time"
        if not text:
            raise ValueError(f"{where} is not in it")
        form = self.format or ("%Y:%m:%d %H:%M:%S" if self.tag == TIFF_TIME else None)
        try:
            return utc(datetime.strptime(text, form) if form else datetime.fromisoformat(text))  # noqa: DTZ007
        except ValueError as error:
            raise ValueError(f"{where} gives {text!r}, which is no time of the form {form or 'of ISO 8601'}") from error


def check_names(bands: tuple[str | DescribedBand, ...]) -> None:
    """Nothing, for bands with names and places of their own.

    Raises:
        ValueError: A name or a place comes twice.
    """
    for kind, entries in (
        ("band", [band if isinstance(band, str) else band.name for band in bands]),
        ("position", [str(band.position) for band in bands if isinstance(band, DescribedBand) and band.position]),
    ):
        twice = [entry for entry, count in Counter(entries).items() if count > 1]
        if twice:
            raise ValueError(f"a {kind} can be named once only, named twice: {', '.join(twice)}")


def choose(file: RasterFile, wanted: tuple[str | DescribedBand, ...] | None) -> list[tuple[int, DescribedBand]]:
    """Positions in `file` (from 0) and what settings say of the bands there, in the order of the channels.

    Names alone are for files whose bands have none of their own; an entry that says more counts for every file.

    Raises:
        SceneError: The file has not the bands that are wanted.
    """
    described = [band for band in wanted or () if isinstance(band, DescribedBand)]
    if described:
        return _described(file, [DescribedBand(name=band) if isinstance(band, str) else band for band in wanted or ()])
    names = file.descriptions
    if not all(names) or len(set(names)) < len(names):
        names = tuple(str(name) for name in wanted or [f"band_{i + 1}" for i in range(file.count)])
    if len(names) != file.count:
        raise SceneError(f"it has {file.count} bands where reader.bands names {len(names)} ({', '.join(names)})")
    return [(i, DescribedBand(name=name)) for i, name in enumerate(names)]


def _described(file: RasterFile, wanted: list[DescribedBand]) -> list[tuple[int, DescribedBand]]:
    found: list[tuple[int, DescribedBand]] = []
    for place, band in enumerate(wanted):
        text = band.description or band.name
        same = [i for i, description in enumerate(file.descriptions) if description == text]
        if len(same) > 1:
            raise SceneError(f"{len(same)} of its bands are described as {text!r}; give {band.name} a position in reader.bands")
        if band.position is not None:
            chosen = band.position - 1
        elif same:
            chosen = same[0]
        elif band.description:
            known = ", ".join(text or "nothing" for text in file.descriptions)
            raise SceneError(f"none of its bands is described as {band.description!r}; they are described as: {known}")
        elif len(wanted) != file.count:
            names = ", ".join(band.name for band in wanted)
            raise SceneError(f"it has {file.count} bands where reader.bands names {len(wanted)} ({names}); give {band.name} a position")
        else:
            chosen = place
        if chosen >= file.count:
            raise SceneError(f"it has {file.count} bands, so {band.name} cannot be the one at position {chosen + 1}")
        found.append((chosen, band))
    twice = [str(place + 1) for place, count in Counter(place for place, _ in found).items() if count > 1]
    if twice:
        raise SceneError(f"reader.bands means its band {', '.join(twice)} more than once; give every entry a position")
    return found
