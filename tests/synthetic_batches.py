"""Small models, batches and tile stores for the tests of the core, all drawn from fixed seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mae_core.augment import Batch, RawBatch
from mae_core.decoders import DecoderSettings
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.masking import HidingPlan, RandomHiding, Sample, hide
from mae_core.nd import TokenLayout, token_grid, token_valid
from mae_core.store import TileStore
from mae_core.store_writer import ShardWriter, StoreLayout, finish, merge_moments
from mae_core.targets import NormalisedPixelTarget, PixelTarget
from mae_core.vit import EncoderSettings, channel_groups

CHANNELS = ("red", "green", "blue")
CASES = [((24,), (4,)), ((12, 15), (4, 3)), ((4, 8, 6), (2, 4, 2))]
"""Crop and patch with one, two and three axes; neither square nor isotropic."""


def by_axes(case: Any) -> str:
    """Name of a case in the list of tests."""
    return f"{len(case)} axes {case}" if isinstance(case, tuple) else str(case)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread in the file that imports this: many small steps are slower on two, far more so where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def grids(draw: st.DrawFn, max_grid: int = 4, max_patch: int = 4) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token grids and patches with one to three axes."""
    axes = draw(st.integers(1, 3))
    grid = draw(st.tuples(*[st.integers(1, max_grid)] * axes))
    return grid, draw(st.tuples(*[st.integers(1, max_patch)] * axes))


def generator(seed: int) -> torch.Generator:
    """Numbers of a test, independent of all other tests."""
    return torch.Generator().manual_seed(seed)


def names(batch: int, epoch: int = 0, repeat: int = 0) -> Sample:
    """Names of samples: tiles 100, 101, ..."""
    return Sample(torch.full((batch,), epoch), torch.arange(batch) + 100, torch.full((batch,), repeat))


def settings_of(patch: tuple[int, ...], target: PixelTarget | NormalisedPixelTarget | None = None, **more: Any) -> ModelSettings:
    """The smallest model."""
    encoder = EncoderSettings(preset="nano", patch=patch, mlp_ratio=2)
    decoder = DecoderSettings(width=32, depth=1, heads=2)
    return ModelSettings(encoder=encoder, decoder=decoder, target=target or NormalisedPixelTarget(), **more)


def model_of(settings: ModelSettings, channels: tuple[str, ...] = CHANNELS, seed: int = 0) -> MaskedAutoencoder:
    """A model with weights from a seed; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskedAutoencoder(settings, channels)


def batch_of(space: tuple[int, ...], size: int = 2, channels: int = len(CHANNELS), seed: int = 0) -> Batch:
    """A batch of noise in which everything counts."""
    pixels = torch.randn(size, channels, *space, generator=generator(seed))
    quality, present = torch.zeros(size, *space, dtype=torch.uint8), torch.ones(size, channels, dtype=torch.bool)
    return Batch(pixels, quality, None, present, names(size))


def plan_of(batch: Batch, settings: ModelSettings, ratio: float = 0.75, seed: int = 0) -> HidingPlan:
    """The plan that a run would make for a batch."""
    valid = token_valid(batch.counted, settings.encoder.patch, settings.min_token_valid_fraction)
    return hide(valid, (1, valid.shape[1]), RandomHiding(mask_ratio=ratio), seed, batch.sample)


def layout_of(batch: Batch, settings: ModelSettings) -> TokenLayout:
    """How a model of these settings makes tokens of a batch."""
    encoder, channels = settings.encoder, tuple(f"c{number}" for number in range(batch.pixels.shape[1]))
    grid = token_grid(batch.pixels.shape[2:], encoder.step)
    return TokenLayout(grid, encoder.patch, encoder.step, channel_groups(encoder.groups, channels), len(channels))


def raw_of(pixels: Tensor, quality: Tensor | None = None, labels: Tensor | None = None, **more: Any) -> RawBatch:
    """A raw batch whose missing parts are the plainest: all good, all present, scale 1, offset 0, no padding."""
    size, channels, *space = pixels.shape
    parts: dict[str, Any] = {
        "quality": torch.zeros(size, *space, dtype=torch.uint8) if quality is None else quality,
        "present": torch.ones(size, channels, dtype=torch.bool),
        "scale": torch.ones(size, channels),
        "offset": torch.zeros(size, channels),
        "extent": torch.tensor([space] * size),
        "sample": names(size),
    }
    return RawBatch(pixels=pixels, labels=labels, **(parts | more))


def waves(space: tuple[int, ...], channels: int, seed: int) -> NDArray[np.float64]:
    """Smooth fields in [-1, 1], one per channel, with a few waves across the tile: `(channel, *space)`."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*(np.arange(size) / max(space) for size in space), indexing="ij"))
    fields = []
    for _ in range(channels):
        turns = rng.uniform(1, 4, (3, len(space)))
        start = rng.uniform(0, 2 * math.pi, 3)
        fields.append(sum(np.sin(2 * math.pi * np.tensordot(turn, places, 1) + at) for turn, at in zip(turns, start, strict=True)) / 3)
    return np.stack(fields)


def store_of(path: Path, space: tuple[int, ...], num_tiles: int = 6, channels: tuple[str, ...] = CHANNELS) -> TileStore:
    """A store of smooth float32 tiles; labels are 1 where the first channel is positive, 0 elsewhere, -1 in a corner.

    A tile owns all but its last two rows.
    """
    layout = StoreLayout(num_tiles, channels, space, ("z", "y", "x")[-len(space) :], "float32", 4, has_labels=True)
    shards: dict[str, Any] = {}
    for shard in range(layout.num_shards):
        with ShardWriter(path, layout, shard) as writer:
            for tile in range(shard * 4, min(shard * 4 + 4, num_tiles)):
                pixels = waves(space, len(channels), tile).astype(np.float32)
                labels = (pixels[0] > 0).astype(np.int16)
                labels[(slice(0, 2),) * len(space)] = -1
                writer.add(tile, pixels, np.zeros(space, np.uint8), labels)
        shards |= writer.files
    numbers = len(channels)
    moment: dict[str, Any] = {"count": [9] * numbers, "mean": [0.0] * numbers, "m2": [9.0] * numbers, "min": [-1.0] * numbers}
    row = {
        "scene": "scene",
        "group": "group",
        "split": "val",
        "origin": [0] * len(space),
        "extent": list(space),
        "owned": [space[0] - 2, *space[1:]],
        "affine": np.eye(len(space) + 1).ravel().tolist(),
        "frame": "",
        "unit": "m",
        "valid_fraction": 1.0,
        "present": [True] * numbers,
        "scale": [1.0] * numbers,
        "offset": [0.0] * numbers,
    }
    finish(
        path,
        layout,
        attributes={"kind": "raster", "channels": [{"name": name} for name in channels], "no_value": 1, "classes": [0, 1]},
        rows=[row | {"tile": tile} for tile in range(num_tiles)],
        statistics=merge_moments([moment | {"max": [1.0] * numbers}], numbers),
        shards=shards,
        manifest={"tiles": {"accepted": num_tiles}},
    )
    return TileStore.open(path)


def with_index(store: TileStore, **columns: Any) -> TileStore:
    """The store as if its index had other columns."""
    return replace(store, whole=replace(store.whole, index=replace(store.index, **columns)))


def places(space: tuple[int, ...]) -> itertools.product[tuple[int, ...]]:
    """Every place of an array, for naive loops."""
    return itertools.product(*(range(size) for size in space))
