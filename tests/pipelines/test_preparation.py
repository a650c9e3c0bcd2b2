"""Scenes go in, the same scenes come out of the store, and what is thrown away is counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import pipelines.region_plan
from mae_core.store import TileStore
from modalities.quality import NO_VALUE, Quality
from modalities.scene import SceneError
from pipelines.preparation import PreparationError, PrepareSettings, prepare
from pipelines.tiling_plan import SplitSettings
from tests.synthetic_scenes import Scenes, SyntheticLabels, SyntheticScene, make_scene, three_places, tree

HERE = PrepareSettings(tile=(8, 8), tiles_per_shard=4, num_workers=0)


def changed(settings: PrepareSettings = HERE, **values: Any) -> PrepareSettings:
    return PrepareSettings(**{**settings.model_dump(), **values})


@pytest.fixture
def scenes(tmp_path: Path) -> Scenes:
    return three_places(tmp_path)


def scene_of(store: TileStore, row: int, scenes: Scenes) -> tuple[SyntheticScene, tuple[slice, ...]]:
    scene = next(scene for scene in scenes.scenes if scene.name == store.index.scene[row])
    origin, extent = store.index.origin[row], store.index.extent[row]
    return scene, tuple(slice(int(start), int(start + size)) for start, size in zip(origin, extent, strict=True))


@pytest.mark.parametrize(("tile", "spaces"), [((5,), [(23,), (3,)]), ((8, 8), [(20, 13), (6, 5)]), ((4, 8, 3), [(9, 8, 2), (4, 9, 7)])])
@pytest.mark.parametrize("dtype", ["uint16", "float32", "float64"])
def test_what_is_read_is_the_window_of_the_scene(tmp_path: Path, tile: tuple[int, ...], spaces: list[tuple[int, ...]], dtype: str) -> None:
    scenes = Scenes(tuple(make_scene(tmp_path, f"s{n}", space, dtype=dtype, scale=0.5, offset=n) for n, space in enumerate(spaces)))
    report = prepare(scenes, tmp_path / "out", changed(tile=tile, min_valid_fraction=0.0))
    store = TileStore.open(report.path)
    assert (store.dtype.name, store.space, store.digest) == ("uint16" if dtype == "uint16" else "float32", tile, report.digest)
    assert len(store) == report.found == report.accepted
    for row in range(len(store)):
        scene, window = scene_of(store, row, scenes)
        pixels, quality = scene.read(window)
        read = store.read(row)
        inside = tuple(slice(0, size) for size in read.extent)
        np.testing.assert_array_equal(read.pixels[(slice(None), *inside)], pixels.astype(store.dtype))
        np.testing.assert_array_equal(read.quality[inside], quality)
        padding = np.ones(tile, bool)
        padding[inside] = False
        assert (read.quality[padding] == Quality.PADDING).all()
        assert (read.pixels[:, padding] == 0).all()
        matrix = store.index.affine[row].reshape(len(tile) + 1, -1)
        np.testing.assert_allclose((matrix @ [*[1] * len(tile), 1])[:-1], scene.grid.world(tuple(part.start + 1 for part in window)))
        assert (read.scale.tolist(), read.offset.tolist()) == ([0.5] * 2, [int(scene.name[1:])] * 2)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("uint8", 0, 256), ("int16", -(2**15), 2**15), ("uint16", 0, 2**16), ("int32", 2**31 - 1000, 2**31)]
)
def test_whole_numbers_are_measured_exactly_in_whatever_order(dtype: str, low: int, high: int) -> None:
    values = np.random.default_rng(0).integers(low, high, (64, 64)).astype(dtype)
    counted = np.random.default_rng(1).random((64, 64)) < 0.7
    for chosen in (counted, np.ones_like(counted), np.zeros_like(counted)):
        count, mean, m2, least, most = pipelines.shard_task.measure(values, chosen, 1.0, 0.0)
        numbers = [int(value) for value in values[chosen]]
        assert count == len(numbers)
        if numbers:
            total = sum(numbers)
            wanted = Fraction(sum(number * number for number in numbers)) - Fraction(total * total, count)
            exact = dtype != "int32"  # whose squares float64 must round
            right = (total / count, float(wanted))
            assert (mean, m2) == (right if exact else pytest.approx(right))
            assert (least, most) == (min(numbers), max(numbers))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_statistics_equal_numpy_over_counted_training_voxels(tmp_path: Path, dtype: str) -> None:
    """Flagged voxels hold NaN or the largest number, so one that slips in is a wrong result."""
    scenes = Scenes(tuple(make_scene(tmp_path, f"s{n}", (19, 11), dtype=dtype, scale=-0.01 * (n + 1), offset=3) for n in range(5)))
    report = prepare(scenes, tmp_path / "out", changed(min_valid_fraction=0.0))
    store = TileStore.open(report.path)
    train = set(store.index.scene[store.rows("train")])
    assert len(train) == 4
    for channel in range(2):
        values = []
        for scene in scenes.scenes:
            pixels, quality = scene.read(scene.grid.full)
            if scene.name in train:
                values.append(pixels[channel][quality == 0].astype(np.float64) * scene.channels[0].scale + 3)
        every = np.concatenate(values)
        found = [getattr(store.statistics, name)[channel] for name in ("count", "mean", "std", "minimum", "maximum")]
        np.testing.assert_allclose(found, [len(every), every.mean(), every.std(), every.min(), every.max()], rtol=1e-6)


def test_scenes_with_other_channels_and_types_share_a_store(tmp_path: Path) -> None:
    scenes = Scenes(
        (
            make_scene(tmp_path, "a", (8, 8), channels=("R", "G"), dtype="uint8"),
            make_scene(tmp_path, "b", (8, 8), channels=("N", "G"), dtype="int16", scale=0.1),
        )
    )
    report = prepare(scenes, tmp_path / "out", changed(split=SplitSettings(val_fraction=0)))
    store = TileStore.open(report.path)
    assert (store.channels, store.dtype.name) == (("R", "G", "N"), "int16")
    first, second = store.read(0), store.read(1)
    assert (first.present.tolist(), second.present.tolist()) == ([True, True, False], [False, True, True])
    np.testing.assert_array_equal(second.pixels[[2, 1]], scenes.scenes[1].read(scenes.scenes[1].grid.full)[0])
    assert not second.pixels[0].any()
    assert second.scale.tolist() == [1, np.float32(0.1), np.float32(0.1)]
    quality = scenes.scenes[1].read(scenes.scenes[1].grid.full)[1]
    assert store.statistics.count[2] == np.count_nonzero(quality == 0), "an absent channel counts nothing"


def test_the_store_says_what_it_holds(scenes: Scenes, tmp_path: Path) -> None:
    store = TileStore.open(prepare(scenes, tmp_path / "out", HERE, attributes={"kind": "raster", "level": 3}).path)
    assert (store.kind, store.no_value, store.attributes["level"]) == ("raster", NO_VALUE, 3)
    assert store.attributes["quality_bits"]["cloud"] == Quality.CLOUD
    assert store.attributes["axes"] == ["y", "x"]
    told = {"name": "A", "wavelength_nm": None, "resolution_m": None, "unit": "", "level": "", "footprint": 1, "levels": []}
    assert store.attributes["channels"][0] == told


def test_chunks_are_packed_as_it_was_told(scenes: Scenes, tmp_path: Path) -> None:
    stores = [TileStore.open(prepare(scenes, tmp_path / kind, changed(compression=kind)).path) for kind in ("fast", "small")]
    assert [store.arrays["pixels"].codec.compressor for store in stores] == ["lz4", "zstd"]
    np.testing.assert_array_equal(stores[0].read(5).pixels, stores[1].read(5).pixels)
    with pytest.raises(PreparationError, match=r"settings.compression: fast there, small now"):
        prepare(scenes, tmp_path / "fast", changed(compression="small"))


def test_tiles_with_too_little_are_thrown_away_and_counted(tmp_path: Path) -> None:
    quality = np.zeros((16, 16), np.uint8)
    quality[:8, :8] = Quality.NODATA
    quality[:8, 8:] = Quality.BACKGROUND
    quality[8:, :8] = Quality.CLOUD
    quality[8:10, :8] = 0
    scenes = Scenes((make_scene(tmp_path, "a", (16, 16), quality=quality), make_scene(tmp_path, "b", (8, 8))))
    report = prepare(scenes, tmp_path / "out", HERE)
    assert (report.found, report.accepted, dict(report.discarded)) == (5, 3, {"too little valid data": 2})
    store = TileStore.open(report.path)
    assert store.index.tile.tolist() == [2, 3, 4], "an id is a place, whatever was thrown away"
    assert store.index.valid_fraction.tolist()[:2] == [0.25, 1.0]
    assert "2 thrown away: too little valid data" in report.summary()
    spaces = {scene.name: scene.grid.space for scene in scenes.scenes}
    nothing = Scenes(tuple(make_scene(tmp_path, name, space, quality=np.ones(space, np.uint8)) for name, space in spaces.items()))
    with pytest.raises(PreparationError, match=r"none of 5 tiles is left \(5: too little valid data\)"):
        prepare(nothing, tmp_path / "none", HERE)


def test_labelled_scenes_keep_tiles_with_a_label_and_count_background(tmp_path: Path) -> None:
    quality = np.full((16, 8), int(Quality.BACKGROUND), np.uint8)
    scenes = Scenes((make_scene(tmp_path, "a", (16, 8), quality=quality), make_scene(tmp_path, "b", (5, 5))))
    numbers = np.full((16, 8), -1)
    numbers[9:12, 2] = [3, 7, 0]
    np.save(tmp_path / "numbers.npy", numbers)
    labels = {"a": SyntheticLabels(tmp_path / "numbers.npy")}
    settings = changed(split=SplitSettings(val_fraction=0))
    report = prepare(scenes, tmp_path / "out", settings, labels=labels)
    assert dict(report.discarded) == {"no label": 1}
    store = TileStore.open(report.path)
    assert store.attributes["classes"] == [0, 3, 7]
    first, second = store.read(0), store.read(1)
    assert first.labels is not None
    assert second.labels is not None
    np.testing.assert_array_equal(first.labels, numbers[8:])
    assert (second.labels == -1).all()
    assert store.statistics.count[0] == np.count_nonzero(second.quality == 0), "background is in no statistic"
    assert prepare(scenes, tmp_path / "out", settings, labels=labels).already_done
    np.save(tmp_path / "numbers.npy", numbers + 1)
    with pytest.raises(PreparationError, match="labels"):
        prepare(scenes, tmp_path / "out", settings, labels=labels)
    np.save(tmp_path / "numbers.npy", numbers + 40000)
    with pytest.raises(PreparationError, match="class numbers are 0 to 32767"):
        prepare(scenes, tmp_path / "much", settings, labels=labels)
    with pytest.raises(PreparationError, match="labels for z, which is no scene"):
        prepare(scenes, tmp_path / "none", settings, labels={"z": labels["a"]})


def test_groups_are_on_one_side(tmp_path: Path) -> None:
    scenes = Scenes(tuple(make_scene(tmp_path, f"s{n:02}", (8, 8), group=f"patient {n // 3}") for n in range(30)))
    report = prepare(scenes, tmp_path / "out", changed(split=SplitSettings(val_fraction=0.25)))
    store = TileStore.open(report.path)
    train, val = (set(store.index.group[store.rows(side)]) for side in ("train", "val"))
    assert not train & val
    assert (len(train), len(val)) == (7, 3)
    assert (dict(report.groups), dict(report.tiles)) == ({"train": 7, "val": 3}, {"train": 21, "val": 9})
    with pytest.raises(PreparationError, match=r"one group.*prepare.split.unit=block"):
        prepare(Scenes(scenes.scenes[:3]), tmp_path / "one", HERE)


def test_held_out_blocks_share_no_ground_with_training(tmp_path: Path) -> None:
    dates = [make_scene(tmp_path, name, (61, 45), group="place") for name in ("june", "july")]
    shifted = make_scene(tmp_path, "shifted", (30, 30), group="place", origin=105.0)
    settings = changed(split=SplitSettings(unit="block", val_fraction=0.2, block_tiles=3))
    report = prepare(Scenes((*dates, shifted)), tmp_path / "out", settings)
    store = TileStore.open(report.path)
    painted: dict[str, set[tuple[int, ...]]] = {"train": set(), "val": set()}
    for row in range(len(store)):
        scene, window = scene_of(store, row, Scenes((*dates, shifted)))
        corner = np.round(np.multiply(scene.grid.window(window).world((0, 0)), 2)).astype(int)
        rows, columns = (range(-10, 20 * int(size) - 10, 5) for size in store.index.extent[row])
        cells = {(int(corner[0]) + i, int(corner[1]) + j) for i in rows for j in columns}
        painted[str(store.index.split[row])] |= cells
    assert painted["val"]
    assert not painted["train"] & painted["val"]
    leaks = report.discarded["overlaps a held-out tile"]
    assert leaks > 0
    assert report.found == report.accepted + leaks
    assert report.tiles["val"] >= 0.2 * report.found


def test_a_damaged_scene_is_quarantined_and_counted(tmp_path: Path) -> None:
    good = tuple(make_scene(tmp_path, f"s{n}", (16, 8)) for n in range(4))
    bad = make_scene(tmp_path, "t", (16, 8), damaged=12)
    settings = changed(split=SplitSettings(val_fraction=0))
    report = prepare(Scenes((*good, bad)), tmp_path / "out", settings)
    assert dict(report.quarantined) == {"t": "t is damaged at row 12"}
    assert dict(report.discarded) == {"scene could not be read": 1}
    assert (report.found, report.accepted) == (10, 9), "the part that can be read is kept"
    assert "scene t quarantined: t is damaged at row 12" in report.summary()
    assert prepare(Scenes((*good, bad)), tmp_path / "out", settings).quarantined == {"t": "1 tiles could not be read"}


def test_too_many_damaged_scenes_stop_it_and_mended_ones_are_read_again(tmp_path: Path) -> None:
    good = tuple(make_scene(tmp_path, f"s{n}", (16, 8)) for n in range(3))
    mended = make_scene(tmp_path, "t", (16, 8))
    bad = make_scene(tmp_path, "t", (16, 8), damaged=3)
    with pytest.raises(
        PreparationError, match=r"1 of 4 scenes cannot be read, more than prepare.max_rejected_fraction 0.2(?s:.*)t: t is damaged"
    ):
        prepare(Scenes((*good, bad)), tmp_path / "out", HERE)
    assert not (tmp_path / "out/manifest.json").exists()
    report = prepare(Scenes((*good, mended)), tmp_path / "out", HERE)
    assert (report.accepted, dict(report.quarantined)) == (8, {})
    assert prepare(Scenes((*good, bad)), tmp_path / "much", changed(max_rejected_fraction=0.3)).accepted == 7


def test_it_stops_as_soon_as_too_many_scenes_have_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [make_scene(tmp_path, f"s{n}", (8, 8), damaged=3 if n in (1, 3, 4) else None) for n in range(10)]
    names: list[str] = []
    read = SyntheticScene.read

    def noted(scene: SyntheticScene, window: Any) -> Any:
        names.append(scene.name)
        return read(scene, window)

    monkeypatch.setattr(SyntheticScene, "read", noted)
    with pytest.raises(PreparationError, match=r"3 of 10 scenes cannot be read, more than prepare.max_rejected_fraction 0.2"):
        prepare(Scenes(tuple(scenes)), tmp_path / "out", changed(tiles_per_shard=1))
    assert sorted(set(names)) == ["s0", "s1", "s2", "s3", "s4"]


def test_values_that_are_not_finite_and_not_flagged_are_refused(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, "a", (8, 8), dtype="float32")
    pixels = np.load(scene.files[0])
    pixels[1, 4, 4] = np.inf
    np.save(scene.files[0], pixels)
    np.save(scene.files[1], np.zeros((8, 8), np.uint8))
    with pytest.raises(PreparationError, match="values that are not finite where quality is 0"):
        prepare(Scenes((scene,)), tmp_path / "out", changed(split=SplitSettings(val_fraction=0)))


def test_a_channel_without_training_voxels_is_said(tmp_path: Path) -> None:
    scenes = [make_scene(tmp_path, f"s{n}", (8, 8)) for n in range(4)]
    store = TileStore.open(prepare(Scenes(tuple(scenes)), tmp_path / "first", HERE).path)
    held = str(store.index.scene[store.rows("val")][0])
    scenes = [make_scene(tmp_path, scene.name, (8, 8), channels=("A", "Z") if scene.name == held else ("A",)) for scene in scenes]
    report = prepare(Scenes(tuple(scenes)), tmp_path / "out", HERE)
    assert report.notes == ("channel Z has no counted voxel in any training tile; its mean is 0 and its std 1",)
    assert json.loads((report.path / "statistics.json").read_text())["mean"][1] is None


def test_scenes_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    a = make_scene(tmp_path, "a", (8, 8))
    cases: list[tuple[tuple[SyntheticScene, ...], str]] = [
        ((), "there is no scene"),
        ((a, a), "two scenes are called a"),
        ((a, make_scene(tmp_path, "b", (8, 8, 8))), "scene b has 3 axes"),
        ((a, make_scene(tmp_path, "b", (8, 8), channels=("A", "A"))), "each name once"),
        ((a, make_scene(tmp_path, "b", (8, 8), dtype="complex64", quality=np.zeros((8, 8), np.uint8))), "scene b holds complex64"),
    ]
    for scenes, message in cases:
        with pytest.raises(PreparationError, match=message):
            prepare(Scenes(scenes), tmp_path / "out", HERE)
    a.files[0].unlink()
    with pytest.raises(PreparationError, match="scene a: a file cannot be read any more"):
        prepare(Scenes((a,)), tmp_path / "out", changed(split=SplitSettings(val_fraction=0)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValidationError, match="at least one voxel on every axis"):
        PrepareSettings(tile=(4, 0))


def test_tiles_of_one_box_equal_tiles_read_one_by_one(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    read = SyntheticScene.read

    def alone(scene: SyntheticScene, window: Any) -> Any:
        calls.append(window)
        if max(part.stop - part.start for part in window) > 8:
            raise SceneError("too much at once")
        return read(scene, window)

    whole = tree(prepare(scenes, tmp_path / "whole", HERE).path)
    monkeypatch.setattr(SyntheticScene, "read", alone)
    assert tree(prepare(scenes, tmp_path / "out", HERE).path) == whole
    assert len(calls) == 2 + 13, "two boxes that fail, then every tile"


@pytest.mark.parametrize("budget_bytes", [0, 24 * 24 * 7, 1 << 20])
def test_every_block_of_a_scene_is_unpacked_once_whatever_the_shards_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_bytes: int
) -> None:
    """24 columns are three tiles and one and a half blocks, so nothing less than two tiles may be read at once."""
    monkeypatch.setattr(pipelines.region_plan, "READ_BYTES", budget_bytes)
    scene = replace(make_scene(tmp_path, "a", (61, 45)), blocks_of=(16, 16))
    unpacked: Counter[tuple[int, ...]] = Counter()
    read = SyntheticScene.read

    def counted(scene: SyntheticScene, window: Any) -> Any:
        unpacked.update(product(*(range(part.start // 16, -(-part.stop // 16)) for part in window)))
        return read(scene, window)

    monkeypatch.setattr(SyntheticScene, "read", counted)
    prepare(Scenes((scene,)), tmp_path / "out", changed(tiles_per_shard=5, split=SplitSettings(val_fraction=0)))
    assert len(unpacked) == 4 * 3
    assert (max(unpacked.values()) == 1) == (budget_bytes > 0), "with no budget a tile is read by itself, four times a block"


def test_a_scene_error_of_labels_is_quarantined(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, "a", (16, 8))
    np.save(tmp_path / "numbers.npy", np.zeros((16, 8)))
    checked: list[Any] = []

    class Failing(SyntheticLabels):
        def read(self, window: tuple[slice, ...]) -> Any:
            if not checked:
                checked.append(window)
                return super().read(window)
            raise SceneError("labels are gone")

    settings = changed(split=SplitSettings(val_fraction=0))
    labels = {"a": Failing(tmp_path / "numbers.npy")}
    with pytest.raises(PreparationError, match="labels are gone"):
        prepare(Scenes((scene,)), tmp_path / "out", settings, labels=labels)
