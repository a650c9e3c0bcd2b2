"""What is shown and what is predicted divide a scene, whatever is computed together, in the units of the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mae_core.augment import Batch
from mae_core.context import only_spacing
from mae_core.decoders import DecoderSettings
from mae_core.evaluate import Seen, make_panel
from mae_core.export import Description
from mae_core.labelling import Source
from mae_core.mae import MaskedAutoencoder, ModelSettings, tokens_valid
from mae_core.masking import BlockHiding, RandomHiding, hide
from mae_core.reconstruction import Reconstruction, Reconstructor
from mae_core.targets import NormalisedPixelTarget, PixelTarget
from mae_core.tiling import Window
from mae_core.vit import EncoderSettings
from tests.synthetic_batches import one_thread

__all__ = ["one_thread"]

CHANNELS = ("red", "nir")
SPACE = (37, 50)


def reconstructor(target: PixelTarget | NormalisedPixelTarget | None = None, **change: object) -> Reconstructor:
    encoder = EncoderSettings(preset="nano", patch=(4, 4), mlp_ratio=1)
    settings = ModelSettings(encoder=encoder, decoder=DecoderSettings(width=16, depth=1, heads=2), target=target or PixelTarget())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MaskedAutoencoder(settings, CHANNELS).eval()
    about = Description(
        kind="encoder",
        modality="raster",
        channels=CHANNELS,
        mean=(0.2, 0.4),
        std=(0.1, 0.2),
        no_value=1,
        crop=(16, 16),
        spacing=(1.0, 1.0),
        spacing_unit="m",
        encoder=encoder,
        reader={},
        lineage={},
    )
    return replace(Reconstructor(model, about, RandomHiding(mask_ratio=0.5)), **change)  # type: ignore[arg-type]


def scene() -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Two channels of ten-thousandths in the order nir, unknown, red, with a hole and a cloud that counts nowhere but has a value."""
    pixels = np.random.default_rng(0).integers(1, 9000, (3, *SPACE)).astype(np.uint16)
    quality = np.zeros(SPACE, np.uint8)
    quality[3:9, 5:30], quality[20:24, 20:24] = 1, 128
    return pixels, quality


def source(pixels: NDArray[np.uint16], quality: NDArray[np.uint8]) -> Source:
    def read(window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        return pixels[(slice(None), *window)], quality[window]

    scale, offset = (1e-4, 1.0, 1e-4), (-0.1, 0.0, -0.1)
    return Source(read, SPACE, (1, 1), 2, ("nir", "other", "red"), scale, offset, only_spacing(torch.ones(1, 2)))


def whole(made: Reconstructor, given: Source, strips: tuple[slice, ...] = (slice(0, 50),), name: str = "a") -> Reconstruction:
    out = [np.full((3, *SPACE), 7, np.float32) for _ in range(3)]
    for strip in strips:
        for part in made.windows(given, name, strip):
            for array, found in zip(out, (part.original, part.shown, part.predicted), strict=True):
                assert (array[(slice(None), *part.window)] == 7).all(), "nothing is given twice"
                array[(slice(None), *part.window)] = found
    return Reconstruction((slice(0, 37), slice(0, 50)), *out)


def test_shown_and_predicted_divide_what_has_a_value() -> None:
    pixels, quality = scene()
    found = whole(reconstructor(), source(pixels, quality))
    np.testing.assert_array_equal(found.original, np.where(quality == 1, np.nan, pixels))
    assert np.isnan(found.shown[1]).all()
    assert np.isnan(found.predicted[1]).all(), "the model does not know that channel"
    for channel in (0, 2):
        shown, predicted = np.isfinite(found.shown[channel]), np.isfinite(found.predicted[channel])
        assert not (shown & predicted).any()
        np.testing.assert_array_equal(found.shown[channel][shown], pixels[channel][shown])
        left = np.isfinite(found.original[channel]) & ~shown & ~predicted
        assert left.mean() < 0.05, "only patches that mostly count nowhere are neither"
        assert 0.4 < predicted.sum() / (shown | predicted).sum() < 0.6
        tokens = shown[:36, :48].reshape(9, 4, 12, 4)
        full = (quality[:36, :48].reshape(9, 4, 12, 4) == 0).all(axis=(1, 3))
        assert (tokens.all(axis=(1, 3)) | ~tokens.any(axis=(1, 3)))[full].all(), "a patch is shown whole or not at all"


@pytest.mark.parametrize("target", [PixelTarget(), NormalisedPixelTarget(), NormalisedPixelTarget(over="channel")])
@torch.inference_mode()
def test_a_crop_is_the_panel_that_training_shows_brought_to_stored_units(target: PixelTarget | NormalisedPixelTarget) -> None:
    made = reconstructor(target)
    pixels, quality = scene()
    quality[16:32, 16:32] = 0
    given = source(pixels, quality)
    found = whole(made, given)
    window = (slice(16, 32), slice(16, 32))
    ours = [array[(slice(None), *window)] for array in (found.shown, found.predicted)]
    fed = np.stack([(pixels[[2, 0]][(slice(None), *window)].astype(float) * 1e-4 - 0.1 - [[[0.2]], [[0.4]]]) / [[[0.1]], [[0.2]]]])
    sample = made._sample(given, "a", [window])
    batch = Batch(
        torch.from_numpy(fed[0][None]).float(),
        torch.zeros(1, 16, 16, dtype=torch.uint8),
        None,
        torch.ones(1, 2, dtype=torch.bool),
        sample,
        only_spacing(torch.ones(1, 2)),
    )
    layout = made.model.encoder.layout((16, 16))
    plan = hide(tokens_valid(layout, batch.counted, batch.present, 0.5), layout.full_grid, made.hiding, made.seed, sample)
    output = made.model(batch.pixels, batch.counted, batch.present, plan, batch.context)
    panel = make_panel(0, batch, made.model, output, Seen(CHANNELS, made.description.mean, made.description.std, ("row", "column")))
    seen = np.isfinite(panel.shown)
    for column, number in ((2, 0), (0, 1)):
        np.testing.assert_array_equal(np.isfinite(ours[0][column]), seen[number])
        mean, std = made.description.mean[number], made.description.std[number]
        stored = (np.asarray(panel.filled[number], float) * std + mean + 0.1) / 1e-4
        np.testing.assert_allclose(ours[1][column][~seen[number]], stored[~seen[number]], rtol=1e-4, atol=0.5)


def test_what_is_hidden_hangs_on_seed_and_name_alone() -> None:
    given = source(*scene())
    first = whole(reconstructor(), given)
    for same in (
        whole(reconstructor(batch_size=1), given),
        whole(reconstructor(batch_size=5), given, (slice(0, 16), slice(16, 48), slice(48, 50))),
    ):
        np.testing.assert_array_equal(same.shown, first.shown)
        np.testing.assert_allclose(same.predicted, first.predicted, rtol=1e-4, atol=0.1)
    for other in (whole(reconstructor(seed=5), given), whole(reconstructor(), given, name="b")):
        assert (np.isnan(other.shown) != np.isnan(first.shown)).any()
    more = whole(reconstructor(hiding=BlockHiding(mask_ratio=0.9)), given)
    assert np.isfinite(more.shown[0]).sum() < 0.3 * np.isfinite(first.shown[0]).sum()


def test_what_is_hidden_does_not_change_what_is_predicted() -> None:
    """With the pixels as target nothing of a hidden patch may reach its prediction."""
    pixels, quality = scene()
    first = whole(reconstructor(PixelTarget()), source(pixels, quality))
    hidden = np.isfinite(first.predicted)
    changed = np.where(hidden, 5, pixels).astype(np.uint16)
    changed[1] = pixels[1]
    again = whole(reconstructor(PixelTarget()), source(changed, quality))
    np.testing.assert_array_equal(again.predicted, first.predicted)
    np.testing.assert_array_equal(again.shown, first.shown)
