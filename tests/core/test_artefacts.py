"""Degraded crops: nothing that does not count is touched, a sample is degraded alike wherever it is, and each effect is what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mae_core.artefacts import EFFECTS, ArtefactSettings, degraded
from mae_core.augment import AugmentSettings, Normaliser, RawBatch
from mae_core.masking import Sample
from tests.synthetic_batches import generator, names, raw_of

CPU = torch.device("cpu")
SPACES = [(32,), (16, 12), (8, 12, 10)]
each_effect = pytest.mark.parametrize("effect", EFFECTS)
every_space = pytest.mark.parametrize("space", SPACES, ids=["1", "2", "3"])
ALL = ArtefactSettings.model_validate(dict.fromkeys(EFFECTS, 1.0))


def always(effect: str, **more: float | tuple[float, float]) -> ArtefactSettings:
    return ArtefactSettings.model_validate({effect: 1.0, **more})


def batch(space: tuple[int, ...], size: int = 4, channels: int = 2) -> Tensor:
    return torch.rand(size, channels, *space, generator=generator(0)) * 3 + 1


def run(pixels: Tensor, settings: ArtefactSettings, sample: Sample | None = None, seed: int = 0, none: float = 0.0) -> Tensor:
    counted = torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.bool)
    valid = torch.ones_like(pixels, dtype=torch.bool)
    floor = torch.full(pixels.shape[:2], none)
    return degraded(pixels, floor, counted, valid, (sample or names(len(pixels)), seed), settings)


@every_space
@each_effect
def test_an_effect_changes_what_counts_and_nothing_else(space: tuple[int, ...], effect: str) -> None:
    pixels = batch(space)
    counted = torch.rand(4, *space, generator=generator(1)) < 0.8
    valid = (torch.rand(4, *space, generator=generator(2)) < 0.9)[:, None].expand(-1, 2, *(-1,) * len(space)).clone()
    valid[2, 1] = False  # a channel that the sample lacks
    pixels = torch.where(valid, pixels, 0.0)
    found = degraded(pixels, torch.zeros(4, 2), counted, valid, (names(4), 0), always(effect))
    touched = counted[:, None] & valid
    assert torch.equal(found[~touched], pixels[~touched])
    assert found.isfinite().all()
    assert (found[touched] != pixels[touched]).float().mean() > 0.5
    odd = torch.where(valid, pixels, 1e6)
    again = degraded(odd, torch.zeros(4, 2), counted, valid, (names(4), 0), always(effect))
    assert torch.equal(again[touched], found[touched]), "what holds no value has no influence"


@every_space
@each_effect
def test_a_sample_is_degraded_alike_in_any_batch_and_otherwise_under_another_seed(space: tuple[int, ...], effect: str) -> None:
    pixels, sample = batch(space), names(4)
    settings = always(effect)
    found = run(pixels, settings, sample)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(run(pixels[order], settings, sample.shuffled(order)), found[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(run(pixels[1:2], settings, Sample(*(part[1:2] for part in vars(sample).values()))), found[1:2])
    assert not torch.equal(run(pixels, settings, sample, seed=1), found)
    later = replace(sample, epoch=sample.epoch + 1)
    assert not torch.equal(run(pixels, settings, later), found)


def test_chances_are_shares_of_the_samples_and_are_drawn_apart() -> None:
    pixels = batch((4,), 2000, 1)
    noisy = (run(pixels, ArtefactSettings(noise=0.3)) != pixels).flatten(1).any(dim=1)
    wavy = (run(pixels, ArtefactSettings(spike=0.3)) != pixels).flatten(1).any(dim=1)
    for share in (noisy, wavy):
        assert 0.26 < share.float().mean() < 0.34
    assert 0.06 < (noisy & wavy).float().mean() < 0.12
    assert ArtefactSettings().is_off
    assert torch.equal(run(pixels, ArtefactSettings()), pixels)


def test_effects_of_intensity_leave_no_signal_where_there_is_none() -> None:
    """In normalised units air lies at -1.5, not at 0."""
    pixels = batch((16, 12)) - 1.5
    pixels[:, :, :4] = -1.5
    for effect in ("bias_field", "gamma"):
        found = run(pixels, always(effect), none=-1.5)
        torch.testing.assert_close(found[:, :, :4], pixels[:, :, :4], rtol=0, atol=1e-6)
        assert not torch.equal(found[:, :, 4:], pixels[:, :, 4:])


def test_each_effect_is_what_it_says() -> None:
    ones = torch.full((64, 1, 32, 24), 4.0)
    bias = (run(ones, always("bias_field", bias_strength=0.3)) / ones).log()
    assert 0.2 < bias.abs().amax() <= 0.3 + 1e-5
    assert bias.diff(dim=2).abs().amax() < 0.1, "smooth"
    noise = run(ones, always("noise", noise_strength=0.2)) - ones
    spread = noise.flatten(1).std(dim=1)
    assert 0.17 < spread.amax() < 0.21
    assert spread.amin() < 0.05
    assert noise.mean().abs() < 0.01
    dark = run(torch.zeros(64, 1, 32, 24), always("noise", noise_strength=0.2))
    assert dark.amin() >= 0, "a magnitude"
    shape = dark.mean(dim=(1, 2, 3)) / dark.pow(2).mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(shape, torch.full((64,), 0.8862), rtol=0, atol=0.03)  # Rayleigh's: the root of a quarter of pi
    ramp = torch.linspace(0, 1, 32)[None, None].expand(64, 1, 32)
    gamma = run(ramp, always("gamma", gamma_range=(2.0, 2.0)))
    torch.testing.assert_close(gamma, ramp**2)
    wave = run(ones, always("spike", spike_strength=0.5)) - ones
    assert 0.3 < wave.abs().amax() <= 0.5
    assert wave.mean(dim=(2, 3)).abs().amax() < 1e-5, "whole periods"


def test_ghosts_weaken_every_nth_line_of_k_space_and_spare_its_middle() -> None:
    pixels = torch.zeros(16, 1, 60)
    pixels[:, :, 10] = 1
    found = run(pixels, always("ghosting", ghosting_strength=1.0))
    torch.testing.assert_close(found.mean(dim=2), pixels.mean(dim=2))
    ratio = (torch.fft.fft(found[:, 0]) / torch.fft.fft(pixels[:, 0])).abs()
    torch.testing.assert_close(ratio[:, :4], torch.ones(16, 4))
    weak = (ratio < 0.99).float().mean(dim=1)
    assert ((weak > 0.15) & (weak < 0.55)).any()
    assert (ratio < 1.001).all()
    assert (found[:, 0, 10] > 0.5).all(), "where it was it stays brightest"


def test_thick_slices_keep_straight_lines_and_what_lies_across() -> None:
    line = torch.linspace(0, 1, 48)
    pixels = line[None, None].expand(32, 1, 48)
    found = run(pixels, always("low_resolution", low_resolution_factor=4.0))
    torch.testing.assert_close(found[:, :, 4:-4], pixels[:, :, 4:-4], rtol=0, atol=0.02)
    checks = (torch.arange(48) % 2).float()[None, None].expand(32, 1, 48)
    rough = run(checks, always("low_resolution", low_resolution_factor=4.0)).std(dim=2)
    assert rough.amin() < 0.15
    ones = run(torch.ones(8, 1, 7, 5), always("low_resolution", low_resolution_factor=16.0))
    torch.testing.assert_close(ones, torch.ones(8, 1, 7, 5))


def test_batches_are_degraded_where_it_is_asked_for_and_evaluation_never_is() -> None:
    number = torch.arange(4 * 2 * 8 * 8 * 6).reshape(4, 2, 8, 8, 6)
    quality = torch.zeros(4, 8, 8, 6, dtype=torch.uint8)
    quality[:, :2] = 128
    raw: RawBatch = raw_of(number.to(torch.int16), quality, None)
    off = Normaliser((8, 8, 6), (0.0, 0.0), (1.0, 2.0), 0, 0, AugmentSettings())
    on = replace(off, augment=AugmentSettings(artefacts=ALL))
    plain, bad = off(raw, CPU), on(raw, CPU)
    assert torch.equal(replace(off, augment=AugmentSettings(artefacts=ArtefactSettings()))(raw, CPU).pixels, plain.pixels)
    kept = (plain.quality != 0)[:, None].expand_as(plain.pixels)
    assert torch.equal(bad.quality, plain.quality)
    assert torch.equal(bad.pixels[kept], plain.pixels[kept])
    assert not torch.equal(bad.pixels, plain.pixels)
    assert torch.equal(on.plain(raw, CPU).pixels, off.plain(raw, CPU).pixels)
    assert torch.equal(on(raw, CPU).pixels, bad.pixels)
    shifted = replace(raw, offset=raw.offset + 5.0, pixels=raw.pixels)
    torch.testing.assert_close(on.no_signal(shifted), torch.tensor([[5.0, 2.5]]).expand(4, 2))
