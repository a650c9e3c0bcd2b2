"""What a catalogue of images holds, sensor by sensor, as an analyst would ask for it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from modalities.catalogue import Catalogue
from modalities.scene import Channel, Scene
from modalities.sentinel1 import Sentinel1Scene
from modalities.series import SeriesScene

SHOWN_FRAMES = 4


@dataclass(frozen=True)
class ReaderAccount:
    """What one adapter gave.

    Attributes:
        reader: What read the scenes: `sentinel2`, `elevation`, or the globs of a source.
        scenes, files, places: How many; scenes of one place show the same ground.
        levels: Processing levels and their scenes; `unknown` where nobody said, empty for what has none (elevation).
        dates: First and last day of an acquisition, and of how many scenes none is known; likewise.
        frames: Coordinate reference systems and their scenes, and where there is none.
        channels: Names; with the number of scenes where some lack one.
        radiometry: Physical value by stored value, and the scenes that it holds for.
    """

    reader: str
    scenes: int
    files: int
    places: int
    levels: str
    dates: str
    frames: str
    channels: str
    radiometry: str


def account(catalogue: Catalogue) -> tuple[ReaderAccount, ...]:
    """One entry per reader, by name; the scenes of all add up to the catalogue's."""
    by_reader: defaultdict[str, list[Scene]] = defaultdict(list)
    for scene in catalogue.scenes:
        by_reader[catalogue.readers.get(scene.name, "")].append(scene)
    return tuple(_of_reader(reader, scenes) for reader, scenes in sorted(by_reader.items()))


def _of_reader(reader: str, scenes: list[Scene]) -> ReaderAccount:
    frames = [scene.grid.frame.split("\n")[0][:40] or "none" for scene in scenes]
    names = Counter(channel.name for scene in scenes for channel in scene.channels)
    lasting = all(channel.unit == "m" for scene in scenes for channel in scene.channels)
    some = [f"{name} ({count})" if count < len(scenes) else name for name, count in names.items()]
    return ReaderAccount(
        reader,
        len(scenes),
        len({file for scene in scenes for file in scene.files}),
        len({scene.group for scene in scenes}),
        "" if lasting else _counted(_level(scene) for scene in scenes),
        "" if lasting else _dates(scenes),
        _counted(frames, SHOWN_FRAMES),
        " ".join(some),
        _counted(_radiometry(scene) for scene in scenes),
    )


def _counted(texts: Iterable[str], most: int | None = None) -> str:
    """Each text with its number where there are several, the most frequent first."""
    counts = Counter(texts).most_common()
    if len(counts) == 1:
        return counts[0][0]
    shown = counts[:most]
    more = [f"and {len(counts) - len(shown)} more"] if len(shown) < len(counts) else []
    return ", ".join([*(f"{text} ({count})" for text, count in shown), *more])


def _level(scene: Scene) -> str:
    return "+".join(sorted({channel.level for channel in scene.channels if channel.level})) or "unknown"


def _dates(scenes: list[Scene]) -> str:
    days = sorted(time[:10] for scene in scenes for time in scene.times)
    unknown = sum(not scene.times for scene in scenes)
    known = "" if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    lacking = f"{unknown} unknown" if known else "unknown"
    return f"{known}, {lacking}" if known and unknown else known or lacking


def _radiometry(scene: Scene) -> str:
    images = scene.images if isinstance(scene, SeriesScene) else (scene,)
    return "; ".join(sorted({text for image in images for text in _conventions(image)}))


def _conventions(image: Scene) -> set[str]:
    if isinstance(image, Sentinel1Scene):
        return {f"dB, stored as {image.stored}: {image.evidence}"}
    return {_convention(channel) for channel in image.channels}


def _convention(channel: Channel) -> str:
    """`reflectance = stored · 0.0001 - 0.1`."""
    left = channel.unit or "value (unit unknown)"
    if (channel.scale, channel.offset) == (1.0, 0.0):
        return f"{left} as stored"
    shift = f" {'-' if channel.offset < 0 else '+'} {abs(channel.offset):g}" if channel.offset else ""
    return f"{left} = stored · {channel.scale:g}{shift}"
