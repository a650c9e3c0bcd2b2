"""Channels that share a name and mean different things do not go into one store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from modalities.scene import Scene
from pipelines.tiling_plan import PreparationError

Spoken = dict[str, list[str]]
"""What scenes say about a channel, and the scenes that say it."""


EARLIER = "what the store holds already"


def refuse_mixed(scenes: Sequence[Scene], *, allow_levels: bool, before: Sequence[Mapping[str, Any]] = ()) -> None:
    """Stops where one channel name comes in several units, or in several processing levels unless these may be mixed.

    A level that nobody said goes with any other; a unit that nobody said does not.

    Args:
        scenes: That are to go into one store.
        allow_levels: Whether levels may be mixed.
        before: The attribute `channels` of a store that they are added to.

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
    for entry in before:
        if "unit" in entry:
            units[entry["name"]][entry["unit"] or "no unit"].append(EARLIER)
        for level in _levels(entry):
            levels[entry["name"]][level].append(EARLIER)
    exclude = "leave the others out with reader.exclude"
    _refuse(units, "units", f"say how they are read (reader.radiometry, or a source of its own in reader.sources), or {exclude}")
    if not allow_levels:
        _refuse(levels, "processing levels", f"{exclude}, prepare them apart, or set prepare.mix_levels=true to learn from all as if alike")


def levels_of(name: str, scenes: Sequence[Scene], before: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Every processing level that a channel comes in, sorted; of scenes, and of a store that they are added to."""
    found = {channel.level for scene in scenes for channel in scene.channels if channel.name == name and channel.level}
    return sorted(found.union(*(_levels(entry) for entry in before if entry["name"] == name)))


def _levels(entry: Mapping[str, Any]) -> list[str]:
    return list(entry.get("levels", ())) or [level for level in (entry.get("level", ""),) if level]


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
