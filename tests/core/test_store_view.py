"""Several stores read as one are the tiles of each, in turn; what does not go together is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core.loader import LoaderSettings, Stream
from mae_core.store import StoreError, TileIndex, TileStore
from mae_core.store_check import check_store
from mae_core.store_view import write_view
from mae_core.store_writer import merge_moments
from tests.synthetic_stores import pixels_of, small_store
from tests.tiny_runs import ALONE


def merged(folder: Path, *stores: TileStore) -> TileStore:
    write_view(folder, [store.path for store in stores])
    return TileStore.open(folder)


def test_a_view_is_the_tiles_of_each_store_in_turn(tmp_path: Path) -> None:
    stores = [small_store(tmp_path / name, name) for name in ("a", "b", "c")]
    view = merged(tmp_path / "view", *stores)
    assert [path.name for path in (tmp_path / "view").iterdir()] == ["view.json"], "nothing is copied"
    assert len(view) == 18
    assert view.index.tile.tolist() == [base + tile for base in (0, 7, 14) for tile in (0, 1, 3, 4, 5, 6)]
    assert view.shards.tolist() == [base + shard for base in (0, 3, 6) for shard in (0, 0, 1, 1, 1, 2)]
    assert (np.diff(view.shards) >= 0).all()
    for number, store in enumerate(stores):
        for row in range(6):
            ours, theirs = view.read(6 * number + row), store.read(row)
            np.testing.assert_array_equal(ours.pixels, theirs.pixels)
            np.testing.assert_array_equal(ours.quality, theirs.quality)
            assert ours.tile == theirs.tile + 7 * number
        for field in fields(TileIndex):
            if field.name != "tile":
                part = getattr(view.index, field.name)[6 * number : 6 * number + 6]
                np.testing.assert_array_equal(part, getattr(store.index, field.name))
    assert check_store(view.path).problems == ()
    assert view.manifest["tiles"] == {"found": 21, "accepted": 18, "train": 9, "val": 9, "discarded": {"too little": 3}}
    assert view.manifest["notes"] == ["note of a", "note of b", "note of c"]
    assert view.attributes["classes"] == [0, *map(ord, "abc")]
    assert view.num_bytes == sum(store.num_bytes for store in stores)
    assert len({view.digest, *(store.digest for store in stores)}) == 4


def test_statistics_are_those_of_all_training_tiles(tmp_path: Path) -> None:
    view = merged(tmp_path / "view", small_store(tmp_path / "a", "a"), small_store(tmp_path / "b", "b", ("B", "C")))
    assert view.channels == ("A", "B", "C")
    first = np.array([[pixels_of("a", tile, ("A", "B"))[:, 0, 0]] for tile in (0, 1, 3)], np.float64).reshape(3, 2)
    second = np.array([[pixels_of("b", tile, ("B", "C"))[:, 0, 0]] for tile in (0, 1, 3)], np.float64).reshape(3, 2)
    columns = [first[:, 0], np.concatenate([first[:, 1], second[:, 0]]), second[:, 1]]
    assert view.statistics.count.tolist() == [3, 6, 3]
    np.testing.assert_allclose(view.statistics.mean, [column.mean() for column in columns])
    np.testing.assert_allclose(view.statistics.std, [column.std() for column in columns])
    np.testing.assert_allclose(view.statistics.minimum, [column.min() for column in columns])
    np.testing.assert_allclose(view.statistics.maximum, [column.max() for column in columns])


def test_channels_are_brought_together_by_name_and_what_a_store_lacks_is_absent(tmp_path: Path) -> None:
    view = merged(tmp_path / "view", small_store(tmp_path / "a", "a", ("A", "B")), small_store(tmp_path / "b", "b", ("C", "B")))
    assert view.channels == ("A", "B", "C")
    first, second = view.read(1), view.read(7)
    assert (first.present.tolist(), second.present.tolist()) == ([True, True, False], [False, True, True])
    assert first.pixels[:, 0, 0].tolist() == [10, 11, 0]
    assert second.pixels[:, 0, 0].tolist() == [0, 1011, 1012]
    assert (second.scale.tolist(), second.offset.tolist()) == ([1, 0.5, 0.5], [0, 1, 1])


def test_a_view_is_trained_on_like_a_store(tmp_path: Path) -> None:
    view = merged(tmp_path / "view", small_store(tmp_path / "a", "a"), small_store(tmp_path / "b", "b", ("B", "A")))
    stream = Stream(view, view.rows("train"), LoaderSettings(global_batch_size=3, window_shards=2), 0, ALONE)
    row_of = {int(tile): row for row, tile in enumerate(view.index.tile)}
    seen = []
    for batches, _ in stream.steps(0, 4):
        for place, tile in enumerate(batches[0].sample.tile.tolist()):
            np.testing.assert_array_equal(batches[0].pixels[place].numpy(), view.read(row_of[tile]).pixels)
            seen.append(tile)
    assert sorted(seen[:6]) == sorted(seen[6:]) == [0, 1, 3, 7, 8, 10]


def test_moved_together_it_still_reads_and_a_store_that_changed_is_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    stores = [small_store(tmp_path / "one" / name, name) for name in ("a", "b")]
    digest = merged(tmp_path / "one" / "view", *stores).digest
    (tmp_path / "one").rename(tmp_path / "two")
    assert TileStore.open(tmp_path / "two" / "view").digest == digest
    shutil.rmtree(tmp_path / "two" / "b")
    with pytest.raises(StoreError, match=r"view: its store \.\./b cannot be read .*put it back or merge again"):
        TileStore.open(tmp_path / "two" / "view")
    small_store(tmp_path / "two" / "b", "d")
    with pytest.raises(StoreError, match=r"its store \.\./b has changed since they were merged .*merge again"):
        TileStore.open(tmp_path / "two" / "view")


def test_damage_in_a_member_is_named(tmp_path: Path) -> None:
    view = merged(tmp_path / "view", small_store(tmp_path / "a", "a"), small_store(tmp_path / "b", "b"))
    (tmp_path / "b" / "pixels/c/1/0/0/0").unlink()
    assert next(problem.split(": ", 1)[1] for problem in check_store(view.path).problems) == "pixels shard c/1/0/0/0 (tiles 3–5) is missing"
    assert str(tmp_path / "b") in check_store(view.path).problems[0]
    with pytest.raises(StoreError, match=r"b: pixels shard c/1/0/0/0 \(tiles 3–5\) cannot be read"):
        view.read(8)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"tile": (5, 6), "dtype": "uint16"}, r"element type uint16 is not int16; prepare them alike"),
        ({"has_labels": True}, r"labels True is not False"),
        ({"axes": ("x", "y")}, r"names of the axes \['x', 'y'\] is not \['y', 'x'\]"),
        ({"groups": {"a 0": "val", "b 1": "train"}}, r"group a 0 is trained on in one store and held out in another"),
        ({"name": "a"}, r"scene scene a 0 is in .*first and in .*second \(2 such scenes\)"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    first = small_store(tmp_path / "first", "a")
    second = small_store(tmp_path / "second", **({"name": "b"} | other))
    with pytest.raises(StoreError, match=words):
        merged(tmp_path / "view", first, second)


def test_a_view_is_written_into_an_empty_folder_once_for_each_store(tmp_path: Path) -> None:
    store = small_store(tmp_path / "a", "a")
    with pytest.raises(StoreError, match="named more than once"):
        write_view(tmp_path / "view", [store.path, store.path])
    with pytest.raises(StoreError, match="is taken; a view wants a new or empty folder"):
        write_view(tmp_path / "a", [store.path])
    merged(tmp_path / "view", store, small_store(tmp_path / "b", "b"))
    for change in ({"format": "other"}, {"stores": []}, {"stores": [{"path": 1}]}):
        document = json.loads((tmp_path / "view/view.json").read_text()) | change
        (tmp_path / "spoilt").mkdir(exist_ok=True)
        (tmp_path / "spoilt/view.json").write_text(json.dumps(document))
        with pytest.raises(StoreError, match=r"spoilt/view.json is .*merge the stores again"):
            TileStore.open(tmp_path / "spoilt")


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=6), min_size=1, max_size=6))
def test_merged_moments_equal_numpy(parts: list[list[float]]) -> None:
    def moments(values: list[float]) -> dict[str, list[float | None]]:
        if not values:
            return {"count": [0], "mean": [0], "m2": [0], "min": [None], "max": [None]}
        m2 = np.var(values) * len(values)
        return {"count": [len(values)], "mean": [np.mean(values)], "m2": [m2], "min": [min(values)], "max": [max(values)]}  # type: ignore[list-item]

    merged = merge_moments([moments(part) for part in parts], 1)
    every = [value for part in parts for value in part]
    assert merged["count"] == [len(every)]
    if not every:
        assert merged["mean"] == merged["std"] == merged["min"] == merged["max"] == [None]
        return
    np.testing.assert_allclose(merged["mean"], [np.mean(every)], rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(merged["std"], [np.std(every)], rtol=1e-6, atol=1e-6)
    assert (merged["min"], merged["max"]) == ([min(every)], [max(every)])
