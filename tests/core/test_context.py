"""What is told besides voxels: nothing known is nothing added, and what is dropped was never known, bit for bit."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch

from mae_core.context import Context, ContextEmbedding, ContextSettings, Kind, dropped, features, only_spacing
from mae_core.vit import Encoder, EncoderSettings
from tests.synthetic_batches import CHANNELS, generator, names

KINDS: tuple[Kind, ...] = get_args(Kind)
FIELDS = {"day_of_year": ("day_of_year",), "year": ("year",), "place": ("latitude", "longitude"), "resolution": ("resolution",)}


def facts(size: int = 3) -> Context:
    spacing = torch.tensor([[10.0, 20.0]]).expand(size, -1) * torch.arange(1, size + 1)[:, None]
    days = torch.linspace(1, 300, size)
    return Context(days, torch.full((size,), 2021.0), torch.linspace(-60, 60, size), torch.linspace(-170, 170, size), spacing, spacing)


def without(context: Context, kind: str) -> Context:
    return replace(context, **{name: torch.full_like(getattr(context, name), torch.nan) for name in FIELDS[kind]})


def embedding(*kinds: Kind) -> ContextEmbedding:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ContextEmbedding(ContextSettings(kinds=kinds or KINDS), 2, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_adds_its_own_linear_map(kind: Kind) -> None:
    layer = embedding()
    gone = layer(facts()) - layer(without(facts(), kind))
    torch.testing.assert_close(gone, layer.maps[kind](features(facts(), kind)), rtol=0, atol=1e-6)
    assert gone.abs().sum() > 0


def test_nothing_known_is_exactly_nothing() -> None:
    context = facts()
    for kind in KINDS:
        context = without(context, kind)
    assert not embedding()(context).any()


def test_an_encoder_without_context_is_one_that_is_told_nothing() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(EncoderSettings(preset="nano", patch=(4, 4), context=ContextSettings(kinds=KINDS)), CHANNELS).eval()
    patches, ids = torch.randn(2, 3, 3, 16, generator=generator(0)), torch.tensor([[0, 3, 2]] * 2)
    unknown = facts(2)
    for kind in KINDS:
        unknown = without(unknown, kind)
    with torch.no_grad():
        silent = encoder(patches, ids, (2, 2))
        assert torch.equal(encoder(patches, ids, (2, 2), None, None, unknown), silent)
        assert not torch.allclose(encoder(patches, ids, (2, 2), None, None, facts(2)), silent, atol=1e-4)


def test_every_parameter_gets_a_gradient_even_if_nothing_is_known() -> None:
    layer = embedding()
    layer(only_spacing(torch.ones(2, 2))).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in layer.parameters())


def test_dropping_is_by_name_and_is_as_if_it_had_never_been_known() -> None:
    settings = ContextSettings(kinds=KINDS, drop_fraction=0.5)
    context, sample = facts(64), names(64)
    once, again = (dropped(context, settings, 3, sample) for _ in range(2))
    order = torch.randperm(64, generator=generator(1))
    moved = Context(*(getattr(context, part.name)[order] for part in fields(context)))
    mixed = dropped(moved, settings, 3, sample.shuffled(order))
    for part in fields(context):
        one = getattr(once, part.name)
        assert torch.equal(one.isnan(), getattr(again, part.name).isnan())
        assert torch.equal(one[order].isnan(), getattr(mixed, part.name).isnan())
    for kind in KINDS:
        gone = getattr(once, FIELDS[kind][0]).reshape(64, -1).isnan().all(dim=1)
        assert 16 < int(gone.sum()) < 48
        whole = without(context, kind)
        layer = embedding(kind)
        assert torch.equal(layer(once)[gone], layer(whole)[gone])
        assert torch.equal(layer(once)[~gone], layer(context)[~gone])
    assert torch.equal(once.spacing, context.spacing), "positions in physical units still know it"


def test_nothing_is_dropped_that_is_not_to_be() -> None:
    context = facts()
    assert dropped(context, ContextSettings(kinds=KINDS, drop_fraction=0), 0, names(3)) is context
    assert dropped(context, ContextSettings(drop_fraction=0.5), 0, names(3)) is context


def test_the_year_ends_where_it_begins_and_the_earth_is_round() -> None:
    context = replace(facts(2), day_of_year=torch.tensor([1.0, 366.25]), longitude=torch.tensor([-180.0, 180.0]), latitude=torch.zeros(2))
    for kind in ("day_of_year", "place"):
        first, second = features(context, kind)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert features(context, "place").norm(dim=1).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(features(facts(1), "resolution"), torch.tensor([[math.log2(10), math.log2(20)]]))
