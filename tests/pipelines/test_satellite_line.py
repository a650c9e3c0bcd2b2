"""Products as an analyst has them go the whole way by command line: folders, a zip and a STAC item in, COGs on their grids out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

from mae_core.store import TileStore
from pipelines import finetune_segmentation, predict, pretrain_sentinel
from tests.modalities.test_stac import COMMON, item, write_item
from tests.synthetic_products import SIZE, reflectance, write_safe, zipped
from tests.synthetic_rasters import north_up, write_raster
from tests.synthetic_vectors import box, write_features
from tests.tiny_runs import one_thread, quick, shared_tracking

__all__ = ["quick"]

OLD = "S2B_MSIL2A_20210122T133229_N0214_R081_T22HBD_20210122T155500"
NEW = "S2B_MSIL2A_20220413T150759_N0400_R025_T33XWJ_20220414T082126"
PACKED = "S2B_MSIL2A_20220414T150759_N0400_R025_T33XWJ_20220414T082126"
TOP = "S2A_MSIL1C_20210908T042701_N0301_R133_T46RER_20210908T070248"
ITEM = "stac/S2B_33UXP_20250302_0_L2A"
APART_M = 20_000
PLACES = {OLD: 0, NEW: 1, TOP: 2, PACKED: 3, ITEM: 4}
"""Scenes, each so many times `APART_M` to the east."""

TINY = [
    *("train.log_steps=1", "train.device=cpu", "loader.global_batch_size=4", "tracking.system_metrics=false"),
    *("prepare.num_workers=0", "prepare.mix_levels=true"),
]
ENCODER = [
    "model.encoder.preset=nano",
    "model.encoder.patch=[8]",
    "model.decoder.width=16",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
]
READER = ["reader.sentinel2.harmonize=true", "reader.sentinel2.levels=[L1C,L2A]"]


def write_archive(folder: Path) -> Path:
    """Two surface products of either convention, one of the top of the atmosphere, one in a zip, and a STAC item of seven bands."""
    write_safe(folder, "L2A", name=f"{OLD}.SAFE")
    write_safe(folder, "L2A", added=1000, name=f"{NEW}.SAFE", east_m=APART_M)
    write_safe(folder, "L1C", name=f"{TOP}.SAFE", east_m=2 * APART_M)
    zipped(write_safe(folder.parent / "unpacked", "L2A", added=1000, name=f"{PACKED}.SAFE", east_m=3 * APART_M), folder / f"{PACKED}.zip")
    for band in COMMON:
        numbers = np.rint(reflectance(band, "L2A") * 1e4 + 1000).astype(np.uint16)
        step = 10 * SIZE // numbers.shape[0]
        write_raster(
            folder / "stac" / f"{band}.tif", numbers[None], north_up(step, 500_000 + 4 * APART_M), tiled=True, blockxsize=16, blockysize=16
        )
    write_item(folder / f"{ITEM}.json", item(scaling={"scale": 1e-4, "offset": -0.1}))
    return folder


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The archive, an encoder and a segmenter of water (north) and land (south) that polygons tell apart."""
    folder, uri = tmp_path_factory.mktemp("line"), shared_tracking(tmp_path_factory)
    write_archive(folder / "archive")
    side = 10 * SIZE
    covers = []
    for place in PLACES.values():
        west, north = 500_000 + place * APART_M, 5_000_000
        covers += [(box(west, north - side / 2, west + side, north), {"cover": "water"})]
        covers += [(box(west, north - side, west + side, north - side / 2), {"cover": "land"})]
    write_features(folder / "cover.gpkg", covers)
    own = [*TINY, f"tracking.uri={uri}", "--data", str(folder / "archive")]
    pretraining = [*own, *ENCODER, *READER, "prepare.tile=[48,48]", "train.steps=2", "train.eval_steps=2"]
    finetuning = [*own, "train.steps=30", "train.eval_steps=30", "head.features=4", "optim.base_lr=0.5", "overlap=0.1", "init=pretrained"]
    with one_thread():
        assert pretrain_sentinel.main([*pretraining, "--out", str(folder / "encoder")]) == 0
        words = ["--encoder", str(folder / "encoder"), "--labels", str(folder / "cover.gpkg"), "--out", str(folder / "segmenter")]
        assert finetune_segmentation.main([*finetuning, *words]) == 0
    return folder, uri


def test_every_product_is_in_the_store_as_reflectance_by_its_own_metadata(line: tuple[Path, str]) -> None:
    (store,) = (store for store in map(TileStore.open, (line[0] / "stores").iterdir()) if not store.has_labels)
    assert set(store.index.scene) == set(PLACES)
    assert {time[:10] for time in store.index.time} == {"2022-04-13", "2020-07-17", "2025-03-02"}
    red = store.channels.index("B04")
    for row, name in enumerate(store.index.scene):
        tile = store.read(row)
        truth = reflectance("B04", "L1C" if name == TOP else "L2A")[tuple(slice(begin, begin + 48) for begin in store.index.origin[row])]
        np.testing.assert_allclose(tile.pixels[red] * tile.scale[red] + tile.offset[red], truth, atol=6e-5, err_msg=name)


def test_predictions_lie_on_the_grid_of_every_product_under_its_name(line: tuple[Path, str], tmp_path: Path) -> None:
    folder, uri = line
    words = ["--model", str(folder / "segmenter"), "--data", str(folder / "archive"), "--out", str(tmp_path), "overlap=0.1"]
    assert predict.main([*words, f"tracking.uri={uri}"]) == 0
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.tif")} == {f"{name}_labels.tif" for name in PLACES}
    for name, place in PLACES.items():
        with rasterio.open(tmp_path / f"{name}_labels.tif") as found:
            assert (found.crs.to_epsg(), found.shape) == (32633, (SIZE, SIZE))
            assert found.transform == north_up(10, 500_000 + place * APART_M)
            labels = found.read(1)
        assert (labels[8:88] == 2).mean() > 0.6, "the north is water"
        assert (labels[-80:-8] == 1).mean() > 0.6, "the south is land"


@pytest.mark.parametrize("given", [f"{PACKED}.zip", f"{OLD}.SAFE", f"{OLD}.SAFE/MTD_MSIL2A.xml", f"{ITEM}.json"])
def test_one_product_by_itself_gives_one_file(line: tuple[Path, str], tmp_path: Path, given: str) -> None:
    folder, uri = line
    words = [
        "--model",
        str(folder / "segmenter"),
        "--data",
        str(folder / "archive" / given),
        "--out",
        str(tmp_path / "x.tif"),
        "overlap=0.1",
    ]
    assert predict.main([*words, f"tracking.uri={uri}"]) == 0
    name = next(name for name in PLACES if given.startswith(name))
    with rasterio.open(tmp_path / "x.tif") as found:
        assert found.transform == north_up(10, 500_000 + PLACES[name] * APART_M)
    assert json.loads((tmp_path / "x.tif.result.json").read_text())["rejected"] == []
