"""The perceptual term sees hidden voxels alone, leaves the encoder as it was and stands in no list of weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from mae_core.nd import patchify, token_grid
from mae_core.perceptual import PerceptualTerm
from mae_core.vit import Encoder, EncoderSettings
from tests.synthetic_batches import CASES, CHANNELS, by_axes, generator, one_thread

__all__ = ["one_thread"]

each_case = pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)

Space = tuple[int, ...]


def encoder_of(patch: Space) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(EncoderSettings(preset="nano", patch=patch, mlp_ratio=1), CHANNELS)


def crops(space: Space) -> tuple[Tensor, Tensor, Tensor]:
    """Truth, prediction, and hidden voxels: some of the first sample and none of the second."""
    pixels, predicted = (torch.randn(2, len(CHANNELS), *space, generator=generator(seed)) for seed in (0, 1))
    hidden = torch.rand(2, *space, generator=generator(2)) < 0.4
    hidden[1] = False
    return pixels, predicted, hidden


@each_case
@torch.no_grad()
def test_the_sum_is_the_naive_loop(space: Space, patch: Space) -> None:
    encoder = encoder_of(patch)
    pixels, predicted, hidden = crops(space)
    total, count = PerceptualTerm(encoder)(pixels, predicted, hidden)
    both = torch.stack([pixels[0], torch.where(hidden[0], predicted[0], pixels[0])])
    grid = token_grid(space, patch)
    ids = torch.arange(math.prod(grid)).expand(2, -1)
    features = encoder.layers(patchify(both, patch), ids, grid)[-1][:, -math.prod(grid) :].double()
    wanted = 0.0
    for true, made in zip(*features, strict=True):
        shown = [(row - row.mean()) / (row.var(correction=0) + 1e-6).sqrt() for row in (true, made)]
        wanted += float((shown[0] - shown[1]).square().mean())
    assert float(total[0]) == pytest.approx(wanted, rel=1e-4)
    assert wanted > 0.01
    assert count.tolist() == [math.prod(grid), 0]
    assert float(total[1]) == 0


@each_case
def test_a_prediction_that_is_true_costs_nothing(space: Space, patch: Space) -> None:
    pixels, _, hidden = crops(space)
    total, count = PerceptualTerm(encoder_of(patch))(pixels, pixels.clone(), hidden)
    assert not total.any()
    assert count[0] > 0


@each_case
def test_only_hidden_voxels_of_the_prediction_count_and_have_a_gradient(space: Space, patch: Space) -> None:
    term = PerceptualTerm(encoder_of(patch))
    pixels, predicted, hidden = crops(space)
    shown = ~hidden[:, None]
    results = []
    for given in (predicted, torch.where(shown, torch.nan, predicted)):
        leaf = given.clone().requires_grad_()
        total, _ = term(pixels, leaf, hidden)
        total.sum().backward()
        assert leaf.grad is not None
        assert not leaf.grad[shown.expand_as(leaf)].any()
        assert leaf.grad[hidden[:, None].expand_as(leaf)].all()
        results.append((total.detach(), leaf.grad))
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True)), "bit for bit"


def test_the_encoder_that_was_given_goes_on_training_and_the_copy_does_not() -> None:
    encoder = encoder_of((4, 4))
    term = PerceptualTerm(encoder)
    before = copy.deepcopy(encoder.state_dict())
    term.train()
    assert encoder.training
    assert all(weight.requires_grad for weight in encoder.parameters())
    frozen = term.encoder
    assert isinstance(frozen, nn.Module)
    assert not any(module.training for module in frozen.modules())
    pixels, predicted, hidden = crops((8, 8))
    term(pixels, predicted.requires_grad_(), hidden)[0].sum().backward()
    assert all(weight.grad is None for weight in (*frozen.parameters(), *encoder.parameters()))
    assert all(torch.equal(weight, before[name]) for name, weight in frozen.state_dict().items())
    with torch.no_grad():
        encoder.class_token.add_(1)
    assert torch.equal(frozen.state_dict()["class_token"], before["class_token"])


def test_nothing_of_it_stands_in_the_model_and_it_moves_with_it() -> None:
    model = nn.ModuleDict({"term": PerceptualTerm(encoder_of((4, 4))), "head": nn.Linear(2, 2)})
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == ["head.weight", "head.bias"]
    term = model.double()["term"]
    assert isinstance(term, PerceptualTerm)
    frozen = term.encoder
    assert isinstance(frozen, nn.Module)
    assert {weight.dtype for weight in frozen.parameters()} == {torch.float64}


def test_tokens_that_are_not_used_are_neither_seen_nor_counted() -> None:
    term = PerceptualTerm(encoder_of((4, 4)))
    pixels, predicted, hidden = crops((8, 8))
    used = torch.tensor([[True, True, False, True], [True] * 4])
    total, count = term(pixels, predicted, hidden, used)
    assert count.tolist() == [3, 0]
    there = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    there[0, :, 4:, :4] = False
    again, _ = term(torch.where(there, pixels, 3.0), torch.where(there, predicted, 5.0), hidden, used)
    torch.testing.assert_close(again, total)


def test_named_channels_are_handed_on() -> None:
    term = PerceptualTerm(encoder_of((4, 4)))
    pixels, predicted, hidden = crops((8, 8))
    order = [2, 0, 1]
    mixed, _ = term(pixels[:, order], predicted[:, order], hidden, None, [CHANNELS[index] for index in order])
    torch.testing.assert_close(mixed, term(pixels, predicted, hidden)[0])


class Prefixed(nn.Module):
    """Three tokens of another kind before those of the patches, which are the patches themselves."""

    num_prefix = 3

    def __init__(self) -> None:
        super().__init__()
        self.settings = EncoderSettings(patch=(4,))

    def layers(
        self, patches: Tensor, ids: Tensor, grid: tuple[int, ...], used: Tensor | None = None, channels: list[str] | None = None
    ) -> list[Tensor]:
        tokens = patches.flatten(2)
        return [torch.zeros(0), torch.cat([tokens.sum() * torch.randn(len(tokens), 3, tokens.shape[2]), tokens], dim=1)]


def test_as_many_tokens_before_the_patches_as_the_encoder_says() -> None:
    pixels, predicted, hidden = crops((24,))
    hidden[0, 4:] = False
    hidden[0, :4] = True
    total, count = PerceptualTerm(Prefixed())(pixels, predicted, hidden)
    rows = [patchify(part, (4,))[0, 0].flatten() for part in (pixels, predicted)]
    shown = [(row - row.mean()) / (row.var(correction=0) + 1e-6).sqrt() for row in rows]
    assert float(total[0]) == pytest.approx(float((shown[0] - shown[1]).square().mean()), rel=1e-4)
    assert count.tolist() == [6, 0]
