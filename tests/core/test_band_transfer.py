"""Weights of common bands survive any way through other band sets, and what became of every tensor is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mae_core.band_transfer import band_rows, transfer_bands
from mae_core.bands import Band
from mae_core.context import ContextSettings
from mae_core.encoders import AnyEncoder, AnyEncoderSettings, build_encoder
from mae_core.positions import PositionSettings
from mae_core.sparse_conv import SparseConvSettings
from mae_core.vit import EncoderSettings, all_tokens
from mae_core.weights import Transfer, WeightsError
from tests.synthetic_batches import generator, one_thread

__all__ = ["one_thread"]

WAVES = {"B01": 443.0, "B02": 492.0, "B03": 560.0, "B04": 665.0, "B05": 704.0, "B06": 741.0, "B07": 783.0, "B08": 833.0, "B8A": 865.0}
WAVES |= {"B09": 945.0, "B11": 1614.0, "B12": 2202.0}
TEN = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
SIX = ("B04", "B02", "B03", "B8A", "B12", "B11")
TWELVE = tuple(reversed(WAVES))
PLAIN = EncoderSettings(preset="nano", patch=(6, 6), mlp_ratio=2)
KINDS: dict[str, AnyEncoderSettings] = {
    "plain": PLAIN,
    "registers and places": PLAIN.model_copy(update={"num_registers": 2, "positions": PositionSettings(kind="learned", grid=(2, 2))}),
    "native": PLAIN.model_copy(update={"footprints": {"B11": 2, "B12": 2, "B8A": 2}}),
    "convolutions": SparseConvSettings(preset="nano", patch=(6, 6)),
}
each_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())


def encoder_of(settings: AnyEncoderSettings, names: tuple[str, ...], seed: int = 0) -> AnyEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_encoder(settings, names).eval()


def bands(names: tuple[str, ...]) -> tuple[Band, ...]:
    return tuple(Band(name, WAVES.get(name)) for name in names)


def moved(source: AnyEncoder, target: AnyEncoder, new: Any = "nearest") -> Transfer:
    same = {name: name for name in target.channels if name in source.channels}
    return transfer_bands(source, target, same, (bands(source.channels), bands(target.channels)), new)


def kernel(encoder: AnyEncoder, name: str) -> Tensor:
    tensor, row = band_rows(encoder)[name]
    return encoder.state_dict()[tensor][row]


@torch.no_grad()
def features(encoder: AnyEncoder, pixels: Tensor, names: tuple[str, ...]) -> Tensor:
    """Of these bands alone; `pixels` has all twelve."""
    chosen = torch.zeros(len(pixels), len(encoder.channels), *pixels.shape[2:])
    for row, name in enumerate(encoder.channels):
        if name in names:
            chosen[:, row] = pixels[:, TWELVE.index(name)]
    every = all_tokens(encoder.layout(pixels.shape[2:]), chosen)
    rows = [encoder.channels.index(name) for name in sorted(names)]
    return encoder(every.patches[:, :, rows], every.ids, every.layout.grid, channels=sorted(names))


@each_kind
@pytest.mark.parametrize("new", ["nearest", "mean", "zero", "random"])
def test_ten_to_six_to_twelve_bands_and_back_keeps_what_is_common(settings: AnyEncoderSettings, new: str) -> None:
    ten, six = encoder_of(settings, TEN, 1), encoder_of(settings, SIX, 2)
    twelve, back = encoder_of(settings, TWELVE, 3), encoder_of(settings, TEN, 4)
    moved(ten, six, new)
    moved(six, twelve, new)
    moved(twelve, back, new)
    for name in SIX:
        for encoder in (six, twelve, back):
            assert torch.equal(kernel(encoder, name), kernel(ten, name)), name
    embeds = {tensor for tensor, _ in band_rows(ten).values()}
    for name, value in ten.state_dict().items():
        if name not in embeds:
            assert torch.equal(back.state_dict()[name], value), name
    pixels = torch.randn(2, 12, 12, 12, generator=generator(0))
    wanted = features(ten, pixels, SIX)
    for encoder in (six, twelve, back):
        assert torch.equal(features(encoder, pixels, SIX), wanted)


@each_kind
def test_bands_in_another_order_are_the_same_encoder(settings: AnyEncoderSettings) -> None:
    one, two = encoder_of(settings, TEN, 1), encoder_of(settings, tuple(reversed(TEN)), 2)
    transfer = moved(one, two)
    assert {move.kind for move in transfer.moves} == {"copied"}
    assert torch.equal(features(one, pixels := torch.randn(1, 12, 12, 12, generator=generator(1)), TEN), features(two, pixels, TEN))


def test_new_bands_that_begin_with_zeros_change_nothing() -> None:
    ten, twelve = encoder_of(PLAIN, TEN, 1), encoder_of(PLAIN, TWELVE, 2)
    transfer = moved(ten, twelve, "zero")
    pixels = torch.randn(2, 12, 12, 12, generator=generator(2))
    torch.testing.assert_close(features(twelve, pixels, TWELVE), features(ten, pixels, TEN))
    assert [move.target for move in transfer.moves if move.note == "zeros"] == ["embed.weight[B09]", "embed.weight[B01]"]


def test_a_new_band_takes_the_nearest_weights_divided_among_those_that_carry_them() -> None:
    six = encoder_of(PLAIN, SIX, 1)
    twelve = encoder_of(PLAIN, TWELVE, 2)
    moved(six, twelve)
    assert torch.equal(kernel(twelve, "B01"), kernel(six, "B02") / 2), "B01 and B02"
    assert torch.equal(kernel(twelve, "B08"), kernel(six, "B8A") / 4), "B07, B08 and B09 beside B8A"
    assert torch.equal(kernel(twelve, "B05"), kernel(six, "B04") / 3), "B05 and B06 beside B04"
    landsat = encoder_of(PLAIN, ("B02", "red"), 3)
    same = {"B02": "B02"}
    transfer_bands(six, landsat, same, (bands(SIX), (Band("B02", 492.0), Band("red", 655.0))), "nearest")
    assert torch.equal(kernel(landsat, "red"), kernel(six, "B04")), "alone, whole"


def test_the_mean_is_that_over_all_bands_of_as_many_voxels() -> None:
    six, twelve = encoder_of(PLAIN, SIX, 1), encoder_of(PLAIN, TWELVE, 2)
    moved(six, twelve, "mean")
    torch.testing.assert_close(kernel(twelve, "B09"), torch.stack([kernel(six, name) for name in SIX]).mean(dim=0))


def test_bands_matched_under_another_name_are_copied_exactly() -> None:
    six, other = encoder_of(PLAIN, SIX, 1), encoder_of(PLAIN, ("OLI_B4", "VV"), 2)
    before = kernel(other, "VV").clone()
    transfer = transfer_bands(six, other, {"OLI_B4": "B04"}, (bands(SIX), (Band("OLI_B4", 655.0), Band("VV"))), "nearest")
    assert torch.equal(kernel(other, "OLI_B4"), kernel(six, "B04"))
    assert torch.equal(kernel(other, "VV"), before)
    rows = transfer.table()
    assert ("copied", "embed.weight[B04]", "embed.weight[OLI_B4]", "1", "") in rows
    assert ("new", "", "embed.weight[VV]", "1", "random: no band to take its nearest from") in rows
    assert ("dropped", "embed.weight[B02]", "", "1", "the new encoder has no such band") in rows
    assert sum(int(number) for kind, *_, number, _ in rows if kind == "dropped") == 5


def test_a_band_at_another_resolution_is_another_band() -> None:
    coarse = PLAIN.model_copy(update={"footprints": {"B11": 2}})
    one, two = encoder_of(coarse, ("B04", "B11"), 1), encoder_of(PLAIN, ("B04", "B11"), 2)
    before = kernel(two, "B11").clone()
    transfer = moved(one, two, "random")
    assert torch.equal(kernel(two, "B04"), kernel(one, "B04"))
    assert torch.equal(kernel(two, "B11"), before)
    assert ("dropped", "embed.weights.f2[B11]", "", "1", "the new encoder has no such band") in transfer.table()


def test_codes_of_groups_follow_their_bands() -> None:
    named = (("B02", "B03", "B04"), ("B8A",), ("B11", "B12"))
    one = encoder_of(PLAIN.model_copy(update={"groups": named}), ("B02", "B03", "B04", "B8A", "B11", "B12"), 1)
    two = encoder_of(PLAIN.model_copy(update={"groups": (("B12",), ("B01",), ("B03", "B02"))}), ("B01", "B02", "B03", "B12"), 2)
    before = two.state_dict()["places.group_token"].clone()
    transfer = moved(one, two, "random")
    found, source = two.state_dict()["places.group_token"], one.state_dict()["places.group_token"]
    assert torch.equal(found[0], source[2])
    assert torch.equal(found[1], before[1])
    assert torch.equal(found[2], source[0])
    assert ("dropped", "places.group_token[B8A]", "", "1", "the new encoder has no such group") in transfer.table()


def test_what_only_one_of_them_has_is_told() -> None:
    one = encoder_of(PLAIN.model_copy(update={"num_registers": 1}), SIX, 1)
    two = encoder_of(PLAIN.model_copy(update={"class_token": False, "context": ContextSettings(kinds=("resolution",))}), SIX, 2)
    kinds = {(move.kind, *(move.source or (move.target,))) for move in moved(one, two).moves if move.kind in ("new", "dropped")}
    assert {("dropped", "class_token"), ("dropped", "register_token")} <= kinds
    assert any(kind == "new" and name.startswith("context.") for kind, name in kinds)


def test_another_shape_is_refused_with_what_to_set() -> None:
    one = encoder_of(PLAIN, SIX)
    two = encoder_of(EncoderSettings(preset="nano", patch=(4, 4), mlp_ratio=4), SIX)
    with pytest.raises(
        WeightsError, match=r"(?s)patch is \(4, 4\) here and \(6, 6\) there; set model\.encoder\.patch=\[6, 6\]\n.*mlp_ratio=2"
    ):
        moved(one, two)


@pytest.mark.parametrize(("kind", "groups"), [("vit", ()), ("vit", "each"), ("sparse_conv", ())])
def test_an_encoder_of_one_sequence_gives_the_same_on_copies_of_a_scan(kind: str, groups: Any) -> None:
    """In three axes. Where every channel is a group of its own, no sum is shared and each has the weights whole."""
    sizes: dict[str, Any] = {"preset": "nano", "patch": (4, 4, 2)}
    settings: AnyEncoderSettings = SparseConvSettings(**sizes) if kind == "sparse_conv" else EncoderSettings(**sizes, groups=groups)
    names = ("FLAIR", "MR", "T1w", "T2w")
    pixels = torch.randn(2, 1, 8, 8, 4, generator=generator(3))
    for before in (("MR",), ("other",)):
        one, many = encoder_of(settings, before, 1), encoder_of(settings, names, 2)
        transfer = transfer_bands(one, many, {"MR": "MR"} if before == ("MR",) else {}, (bands(before), bands(names)), "copy")
        share = 1 if groups else 4
        assert torch.equal(kernel(many, "T2w"), kernel(one, before[0]) / share)
        assert {move.note for move in transfer.moves if move.kind == "borrowed"} == {f"copy, divided by {share}"}
        if groups:
            continue
        wanted = all_tokens(one.layout(pixels.shape[2:]), pixels)
        found = all_tokens(many.layout(pixels.shape[2:]), pixels.expand(-1, 4, -1, -1, -1))
        with torch.no_grad():
            torch.testing.assert_close(
                many(found.patches, found.ids, found.layout.grid), one(wanted.patches, wanted.ids, wanted.layout.grid), rtol=0, atol=1e-5
            )


def test_copies_are_of_one_channel() -> None:
    with pytest.raises(WeightsError, match=r"has 6 channels, B04, B02, .* and copy is for one of a single channel"):
        moved(encoder_of(PLAIN, SIX), encoder_of(PLAIN, TEN), "copy")
