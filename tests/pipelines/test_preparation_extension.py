"""A finished store takes in new scenes: what is there stays to the byte, and until the last moment it is what it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mae_core.store_writer
import pipelines.preparation_folder
from mae_core.store import StoreError, TileStore
from mae_core.store_check import check_store
from pipelines.preparation import PreparationError, PrepareSettings, prepare
from pipelines.preparation_extension import OVERLAPS, OVERLAPS_EARLIER, TIES
from pipelines.tiling_plan import SplitSettings
from tests.synthetic_scenes import Scenes, SyntheticLabels, SyntheticScene, make_scene, three_places, tree

HERE = PrepareSettings(tile=(8, 8), tiles_per_shard=4, num_workers=0)


def changed(settings: PrepareSettings = HERE, **values: Any) -> PrepareSettings:
    return PrepareSettings(**{**settings.model_dump(), **values})


def grown(folder: Path) -> tuple[Scenes, Scenes]:
    """Three places, and the same with two more whose names lie between."""
    old = three_places(folder)
    new = (make_scene(folder, "ab", (17, 16), scale=0.5), make_scene(folder, "bb", (8, 6), channels=("B",), dtype="uint8"))
    return old, Scenes((*old.scenes, *new))


def columns(store: TileStore, rows: slice) -> dict[str, Any]:
    columns = {name: values[rows] for name, values in vars(store.index).items()}
    return {name: (np.nan_to_num(values, nan=-999) if values.dtype.kind == "f" else values).tolist() for name, values in columns.items()}


def test_what_is_there_stays_and_what_is_new_is_added(tmp_path: Path) -> None:
    old, every = grown(tmp_path)
    out = prepare(old, tmp_path / "out", HERE).path
    before, first = tree(out), TileStore.open(out)
    report = prepare(every, out, HERE)
    assert (report.added, report.gone, report.done) == (("ab", "bb"), (), 7)
    assert "2 scenes added to the earlier store: ab, bb" in report.summary()
    after, store = tree(out), TileStore.open(out)
    assert check_store(store.path).problems == ()
    assert {name for name in before if after[name] != before[name]} == {
        *("index.parquet", "statistics.json", "histogram.parquet", "manifest.json"),
        *("pixels/zarr.json", "quality/zarr.json"),
    }
    assert columns(store, slice(0, len(first))) == columns(first, slice(None))
    added = store.index.tile[len(first) :]
    assert added.tolist() == [20, 21, 22, 23, 24, 25, 28], "a new shard, and a scene that does not fit into the rest of it another"
    assert not set(report.path.rglob("*.next")) | set(report.path.rglob("progress"))
    for row in range(len(first), len(store)):
        scene = next(scene for scene in every.scenes if scene.name == store.index.scene[row])
        window = tuple(
            slice(int(start), int(start + size)) for start, size in zip(store.index.origin[row], store.index.extent[row], strict=True)
        )
        inside = tuple(slice(0, int(size)) for size in store.index.extent[row])
        channels = [store.channels.index(channel.name) for channel in scene.channels]
        np.testing.assert_array_equal(store.read(row).pixels[(channels, *inside)], scene.read(window)[0])
    again = prepare(every, out, HERE)
    assert again.already_done
    assert tree(out) == after
    assert again.accepted == report.accepted == len(store)


def test_statistics_are_those_of_all_training_voxels(tmp_path: Path) -> None:
    old, every = grown(tmp_path)
    prepare(old, tmp_path / "out", HERE)
    store = TileStore.open(prepare(every, tmp_path / "out", HERE).path)
    train = set(store.index.scene[store.rows("train")].tolist())
    assert {"ab", "bb"} & train
    for place, name in enumerate(store.channels):
        values = []
        for scene in (scene for scene in every.scenes if scene.name in train and name in [channel.name for channel in scene.channels]):
            pixels, quality = scene.read(scene.grid.full)
            channel = [channel.name for channel in scene.channels].index(name)
            values.append(pixels[channel][quality == 0].astype(np.float64) * scene.channels[channel].scale)
        every_value = np.concatenate(values)
        found = [getattr(store.statistics, kind)[place] for kind in ("count", "mean", "std", "minimum", "maximum")]
        wanted = [len(every_value), every_value.mean(), every_value.std(), every_value.min(), every_value.max()]
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


class Killed(BaseException):
    """Nothing tidies up after it."""


def stopping(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stops before or after the renaming number `at // 2`, and before the folder of the progress is removed; counts in `count`."""
    rename, remove = mae_core.store_writer._rename, shutil.rmtree
    stop = {"at": -1, "count": 0}

    def stop_at_rename(source: Path, target: Path) -> None:
        stop["count"] += 1
        if stop["count"] * 2 == stop["at"]:
            if "/c/" in source.as_posix():  # any other is written over
                shutil.copy(source, f"{source}.left.tmp")
            raise Killed
        rename(source, target)
        if stop["count"] * 2 + 1 == stop["at"]:
            raise Killed

    def stop_at_removal(folder: Path) -> None:
        stop["count"] += 1
        if stop["count"] * 2 in (stop["at"], stop["at"] - 1):
            raise Killed
        remove(folder)

    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(mae_core.store_writer, "_rename", stop_at_rename)
    monkeypatch.setattr(pipelines.preparation_folder.shutil, "rmtree", stop_at_removal)
    return stop


def test_stopped_between_any_two_steps_it_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, every = grown(tmp_path)
    start = prepare(old, tmp_path / "start", HERE)
    shutil.copytree(start.path, tmp_path / "whole")
    whole = tree(prepare(every, tmp_path / "whole", HERE).path)
    out, copy = tmp_path / "out", shutil.copytree
    remove = shutil.rmtree
    stop = stopping(monkeypatch)
    steps = 1 + 3 * 3 + 6 + 1 + 6 + 1 + 1
    seen = {"old": 0, "between": 0, "new": 0}
    for at in range(2, 2 * steps + 2):
        copy(start.path, out)
        stop.update(at=at, count=0)
        with pytest.raises(Killed):
            prepare(every, out, HERE)
        stop.update(at=-1)
        if (out / "progress/commit.json").exists():
            seen["between"] += 1
            with pytest.raises(StoreError, match="prepare again, it finishes at once"):
                TileStore.open(out)
        else:
            store = TileStore.open(out)
            assert check_store(store.path).problems == ()
            seen["old" if store.digest == start.digest else "new"] += 1
        prepare(every, out, HERE)
        assert tree(out) == whole, f"stopped at {at}"
        remove(out)
    assert seen == {"old": 2 * 16 + 1, "between": 1 + 2 * 7, "new": 2}
    copy(start.path, out)
    stop.update(at=-1, count=0)
    prepare(every, out, HERE)
    assert stop["count"] == steps, "every renaming was a stop once"


def interrupted(scenes: Scenes, out: Path, tiles: int) -> None:
    def progress(done: int, total: int) -> None:
        if done >= tiles:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(scenes, out, HERE, progress=progress)


def test_what_is_finished_of_new_scenes_is_kept(tmp_path: Path) -> None:
    old, every = grown(tmp_path)
    prepare(old, tmp_path / "out", HERE)
    interrupted(every, tmp_path / "out", 6)
    assert prepare(old, tmp_path / "out", HERE).already_done, "a run without the new scenes has nothing to do"
    done: list[int] = []
    prepare(every, tmp_path / "out", HERE, progress=lambda count, _: done.append(count))
    assert done == [6, 7]


def test_a_catalogue_that_grew_once_more_meanwhile_leaves_nothing_of_the_first_try(tmp_path: Path) -> None:
    old, every = grown(tmp_path)
    more = Scenes((*every.scenes[:3], every.scenes[4]))
    for out in ("out", "whole"):
        prepare(old, tmp_path / out, HERE)
    interrupted(every, tmp_path / "out", 6)
    prepare(more, tmp_path / "out", HERE)
    prepare(more, tmp_path / "whole", HERE)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert prepare(every, tmp_path / "out", HERE).added == ("ab",)


def test_another_run_that_finished_meanwhile_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, every = grown(tmp_path)
    prepare(old, tmp_path / "out", HERE)
    claim: Callable[..., Any] = pipelines.preparation.claimed

    def late(out: Path, plan: Any) -> Any:
        monkeypatch.undo()
        prepare(every, out, HERE)
        return claim(out, plan)

    monkeypatch.setattr(pipelines.preparation, "claimed", late)
    with pytest.raises(PreparationError, match="another run has just finished"):
        prepare(Scenes(every.scenes[:4]), tmp_path / "out", HERE)
    assert check_store(tmp_path / "out").problems == ()


def test_scenes_that_are_gone_are_told_and_stay(tmp_path: Path) -> None:
    old, every = grown(tmp_path)
    first = prepare(old, tmp_path / "out", HERE)
    report = prepare(Scenes(old.scenes[1:]), tmp_path / "out", HERE)
    assert (report.already_done, report.gone, report.digest) == (True, ("a",), first.digest)
    assert "1 scenes of the store are no longer in the data, their tiles stay: a" in report.summary()
    report = prepare(Scenes(every.scenes[1:]), tmp_path / "out", HERE)
    assert (report.gone, report.added) == (("a",), ("ab", "bb"))
    assert "a" in TileStore.open(report.path).index.scene


def test_scenes_that_changed_are_refused_by_name(tmp_path: Path) -> None:
    old, every = grown(tmp_path)
    prepare(old, tmp_path / "out", HERE)
    before = tree(tmp_path / "out")
    make_scene(tmp_path, "a", (20, 13), quality=np.zeros((20, 13), np.uint8))
    moved = make_scene(tmp_path, "b", (17, 16), origin=5.0, offset=1.0)
    with pytest.raises(
        PreparationError,
        match=r"2 scenes that are in .* have changed since(?s:.*)another name(?s:.*)\n  a: its files\n  b: its grid, channels",
    ):
        prepare(Scenes((old.scenes[0], moved, *every.scenes[2:])), tmp_path / "out", HERE)
    assert tree(tmp_path / "out") == before


def test_settings_channels_types_and_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    old, _ = grown(tmp_path)
    prepare(old, tmp_path / "out", HERE)
    before = tree(tmp_path / "out")
    cases: list[tuple[SyntheticScene, str]] = [
        (make_scene(tmp_path, "z", (8, 8), channels=("A", "C")), r"channels"),
        (make_scene(tmp_path, "z", (8, 8), dtype="int16"), r"dtype: uint16 there, int32 now"),
    ]
    for scene, message in cases:
        with pytest.raises(PreparationError, match=rf"another plan(?s:.*)What differs:\n  {message}"):
            prepare(Scenes((*old.scenes, scene)), tmp_path / "out", HERE)
    scenes = Scenes((*old.scenes, make_scene(tmp_path, "y", (8, 8))))
    with pytest.raises(PreparationError, match=r"settings.min_valid_fraction: 0.25 there, 0.5 now"):
        prepare(scenes, tmp_path / "out", changed(min_valid_fraction=0.5))
    with pytest.raises(PreparationError, match=r"attributes.kind: None there, x now"):
        prepare(scenes, tmp_path / "out", HERE, attributes={"kind": "x"})
    np.save(tmp_path / "numbers.npy", np.zeros((8, 8)))
    with pytest.raises(PreparationError, match=r"labelled: False there, True now"):
        prepare(scenes, tmp_path / "out", HERE, labels={"y": SyntheticLabels(tmp_path / "numbers.npy")})
    assert tree(tmp_path / "out") == before


def patients(folder: Path, count: int, scans: int, first: int = 0) -> tuple[SyntheticScene, ...]:
    pairs = [(number, scan) for number in range(first, first + count) for scan in range(scans)]
    return tuple(make_scene(folder, f"scan {number:02}-{scan}", (8, 8), group=f"patient {number:02}") for number, scan in pairs)


def sides(store: TileStore) -> dict[str, str]:
    pairs = set(zip(store.index.group.tolist(), store.index.split.tolist(), strict=True))
    assert len({group for group, _ in pairs}) == len(pairs), "a group is on one side"
    return dict(pairs)


def test_old_groups_keep_their_side_and_new_ones_are_held_out_until_there_is_enough(tmp_path: Path) -> None:
    settings = changed(split=SplitSettings(val_fraction=0.2))
    old = patients(tmp_path, 10, 1)
    prepare(Scenes(old), tmp_path / "out", settings)
    before = sides(TileStore.open(tmp_path / "out"))
    assert sorted(before.values()).count("val") == 2
    later = tuple(replace(scene, name=f"{scene.name} later") for scene in patients(tmp_path, 10, 1))
    for scene in later:
        for file, source in zip(scene.files, replace(scene, name=scene.name.removesuffix(" later")).files, strict=True):
            shutil.copy(source, file)
    prepare(Scenes((*old, *later, *patients(tmp_path, 10, 1, 10))), tmp_path / "out", settings)
    store = TileStore.open(tmp_path / "out")
    after = sides(store)
    assert {group: after[group] for group in before} == before
    assert len(store.rows("val")) == 6, "a fifth of 30, of which old patients have four"
    alone = sides(TileStore.open(prepare(Scenes(patients(tmp_path, 10, 1, 10)), tmp_path / "alone", settings).path))
    held = {group for group, side in after.items() if side == "val" and group not in before}
    assert held <= {group for group, side in alone.items() if side == "val"}, "drawn in the same order"


def test_a_scene_that_gives_an_old_place_another_name_joins_it(tmp_path: Path) -> None:
    old = [make_scene(tmp_path, name, (8, 8)) for name in ("b", "c", "d", "e")]
    prepare(Scenes(tuple(old)), tmp_path / "out", HERE)
    before = sides(TileStore.open(tmp_path / "out"))
    (held,) = (name for name, side in before.items() if side == "val")
    renamed = [replace(scene, group="a") if scene.name == held else scene for scene in old]
    prepare(Scenes((*renamed, make_scene(tmp_path, "a", (8, 8)))), tmp_path / "out", HERE)
    store = TileStore.open(tmp_path / "out")
    assert sides(store) == before
    assert store.index.group[store.index.scene == "a"].tolist() == [held]


def test_a_scene_that_ties_both_sides_is_thrown_away_and_counted(tmp_path: Path) -> None:
    old = [make_scene(tmp_path, name, (8, 8)) for name in ("b", "c", "d", "e")]
    prepare(Scenes(tuple(old)), tmp_path / "out", HERE)
    before = sides(TileStore.open(tmp_path / "out"))
    (held,) = (name for name, side in before.items() if side == "val")
    other = next(name for name in before if name != held)
    tied = [replace(scene, group="a") if scene.name in (held, other) else scene for scene in old]
    every = Scenes((*tied, make_scene(tmp_path, "a", (16, 8)), make_scene(tmp_path, "f", (8, 8))))
    report = prepare(every, tmp_path / "out", HERE)
    store = TileStore.open(tmp_path / "out")
    assert dict(report.discarded) == {TIES: 2}
    assert sides(store) == {**before, "f": "train"}
    assert report.found == report.accepted + 2 == 7
    assert prepare(every, tmp_path / "out", HERE).already_done


def test_new_blocks_share_no_ground_with_old_ones_of_the_other_side(tmp_path: Path) -> None:
    split = SplitSettings(unit="block", val_fraction=0.3, block_tiles=2)
    first = make_scene(tmp_path, "june", (61, 45), group="place")
    apart = make_scene(tmp_path, "apart", (40, 40), origin=5000.0)
    old = Scenes((first, apart))
    new = (
        make_scene(tmp_path, "july", (61, 45), group="place"),
        make_scene(tmp_path, "shifted", (40, 60), group="place", origin=105.0),
        make_scene(tmp_path, "wide", (90, 90), group="place", origin=-205.0),
    )
    prepare(old, tmp_path / "out", changed(split=split))
    report = prepare(Scenes((*old.scenes, *new)), tmp_path / "out", changed(split=split))
    store = TileStore.open(tmp_path / "out")
    painted: dict[str, set[tuple[int, ...]]] = {"train": set(), "val": set()}
    for row in range(len(store)):
        corner = np.round(store.index.affine[row].reshape(3, 3)[:2, 2] * 2).astype(int)
        rows, others = (range(-10, 20 * int(size) - 10, 5) for size in store.index.extent[row])
        painted[str(store.index.split[row])] |= {(int(corner[0]) + i, int(corner[1]) + j) for i in rows for j in others}
    assert painted["val"]
    assert not painted["train"] & painted["val"]
    assert report.discarded[OVERLAPS] > 0
    assert report.discarded[OVERLAPS_EARLIER] > 0
    assert report.found == report.accepted + sum(report.discarded.values())
    july = [str(store.index.group[row]) for row in range(len(store)) if store.index.scene[row] == "july"]
    assert {name.split(" block")[0] for name in july} == {"place"}
