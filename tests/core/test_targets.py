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

from mae_core.targets import NormalisedPixelTarget, PixelTarget, TargetSettings, make_target
from tests.contracts import TargetContract
from tests.synthetic_batches import generator, places


class TestPixelTarget(TargetContract):
    settings = PixelTarget()


class TestPatchTarget(TargetContract):
    settings = NormalisedPixelTarget()


class TestChannelTarget(TargetContract):
    settings = NormalisedPixelTarget(over="channel")


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
    with pytest.raises(ValidationError, match=r"'normalised_pixels'.*'pixels'"):
        read.validate_python({"kind": "hog"})
