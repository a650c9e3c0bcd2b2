"""Crops stay on real data, pixels, flags and labels move together, and normalisation is that of float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mae_core.augment import AugmentSettings, Batch, Normaliser, RawBatch, normalise
from mae_core.masking import Sample
from tests.synthetic_batches import generator, names, raw_of

CPU = torch.device("cpu")
FIRST = {"uint16": 40000, "int16": -100, "uint8": 0, "float32": -7}
BAD = 128
"""A quality bit under which there is no value."""


def placed(tile: tuple[int, ...], dtype: str = "int16", size: int = 4) -> RawBatch:
    """Tiles whose labels are the number of the voxel, and whose pixels and flags are functions of it."""
    number = torch.arange(int(np.prod(tile))).reshape(tile).expand(size, *tile)
    pixels = torch.stack([number + FIRST[dtype], number // 2 + FIRST[dtype]], dim=1)
    return raw_of(torch.from_numpy(pixels.numpy().astype(dtype)), (number % 100).to(torch.uint8), number.to(torch.int16))


def plain(crop: tuple[int, ...], augment: AugmentSettings | None = None, seed: int = 0, no_value: int = 0) -> Normaliser:
    return Normaliser(crop, (0.0, 0.0), (1.0, 1.0), no_value, seed, augment)


def assert_together(batch: Batch, dtype: str) -> None:
    """Every voxel still has the pixels and the flags that belong to its label."""
    assert batch.labels is not None
    assert torch.equal(batch.quality.long(), batch.labels % 100)
    assert torch.equal(batch.pixels[:, 0], (batch.labels + FIRST[dtype]).float())
    assert torch.equal(batch.pixels[:, 1], (batch.labels // 2 + FIRST[dtype]).float())


def corners(batch: Batch, tile: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """First and last place per axis of each crop, from its labels."""
    assert batch.labels is not None
    boxes = []
    for labels in batch.labels:
        found = np.unravel_index(labels.numpy().ravel(), tile)
        boxes.append([(int(axis.min()), int(axis.max())) for axis in found])
        assert len(np.unique(labels)) == labels.numel(), "no voxel twice"
    return boxes


@pytest.mark.parametrize("dtype", FIRST)
@pytest.mark.parametrize(("tile", "crop"), [((40,), (8,)), ((12, 10), (8, 8)), ((11, 13), (4, 8)), ((6, 5, 6), (2, 4, 4))])
def test_pixels_flags_and_labels_move_together(tile: tuple[int, ...], crop: tuple[int, ...], dtype: str) -> None:
    raw = placed(tile, dtype, size=16)
    batch = plain(crop, AugmentSettings(quarter_turns=True))(raw, CPU)
    assert batch.pixels.dtype == torch.float32
    assert batch.pixels.shape == (16, 2, *crop)
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64
    assert_together(batch, dtype)
    for box in corners(batch, tile):
        assert sorted(last - first + 1 for first, last in box) == sorted(crop)


@given(st.integers(1, 3), st.data())
def test_crops_stay_on_real_data(axes: int, data: st.DataObject) -> None:
    tile = (9, 8, 7)[:axes]
    crop = tuple(data.draw(st.integers(1, size)) for size in tile)
    extent = torch.tensor([[data.draw(st.integers(1, size)) for size in tile] for _ in range(3)])
    for augment in (AugmentSettings(), None):
        raw = replace(placed(tile, size=3), extent=extent)
        for box, real in zip(corners(plain(crop, augment)(raw, CPU), tile), extent.tolist(), strict=True):
            for (first, last), end, length in zip(box, real, crop, strict=True):
                assert last - first + 1 == length
                assert last < end or (first == 0 and length > end)


def test_every_origin_is_drawn_about_equally_often() -> None:
    size = 3000
    raw = replace(placed((10, 9), size=size), extent=torch.tensor([[8, 9]] * size))
    origins = plain((5, 8), AugmentSettings()).origins(raw)
    found = torch.bincount(origins[:, 0] * 2 + origins[:, 1], minlength=8).double()
    assert len(found) == 8
    assert float(((found - size / 8) ** 2 / (size / 8)).sum()) < 24.3, "chi-square with 7 degrees of freedom, 1 in 1000"


def test_without_augmentation_the_crop_is_the_centre_of_the_real_data() -> None:
    raw = replace(placed((10, 12), size=2), extent=torch.tensor([[10, 12], [7, 9]]))
    batch = plain((4, 4))(raw, CPU)
    assert corners(batch, (10, 12)) == [[(3, 6), (4, 7)], [(1, 4), (2, 5)]]
    assert raw.labels is not None
    assert batch.labels is not None
    assert torch.equal(batch.labels[0], raw.labels[0, 3:7, 4:8].long())


def symmetries(crop: tuple[int, ...], augment: AugmentSettings) -> set[tuple[int, ...]]:
    """The different crops that come of one whole tile under 200 names."""
    batch = plain(crop, augment)(placed(crop, size=200), CPU)
    assert batch.labels is not None
    return {tuple(labels.flatten().tolist()) for labels in batch.labels}


@pytest.mark.parametrize(
    ("crop", "augment", "count"),
    [
        ((4,), AugmentSettings(), 2),
        ((2, 3), AugmentSettings(), 4),
        ((2, 3, 2), AugmentSettings(), 8),
        ((3, 3), AugmentSettings(quarter_turns=True), 8),
        ((3, 3), AugmentSettings(flips=False, quarter_turns=True), 4),
        ((2, 3), AugmentSettings(quarter_turns=True), 4),
        ((2, 3, 3), AugmentSettings(quarter_turns=True), 16),
        ((5,), AugmentSettings(quarter_turns=True), 2),
        ((3, 3), AugmentSettings(flips=False), 1),
    ],
)
def test_all_symmetries_of_the_crop_and_no_more(crop: tuple[int, ...], augment: AugmentSettings, count: int) -> None:
    assert len(symmetries(crop, augment)) == count


def test_flips_and_turns_of_a_square_are_its_eight_symmetries() -> None:
    square = np.arange(9).reshape(3, 3)
    wanted = {
        tuple(np.rot90(square[::-1] if flip else square, turn).ravel().tolist()) for flip, turn in itertools.product((0, 1), range(4))
    }
    assert symmetries((3, 3), AugmentSettings(quarter_turns=True)) == wanted


def part_of(raw: RawBatch, order: Tensor) -> RawBatch:
    assert raw.labels is not None
    moved = {name: getattr(raw, name)[order] for name in ("pixels", "quality", "labels", "present", "scale", "offset", "extent")}
    return RawBatch(**moved, sample=raw.sample.shuffled(order))


@given(st.permutations(range(5)), st.integers(1, 5))
def test_a_crop_depends_on_the_name_of_the_sample_alone(order: list[int], size: int) -> None:
    make = plain((4, 4), AugmentSettings(quarter_turns=True), seed=5)
    raw = placed((9, 9), size=5)
    whole = make(raw, CPU)
    chosen = torch.tensor(order[:size])
    part = make(part_of(raw, chosen), CPU)
    assert torch.equal(part.pixels, whole.pixels[chosen])
    assert torch.equal(part.sample.tile, whole.sample.tile[chosen])


def test_another_epoch_tile_repeat_or_seed_gives_other_crops() -> None:
    raw = placed((30, 30), size=8)
    others = [replace(raw, sample=name) for name in (names(8, epoch=1), names(8, repeat=1), Sample(*[names(8).tile] * 3))]
    crops = [plain((4, 4), AugmentSettings())(batch, CPU).pixels for batch in (raw, *others)]
    crops.append(plain((4, 4), AugmentSettings(), seed=1)(raw, CPU).pixels)
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(crops, 2))
    assert torch.equal(crops[0], plain((4, 4), AugmentSettings())(raw, CPU).pixels)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint8", "float32"])
def test_normalised_values_are_those_of_float64(dtype: str) -> None:
    rng = np.random.default_rng(0)
    low, high = (0, 65536) if dtype == "uint16" else (-32768, 32768) if dtype == "int16" else (0, 256)
    stored = rng.integers(low, high, (2, 2, 9, 7)).astype(dtype)
    scale, offset = np.array([[1e-4, 2.0], [0.5, 1.0]]), np.array([[-0.1, 0.0], [-1024.0, 3.0]])
    mean, std = np.array([0.31, 120.0]), np.array([0.07, 800.0])
    result = normalise(torch.from_numpy(stored), torch.tensor(scale).float(), torch.tensor(offset).float(), mean.tolist(), std.tolist())

    def wide(part: np.ndarray) -> np.ndarray:
        return part.astype(np.float32).astype(np.float64)[..., None, None]

    physical = stored.astype(np.float64) * wide(scale) + wide(offset)
    wanted = (physical - mean[:, None, None]) / std[:, None, None]
    assert result.dtype == torch.float32
    largest = np.abs(np.concatenate([wanted, stored * wide(scale) / std[:, None, None]], axis=1)).max(axis=(1, 2, 3), keepdims=True)
    assert (np.abs(result.numpy() - wanted) / largest).max() < 1e-6


def test_large_unsigned_numbers_are_not_negative() -> None:
    stored = torch.tensor([[[32767, 32768, 65535, 0]]]).to(torch.uint16)
    raw = raw_of(stored)
    batch = Normaliser((4,), (0.0,), (1.0,), 0, 0, AugmentSettings(flips=False))(raw, CPU)
    assert batch.pixels.flatten().tolist() == [32767, 32768, 65535, 0]


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -9999.0])
def test_no_value_and_absent_channels_are_exactly_zero(rubbish: float) -> None:
    pixels = 5 + torch.rand(2, 2, 6, 6, generator=generator(0))
    quality = torch.zeros(2, 6, 6, dtype=torch.uint8)
    quality[0, :2], quality[1, 3] = BAD, 1
    pixels[0, :, :2], pixels[1, 1] = rubbish, rubbish
    raw = raw_of(pixels, quality, present=torch.tensor([[True, True], [True, False]]))
    batch = plain((6, 6), no_value=BAD)(raw, CPU)
    assert not batch.pixels[0, :, :2].any()
    assert not batch.pixels[1, 1].any()
    assert batch.pixels[0, :, 2:].min() >= 5
    assert batch.pixels[1, 0, 3].min() >= 5, "a flag that leaves the value in place does not touch it"
    assert torch.equal(batch.counted, quality == 0)
    assert batch.labels is None
