"""Every tile says where and when it was taken and how cloudy it is; what is not known is as if it had been withheld."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pyarrow import parquet
from rasterio import Affine

from mae_core.context import ContextSettings, Kind, dropped
from mae_core.loader import context_of, read_rows, spacings
from mae_core.masking import Sample
from mae_core.store import TileStore
from mae_core.store_folder import UNKNOWN, sha256_of, store_digest
from mae_core.store_view import write_view
from mae_core.store_writer import encode_json
from mae_core.vit import Encoder, EncoderSettings
from modalities.quality import Quality
from modalities.raster import RasterScene
from pipelines import label_scene
from pipelines.preparation import PreparationError, PrepareSettings, prepare
from pipelines.tiling_plan import SplitSettings
from tests.synthetic_batches import CHANNELS, generator
from tests.synthetic_rasters import UTM, north_up, scene_of, write_world
from tests.synthetic_scenes import Scenes, make_scene

KINDS: tuple[Kind, ...] = get_args(Kind)
HERE = PrepareSettings(tile=(8, 8), tiles_per_shard=4, num_workers=0, min_valid_fraction=0.0, split=SplitSettings(val_fraction=0))


def changed(**values: Any) -> PrepareSettings:
    return PrepareSettings(**{**HERE.model_dump(), **values})


def store_of(out: Path, *scenes: Any, settings: PrepareSettings = HERE) -> TileStore:
    return TileStore.open(prepare(Scenes(scenes), out, settings).path)


def placed(folder: Path, name: str, time: str = "", **profile: Any) -> RasterScene:
    scene = scene_of(write_world(folder / f"{name}.tif", (16, 16), **profile))
    return replace(scene, times=(time,) if time else ())


def without_new_columns(store: TileStore) -> TileStore:
    """The store as one that was written before the columns were thought of."""
    path = store.path / "index.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table.drop_columns(list(UNKNOWN)), path)
    manifest = store.manifest
    manifest["files"]["index.parquet"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest["store_digest"] = store_digest(manifest["files"])
    (store.path / "manifest.json").write_bytes(encode_json(manifest))
    return TileStore.open(store.path)


def test_the_middle_of_a_tile_is_told_in_degrees_and_when_it_was_taken(tmp_path: Path) -> None:
    scenes = (
        placed(tmp_path, "utm", "2020-12-31T23:59:59Z", affine=north_up(10.0, 500_000 - 40, 40.0)),
        placed(tmp_path, "degrees", affine=north_up(0.01, 179.92, 60.0), crs="EPSG:4326"),
    )
    index = store_of(tmp_path / "out", *scenes, make_scene(tmp_path, "nowhere", (8, 8))).index
    utm = index.scene == "utm"
    np.testing.assert_allclose(index.longitude[utm][::2], 15, atol=1e-9, err_msg="the central meridian of zone 33")
    assert abs(index.latitude[utm][0]) < 1e-9, "the first row of tiles lies on the equator"
    degrees = index.scene == "degrees"
    np.testing.assert_allclose(index.longitude[degrees], [179.96, -179.96, 179.96, -179.96], atol=1e-9)
    np.testing.assert_allclose(index.latitude[degrees], [59.96, 59.96, 59.88, 59.88], atol=1e-9)
    assert index.time.tolist() == [""] * 5 + ["2020-12-31T23:59:59Z"] * 4
    nowhere = index.scene == "nowhere"
    assert np.isnan(index.latitude[nowhere]).all()
    assert np.isnan(index.longitude[nowhere]).all()


def test_a_series_keeps_the_date_of_each_index(tmp_path: Path) -> None:
    dates = tuple(f"2021-0{month}-01T10:00:00Z" for month in range(1, 7))
    scene = replace(make_scene(tmp_path, "series", (6, 8, 8)), times=dates)
    index = store_of(tmp_path / "out", scene, settings=changed(tile=(4, 8, 8))).index
    assert index.times.tolist() == [dates[:4], dates[2:]]
    assert index.time.tolist() == [dates[0], dates[2]]
    with pytest.raises(PreparationError, match=r"scene series has 2 times for 6 places on its first axis"):
        store_of(tmp_path / "wrong", replace(scene, times=dates[:2]), settings=changed(tile=(4, 8, 8)))
    with pytest.raises(PreparationError, match=r"scene series: .*yesterday.*ISO 8601"):
        store_of(tmp_path / "wrong", replace(scene, times=("yesterday",)), settings=changed(tile=(4, 8, 8)))


def test_views_and_growing_stores_keep_place_and_time(tmp_path: Path) -> None:
    first = placed(tmp_path, "a", "2020-02-23T03:27:39Z")
    second = placed(tmp_path, "b", "2021-06-01", affine=north_up(10.0, 700_000))
    one, other = store_of(tmp_path / "one", first), store_of(tmp_path / "other", second)
    write_view(tmp_path / "view", [one.path, other.path])
    view = TileStore.open(tmp_path / "view")
    for store in (view, store_of(tmp_path / "one", first, second)):
        for name in UNKNOWN:
            both = [*getattr(one.index, name).tolist(), *getattr(other.index, name).tolist()]
            assert getattr(store.index, name).tolist() == both


def test_the_loader_tells_day_year_place_and_metres(tmp_path: Path) -> None:
    store = store_of(
        tmp_path / "out",
        placed(tmp_path, "a", "2020-12-31T23:59:59Z"),
        placed(tmp_path, "b", "2021-01-01T00:30:00+01:00", affine=north_up(0.01, -179.99, 60.0), crs="EPSG:4326"),
        make_scene(tmp_path, "c", (8, 8)),
    )
    context = context_of(store, np.arange(len(store)))
    assert context.day_of_year[:8].tolist() == [366.0] * 8, "the second is half past midnight in Paris, which is 2020 in UTC"
    assert context.year[:8].tolist() == [2020.0] * 8
    assert context.year[8:].isnan().all()
    np.testing.assert_allclose(context.latitude[:8].numpy(), store.index.latitude[:8], rtol=1e-6)
    np.testing.assert_allclose(context.longitude[:8].numpy(), store.index.longitude[:8], rtol=1e-6)
    np.testing.assert_allclose(context.resolution[:4], 10.0)
    arc = math.radians(0.01) * 6_371_000
    shrunk = np.cos(np.radians(store.index.latitude[4:8]))
    np.testing.assert_allclose(context.resolution[4:8, 0], arc, rtol=0.005, err_msg="rows are steps to the south")
    np.testing.assert_allclose(context.resolution[4:8, 1], arc * shrunk, rtol=0.005, err_msg="columns are steps to the east")
    assert torch.equal(context.resolution[:8], context.spacing[:8])
    np.testing.assert_allclose(spacings(store, np.arange(8, 9)), 10.0)


@pytest.mark.parametrize(
    ("crs", "affine"), [(UTM, north_up()), ("EPSG:2263", north_up(x=1e6, y=2e5)), ("EPSG:4326", north_up(0.001, 15.0, 60.0))]
)
def test_a_scene_that_is_labelled_is_told_the_metres_that_its_tiles_were_trained_with(tmp_path: Path, crs: str, affine: Affine) -> None:
    scene = placed(tmp_path, "a", affine=affine, crs=crs)
    trained, labelled = context_of(store_of(tmp_path / "out", scene), np.arange(1)), label_scene.context_of(scene)
    torch.testing.assert_close(labelled.resolution, trained.resolution, rtol=1e-3, atol=0)
    torch.testing.assert_close(labelled.spacing, trained.spacing, rtol=1e-3, atol=0)


def test_where_nobody_said_how_far_voxels_lie_apart_nothing_is_told(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, "photo", (8, 8))
    store = store_of(tmp_path / "out", replace(scene, grid=replace(scene.grid, unit="index")))
    context = context_of(store, np.arange(1))
    assert context.resolution.isnan().all()
    assert context.spacing.tolist() == [[10.0, 10.0]], "positions in physical units need a distance always"


def facts_of(store: TileStore, rows: np.ndarray) -> Mapping[str, torch.Tensor]:
    context = read_rows(store, rows, Sample(*(torch.zeros(len(rows), dtype=torch.int64) for _ in range(3)))).context
    assert context is not None
    return vars(context)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_metadata_is_the_dropped_branch_bit_for_bit(tmp_path: Path, kind: Kind) -> None:
    """What an older store does not say, and what the chance withholds from one that says it, come to the same tokens."""
    told = store_of(tmp_path / "told", placed(tmp_path, "a", "2020-12-31T23:59:59Z"))
    rows = np.arange(2)
    knows = context_of(told, rows)
    settings = ContextSettings(kinds=(kind,), drop_fraction=1 - 1e-9)
    sample = Sample(*(torch.zeros(2, dtype=torch.int64) for _ in range(3)))
    withheld = dropped(knows, settings, 0, sample)
    if kind == "resolution":
        scene = placed(tmp_path, "b")
        silent = store_of(tmp_path / "silent", replace(scene, grid=replace(scene.grid, unit="index", frame="")))
    else:
        silent = without_new_columns(told)
    lacks = context_of(silent, rows)
    torch.manual_seed(0)
    encoder = Encoder(EncoderSettings(preset="nano", patch=(4, 4), context=ContextSettings(kinds=(kind,))), CHANNELS).eval()
    patches, ids = torch.randn(2, 3, 3, 16, generator=generator(0)), torch.tensor([[0, 3, 2]] * 2)
    with torch.no_grad():
        plain, unknown, known = (encoder(patches, ids, (2, 2), None, None, context) for context in (withheld, lacks, knows))
    assert torch.equal(plain, unknown)
    assert not torch.allclose(plain, known, atol=1e-5)


def test_an_older_store_is_read_and_knows_nothing(tmp_path: Path) -> None:
    store = without_new_columns(store_of(tmp_path / "out", placed(tmp_path, "a", "2020-12-31")))
    facts = facts_of(store, np.arange(4))
    for name in ("day_of_year", "year", "latitude", "longitude"):
        assert facts[name].isnan().all()
    assert facts["resolution"].tolist() == [[10.0, 10.0]] * 4
    assert np.isnan(store.index.cloud_fraction).all()
    assert store.index.times.tolist() == [()] * 4


def flagged(folder: Path, name: str, flags: Mapping[Quality, int], space: tuple[int, int] = (8, 8)) -> Any:
    """A scene of which some voxels have a flag each, the others none."""
    quality = np.zeros(space, np.uint8)
    values = [int(flag) for flag, count in flags.items() for _ in range(count)]
    quality.ravel()[: len(values)] = values
    return make_scene(folder, name, space, quality=quality)


def test_tiles_are_dropped_for_clouds_and_for_want_of_data_and_each_is_counted(tmp_path: Path) -> None:
    """64 voxels a tile."""
    scenes = Scenes(
        (
            flagged(tmp_path, "clear", {Quality.NODATA: 1}),
            flagged(tmp_path, "edge", {Quality.CLOUD: 16, Quality.EXCLUDED: 16}),
            flagged(tmp_path, "overcast", {Quality.CLOUD: 17, Quality.EXCLUDED: 16}),
            flagged(tmp_path, "empty", {Quality.NODATA: 60}),
            flagged(tmp_path, "both", {Quality.CLOUD: 30, Quality.NODATA: 32}),
        )
    )
    report = prepare(scenes, tmp_path / "out", changed(min_valid_fraction=0.1, max_cloud_fraction=0.5))
    assert dict(report.discarded) == {"too cloudy": 1, "too little valid data": 2}
    store = TileStore.open(report.path)
    assert dict(zip(store.index.scene.tolist(), store.index.cloud_fraction.tolist(), strict=True)) == {"clear": 0.0, "edge": 0.5}
    assert store.statistics.count.tolist() == [63 + 32] * 2, "clouds that are kept are not counted"


def test_one_nodata_voxel_discards_nothing(tmp_path: Path) -> None:
    scene = flagged(tmp_path, "a", {Quality.NODATA: 1}, (16, 16))
    store = store_of(tmp_path / "out", scene, settings=changed(min_valid_fraction=0.9, max_cloud_fraction=0.0))
    assert len(store) == 4
    assert store.statistics.count.tolist() == [255] * 2
