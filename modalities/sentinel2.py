"""Sentinel-2: settings, and the scan that makes scenes of a folder whose numbers are what they are said to be.

Scale and offset come from the product's metadata, a STAC item, the file's tags or the settings, never from a date; the
pixels are asked what they say about it (`radiometry`), and what contradicts them is not used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from modalities import archive
from modalities.class_band import MaskFile, SceneClasses
from modalities.place import name_apart
from modalities.product import Level
from modalities.radiometry import SNOW, Answer, Verdict, judge, look, say_scale
from modalities.raster import Radiometry, RasterScene, assemble, split_masks, with_classes, with_masks
from modalities.raster_file import BandFile, usable
from modalities.resample import Resampling
from modalities.scene import AdapterSettings, Rejected, SceneError, matches
from modalities.sentinel2_bands import BANDS, ORDERS, band_name
from modalities.sentinel2_images import Gathering, Image, gather

PLAIN = (1e-4, 0.0)
"""Scale and offset of reflectance · 10000."""

SAY_OFFSET = "say it with reader.layouts=[{match: …, offset: -0.1 or 0}]"
KNOWN: set[Answer] = {"yes", "no"}
PIXELS_SAY: dict[Answer, str] = {"yes": "the pixels say +1000", "no": "the pixels say no +1000", "unknown": "the pixels do not tell"}


def _bands(names: object) -> object:
    """A name of `ORDERS` becomes its bands; the bands of a list get their canonical names."""
    if isinstance(names, str):
        if names not in ORDERS:
            raise ValueError(f"no known order of bands: {names}; known are {', '.join(ORDERS)}, or give a list of bands")
        return ORDERS[names]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return names
    found = [band_name(name) for name in names]
    unknown = [name for name, band in zip(names, found, strict=True) if band is None]
    if unknown:
        raise ValueError(f"no Sentinel-2 band: {', '.join(unknown)}; the bands are {', '.join(BANDS)}")
    if len(set(found)) < len(found):
        raise ValueError(f"a band can be named once only, got {', '.join(names)}")
    return tuple(band for band in found if band)


class Layout(AdapterSettings):
    """What the files are whose relative path or name matches the glob; it wins over metadata and is not held against the pixels.

    Attributes:
        match: Glob, such as `S2L1C/*`.
        bands: Bands by position, or the name of an order (`l1c13`, `l2a12`, `eurosat13`, `land10`, `hls6`).
        level: What the numbers are: `L1C` top of atmosphere, `L2A` surface.
        scale, offset: Value = stored number · scale + offset.
        unit: Of that value; anything but `reflectance` is another quantity, which no model of reflectance takes.
    """

    match: str
    bands: tuple[str, ...] | None = Field(None, min_length=1)
    level: Level | None = None
    scale: float | None = Field(None, gt=0)
    offset: float | None = None
    unit: str = "reflectance"

    _canonical = field_validator("bands", mode="before")(_bands)


class Sentinel2Settings(AdapterSettings):
    """How to read Sentinel-2.

    Attributes:
        channels: Bands to read, in the order of the scene's channels. A scene may lack some of them.
        bands: Bands by position, for files of several bands that have no names of Sentinel-2 bands, as a list or by the
            name of an order: `l1c13`, `l2a12` (the product's), `eurosat13` (B8A last), `land10` (without 60 m), `hls6`.
        layouts: Bands, level, scale and offset by file; the first match wins over everything but `radiometry`.
        scale, offset: Reflectance = stored number · scale + offset, where neither metadata nor tags say; else 1e-4, and the
            offset that the pixels show, if that is none. With +1000 in the numbers (baseline 04.00 on) the offset is -0.1.
        radiometry: Scale and offset by file; the first match wins over all else.
        harmonize: Take scenes with and without +1000 together, each with its own offset, which for files without metadata is
            what their pixels show. Without it a folder that holds both is refused.
        level: L1C or L2A, for files that do not say by metadata or name.
        levels: Levels to read; scenes of others are rejected. Without it a folder that holds both is refused, because the
            same band is another quantity in each.
        scene_classes: What is done with a scene classification (SCL) among the bands.
        clouds: A file beside every image that says which of its pixels are bad.
        resampling: How bands of 20 and 60 m are brought to the finest grid: `bilinear` between valid pixels, or `native`,
            each measurement repeated over the ground that it covers, to be learned at its own resolution.
        exclude: Globs of relative paths or file names that are not looked at.
        min_channels: A scene with fewer of `channels` is rejected.
    """

    kind: Literal["sentinel2"] = "sentinel2"
    channels: tuple[str, ...] = Field(ORDERS["land10"], min_length=1)
    bands: tuple[str, ...] | None = Field(None, min_length=1)
    layouts: tuple[Layout, ...] = ()
    scale: float | None = Field(None, gt=0)
    offset: float | None = None
    radiometry: tuple[Radiometry, ...] = ()
    harmonize: bool = False
    level: Level | None = None
    levels: tuple[Level, ...] | None = Field(None, min_length=1)
    scene_classes: SceneClasses = SceneClasses()
    clouds: MaskFile | None = None
    resampling: Resampling = "bilinear"
    exclude: tuple[str, ...] = ()
    min_channels: int = Field(1, ge=1)

    _canonical = field_validator("channels", "bands", mode="before")(_bands)

    @model_validator(mode="after")
    def _enough(self) -> Sentinel2Settings:
        if self.min_channels > len(self.channels):
            raise ValueError(f"min_channels is {self.min_channels}, but only {len(self.channels)} channels are wanted")
        return self

    def layout(self, relative: str) -> Layout | None:
        """The first layout that matches a relative path or its file name."""
        return next((entry for entry in self.layouts if matches(relative, entry.match)), None)

    def order(self, relative: str) -> tuple[str, ...] | None:
        """Names by position of the bands of a file."""
        layout = self.layout(relative)
        return layout.bands if layout and layout.bands else self.bands


@dataclass
class Account:
    """What a scan has to tell beside scenes and rejections.

    Attributes:
        companions: Files that belong to images without being read: previews, masks, coarser copies, metadata of others.
        notes: Lines about what was found: levels, conventions, and how they are known.
    """

    companions: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Case:
    """An image while it is decided what its numbers are.

    Attributes:
        level_by: Where the level comes from.
        scaling: Scale and offset by band, so far.
        claim: Where they come from; empty where nobody said.
        explicit: Whether they were said for this very file.
    """

    image: Image
    layout: Layout | None
    level: str
    level_by: str
    scaling: Mapping[str, tuple[float, float]]
    claim: str
    explicit: bool
    verdict: Verdict

    @property
    def said(self) -> Answer:
        """Whether the numbers carry +1000 by what is claimed; unknown where nothing is, or the scale is another one."""
        added = {round(offset / scale) if math.isclose(scale, 1e-4) else None for scale, offset in self.scaling.values()}
        answers: dict[int | None, Answer] = {0: "no", -1000: "yes"}
        return answers.get(added.pop(), "unknown") if self.claim and len(added) == 1 else "unknown"

    @property
    def convention(self) -> Answer:
        """The same by metadata, else by the pixels, else by the settings for all; unknown where it was said for this very file."""
        if self.explicit or self.verdict.wrong_order or self.verdict.wrong_scale:
            return "unknown"
        by_metadata = self.claim and not self.claim.startswith("reader.")
        return self.said if by_metadata or self.verdict.plus_1000 == "unknown" else self.verdict.plus_1000


def scan_sentinel2(
    files: Iterable[Path], folder: Path, settings: Sentinel2Settings, account: Account | None = None
) -> tuple[list[RasterScene], list[Rejected]]:
    """Scenes of the files and a reason for every image file that is in none; companions and notes go into `account`.

    Products (`.SAFE` folders and zips of them) and STAC items say which files are their bands. Other files of one band
    whose names end in a band make one scene per folder and rest of the name (`R10m`, `R20m` and `R60m` count as one
    folder); of several resolutions of a band the finest is taken. A second band of only 0 and 1 beside such a band says
    where there is data. A scene that lies in the scanned folder under bare band names (`B02.tif`) has that folder's name.

    Raises:
        SceneError: The folder holds both conventions of the offset, or both levels, and the settings do not say how to take them.
    """
    everything = list(files)
    images, masks = split_masks(everything, settings.clouds)
    found = gather(images, folder, settings.order)
    cases: list[_Case] = []
    for image in found.images:
        try:
            cases.append(_case(image, folder, settings))
        except SceneError as error:
            _reject(image, str(error), found)
    _refuse_mixture(cases, settings)
    told = {case.convention for case in cases if not case.claim} & KNOWN
    scenes: list[RasterScene] = []
    used: list[_Case] = []
    for case in cases:
        try:
            settled = _settle(case, settings, told)
            scene = _scene(settled, settings, found)
        except SceneError as error:
            _reject(case.image, str(error), found)
            continue
        if scene:
            scenes.append(scene)
            used.append(settled)
    named, unmasked = with_masks(name_apart(scenes, folder), masks, folder, settings.clouds)
    found.rejected += unmasked
    taken = {file for scene in named for file in scene.files}
    rejected = _per_file(found.rejected, taken, folder)
    if account is not None:
        gone = taken | {folder / item.file for item in rejected}
        account.companions += [path for path in everything if path not in gone]
        account.notes += _notes(used)
    return named, rejected


def _case(image: Image, folder: Path, settings: Sentinel2Settings) -> _Case:
    relative = image.bands[0].path.relative_to(folder).as_posix()
    layout = settings.layout(relative)
    names = {band.channel.name for band in image.bands}
    guess = "L1C" if "B10" in names else "L2A" if names == set(ORDERS["l2a12"]) else ""
    levels = (
        (layout.level if layout else None, "reader.layouts"),
        (image.statement.level, image.statement.source),
        (settings.level, "reader.level"),
        (guess, "a guess: " + ("B10 is there" if guess == "L1C" else "twelve bands without B10")),
    )
    level, level_by = next(((level, by) for level, by in levels if level), ("", "nothing"))
    if settings.levels is not None and level not in settings.levels:
        raise SceneError(f"its level is {level or 'not known (say reader.level)'}, reader.levels reads {', '.join(settings.levels)}")
    claims = {band.channel.name: _claim(band, image, layout, folder, settings) for band in image.bands}
    by = {claim for _, claim in claims.values()}
    claim = next(iter(by)) if len(by) == 1 else ", ".join(sorted(by - {""}))
    explicit = by <= {"reader.layouts", "reader.radiometry"}
    verdict = Verdict("unknown", "not asked") if explicit else judge(look(image.bands), level)
    return _Case(image, layout, level, level_by, {name: pair for name, (pair, _) in claims.items()}, claim, explicit, verdict)


def _claim(
    band: BandFile, image: Image, layout: Layout | None, folder: Path, settings: Sentinel2Settings
) -> tuple[tuple[float, float], str]:
    """Scale and offset of a band and where they come from; the first source that says something counts."""
    relative = band.path.relative_to(folder).as_posix()
    entry = next((entry for entry in settings.radiometry if matches(relative, entry.match)), None)
    if entry:
        return (entry.scale, entry.offset), "reader.radiometry"
    default = settings.scale or PLAIN[0]
    if layout and (layout.scale is not None or layout.offset is not None):
        return (layout.scale or default, layout.offset or 0.0), "reader.layouts"
    name, statement = band.channel.name, image.statement
    if statement.scaling:
        stated = statement.scaling.get(name)
        if stated is None and len(set(statement.scaling.values())) > 1:
            raise SceneError(
                f"{statement.source} gives no scale and offset for {name}; say them with reader.layouts=[{{match: …, scale: …, offset: …}}]"
            )
        return stated or next(iter(statement.scaling.values())), statement.source
    if (band.channel.scale, band.channel.offset) != (1.0, 0.0):
        return usable(band.channel.scale, band.channel.offset), "its tags"
    if settings.offset is not None and not settings.harmonize:
        return (default, settings.offset), "reader.offset"
    return (default, 0.0), "" if settings.scale is None or (settings.harmonize and default == PLAIN[0]) else "reader.scale"


def _refuse_mixture(cases: Sequence[_Case], settings: Sentinel2Settings) -> None:
    """Raise if the images are of both conventions or both levels and nobody said that this is meant."""
    problems = []
    if not settings.harmonize:
        sides = {answer: [case for case in cases if case.convention == answer] for answer in ("yes", "no")}
        if all(sides.values()):
            problems.append(
                f"numbers with 1000 added in {_listed(sides['yes'])} and without in {_listed(sides['no'])}; "
                "reader.harmonize=true takes each with its own offset"
            )
    if settings.levels is None:
        levels = {level: [case for case in cases if case.level == level] for level in ("L1C", "L2A")}
        shared = set.intersection(*({name for case in some for name in case.scaling} for some in levels.values()))
        if shared & set(settings.channels):
            problems.append(
                f"level L1C (top of atmosphere) in {_listed(levels['L1C'])} and L2A (surface) in {_listed(levels['L2A'])}, whose bands are "
                "different quantities; choose with reader.levels=[L2A], or read both with reader.levels=[L1C,L2A], which a store "
                "takes with prepare.mix_levels=true only"
            )
    if problems:
        raise SceneError(
            "the folder mixes Sentinel-2 images that must not be taken for the same:" + "".join(f"\n  {line}" for line in problems)
        )


def _listed(cases: Sequence[_Case]) -> str:
    names = ", ".join(case.image.name for case in cases[:3])
    return f"{len(cases)} images ({names}{', …' if len(cases) > 3 else ''})"


def _settle(case: _Case, settings: Sentinel2Settings, told: set[Answer]) -> _Case:
    """The case with its final scale and offset.

    Raises:
        SceneError: The pixels contradict what is claimed, or cannot settle what nobody said.
    """
    verdict = case.verdict
    if verdict.wrong_order:
        raise SceneError(verdict.wrong_order)
    if verdict.wrong_scale and settings.scale in (None, PLAIN[0]):
        raise SceneError(verdict.wrong_scale)
    if not case.explicit:
        value = max(verdict.brightest * scale + offset for scale, offset in case.scaling.values())
        if value > SNOW and not verdict.wrong_scale:
            raise SceneError(f"half of a band is above {SNOW} with the scale of {case.claim}, brighter than snow; {say_scale('1e-4')}")
    if case.claim:
        if {case.said, verdict.plus_1000} == KNOWN:
            has, right = ("carry +1000", -0.1) if verdict.plus_1000 == "yes" else ("carry no +1000", 0)
            claimed = "there is none" if case.said == "no" else "there is"
            raise SceneError(
                f"its numbers {has}, as its darkest pixels show, but {case.claim} says that {claimed}; "
                f"if the pixels are right, say reader.layouts=[{{match: …, offset: {right}}}]"
            )
        return case
    answer = verdict.plus_1000
    by = "its pixels"
    if answer == "unknown" and len(told) == 1:
        answer, by = next(iter(told)), "the other images' pixels"
    if answer == "unknown" and settings.harmonize and settings.offset is None and told:
        raise SceneError("nothing in it is dark enough to tell whether its numbers carry +1000, and the others differ; " + SAY_OFFSET)
    if answer == "yes" and not settings.harmonize:
        raise SceneError(
            f"its numbers carry +1000, as {by} show (products do since baseline 04.00); say reader.offset=-0.1, or reader.harmonize=true"
        )
    scale = settings.scale or PLAIN[0]
    offset = (settings.offset or 0.0) if answer == "unknown" else -1000 * scale if answer == "yes" else 0.0
    claim = by if answer != "unknown" else "nobody, and pixels that do not tell"
    return replace(case, scaling=dict.fromkeys(case.scaling, (scale, offset)), claim=claim)


def _scene(case: _Case, settings: Sentinel2Settings, found: Gathering) -> RasterScene | None:
    """The scene of the wanted bands; None where there are too few, which are then accounted for.

    Raises:
        SceneError: It has none of them.
    """
    image = case.image
    bands = {band.channel.name: band for band in image.bands}
    wanted = [_scaled(bands[name], case) for name in settings.channels if name in bands]
    if not wanted:
        raise SceneError(f"none of its bands ({', '.join(bands)}) is among the wanted channels")
    for band in image.bands:
        if band.channel.name not in settings.channels and band.path not in {chosen.path for chosen in wanted}:
            found.reject(band.path, f"band {band.channel.name} is not among the wanted channels", unwanted=True)
    scene, left = assemble(image.name, wanted, settings.resampling)
    for band, reason in left:
        found.reject(band.path, reason)
    if len(scene.bands) < settings.min_channels:
        names = ", ".join(band.channel.name for band in scene.bands)
        reason = f"its scene has {len(scene.bands)} of the wanted channels ({names}), reader.min_channels is {settings.min_channels}"
        for band in scene.bands:
            found.reject(band.path, reason)
        return None
    if image.classes and settings.scene_classes.use:
        scene = with_classes(scene, settings.scene_classes.band(*image.classes))
    return replace(scene, times=(image.statement.time,) if image.statement.time else (), documents=image.statement.documents)


def _scaled(band: BandFile, case: _Case) -> BandFile:
    scale, offset = case.scaling[band.channel.name]
    unit = case.layout.unit if case.layout else "reflectance"
    return replace(band, channel=replace(band.channel, scale=scale, offset=offset, unit=unit, level=case.level))


def _reject(image: Image, reason: str, found: Gathering) -> None:
    for path in dict.fromkeys(band.path for band in image.bands):
        found.reject(path, reason)


def _per_file(rejected: Sequence[Rejected], taken: set[Path], folder: Path) -> list[Rejected]:
    """One reason per file on disk that no scene is read from; the first of a zip's members that cannot be used stands for it."""
    kept: dict[Path, Rejected] = {}
    for item in sorted(rejected, key=lambda item: item.unwanted):
        path = folder / item.file
        file = archive.on_disk(path)
        if file not in taken:
            reason = item.reason if file == path else f"{path.name}: {item.reason}"
            kept.setdefault(file, replace(item, file=file.relative_to(folder).as_posix(), reason=reason))
    return list(kept.values())


def _notes(cases: Sequence[_Case]) -> list[str]:
    """What the scenes' numbers are taken for, and how that is known, counted."""
    lines = Counter(
        (
            f"level {case.level or 'unknown'} by {case.level_by}",
            "; ".join(f"scale {scale:.6g}, offset {offset:.6g}" for scale, offset in sorted(set(case.scaling.values()))),
            case.claim,
            "the pixels were not asked" if case.explicit else PIXELS_SAY[case.verdict.plus_1000],
        )
        for case in cases
    )
    return [
        f"Sentinel-2: {count} scenes, {level}; {pairs} by {claim} ({pixels})"
        for (level, pairs, claim, pixels), count in lines.most_common()
    ]
