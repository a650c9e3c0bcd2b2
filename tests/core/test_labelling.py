"""A scene is labelled in bands: any strips, batches and starts give the numbers of the whole, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mae_core.context import only_spacing
from mae_core.export import Description
from mae_core.heads import HeadSettings, Segmenter
from mae_core.labelling import MIN_ROWS, Band, Labeller, Source, read_rows
from mae_core.segmentation import probabilities
from mae_core.tiling import Window
from mae_core.vit import Encoder, EncoderSettings
from tests.core.test_segmentation import oracle, segmenter
from tests.synthetic_batches import CHANNELS, one_thread

__all__ = ["one_thread"]


def description(crop: tuple[int, ...] = (8, 12)) -> Description:
    return Description(
        kind="segmenter",
        modality="raster",
        channels=CHANNELS,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        no_value=1,
        crop=crop,
        spacing=(1.0, 1.0),
        spacing_unit="m",
        encoder=EncoderSettings(preset="nano", patch=(4, 4), mlp_ratio=1),
        classes=((0, "low"), (1, "high")),
        reader={},
        lineage={},
    )


def source(
    pixels: NDArray[np.generic],
    quality: NDArray[np.uint8],
    channels: Sequence[str] = CHANNELS,
    gains: tuple[Sequence[float], Sequence[float]] | None = None,
    block: tuple[int, ...] = (1, 1),
) -> Source:
    scale, offset = gains or ([1.0] * len(channels), [0.0] * len(channels))

    def read(window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        return pixels[(slice(None), *window)], quality[window]

    context = only_spacing(torch.ones(1, quality.ndim))
    return Source(read, quality.shape, block, pixels.itemsize, tuple(channels), tuple(scale), tuple(offset), context)


def joined(bands: list[Band], space: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    labels, chance = np.full(space, -1), np.full((2, *space), -1, np.float32)
    for band in bands:
        assert (labels[band.window] == -1).all(), "nothing is given twice"
        labels[band.window], chance[(slice(None), *band.window)] = band.labels, band.probabilities
    return labels, chance


@pytest.mark.parametrize("space", [(30, 41), (5, 40), (40, 7), (3, 5), (8, 12), (130, 25)])
@pytest.mark.parametrize(("batch_size", "width"), [(1, 100), (5, 100), (3, 9)])
@torch.inference_mode()
def test_bands_are_the_probabilities_of_the_whole_scene(space: tuple[int, int], batch_size: int, width: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, *space)).astype(np.float32)
    quality = (rng.random(space) < 0.1).astype(np.uint8)
    model = segmenter().eval()
    known = quality == 0
    whole = probabilities(model, (8, 12), 0.5, torch.from_numpy(np.where(known, pixels, 0)), torch.from_numpy(known)).numpy()
    labeller = Labeller(model, description(), 0.5, 255, batch_size)
    scene = source(pixels, quality, block=(16, 16))
    parts = [slice(start, min(start + width, space[1])) for start in range(0, space[1], width)]
    labels, chance = joined([band for part in parts for band in labeller.bands(scene, part)], space)
    np.testing.assert_array_equal(labels, np.where(known, whole.argmax(axis=0), 255))
    np.testing.assert_allclose(chance, np.where(known, whole, np.nan), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(labeller.label(scene), labels)
    later = list(labeller.bands(scene, parts[-1], space[0] // 2))
    assert later[0].window[0].start == space[0] // 2
    for band in later:
        np.testing.assert_array_equal(band.labels, labels[band.window])
        np.testing.assert_array_equal(np.isnan(band.probabilities), np.isnan(chance[(slice(None), *band.window)]))


@pytest.mark.parametrize("block", [1, 16, 100, 512])
def test_every_row_is_read_once_and_whole_blocks_at_a_time(block: int) -> None:
    space = (600, 20)
    scene = source(np.zeros((3, *space), np.uint16), np.zeros(space, np.uint8), block=(min(block, 600), 20))
    seen: list[Window] = []

    def read(window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        seen.append(window)
        return scene.read(window)

    counted = Source(read, *(getattr(scene, name) for name in list(Source.__dataclass_fields__)[1:]))
    list(Labeller(oracle(), description(), 0.5, 255, 8).bands(counted, slice(0, 20)))
    edges = [0, *(window[0].stop for window in seen)]
    assert [window[0].start for window in seen] == edges[:-1], "one after another"
    assert edges[-1] == 600
    assert all(edge % read_rows(scene) == 0 for edge in edges[:-1])
    assert read_rows(scene) % block == 0
    assert read_rows(scene) >= MIN_ROWS


def test_a_source_that_is_one_huge_block_is_read_by_fewer_rows() -> None:
    whole = source(np.zeros((3, 2, 2), np.uint16), np.zeros((2, 2), np.uint8))
    huge = Source(whole.read, (10980, 10980), (10980, 10980), 2, whole.channels, whole.scale, whole.offset, whole.context)
    assert MIN_ROWS <= read_rows(huge) <= 2**28 / (10980 * 3 * 2)
    about = description((256, 256))
    parts = Labeller(segmenter(), about, 0.5, 255).strips(huge, 1 << 28, 512)
    assert len(parts) > 1
    assert parts[0].stop % 512 == 0
    assert Labeller(segmenter(), about, 0.5, 255).strips(huge, 1 << 31, 512) == [slice(0, 10980)]


def test_a_crop_without_value_is_not_given_to_the_model() -> None:
    quality = np.ones((40, 40), np.uint8)
    quality[:6, :6] = 0
    model, sizes = oracle(), []
    plain = model.forward

    def forward(pixels: torch.Tensor, has_value: torch.Tensor, context: object = None, present: object = None) -> torch.Tensor:
        sizes.append(len(pixels))
        assert has_value.flatten(1).any(dim=1).all()
        return plain(pixels, has_value)

    model.forward = forward  # type: ignore[method-assign,assignment]
    labels = Labeller(model, description(), 0.0, 255, 4).label(source(np.ones((3, 40, 40), np.float32), quality))
    assert sizes == [1]
    np.testing.assert_array_equal(labels, np.where(quality, 255, 1))


def scene_of(space: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Stored uint16 in the order blue, red, with a hole of no value and a cloud."""
    stored = np.random.default_rng(0).integers(0, 65536, (2, *space)).astype(np.uint16)
    quality = np.zeros(space, np.uint8)
    quality[:3, :4], quality[10:, 10:] = 1, 2
    return stored, quality


def test_a_scene_gets_class_numbers_in_stored_units_and_channels_by_name() -> None:
    stored, quality = scene_of((19, 23))
    about = description().model_copy(update={"mean": (-5000.0, 0.0, 0.0), "std": (10.0, 1.0, 1.0), "classes": ((7, "low"), (3, "high"))})
    labeller = Labeller(oracle(), about, 0.5, 255)
    labels = labeller.label(source(stored, quality, ["blue", "red"], ([9.0, 0.5], [0.0, -25000.0])))
    assert labels.dtype == np.uint8
    high = stored[1].astype(float) * 0.5 - 25000 > -5000
    assert 0.2 < high.mean() < 0.8
    assert np.array_equal(labels, np.where(quality & 1, 255, np.where(high, 3, 7)))


@pytest.mark.parametrize("rubbish", [np.nan, 1e30])
def test_what_has_no_value_changes_no_label(rubbish: float) -> None:
    pixels = np.random.default_rng(0).normal(size=(3, 12, 14)).astype(np.float32)
    quality = (np.random.default_rng(1).random((12, 14)) < 0.2).astype(np.uint8)
    labeller = Labeller(segmenter().eval(), description(), 0.5, 255)
    found = []
    for fill in (0, rubbish):
        filled = np.where(quality, np.float32(fill), pixels)
        found.append(labeller.label(source(filled, quality)))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0] == 255, quality == 1)


@torch.inference_mode()
def test_a_scene_that_ends_within_a_measurement_is_labelled_whole() -> None:
    encoder = EncoderSettings(preset="nano", patch=(6, 6), mlp_ratio=1, footprints={CHANNELS[1]: 3})
    model = Segmenter(Encoder(encoder, CHANNELS), HeadSettings(features=4), 2).eval()
    about = description((12, 12)).model_copy(update={"encoder": encoder})
    for space in ((31, 40), (12, 13), (5, 30)):
        pixels = np.random.default_rng(1).normal(size=(3, *space)).astype(np.float32)
        labels = Labeller(model, about, 0.5, 255, 3).label(source(pixels, np.zeros(space, np.uint8)))
        assert labels.shape == space
        assert set(np.unique(labels)) <= {0, 1}
