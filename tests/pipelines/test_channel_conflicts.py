"""Channels of one name that mean different things stop a preparation, with counts and a remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modalities.grid import Grid
from modalities.raster import RasterScene
from modalities.raster_file import BandFile
from modalities.scene import Channel
from pipelines.channel_conflicts import levels_of, refuse_mixed
from pipelines.tiling_plan import PreparationError

GRID = Grid.from_matrix((4, 4), np.eye(3), "", "index")


def scene(name: str, *channels: Channel) -> RasterScene:
    return RasterScene(name, name, GRID, tuple(BandFile(Path(name), 1, channel, GRID, "uint16") for channel in channels))


def of_level(name: str, level: str) -> RasterScene:
    return scene(name, *(Channel(band, unit="reflectance", level=level) for band in ("B02", "B03")))


def test_levels_are_mixed_only_where_that_is_said() -> None:
    scenes = [of_level("a", "L1C"), of_level("b", "L2A"), of_level("c", "L2A"), of_level("d", ""), scene("e", Channel("VV", level="GRD"))]
    with pytest.raises(PreparationError) as caught:
        refuse_mixed(scenes, allow_levels=False)
    assert str(caught.value) == (
        "channels of one name come in several processing levels:\n  B02, B03: L1C in 1 scenes, first a; L2A in 2 scenes, first b\n"
        "Leave the others out with reader.exclude, prepare them apart, or set prepare.mix_levels=true to learn from all as if alike"
    )
    refuse_mixed(scenes, allow_levels=True)
    refuse_mixed(scenes[1:], allow_levels=False)


def test_a_store_that_scenes_are_added_to_is_asked_too() -> None:
    before = [{"name": "B02", "unit": "reflectance", "level": "L2A", "levels": ["L2A"]}, {"name": "B03"}]
    with pytest.raises(PreparationError, match="B02: L1C in 1 scenes, first a; L2A in 1 scenes, first what the store holds already"):
        refuse_mixed([of_level("a", "L1C")], allow_levels=False, before=before)
    refuse_mixed([of_level("a", "L2A")], allow_levels=False, before=before)
    with pytest.raises(PreparationError, match="B02: dB in 1 scenes"):
        refuse_mixed([scene("a", Channel("B02", unit="dB"))], allow_levels=True, before=before)


def test_every_level_of_a_channel_is_told() -> None:
    scenes = [of_level("a", "L2A"), of_level("b", ""), of_level("c", "L1C"), scene("d", Channel("VV", level="GRD"))]
    assert levels_of("B02", scenes) == ["L1C", "L2A"]
    assert levels_of("VV", scenes, [{"name": "VV", "level": "RTC"}, {"name": "B02", "level": "HLS"}]) == ["GRD", "RTC"]
    assert levels_of("B02", scenes[1:2], [{"name": "B02", "level": "HLS", "levels": ["HLS", "L2A"]}]) == ["HLS", "L2A"]
    assert levels_of("DEM", scenes) == []


def test_units_are_never_mixed() -> None:
    scenes = [scene("a", Channel("VV", unit="dB")), scene("b", Channel("VV", unit="power")), scene("c", Channel("VV"))]
    for kept, text in ((scenes[:2], "VV: dB in 1 scenes, first a; power in 1 scenes"), (scenes[::2], "no unit in 1 scenes, first c")):
        with pytest.raises(PreparationError, match=text):
            refuse_mixed(kept, allow_levels=True)
    refuse_mixed([scenes[0], scene("d", Channel("VH", unit="power"))], allow_levels=False)
