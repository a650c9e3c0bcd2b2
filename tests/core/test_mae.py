"""The loss is that of a loop written out, on hidden and valid voxels alone, with any number of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_core.augment import AugmentSettings, Batch, Normaliser, RawBatch
from mae_core.decoders import DECODER_PRESETS, DecoderSettings
from mae_core.mae import MaeOutput, MaskedAutoencoder, ModelSettings
from mae_core.masking import HidingPlan, plan_from_hidden
from mae_core.nd import patchify, take, token_valid, unpatchify
from mae_core.positions import sincos_positions
from mae_core.targets import NormalisedPixelTarget, PixelTarget
from mae_core.vit import PRESETS, EncoderSettings
from tests.contracts import hidden_set, shown_set
from tests.synthetic_batches import CASES, CHANNELS, batch_of, by_axes, generator, model_of, one_thread, plan_of, raw_of, settings_of

__all__ = ["one_thread"]

TARGETS = [NormalisedPixelTarget(), NormalisedPixelTarget(over="channel", eps=0.01), PixelTarget()]
each_case = pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)


def run(model: MaskedAutoencoder, batch: Batch, plan: HidingPlan | None = None) -> tuple[MaeOutput, HidingPlan]:
    plan = plan or plan_of(batch, model.settings)
    return model(batch.pixels, batch.counted, batch.present, plan), plan


def loss_of(output: MaeOutput) -> Tensor:
    return output.error_sum.sum() / output.count.sum()


def spotted(batch: Batch, share: float = 0.3, seed: int = 5) -> Batch:
    """The batch with some voxels that do not count, the first half of the first sample among them, and a channel that is absent."""
    quality = (torch.rand(batch.quality.shape, generator=generator(seed)) < share).to(torch.uint8)
    quality[0, : quality.shape[1] // 2] = 1
    present = batch.present.clone()
    present[1, 1] = False
    pixels = torch.where(present[:, :, *[None] * (batch.pixels.ndim - 2)], batch.pixels, 0.0)
    return replace(batch, quality=quality, present=present, pixels=pixels)


def naive_errors(batch: Batch, plan: HidingPlan, predicted: Tensor, settings: ModelSettings) -> tuple[Tensor, Tensor]:
    """Sum of squared errors and count per sample and channel, by loops in float64."""
    patch = settings.encoder.patch
    pixels, counted = patchify(batch.pixels, patch).double().numpy(), patchify(batch.counted[:, None], patch).numpy()
    total, count = np.zeros(batch.present.shape), np.zeros(batch.present.shape, int)
    for sample in range(len(pixels)):
        for slot, token in enumerate(plan.hidden[sample].tolist()):
            if not plan.hidden_used[sample, slot]:
                continue
            channels = [channel for channel in range(pixels.shape[2]) if batch.present[sample, channel]]
            target = settings.target
            together = isinstance(target, PixelTarget) or target.over == "patch"
            for group in [channels] if together else [[channel] for channel in channels]:
                inside = counted[sample, token, 0]
                values = pixels[sample, token][group][:, inside]
                if isinstance(target, NormalisedPixelTarget):
                    if values.size < 2 or values.var(ddof=1) < target.min_variance:
                        continue
                    values = (values - values.mean()) / np.sqrt(values.var(ddof=1) + target.eps)
                wrong = predicted[sample, slot].double().numpy()[group][:, inside] - values
                for row, channel in enumerate(group):
                    total[sample, channel] += (wrong[row] ** 2).sum()
                    count[sample, channel] += wrong[row].size
    return torch.from_numpy(total).float(), torch.from_numpy(count)


@each_case
@pytest.mark.parametrize("target", TARGETS, ids=str)
@torch.no_grad()
def test_the_loss_is_the_naive_loop(space: tuple[int, ...], patch: tuple[int, ...], target: NormalisedPixelTarget | PixelTarget) -> None:
    model = model_of(settings_of(patch, target, min_token_valid_fraction=0.25))
    for batch in (batch_of(space), spotted(batch_of(space, seed=1))):
        output, plan = run(model, batch)
        total, count = naive_errors(batch, plan, output.predicted, model.settings)
        assert torch.equal(output.count, count)
        torch.testing.assert_close(output.error_sum, total, rtol=2e-5, atol=1e-4)
        assert count.sum() > 0


@each_case
@torch.no_grad()
def test_visible_targets_do_not_enter_the_loss_and_hidden_ones_do(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """What the encoder is fed is kept, so that only the target can change the loss."""
    model = model_of(settings_of(patch))
    batch = batch_of(space)
    plan = plan_of(batch, model.settings)
    fed = take(patchify(batch.pixels, patch), plan.visible)
    model.encoder.embed.register_forward_pre_hook(lambda module, inputs: (fed, *inputs[1:]))
    losses = [loss_of(run(model, batch, plan)[0])]
    for ids in (plan.visible, plan.hidden):
        patches = patchify(batch.pixels, patch)
        patches.scatter_(1, ids[..., None, None].expand(-1, -1, *patches.shape[2:]), 7 * torch.randn(patches.shape, generator=generator(9)))
        grid = tuple(size // part for size, part in zip(space, patch, strict=True))
        losses.append(loss_of(run(model, replace(batch, pixels=unpatchify(patches, grid, patch)), plan)[0]))
    assert losses[1] == losses[0]
    assert losses[2] != losses[0]


@each_case
@torch.no_grad()
def test_hidden_pixels_do_not_change_the_prediction(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    model = model_of(settings_of(patch))
    batch = batch_of(space)
    output, plan = run(model, batch)
    hidden = torch.zeros(2, math.prod(space) // math.prod(patch), dtype=torch.bool).scatter(1, plan.hidden, value=True)
    grid = tuple(size // part for size, part in zip(space, patch, strict=True))
    noise = torch.where(hidden[..., None, None], torch.nan, patchify(batch.pixels, patch))
    again, _ = run(model, replace(batch, pixels=unpatchify(noise, grid, patch)), plan)
    assert torch.equal(again.predicted, output.predicted)
    assert not torch.equal(again.error_sum, output.error_sum)


def gradients(model: MaskedAutoencoder) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert all(part is not None for part in found.values()), [name for name, part in found.items() if part is None]
    return {name: part for name, part in found.items() if part is not None}


def raw_with_holes(space: tuple[int, ...], rubbish: float) -> RawBatch:
    pixels = torch.randn(3, 3, *space, generator=generator(0))
    quality = (torch.rand(3, *space, generator=generator(1)) < 0.2).to(torch.uint8)
    quality[1, : space[0] // 2] = 1
    quality[2] = 1
    present = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
    keep = (quality == 0)[:, None] & present.reshape(3, 3, *[1] * len(space))
    return raw_of(torch.where(keep, pixels, rubbish), quality, present=present)


@each_case
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -32768.0])
def test_invalid_voxels_change_no_bit_of_loss_or_gradient(space: tuple[int, ...], patch: tuple[int, ...], rubbish: float) -> None:
    model = model_of(settings_of(patch))
    normaliser = Normaliser(space, (0.1, 0.0, 0.3), (1.0, 2.0, 1.5), 1, 0, AugmentSettings())
    found = []
    for fill in (0.0, rubbish):
        batch = normaliser(raw_with_holes(space, fill), torch.device("cpu"))
        loss = loss_of(run(model, batch)[0])
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert found[0][0].isfinite()
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, found[1][1][name]), name


@each_case
def test_no_gradient_flows_to_what_does_not_count(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    model = model_of(settings_of(patch, min_token_valid_fraction=0.25))
    batch = spotted(batch_of(space))
    batch.pixels.requires_grad_()
    output, plan = run(model, batch)
    output.error_sum.sum().backward()
    assert batch.pixels.grad is not None
    at = patchify(batch.pixels.grad, patch)
    counted = patchify(batch.counted[:, None], patch) & batch.present[:, None, :, None]
    for sample in range(2):
        hidden, shown = sorted(hidden_set(plan, sample)), sorted(shown_set(plan, sample))
        assert at[sample, hidden][counted[sample, hidden]].any()
        assert not at[sample, hidden][~counted[sample, hidden]].any()
        assert at[sample, shown].any()
        rest = sorted(set(range(at.shape[1])) - set(hidden) - set(shown))
        assert not at[sample, rest].any(), "what is no token is seen by nothing"


@torch.no_grad()
def test_a_patch_with_too_little_data_is_no_token() -> None:
    model = model_of(settings_of((8,), min_token_valid_fraction=0.5))
    quality = torch.zeros(2, 48, dtype=torch.uint8)
    quality[0, :5], quality[0, 8:13], quality[0, 16:20] = 1, 1, 1
    batch = replace(batch_of((48,)), quality=quality)
    output, plan = run(model, batch)
    assert shown_set(plan, 0) | hidden_set(plan, 0) == {2, 3, 4, 5}, "tokens 0 and 1 have three of eight, token 2 four of eight"
    assert not plan.hidden_used[0].all()
    hidden = hidden_set(plan, 0)
    assert int(output.count[0, 0]) == 8 * len(hidden) - 4 * (2 in hidden)


@torch.no_grad()
def test_flat_patches_are_counted_and_left_out() -> None:
    model = model_of(settings_of((4,)))
    batch = batch_of((24,))
    batch.pixels[0, :, :12] = 3.0
    output, plan = run(model, batch)
    flat = len(hidden_set(plan, 0) & {0, 1, 2})
    assert flat > 0
    assert int(output.target.num_flat) == flat
    assert int(output.count[0, 0]) == 4 * (plan.hidden.shape[1] - flat)
    assert not output.target.counted[0][plan.hidden[0] < 3].any()


@each_case
def test_every_parameter_gets_a_gradient(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    model = model_of(settings_of(patch))
    output, _ = run(model, batch_of(space))
    loss_of(output).backward()
    without = [name for name, part in gradients(model).items() if not part.any()]
    assert without == []


@each_case
@torch.no_grad()
def test_under_autocast_the_loss_is_fp32_and_the_target_unrounded(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    model = model_of(settings_of(patch))
    number = torch.arange(math.prod(space)).reshape(space) % 2
    stored = (4095 - number).expand(2, 3, *space).to(torch.uint16)
    batch = Normaliser(space, (2000.0,) * 3, (100.0,) * 3, 1, 0, None)(raw_of(stored), torch.device("cpu"))
    plain, plan = run(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = run(model, batch, plan)
    assert rounded.predicted.dtype == rounded.error_sum.dtype == torch.float32
    assert not torch.equal(rounded.predicted, plain.predicted), "autocast was on"
    assert torch.equal(rounded.target.values, plain.target.values)
    values = rounded.target.values[rounded.target.counted]
    assert len(values) > 0
    assert values.abs().min() > 0.1, "4094 and 4095 stay distinct"
    torch.testing.assert_close(loss_of(rounded), loss_of(plain), rtol=0.02, atol=0)


@torch.no_grad()
def test_uneven_samples_are_what_they_are_alone() -> None:
    model = model_of(settings_of((4,)))
    quality = torch.zeros(3, 48, dtype=torch.uint8)
    quality[1, 20:], quality[2, :] = 1, 1
    batch = replace(batch_of((48,), size=3), quality=quality)
    output, plan = run(model, batch)
    assert not plan.full
    assert not output.count[2].any()
    assert not output.error_sum[2].any()
    for index in (0, 1):
        hidden = torch.tensor([[token in hidden_set(plan, index) for token in range(12)]])
        valid = token_valid(batch.counted[index : index + 1], (4,), 0.5)
        one = slice(index, index + 1)
        alone = model(batch.pixels[one], batch.counted[one], batch.present[one], plan_from_hidden(hidden, valid))
        torch.testing.assert_close(output.error_sum[one], alone.error_sum, rtol=1e-4, atol=1e-4)
        assert torch.equal(output.count[one], alone.count)


@torch.no_grad()
def test_nothing_hidden_is_no_loss() -> None:
    model = model_of(settings_of((4,)))
    output, _ = run(model, batch_of((24,)), plan_from_hidden(torch.zeros(2, 6, dtype=torch.bool)))
    assert output.predicted.shape == (2, 0, 3, 4)
    assert not output.count.any()


def as_planes(pixels: Tensor) -> Tensor:
    return pixels.unsqueeze(2)


def flat_positions(grid: Sequence[int], width: int, *_: object) -> Tensor:
    """Positions on the last two axes, whatever stands before them."""
    return sincos_positions(tuple(grid)[-2:], width)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_plane_is_a_volume_of_one_slice(target: NormalisedPixelTarget | PixelTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient, the positions set aside.

    Positions share the token width among the axes, so two axes and three get different codes by design; with the same
    codes all the rest of the model must not know how many axes there are.
    """
    monkeypatch.setattr("mae_core.positions.cached_positions", flat_positions)
    plane, volume = model_of(settings_of((4, 3), target)), model_of(settings_of((1, 4, 3), target))
    volume.load_state_dict(plane.state_dict())
    batch = spotted(batch_of((12, 15)), share=0.1)
    deep = replace(batch, pixels=as_planes(batch.pixels), quality=batch.quality.unsqueeze(1))
    outputs = [run(plane, batch), run(volume, deep)]
    assert torch.equal(outputs[0][1].hidden, outputs[1][1].hidden)
    for output, _ in outputs:
        loss_of(output).backward()
    torch.testing.assert_close(loss_of(outputs[0][0]), loss_of(outputs[1][0]), rtol=1e-6, atol=0)
    found = gradients(plane), gradients(volume)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=1e-7, msg=name)


def test_positions_do_tell_two_axes_from_three() -> None:
    assert not torch.equal(sincos_positions((1, 3, 5), 16), sincos_positions((3, 5), 16))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_decoder_follows_the_encoders_preset(preset: str) -> None:
    with torch.device("meta"):
        model = MaskedAutoencoder(ModelSettings(encoder=EncoderSettings(preset=preset, patch=(16,))), CHANNELS)
    width, depth, heads = DECODER_PRESETS[preset]
    assert len(model.decoder.blocks) == depth
    assert model.decoder.embed.out_features == width
    assert model.decoder.blocks[0].attention.heads == heads
    assert model.decoder.head.out_features == 3 * 16


def test_the_decoders_shape_can_be_chosen() -> None:
    model = model_of(ModelSettings(encoder=EncoderSettings(preset="nano", patch=(4,)), decoder=DecoderSettings(width=48, depth=3, heads=6)))
    assert len(model.decoder.blocks) == 3
    assert model.decoder.embed.out_features == 48
    assert model.decoder.blocks[0].attention.heads == 6


def test_the_wrong_number_of_axes_is_refused() -> None:
    model = model_of(settings_of((4, 4)))
    batch = batch_of((8, 8, 8))
    with pytest.raises(ValueError, match="has 3 axes and patch"):
        run(model, batch, plan_from_hidden(torch.zeros(2, 4, dtype=torch.bool)))
