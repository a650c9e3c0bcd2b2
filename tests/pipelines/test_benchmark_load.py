"""The benchmark of loader and codecs measures what it says, on a tiny store, and its figures hang together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from multiprocessing import dummy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_core.store import TileStore
from mae_core.store_files import LocalFiles
from pipelines import benchmark_load, benchmark_readers
from pipelines.benchmark import main
from pipelines.benchmark_codec import CODECS
from pipelines.benchmark_readers import drawn_crops, forget_files, read_files, shard_files, unpack_all, zarr_crops
from tests.tiny_runs import one_thread, shared_store


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn is one reading."""
    monkeypatch.setattr(benchmark_load, "SMALLEST_S", 0.0)
    monkeypatch.setattr(benchmark_load.multiprocessing, "get_context", lambda _: dummy)  # threads: a process takes seconds to start


def figures(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.usefixtures("quick")
def test_every_way_is_measured_in_every_round_against_the_codec(
    store: TileStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "threads=[1,2]",
        "crops_per_tile=[1,2]",
        "batch_size=4",
        "rounds=2",
        "num_naive_crops=5",
        "memory_epochs=3",
        "step_seconds=0.01",
    ]
    recipe = ["recipe.model.encoder.preset=nano", "recipe.model.encoder.patch=[4,4]", "recipe.crop=[8,8]"]
    assert main(["load", f"store={store.path}", f"out={tmp_path / 'load.json'}", *words, *recipe]) == 0
    found = figures(tmp_path / "load.json")
    rates = found["tiles_per_second"]
    assert set(rates) >= {
        "unpacking alone",
        "ours, 1 thread, 1 crop a tile",
        "ours, 2 threads, 1 crop a tile",
        "ours, 2 threads, 2 crops a tile",
        "zarr, crop by crop",
        "zarr, shard by shard",
    }
    assert all(len(each) == 2 and min(each) > 0 for each in rates.values())
    each = [one / two for one, two in zip(rates["ours, 2 threads, 1 crop a tile"], rates["unpacking alone"], strict=True)]
    assert found["ours_over_ceiling"] == pytest.approx({"median": np.median(each), "least": min(each), "most": max(each)})
    assert found["store"]["training_tiles"] == len(store.rows("train"))
    assert 0 <= found["step"]["waiting_fraction"] <= 1
    assert found["memory"]["epochs"] == 3
    assert found["processes_over_threads"] > 0
    told = " ".join(capsys.readouterr().out.split())
    assert "resident memory after 3 and 3 epochs" in told
    assert "of the time waiting" in told


@pytest.mark.skipif(benchmark_readers.read_bytes() is None, reason="this system does not tell how many bytes a process has read")
def test_an_epoch_reads_each_packed_byte_about_once(store: TileStore) -> None:
    bench = benchmark_load.Bench(benchmark_load.LoadSettings(batch_size=4, threads=(1,)), store)
    amplification = bench.amplification()
    assert amplification is not None
    index = sum(16 * array.tiles_per_shard + 4 for array in store.arrays.values()) * len(np.unique(store.shards[bench.rows]))
    assert 1 <= amplification <= 1.2 * (bench.packed_bytes + index) / bench.packed_bytes


def test_the_files_are_those_of_the_rows_and_are_read_whole(store: TileStore) -> None:
    rows = store.rows("train")
    files = shard_files(store, rows)
    assert len(files) == len(set(files)) == 2 * len(np.unique(store.shards[rows]))
    assert read_files(store, rows) == sum(Path(file).stat().st_size for file in files)
    assert forget_files(store, rows)
    assert read_files(store, rows) == sum(Path(file).stat().st_size for file in files)


def test_unpacking_alone_unpacks_every_tile(store: TileStore) -> None:
    rows = store.rows("train")
    rooms = [store.empty(len(rows)) for _ in range(2)]
    unpack_all(store, rows, store.fetch(rows), rooms)
    for number, room in enumerate(rooms):
        for place, row in enumerate(rows[number::2].tolist()):
            np.testing.assert_array_equal(room["pixels"][place], store.read(row).pixels)


def test_naive_crops_are_those_of_training_tiles(store: TileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = drawn_crops(store, (8, 5), 30, 1)
    assert set(crops.tiles.tolist()) <= set(store.index.tile[store.rows("train")].tolist())
    assert {tuple(part.stop - part.start for part in box) for box in crops.boxes} == {(8, 5)}
    assert all(part.start >= 0 and part.stop <= size for box in crops.boxes for part, size in zip(box, store.space, strict=True))
    import zarr

    seen = []
    original = zarr.Array.__getitem__
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda self, where: seen.append((self.name, where)) or original(self, where))  # type: ignore[func-returns-value]
    zarr_crops(crops, 1)
    assert len(seen) == 30 * len(store.arrays)
    assert seen[0] == ("/pixels", (int(crops.tiles[0]), slice(None), *crops.boxes[0]))


def test_codecs_are_measured_on_the_tiles_of_a_store(store: TileStore, tmp_path: Path) -> None:
    assert main(["codec", f"store={store.path}", f"out={tmp_path / 'codec.json'}", "num_tiles=3", "rounds=1"]) == 0
    found = figures(tmp_path / "codec.json")
    assert found["tiles"]["number"] == 3
    assert set(found["codecs"]) == set(CODECS)
    tile = store.read(0).pixels
    for name, codec in CODECS.items():
        assert min(found["codecs"][name].values()) > 0
        assert found["codecs"][name]["times_packed"] == pytest.approx(tile.nbytes / len(codec.encode(tile)), rel=0.5)


def test_too_few_tiles_and_a_damaged_store_are_told(store: TileStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", f"store={store.path}"]) == 1
    assert "too few for batches of 64" in " ".join(capsys.readouterr().err.split())
    shutil.copytree(store.path, tmp_path / "store")
    assert LocalFiles(tmp_path / "store").size("index.parquet")
    (tmp_path / "store" / "index.parquet").unlink()
    assert main(["load", f"store={tmp_path / 'store'}"]) == 1
    assert "index.parquet is missing" in " ".join(capsys.readouterr().err.split())
