"""One class of tests per role: whoever adds a way of hiding, a target, an encoder or a segmenter subclasses it and passes.

A subclass in a test file sets the attributes that are named first; pytest then collects the tests below under its name.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mae_core.masking import AnyHiding, HidingPlan, Sample, hide
from mae_core.nd import patchify, take, token_grid, token_valid, unpatchify
from mae_core.targets import PcaBasis, Target, TargetSettings, make_target
from tests.synthetic_batches import generator


def shown_set(plan: HidingPlan, index: int) -> set[int]:
    """Token numbers that a sample's encoder sees."""
    return set(plan.visible[index][plan.visible_used[index]].tolist())


def hidden_set(plan: HidingPlan, index: int) -> set[int]:
    """Token numbers that are to be predicted for a sample."""
    return set(plan.hidden[index][plan.hidden_used[index]].tolist())


class HidingContract:
    """What every way of hiding keeps."""

    settings: AnyHiding

    @staticmethod
    def grid_of(length: int) -> tuple[int, ...]:
        return (1, length)

    def plan(self, valid: Tensor, seed: int = 0) -> HidingPlan:
        name = torch.arange(len(valid))
        return hide(valid, self.grid_of(valid.shape[1]), self.settings, seed, Sample(name, name + 50, name * 0))

    @pytest.mark.parametrize("length", [1, 2, 5, 36, 100])
    @pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
    def test_shown_and_hidden_partition_the_valid_tokens(self, length: int, share: float) -> None:
        valid = torch.rand(6, length, generator=generator(length)) < torch.linspace(share, 1, 6)[:, None]
        plan = self.plan(valid)
        for index in range(len(valid)):
            shown, hidden = shown_set(plan, index), hidden_set(plan, index)
            assert not shown & hidden
            assert shown | hidden == set(torch.nonzero(valid[index]).flatten().tolist())
            assert len(shown) == int(plan.visible_used[index].sum()), "no token twice"
            assert len(hidden) == int(plan.hidden_used[index].sum()), "no token twice"

    def test_slots_do_not_depend_on_what_is_valid(self) -> None:
        valid = torch.rand(4, 30, generator=generator(0)) < 0.5
        some, every = self.plan(valid), self.plan(torch.ones_like(valid))
        assert some.visible.shape == every.visible.shape
        assert some.hidden.shape == every.hidden.shape
        assert every.full
        assert not some.full

    def test_token_numbers_are_in_range_in_every_slot(self) -> None:
        valid = torch.arange(12)[None] < torch.arange(13)[:, None]
        plan = self.plan(valid)
        for ids in (plan.visible, plan.hidden):
            assert ids.min() >= 0
            assert ids.max() < 12

    def test_a_sample_with_two_tokens_shows_one_and_hides_one(self) -> None:
        valid = torch.zeros(1, 40, dtype=torch.bool)
        valid[0, [3, 31]] = True
        plan = self.plan(valid)
        assert len(shown_set(plan, 0)) == len(hidden_set(plan, 0)) == 1

    def test_the_same_name_gives_the_same_set(self) -> None:
        valid = torch.ones(3, 50, dtype=torch.bool)
        assert torch.equal(self.plan(valid).hidden, self.plan(valid).hidden)
        assert not torch.equal(self.plan(valid).hidden, self.plan(valid, seed=1).hidden)


class TargetContract:
    """What every target keeps."""

    settings: TargetSettings

    def patches(self) -> tuple[Tensor, Tensor]:
        patches = 3 + 2 * torch.randn(2, 5, 3, 16, generator=generator(1))
        return patches, torch.rand(2, 5, 3, 16, generator=generator(2)) < 0.7

    def basis(self, patches: Tensor) -> PcaBasis | None:
        """Of the targets that need one."""
        return None

    def make(self, patches: Tensor, counted: Tensor) -> Target:
        return make_target(patches, counted, self.settings, self.basis(patches))

    def before_scaling(self, patches: Tensor) -> Tensor:
        """What `values * std + mean` must give where it counts."""
        return patches

    def may_count(self, counted: Tensor) -> Tensor:
        """Elements of the target that are made of elements that count alone."""
        return counted

    @pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
    def test_what_does_not_count_touches_nothing(self, rubbish: float) -> None:
        patches, counted = self.patches()
        clean = self.make(patches, counted)
        dirty = self.make(torch.where(counted, patches, rubbish), counted)
        for name in ("values", "counted", "mean", "std", "num_flat", "num_partial"):
            assert torch.equal(getattr(clean, name), getattr(dirty, name)), name

    def test_values_are_finite_fp32_and_zero_where_nothing_counts(self) -> None:
        patches, counted = self.patches()
        counted[1, 2] = False
        target = self.make(patches.bfloat16(), counted)
        assert target.values.dtype == torch.float32
        assert target.values.isfinite().all()
        assert not target.values[~target.counted].any()

    def test_nothing_counts_that_was_not_to_count(self) -> None:
        patches, counted = self.patches()
        assert not (self.make(patches, counted).counted & ~self.may_count(counted)).any()

    def test_mean_and_std_bring_it_back_to_input_units(self) -> None:
        patches, counted = self.patches()
        target = self.make(patches, counted)
        back = target.values * target.std + target.mean
        assert target.counted.any()
        torch.testing.assert_close(back[target.counted], self.before_scaling(patches)[target.counted], rtol=1e-5, atol=1e-5)

    def test_a_patch_has_its_target_whatever_is_beside_it(self) -> None:
        patches, counted = self.patches()
        whole = self.make(patches, counted).values
        alone = self.make(patches[1:, 3:4], counted[1:, 3:4]).values
        torch.testing.assert_close(alone[0, 0], whole[1, 3], rtol=0, atol=0)

    def test_neighbouring_numbers_of_twelve_bits_stay_apart(self) -> None:
        stored = torch.full((1, 1, 1, 16), 4095.0)
        stored[..., ::2] = 4094.0
        with torch.autocast("cpu", torch.bfloat16):
            values = self.make(stored, torch.ones_like(stored, dtype=torch.bool)).values
        assert len(values.unique()) == 2


class EncoderContract:
    """What every encoder keeps; `build` gives one in evaluation mode."""

    space: tuple[int, ...]
    patch: tuple[int, ...]
    channels = ("red", "green", "blue")

    def build(self) -> nn.Module:
        raise NotImplementedError

    def some(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Patches of two samples, numbers of the shown tokens, and the grid."""
        grid = token_grid(self.space, self.patch)
        pixels = torch.randn(2, len(self.channels), *self.space, generator=generator(3))
        order = torch.stack([torch.randperm(math.prod(grid), generator=generator(seed)) for seed in (4, 5)])
        return patchify(pixels, self.patch), order[:, :5], grid

    @torch.no_grad()
    def test_hidden_pixels_change_no_visible_output(self) -> None:
        patches, ids, grid = self.some()
        encoder = self.build()
        before = encoder(take(patches, ids), ids, grid)
        hidden = torch.ones(patches.shape[:2], dtype=torch.bool).scatter(1, ids, value=False)
        changed = torch.where(hidden[..., None, None], torch.nan, patches)
        pixels = unpatchify(changed, grid, self.patch)
        assert pixels.isnan().any()
        assert torch.equal(encoder(take(patchify(pixels, self.patch), ids), ids, grid), before), "bit for bit"

    @torch.no_grad()
    def test_one_feature_per_token_behind_the_class_token(self) -> None:
        patches, ids, grid = self.some()
        features = self.build()(take(patches, ids), ids, grid)
        assert features.shape[:2] == (2, 6)
        assert features.isfinite().all()

    @torch.no_grad()
    def test_tokens_in_another_order_have_the_same_features(self) -> None:
        patches, ids, grid = self.some()
        encoder, order = self.build(), torch.tensor([3, 0, 4, 2, 1])
        there = encoder(take(patches, ids), ids, grid)
        mixed = encoder(take(patches, ids[:, order]), ids[:, order], grid)
        torch.testing.assert_close(mixed[:, 1:], there[:, 1:][:, order], rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_a_token_knows_its_place(self) -> None:
        patches, ids, grid = self.some()
        encoder = self.build()
        features = [encoder(take(patches, ids), places, grid) for places in (ids, ids.roll(1, dims=1))]
        assert not torch.allclose(*features, atol=1e-3)

    @torch.no_grad()
    def test_slots_that_are_not_used_change_nothing(self) -> None:
        patches, ids, grid = self.some()
        encoder = self.build()
        used = torch.tensor([[True] * 5, [True, False, True, False, False]])
        both = encoder(take(patches, ids), ids, grid, used)
        alone = encoder(take(patches, ids)[1:, [0, 2]], ids[1:, [0, 2]], grid)
        torch.testing.assert_close(both[1:, [0, 1, 3]], alone, rtol=0, atol=1e-5)
        full = encoder(take(patches, ids)[:1], ids[:1], grid)
        torch.testing.assert_close(both[:1], full, rtol=0, atol=1e-5)
        others = torch.where(used[..., None, None], take(patches, ids), 1e3)
        assert torch.equal(encoder(others, ids, grid, used)[1, [0, 1, 3]], both[1, [0, 1, 3]])

    @torch.no_grad()
    def test_a_sample_without_any_token_is_finite(self) -> None:
        patches, ids, grid = self.some()
        used = torch.tensor([[True] * 5, [False] * 5])
        assert self.build()(take(patches, ids), ids, grid, used).isfinite().all()

    @torch.no_grad()
    def test_named_channels_in_any_order(self) -> None:
        patches, ids, grid = self.some()
        encoder, shown = self.build(), take(patches, ids)
        mixed = encoder(shown[:, :, [2, 0, 1]], ids, grid, None, [self.channels[index] for index in (2, 0, 1)])
        torch.testing.assert_close(mixed, encoder(shown, ids, grid), rtol=0, atol=2e-6)

    @torch.no_grad()
    def test_a_missing_channel_is_not_in_the_sum(self) -> None:
        patches, ids, grid = self.some()
        encoder, shown = self.build(), take(patches, ids)
        without = encoder(shown[:, :, [0, 2]], ids, grid, None, [self.channels[0], self.channels[2]])
        zero = shown.clone()
        zero[:, :, 1] = 0
        torch.testing.assert_close(without, encoder(zero, ids, grid), rtol=0, atol=2e-6)
        assert not torch.allclose(without, encoder(shown, ids, grid), atol=1e-3)

    def test_an_unknown_channel_is_refused_by_name(self) -> None:
        patches, ids, grid = self.some()
        with pytest.raises(ValueError, match=r"channels \['B99'\] are not known to this encoder; it knows \['red', 'green', 'blue'\]"):
            self.build()(take(patches, ids)[:, :, :2], ids, grid, None, ["red", "B99"])


class SegmenterContract:
    """What every segmenter keeps; `build` gives one in evaluation mode."""

    space: tuple[int, ...]
    patch: tuple[int, ...]
    num_channels = 3
    num_classes = 4

    def build(self) -> nn.Module:
        raise NotImplementedError

    def some(self) -> tuple[Tensor, Tensor]:
        pixels = torch.randn(2, self.num_channels, *self.space, generator=generator(6))
        return pixels, torch.ones(2, *self.space, dtype=torch.bool)

    @torch.no_grad()
    def test_a_score_for_every_class_and_voxel(self) -> None:
        scores = self.build()(*self.some())
        assert scores.shape == (2, self.num_classes, *self.space)
        assert scores.isfinite().all()

    @torch.no_grad()
    def test_any_crop_that_is_a_multiple_of_the_patch(self) -> None:
        pixels, known = self.some()
        larger = torch.cat([pixels, pixels], dim=-1), torch.cat([known, known], dim=-1)
        assert self.build()(*larger).shape[2:] == larger[1].shape[1:]

    @torch.no_grad()
    def test_a_sample_has_its_scores_whatever_is_beside_it(self) -> None:
        pixels, known = self.some()
        model = self.build()
        torch.testing.assert_close(model(pixels, known)[1:], model(pixels[1:], known[1:]), rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_a_patch_without_any_value_is_seen_by_no_other(self) -> None:
        pixels, known = self.some()
        model = self.build()
        features = []
        model.encoder.norm.register_forward_hook(lambda module, inputs, output: features.append(output))
        first = tuple(slice(0, size) for size in self.patch)
        known[(slice(None), *first)] = False
        for fill in (0.0, 9.0):
            pixels[(slice(None), slice(None), *first)] = fill
            model(pixels, known)
        used = token_valid(known, self.patch, 0.0)
        kept = torch.cat([torch.ones(2, 1, dtype=torch.bool), used], dim=1)
        assert not used.all()
        assert torch.equal(features[0][kept], features[1][kept])

    @torch.no_grad()
    def test_nothing_known_at_all_is_finite(self) -> None:
        pixels, known = self.some()
        assert self.build()(pixels * 0, known & False).isfinite().all()

    def test_every_parameter_gets_a_gradient(self) -> None:
        model = self.build()
        model(*self.some()).square().sum().backward()
        without = [name for name, weight in model.named_parameters() if weight.grad is None]
        assert without == []
