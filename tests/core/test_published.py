"""Published checkpoints: transformers' ViTMAE loses what we lose on the same hidden set, and names and orders lead back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from torch import Tensor, nn
from transformers import ViTMAEForPreTraining

from mae_core.mae import MaskedAutoencoder
from mae_core.masking import plan_from_hidden
from mae_core.positions import sincos_positions
from mae_core.published import encoder_settings, import_encoder, import_mae, recognise
from mae_core.targets import NormalisedPixelTarget, PixelTarget
from mae_core.vit import all_tokens
from mae_core.weights import WeightsError, read_tensors
from tests.synthetic_batches import generator, grids, model_of, one_thread, settings_of
from tests.synthetic_checkpoints import FOREIGN, facebook, reference
from tests.synthetic_volumes import REAL

__all__ = ["one_thread"]

NAMES = ("red", "green", "blue")
DECODER = ("decoder*", "mask_token")


@pytest.fixture(scope="module")
def theirs() -> ViTMAEForPreTraining:
    return reference()


def losses(theirs: ViTMAEForPreTraining, ours: MaskedAutoencoder, space: tuple[int, int], **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Their loss, ours, and the tokens that were hidden, for the same images."""
    channels = len(ours.encoder.channels)
    pixels = torch.randn(2, channels, *space, generator=generator(3))
    noise = torch.rand(2, space[0] * space[1] // 16, generator=generator(4))
    found = theirs(pixel_values=pixels, noise=noise, **more)
    hidden = found.mask.bool()
    counted, present = torch.ones(2, *space, dtype=torch.bool), torch.ones(2, channels, dtype=torch.bool)
    output = ours(pixels, counted, present, plan_from_hidden(hidden))
    return found.loss, output.error_sum.sum() / output.count.sum(), hidden


@pytest.mark.parametrize("layout", ["transformers", "facebook"])
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("channels", [3, 12])
def test_the_loss_is_theirs(channels: int, norm_pix: bool, layout: str) -> None:
    model = reference(channels, norm_pix)
    tensors = model.state_dict() if layout == "transformers" else facebook(model.state_dict())
    target = NormalisedPixelTarget() if norm_pix else PixelTarget()
    published = recognise(tensors)
    ours, transfer = import_mae(published, [f"c{number}" for number in range(channels)], target, (4, 4))
    transfer.complete()
    assert layout in published.layout.title
    with torch.no_grad():
        wanted, found, hidden = losses(model, ours, (16, 16))
    assert hidden.sum(dim=1).tolist() == [12, 12]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_are_theirs(theirs: ViTMAEForPreTraining) -> None:
    ours, _ = import_mae(recognise(theirs.state_dict()), NAMES, None, (4, 4))
    wanted, found, _ = losses(theirs, ours, (16, 16))
    wanted.backward()
    found.backward()
    grads = {name: weight.grad for name, weight in theirs.named_parameters() if weight.grad is not None}
    mine = {name: weight.grad for name, weight in ours.named_parameters() if weight.grad is not None}
    kernel = grads["vit.embeddings.patch_embeddings.projection.weight"].flatten(2).permute(1, 2, 0)
    rows = grads["decoder.decoder_pred.weight"].reshape(16, 3, 32).transpose(0, 1).reshape(48, 32)
    qkv = torch.cat([grads[f"vit.encoder.layer.2.attention.attention.{part}.weight"] for part in ("query", "key", "value")])
    for name, value in {
        "encoder.embed.weight": kernel,
        "encoder.class_token": grads["vit.embeddings.cls_token"],
        "encoder.blocks.2.attention.qkv.weight": qkv,
        "decoder.head.weight": rows,
        "decoder.mask_token": grads["decoder.mask_token"],
        "decoder.blocks.1.mlp.0.bias": grads["decoder.decoder_layers.1.intermediate.dense.bias"],
    }.items():
        assert value.abs().max() > 1e-4, name
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_images_that_are_not_square_lose_the_same_under_the_same_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers bends its square table for them (the decoder's along one line); here it is given the codes of the real grid.
    model = reference()
    ours, _ = import_mae(recognise(model.state_dict()), NAMES, None, (4, 4))

    def codes(dim: int) -> Tensor:
        return nn.functional.pad(sincos_positions((3, 6), dim, "reversed"), (0, 0, 1, 0))[None]

    monkeypatch.setattr(model.vit.embeddings, "interpolate_pos_encoding", lambda *_: codes(128))
    monkeypatch.setattr(model.decoder, "interpolate_pos_encoding", lambda *_: codes(32))
    with torch.no_grad():
        wanted, found, _ = losses(model, ours, (12, 24), interpolate_pos_encoding=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["ViTMAEModel", "facebook"])
def test_features_of_an_encoder_alone_are_theirs(theirs: ViTMAEForPreTraining, layout: str) -> None:
    tensors = {name.removeprefix("vit."): value for name, value in theirs.state_dict().items() if name.startswith("vit.")}
    published = recognise(tensors if layout == "ViTMAEModel" else facebook(theirs.state_dict()))
    assert published.has_decoder == (layout == "facebook")
    encoder, transfer = import_encoder(published, NAMES)
    transfer.complete(DECODER if layout == "facebook" else ())
    pixels = torch.randn(2, 3, 16, 16, generator=generator(0))
    everything = all_tokens(encoder.layout((16, 16)), pixels)
    with torch.no_grad():
        found = encoder(everything.patches, everything.ids, (4, 4))
        theirs.vit.config.mask_ratio = 0.0
        try:
            wanted = theirs.vit(pixels, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
        finally:
            theirs.vit.config.mask_ratio = 0.75
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def spelled_out(model: MaskedAutoencoder, grid: tuple[int, ...]) -> dict[str, Tensor]:
    """A model of ours under the names and in the orders of facebookresearch/mae, one element after the other."""
    state, patch, out = model.state_dict(), model.encoder.settings.patch, dict[str, Tensor]()
    channels, voxels, width = state["encoder.embed.weight"].shape
    kernel = torch.empty(width, channels, voxels)
    rows = torch.empty(voxels * channels, state["decoder.head.weight"].shape[1])
    bias = torch.empty(voxels * channels)
    for channel in range(channels):
        for voxel in range(voxels):
            kernel[:, channel, voxel] = state["encoder.embed.weight"][channel, voxel]
            rows[voxel * channels + channel] = state["decoder.head.weight"][channel * voxels + voxel]
            bias[voxel * channels + channel] = state["decoder.head.bias"][channel * voxels + voxel]
    out |= {"patch_embed.proj.weight": kernel.reshape(width, channels, *patch), "decoder_pred.weight": rows, "decoder_pred.bias": bias}
    layers = {"attention.qkv": "attn.qkv", "attention.out": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    for name, value in state.items():
        short = name.removeprefix("encoder.").replace("decoder.mask", "mask").replace("decoder.", "decoder_")
        short = short.replace("embed.bias", "embed.bias" if "decoder" in name else "patch_embed.proj.bias").replace(
            "class_token", "cls_token"
        )
        for old, new in layers.items():
            short = short.replace(old, new)
        if "embed.weight" not in short or "decoder" in short:
            out.setdefault(short, value)
    del out["decoder_head.weight"], out["decoder_head.bias"]
    for name, dim in (("pos_embed", width), ("decoder_pos_embed", rows.shape[1])):
        out[name] = torch.cat([torch.zeros(1, dim), sincos_positions(grid, dim, "reversed")])[None]
    return out


@effort(max_examples=8)
@given(case=grids(max_grid=3, max_patch=3))
def test_names_and_orders_lead_back_on_any_number_of_axes(case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    grid, patch = case
    model = model_of(settings_of(patch))
    tensors = spelled_out(model, grid)
    found, transfer = import_mae(recognise(tensors, grid=grid), NAMES, None, (None, 2))
    transfer.complete()
    wanted = model.state_dict()
    assert list(found.state_dict()) == list(wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())


def learned(theirs: ViTMAEForPreTraining, decoder: bool) -> dict[str, Tensor]:
    """Its tensors with positions that are no fixed codes, and one of the class token."""
    tensors = dict(theirs.state_dict())
    for number, name in enumerate(("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")[: 1 + decoder]):
        tensors[name] = 0.1 * torch.randn(tensors[name].shape, generator=generator(number))
    return tensors


def test_learned_positions_are_kept_and_the_class_token_keeps_its_own(theirs: ViTMAEForPreTraining) -> None:
    tensors = learned(theirs, decoder=False)
    table = tensors["vit.embeddings.position_embeddings"]
    encoder, transfer = import_encoder(recognise(tensors), NAMES)
    transfer.complete(DECODER)
    assert encoder.settings.positions.kind == "learned"
    assert encoder.settings.positions.grid == (4, 4)
    assert torch.equal(encoder.state_dict()["places.positions.table_token"], table[0, 1:])
    assert torch.equal(encoder.class_token, tensors["vit.embeddings.cls_token"] + table[:, :1])
    assert [move.target for move in transfer.moves if move.kind == "folded"] == ["class_token"]


def test_fixed_positions_are_told_and_do_not_become_weights(theirs: ViTMAEForPreTraining) -> None:
    tensors = dict(theirs.state_dict())
    name = "vit.embeddings.position_embeddings"
    encoder, transfer = import_encoder(recognise(tensors), NAMES)
    positions = encoder.settings.positions
    assert (positions.kind, positions.axis_order) == ("sincos", "reversed")
    assert [move.source for move in transfer.moves if move.kind == "computed"] == [(name,)]
    tensors[name] = torch.cat([tensors[name][:, :1], sincos_positions((4, 4), 128, "array")[None]], dim=1)
    assert import_encoder(recognise(tensors), NAMES)[0].settings.positions.axis_order == "array"
    tensors[name] = tensors[name] + 2e-4
    assert import_encoder(recognise(tensors), NAMES)[0].settings.positions.kind == "learned"


def test_learned_positions_of_both_halves_are_loaded_and_those_that_disagree_are_refused(theirs: ViTMAEForPreTraining) -> None:
    tensors = learned(theirs, decoder=True)
    with pytest.raises(WeightsError, match=r"decoder's positions cannot be ours.*its class token has a position; load the encoder alone"):
        import_mae(recognise(tensors), NAMES, None, (4, 4))
    tensors["decoder.decoder_pos_embed"][:, 0] = 0
    model, transfer = import_mae(recognise(tensors), NAMES, None, (4, 4))
    transfer.complete()
    with torch.no_grad():
        theirs_too = reference()
        theirs_too.load_state_dict(tensors)
        wanted, found, _ = losses(theirs_too, model, (16, 16))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(WeightsError, match="whose are learned, array: they are sincos, reversed; load the encoder alone"):
        import_mae(recognise(tensors | {"decoder.decoder_pos_embed": theirs.decoder.decoder_pos_embed.data}), NAMES, None, (4, 4))


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors whose names do not hold a part."""
    return {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda published: encoder_settings(published, NAMES[:2]), "takes 3 channels and 2 are named: .*name each, in its order"),
        (lambda published: encoder_settings(published, NAMES, 8), r"width 128, 4 blocks and 8 heads.*ours are.*nano \(128, 4, 4\), tiny"),
        (lambda published: import_mae(published, NAMES), "a decoder of width 32 is not the usual one, so its heads are not known; give"),
        (
            lambda published: encoder_settings(recognise(without(published.tensors, "layer.3.")), NAMES),
            r"width 128, 3 blocks and any number of heads, which is no shape of ours",
        ),
        (
            lambda published: import_encoder(recognise(without(published.tensors, "layer.2.output.dense.bias")), NAMES),
            r"has no tensor vit\.encoder\.layer\.2\.output\.dense\.bias; give the whole checkpoint",
        ),
        (
            lambda published: import_mae(recognise(without(published.tensors, "decoder.")), NAMES),
            r"has no tensor decoder\.decoder_embed\.bias",
        ),
        (lambda published: encoder_settings(recognise(published.tensors, grid=(2, 9)), NAMES), r"16 positions on 2 axes.*grid \(2, 9\)"),
        (lambda published: recognise({"a": torch.ones(1)}, "x.pth"), r"x\.pth is of no layout that is read: it holds 1 tensors \(a"),
        (lambda published: recognise(published.tensors | {"b": torch.tensor(float("nan"))}), "values that are not finite in b"),
    ],
)
def test_what_cannot_be_ours_is_refused_with_words(theirs: ViTMAEForPreTraining, change: Any, words: str) -> None:
    with pytest.raises(WeightsError, match=f"(?s){words}"):
        change(recognise(theirs.state_dict()))


def test_a_decoder_whose_mlp_is_of_another_share_is_refused() -> None:
    with pytest.raises(WeightsError, match="MLP is 32 wide and the encoder's share of 2 would be 64; ours have one share"):
        import_mae(recognise(reference(decoder_intermediate_size=32).state_dict()), NAMES, None, (4, 4))


def test_a_decoder_that_predicts_something_else_is_refused(theirs: ViTMAEForPreTraining) -> None:
    tensors = dict(theirs.state_dict())
    tensors["decoder.decoder_pred.weight"] = tensors["decoder.decoder_pred.weight"][:40]
    with pytest.raises(WeightsError, match=r"decoder_pred\.weight has 40 rows and a patch 48 elements"):
        import_mae(recognise(tensors), NAMES, None, (4, 4))


def test_what_is_not_known_is_dropped_only_by_name(theirs: ViTMAEForPreTraining) -> None:
    tensors = dict(theirs.state_dict()) | {"head.weight": torch.ones(2, 128), "head.bias": torch.ones(2)}
    published = recognise(tensors)
    _, transfer = import_encoder(published, NAMES)
    with pytest.raises(WeightsError) as found:
        transfer.complete(published.layout.decoder_names)
    assert re.findall(r"\n  (.*)", str(found.value)) == ["head.weight is dropped", "head.bias is dropped"]
    transfer.complete((*published.layout.decoder_names, "head.*"))


def test_half_precision_is_read_into_fp32(theirs: ViTMAEForPreTraining) -> None:
    published = recognise({name: value.bfloat16() for name, value in theirs.state_dict().items()})
    assert {value.dtype for value in published.tensors.values()} == {torch.float32}


@pytest.mark.skipif(not FOREIGN, reason="needs ../shared/data/weights")
@pytest.mark.parametrize("file", FOREIGN or [REAL], ids=lambda file: file.stem)
def test_real_weights_of_another_layout_are_read_and_not_guessed_at(file: Any) -> None:
    tensors = read_tensors(file)
    first = next(iter(tensors))
    with pytest.raises(WeightsError) as found:
        recognise(tensors, file.name)
    assert f"{file.name} is of no layout that is read: it holds {len(tensors)} tensors ({first}, " in str(found.value)
    assert "facebookresearch/mae: patch_embed.proj.weight, cls_token, pos_embed, blocks.0.attn.qkv.weight" in str(found.value)
