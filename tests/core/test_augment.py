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
from mae_core.context import only_spacing
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


def ramps(tile: tuple[int, ...], size: int = 12) -> RawBatch:
    """Tiles whose first channel rises by 1 per voxel along the first axis and the second by 3 along the last; 10 m voxels."""
    places = np.stack(np.meshgrid(*map(np.arange, tile), indexing="ij")).astype(np.float32)
    pixels = torch.from_numpy(np.stack([places[0], 3 * places[-1]])).expand(size, -1, *tile)
    return replace(raw_of(pixels.contiguous()), context=only_spacing(torch.full((size, len(tile)), 10.0)))


@pytest.mark.parametrize(("tile", "crop"), [((40,), (16,)), ((30, 24), (12, 16)), ((14, 12, 13), (8, 6, 8))])
def test_a_resized_crop_is_the_place_that_its_resolution_says(tile: tuple[int, ...], crop: tuple[int, ...]) -> None:
    raw = ramps(tile)
    batch = plain(crop, AugmentSettings(flips=False, resized_crop=(0.3, 0.9)))(raw, CPU)
    assert batch.context is not None
    zoom = batch.context.spacing[:, 0] / 10
    assert torch.equal(batch.context.spacing, batch.context.resolution)
    assert ((zoom ** len(tile) > 0.3 - 1e-5) & (zoom ** len(tile) < 0.9 + 1e-5)).all()
    assert len(zoom.unique()) > 6
    for channel, axis, slope in ((0, 1, 1.0), (1, len(tile), 3.0)):
        found = batch.pixels[:, channel]
        steps = found.diff(dim=axis).movedim(axis, 1)[:, 1:-1].flatten(1)  # the outermost voxels may lie half over the border
        torch.testing.assert_close(steps, (slope * zoom)[:, None].expand_as(steps), rtol=0, atol=1e-3)
        assert found.min() >= 0
        assert found.max() <= slope * (tile[axis - 1] - 1) + 1e-3


def test_a_resized_crop_of_the_whole_share_is_the_plain_crop() -> None:
    raw = ramps((20, 18))
    for flips in (False, True):
        one = plain((8, 8), AugmentSettings(flips=flips, quarter_turns=True))(raw, CPU)
        other = plain((8, 8), AugmentSettings(flips=flips, quarter_turns=True, resized_crop=(1.0, 1.0)))(raw, CPU)
        torch.testing.assert_close(other.pixels, one.pixels, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rubbish", [np.nan, 1e30])
def test_resizing_mixes_in_no_voxel_without_value(rubbish: float) -> None:
    quality = (torch.rand(8, 16, 14, generator=generator(3)) < 0.3).to(torch.uint8) * BAD
    batches = []
    for fill in (0.0, rubbish):
        pixels = torch.where(quality[:, None] == BAD, fill, 5.0).expand(-1, 2, -1, -1).contiguous()
        batches.append(plain((8, 8), AugmentSettings(resized_crop=(0.2, 0.8)), no_value=BAD)(raw_of(pixels, quality), CPU))
    clean, dirty = batches
    assert torch.equal(clean.pixels, dirty.pixels)
    has_value = (clean.quality == 0)[:, None].expand_as(clean.pixels)
    torch.testing.assert_close(clean.pixels[has_value], torch.full_like(clean.pixels[has_value], 5.0))
    assert not clean.pixels[~has_value].any()


def test_labels_of_a_resized_crop_are_those_of_the_nearest_voxel() -> None:
    raw = replace(ramps((20, 18)), labels=ramps((20, 18)).pixels[:, 0].to(torch.int16))
    batch = plain((8, 8), AugmentSettings(resized_crop=(0.2, 0.5)))(raw, CPU)
    assert batch.labels is not None
    assert (batch.labels - batch.pixels[:, 0]).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("pair", [(0.9, 0.2), (0.0, 0.5), (0.5, 1.2)])
def test_shares_that_are_none_are_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"must be two rising shares in \(0, 1\]"):
        AugmentSettings(resized_crop=pair)


def test_intensity_changes_are_one_gain_and_shift_per_channel() -> None:
    pixels = torch.randn(64, 2, 8, 8, generator=generator(0))
    quality = torch.zeros(64, 8, 8, dtype=torch.uint8)
    quality[:, 0] = BAD
    raw = raw_of(pixels, quality)
    settings = AugmentSettings(flips=False, intensity=0.2)
    batch = plain((8, 8), settings, no_value=BAD)(raw, CPU)
    assert not batch.pixels[:, :, 0].any()
    assert torch.equal(batch.pixels, plain((8, 8), settings, no_value=BAD)(raw, CPU).pixels)
    gains = []
    for sample, channel in itertools.product(range(64), range(2)):
        old, new = pixels[sample, channel, 1:].flatten(), batch.pixels[sample, channel, 1:].flatten()
        gain, shift = np.polyfit(old.numpy(), new.numpy(), 1)
        torch.testing.assert_close(new, old * float(gain) + float(shift), rtol=0, atol=1e-5)
        assert abs(gain - 1) < 0.2 + 1e-5
        assert abs(shift) < 0.2 + 1e-5
        gains.append(gain)
    assert np.std(gains) > 0.05
    assert len(np.unique(gains)) == 128


def test_dropped_channels_are_absent_and_one_always_stays() -> None:
    present = torch.tensor([[True, True, True, True], [False, True, False, False]] * 100)
    raw = raw_of(torch.ones(200, 4, 6, 6), present=present)
    normaliser = Normaliser((6, 6), (0.0,) * 4, (1.0,) * 4, 0, 0, AugmentSettings(channel_drop_fraction=0.6))
    batch = normaliser(replace(raw, complete=True), CPU)
    assert not (batch.present & ~present).any()
    assert batch.present.any(dim=1).all()
    assert not batch.complete
    assert 0.35 < float(batch.present[::2].float().mean()) < 0.5
    assert torch.equal(batch.pixels[:, :, 0, 0] == 1, batch.present)
    absent = replace(raw, present=batch.present)
    silent = Normaliser((6, 6), (0.0,) * 4, (1.0,) * 4, 0, 0, AugmentSettings())(absent, CPU)
    assert torch.equal(silent.pixels, batch.pixels), "dropped is absent, bit for bit"
