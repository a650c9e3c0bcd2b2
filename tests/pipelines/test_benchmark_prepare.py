"""The benchmark of a preparation: what it is compared with does the same work, and what is told follows from what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import rasterio

from mae_core.store import TileStore
from pipelines import benchmark_ceiling
from pipelines.benchmark import main
from pipelines.benchmark_ceiling import Unpacking, ceiling_workers, packing_units, unpacking_units, work, write_image
from pipelines.preparation import PrepareSettings, prepare
from pipelines.preparation_workers import peak_bytes, standing_workers
from tests.synthetic_scenes import three_places, tree

HERE = PrepareSettings(tile=(8, 8), tiles_per_shard=4, num_workers=0)


def test_the_verb_on_a_made_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    tiny = [
        "image.size=96",
        "image.bands=2",
        "image.block=32",
        "prepare.tile=[32,32]",
        "prepare.tiles_per_shard=4",
        "prepare.num_workers=1",
    ]
    assert main(["prepare", *tiny, "rounds=1", f"out={out}", f"scratch={tmp_path}"]) == 0
    found = json.loads(out.read_text())
    printed = " ".join(capsys.readouterr().out.split())
    assert found["data"] | {"file_bytes": 0, "store_bytes": 0} == {
        "scenes": 1,
        "files": 1,
        "file_bytes": 0,
        "tiles": 9,
        "pixel_bytes": 9 * 2 * 2 * 32 * 32,
        "store_bytes": 0,
    }
    ours, started, ceiling = (found["seconds"][name] for name in ("prepare", "prepare, workers started", "unpack and pack"))
    assert {len(each) for each in (ours, started, ceiling)} == {1}
    assert found["of_ceiling"]["prepare"]["most"] == max(most / own for most, own in zip(ceiling, ours, strict=True))
    processor = {name: each[0] for name, each in found["processor_seconds"].items()}
    assert found["of_ceiling_by_processor"]["median"] == processor["unpack and pack"] / processor["prepare, workers started"]
    assert found["megabytes_per_second"]["prepare"] == pytest.approx(9 * 4096 / 1e6 / ours[0])
    assert sum(found["ceiling_seconds"].values()) == pytest.approx(ceiling[0])
    assert found["blocks"] == {"touched": 9, "there": 9}
    assert len(found["peak_bytes_of_workers"]) == 1
    assert "9 tiles, 0.03686 MB of pixels, from 1 files" in printed
    assert "blocks unpacked 9 of 9 there (1.000 each)" in printed
    assert {entry.name for entry in tmp_path.iterdir()} == {"figures.json"}, "stores and image are removed again"


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("prepare.num_workers=0", "prepare.scheduler=tcp://10.0.0.1:1", "prepare.cluster.kind=slurm"):
        assert main(["prepare", wrong]) == 2
        assert "worker processes of this machine: prepare.num_workers from 1, no scheduler, no cluster" in capsys.readouterr().err
    assert main(["prepare", "data=nowhere", "--check"]) == 2
    assert "data = nowhere: does not exist" in capsys.readouterr().err


def test_all_of_the_files_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_ceiling, "WINDOW_BYTES", 2 * 3 * 32 * 32 * 2)
    write_image(tmp_path / "image.tif", 80, 3, 32)
    volume = np.zeros((5, 6, 7), np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "volume.nii.gz")
    (tmp_path / "notes.txt").write_text("no pixels")
    units = unpacking_units(sorted(tmp_path.iterdir()))
    counts = np.zeros((80, 80), int)
    for unit in units[:-1]:
        assert unit.rows[0] % 32 == unit.columns[0] % 32 == 0, "edges are edges of blocks"
        counts[slice(*unit.rows), slice(*unit.columns)] += 1
    assert (counts == 1).all()
    assert len(units) == 3 * 2 + 1
    assert units[-1] == Unpacking(tmp_path / "volume.nii.gz")
    spent = [work(unit) for unit in units]
    assert sum(each.num_bytes for each in spent) == 80 * 80 * 3 * 2 + volume.nbytes
    assert not any(each.packed for each in spent)


def test_a_made_image_is_neither_flat_nor_noise_alone(tmp_path: Path) -> None:
    write_image(tmp_path / "image.tif", 512, 2, 64)
    with rasterio.open(tmp_path / "image.tif") as image:
        assert (image.profile["compress"], image.block_shapes, image.dtypes) == ("deflate", [(64, 64)] * 2, ("uint16",) * 2)
        values = image.read()
    assert 1.1 < values.nbytes / (tmp_path / "image.tif").stat().st_size < 4
    assert np.corrcoef(values[0, :, :-1].ravel(), values[0, :, 1:].ravel())[0, 1] > 0.9


def test_the_same_tiles_are_packed_to_the_same_bytes(tmp_path: Path) -> None:
    """By zarr-python in a process of its own; shards in which no tile was thrown away are equal to ours."""
    store = prepare(three_places(tmp_path), tmp_path / "store", HERE).path
    units = packing_units(store, tmp_path / "copy")
    with ceiling_workers(1, {}) as workers:
        ceiling = workers.do(units)
    assert ceiling.unpack == 0
    assert ceiling.pack > 0
    assert ceiling.processor_seconds > 0
    ours, theirs = tree(store / "pixels"), tree(tmp_path / "copy" / "pixels")
    index = TileStore.open(store).index.tile
    whole = [unit for unit in units if set(range(unit.first, unit.stop)) <= set(index)]
    assert whole
    for unit in whole:
        key = f"c/{unit.first // 4}/0/0/0"
        assert ours[key] == theirs[key]


def test_standing_workers_prepare_and_tell_their_memory(tmp_path: Path) -> None:
    scenes = three_places(tmp_path)
    settings = HERE.model_copy(update={"num_workers": 1})
    with standing_workers(settings) as workers:
        for name in ("one", "two"):
            prepare(scenes, tmp_path / name, settings.model_copy(update={"scheduler": workers.address}))
        assert workers.address.startswith("tls://127.0.0.1:")
        peak = workers.peak_bytes()
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(prepare(scenes, tmp_path / "here", HERE).path)
    assert len(peak) == 1
    assert 20 << 20 < peak[0] < 2 << 30
    held = np.ones(64 << 20, np.uint8)
    assert peak_bytes() > held.nbytes
