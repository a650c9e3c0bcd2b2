"""The encoder sees only what it is shown, names its channels, and embeds as a convolution would."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mae_core.nd import patchify, take, token_grid
from mae_core.positions import sincos_positions
from mae_core.vit import PRESETS, Attention, Block, ChannelEmbedding, Encoder, EncoderSettings
from tests.contracts import EncoderContract
from tests.synthetic_batches import CASES, CHANNELS, by_axes, generator, one_thread

__all__ = ["one_thread"]


class NanoContract(EncoderContract):
    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Encoder(EncoderSettings(preset="nano", patch=self.patch), self.channels).eval()


class TestEncoderOneAxis(NanoContract):
    space, patch = (36,), (4,)


class TestEncoderTwoAxes(NanoContract):
    space, patch = (12, 15), (4, 3)


class TestEncoderThreeAxes(NanoContract):
    space, patch = (4, 8, 6), (2, 4, 2)


@pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)
def test_the_embedding_is_a_convolution_with_stride(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    embed = ChannelEmbedding(CHANNELS, math.prod(patch), 16)
    nn.init.normal_(embed.bias)
    pixels = torch.randn(2, len(CHANNELS), *space, generator=generator(0))
    kernel = embed.weight.permute(2, 0, 1).reshape(16, len(CHANNELS), *patch)
    convolution = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(patch) - 1]
    wanted = convolution(pixels, kernel, embed.bias, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(patchify(pixels, patch)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)
def test_embedding_what_is_shown_is_embedding_all_and_choosing(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    embed = ChannelEmbedding(CHANNELS, math.prod(patch), 16)
    patches = patchify(torch.randn(2, len(CHANNELS), *space, generator=generator(0)), patch)
    ids = torch.stack([torch.randperm(patches.shape[1], generator=generator(seed))[:4] for seed in (1, 2)])
    torch.testing.assert_close(embed(take(patches, ids)), take(embed(patches), ids), rtol=0, atol=1e-6)


def test_each_channel_has_its_own_linear_map_in_the_sum() -> None:
    embed = ChannelEmbedding(CHANNELS, 6, 16)
    nn.init.normal_(embed.bias)
    patches = torch.randn(2, 5, 3, 6, generator=generator(0))
    by_hand = embed.bias + sum(patches[:, :, index] @ embed.weight[index] for index in range(3))
    torch.testing.assert_close(embed(patches), by_hand, rtol=0, atol=1e-6)
    some = embed(patches[:, :, [2, 0]], ["blue", "red"])
    torch.testing.assert_close(some, by_hand - patches[:, :, 1] @ embed.weight[1], rtol=0, atol=1e-6)


def test_a_channel_that_is_fed_in_part_learns_alone() -> None:
    embed = ChannelEmbedding(CHANNELS, 6, 16)
    embed(torch.ones(1, 1, 1, 6), ["green"]).sum().backward()
    assert embed.weight.grad is not None
    assert embed.weight.grad.flatten(1).any(dim=1).tolist() == [False, True, False]


def test_attention_is_the_written_formula() -> None:
    attention = Attention(12, 3)
    tokens = torch.randn(2, 5, 12, generator=generator(0))
    used = torch.tensor([[True] * 5, [True, False, True, True, False]])
    qkv = attention.qkv(tokens).reshape(2, 5, 3, 3, 4)
    wanted = torch.zeros(2, 5, 12)
    for sample in range(2):
        for head in range(3):
            query, key, value = (qkv[sample, :, part, head] for part in range(3))
            scores = (query @ key.T / 2).masked_fill(~used[sample], -math.inf)
            wanted[sample, :, head * 4 : head * 4 + 4] = scores.softmax(dim=1) @ value
    torch.testing.assert_close(attention(tokens, used), attention.out(wanted), rtol=0, atol=1e-6)
    torch.testing.assert_close(attention(tokens, None), attention(tokens, used | True), rtol=0, atol=1e-6)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 10 cannot be divided among 4 heads"):
        Block(10, 4, 2.0)


def test_layers_end_with_the_features_before_the_last_norm() -> None:
    encoder = Encoder(EncoderSettings(preset="nano", patch=(4,)), CHANNELS)
    patches = torch.randn(1, 3, 3, 4, generator=generator(0))
    ids = torch.tensor([[4, 0, 2]])
    layers = encoder.layers(patches, ids, (6,))
    assert len(layers) == encoder.settings.depth == PRESETS["nano"][1]
    assert torch.equal(encoder.norm(layers[-1]), encoder(patches, ids, (6,)))


def test_the_position_of_a_token_is_that_of_its_number() -> None:
    """With one block that does nothing, a token's output is its embedding plus the code of its place."""
    encoder = Encoder(EncoderSettings(preset="nano", patch=(4, 3)), CHANNELS)
    encoder.blocks = nn.ModuleList()
    grid = token_grid((12, 15), (4, 3))
    patches, ids = torch.randn(1, 3, 3, 12, generator=generator(0)), torch.tensor([[14, 0, 7]])
    encoder.blocks.append(_Nothing())
    (tokens,) = encoder.layers(patches, ids, grid)
    codes = sincos_positions(grid, encoder.settings.width)
    torch.testing.assert_close(tokens[0, 1:] - encoder.embed(patches)[0], codes[[14, 0, 7]], rtol=0, atol=1e-6)
    assert torch.equal(tokens[:, 0], encoder.class_token[0]), "the class token has no place"


class _Nothing(nn.Module):
    def forward(self, tokens: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
        assert used is None
        return tokens


@pytest.mark.parametrize("preset", ["base", "large", "huge"])
def test_the_papers_sizes(preset: str) -> None:
    """Parameters of ViT-B, -L and -H without patch embedding: 85.1, 302.3 and 630 million (Dosovitskiy et al. 2021)."""
    with torch.device("meta"):
        encoder = Encoder(EncoderSettings(preset=preset, patch=(16, 16)), CHANNELS)
    wanted = {"base": 85.1e6, "large": 302.3e6, "huge": 629.7e6}[preset]
    assert sum(weight.numel() for weight in encoder.blocks.parameters()) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("patch", [(), (0,), (4, 4, 4, 4)])
def test_a_patch_has_one_to_three_sizes(patch: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="patch"):
        EncoderSettings(patch=patch)
