"""`terravox store`: all damage is told by name, tiles come out where they were, and what is told of a store is true."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import rasterio
from matplotlib.image import imread
from numpy.typing import NDArray

from mae_core.chunks import crc32c
from mae_core.shards import NO_CHUNK
from mae_core.store import TileStore
from mae_core.store_check import check_store
from mae_core.store_folder import sha256_of, store_digest
from mae_core.store_view import write_view
from modalities.catalogue import Catalogue, scan
from modalities.medical import MriSettings
from modalities.nifti_file import read_header
from modalities.raster import RasterSettings
from modalities.raster_file import opened
from modalities.scene import LabelMap
from modalities.sentinel2 import Sentinel2Settings
from pipelines.preparation import PrepareSettings, prepare
from pipelines.prepare import store_attributes
from pipelines.store import arguments, main
from pipelines.terravox import main as terravox
from tests.synthetic_rasters import north_up, world_values, write_raster
from tests.synthetic_scenes import Scenes, make_scene
from tests.synthetic_volumes import REAL, needs_real, save_volume, texture

PER_SHARD = 4


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])


def store_of(catalogue: Any, out: Path, tile: tuple[int, ...], labels: Mapping[str, LabelMap] | None = None, kind: Any = None) -> Path:
    settings = PrepareSettings(
        tile=tile,
        tiles_per_shard=PER_SHARD,
        num_workers=0,
        min_valid_fraction=0.2,
        split={"val_fraction": 0.3, "seed": 1},  # type: ignore[arg-type]
    )
    prepare(catalogue, out, settings, labels=labels, attributes=store_attributes(kind or RasterSettings(), len(tile)))
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of nine tiles each, two channels of which one scene has the first only, labels, tiles without data."""
    folder = tmp_path_factory.mktemp("written")
    quality = np.zeros((24, 24), np.uint8)
    quality[:8, :8] = 1
    scenes = [
        make_scene(folder, name, (24, 24), channels=("A", "B")[: 1 + (name != "c")], scale=0.5, quality=quality if name == "b" else None)
        for name in "abc"
    ]
    labels = {}
    for scene in scenes:
        np.save(folder / f"{scene.name}-labels.npy", np.random.default_rng(0).integers(-1, 3, (24, 24)))
        labels[scene.name] = scene.open_labels(folder / f"{scene.name}-labels.npy")
    return store_of(Scenes(tuple(scenes)), folder / "store", (8, 8), labels)


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil, in another folder than it was written to."""
    return Path(shutil.copytree(written, tmp_path / "moved" / "store"))


def sign(path: Path) -> None:
    """Brings the manifest in line with the files as they are now, as a forger or a writer with a fault would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    manifest["store_digest"] = store_digest(manifest["files"])
    (path / "manifest.json").write_text(json.dumps(manifest))


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(bytes(data))


def drop_chunk(file: Path, number: int) -> None:
    data = file.read_bytes()
    tail = 16 * PER_SHARD + 4
    index = np.frombuffer(data[-tail:-4], "<u8").reshape(-1, 2).copy()
    index[number] = NO_CHUNK
    file.write_bytes(data[:-tail] + index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little"))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """Exit code and lines of `store verify`."""
    code = main(["verify", *words])
    return code, capsys.readouterr().out.splitlines()


def test_a_whole_store_is_one_line_wherever_it_lies(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened_store = TileStore.open(store)
    chunks = 3 * len(opened_store)
    for words, unpacked in (([], ""), (["decode=true"], f", {chunks} chunks unpacked")):
        code, lines = told(capsys, str(store), *words)
        assert (code, len(lines)) == (0, 1)
        assert f"is whole: {len(opened_store)} tiles, {len(opened_store.manifest['files'])} files" in lines[0]
        assert lines[0].endswith(f"MB/s{unpacked}")


def test_all_damage_is_told_by_array_and_tiles(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "pixels/c/0/0/0/0").unlink()
    os.truncate(store / "quality/c/1/0/0", 30)
    flip(store / "labels/c/2/0/0", 10)
    flip(store / "quality/c/3/0/0", (store / "quality/c/3/0/0").stat().st_size - 20)
    flip(store / "statistics.json", 40)
    drop_chunk(store / "pixels/c/4/0/0/0", 1)
    code, lines = told(capsys, str(store))
    assert code == 1
    wanted = [
        "labels shard c/2/0/0 (tiles 8–11) fails its sha256",
        "labels shard c/2/0/0 (tiles 8–11): the chunk of tile 8 fails its crc32c; restore the shard or prepare again",
        "pixels shard c/0/0/0/0 (tiles 0–3) is missing",
        "pixels shard c/4/0/0/0 (tiles 16–19) fails its sha256",
        "quality shard c/1/0/0 (tiles 4–7) has 30 bytes, the manifest says",
        "quality shard c/3/0/0 (tiles 12–15) fails its sha256",
        "quality shard c/3/0/0 (tiles 12–15) is damaged: its chunk index fails the checksum",
        "statistics.json fails its sha256",
    ]
    assert len(lines) == len(wanted) + 1
    for line, start in zip(lines, wanted, strict=False):
        assert line.startswith(start)
    assert f"{store} is damaged: {len(wanted)} problems" in lines[-1]
    assert "Restore it from a copy, or delete it and prepare again" in lines[-1]


def test_a_chunk_that_is_gone_is_told_with_its_tile(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the manifest agrees with it, as after a fault of the writer."""
    drop_chunk(store / "pixels/c/1/0/0/0", 2)
    missing = "pixels shard c/1/0/0/0 (tiles 4–7) holds no chunk for tile 6"
    assert told(capsys, str(store))[1][:2] == ["pixels shard c/1/0/0/0 (tiles 4–7) fails its sha256", missing]
    sign(store)
    code, lines = told(capsys, str(store))
    assert (code, lines[:-1]) == (1, [missing])
    assert "1 problem (" in lines[-1]


def test_only_unpacking_finds_what_the_checksums_of_files_agree_with(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(store / "pixels/c/1/0/0/0", 10)
    sign(store)
    assert told(capsys, str(store))[0] == 0
    code, lines = told(capsys, str(store), "--decode", "true")
    assert code == 1
    assert [line.split(" fails")[0] for line in lines[:-1]] == ["pixels shard c/1/0/0/0 (tiles 4–7): the chunk of tile 4"]


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda path: edit(path / "manifest.json", lambda found: found["files"].pop("pixels/c/1/0/0/0")), "manifest.json is altered"),
        (lambda path: edit(path / "manifest.json", lambda found: found.update(format_version=7)), "is of format terravox-tiles 7"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").unlink(), "it is not a tile store; run prepare to make one"),
        (lambda path: ((path / "manifest.json").unlink(), (path / "progress").mkdir()), "it is not finished: run prepare again"),
        (shutil.rmtree, "is not a folder"),
        (lambda path: flip(path / "index.parquet", 100), "index.parquet fails its sha256"),
        (lambda path: (path / "zarr.json").unlink(), "zarr.json is missing"),
    ],
)
def test_what_is_no_store_any_more_is_told(
    store: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], wanted: str
) -> None:
    spoil(store)
    code, lines = told(capsys, str(store))
    assert (code, len(lines)) == (1, 2)
    assert wanted in lines[0]


def test_files_outside_the_store_are_not_looked_at(store: Path) -> None:
    (store.parent / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": sha256_of(store.parent / "secret")}
    edit(store / "manifest.json", lambda found: found["files"].update({"../secret": entry}))
    found = check_store(store).problems
    assert "manifest.json lists ../secret, which lies outside the store" in found
    assert "manifest.json is altered: its list of files does not give its store_digest" in found


def test_an_index_that_does_not_fit_its_chunks_is_told(store: Path) -> None:
    from pyarrow import parquet

    table = parquet.read_table(store / "index.parquet")
    parquet.write_table(table.slice(1), store / "index.parquet")
    sign(store)
    found = check_store(store).problems
    assert len(found) == 1
    assert "rows, the manifest says" in found[0]
    rows = table.to_pydict()
    gap = min(set(range(rows["tile"][-1])) - set(rows["tile"]))
    rows["tile"] = sorted([*rows["tile"][:-1], gap])
    parquet.write_table(table.from_pydict(rows, schema=table.schema), store / "index.parquet")
    sign(store)
    found = check_store(store).problems
    assert [problem.split(" holds")[1] for problem in found] == [f" no chunk for tile {gap}"] * 3


def test_metadata_that_disagree_are_told(store: Path) -> None:
    edit(store / "statistics.json", lambda found: [found[name].append(1) for name in ("count", "mean", "std", "min", "max")])
    edit(store / "quality/zarr.json", lambda found: found.update(shape=[found["shape"][0] + 4, *found["shape"][1:]]))
    sign(store)
    found = check_store(store).problems
    assert [problem.split(" has ")[0] for problem in found] == ["quality/zarr.json", "statistics.json"]


def test_progress_runs_to_the_end(store: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = check_store(store, progress=lambda done, total: steps.append((done, total)))
    total = sum(entry["bytes"] for entry in TileStore.open(store).manifest["files"].values())
    assert (steps[0], steps[-1]) == ((0, total), (total, total))
    assert found.num_bytes == total
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_a_view_is_verified_store_by_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = (
        store_of(Scenes(tuple(make_scene(tmp_path, name, (24, 24)) for name in names)), tmp_path / folder, (8, 8))
        for folder, names in (("first", "de"), ("other", "fg"))
    )
    write_view(tmp_path / "view", [first, other])
    code, lines = told(capsys, str(tmp_path / "view"))
    assert code == 0
    assert "is whole: 36 tiles" in lines[0]
    assert main(["info", str(tmp_path / "view"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stores"] == 2
    (other / "pixels/c/1/0/0/0").unlink()
    code, lines = told(capsys, str(tmp_path / "view"))
    assert (code, len(lines)) == (1, 2)
    assert lines[0].endswith("other: pixels shard c/1/0/0/0 (tiles 4–7) is missing")


def test_what_info_tells(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened_store = TileStore.open(store)
    for words in (["--json"], ["json=true"], ["format=json"]):
        assert main(["info", str(store), *words]) == 0
        found = json.loads(capsys.readouterr().out)
    index = opened_store.index
    assert found["digest"] == opened_store.digest
    assert found["tiles"]["all"] == found["tiles"]["train"] + found["tiles"]["val"] == len(opened_store) == 26
    assert found["discarded"] == {"too little valid data": 1}
    assert (found["groups"]["train"] + found["groups"]["val"], found["scenes"]["all"]) == (3, 3)
    assert (found["space"], found["dtype"], found["modality"], found["labels"]) == ([8, 8], "uint16", "raster", [0, 1, 2])
    assert found["bytes"]["uncompressed"] == 26 * 64 * (2 * 2 + 1 + 2)
    on_disk = sum(file.stat().st_size for file in store.rglob("*") if file.name not in ("manifest.json", "result.json") and file.is_file())
    assert found["bytes"]["on_disk"] == on_disk
    assert found["spacing"] == {"m": [10.0, 10.0]}
    assert found["frames"] == {"": 26}
    assert found["valid_fraction"]["least"] == index.valid_fraction.min()
    first, second = found["channels"]
    assert (first["name"], first["tiles"], second["tiles"]) == ("A", 26, 17)
    assert first["mean"] == opened_store.statistics.mean[0]
    assert set(found["codecs"]) == {"pixels", "quality", "labels"}
    assert main(["info", str(store)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for wanted in (opened_store.digest, "26 of 8×8 (y, x), uint16", "no frame: 26", "1 too little valid data", "classes 0, 1, 2", "10 m"):
        assert wanted in text, wanted


def test_the_store_is_the_first_word_or_a_setting(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = Path(shutil.copytree(store, tmp_path / "lr=3"))
    for words in (["info", str(store)], ["info", f"store={store}"], ["info", "--store", str(store)], ["info", str(odd)]):
        assert terravox(["store", *words]) == 0
        assert "26 of 8×8" in capsys.readouterr().out
    assert main(["info", str(store), "--check"]) == 0
    assert "nothing was done" in capsys.readouterr().out
    assert arguments(["seed=1", "--json"]) == ["seed=1", "format=json"]
    assert main(["info"]) == 2
    assert "store: missing" in capsys.readouterr().err
    assert main(["info", str(store), "decode=true"]) == 2
    assert "unknown setting" in capsys.readouterr().err
    for words in (["info", str(tmp_path / "none")], ["info", str(tmp_path / "none"), "--check"]):
        assert main(words) == (2 if "--check" in words else 1)
        assert "is not a folder" in capsys.readouterr().err
    assert main(["verfy", str(store)]) == 2
    assert "unknown subject verfy; did you mean verify?" in capsys.readouterr().err
    assert (main(["--help"]), main([])) == (0, 2)
    assert "usage: python pipelines/store.py SUBJECT STORE" in capsys.readouterr().out
    assert main(["export", "--help"]) == 0
    assert "pipelines/store.py export STORE" in capsys.readouterr().out


def test_a_sheet_is_a_picture_file(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "sheet.png"
    assert main(["sheet", str(store), "--out", str(out)]) == 0
    assert imread(out).shape[1] == 1300
    assert [file.name for file in out.parent.iterdir()] == ["sheet.png"]
    assert main(["sheet", str(store), "--out", str(tmp_path / "sheet.jpg")]) == 1
    assert "must end in .png" in capsys.readouterr().err


def exported(store: Path, row: int, out: Path) -> Path:
    """The image file of a row of the index."""
    tile = int(TileStore.open(store).index.tile[row])
    assert main(["export", str(store), f"tile={tile}", "--out", str(out)]) == 0
    return next(file for file in out.iterdir() if not file.name.split(".")[0].endswith(("_quality", "_labels")))


def source_window(store: TileStore, row: int) -> tuple[slice, ...]:
    origin, extent = store.index.origin[row], store.index.extent[row]
    return tuple(slice(int(start), int(start + size)) for start, size in zip(origin, extent, strict=True))


def check_raster(store: Path, catalogue: Catalogue, row: int, out: Path) -> None:
    """The exported pixels and place are those of the scene's window; where a band has its file's own grid, those of the file."""
    tiles = TileStore.open(store)
    scene = next(scene for scene in catalogue.scenes if scene.name == tiles.index.scene[row])
    window = source_window(tiles, row)
    pixels, quality = scene.read(window)
    grid = scene.grid.window(window)
    with opened(exported(store, row, out)) as target:
        np.testing.assert_array_equal(target.read(), pixels)
        assert target.descriptions == tuple(channel.name for channel in scene.channels)
        np.testing.assert_array_equal(target.dataset_mask() == 0, (quality & 127) != 0)
        place, own = target.transform, target.read()
    corner = grid.matrix[:2, :2] @ [-0.5, -0.5] + grid.matrix[:2, 2]
    np.testing.assert_allclose((place.c, place.f), corner, rtol=1e-12)
    with rasterio.open(scene.files[0]) as source:
        assert (source.crs is None) or source.crs.to_epsg() == (rasterio.crs.CRS.from_user_input(grid.frame).to_epsg())
        if source.shape == scene.grid.space and source.count == len(scene.channels):
            part = rasterio.windows.Window.from_slices(*window)
            np.testing.assert_array_equal(own, source.read(window=part))
            first = np.reshape(source.transform, (3, 3)) @ [window[1].start, window[0].start, 1]
            np.testing.assert_allclose((*source.transform[:2], first[0], *source.transform[3:5], first[1]), place[:6], rtol=1e-12)


def check_volume(store: Path, catalogue: Catalogue, row: int, out: Path) -> None:
    """The exported voxels and affine are those of the file, turned to RAS+."""
    tiles = TileStore.open(store)
    scene = next(scene for scene in catalogue.scenes if scene.name == tiles.index.scene[row])
    window = source_window(tiles, row)
    source = nib.as_closest_canonical(nib.load(scene.files[0]))
    target = nib.load(exported(store, row, out))
    wanted = source.slicer[window]
    np.testing.assert_allclose(target.affine, wanted.affine, rtol=1e-6, atol=1e-5)
    stored: NDArray[Any] = np.asarray(target.dataobj.get_unscaled())
    np.testing.assert_array_equal(stored, np.asarray(wanted.dataobj))
    header = read_header(Path(target.get_filename()))
    np.testing.assert_allclose((header.slope, header.intercept), (scene.channels[0].scale, scene.channels[0].offset), rtol=1e-6)
    assert header.flags == ()


def test_a_raster_tile_goes_back_to_its_place(tmp_path: Path) -> None:
    """Padded tiles at the edges included; every value is a function of world position."""
    for number in range(2):
        affine = north_up(x=500_000 + 1000 * number)
        pixels = np.stack([world_values(affine, (21, 19), band) for band in (0, 1)]).round().astype(np.uint16)
        write_raster(tmp_path / "data" / f"place{number}.tif", pixels, affine, names=("A", "B"), nodata=int(pixels[0, 3, 4]))
    catalogue = scan(tmp_path / "data", RasterSettings())
    store = store_of(catalogue, tmp_path / "store", (32, 32))
    tiles = TileStore.open(store)
    assert tiles.index.extent[0].tolist() == [21, 19], "padded"
    for row in range(len(tiles)):
        check_raster(store, catalogue, row, tmp_path / f"out{row}")


def test_a_volume_tile_goes_back_to_its_place(tmp_path: Path) -> None:
    """Left-handed files, which the store turns to RAS+."""
    for number in range(2):
        affine = np.diag([-1.5, 2.0, -2.5, 1.0]) + np.array([[0, 0, 0, 31], [0, 0, 0, -7], [0, 0, 0, 5 + number], [0, 0, 0, 0]])
        values = (texture((20, 17, 9), number) * 100).astype(np.int16)
        save_volume(tmp_path / "data" / f"head{number}_T1w.nii.gz", values, affine)
    catalogue = scan(tmp_path / "data", MriSettings(spacing_mm=None))
    store = store_of(catalogue, tmp_path / "store", (16, 16, 8), kind=MriSettings())
    for row in range(0, len(TileStore.open(store)), 3):
        check_volume(store, catalogue, row, tmp_path / f"out{row}")


def test_labels_and_absent_channels_and_no_place(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiles = TileStore.open(store)
    row = int(np.flatnonzero(tiles.index.scene == "c")[0])
    image = exported(store, row, tmp_path / "out")
    text = capsys.readouterr().out
    assert "its store knows no CRS for it, so neither does the file; without 1 channels that its scene does not have" in text
    tile = tiles.read(row)
    assert sorted(file.name for file in image.parent.iterdir()) == [
        f"tile-{tile.tile:06d}{part}.tif" for part in ("", "_labels", "_quality")
    ]
    with opened(image) as target:
        assert (target.crs, target.count, target.scales) == (None, 1, (0.5,))
        assert target.tags()["terravox_store"] == tiles.digest
    with opened(image.with_name(f"{image.stem}_labels.tif")) as target:
        np.testing.assert_array_equal(target.read(1), tile.labels)


def test_exports_that_cannot_be_are_refused(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gap = min(set(range(27)) - set(TileStore.open(store).index.tile.tolist()))
    for words, wanted in (
        ([f"tile={gap}", f"out={tmp_path}"], f"has no tile {gap}; it has 26 tiles, numbered"),
        (["tile=[1,2]", f"out={tmp_path}/a.tif"], "is one file and 2 tiles are to be written; give a folder"),
        (["tile=1", f"out={store}/out"], "lies in the store"),
        (["tile=1", f"out={tmp_path}/a.nii.gz"], "is written as .tif; change the ending"),
    ):
        assert main(["export", str(store), *words]) == 1
        assert wanted in capsys.readouterr().err
    assert main(["export", str(store), f"tile={gap}", f"out={tmp_path}", "--check"]) == 2
    assert f"has no tile {gap}" in capsys.readouterr().err
    assert main(["export", str(store), "tile=[]", f"out={tmp_path}"]) == 2


@needs_real
def test_real_files_go_back_to_their_place(tmp_path: Path) -> None:
    optical = REAL / "satellite" / "aberystwyth_s2_landcover" / "imageutils"
    bands = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
    catalogue = scan(optical, Sentinel2Settings(bands=bands, radiometry=({"match": "*", "scale": 1e-3, "offset": 0.0},)))  # type: ignore[arg-type]
    store = store_of(catalogue, tmp_path / "optical", (128, 128))
    check_raster(store, catalogue, 5, tmp_path / "out")
    files = sorted((REAL / "mri" / "msd_hippocampus" / "images").glob("*.nii.gz"))[:3]
    for file in files:
        shutil.copy(file, tmp_path)
    volumes = scan(tmp_path, MriSettings(spacing_mm=None))
    store = store_of(volumes, tmp_path / "volumes", (32, 32, 32), kind=MriSettings())
    check_volume(store, volumes, 4, tmp_path / "volume")
