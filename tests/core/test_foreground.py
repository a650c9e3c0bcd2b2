"""Crops that are placed on foreground hold it, wherever it lies; all others are placed as before, and nothing depends on the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mae_core.augment import AugmentSettings, Normaliser, RawBatch
from mae_core.foreground import Foreground
from mae_core.masking import Sample
from tests.synthetic_batches import generator, names, raw_of

CPU = torch.device("cpu")
BAD = 128
ALWAYS = Foreground(1.0, (1, 2))
TILES = {1: (23,), 2: (15, 19), 3: (9, 11, 8)}
CROPS = {1: (4,), 2: (4, 6), 3: (3, 4, 2)}


def sparse(tile: tuple[int, ...], size: int, share: float = 0.01, seed: int = 0) -> RawBatch:
    """Tiles of background with a few voxels of class 1, fewer of 2 and some that are not labelled."""
    drawn = torch.rand(size, *tile, generator=generator(seed))
    labels = torch.where(drawn < share, 1, 0).to(torch.int16)
    labels[drawn < share / 4], labels[drawn > 0.9] = 2, -1
    return raw_of(torch.randn(size, 1, *tile, generator=generator(seed + 1)), labels=labels)


def maker(crop: tuple[int, ...], foreground: Foreground | None, footprint: int = 1, **augment: object) -> Normaliser:
    return Normaliser(crop, (0.0,), (1.0,), BAD, 7, AugmentSettings.model_validate(augment), footprint, 0, foreground)


def holds(labels: Tensor, classes: tuple[int, ...] = (1, 2)) -> Tensor:
    """Which crops have a voxel of some classes."""
    return torch.isin(labels, torch.tensor(classes)).flatten(1).any(dim=1)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("augment", [{}, {"quarter_turns": True}, {"resized_crop": (0.2, 0.9)}], ids=["plain", "turned", "resized"])
def test_every_crop_of_a_tile_with_foreground_holds_some(axes: int, augment: dict[str, object]) -> None:
    raw = sparse(TILES[axes], 64)
    placed, free = (maker(CROPS[axes], foreground, **augment)(raw, CPU) for foreground in (ALWAYS, None))
    has_any = holds(raw.labels)
    sure = holds(raw.labels[(slice(None), *(slice(0, -1),) * axes)]) if "resized_crop" in augment else has_any
    assert holds(placed.labels)[sure].all(), "a tile's last voxels may lie in no resized window whole"
    assert int(holds(free.labels).sum()) < int(has_any.sum()), "without, some crops miss it"
    assert torch.equal(placed.pixels[~has_any], free.pixels[~has_any]), "a tile without any is placed as before"
    assert not torch.equal(placed.pixels, free.pixels)


@given(st.integers(1, 3), st.data())
def test_a_single_voxel_is_found_wherever_it_lies_also_at_the_border_and_with_padding(axes: int, data: st.DataObject) -> None:
    tile = TILES[axes]
    extent = [data.draw(st.integers(1, size)) for size in tile]
    crop = tuple(data.draw(st.integers(1, size)) for size in tile)
    spot = tuple(data.draw(st.integers(0, size - 1)) for size in extent)
    labels = torch.zeros(6, *tile, dtype=torch.int16)
    labels[(slice(None), *spot)] = 2
    raw = replace(raw_of(torch.zeros(6, 1, *tile), labels=labels), extent=torch.tensor([extent] * 6))
    make = maker(crop, ALWAYS)
    assert holds(make(raw, CPU).labels).all()
    for origin in make.origins(raw).tolist():
        for first, end, size in zip(origin, extent, crop, strict=True):
            assert 0 <= first <= max(0, end - size), "it stays on real data"


def test_every_placement_that_holds_the_voxel_is_drawn_about_equally_often() -> None:
    size = 3000
    labels = torch.zeros(size, 9, 12, dtype=torch.int16)
    labels[:, 1, 6] = 1
    origins = maker((4, 3), ALWAYS).origins(raw_of(torch.zeros(size, 1, 9, 12), labels=labels))
    assert set(origins[:, 0].tolist()) == {0, 1}
    assert set(origins[:, 1].tolist()) == {4, 5, 6}
    found = torch.bincount(origins[:, 0] * 3 + origins[:, 1] - 4).double()
    assert float(((found - size / 6) ** 2 / (size / 6)).sum()) < 20.5, "chi-square with 5 degrees of freedom, 1 in 1000"


def test_the_classes_of_a_tile_are_equally_likely_then_their_voxels() -> None:
    size = 3000
    labels = torch.zeros(size, 20, dtype=torch.int16)
    labels[:, 2:8], labels[:, 15] = 1, 2
    voxel, found = ALWAYS.voxels((names(size), 3), labels, torch.zeros(size, 20, dtype=torch.uint8), BAD, None, torch.full((size, 1), 20))
    assert found.all()
    counts = torch.bincount(voxel[:, 0], minlength=20).double()
    assert set(counts.nonzero()[:, 0].tolist()) == {2, 3, 4, 5, 6, 7, 15}
    wanted = torch.tensor([size / 12] * 6 + [size / 2])
    assert float(((counts[[2, 3, 4, 5, 6, 7, 15]] - wanted) ** 2 / wanted).sum()) < 22.5, "6 degrees of freedom, 1 in 1000"


def test_the_share_is_kept_and_the_rest_is_bit_for_bit_what_it_was() -> None:
    labels = torch.zeros(2000, 40, dtype=torch.int16)
    labels[:, 33] = 1
    raw = raw_of(torch.randn(2000, 1, 40, generator=generator(0)), labels=labels)
    whole, third, none = (maker((4,), part).origins(raw)[:, 0] for part in (ALWAYS, Foreground(0.3, (1, 2)), None))
    moved = third != none
    assert torch.equal(third[moved], whole[moved])
    placed = (third == whole) & ((third - 30).abs() <= 3)
    assert abs(float(placed.double().mean()) - 0.3) < 0.07
    assert torch.equal(maker((4,), Foreground(0.0, (1, 2))).origins(raw)[:, 0], none)
    assert torch.equal(maker((4,), ALWAYS).plain.origins(raw), maker((4,), None).plain.origins(raw)), "evaluation has nothing drawn"


@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_crop_depends_on_its_sample_and_tile_alone(order: list[int], size: int) -> None:
    raw, make = sparse((15, 19), 6, 0.03), maker((4, 6), Foreground(0.6, (1, 2)))
    chosen = torch.tensor(order[:size])
    sample = Sample(*(part[chosen] for part in (raw.sample.epoch, raw.sample.tile, raw.sample.repeat)))
    few = {name: getattr(raw, name)[chosen] for name in ("present", "scale", "offset", "extent")}
    shared = replace(raw, **few, sample=sample, place=chosen)
    alone = replace(raw, **few, sample=sample, pixels=raw.pixels[chosen], quality=raw.quality[chosen], labels=raw.labels[chosen])
    whole = make(raw, CPU)
    for part in (shared, alone):
        assert torch.equal(make(part, CPU).pixels, whole.pixels[chosen])
        assert torch.equal(make(part, CPU).labels, whole.labels[chosen])


def test_measurements_stay_whole_and_what_no_such_crop_reaches_is_not_chosen() -> None:
    labels = torch.zeros(200, 13, 12, dtype=torch.int16)
    labels[:, 12], labels[::2, 7, 5] = 1, 2
    make = maker((6, 6), ALWAYS, footprint=6)
    raw = raw_of(torch.zeros(200, 1, 13, 12), labels=labels)
    origins = make.origins(raw)
    assert not (origins % 6).any()
    assert set(map(tuple, origins[::2].tolist())) == {(6, 0)}
    assert torch.equal(origins[1::2], maker((6, 6), None, footprint=6).origins(raw)[1::2]), "the last row fits into no crop"


def test_a_voxel_without_value_is_no_foreground() -> None:
    labels, quality = torch.zeros(50, 30, dtype=torch.int16), torch.zeros(50, 30, dtype=torch.uint8)
    labels[:, 3], labels[:, 20] = 1, 1
    quality[:, 3], quality[:, 20] = BAD, 1
    origins = maker((2,), ALWAYS).origins(raw_of(torch.zeros(50, 1, 30), quality, labels))
    assert set(origins[:, 0].tolist()) == {19, 20}


def test_tiles_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tiles have none; leave out augment\.foreground_fraction"):
        maker((4,), ALWAYS)(raw_of(torch.zeros(2, 1, 9)), CPU)
