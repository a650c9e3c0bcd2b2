"""From files to gradients: what stands under a quality bit is in no statistic, no loss and no gradient, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mae_core.loader import read_rows
from mae_core.masking import Sample
from mae_core.store import TileStore
from modalities.quality import NO_VALUE, Quality
from pipelines.preparation import PrepareSettings, prepare
from pipelines.tiling_plan import SplitSettings
from tests.synthetic_scenes import Scenes, make_scene
from tests.tiny_runs import one_thread, tiny_recipe, tiny_run

BITS = [flag for flag in Quality if flag and flag != Quality.PADDING]
"""Padding is not an adapter's to give."""

SETTINGS = PrepareSettings(
    tile=(16, 16), tiles_per_shard=4, num_workers=0, min_valid_fraction=0.0, split=SplitSettings(val_fraction=0.2, seed=1)
)


def store_with(folder: Path, dtype: str, flag: Quality, value: float) -> TileStore:
    """Three scenes of which a sixth is flagged; what stands there is `value`."""
    folder.mkdir()
    quality = np.where(np.random.default_rng(1).random((32, 32)) < 1 / 6, np.uint8(flag), np.uint8(0))
    scenes = tuple(make_scene(folder, name, (32, 32), dtype=dtype, scale=0.01, quality=quality) for name in "abc")
    for scene in scenes:
        pixels = np.load(scene.files[0])
        pixels[:, quality != 0] = value
        np.save(scene.files[0], pixels)
    return TileStore.open(prepare(Scenes(scenes), folder / "store", SETTINGS, attributes={"kind": "raster", "reader": {}}).path)


def loss_and_gradients(store: TileStore) -> list[torch.Tensor]:
    run = tiny_run(store, tiny_recipe(train__seed=3))
    rows = store.rows("train")[:4]
    raw = read_rows(
        store, rows, Sample(torch.zeros(4, dtype=torch.int64), torch.from_numpy(store.index.tile[rows]), torch.zeros(4, dtype=torch.int64))
    )
    loss = run.task.loss(run.state.model, raw, 0.0)
    (loss.total / loss.count).backward()
    gradients = [weight.grad for weight in run.state.model.parameters() if weight.grad is not None]
    assert len(gradients) > 10
    return [loss.total.detach(), loss.count.detach(), loss.per_sample, *gradients]


@pytest.mark.parametrize("flag", BITS, ids=lambda flag: str(flag.name))
@pytest.mark.parametrize(("dtype", "values"), [("float32", (0.0, np.nan, 3e38)), ("uint16", (0, 65535))])
def test_what_is_flagged_changes_nothing(tmp_path: Path, dtype: str, values: tuple[float, ...], flag: Quality) -> None:
    plain, *others = (store_with(tmp_path / f"s{number}", dtype, flag, value) for number, value in enumerate(values))
    for other in others:
        for name in ("statistics.json", "histogram.parquet"):
            assert (other.path / name).read_bytes() == (plain.path / name).read_bytes(), name
    if not flag & NO_VALUE:
        return  # background is a true value that is fed; only statistics leave it out
    with one_thread():
        wanted = loss_and_gradients(plain)
        assert all(part.isfinite().all() for part in wanted)
        for other in others:
            assert all(torch.equal(one, two) for one, two in zip(loss_and_gradients(other), wanted, strict=True))


def test_a_counted_voxel_does_change_them(tmp_path: Path) -> None:
    """The same comparison sees a difference where there is one."""
    one, other = (store_with(tmp_path / f"s{number}", "uint16", Quality.GOOD, value) for number, value in enumerate((0, 0)))
    changed = store_with(tmp_path / "changed", "uint16", Quality.NODATA, 0)
    assert (one.path / "statistics.json").read_bytes() == (other.path / "statistics.json").read_bytes()
    assert (one.path / "statistics.json").read_bytes() != (changed.path / "statistics.json").read_bytes()
    with one_thread():
        assert not torch.equal(loss_and_gradients(one)[0], loss_and_gradients(changed)[0])
