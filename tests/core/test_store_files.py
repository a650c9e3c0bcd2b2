"""A store is read alike from a folder and from behind a URL; nothing leaves the place; memory is used again, never while it is seen."""

from __future__ import annotations

import gc
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from mae_core import memory
from mae_core.loader import LoaderSettings, Stream
from mae_core.memory import recycled
from mae_core.store import StoreError, TileStore
from mae_core.store_check import check_store
from mae_core.store_files import LocalFiles, RemoteFiles, StoreFiles, digest_of, files_at
from mae_core.store_folder import sha256_of
from tests.tiny_runs import ALONE, shared_store

CONTENT = bytes(range(256)) * 400


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on an S3-compatible server of this machine."""
    server_of = pytest.importorskip("moto.server", reason="moto is not installed, so no S3-compatible server is at hand")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("tiles")
        yield "s3://tiles"
        server.stop()


@pytest.fixture(params=["folder", "memory", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> StoreFiles:
    """One file `deep/file` in each kind of place."""
    if request.param == "folder":
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "file").write_bytes(CONTENT)
        return LocalFiles(tmp_path)
    address = "memory://place" if request.param == "memory" else f"{request.getfixturevalue('bucket')}/place"
    system, root = fsspec.core.url_to_fs(address)
    system.pipe_file(f"{root}/deep/file", CONTENT)
    return files_at(address)


def test_parts_of_a_file_are_read_alike_everywhere(files: StoreFiles) -> None:
    name, size = "deep/file", len(CONTENT)
    assert files.size(name) == size
    assert files.size("deep/other") is None
    assert digest_of(files, name) == hashlib.sha256(CONTENT).hexdigest()
    for start, length in [(0, None), (0, 10), (5, 7), (-9, None), (size - 3, 3), (size - 3, 90), (1, size)]:
        wanted = CONTENT[start:] if length is None else CONTENT[start : start + length]
        assert files.read(name, start, length) == wanted == bytes(files.view(name, start, length))
    for read in (files.read, files.view):
        with pytest.raises(OSError, match=r"deep/other|No such file"):
            read("deep/other", 0, 5)
    for name in ("../file", "deep/../../x", "/etc/passwd"):
        assert not files.holds(name)


def test_an_address_with_a_scheme_is_remote_and_tells_no_secret() -> None:
    assert isinstance(files_at("some/folder"), LocalFiles)
    assert isinstance(files_at(Path("s3:/bucket")), LocalFiles)
    assert files_at("s3://key:secret@host/bucket?token=1") == RemoteFiles("s3://key:secret@host/bucket?token=1")
    assert files_at("s3://key:secret@host/bucket?token=1").label == "s3://host/bucket"
    with pytest.raises(StoreError, match=r"nothing://there cannot be read: .*nothing"):
        TileStore.open("nothing://there")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


def test_a_store_behind_a_url_is_the_store_of_the_folder(store: TileStore, bucket: str) -> None:
    system, root = fsspec.core.url_to_fs(f"{bucket}/store")
    system.put(str(store.path), root, recursive=True)
    remote = TileStore.open(f"{bucket}/store")
    assert (remote.digest, remote.channels, check_store(f"{bucket}/store").problems) == (store.digest, store.channels, ())
    for row in range(len(store)):
        np.testing.assert_array_equal(remote.read(row).pixels, store.read(row).pixels)
    batches = []
    for each in (store, remote):
        stream = Stream(each, each.rows("train"), LoaderSettings(global_batch_size=4, window_shards=2, num_threads=3), 0, ALONE)
        batches.append([raw.pixels for parts, _ in stream.steps(0, 5) for raw in parts])
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)
    key = store.arrays["pixels"].key(1)
    system.rm_file(f"{root}/{key}")
    with pytest.raises(StoreError, match=r"pixels shard .* is missing"):
        TileStore.open(f"{bucket}/store", "sizes")
    assert "cannot be read" in str(remote.fetch([int(np.flatnonzero(store.shards == 1)[0])]))
    system.pipe_file(f"{root}/{key}", (store.path / key).read_bytes()[:-40])
    with pytest.raises(StoreError, match=r"pixels shard .* bytes, the manifest says"):
        TileStore.open(f"{bucket}/store", "sizes")


def test_a_moved_store_is_the_same(store: TileStore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    moved = TileStore.open(tmp_path / "elsewhere")
    assert (moved.digest, check_store(moved.path).problems) == (store.digest, ())
    np.testing.assert_array_equal(moved.read(3).pixels, store.read(3).pixels)


def test_a_digest_over_blocks_is_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_core.store_files.BLOCK_BYTES", 1000)
    for size in (0, 999, 1000, 2500):
        (tmp_path / "file").write_bytes(CONTENT[:size])
        assert digest_of(LocalFiles(tmp_path), "file") == sha256_of(tmp_path / "file")


def test_memory_comes_back_when_no_view_is_left_and_never_before() -> None:
    size = 3 << 20
    first = recycled(size)
    first[:] = 1
    address = first.ctypes.data
    tensor = torch.from_numpy(first).view(torch.int16)[10:20]
    del first
    gc.collect()
    second = recycled(size)
    second[:] = 2
    assert second.ctypes.data != address, "a view of the first is still held"
    assert (tensor == 257).all()
    del tensor
    gc.collect()
    third = recycled(size - 100)
    assert third.ctypes.data == address, "sizes that are nearly alike share blocks"
    assert len(third) == size - 100
    assert sum(map(len, memory._free.values())) <= memory.KEPT_BLOCKS * len(memory._free)
