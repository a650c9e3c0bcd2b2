"""Targets equal a loop over every patch, written out; flat patches and what does not count are left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mae_core.targets import (
    HogTarget,
    NormalisedPixelTarget,
    PcaBasis,
    PcaTarget,
    PixelTarget,
    TargetSettings,
    fit_pca,
    from_pca,
    make_target,
    target_shape,
)
from tests.contracts import TargetContract
from tests.synthetic_batches import generator, one_thread, places

__all__ = ["one_thread"]


class TestPixelTarget(TargetContract):
    settings = PixelTarget()


class TestPatchTarget(TargetContract):
    settings = NormalisedPixelTarget()


class TestChannelTarget(TargetContract):
    settings = NormalisedPixelTarget(over="channel")


class TestHogTarget(TargetContract):
    """Of histograms that are there already; how they are made stands in test_hog.py."""

    settings = HogTarget()


class TestPcaTarget(TargetContract):
    settings = PcaTarget(num_components=4)

    def patches(self) -> tuple[Tensor, Tensor]:
        patches, counted = super().patches()
        return patches, counted | torch.tensor([True, False, False, True, True])[:, None, None]

    def basis(self, patches: Tensor) -> PcaBasis:
        training = 3 + torch.randn(60, *patches.shape[2:], generator=generator(9))
        return fit_pca(training, everything(training), self.settings.num_components)

    def before_scaling(self, patches: Tensor) -> Tensor:
        basis = self.basis(patches)
        return ((patches.flatten(2).double() - basis.mean) @ basis.components.t())[:, :, None].float()

    def may_count(self, counted: Tensor) -> Tensor:
        return counted.flatten(2).all(dim=2)[..., None, None].expand(-1, -1, 1, self.settings.num_components)

    def test_neighbouring_numbers_of_twelve_bits_stay_apart(self) -> None:
        stored = torch.full((1, 1, 1, 16), 4095.0)
        stored[..., ::2] = 4094.0
        exact = self.make(stored, everything(stored)).values
        with torch.autocast("cpu", torch.bfloat16):
            values = self.make(stored, everything(stored)).values
        assert torch.equal(values, exact)
        torch.testing.assert_close(values, self.before_scaling(stored) / self.make(stored, everything(stored)).std)


class TestWhitenedPcaTarget(TestPcaTarget):
    settings = PcaTarget(num_components=4, whiten=True)


def everything(patches: Tensor) -> Tensor:
    return torch.ones_like(patches, dtype=torch.bool)


def naive(patches: Tensor, counted: Tensor, settings: NormalisedPixelTarget) -> tuple[Tensor, Tensor, int]:
    """Values and what counts, group by group in float64."""
    values, kept, num_flat = np.zeros(patches.shape), np.zeros(patches.shape, bool), 0
    number = patches.shape[2]
    groups = [list(range(number))] if settings.over == "patch" else [[channel] for channel in range(number)]
    for batch, token in places(patches.shape[:2]):
        for group in groups:
            inside = counted[batch, token, group].numpy()
            found = patches[batch, token, group].numpy().astype(np.float64)
            if not inside.any():
                continue
            numbers = found[inside]
            variance = numbers.var(ddof=1) if len(numbers) > 1 else 0.0
            if variance < settings.min_variance:
                num_flat += 1
                continue
            values[batch, token, group] = np.where(inside, (found - numbers.mean()) / np.sqrt(variance + settings.eps), 0)
            kept[batch, token, group] = inside
    return torch.from_numpy(values).float(), torch.from_numpy(kept), num_flat


@given(st.integers(0, 2**16), st.sampled_from(["patch", "channel"]), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1e-6, 0.5]))
def test_the_normalised_target_is_the_naive_loop(seed: int, over: str, share: float, eps: float) -> None:
    settings = NormalisedPixelTarget(over=over, eps=eps, min_variance=0.3)
    patches = torch.randn(2, 3, 2, 6, generator=generator(seed)) * torch.rand(2, 3, 2, 1, generator=generator(seed + 1))
    counted = torch.rand(2, 3, 2, 6, generator=generator(seed + 2)) < share
    target = make_target(patches, counted, settings)
    values, kept, num_flat = naive(patches, counted, settings)
    assert torch.equal(target.counted, kept)
    assert int(target.num_flat) == num_flat
    torch.testing.assert_close(target.values, values, rtol=1e-5, atol=1e-5)


def test_the_variance_is_the_samples() -> None:
    target = make_target(torch.tensor([[[[0.0, 2.0]]]]), torch.ones(1, 1, 1, 2, dtype=torch.bool), NormalisedPixelTarget(eps=0))
    torch.testing.assert_close(target.values.flatten(), torch.tensor([-1.0, 1.0]) / math.sqrt(2))


def test_each_channel_by_itself_has_no_mean_and_unit_variance() -> None:
    patches = torch.randn(2, 4, 3, 64, generator=generator(0)) * torch.tensor([1.0, 50.0, 0.1])[:, None] + 7
    values = make_target(patches, everything(patches), NormalisedPixelTarget(over="channel")).values
    torch.testing.assert_close(values.mean(dim=3), torch.zeros(2, 4, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(values.var(dim=3), torch.ones(2, 4, 3), rtol=1e-3, atol=0)


def test_all_channels_of_a_patch_share_a_mean_and_variance() -> None:
    patches = torch.randn(2, 4, 3, 64, generator=generator(0)) * torch.tensor([1.0, 5.0, 0.1])[:, None] + 7
    target = make_target(patches, everything(patches), NormalisedPixelTarget())
    assert target.mean.shape == target.std.shape == (2, 4, 1, 1)
    torch.testing.assert_close(target.values.flatten(2).var(dim=2), torch.ones(2, 4), rtol=1e-4, atol=0)
    assert target.values[:, :, 1].var() > 2


@pytest.mark.parametrize("level", [0.0, 0.1, 65535.0])
def test_flat_patches_are_counted_and_left_out(level: float) -> None:
    patches = torch.full((1, 3, 2, 8), level)
    patches[0, 1] += 1e-4 * torch.randn(2, 8, generator=generator(0)) if level < 1 else 0
    patches[0, 2] += torch.randn(2, 8, generator=generator(0))
    target = make_target(patches, everything(patches), NormalisedPixelTarget())
    assert int(target.num_flat) == 2
    assert target.counted[0].flatten(1).any(dim=1).tolist() == [False, False, True]
    assert target.values.isfinite().all()
    assert not target.values[0, :2].any()


def test_one_flat_channel_leaves_the_others_in() -> None:
    patches = torch.randn(1, 1, 3, 8, generator=generator(0))
    patches[0, 0, 1] = 4
    target = make_target(patches, everything(patches), NormalisedPixelTarget(over="channel"))
    assert target.counted[0, 0].any(dim=1).tolist() == [True, False, True]
    assert int(target.num_flat) == 1


def test_a_single_voxel_is_flat_and_an_empty_patch_is_not_counted_as_one() -> None:
    counted = torch.zeros(1, 2, 1, 8, dtype=torch.bool)
    counted[0, 0, 0, 3] = True
    target = make_target(torch.randn(1, 2, 1, 8, generator=generator(0)), counted, NormalisedPixelTarget())
    assert int(target.num_flat) == 1
    assert not target.counted.any()


def test_eps_is_added_to_the_variance() -> None:
    patches = torch.tensor([[[[0.0, 2.0]]]])
    values = make_target(patches, everything(patches), NormalisedPixelTarget(eps=2)).values
    torch.testing.assert_close(values.flatten(), torch.tensor([-0.5, 0.5]))


def test_no_eps_gives_no_nan() -> None:
    patches = torch.ones(1, 2, 1, 4)
    counted = torch.tensor([True, False])[None, :, None, None].expand(1, 2, 1, 4)
    assert make_target(patches, counted, NormalisedPixelTarget(eps=0)).values.isfinite().all()


def test_pixels_are_themselves() -> None:
    patches = torch.randn(2, 3, 2, 8, generator=generator(0))
    target = make_target(patches, everything(patches), PixelTarget())
    assert torch.equal(target.values, patches)
    assert target.counted.all()
    assert int(target.num_flat) == 0


def test_a_settings_file_picks_by_kind() -> None:
    read = TypeAdapter(TargetSettings)
    assert read.validate_python({"kind": "pixels"}) == PixelTarget()
    assert read.validate_python({"kind": "normalised_pixels", "over": "channel"}) == NormalisedPixelTarget(over="channel")
    assert read.validate_python({"kind": "pca", "whiten": True}) == PcaTarget(whiten=True)
    assert read.validate_python({"kind": "hog", "cells": [1, 2]}) == HogTarget(cells=(1, 2))
    with pytest.raises(ValidationError, match=r"'normalised_pixels'.*'pixels'.*'pca'.*'hog'"):
        read.validate_python({"kind": "dvae"})


def training_patches(number: int = 80, channels: int = 2, voxels: int = 6, seed: int = 3) -> Tensor:
    """Patches that vary more in some directions than in others."""
    noise = torch.randn(number, channels * voxels, generator=generator(seed))
    mixing = torch.randn(channels * voxels, channels * voxels, generator=generator(seed + 1))
    return (noise @ mixing + torch.arange(channels * voxels)).reshape(number, channels, voxels)


@given(st.integers(0, 2**16), st.booleans(), st.integers(1, 3), st.integers(1, 5))
def test_all_components_bring_back_the_patches(seed: int, whiten: bool, channels: int, voxels: int) -> None:
    number = channels * voxels
    patches = training_patches(40, channels, voxels, seed)
    basis = fit_pca(patches, everything(patches), number)
    batch = patches.reshape(2, 20, channels, voxels)
    target = make_target(batch, everything(batch), PcaTarget(num_components=number, whiten=whiten), basis)
    assert target.counted.all()
    assert tuple(target.values.shape[2:]) == target_shape(PcaTarget(num_components=number), channels, (voxels,))
    torch.testing.assert_close(from_pca(target.values * target.std + target.mean, basis, channels), batch, rtol=1e-4, atol=1e-3)


def test_the_components_are_those_of_the_singular_value_decomposition() -> None:
    patches = training_patches()
    basis = fit_pca(patches, everything(patches), 5)
    flat = patches.flatten(1).double().numpy()
    _, sizes, rows = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(basis.mean.numpy(), flat.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(basis.scale.numpy(), sizes[:5] / math.sqrt(len(flat) - 1), rtol=1e-9)
    np.testing.assert_allclose(np.abs((basis.components.numpy() * rows[:5]).sum(axis=1)), 1, rtol=1e-9)
    assert basis.components.dtype == torch.float64


def test_whitened_coefficients_of_the_training_patches_are_uncorrelated_with_variance_one() -> None:
    patches = training_patches()
    basis = fit_pca(patches, everything(patches), 5)
    values = make_target(patches[None], everything(patches[None]), PcaTarget(num_components=5, whiten=True), basis).values[0, :, 0]
    torch.testing.assert_close(torch.cov(values.t()), torch.eye(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(values.mean(dim=0), torch.zeros(5), rtol=0, atol=1e-5)


@given(st.integers(0, 2**16))
def test_a_basis_and_its_signs_hang_neither_on_the_order_of_the_patches_nor_on_their_side(seed: int) -> None:
    patches = training_patches(seed=seed)
    basis = fit_pca(patches, everything(patches), 3)
    for others in (patches[torch.randperm(len(patches), generator=generator(seed))], -patches):
        torch.testing.assert_close(fit_pca(others, everything(others), 3).components, basis.components, rtol=0, atol=1e-6)
    largest = basis.components.abs().argmax(dim=1)
    assert (basis.components[torch.arange(3), largest] > 0).all()


def test_only_whole_patches_have_coefficients_and_the_others_are_counted() -> None:
    patches = training_patches()
    counted = everything(patches)
    counted[:, 1, 2] = torch.arange(len(patches)) % 4 != 0
    counted[8] = False
    basis = fit_pca(torch.where(counted, patches, torch.nan), counted, 3)
    whole = patches[counted.flatten(1).all(dim=1)]
    assert torch.equal(basis.components, fit_pca(whole, everything(whole), 3).components)
    target = make_target(patches[None, :12], counted[None, :12], PcaTarget(num_components=3), basis)
    assert target.counted[0].flatten(1).all(dim=1).tolist() == [index % 4 != 0 for index in range(12)]
    assert int(target.num_partial) == 2, "a patch of which nothing counts is not one of them"
    assert int(target.num_flat) == 0


def test_a_basis_that_cannot_be_fitted_is_refused_in_words() -> None:
    patches = training_patches(10)
    counted = everything(patches)
    counted[:6, 0, 0] = False
    with pytest.raises(ValueError, match="4 of 10 training patches are wholly counted and 4 components need at least 5; give more patches"):
        fit_pca(patches, counted, 4)
    with pytest.raises(ValueError, match="num_components=13 is more than the 12 elements of a patch; use at most as many"):
        fit_pca(patches, counted, 13)
    line = patches[:1] * torch.arange(10.0)[:, None, None]
    with pytest.raises(ValueError, match="the 10 training patches vary in 1 directions only and num_components=2; use fewer components"):
        fit_pca(line, everything(line), 2)


def test_a_basis_that_is_missing_or_of_other_patches_is_refused_in_words() -> None:
    patches = training_patches()
    with pytest.raises(ValueError, match=r"target\.kind=pca needs a basis and got none; fit one to training patches with fit_pca"):
        make_target(patches[None], everything(patches[None]), PcaTarget(num_components=3))
    with pytest.raises(ValueError, match=r"the PCA basis has \(components, elements\) \(4, 12\) and .* want \(3, 12\); fit it anew"):
        make_target(patches[None], everything(patches[None]), PcaTarget(num_components=3), fit_pca(patches, everything(patches), 4))


def test_a_basis_goes_to_a_device_whole() -> None:
    moved = fit_pca(training_patches(), everything(training_patches()), 3).to("meta")
    assert {part.device.type for part in (moved.mean, moved.components, moved.scale)} == {"meta"}


@pytest.mark.parametrize("patch", [(4,), (4, 3), (2, 4, 2)])
def test_the_shape_of_a_target_is_known_beforehand(patch: tuple[int, ...]) -> None:
    voxels = math.prod(patch)
    patches = torch.randn(1, 3, 2, voxels, generator=generator(0))
    for settings in (PixelTarget(), NormalisedPixelTarget(), NormalisedPixelTarget(over="channel")):
        assert tuple(make_target(patches, everything(patches), settings).values.shape[2:]) == target_shape(settings, 2, patch)
    assert target_shape(PcaTarget(num_components=2 * voxels), 2, patch) == (1, 2 * voxels)
    with pytest.raises(ValueError, match=rf"target\.num_components={2 * voxels + 1} is more than the {2 * voxels} elements of a patch"):
        target_shape(PcaTarget(num_components=2 * voxels + 1), 2, patch)
