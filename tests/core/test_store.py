"""What is read is what was written; whatever is missing or altered is refused by name, and never answered with zeros."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core.chunks import Compression, crc32c
from mae_core.shards import NO_CHUNK
from mae_core.store import StoreError, TileStore
from mae_core.store_check import check_store
from mae_core.store_files import LocalFiles
from mae_core.store_folder import sha256_of, store_digest
from mae_core.store_writer import ShardWriter, StoreLayout, finish, merge_moments

LAYOUT = StoreLayout(10, ("A", "B", "C"), (5, 6), ("y", "x"), "int16", 4, has_labels=True)
TILES = (0, 2, 3, 4, 5, 9)
MOMENTS: dict[str, list[float | None]] = {
    "count": [4, 4, 0],
    "mean": [1.0, 2.0, 0.0],
    "m2": [4.0, 0.0, 0.0],
    "min": [0.0, 2.0, None],
    "max": [2.0, 2.0, None],
}


def arrays(tile: int, layout: StoreLayout = LAYOUT) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(tile)
    pixels = rng.integers(-100, 100, (len(layout.channels), *layout.tile)).astype(layout.dtype)
    labels = rng.integers(-1, 5, layout.tile).astype(np.int16) if layout.has_labels else None
    return pixels, rng.integers(0, 2, layout.tile).astype(np.uint8), labels


def row(tile: int) -> dict[str, Any]:
    return {
        "tile": tile,
        "scene": f"scene {tile // 4}",
        "group": f"group {tile // 4}",
        "split": "val" if tile > 8 else "train",
        "origin": [tile, 0],
        "extent": [5, 4],
        "owned": [5, 3],
        "affine": [1.0, 0, tile, 0, 1, 0, 0, 0, 1],
        "frame": "EPSG:32632",
        "unit": "m",
        "valid_fraction": 0.5,
        "present": [True, True, False],
        "scale": [0.5, 1.0, 1.0],
        "offset": [-1.0, 0.0, 0.0],
    }


def write_store(path: Path, layout: StoreLayout = LAYOUT) -> Path:
    shards: dict[str, Any] = {}
    for shard in range(layout.num_shards):
        with ShardWriter(path, layout, shard) as writer:
            for tile in (tile for tile in TILES if tile // layout.tiles_per_shard == shard):
                writer.add(tile, *arrays(tile, layout))
        shards |= writer.files
    finish(
        path,
        layout,
        attributes={"kind": "raster", "channels": [{"name": name} for name in layout.channels], "no_value": 127, "classes": [0, 1]},
        rows=[row(tile) for tile in TILES],
        statistics=merge_moments([MOMENTS], 3),
        shards=shards,
        manifest={"tiles": {"accepted": len(TILES)}},
    )
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("written") / "store")


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "store"))


def sign(path: Path, **changes: Any) -> None:
    """Brings the manifest in line with the files as they are now, as a forger or a repair would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    manifest |= changes
    manifest["store_digest"] = store_digest(manifest["files"])
    (path / "manifest.json").write_text(json.dumps(manifest))


def edit(path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((path / name).read_text())
    change(document)
    (path / name).write_text(json.dumps(document))


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(bytes(data))


def test_what_is_read_is_what_was_written(store: Path) -> None:
    opened = TileStore.open(store)
    assert (opened.channels, opened.space, opened.dtype, opened.kind) == (("A", "B", "C"), (5, 6), np.dtype("int16"), "raster")
    assert (len(opened), opened.no_value, check_store(store).problems) == (6, 127, ())
    for number, tile in enumerate(TILES):
        read = opened.read(number)
        pixels, quality, labels = arrays(tile)
        assert read.tile == tile
        assert read.pixels.dtype == np.int16
        assert read.labels is not None
        np.testing.assert_array_equal(read.pixels, pixels)
        np.testing.assert_array_equal(read.quality, quality)
        np.testing.assert_array_equal(read.labels, labels)
        assert (read.extent, read.present.tolist()) == ((5, 4), [True, True, False])
        assert (read.scale.tolist(), read.offset.tolist(), read.scale.dtype.name) == ([0.5, 1, 1], [-1, 0, 0], "float32")
    assert opened.rows("train").tolist() == [0, 1, 2, 3, 4]
    assert opened.rows("val").tolist() == [5]
    assert opened.index.scene.tolist() == [f"scene {tile // 4}" for tile in TILES]
    assert opened.index.affine.shape == (6, 9)
    with pytest.raises(IndexError, match="row 6 of a store of 6 tiles"):
        opened.read(6)


def test_a_channel_without_voxels_has_harmless_statistics(store: Path) -> None:
    statistics = TileStore.open(store).statistics
    assert statistics.count.tolist() == [4, 4, 0]
    assert statistics.mean.tolist() == [1, 2, 0]
    assert statistics.std.tolist() == [1, 0, 1]


def zarr_arrays(store: Path, mode: Any = "r") -> Any:
    return zarr.open_group(store, mode=mode)


def test_zarr_reads_the_same(store: Path) -> None:
    group = zarr_arrays(store)
    opened = TileStore.open(store)
    for number, tile in enumerate(TILES):
        read = opened.read(number)
        np.testing.assert_array_equal(group["pixels"][tile], read.pixels)
        np.testing.assert_array_equal(group["quality"][tile], read.quality)
        np.testing.assert_array_equal(group["labels"][tile], read.labels)
    assert group["pixels"].metadata.dimension_names == ("tile", "channel", "y", "x")
    assert group.attrs["format_version"] == 1
    assert (group["labels"][1] == -1).all(), "an empty position has no label"


def test_zarr_written_shards_are_read(store: Path) -> None:
    """The other way round: a shard that zarr-python wrote is decoded to the same."""
    group = zarr_arrays(store, "r+")
    values = np.arange(4 * 3 * 5 * 6, dtype=np.int16).reshape(4, 3, 5, 6)
    group["pixels"][:4] = values
    sign(store)
    np.testing.assert_array_equal(TileStore.open(store).read(1).pixels, values[2])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.sampled_from(["uint8", "uint16", "int32", "float32"]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(["fast", "small"]),
)
def test_any_axes_and_type_survive(space: list[int], dtype: str, num_channels: int, per_shard: int, compression: Compression) -> None:
    from tempfile import TemporaryDirectory

    names = tuple("ABC"[:num_channels])
    layout = StoreLayout(3, names, tuple(space), tuple("zyx"[: len(space)]), dtype, per_shard, False, compression)
    with TemporaryDirectory() as folder:
        for shard in range(layout.num_shards):
            with ShardWriter(Path(folder), layout, shard) as writer:
                for tile in range(shard * per_shard, min(3, (shard + 1) * per_shard)):
                    writer.add(tile, *arrays(tile, layout))
        array, files = layout.arrays["pixels"], LocalFiles(Path(folder))
        for tile in range(3):
            out = np.empty(array.shape[1:], array.stored_dtype)
            array.unpack(files, tile, array.fetch(files, [tile])[0], out)
            np.testing.assert_array_equal(out, arrays(tile, layout)[0])


def test_a_missing_shard_is_refused_by_name(store: Path) -> None:
    opened = TileStore.open(store)
    (store / "pixels/c/1/0/0/0").unlink()
    message = r"pixels shard c/1/0/0/0 \(tiles 4–7\) "
    for verify in ("sizes", "checksums"):
        with pytest.raises(StoreError, match=message + "is missing"):
            TileStore.open(store, verify=verify)
    with pytest.raises(StoreError, match=message + "cannot be read: No such file"):
        opened.read(3)
    missing = [problem for problem in check_store(store).problems if "is missing" in problem]
    assert missing == ["pixels shard c/1/0/0/0 (tiles 4–7) is missing"]
    assert opened.read(0).tile == 0, "the rest can be read"


@pytest.mark.parametrize("array", ["pixels", "quality", "labels"])
def test_a_flipped_bit_is_refused_by_name(store: Path, array: str) -> None:
    file = next((store / array / "c" / "0").rglob("0"))
    while file.is_dir():
        file = file / "0"
    flip(file, 10)
    with pytest.raises(StoreError, match=rf"{array} shard c/0/0.*\(tiles 0–3\) fails its sha256"):
        TileStore.open(store)
    opened = TileStore.open(store, verify="sizes")
    with pytest.raises(StoreError, match=rf"{array} shard c/0/0.*the chunk of tile 0 fails its crc32c"):
        opened.read(0)


def test_a_damaged_chunk_index_is_refused(store: Path) -> None:
    file = store / "quality/c/0/0/0"
    flip(file, file.stat().st_size - 20)
    with pytest.raises(StoreError, match=r"quality shard c/0/0/0 \(tiles 0–3\) is damaged: its chunk index"):
        TileStore.open(store, verify="sizes").read(0)


def test_a_truncated_shard_is_refused(store: Path) -> None:
    file = store / "labels/c/0/0/0"
    opened = TileStore.open(store)
    os.truncate(file, 30)
    with pytest.raises(StoreError, match=r"labels shard c/0/0/0 \(tiles 0–3\) has 30 bytes, the manifest says \d+"):
        TileStore.open(store, verify="sizes")
    with pytest.raises(StoreError, match="labels shard c/0/0/0"):
        opened.read(0)
    os.truncate(file, 0)
    with pytest.raises(StoreError, match="labels shard c/0/0/0"):
        opened.read(0)


def replace_index(file: Path, change: Callable[[np.ndarray], None]) -> None:
    data = file.read_bytes()
    index = np.frombuffer(data[-(16 * 4 + 4) : -4], "<u8").reshape(4, 2).copy()
    change(index)
    tail = index.tobytes()
    file.write_bytes(data[: -len(tail) - 4] + tail + crc32c(tail).to_bytes(4, "little"))


def test_a_chunk_left_out_of_its_shard_is_no_zeros(store: Path) -> None:
    replace_index(store / "pixels/c/0/0/0/0", lambda index: index[2].fill(NO_CHUNK))
    sign(store)
    opened = TileStore.open(store)
    assert (zarr_arrays(store)["pixels"][2] == 0).all(), "this is what zarr answers"
    with pytest.raises(StoreError, match=r"pixels shard c/0/0/0/0 \(tiles 0–3\) holds no chunk for tile 2, which the index lists"):
        opened.read(1)
    assert check_store(store).problems == ("pixels shard c/0/0/0/0 (tiles 0–3) holds no chunk for tile 2",)


def test_a_chunk_outside_the_file_is_refused(store: Path) -> None:
    replace_index(store / "pixels/c/0/0/0/0", lambda index: index[0].fill(10**12))
    sign(store)
    with pytest.raises(StoreError, match="the chunk of tile 0 lies outside the file"):
        TileStore.open(store).read(0)


def test_a_chunk_of_another_size_is_refused_before_it_is_unpacked(store: Path) -> None:
    for size in (100, 300, 10**7):
        chunk = LAYOUT.arrays["quality"].encode(np.zeros(size, np.uint8))
        file = store / "quality/c/2/0/0"
        file.write_bytes(chunk + b"\0" * 68)
        entries = np.array([[NO_CHUNK] * 2, [0, len(chunk)], [NO_CHUNK] * 2, [NO_CHUNK] * 2], "<u8")
        replace_index(file, lambda index, entries=entries: index.__setitem__(slice(None), entries))  # type: ignore[misc]
        sign(store)
        with pytest.raises(StoreError, match=f"the chunk of tile 9 holds {size} bytes, wanted 30"):
            TileStore.open(store).read(5)


def test_a_missing_row_is_refused(store: Path) -> None:
    from pyarrow import parquet

    table = parquet.read_table(store / "index.parquet")
    parquet.write_table(table.slice(1), store / "index.parquet")
    with pytest.raises(StoreError, match=r"index.parquet"):
        TileStore.open(store, verify="sizes")
    sign(store)
    with pytest.raises(StoreError, match=r"index.parquet has 5 rows, the manifest says 6"):
        TileStore.open(store)


def test_a_row_whose_shard_is_not_listed_is_refused(store: Path) -> None:
    edit(store, "manifest.json", lambda manifest: manifest["files"].pop("pixels/c/2/0/0/0"))
    sign(store)
    with pytest.raises(StoreError, match=r"pixels shard c/2/0/0/0 \(tiles 8–9\) is not in the manifest"):
        TileStore.open(store)


def test_an_altered_manifest_is_refused(store: Path) -> None:
    edit(store, "manifest.json", lambda manifest: manifest["files"].pop("statistics.json"))
    with pytest.raises(StoreError, match=r"manifest.json is altered"):
        TileStore.open(store)
    sign(store)
    with pytest.raises(StoreError, match=r"does not list statistics.json"):
        TileStore.open(store)
    (store / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest.json is damaged"):
        TileStore.open(store)


def test_what_is_not_a_finished_store_is_refused(store: Path, tmp_path: Path) -> None:
    (store / "manifest.json").unlink()
    with pytest.raises(StoreError, match="not a tile store; run prepare"):
        TileStore.open(store)
    (store / "progress").mkdir()
    with pytest.raises(StoreError, match="not finished: run prepare again"):
        TileStore.open(store)
    with pytest.raises(StoreError, match="is not a folder"):
        TileStore.open(tmp_path / "nowhere")


def test_another_format_version_is_refused(store: Path) -> None:
    sign(store, format_version=7)
    with pytest.raises(StoreError, match="format terravox-tiles 7, this version reads terravox-tiles 1"):
        TileStore.open(store)


def test_a_path_that_leaves_the_store_is_refused(store: Path) -> None:
    (store.parent / "secret").write_text("x")
    (store / "link").symlink_to(store.parent / "secret")
    for name in ("../secret", str(store.parent / "secret"), "link"):
        copy = json.loads((store / "manifest.json").read_text())
        copy["files"][name] = {"bytes": 1, "sha256": "0"}
        copy["store_digest"] = store_digest(copy["files"])
        kept = (store / "manifest.json").read_text()
        (store / "manifest.json").write_text(json.dumps(copy))
        with pytest.raises(StoreError, match="lies outside the store"):
            TileStore.open(store)
        (store / "manifest.json").write_text(kept)


def test_unknown_codecs_and_types_are_refused_before_a_chunk_is_read(store: Path) -> None:
    kept = (store / "pixels/zarr.json").read_text()

    def inner(document: dict[str, Any]) -> dict[str, Any]:
        configuration: dict[str, Any] = document["codecs"][0]["configuration"]
        return configuration

    changes: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
        ("element type 'complex64' is not allowed", lambda document: document.update(data_type="complex64")),
        ("codecs .*'pickle'.* are not allowed", lambda document: inner(document)["codecs"][1].update(name="pickle")),
        (r"codecs \['bytes'\] are not allowed", lambda document: document.update(codecs=[{"name": "bytes"}])),
        ("not one tile per chunk", lambda document: inner(document).update(chunk_shape=[2, 3, 5, 6])),
        ("not one tile per chunk", lambda document: inner(document)["codecs"][0]["configuration"].update(endian="big")),
        ("not one tile per chunk", lambda document: inner(document).update(index_location="start")),
    ]
    for message, change in changes:
        (store / "pixels/zarr.json").write_text(kept)
        edit(store, "pixels/zarr.json", change)
        (store / "quality/c/0/0/0").write_bytes(b"")
        sign(store)
        with pytest.raises(StoreError, match=f"pixels/zarr.json: .*{message}"):
            TileStore.open(store)


def total(store: TileStore) -> int:
    return sum(int(store.read(number).pixels.astype(np.int64).sum()) for number in range(len(store)))


def test_threads_and_a_pickled_copy_read_the_same(store: Path) -> None:
    opened = TileStore.open(store)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: total(opened), range(40))) == {total(opened)} == {total(pickle.loads(pickle.dumps(opened)))}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_started_after_reading_reads_too(store: Path, method: str) -> None:
    opened = TileStore.open(store)
    wanted = total(opened)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert pool.submit(total, opened).result(timeout=60) == wanted


def test_the_same_content_gives_the_same_digest(store: Path, tmp_path: Path) -> None:
    assert TileStore.open(write_store(tmp_path / "again")).digest == TileStore.open(store).digest
