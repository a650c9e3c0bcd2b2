"""Channels that share a name and mean different things do not go into one store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from modalities.scene import Scene
from pipelines.tiling_plan import PreparationError

Spoken = dict[str, list[str]]
"""What scenes say about a channel, and the scenes that say it."""


def refuse_mixed(scenes: Sequence[Scene], *, allow_levels: bool) -> None:
    """Stops where one channel name comes in several units, or in several processing levels unless these may be mixed.

    A level that nobody said goes with any other; a unit that nobody said does not.

    Raises:
        PreparationError: With the number of scenes of each and what to do.
    """
    units: defaultdict[str, Spoken] = defaultdict(lambda: defaultdict(list))
    levels: defaultdict[str, Spoken] = defaultdict(lambda: defaultdict(list))
    for scene in scenes:
        for channel in scene.channels:
            units[channel.name][channel.unit or "no unit"].append(scene.name)
            if channel.level:
                levels[channel.name][channel.level].append(scene.name)
    exclude = "leave the others out with reader.exclude"
    _refuse(units, "units", f"say how they are read (reader.radiometry, or a source of its own in reader.sources), or {exclude}")
    if not allow_levels:
        _refuse(levels, "processing levels", f"{exclude}, prepare them apart, or set prepare.mix_levels=true to learn from all as if alike")


def _refuse(spoken: dict[str, Spoken], what: str, todo: str) -> None:
    """Raises with all channels that are spoken of in the same several ways in one line each."""
    alike: defaultdict[tuple[tuple[str, int, str], ...], list[str]] = defaultdict(list)
    for name, found in spoken.items():
        if len(found) > 1:
            alike[tuple((text, len(names), names[0]) for text, names in sorted(found.items()))].append(name)
    if alike:
        lines = "".join(
            f"\n  {', '.join(names)}: " + "; ".join(f"{text} in {count} scenes, first {first}" for text, count, first in found)
            for found, names in alike.items()
        )
        raise PreparationError(f"channels of one name come in several {what}:{lines}\n{todo[0].upper()}{todo[1:]}")
