"""A shard is written whole or not at all, by whichever writer is last, and takes only what fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mae_core.shards import NO_CHUNK
from mae_core.store_files import LocalFiles
from mae_core.store_folder import sha256_of
from mae_core.store_writer import ShardWriter, StoreLayout, writing
from tests.core.test_store import LAYOUT, arrays


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def shard() -> None:
        with ShardWriter(tmp_path, LAYOUT, 0) as writer:
            writer.add(0, *arrays(0))
            raise ZeroDivisionError

    def file() -> None:
        with writing(tmp_path / "file") as stream:
            stream.write(b"half")
            raise ZeroDivisionError

    for fail in (shard, file):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert [left for left in tmp_path.rglob("*") if left.is_file()] == []


def test_a_writer_replaces_what_an_earlier_try_left(tmp_path: Path) -> None:
    for tiles in ([0, 2], [2]):
        with ShardWriter(tmp_path, LAYOUT, 0) as writer:
            for tile in tiles:
                writer.add(tile, *arrays(tile))
    index = LAYOUT.arrays["pixels"].read_index(LocalFiles(tmp_path), 0)
    assert (index[:, 0] == NO_CHUNK).tolist() == [True, True, False, True]
    with ShardWriter(tmp_path, LAYOUT, 0):
        pass
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_two_writers_of_a_shard_do_not_disturb_each_other(tmp_path: Path) -> None:
    key = LAYOUT.arrays["pixels"].key(0)
    with ShardWriter(tmp_path, LAYOUT, 0) as late:
        late.add(0, *arrays(0))
        with ShardWriter(tmp_path, LAYOUT, 0) as early:
            early.add(0, *arrays(0))
        assert early.files[key]["sha256"] == sha256_of(tmp_path / key)
        first = (tmp_path / key).read_bytes()
    assert late.files == early.files
    assert (tmp_path / key).read_bytes() == first
    failing = ShardWriter(tmp_path, LAYOUT, 0).__enter__()
    failing.add(0, *arrays(0))
    failing.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert (tmp_path / key).read_bytes() == first, "one that fails takes nothing away"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_writer_refuses_tiles_that_do_not_fit(tmp_path: Path) -> None:
    pixels, quality, labels = arrays(0)
    with ShardWriter(tmp_path, LAYOUT, 0) as writer:
        with pytest.raises(ValueError, match="tile 4 is not one of shard 0"):
            writer.add(4, pixels, quality, labels)
        with pytest.raises(ValueError, match=r"pixels of tile 0 are float32\(3, 5, 6\), wanted int16\(3, 5, 6\)"):
            writer.add(0, pixels.astype(np.float32), quality, labels)
        with pytest.raises(ValueError, match=r"quality of tile 0 are uint8\(4, 6\)"):
            writer.add(0, pixels, quality[1:], labels)
        with pytest.raises(ValueError, match=r"comes with \['pixels', 'quality'\], the store has"):
            writer.add(0, pixels, quality, None)
        writer.add(0, pixels, quality, labels)
        with pytest.raises(ValueError, match="or came twice"):
            writer.add(0, pixels, quality, labels)
    with pytest.raises(ValueError, match="cannot hold complex64"):
        StoreLayout(1, ("A",), (2,), ("x",), "complex64", 1, has_labels=False)
