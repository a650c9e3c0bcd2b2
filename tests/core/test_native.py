"""Channels at their native resolution: of a block one voxel is looked at and judged, and tokens of all groups share their ground."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_core.augment import AugmentSettings, Batch, Normaliser
from mae_core.decoders import CrossDecoderSettings, DecoderSettings
from mae_core.export import Description, load_encoder, load_segmenter, save_model
from mae_core.heads import HeadSettings, Segmenter
from mae_core.mae import MaeOutput, MaskedAutoencoder, ModelSettings, tokens_valid
from mae_core.masking import HidingPlan, RandomHiding, hide
from mae_core.native import MeasurementEmbedding
from mae_core.nd import TokenLayout, block_of, block_starts, patchify, unpatchify, whole_blocks
from mae_core.targets import HogTarget, NormalisedPixelTarget, PcaTarget, PixelTarget
from mae_core.vit import Encoder, EncoderSettings, all_tokens
from tests.synthetic_batches import generator, names, one_thread, raw_of

__all__ = ["one_thread"]

CHANNELS = ("B02", "B05", "B03", "B01", "B11")
FOOTPRINTS = {"B05": 2, "B11": 2, "B01": 3}
SIZES = (1, 2, 1, 3, 2)
CASES = [((24,), (6,)), ((12, 24), (6, 12)), ((4, 12, 6), (2, 6, 6))]
"""Crop and patch; on the last two axes a multiple of 2 and of 3."""
each_case = pytest.mark.parametrize(("space", "patch"), CASES, ids=str)
CPU = torch.device("cpu")


def settings_of(patch: tuple[int, ...], **more: Any) -> ModelSettings:
    encoder = EncoderSettings(preset="nano", patch=patch, mlp_ratio=2, footprints=FOOTPRINTS)
    return ModelSettings(encoder=encoder, **{"decoder": DecoderSettings(width=32, depth=1, heads=2), **more})


def model_of(settings: ModelSettings) -> MaskedAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MaskedAutoencoder(settings, CHANNELS)


def repeated(array: Tensor) -> Tensor:
    """Every measurement over the whole of its block, as a store has it."""
    out = array.clone()
    for channel, size in enumerate(SIZES):
        block = block_of(array.ndim - 2, size)
        blocks = patchify(array[:, channel : channel + 1], block)
        grid = [length // part for length, part in zip(array.shape[2:], block, strict=True)]
        out[:, channel] = unpatchify(blocks[..., :1].expand_as(blocks), grid, block)[:, 0]
    return out


def batch_of(space: tuple[int, ...], size: int = 2, spots: float = 0.0) -> Batch:
    """Noise as a store would have it; some voxels do not count, and the second sample lacks a coarse channel."""
    pixels = repeated(torch.randn(size, len(CHANNELS), *space, generator=generator(1)))
    quality = (torch.rand(size, *space, generator=generator(2)) < spots).to(torch.uint8)
    present = torch.ones(size, len(CHANNELS), dtype=torch.bool)
    if spots:
        present[1, 1] = False
        pixels[1, 1] = 0
    return Batch(pixels, quality, None, present, names(size))


def plan_of(model: MaskedAutoencoder, batch: Batch) -> HidingPlan:
    layout = model.encoder.layout(batch.pixels.shape[2:])
    valid = tokens_valid(layout, batch.counted, batch.present, model.settings.min_token_valid_fraction)
    return hide(valid, layout.full_grid, RandomHiding(), 0, batch.sample)


def run(model: MaskedAutoencoder, batch: Batch) -> tuple[MaeOutput, HidingPlan]:
    plan = plan_of(model, batch)
    return model(batch.pixels, batch.counted, batch.present, plan), plan


def measurements(batch: Batch, sample: int, token: int, patch: tuple[int, ...]) -> list[tuple[int, int, float]]:
    """Channel, voxel of the patch and value of every measurement of a token that counts, by loops over blocks."""
    grid = [size // part for size, part in zip(batch.pixels.shape[2:], patch, strict=True)]
    place = np.unravel_index(token % math.prod(grid), grid)
    found = []
    for channel in [[0, 2], [1, 4], [3]][token // math.prod(grid)]:
        block = block_of(len(patch), SIZES[channel])
        for inside in np.ndindex(*[part // step for part, step in zip(patch, block, strict=True)]):
            voxel = [number * step for number, step in zip(inside, block, strict=True)]
            first = [int(at) * part + here for at, part, here in zip(place, patch, voxel, strict=True)]
            box = tuple(slice(start, start + step) for start, step in zip(first, block, strict=True))
            if bool(batch.present[sample, channel]) and bool(batch.counted[(sample, *box)].all()):
                found.append((channel, int(np.ravel_multi_index(voxel, patch)), float(batch.pixels[(sample, channel, *first)])))
    return found


def naive(batch: Batch, plan: HidingPlan, predicted: Tensor, settings: ModelSettings) -> tuple[Tensor, Tensor]:
    """Sum of squared errors and count per sample and channel, in float64."""
    target = settings.target
    total, count = np.zeros(batch.present.shape), np.zeros(batch.present.shape, int)
    for sample, slot in np.argwhere(plan.hidden_used.numpy()).tolist():
        found = measurements(batch, sample, int(plan.hidden[sample, slot]), settings.encoder.patch)
        values = np.array([value for _, _, value in found])
        if isinstance(target, NormalisedPixelTarget):
            if len(values) < 2 or values.var(ddof=1) < target.min_variance:
                continue
            values = (values - values.mean()) / np.sqrt(values.var(ddof=1) + target.eps)
        for (channel, voxel, _), value in zip(found, values, strict=True):
            total[sample, channel] += (float(predicted[sample, slot, channel, voxel]) - value) ** 2
            count[sample, channel] += 1
    return torch.from_numpy(total).float(), torch.from_numpy(count)


@each_case
@pytest.mark.parametrize("target", [NormalisedPixelTarget(), PixelTarget()], ids=["normalised", "pixels"])
@torch.no_grad()
def test_the_loss_is_a_loop_over_measurements(
    space: tuple[int, ...], patch: tuple[int, ...], target: NormalisedPixelTarget | PixelTarget
) -> None:
    model = model_of(settings_of(patch, target=target, min_token_valid_fraction=0.1))
    batch = batch_of(space, 3, spots=0.06)
    output, plan = run(model, batch)
    total, count = naive(batch, plan, output.predicted, model.settings)
    assert torch.equal(output.count, count)
    assert count.sum() > 0
    torch.testing.assert_close(output.error_sum, total, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_target_of_a_20_m_band_has_a_quarter_of_the_pixels_and_that_of_a_60_m_band_a_thirty_sixth() -> None:
    encoder = EncoderSettings(preset="nano", patch=(12, 12), footprints={"B05": 2, "B01": 6})
    model = MaskedAutoencoder(ModelSettings(encoder=encoder, target=PixelTarget()), ("B02", "B05", "B01"))
    batch = Batch(torch.randn(1, 3, 24, 24), torch.zeros(1, 24, 24, dtype=torch.uint8), None, torch.ones(1, 3, dtype=torch.bool), names(1))
    layout = model.encoder.layout((24, 24))
    assert layout.full_grid == (3, 2, 2), "a token of each group at every place"
    every = torch.arange(12)[None]
    target = model.target(layout, batch.pixels, batch.counted, batch.present, every, torch.ones_like(every, dtype=torch.bool))
    assert target.counted.sum(dim=(0, 1, 3)).tolist() == [576, 576 // 4, 576 // 36]
    embedding = model.encoder.embed
    assert isinstance(embedding, MeasurementEmbedding)
    assert {name: tuple(weight.shape) for name, weight in embedding.weights.items()} == {
        "f1": (1, 144, 128),
        "f2": (1, 36, 128),
        "f6": (1, 4, 128),
    }
    assert model.decoder.head.out_features == 144 + 36 + 4, "no weight without a use"


@each_case
@torch.no_grad()
def test_a_block_is_known_by_its_first_voxel_alone(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    model = model_of(settings_of(patch))
    batch = batch_of(space)
    first = torch.stack([torch.tensor(block_starts(space, size)) == torch.arange(math.prod(space)) for size in SIZES]).reshape(-1, *space)
    other = replace(batch, pixels=torch.where(first, batch.pixels, torch.nan))
    for found, wanted in zip(run(model, other)[:1], run(model, batch)[:1], strict=True):
        assert torch.equal(found.error_sum, wanted.error_sum)
        assert torch.equal(found.predicted, wanted.predicted)
    moved = replace(batch, pixels=torch.where(first, batch.pixels + 1, batch.pixels))
    assert not torch.equal(run(model, moved)[0].predicted, run(model, batch)[0].predicted)


@pytest.mark.parametrize(
    "decoder", [DecoderSettings(width=32, depth=1, heads=2), CrossDecoderSettings(width=32, depth=1, heads=2)], ids=str
)
@pytest.mark.parametrize("rubbish", [0.0, 1e30, math.nan])
def test_voxels_that_do_not_count_change_no_bit_of_loss_or_gradient(decoder: Any, rubbish: float) -> None:
    space, patch = CASES[1]
    model = model_of(settings_of(patch, decoder=decoder, min_token_valid_fraction=0.1))
    batch = batch_of(space, spots=0.05)
    plan = plan_of(model, batch)
    layout = model.encoder.layout(space)
    every = torch.arange(math.prod(layout.full_grid)).expand(2, -1)
    whole = layout.measured(batch.counted, batch.present)
    assert torch.equal(whole[0, 1], whole_blocks(batch.counted, 2)[0])
    gradients = []
    for pixels in (batch.pixels, torch.where(whole, batch.pixels, rubbish)):
        model.zero_grad()
        shown = model.encoder.layout(space).pick(layout.split(torch.where(whole, pixels, 0.0)), plan.visible)
        assert shown.isfinite().all()
        used = torch.ones_like(every, dtype=torch.bool)
        target = model.target(layout, pixels, batch.counted, batch.present, every, used)
        features = model.encoder(shown, plan.visible, layout.grid, plan.visible_used)
        guess = model.decoder(features, plan, layout.grid)
        ((guess - target.values[:, : guess.shape[1]]).square() * target.counted[:, : guess.shape[1]]).sum().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@each_case
def test_every_parameter_gets_a_gradient(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    model = model_of(settings_of(patch))
    output, _ = run(model, batch_of(space, 6))
    output.error_sum.sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        rows = weight.grad.flatten(0, -2) if "embed.weights" in name else weight.grad.flatten(1) if weight.ndim > 1 else weight.grad
        assert bool(rows.any()), name
        if "embed.weights" in name or name == "decoder.head.weight":
            assert bool((rows != 0).any(dim=1).all()), f"{name} has weights that nothing uses"


@each_case
@torch.no_grad()
def test_all_tokens_joined_are_the_array_with_measurements_repeated(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    layout = model_of(settings_of(patch)).encoder.layout(space)
    pixels = torch.randn(2, len(CHANNELS), *space, generator=generator(3))
    ids = torch.arange(math.prod(layout.full_grid)).expand(2, -1)
    joined, reached = layout.join(layout.pick(layout.split(pixels), ids), ids, torch.ones_like(ids, dtype=torch.bool))
    assert reached.all()
    assert torch.equal(joined, repeated(pixels))


def test_tokens_of_every_group_lie_on_the_same_ground() -> None:
    """Values are the place of a measurement's middle in the world, so the mean over a token is the middle of its ground."""
    encoder = EncoderSettings(preset="nano", patch=(12, 12), footprints={"B05": 2, "B01": 6})
    layout = Encoder(encoder, ("B02", "B05", "B01")).layout((36, 24))
    row, column = np.mgrid[:36, :24].astype(float)
    world = []
    for size in (1, 2, 6):  # north up, 10 m: x = 500 000 + 10 column, y = 5 000 000 - 10 row
        x = 500_000 + 10 * (column // size * size + size / 2)
        y = 5_000_000 - 10 * (row // size * size + size / 2)
        world.append(np.stack([x, y]))
    ids = torch.arange(math.prod(layout.full_grid))[None]
    owned = layout.own(ids)
    for axis, origin, step in ((0, 500_000, 120), (1, 5_000_000, -120)):
        pixels = torch.from_numpy(np.stack([value[axis] for value in world]))[None]
        tokens = layout.pick(layout.split(pixels), ids)
        middle = (tokens.sum(dim=(2, 3)) / owned.sum(dim=(2, 3))).reshape(3, 3, 2)
        number = torch.arange(2)[None, :] if axis == 0 else torch.arange(3)[:, None]
        wanted = (origin + step * (number + 0.5)).expand(3, 2).double()
        for group in middle:
            torch.testing.assert_close(group, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("patch", [(6,), (6, 6)], ids=str)
def test_with_one_voxel_per_measurement_all_is_as_without_the_setting(patch: tuple[int, ...]) -> None:
    settings = settings_of(patch)
    models = []
    for footprints in ({}, dict.fromkeys(CHANNELS, 1)):
        encoder = settings.encoder.model_copy(update={"footprints": footprints})
        models.append(model_of(settings.model_copy(update={"encoder": encoder})))
    one, two = models
    assert one.state_dict().keys() == two.state_dict().keys()
    assert "encoder.embed.weight" in one.state_dict()
    batch = batch_of(tuple(2 * size for size in patch), spots=0.1)
    (left, plan), (right, other) = run(one, batch), run(two, batch)
    assert torch.equal(plan.hidden, other.hidden)
    assert torch.equal(left.error_sum, right.error_sum)
    assert torch.equal(left.predicted, right.predicted)


def test_crops_flips_and_turns_keep_measurements_whole() -> None:
    space, size = (24, 24), 64
    numbers = repeated(torch.arange(24.0 * 24).reshape(1, 1, *space).expand(1, len(CHANNELS), -1, -1))
    raw = replace(raw_of(numbers.expand(size, -1, -1, -1).contiguous()), extent=torch.tensor([[24, 21]] * size))
    make = Normaliser((12, 12), (0.0,) * 5, (1.0,) * 5, 0, 3, AugmentSettings(quarter_turns=True), 6)
    pixels = make(raw, CPU).pixels
    assert torch.equal(pixels, repeated(pixels)), "every block is one measurement"
    assert len(torch.unique(pixels[:, 0].flatten(1), dim=0)) > 16, "crops do differ"
    origins = make.origins(raw)
    assert not (origins % 6).any()
    assert origins.amax(dim=0).tolist() == [12, 6], "everywhere that keeps the crop on real data"
    assert make.plain.origins(raw)[0].tolist() == [6, 0]
    volume = Normaliser((2, 12), (0.0,) * 5, (1.0,) * 5, 0, 3, AugmentSettings(), 1)
    assert replace(volume, crop=(1, 12, 12), footprint=6).block == (1, 6, 6), "the third axis from the end is not touched"


def test_what_would_cut_a_measurement_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"crop \(12, 10\) cuts measurements of 6 voxels; on the last two axes give a multiple of 6"):
        Normaliser((12, 10), (), (), 0, 0, None, 6)
    with pytest.raises(ValueError, match=r"augment\.resized_crop would mix neighbouring measurements .* leave it out"):
        Normaliser((12, 12), (), (), 0, 0, AugmentSettings(resized_crop=(0.5, 1.0)), 6)
    for patch, word in (((8, 8), "patch"), ((12, 9), "patch")):
        with pytest.raises(ValueError, match=rf"{word} .* does not hold whole measurements .* multiple of 6"):
            Encoder(EncoderSettings(patch=patch, footprints=FOOTPRINTS), CHANNELS)
    with pytest.raises(ValueError, match=r"footprints name \['B99'\], which are not channels"):
        Encoder(EncoderSettings(patch=(6, 6), footprints={"B99": 2}), CHANNELS)
    mixed = EncoderSettings(patch=(6, 6), footprints=FOOTPRINTS, groups=(("B02", "B05"), ("B03", "B01", "B11")))
    with pytest.raises(ValueError, match="several footprints into one group"):
        Encoder(mixed, CHANNELS)
    for target in (HogTarget(), PcaTarget()):
        with pytest.raises(ValueError, match=rf"target\.kind={target.kind} needs .* a measurement in every voxel; take"):
            model_of(settings_of((6, 6), target=target))


def test_groups_of_one_footprint_may_be_chosen() -> None:
    settings = EncoderSettings(patch=(6, 6), footprints=FOOTPRINTS, groups=(("B02",), ("B03",), ("B05", "B11"), ("B01",)))
    assert Encoder(settings, CHANNELS).groups == ((0,), (2,), (1, 4), (3,))
    assert Encoder(settings.model_copy(update={"groups": ()}), CHANNELS).groups == ((0, 2), (1, 4), (3,))


@torch.no_grad()
def test_channels_in_another_order_or_fewer_of_them_are_embedded_alike() -> None:
    encoder = model_of(settings_of((6, 6))).encoder
    every = all_tokens(encoder.layout((12, 12)), batch_of((12, 12)).pixels)
    whole = encoder(every.patches, every.ids, every.layout.grid)
    order = [3, 1, 4, 0, 2]
    moved = encoder(every.patches[:, :, order], every.ids, every.layout.grid, channels=[CHANNELS[place] for place in order])
    torch.testing.assert_close(moved, whole)
    without = every.patches.clone()
    without[:, :, 1] = 0
    fewer = [0, 2, 3, 4]
    part = encoder(every.patches[:, :, fewer], every.ids, every.layout.grid, channels=[CHANNELS[place] for place in fewer])
    torch.testing.assert_close(part, encoder(without, every.ids, every.layout.grid))
    with pytest.raises(ValueError, match=r"channels \['B99'\] are not known"):
        encoder(every.patches[:, :, :1], every.ids, every.layout.grid, channels=["B99"])


@torch.no_grad()
def test_a_model_folder_keeps_footprints_and_the_head_takes_all_groups(tmp_path: Path) -> None:
    encoder = model_of(settings_of((6, 6))).encoder
    segmenter = Segmenter(encoder, HeadSettings(features=4), 2).eval()
    about = {
        "modality": "raster",
        "channels": CHANNELS,
        "mean": (0.0,) * 5,
        "std": (1.0,) * 5,
        "no_value": 1,
        "crop": (12, 12),
        "spacing": (10.0, 10.0),
        "spacing_unit": "m",
        "encoder": encoder.settings,
        "reader": {},
        "lineage": {},
    }
    save_model(tmp_path / "e", encoder, Description(kind="encoder", **about))
    back, description = load_encoder(tmp_path / "e")
    assert description.encoder.footprints == FOOTPRINTS
    batch = batch_of((12, 12))
    every = all_tokens(back.layout((12, 12)), batch.pixels)
    assert torch.equal(back(every.patches, every.ids, every.layout.grid), encoder.eval()(every.patches, every.ids, every.layout.grid))
    kind = Description(kind="segmenter", head=HeadSettings(features=4), classes=((0, "a"), (1, "b")), **about)
    save_model(tmp_path / "s", segmenter, kind)
    known = torch.ones(2, 12, 12, dtype=torch.bool)
    scores = load_segmenter(tmp_path / "s")[0](batch.pixels, known)
    assert scores.shape == (2, 2, 12, 12)
    assert torch.equal(scores, segmenter(batch.pixels, known))


def test_a_layout_without_coarse_channels_knows_no_blocks() -> None:
    layout = TokenLayout((2, 2), (4, 4), (4, 4), ((0, 1),), 2)
    assert not layout.coarse
    assert layout.own(torch.arange(4)[None]).shape == (1, 4, 2, 1)


def test_one_graph() -> None:
    """In a process of its own, because the tests' shape checks cannot be compiled."""
    code = f"""
import torch, torch._dynamo
from mae_core.mae import ModelSettings, MaskedAutoencoder
from mae_core.masking import RandomHiding, Sample, hide
model = MaskedAutoencoder(ModelSettings.model_validate({settings_of((6, 6)).model_dump()!r}), {CHANNELS!r})
compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
for step in range(2):
    number = torch.arange(2)
    layout = model.encoder.layout((12, 12))
    valid = torch.ones(2, 12, dtype=torch.bool)
    plan = hide(valid, layout.full_grid, RandomHiding(), step, Sample(number, number, number), True)
    fed = torch.randn(2, 5, 12, 12), torch.ones(2, 12, 12, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool), plan
    output = compiled(*fed)
    output.error_sum.sum().backward()
    torch.testing.assert_close(output.error_sum, model(*fed).error_sum)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, torch._dynamo.utils.counters
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
