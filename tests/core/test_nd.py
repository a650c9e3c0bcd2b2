"""Patches and positions obey the same laws with one, two and three axes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mae_core.nd import (
    TokenLayout,
    blend,
    constant,
    downsampling_factors,
    margins,
    patchify,
    per_axis,
    take,
    token_grid,
    token_valid,
    unpatchify,
    windows,
)
from mae_core.positions import sincos_positions
from tests.synthetic_batches import generator, grids, places


def naive_patchify(array: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    tokens = torch.empty(len(array), math.prod(grid), array.shape[1], math.prod(patch))
    for token, corner in enumerate(places(grid)):
        for voxel, inside in enumerate(places(patch)):
            place = [c * p + i for c, p, i in zip(corner, patch, inside, strict=True)]
            tokens[:, token, :, voxel] = array[(slice(None), slice(None), *place)]
    return tokens


def space_of(grid: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size * part for size, part in zip(grid, patch, strict=True))


@given(grids(), st.integers(1, 2), st.integers(1, 3))
def test_patchify_is_the_naive_loop_and_unpatchify_undoes_it(
    case: tuple[tuple[int, ...], tuple[int, ...]], batch: int, channels: int
) -> None:
    grid, patch = case
    array = torch.rand(batch, channels, *space_of(grid, patch), generator=generator(0))
    tokens = patchify(array, patch)
    assert torch.equal(tokens, naive_patchify(array, grid, patch))
    assert torch.equal(unpatchify(tokens, grid, patch), array)


@given(grids())
def test_patchify_undoes_unpatchify(case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    grid, patch = case
    tokens = torch.rand(2, math.prod(grid), 3, math.prod(patch), generator=generator(0))
    assert torch.equal(patchify(unpatchify(tokens, grid, patch), patch), tokens)


@given(grids(max_patch=8))
def test_the_grid_counts_tokens(case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    grid, patch = case
    assert token_grid(space_of(grid, patch), patch) == grid


def test_a_wrong_space_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"space \(8, 8\) has 2 axes and patch \(4,\) has 1; give one patch size per axis"):
        token_grid((8, 8), (4,))
    with pytest.raises(ValueError, match=r"space \(8, 9\) is not a multiple of patch \(4, 4\) on every axis; change the crop or the patch"):
        patchify(torch.zeros(1, 1, 8, 9), (4, 4))


@given(st.integers(1, 3), st.integers(1, 9))
def test_one_size_serves_every_axis(axes: int, size: int) -> None:
    assert per_axis([size], axes, "patch") == (size,) * axes
    assert per_axis(tuple(range(axes)), axes, "patch") == tuple(range(axes))


def test_too_few_sizes_are_refused_by_the_name_of_the_setting() -> None:
    with pytest.raises(ValueError, match=r"model\.patch=\[4, 8\] gives 2 sizes and the data have 3 axes; give one size or 3"):
        per_axis((4, 8), 3, "model.patch")


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**16))
def test_take_is_indexing(batch: int, count: int, seed: int) -> None:
    tokens = torch.rand(batch, 6, 2, 3, generator=generator(seed))
    ids = torch.randint(0, 6, (batch, count), generator=generator(seed))
    assert torch.equal(take(tokens, ids), tokens[torch.arange(batch)[:, None], ids])
    assert torch.equal(take(tokens[:, :, 0, 0], ids), tokens[:, :, 0, 0][torch.arange(batch)[:, None], ids])


@given(grids(), st.integers(0, 2**16), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_a_token_has_enough_voxels_that_count(case: tuple[tuple[int, ...], tuple[int, ...]], seed: int, least: float) -> None:
    grid, patch = case
    counted = torch.rand(2, *space_of(grid, patch), generator=generator(seed)) < 0.4
    numbers = naive_patchify(counted[:, None].float(), grid, patch).sum(dim=(2, 3))
    expected = [[number > 0 and number >= least * math.prod(patch) for number in row] for row in numbers.tolist()]
    assert token_valid(counted, patch, least).tolist() == expected


def test_positions_are_the_written_formula() -> None:
    grid, dim, pairs = (2, 3, 4), 20, 3
    codes = sincos_positions(grid, dim)
    for token, place in enumerate(places(grid)):
        for axis, at in enumerate(place):
            for k in range(pairs):
                angle = at / 10000 ** (k / pairs)
                assert float(codes[token, 2 * axis * pairs + k]) == pytest.approx(math.sin(angle), abs=1e-6)
                assert float(codes[token, (2 * axis + 1) * pairs + k]) == pytest.approx(math.cos(angle), abs=1e-6)
    assert not codes[:, 18:].any(), "what is left of the width stays zero"


def test_the_first_half_of_the_positions_is_the_row() -> None:
    codes = sincos_positions((3, 5), 16).reshape(3, 5, 16)
    assert torch.equal(codes[:, :, :8], codes[:, :1, :8].expand(3, 5, 8)), "varies along rows only"
    assert torch.equal(codes[:, :, 8:], codes[:1, :, 8:].expand(3, 5, 8)), "varies along columns only"


@given(grids(max_grid=6))
def test_no_two_places_have_the_same_code(case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    grid, _ = case
    assert len(torch.unique(sincos_positions(grid, 12), dim=0)) == math.prod(grid)


def test_a_width_without_room_for_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="a width of 4 is too small for positions on 3 axes; use at least 6"):
        sincos_positions((2, 2, 2), 4)


OVERLAPS = [((12,), (4,), (2,)), ((8, 12), (4, 6), (4, 4)), ((6, 8, 4), (4, 4, 4), (2, 2, 2)), ((8, 6), (4, 3), (4, 3))]
each_overlap = pytest.mark.parametrize(("space", "patch", "stride"), OVERLAPS)


@each_overlap
def test_windows_are_the_naive_cut(space: tuple[int, ...], patch: tuple[int, ...], stride: tuple[int, ...]) -> None:
    array = torch.randn(2, 3, *space, generator=generator(0))
    found = windows(array, patch, stride).reshape(2, -1, 3, *patch)
    grid = token_grid(space, stride)
    for token, place in enumerate(itertools.product(*map(range, grid))):
        for offset in itertools.product(*map(range, patch)):
            at = [p * s + o - (size - s) // 2 for p, s, o, size in zip(place, stride, offset, patch, strict=True)]
            inside = all(0 <= index < size for index, size in zip(at, space, strict=True))
            wanted = array[(slice(None), slice(None), *at)] if inside else torch.zeros(2, 3)
            assert torch.equal(found[(slice(None), token, slice(None), *offset)], wanted)


@each_overlap
def test_blending_undoes_windows(space: tuple[int, ...], patch: tuple[int, ...], stride: tuple[int, ...]) -> None:
    array = torch.randn(2, 3, *space, generator=generator(0))
    tokens = windows(array, patch, stride)
    back, number = blend(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), token_grid(space, stride), patch, stride)
    torch.testing.assert_close(back, array, rtol=0, atol=1e-6)
    assert number.min() >= 1
    assert (number.max() > 1) == (patch != stride)


@each_overlap
def test_blending_averages_what_lies_on_a_voxel(space: tuple[int, ...], patch: tuple[int, ...], stride: tuple[int, ...]) -> None:
    grid = token_grid(space, stride)
    tokens = torch.randn(1, math.prod(grid), 2, math.prod(patch), generator=generator(1))
    used = torch.rand(1, math.prod(grid), generator=generator(2)) < 0.6
    total, number = torch.zeros(2, *space), torch.zeros(space)
    for token, place in enumerate(itertools.product(*map(range, grid))):
        for voxel, offset in enumerate(itertools.product(*map(range, patch))):
            at = tuple(p * s + o - (size - s) // 2 for p, s, o, size in zip(place, stride, offset, patch, strict=True))
            if used[0, token] and all(0 <= index < size for index, size in zip(at, space, strict=True)):
                total[(slice(None), *at)] += tokens[0, token, :, voxel]
                number[at] += 1
    found, count = blend(tokens, used, grid, patch, stride)
    assert torch.equal(count[0, 0], number)
    torch.testing.assert_close(found[0], total / number.clamp(min=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("patch", "stride"), [((4,), (6,)), ((4,), (3,)), ((4, 4), (4,))])
def test_patches_and_strides_that_do_not_go_together_are_refused(patch: tuple[int, ...], stride: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="larger by an even number on every axis"):
        margins(patch, stride)


def layout(groups: tuple[tuple[int, ...], ...], stride: tuple[int, ...] = (4, 4)) -> TokenLayout:
    return TokenLayout(token_grid((8, 12), stride), (4, 4), stride, groups, 3)


@pytest.mark.parametrize("stride", [(4, 4), (2, 2)])
@pytest.mark.parametrize("groups", [((0, 1, 2),), ((0, 2), (1,)), ((2,), (0,), (1,))])
def test_all_tokens_joined_are_the_array(groups: tuple[tuple[int, ...], ...], stride: tuple[int, ...]) -> None:
    one = layout(groups, stride)
    array = torch.randn(2, 3, 8, 12, generator=generator(0))
    ids = torch.randperm(math.prod(one.full_grid), generator=generator(1)).expand(2, -1)
    tokens, used = one.pick(one.split(array), ids), torch.ones_like(ids, dtype=torch.bool)
    back, there = one.join(tokens, ids, used)
    torch.testing.assert_close(back, array, rtol=0, atol=1e-6)
    assert there.all()
    assert one.seen(ids, used).all()


def test_a_token_of_a_group_holds_its_own_channels_only() -> None:
    one = layout(((0, 2), (1,)))
    array = torch.randn(1, 3, 8, 12, generator=generator(0))
    tokens = one.pick(one.split(array), torch.tensor([[5, 11]]))
    whole = patchify(array, (4, 4))[0, 5]
    assert torch.equal(tokens[0, 0], torch.stack([whole[0], 0 * whole[1], whole[2]]))
    assert torch.equal(tokens[0, 1], torch.stack([0 * whole[0], whole[1], 0 * whole[2]]))


@pytest.mark.parametrize("stride", [(4, 4), (2, 2)])
def test_what_is_seen_is_what_shown_tokens_reach(stride: tuple[int, ...]) -> None:
    one = layout(((0, 2), (1,)), stride)
    number = math.prod(one.full_grid)
    ids = torch.stack([torch.randperm(number, generator=generator(seed))[:5] for seed in (1, 2)])
    used = torch.tensor([[True] * 5, [True, False, True, True, False]])
    marked = torch.zeros(2, 3, 8, 12, dtype=torch.bool)
    for sample in range(2):
        for slot in range(5):
            if used[sample, slot]:
                there, _ = one.join(torch.ones(1, 1, 3, 16), ids[sample : sample + 1, slot : slot + 1], torch.ones(1, 1, dtype=torch.bool))
                marked[sample] |= there[0] > 0
    assert torch.equal(one.seen(ids, used), marked)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=3))
def test_the_product_of_the_factors_is_the_patch(patch: list[int]) -> None:
    factors = downsampling_factors(patch)
    for axis, size in enumerate(patch):
        climb = [stage[axis] for stage in factors]
        assert math.prod(climb) == size
        assert all(factor == 1 or all(factor % part for part in range(2, factor)) for factor in climb), "prime steps"
        assert climb == sorted(climb, reverse=True), "an axis that is done early rests last"
    assert all(any(factor > 1 for factor in stage) for stage in factors) or set(patch) == {1}, "no stage does nothing"


@pytest.mark.parametrize(
    ("patch", "factors"),
    [
        ((8, 8), [(2, 2)] * 3),
        ((4, 8, 8), [(2, 2, 2), (2, 2, 2), (1, 2, 2)]),
        ((12, 12), [(3, 3), (2, 2), (2, 2)]),
        ((5, 5), [(5, 5)]),
        ((1,), [(1,)]),
    ],
)
def test_factors_of_usual_patches(patch: tuple[int, ...], factors: list[tuple[int, ...]]) -> None:
    assert downsampling_factors(patch) == factors


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    assert constant(ours) is ours
    assert ours.__dict__ == torch.compiler.assume_constant_result(theirs).__dict__ != {}
