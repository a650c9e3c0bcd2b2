"""The head brings any patch back to full resolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mae_core.heads import HeadSettings, Segmenter, UnetrHead
from mae_core.nd import patchify
from mae_core.vit import Encoder, EncoderSettings
from tests.contracts import SegmenterContract
from tests.synthetic_batches import generator, one_thread, places

__all__ = ["one_thread"]


def segmenter(patch: tuple[int, ...], channels: int = 3, classes: int = 4) -> Segmenter:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        encoder = Encoder(EncoderSettings(preset="nano", patch=patch, mlp_ratio=1), [f"c{number}" for number in range(channels)])
        return Segmenter(encoder, HeadSettings(features=4), classes).eval()


class NanoContract(SegmenterContract):
    def build(self) -> nn.Module:
        return segmenter(self.patch)


class TestSegmenterOneAxis(NanoContract):
    space, patch = (24,), (4,)


class TestSegmenterTwoAxes(NanoContract):
    space, patch = (12, 24), (4, 6)


class TestSegmenterThreeAxes(NanoContract):
    space, patch = (4, 8, 8), (2, 4, 4)


@pytest.mark.parametrize("patch", [(8, 8), (4, 8, 8), (12, 12), (5,), (5, 5), (16, 16), (1, 1), (2, 1, 3), (7, 4)])
@torch.no_grad()
def test_scores_have_the_size_of_the_crop(patch: tuple[int, ...]) -> None:
    space = tuple(2 * size for size in patch)
    model = segmenter(patch)
    scores = model(torch.randn(1, 3, *space), torch.ones(1, *space, dtype=torch.bool))
    assert scores.shape == (1, 4, *space)
    assert scores.isfinite().all()
    assert len(model.taps) == len(model.head.factors)
    assert model.taps[-1] == model.encoder.settings.depth - 1
    assert list(model.taps) == sorted(model.taps)


def test_the_head_climbs_from_the_coarsest_stage_and_a_short_axis_rests_first() -> None:
    assert segmenter((4, 8, 8)).head.factors == [(1, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert segmenter((12,)).head.factors == [(2,), (2,), (3,)]


@torch.no_grad()
def test_features_lie_on_their_tokens_and_the_deepest_are_used_first() -> None:
    model = segmenter((8, 8))
    pixels = torch.randn(1, 3, 16, 24, generator=generator(0))
    seen: list[torch.Tensor] = []
    for part in (model.head.ups[0], *model.head.skips):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(pixels, torch.ones(1, 16, 24, dtype=torch.bool))
    patches = patchify(pixels, (8, 8))
    layers = model.encoder.layers(patches, torch.arange(6)[None], (2, 3))
    assert model.taps == (0, 1, 3)
    wanted = [layers[1], model.encoder.norm(layers[3]), layers[0]]
    for image, tokens in zip(seen, wanted, strict=True):
        for row, column in places((2, 3)):
            fresh = tokens[0, 1 + 3 * row + column] / (1 + 1e-5) ** 0.5  # what batch norm does before it has seen a batch
            torch.testing.assert_close(image[0, :, row, column], fresh)


@torch.no_grad()
def test_a_voxel_is_scored_where_it_lies() -> None:
    """A change of one corner's pixels changes that corner's scores most, on every axis the right way round."""
    model = segmenter((4, 4))
    pixels, known = torch.zeros(1, 3, 8, 16), torch.ones(1, 8, 16, dtype=torch.bool)
    before = model(pixels, known)
    for row, column in ((0, 0), (0, 15), (7, 0), (7, 15)):
        changed = pixels.clone()
        changed[0, :, row, column] = 20
        shift = (model(changed, known) - before).abs().sum(dim=1)[0]
        top = divmod(int(shift.argmax()), 16)
        assert (top[0] // 4, top[1] // 8) == (row // 4, column // 8)


def test_features_are_a_multiple_of_the_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        HeadSettings(features=10)


def test_what_all_tokens_share_does_not_drown_what_tells_them_apart() -> None:
    """A pretrained encoder's tokens may lie far from zero together; in training the head sees them centred and of unit size."""
    seen: list[torch.Tensor] = []
    head = UnetrHead((4, 4), 16, 1, 4, 2).train()
    for norm in head.norms:
        norm.register_forward_hook(lambda _module, _given, found: seen.append(found))
        norm(torch.randn(2, 16, 9) * 0.04 + 30.0)
    assert len(seen) == len(head.factors)
    for found in seen:
        assert found.mean().abs() < 1e-3
        assert 0.9 < found.std() < 1.1
