"""The convolutional encoder equals a masked dense network written out, and sees only what a chain of shown neighbours joins."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from mae_core.nd import patchify, take, unpatchify
from mae_core.sparse_conv import (
    SPARSE_CONV_PRESETS,
    Downsampling,
    SparseConvBlock,
    SparseConvEncoder,
    SparseConvSettings,
    placement,
)
from tests.contracts import EncoderContract
from tests.synthetic_batches import CASES, CHANNELS, by_axes, generator, grids, one_thread, places

__all__ = ["one_thread"]

Case = tuple[tuple[int, ...], tuple[int, ...]]


def fresh(patch: tuple[int, ...], kernel: int = 3) -> SparseConvEncoder:
    """The smallest encoder as it starts."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return SparseConvEncoder(SparseConvSettings(preset="nano", patch=patch, kernel=kernel, mlp_ratio=2), CHANNELS).eval()


@cache
def nano(patch: tuple[int, ...], kernel: int = 3) -> SparseConvEncoder:
    """One encoder per patch; its biases and norms are moved off their start, so that none can be forgotten unseen."""
    encoder = fresh(patch, kernel)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for weight in encoder.parameters():
            if weight.ndim == 1:
                nn.init.normal_(weight, mean=float(weight.detach().mean()), std=0.3)
    return encoder


def shown_of(grid: tuple[int, ...], seed: int, batch: int = 2, share: float = 0.4) -> Tensor:
    """Numbers of the shown tokens, in random order: about `share` of them and at least one."""
    length = math.prod(grid)
    order = torch.stack([torch.randperm(length, generator=generator(seed + index)) for index in range(batch)])
    return order[:, : max(1, round(share * length))]


def pixels_of(case: Case, seed: int, batch: int = 2) -> Tensor:
    space = tuple(size * part for size, part in zip(*case, strict=True))
    return torch.randn(batch, len(CHANNELS), *space, generator=generator(seed))


def naive_layers(encoder: SparseConvEncoder, pixels: Tensor, ids: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
    """Outputs of the last stage's blocks as maps, by dense convolutions, each followed by zeros in all hidden places."""
    axes = len(grid)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[axes - 1]
    shown = torch.zeros(len(ids), math.prod(grid), dtype=torch.bool).scatter(1, ids, value=True).reshape(len(ids), 1, *grid)

    def select(maps: Tensor) -> Tensor:
        inside = shown
        for axis in range(2, maps.ndim):
            inside = inside.repeat_interleave(maps.shape[axis] // grid[axis - 2], dim=axis)
        return torch.where(inside, maps, 0.0)

    def per_place(layer: nn.Module, maps: Tensor) -> Tensor:
        return select(layer(maps.movedim(1, -1)).movedim(-1, 1))

    def step(maps: Tensor, layer: nn.Module) -> Tensor:
        assert isinstance(layer, Downsampling)
        kernel = layer.merge.weight.unflatten(1, (*layer.factor, -1)).movedim(-1, 1)
        return select(convolve(per_place(layer.norm, maps), kernel, layer.merge.bias, stride=layer.factor))

    def block(maps: Tensor, layer: nn.Module) -> Tensor:
        assert isinstance(layer, SparseConvBlock)
        conv = layer.conv
        mixed = select(convolve(maps, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, groups=maps.shape[1]))
        return select(maps + per_place(layer.mlp, per_place(layer.norm, mixed)))

    stem = encoder.embed
    kernel = stem.embed.weight.unflatten(1, stem.factor).movedim(-1, 0)
    maps = select(convolve(select(pixels), kernel, stem.embed.bias, stride=stem.factor))
    for layers, layer in zip(stem.stages, stem.steps, strict=True):
        assert isinstance(layers, nn.ModuleList)
        for one in layers:
            maps = block(maps, one)
        maps = step(maps, layer)
    outputs = []
    for one in encoder.blocks:
        maps = block(maps, one)
        outputs.append(maps)
    return outputs


def joined(ids: list[int], grid: tuple[int, ...], start: int) -> set[int]:
    """The shown tokens that a chain of shown neighbours, diagonal ones too, joins to the token number `start`."""
    where = {number: place for number, place in enumerate(places(grid)) if number in ids}
    found, new = {start}, [start]
    while new:
        here = where[new.pop()]
        near = {number for number, place in where.items() if max(abs(a - b) for a, b in zip(place, here, strict=True)) <= 1} - found
        found |= near
        new += near
    return found


class BehindAnEmptySlot(nn.Module):
    """The encoder with zeros in the place of a class token, which the contract counts on."""

    num_prefix = 1

    def __init__(self, encoder: SparseConvEncoder) -> None:
        super().__init__()
        assert encoder.num_prefix == 0
        self.encoder = encoder

    def forward(
        self, patches: Tensor, ids: Tensor, grid: tuple[int, ...], used: Tensor | None = None, channels: list[str] | None = None
    ) -> Tensor:
        return nn.functional.pad(self.encoder(patches, ids, grid, used, channels), (0, 0, 1, 0))


class NanoContract(EncoderContract):
    def build(self) -> nn.Module:
        return BehindAnEmptySlot(fresh(self.patch)).eval()


class TestSparseConvOneAxis(NanoContract):
    space, patch = (36,), (4,)


class TestSparseConvTwoAxes(NanoContract):
    space, patch = (12, 15), (4, 3)


class TestSparseConvThreeAxes(NanoContract):
    space, patch = (4, 8, 6), (2, 4, 2)


@given(grids(), st.sampled_from([3, 5]), st.integers(0, 99))
@torch.no_grad()
def test_every_layer_is_that_of_the_masked_dense_network(case: Case, kernel: int, seed: int) -> None:
    grid, patch = case
    encoder, pixels, ids = nano(patch, kernel), pixels_of(case, seed), shown_of(grid, seed)
    patches = patchify(pixels, patch)
    hidden = torch.ones(patches.shape[:2], dtype=torch.bool).scatter(1, ids, value=False)
    dirty = unpatchify(torch.where(hidden[..., None, None], torch.nan, patches), grid, patch)
    layers = encoder.layers(take(patches, ids), ids, grid)
    assert len(layers) == encoder.settings.depth
    for tokens, maps in zip(layers, naive_layers(encoder, dirty, ids, grid), strict=True):
        wanted = take(maps.flatten(2).transpose(1, 2), ids)
        torch.testing.assert_close(tokens, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(encoder(take(patches, ids), ids, grid), encoder.norm(layers[-1]))


@given(grids(max_grid=5, max_patch=3), st.integers(0, 99))
@torch.no_grad()
def test_a_token_sees_those_that_shown_neighbours_join_to_it_and_no_others(case: Case, seed: int) -> None:
    grid, patch = case
    ids = shown_of(grid, seed, batch=1, share=0.3)
    patches = take(patchify(pixels_of(case, seed, batch=1), patch), ids)
    encoder, start = nano(patch), int(ids[0, 0])
    together = torch.tensor([[number in joined(ids[0].tolist(), grid, start) for number in ids[0].tolist()]])
    before = encoder(patches, ids, grid)
    outside = encoder(torch.where(together[..., None, None], patches, 1e3), ids, grid)
    assert torch.equal(outside[together], before[together]), "bit for bit"
    inside = encoder(torch.where(together[..., None, None], -patches, patches), ids, grid)
    assert torch.equal(inside[~together], before[~together]), "bit for bit"
    assert not (inside == before)[together].all(dim=1).any()


@pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)
@pytest.mark.parametrize(("kernel", "sees"), [(3, False), (5, True)])
@torch.no_grad()
def test_the_kernel_says_how_far_a_gap_may_be(space: tuple[int, ...], patch: tuple[int, ...], kernel: int, sees: bool) -> None:
    """Two tokens with a hidden one between them on the last axis."""
    grid = (*(1 for _ in space[1:]), 3)
    encoder, ids = nano(patch, kernel), torch.tensor([[0, 2]])
    patches = torch.randn(1, 2, 3, math.prod(patch), generator=generator(0))
    changed = torch.stack([patches[:, 0], 2 * patches[:, 1]], dim=1)
    assert torch.equal(encoder(changed, ids, grid)[:, 0], encoder(patches, ids, grid)[:, 0]) is not sees


@given(grids(max_grid=3), st.integers(0, 99))
@torch.no_grad()
def test_the_border_is_as_hidden_tokens_are(case: Case, seed: int) -> None:
    """The same tokens two places further on a larger grid have the same features."""
    grid, patch = case
    ids = shown_of(grid, seed)
    patches = take(patchify(pixels_of(case, seed), patch), ids)
    larger = tuple(size + 3 for size in grid)
    numbers = torch.arange(math.prod(larger)).reshape(larger)[tuple(slice(2, 2 + size) for size in grid)].flatten()
    torch.testing.assert_close(nano(patch)(patches, numbers[ids], larger), nano(patch)(patches, ids, grid), rtol=0, atol=1e-5)


@given(grids(), st.integers(0, 99))
def test_slots_that_are_not_used_change_no_output_and_no_gradient(case: Case, seed: int) -> None:
    grid, patch = case
    encoder, ids = nano(patch), shown_of(grid, seed)
    used = torch.rand(ids.shape, generator=generator(seed)) < 0.6
    patches = take(patchify(pixels_of(case, seed), patch), ids)
    outcomes = []
    # Numbers that collide with those of used slots, and pixels that would spread anywhere.
    for numbers, rubbish in ((ids, 0.0), (torch.where(used, ids, ids[:, :1]), math.nan), (torch.where(used, ids, 0), math.inf)):
        encoder.zero_grad()
        layers = encoder.layers(torch.where(used[..., None, None], patches, rubbish), numbers, grid, used)
        encoder.norm(layers[-1])[used].square().sum().backward()
        assert not any(tokens[~used].any() for tokens in layers)
        gradients = [weight.grad for weight in encoder.parameters() if weight.grad is not None]
        outcomes.append([tokens.detach() for tokens in layers] + gradients)
    for other in outcomes[1:]:
        assert all(torch.equal(*pair) for pair in zip(outcomes[0], other, strict=True))


@given(grids(), st.integers(0, 99))
def test_collect_undoes_spread_and_all_else_is_zero(case: Case, seed: int) -> None:
    grid, patch = case
    ids = shown_of(grid, seed)
    tokens = torch.randn(*ids.shape, math.prod(patch), 5, generator=generator(seed))
    place = placement(ids, grid)
    maps = place.spread(tokens, patch)
    assert maps.shape == (2, 5, *(size * part for size, part in zip(grid, patch, strict=True)))
    assert torch.equal(place.collect(maps, patch), tokens)
    assert maps.count_nonzero() == tokens.count_nonzero()


@pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)
def test_every_parameter_gets_a_gradient(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    grid = tuple(size // part for size, part in zip(space, patch, strict=True))
    encoder, ids = nano(patch), shown_of(grid, 0)
    encoder.zero_grad()
    features = encoder(torch.randn(*ids.shape, 3, math.prod(patch), generator=generator(0)), ids, grid)
    (features * torch.randn(features.shape, generator=generator(1))).sum().backward()
    assert [name for name, weight in encoder.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)
def test_features_keep_fp32_under_autocast(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    grid = tuple(size // part for size, part in zip(space, patch, strict=True))
    encoder, ids = nano(patch), shown_of(grid, 0)
    patches = torch.randn(*ids.shape, 3, math.prod(patch), generator=generator(0))
    with torch.autocast("cpu", torch.bfloat16):
        layers = encoder.layers(patches, ids, grid)
        layers[-1].sum().backward()
    assert {tokens.dtype for tokens in layers} == {torch.float32}
    torch.testing.assert_close(layers[-1], encoder.layers(patches, ids, grid)[-1], rtol=0.05, atol=0.2)


@torch.no_grad()
def trace(grid: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """Fails if the graph breaks, asks for a value, or is made anew for other tokens. No code is generated for it: that takes a minute."""
    traced = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        traced.append(module)
        return module

    encoder = nano(patch)
    compiled = torch.compile(encoder, fullgraph=True, dynamic=False, backend=keep)
    for seed in range(3):
        ids = shown_of(grid, seed)
        patches = torch.randn(*ids.shape, 3, math.prod(patch), generator=generator(seed))
        used = torch.rand(ids.shape, generator=generator(seed)) < 0.6
        assert torch.equal(compiled(patches, ids, grid, used), encoder(patches, ids, grid, used))
    assert len(traced) == 1
    assert not {str(node.target) for node in traced[0].graph.nodes} & {"item", "tolist", "nonzero"}


def test_the_graph_is_whole_and_the_same_for_all_data() -> None:
    """In a process of its own: the checks of shape types that pytest puts around every function cannot be traced."""
    code = "from tests.core.test_sparse_conv import trace; trace((3, 5), (4, 3))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_widths_double_up_to_that_of_the_token() -> None:
    """ConvNeXt-T's first three stages are 96, 192 and 384 wide and 3, 3 and 9 deep (Liu et al. 2022, section 3)."""
    settings = SparseConvSettings(preset="small", patch=(8, 8))
    assert settings.stage_widths == (96, 192, 384)
    assert settings.stage_depths == (3, 3, 9)
    assert (settings.width, settings.depth) == (384, 9) == SPARSE_CONV_PRESETS["small"][:2]
    assert SparseConvSettings(preset="nano", patch=(64,)).stage_widths == (8, 8, 16, 32, 64, 128)
    assert (SparseConvSettings(patch=(1,)).stage_widths, SparseConvSettings(patch=(1,)).stage_depths) == ((192,), (6,))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch": ()}, "patch"),
        ({"patch": (0,)}, "patch"),
        ({"patch": (4, 4, 4, 4)}, "patch"),
        ({"kernel": 4}, "kernel=4 has no middle; give an odd number such as 5"),
        ({"kernel": 1}, "kernel"),
        ({"preset": "huge"}, "preset"),
        ({"kind": "vit"}, "kind"),
        ({"heads": 3}, "heads"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SparseConvSettings.model_validate(wrong)


def test_a_grid_with_other_axes_than_the_patch_is_refused() -> None:
    wanted = r"grid \(2, 2\) has 2 axes and patch \(4,\) has 1; give one size per axis to both"
    with pytest.raises(ValueError, match=wanted):
        nano((4,))(torch.zeros(1, 4, 3, 4), torch.arange(4)[None], (2, 2))
