"""Percentiles of what was counted in parts are numpy's over everything, whatever the parts were."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipelines.value_counts
from mae_core.histogram import PERCENTS, REAL_BITS, WHOLE_BITS, Histogram, rounded
from mae_core.store import TileStore
from mae_core.store_view import write_view
from pipelines.preparation import PrepareSettings, prepare
from tests.synthetic_scenes import Scenes, make_scene, three_places


def same(one: Histogram, other: Histogram) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("channel", "value", "count"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
def test_percentiles_equal_numpy(dtype: str) -> None:
    rng = np.random.default_rng(0)
    stored = [rng.normal(100, 40, size).clip(0, 255).astype(dtype) for size in (1, 4000, 37)]
    found = Histogram.merged([Histogram.of(number, values, 1e-4, -0.1) for number, values in enumerate(stored)]).percentiles(4)
    assert np.isnan(found[3]).all()
    for values, row in zip(stored, found, strict=False):
        wanted = np.percentile(values.astype(np.float64) * 1e-4 - 0.1, PERCENTS)
        np.testing.assert_allclose(row, wanted, rtol=1e-5 if dtype in {"uint8", "uint16", "int16"} else 3e-4)


def test_all_values_of_a_16_bit_image_are_told_apart() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    assert len(Histogram.of(0, every, 1e-4, 0.0).value) == 1 << 16
    assert len(Histogram.of(0, every.astype(np.int16), 1.0, 0.0).value) == 1 << 16


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=50), st.sampled_from([WHOLE_BITS, REAL_BITS]))
def test_rounding_is_to_the_nearest_and_forgets_the_sign_of_nothing(values: list[float], bits: int) -> None:
    given = np.array(values)
    near = rounded(given, bits).astype(np.float64)
    large = np.abs(given) > 1e-30
    assert (np.abs(near - given)[large] <= np.abs(given)[large] * 2.0 ** -(bits + 1) * 1.01).all()
    assert not np.signbit(near[near == 0]).any()
    np.testing.assert_array_equal(rounded(near, bits), near)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=40), st.randoms(use_true_random=False))
def test_the_parts_and_their_order_do_not_matter(entries: list[tuple[int, int]], random: Any) -> None:
    parts = [Histogram.of(channel, np.array([value], np.uint8), 1.0, 0.0) for channel, value in entries]
    whole = Histogram.merged(parts)
    random.shuffle(parts)
    cut = random.randint(0, len(parts))
    assert same(Histogram.merged([Histogram.merged(parts[:cut]), Histogram.merged(parts[cut:])]), whole)
    assert whole.count.sum() == len(entries)
    assert len(set(zip(whole.channel.tolist(), whole.value.tolist(), strict=True))) == len(whole.value) == len(set(entries))


SETTINGS = PrepareSettings(tile=(8, 8), tiles_per_shard=4, num_workers=0, min_valid_fraction=0.0)


def training_values(store: TileStore, scenes: Scenes, channel: int) -> np.ndarray:
    train = set(store.index.scene[store.rows("train")])
    values = []
    for scene in (scene for scene in scenes.scenes if scene.name in train):
        pixels, quality = scene.read(scene.grid.full)
        values.append(pixels[channel][quality == 0].astype(np.float64) * scene.channels[channel].scale + scene.channels[channel].offset)
    return np.concatenate(values)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_store_tells_percentiles_of_its_counted_training_voxels(tmp_path: Path, dtype: str) -> None:
    """Flagged voxels hold NaN or the largest number; tiles overlap, and what they share is counted once."""
    scenes = Scenes(tuple(make_scene(tmp_path, f"s{n}", (19, 11), dtype=dtype, scale=-0.01 * (n + 1), offset=3) for n in range(5)))
    store = TileStore.open(prepare(scenes, tmp_path / "out", SETTINGS).path)
    for channel in range(2):
        wanted = np.percentile(training_values(store, scenes, channel), PERCENTS)
        np.testing.assert_allclose(store.statistics.percentiles[channel], wanted, rtol=1e-5 if dtype == "uint16" else 3e-4)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_workers_count_the_same(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are handed over as to another process, and come back as they are finished."""

    def run(work: Any, tasks: Any, *_: Any) -> Iterator[Histogram]:
        handed = [pickle.loads(pickle.dumps(task)) for task in tasks]
        with ThreadPoolExecutor(workers) as pool:
            yield from (future.result() for future in as_completed([pool.submit(work, task) for task in reversed(handed)]))

    scenes = three_places(tmp_path)
    alone = prepare(scenes, tmp_path / "alone", SETTINGS)
    monkeypatch.setattr(pipelines.value_counts, "BYTES_HERE", 0)
    monkeypatch.setattr(pipelines.value_counts, "works_here", lambda *_: False)
    monkeypatch.setattr(pipelines.value_counts, "run_tasks", run)
    many = prepare(scenes, tmp_path / "many", SETTINGS)
    assert (alone.path / "histogram.parquet").read_bytes() == (many.path / "histogram.parquet").read_bytes()
    assert alone.digest == many.digest


def test_growing_and_joining_count_everything_once(tmp_path: Path) -> None:
    scenes = [make_scene(tmp_path, name, (16, 16), scale=0.1 * (n + 1)) for n, name in enumerate("abcdef")]
    whole = SETTINGS.model_copy(update={"split": SETTINGS.split.model_copy(update={"val_fraction": 0.0})})
    every = TileStore.open(prepare(Scenes(tuple(scenes)), tmp_path / "every", whole).path)
    grown = prepare(Scenes(tuple(scenes[:4])), tmp_path / "grown", whole).path
    half = TileStore.open(grown)
    for name in "ef":
        prepare(Scenes(tuple(scenes[:5] if name == "e" else scenes)), grown, whole)
    assert not np.array_equal(half.statistics.percentiles, every.statistics.percentiles)
    np.testing.assert_array_equal(TileStore.open(grown).statistics.percentiles, every.statistics.percentiles)
    parts = [prepare(Scenes(tuple(part)), tmp_path / f"part{n}", whole).path for n, part in enumerate((scenes[:2], scenes[2:]))]
    write_view(tmp_path / "view", parts)
    np.testing.assert_array_equal(TileStore.open(tmp_path / "view").statistics.percentiles, every.statistics.percentiles)
