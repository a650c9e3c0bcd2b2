"""Arithmetic of a step: worked numbers of the reference, torch's own counter, and how it grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_core.decoders import CrossDecoderSettings, DecoderSettings
from mae_core.flops import Product, counted_flops, forward_flops, largest_linears, products, training_flops, unfused_bytes
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.masking import RandomHiding, hide
from mae_core.vit import EncoderSettings
from tests.synthetic_batches import CASES, batch_of, by_axes, generator, grids, names, one_thread

__all__ = ["one_thread"]

RATIO = 0.75
SELF = DecoderSettings(width=32, depth=2, heads=2)
CROSS = CrossDecoderSettings(width=32, depth=2, heads=2, predicted_fraction=0.5)


def meta_model(settings: ModelSettings, channels: int) -> MaskedAutoencoder:
    """A model without numbers in it."""
    with torch.device("meta"):
        return MaskedAutoencoder(settings, [f"c{number}" for number in range(channels)])


def base_model(patch: tuple[int, ...], channels: int, decoder: Any) -> MaskedAutoencoder:
    return meta_model(ModelSettings(encoder=EncoderSettings(preset="base", patch=patch), decoder=decoder), channels)


def counted(model: MaskedAutoencoder, space: tuple[int, ...], size: int) -> int:
    """What torch's counter sees in a training step of a batch."""
    batch = batch_of(space, size, len(model.encoder.channels))
    grid = model.encoder.layout(space).full_grid
    valid = torch.ones(size, torch.Size(grid).numel(), dtype=torch.bool)
    plan = hide(valid, grid, RandomHiding(mask_ratio=RATIO), 0, names(size))

    def loss() -> torch.Tensor:
        output = model(batch.pixels, batch.counted, batch.present, plan)
        return output.error_sum.sum()  # type: ignore[no-any-return]

    return counted_flops(loss)


@pytest.mark.parametrize(
    ("space", "channels", "gmac", "gflop"),
    [
        ((224, 224), 3, (0.12, 4.29, 5.28, 0.08), 58.5),
        ((224, 224), 12, (0.46, 4.29, 5.28, 0.31), 61.2),
        ((256, 256), 12, (0.60, 5.60, 7.01, 0.40), 80.6),
        ((96, 96, 96), 1, (0.68, 4.73, 5.85, 0.46), 69.0),
        ((128, 128, 128), 1, (1.61, 11.26, 15.07, 1.08), 171.2),
        ((160, 160, 160), 1, (3.15, 22.48, 33.40, 2.10), 361.0),
    ],
)
def test_worked_numbers(space: Any, channels: int, gmac: tuple[float, ...], gflop: float) -> None:
    """ViT-B and a decoder of 8 × 512, worked out by hand for models that embed every token and have their head on every token."""
    found = products(base_model((16,) * len(space), channels, DecoderSettings()), space, RATIO)
    parts = {part: sum(item.forward for item in found if item.part == part) / 2e9 for part in ("embed", "encoder", "decoder", "head")}
    tokens = torch.Size(size // 16 for size in space).numel()
    everywhere = {"embed": tokens / (tokens // 4), "head": (tokens + 1) / (tokens - tokens // 4)}
    whole = [value * everywhere.get(part, 1) for part, value in parts.items()]
    assert whole == [pytest.approx(value, abs=0.0051) for value in gmac]
    ours = gflop - 4 * (gmac[0] - parts["embed"]) - 6 * (gmac[3] - parts["head"])
    assert training_flops(found) / 1e9 == pytest.approx(ours, abs=0.1)


@pytest.mark.parametrize(
    ("space", "channels", "fraction", "gflop"),
    [((224, 224), 12, 1, 47.8), ((224, 224), 12, 1 / 3, 34.3), ((96, 96, 96), 1, 1, 53.4), ((128, 128, 128), 1, 1 / 3, 91.3)],
)
def test_worked_numbers_of_cross_attention(space: Any, channels: int, fraction: float, gflop: float) -> None:
    """A third of the hidden tokens is a quarter of all, at which the authors of the decoder predict."""
    found = products(base_model((16,) * len(space), channels, CrossDecoderSettings(predicted_fraction=fraction)), space, RATIO)
    assert training_flops(found) / 1e9 == pytest.approx(gflop, abs=0.06)


@pytest.mark.parametrize("decoder", [SELF, CROSS], ids=lambda decoder: decoder.kind)
@pytest.mark.parametrize("case", CASES, ids=by_axes)
def test_equals_the_counter_of_torch(case: Any, decoder: Any) -> None:
    space, patch = case
    encoder = EncoderSettings(preset="nano", patch=patch, mlp_ratio=3)
    model = MaskedAutoencoder(ModelSettings(encoder=encoder, decoder=decoder), ["red", "green", "blue"])
    assert 2 * training_flops(products(model, space, RATIO)) == pytest.approx(counted(model, space, 2), rel=0.01)


@pytest.mark.parametrize("more", [{"class_token": False}, {"num_registers": 3}, {"groups": "each"}, {"patch": (6, 5), "stride": (4, 3)}])
def test_equals_the_counter_in_other_shapes(more: dict[str, Any]) -> None:
    encoder = EncoderSettings(**({"preset": "nano", "patch": (4, 3)} | more))
    model = MaskedAutoencoder(ModelSettings(encoder=encoder, decoder=SELF), ["red", "green"])
    assert 2 * training_flops(products(model, (12, 15), RATIO)) == pytest.approx(counted(model, (12, 15), 2), rel=0.01)


def test_recomputed_blocks_do_not_count() -> None:
    plain, twice = (
        meta_model(ModelSettings(encoder=EncoderSettings(preset="nano", patch=(4, 4), recompute=recompute)), 2)
        for recompute in (False, True)
    )
    assert products(plain, (16, 16), RATIO) == products(twice, (16, 16), RATIO)


@given(grids(max_grid=6), st.floats(0.05, 0.9), st.integers(1, 4))
def test_the_closed_formula_on_any_number_of_axes(shape: tuple[tuple[int, ...], tuple[int, ...]], ratio: float, channels: int) -> None:
    """Blocks of n tokens: n (4 + 2r) d² + 2 n² d multiply-adds; the embedding counts twice in training, the rest three times."""
    grid, patch = shape
    space = tuple(size * part for size, part in zip(grid, patch, strict=True))
    model = meta_model(ModelSettings(encoder=EncoderSettings(preset="nano", patch=patch), decoder=SELF), channels)
    found = products(model, space, ratio)
    tokens, voxels = torch.Size(grid).numel(), torch.Size(patch).numel() * channels
    kept = next(product.rows for product in found if product.part == "embed")
    hidden = next(product.rows for product in found if product.part == "head")
    assert kept + hidden == tokens

    def block(length: int, width: int) -> int:
        return length * 12 * width**2 + 2 * length**2 * width

    embed = kept * voxels * 128
    rest = 4 * block(kept + 1, 128) + (kept + 1) * 128 * 32 + 2 * block(tokens + 1, 32) + hidden * 32 * voxels
    assert forward_flops(found) == 2 * (embed + rest)
    assert training_flops(found) == 2 * (2 * embed + 3 * rest)


def test_the_largest_linear_layers_of_a_batch() -> None:
    found = [
        Product("embed.patches", 10, 20, 30),
        Product("encoder.mlp_in", 10, 40, 80, 4),
        Product("encoder.scores", 1000, 1000, 1000, is_linear=False),
        Product("encoder.twin", 10, 40, 80),
        Product("head.linear", 5, 5, 5),
    ]
    assert largest_linears(found, 3, 2) == {"encoder.mlp_in": (30, 40, 80), "embed.patches": (30, 20, 30)}
    assert len(largest_linears(found, 3, 9)) == 3


def test_bytes_outside_the_products_grow_with_tokens_blocks_and_their_size() -> None:
    model = base_model((16, 16), 3, DecoderSettings())
    found = products(model, (224, 224), RATIO)
    tokens_by_width = 12 * 50 * 768 + 8 * 197 * 512
    assert unfused_bytes(found, 2) == 120 * tokens_by_width
    assert unfused_bytes(found, 4) == 2 * unfused_bytes(found, 2)


def test_the_counter_sees_a_product_and_its_gradients() -> None:
    left, right = (torch.randn(shape, generator=generator(0), requires_grad=True) for shape in ((3, 5), (5, 7)))

    def loss() -> torch.Tensor:
        return (left @ right).sum()

    assert counted_flops(loss) == 3 * 2 * 3 * 5 * 7
