"""The cross-attention decoder is its formula, and predicts each token as if it were the only one."""

from __future__ import annotations

import math

import pytest
import torch

from mae_core.decoders import CrossBlock, CrossDecoder, CrossDecoderSettings
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.masking import HidingPlan
from mae_core.vit import EncoderSettings
from tests.synthetic_batches import CASES, batch_of, by_axes, generator, model_of, one_thread, plan_of

__all__ = ["one_thread"]


def cross_model(patch: tuple[int, ...], fraction: float) -> MaskedAutoencoder:
    decoder = CrossDecoderSettings(width=32, depth=2, heads=2, predicted_fraction=fraction)
    return model_of(ModelSettings(encoder=EncoderSettings(preset="nano", patch=patch, mlp_ratio=2), decoder=decoder))


@pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)
@torch.no_grad()
def test_a_prediction_does_not_depend_on_which_others_are_made(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    some, every = cross_model(patch, 0.25), cross_model(patch, 1.0)
    batch = batch_of(space)
    plan = plan_of(batch, every.settings)
    few, all_of_them = (model(batch.pixels, batch.counted, batch.present, plan) for model in (some, every))
    number = few.predicted.shape[1]
    assert 0 < number == math.floor(plan.hidden.shape[1] * 0.25 + 0.5) < plan.hidden.shape[1]
    assert torch.equal(few.plan.hidden, plan.hidden[:, :number])
    torch.testing.assert_close(few.predicted, all_of_them.predicted[:, :number], rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_evaluation_predicts_every_hidden_token() -> None:
    model = cross_model((4,), 0.25).eval()
    batch = batch_of((48,))
    plan = plan_of(batch, model.settings)
    assert model(batch.pixels, batch.counted, batch.present, plan).plan is plan


@torch.no_grad()
def test_cross_attention_is_the_written_formula() -> None:
    block = CrossBlock(12, 3, 2.0)
    tokens, seen = torch.randn(2, 4, 12, generator=generator(0)), torch.randn(2, 5, 12, generator=generator(1))
    used = torch.tensor([[True] * 5, [True, False, True, True, False]])
    query = block.query(block.norm1(tokens)).reshape(2, 4, 3, 4)
    key, value = block.key_value(seen).reshape(2, 5, 2, 3, 4).unbind(2)
    mixed = torch.zeros(2, 4, 12)
    for sample in range(2):
        for head in range(3):
            chosen = used[sample]
            weights = (query[sample, :, head] @ key[sample, chosen, head].t() / 2).softmax(dim=1)
            mixed[sample, :, 4 * head : 4 * head + 4] = weights @ value[sample, chosen, head]
    between = tokens + block.out(mixed)
    torch.testing.assert_close(block(tokens, seen, used), between + block.mlp(block.norm2(between)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_slots_that_are_not_used_change_nothing() -> None:
    model = cross_model((4,), 1.0).eval()
    assert isinstance(model.decoder, CrossDecoder)
    features = torch.randn(1, 6, 128, generator=generator(0))
    ids, hidden = torch.tensor([[0, 3, 5, 1, 7]]), torch.tensor([[2, 4, 6]])
    used = torch.tensor([[True, True, False, True, False]])
    plan = HidingPlan(ids, used, hidden, torch.ones(1, 3, dtype=torch.bool), full=False)
    before = model.decoder(features, plan, (8,))
    changed = features.clone()
    changed[0, [3, 5]] = 1e3
    assert torch.equal(model.decoder(changed, plan, (8,)), before)
    few = HidingPlan(ids[:, used[0]], used[:, used[0]], hidden, plan.hidden_used, full=True)
    kept = torch.cat([features[:, :1], features[:, 1:][:, used[0]]], dim=1)
    torch.testing.assert_close(model.decoder(kept, few, (8,)), before, rtol=0, atol=1e-6)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 10 cannot be divided among 4 heads"):
        CrossBlock(10, 4, 2.0)
