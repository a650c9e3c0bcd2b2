"""Every parameter is in one group with its decay and rate; the schedule ends where it says."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mae_core.optim import OptimSettings, learning_rate, lr_factor, make_optimiser, set_lr
from tests.synthetic_batches import model_of, settings_of


def groups_by_name(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, list[dict]]:
    return {
        name: [group for group in optimiser.param_groups if any(part is weight for part in group["params"])]
        for name, weight in model.named_parameters()
    }


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    model = model_of(settings_of((4, 4)))
    model.encoder.embed.bias.requires_grad_(requires_grad=False)
    found = groups_by_name(model, make_optimiser(model, OptimSettings(), 1e-3))
    assert {name: len(groups) for name, groups in found.items() if len(groups) != 1} == {"encoder.embed.bias": 0}


def test_matrices_decay_and_biases_norms_and_tokens_do_not() -> None:
    model = model_of(settings_of((4, 4)))
    found = groups_by_name(model, make_optimiser(model, OptimSettings(weight_decay=0.07), 1e-3))
    decays = {name for name, (group,) in found.items() if group["weight_decay"] == 0.07}
    rests = {name for name, (group,) in found.items() if group["weight_decay"] == 0}
    assert decays | rests == set(found)
    assert {name for name in found if name.endswith(("bias", "_token")) or "norm" in name} == rests
    assert "encoder.embed.weight" in decays
    assert "decoder.mask_token" in rests
    assert "encoder.class_token" in rests


def test_rates_fall_with_the_layer() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    optimiser = make_optimiser(model, OptimSettings(), 0.1, lambda name: int(name.split(".")[0]), 0.5)
    found = groups_by_name(model, optimiser)
    for name, (group,) in found.items():
        assert group["lr_scale"] == 0.5 ** (3 - int(name[0]))
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])
    set_lr(optimiser, 0.02)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.02 * g["lr_scale"] for g in optimiser.param_groups])
    assert optimiser.param_groups[-1]["lr"] == 0.02, "the last group is the one whose rate is reported"


def test_without_layers_all_have_the_same_rate() -> None:
    optimiser = make_optimiser(model_of(settings_of((4,))), OptimSettings(betas=(0.8, 0.9)), 0.1, None, 0.5)
    assert {group["lr_scale"] for group in optimiser.param_groups} == {1.0}
    assert {group["betas"] for group in optimiser.param_groups} == {(0.8, 0.9)}


@given(st.integers(1, 400), st.floats(0, 0.9), st.floats(0, 1))
def test_the_schedule_rises_peaks_and_ends_at_the_minimum(num_steps: int, warmup: float, low: float) -> None:
    settings = OptimSettings(warmup_fraction=warmup, min_lr_fraction=low)
    rise = round(warmup * num_steps)
    factors = [lr_factor(step, num_steps, settings) for step in range(num_steps)]
    assert all(0 < factor <= 1 or (step == num_steps - 1 and factor == low) for step, factor in enumerate(factors))
    assert factors[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    assert max(factors) == 1
    if num_steps - rise >= 2:
        assert factors[-1] == low, "exactly"
    fall = factors[rise:]
    assert all(before >= after for before, after in pairwise(fall))


def test_the_schedule_has_no_jump() -> None:
    settings = OptimSettings(warmup_fraction=0.1, min_lr_fraction=0.1)
    factors = [lr_factor(step, 1000, settings) for step in range(1000)]
    steps = [abs(after - before) for before, after in pairwise(factors)]
    assert max(steps[:99]) == pytest.approx(0.01)
    assert max(steps[99:]) < 0.9 * math.pi / 2 / 899 * 1.01


def test_the_middle_of_the_cosine_is_half_way() -> None:
    assert lr_factor(50, 101, OptimSettings(warmup_fraction=0, min_lr_fraction=0.2)) == pytest.approx(0.6)


@pytest.mark.parametrize(("batch", "rate"), [(256, 1.5e-4), (4096, 2.4e-3), (64, 3.75e-5)])
def test_the_rate_grows_with_the_global_batch(batch: int, rate: float) -> None:
    assert learning_rate(OptimSettings(), batch) == pytest.approx(rate)


def test_defaults_are_the_papers() -> None:
    settings = OptimSettings()
    assert (settings.base_lr, settings.betas, settings.weight_decay) == (1.5e-4, (0.9, 0.95), 0.05)
    assert settings.warmup_fraction == 40 / 800
