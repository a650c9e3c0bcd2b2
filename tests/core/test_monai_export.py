"""MONAI's own ViT and UNETR, filled with our weights, give our features on images and volumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets import UNETR, ViT
from torch import Tensor, nn

from mae_core.monai_export import LAYER_NORM_EPS, UNUSED, to_monai
from mae_core.positions import PositionSettings
from mae_core.vit import Encoder, EncoderSettings, all_tokens
from mae_core.weights import WeightsError
from tests.synthetic_batches import generator, one_thread

__all__ = ["one_thread"]

pytest.importorskip("einops", reason="MONAI's ViT needs einops, which comes with terravox[dev]")

NAMES = ("T1w", "T2w")
CASES = [((12, 20), (4, 5)), ((8, 6, 12), (4, 3, 4))]


def encoder_of(patch: tuple[int, ...], **more: Any) -> Encoder:
    """An encoder whose norms, biases and tokens are drawn, too."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        encoder = Encoder(EncoderSettings.model_validate({"preset": "nano", "patch": patch, "mlp_ratio": 2.0} | more), NAMES)
        for name, weight in encoder.named_parameters():
            nn.init.normal_(weight, mean=float("norm" in name and name.endswith("weight")), std=0.05)
    return encoder.eval()


def layers_of(encoder: Encoder, pixels: Tensor) -> list[Tensor]:
    """Output of every block, and of the last norm."""
    everything = all_tokens(encoder.layout(pixels.shape[2:]), pixels)
    with torch.no_grad():
        outputs = encoder.layers(everything.patches, everything.ids, everything.layout.grid)
        return [*outputs, encoder.norm(outputs[-1])]


def with_our_eps(network: Any) -> Any:
    """MONAI's network with the epsilon that no file of weights can hold."""
    for layer in network.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = LAYER_NORM_EPS
    return network.eval()


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal to 1e-5 of the largest."""
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("positions", [{}, {"axis_order": "reversed"}, {"kind": "learned"}], ids=["array", "reversed", "learned"])
@pytest.mark.parametrize("class_token", [True, False], ids=["class", "no class"])
@pytest.mark.parametrize(("space", "patch"), CASES)
def test_a_vit_has_our_features(space: tuple[int, ...], patch: tuple[int, ...], class_token: bool, positions: dict[str, Any]) -> None:
    grid = tuple(size // part for size, part in zip(space, patch, strict=True))
    table = {"grid": grid} if positions.get("kind") == "learned" else {}
    encoder = encoder_of(patch, class_token=class_token, positions=positions | table)
    found = to_monai(encoder, space)
    network = with_our_eps(ViT(**found.arguments))
    missing, unexpected = network.load_state_dict(found.tensors, strict=False)
    assert not unexpected
    assert all(name.startswith("classification_head.") for name in missing)
    assert bool(missing) == class_token
    pixels = torch.randn(2, len(NAMES), *space, generator=generator(0))
    with torch.no_grad():
        outputs = network(pixels)[1]
        close([*outputs, network.norm(outputs[-1])], layers_of(encoder, pixels))


@pytest.mark.parametrize("space", [(32, 48), (32, 16, 48)])
def test_the_encoder_of_a_unetr_has_our_features(space: tuple[int, ...]) -> None:
    encoder = encoder_of((16,) * len(space), preset="tiny", mlp_ratio=0.5, class_token=False)
    found = to_monai(encoder, space, "unetr")
    network = with_our_eps(UNETR(out_channels=2, feature_size=2, **found.arguments))
    own = network.state_dict()
    missing, unexpected = network.load_state_dict(found.tensors, strict=False)
    assert not unexpected
    assert set(missing) == {name for name in own if not name.startswith("vit.")}
    pixels = torch.randn(1, len(NAMES), *space, generator=generator(0))
    with torch.no_grad():
        features, outputs = network.vit(pixels)
        close([*outputs, features], layers_of(encoder, pixels))
        assert network(pixels).shape == (1, 2, *space)


def test_without_our_eps_features_are_near_and_not_equal() -> None:
    encoder = encoder_of((4, 5))
    found = to_monai(encoder, (12, 20))
    network = ViT(**found.arguments).eval()
    network.load_state_dict(found.tensors, strict=False)
    pixels = torch.randn(2, len(NAMES), 12, 20, generator=generator(0))
    with torch.no_grad():
        difference = (network(pixels)[1][-1] - layers_of(encoder, pixels)[-2]).abs().max()
    assert 0 < difference < 1e-2


def test_every_tensor_is_accounted_for() -> None:
    encoder = encoder_of((4, 5))
    found = to_monai(encoder, (12, 20))
    found.transfer.complete((UNUSED,))
    assert set(found.transfer.source) == set(encoder.state_dict())
    assert set(found.transfer.target) == set(found.tensors)
    kinds = {move.target: move.kind for move in found.transfer.moves}
    assert kinds["patch_embedding.position_embeddings"] == "computed"
    assert kinds["patch_embedding.patch_embeddings.weight"] == "permuted"
    assert {name for name, kind in kinds.items() if kind == "new"} == {
        f"blocks.{number}.norm_cross_attn.{end}" for number in range(4) for end in ("weight", "bias")
    }


def test_the_tensors_are_no_views_of_the_encoder() -> None:
    encoder = encoder_of((4, 5))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for value in to_monai(encoder, (12, 20)).tensors.values():
        assert value.is_contiguous()
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_learned_table_is_brought_to_another_size() -> None:
    encoder = encoder_of((4, 5), positions={"kind": "learned", "grid": [3, 4]})
    found = to_monai(encoder, (20, 40))
    (move,) = [move for move in found.transfer.moves if "position" in move.target]
    assert (move.kind, move.source) == ("interpolated", ("places.positions.table_token",))
    network = with_our_eps(ViT(**found.arguments))
    network.load_state_dict(found.tensors, strict=False)
    pixels = torch.randn(1, len(NAMES), 20, 40, generator=generator(0))
    with torch.no_grad():
        close(network(pixels)[1], layers_of(encoder, pixels)[:-1])


def test_positions_in_physical_units_become_a_table_for_a_spacing() -> None:
    encoder = encoder_of((4, 5), positions={"unit": "physical", "reference": 2.0})
    found = to_monai(encoder, (12, 20), spacing=(0.5, 1.5)).tensors["patch_embedding.position_embeddings"]
    ids = torch.arange(12)[None]
    wanted = encoder.places(ids, (3, 4), torch.tensor([[0.5 * 4, 1.5 * 5]]))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("more", "network", "words"),
    [
        ({"num_registers": 2}, "vit", "2 registers, which all other tokens attend to"),
        ({"groups": "each"}, "vit", "2 channel groups; MONAI has one token per place"),
        ({"patch": (6, 7), "stride": (4, 5)}, "vit", r"patches \(6, 7\) that overlap, with stride \(4, 5\)"),
        ({"context": {"kinds": ["year"]}}, "vit", "context, which MONAI's network cannot be told"),
        ({"positions": PositionSettings(unit="physical")}, "vit", "positions in physical units; give the spacing"),
        ({}, "unetr", "a class token.*UNETR has none; pretrain with model.encoder.class_token=false"),
        ({}, "unetr", "4 blocks; UNETR has 12"),
        ({}, "unetr", r"patches \(4, 5\); UNETR's are 16 on each axis"),
    ],
)
def test_what_monai_has_no_place_for_is_refused_with_words(more: dict[str, Any], network: Any, words: str) -> None:
    with pytest.raises(WeightsError, match=f"(?s)cannot become the one of MONAI's {'UNETR' if network == 'unetr' else 'ViT'}.*{words}"):
        to_monai(encoder_of(**{"patch": (4, 5)} | more), (12, 20), network)
