"""Errors equal the formulas written out; what does not count has neither error nor gradient, NaN included."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from mae_core.errors import ErrorSettings, channel_weights, elementwise_error
from tests.synthetic_batches import generator, one_thread

__all__ = ["one_thread"]

KINDS = get_args(ErrorSettings.model_fields["kind"].annotation)
each_kind = pytest.mark.parametrize("kind", KINDS)


def some(seed: int = 0, share: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, values, and what counts."""
    predicted, values = (2 * torch.randn(2, 3, 2, 5, generator=generator(seed + index)) for index in range(2))
    return predicted, values, torch.rand(2, 3, 2, 5, generator=generator(seed + 2)) >= share


def naive(difference: float, settings: ErrorSettings) -> float:
    if settings.kind == "l2":
        return difference**2
    if settings.kind == "l1":
        return abs(difference)
    return difference**2 / (2 * settings.beta) if abs(difference) < settings.beta else abs(difference) - settings.beta / 2


@given(st.integers(0, 2**16), st.sampled_from(KINDS), st.sampled_from([0.1, 1.0, 3.0]), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_error_is_the_written_formula(seed: int, kind: str, beta: float, share: float) -> None:
    settings = ErrorSettings(kind=kind, beta=beta)
    predicted, values, counted = some(seed, share)
    elements = zip(predicted.flatten().tolist(), values.flatten().tolist(), counted.flatten().tolist(), strict=True)
    wanted = torch.tensor([naive(there - here, settings) if inside else 0.0 for there, here, inside in elements])
    torch.testing.assert_close(elementwise_error(predicted, values, counted, settings).flatten(), wanted, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**16))
def test_the_square_is_the_one_of_the_model_bit_for_bit(seed: int) -> None:
    predicted, values, counted = some(seed)
    assert torch.equal(
        elementwise_error(predicted, values, counted, ErrorSettings()), torch.where(counted, predicted - values, 0.0).square()
    )


@each_kind
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
def test_what_does_not_count_has_neither_error_nor_gradient(kind: str, rubbish: float) -> None:
    settings = ErrorSettings(kind=kind)
    predicted, values, counted = some()
    found = []
    for dirty in ((predicted, values), tuple(torch.where(counted, part, rubbish) for part in (predicted, values))):
        leaf = dirty[0].clone().requires_grad_()
        error = elementwise_error(leaf, dirty[1], counted, settings)
        error.sum().backward()
        assert leaf.grad is not None
        assert not error[~counted].any()
        assert not leaf.grad[~counted].any()
        assert leaf.grad[counted].all()
        found.append((error.detach(), leaf.grad))
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*found, strict=True)), "bit for bit"


@each_kind
def test_predictions_are_made_fp32_before_the_subtraction(kind: str) -> None:
    predicted, values = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0 + 2**-12])
    with torch.autocast("cpu", torch.bfloat16):
        error = elementwise_error(predicted, values, torch.ones(1, dtype=torch.bool), ErrorSettings(kind=kind))
    assert error.dtype == torch.float32
    assert float(error) == naive(2**-12, ErrorSettings(kind=kind))


def test_weights_stand_in_the_order_of_the_channels_and_are_one_where_nothing_is_said() -> None:
    settings = ErrorSettings(channel_weights={"B08": 0.5, "B02": 0})
    weights = channel_weights(settings, ["B02", "B03", "B08"])
    assert weights.tolist() == [0.0, 1.0, 0.5]
    assert weights.dtype == torch.float32
    assert channel_weights(ErrorSettings(), ["T1w"]).tolist() == [1.0]


def test_weights_that_cannot_be_meant_are_refused_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"channel_weights name \['B99'\], which are not channels of these data; the channels are \['B02'\]"
    ):
        channel_weights(ErrorSettings(channel_weights={"B99": 2, "B02": 1}), ["B02"])
    with pytest.raises(
        ValueError, match=r"channel_weights are 0 for every channel of \['B02', 'B03'\]; let at least one weigh more than 0"
    ):
        channel_weights(ErrorSettings(channel_weights={"B02": 0, "B03": 0}), ["B02", "B03"])


@pytest.mark.parametrize("wrong", [{"channel_weights": {"B02": -1}}, {"channel_weights": {"B02": math.inf}}, {"beta": 0}, {"kind": "l3"}])
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ErrorSettings.model_validate(wrong)
