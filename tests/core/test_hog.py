"""Histograms of oriented gradients equal loops over every voxel, and what does not count changes no bit of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mae_core.hog import central_differences, directions, oriented_gradients
from mae_core.targets import HogTarget, make_target, target_shape
from tests.synthetic_batches import by_axes, generator, one_thread, places

__all__ = ["one_thread"]

CASES = [((24,), (6,), (3,)), ((12, 8), (6, 4), (2,)), ((6, 8, 4), (3, 4, 2), (1, 2, 2))]
"""Space, patch and cells with one, two and three axes; a cell of one voxel's depth among them."""
each_case = pytest.mark.parametrize(("space", "patch", "cells"), CASES, ids=by_axes)

Space = tuple[int, ...]


def crop(space: Space, share: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    pixels = torch.randn(2, 2, *space, generator=generator(seed))
    return pixels, torch.rand(2, 2, *space, generator=generator(seed + 1)) >= share


def ramp(space: Space, slope: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """A plane of that gradient in one channel."""
    axes = [torch.arange(size, dtype=torch.float64) * rise for size, rise in zip(space, slope, strict=True)]
    pixels = sum(torch.meshgrid(*axes, indexing="ij"), torch.zeros(space, dtype=torch.float64)).float()[None, None]
    return pixels, torch.ones_like(pixels, dtype=torch.bool)


def naive_gradient(image: NDArray[np.float64], counted: NDArray[np.bool_], place: Space) -> NDArray[np.float64] | None:
    """Of one voxel; None where it or a neighbour does not count or is not there."""
    found = []
    for axis in range(len(place)):
        beside = [(*place[:axis], place[axis] + step, *place[axis + 1 :]) for step in (-1, 1)]
        if any(not 0 <= at[axis] < image.shape[axis] for at in beside) or not all(counted[at] for at in (*beside, place)):
            return None
        found.append((image[beside[1]] - image[beside[0]]) / 2)
    return np.array(found)


def shares(gradient: NDArray[np.float64], number: int) -> NDArray[np.float64]:
    """What each direction gets of a gradient; in a plane the textbook's interpolation between the bins beside its angle."""
    out = np.zeros(number)
    if len(gradient) == 2:
        at = math.atan2(gradient[1], gradient[0]) % math.pi / math.pi * number
        out[int(at) % number] += 1 - (at - int(at))
        out[(int(at) + 1) % number] += at - int(at)
        return out
    units, spacing = directions(len(gradient), number)
    length = np.linalg.norm(gradient)
    for index, unit in enumerate(units):
        angle = math.acos(min(abs(float(gradient @ np.array(unit))) / float(length), 1.0)) if length else 0.0
        out[index] = max(0.0, 1 - angle / spacing)
    out /= out.sum()
    return out


def naive(pixels: Tensor, counted: Tensor, patch: Space, settings: HogTarget) -> tuple[Tensor, Tensor]:
    """Values and what counts, voxel by voxel in float64."""
    space, axes = tuple(pixels.shape[2:]), pixels.ndim - 2
    cells = settings.cells * axes if len(settings.cells) == 1 else settings.cells
    grid = tuple(size // part for size, part in zip(space, patch, strict=True))
    sizes = tuple(part // number for part, number in zip(patch, cells, strict=True))
    number = settings.num_directions(axes)
    shape = (*pixels.shape[:2], math.prod(grid), math.prod(cells), number)
    sums, voxels, lengths = np.zeros(shape), np.zeros(shape[:4]), np.zeros(shape[:4])
    for batch, channel in places(tuple(pixels.shape[:2])):
        image, known = pixels[batch, channel].double().numpy(), counted[batch, channel].numpy()
        for place in places(space):
            gradient = naive_gradient(image, known, place)
            if gradient is None:
                continue
            token = np.ravel_multi_index([at // part for at, part in zip(place, patch, strict=True)], grid)
            cell = np.ravel_multi_index([at % part // size for at, part, size in zip(place, patch, sizes, strict=True)], cells)
            length = np.linalg.norm(gradient)
            sums[batch, channel, token, cell] += length * shares(gradient, number)
            lengths[batch, channel, token, cell] += length
            voxels[batch, channel, token, cell] += 1
    histogram = sums / np.maximum(voxels, 1)[..., None]
    flat = lengths.sum(axis=3) / np.maximum(voxels.sum(axis=3), 1) < settings.min_gradient
    histogram[flat] = 0
    norm = np.sqrt((histogram**2).sum(axis=(3, 4), keepdims=True) + settings.eps**2)
    values = torch.from_numpy(histogram / np.maximum(norm, 1e-30)).transpose(1, 2).flatten(3).float()
    return values, torch.from_numpy(np.repeat(voxels > 0, number, axis=3)).transpose(1, 2)


@each_case
@given(
    seed=st.integers(0, 2**16), share=st.sampled_from([0.0, 0.05, 0.2]), bins=st.sampled_from([3, 4, 9]), eps=st.sampled_from([0.0, 0.5])
)
def test_histograms_are_the_naive_loop(space: Space, patch: Space, cells: Space, seed: int, share: float, bins: int, eps: float) -> None:
    settings = HogTarget(bins=bins, cells=cells, eps=eps, min_gradient=0.3)
    pixels, counted = crop(space, share, seed)
    values, kept = oriented_gradients(pixels, counted, patch, settings)
    wanted, wanted_kept = naive(pixels, counted, patch, settings)
    assert torch.equal(kept, wanted_kept)
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5)


@each_case
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
def test_what_does_not_count_changes_no_bit(space: Space, patch: Space, cells: Space, rubbish: float) -> None:
    settings = HogTarget(cells=cells)
    pixels, counted = crop(space)
    values, kept = oriented_gradients(pixels, counted, patch, settings)
    dirty, dirty_kept = oriented_gradients(torch.where(counted, pixels, rubbish), counted, patch, settings)
    assert torch.equal(dirty, values)
    assert torch.equal(dirty_kept, kept)
    assert kept.any()
    assert not kept.all()
    assert values[kept].abs().sum() > 0


@each_case
def test_the_shape_is_known_beforehand_and_it_is_fp32_under_autocast_too(space: Space, patch: Space, cells: Space) -> None:
    settings = HogTarget(cells=cells)
    pixels, counted = crop(space)
    values, kept = oriented_gradients(pixels, counted, patch, settings)
    assert values.shape == kept.shape
    assert tuple(values.shape[2:]) == target_shape(settings, 2, patch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(oriented_gradients(pixels, counted, patch, settings)[0], values)
    assert values.dtype == torch.float32


@each_case
@given(seed=st.integers(0, 2**16))
def test_neither_sign_nor_scale_nor_level_of_the_pixels_matters(space: Space, patch: Space, cells: Space, seed: int) -> None:
    settings = HogTarget(cells=cells, eps=0)
    pixels, counted = crop(space, seed=seed)
    values, _ = oriented_gradients(pixels, counted, patch, settings)
    for others in (-pixels, 8 * pixels, pixels + 2):
        torch.testing.assert_close(oriented_gradients(others, counted, patch, settings)[0], values, rtol=0, atol=1e-4)
    norms = values.norm(dim=3)
    torch.testing.assert_close(norms[norms > 0], torch.ones_like(norms[norms > 0]))


@each_case
def test_a_plane_votes_for_the_direction_in_which_it_rises(space: Space, patch: Space, cells: Space) -> None:
    settings = HogTarget(bins=6, cells=cells)
    for index, unit in enumerate(directions(len(space), settings.num_directions(len(space)))[0]):
        values, kept = oriented_gradients(*ramp(space, unit), patch, settings)
        histogram = values.unflatten(3, (-1, settings.num_directions(len(space))))
        there = kept.unflatten(3, (-1, settings.num_directions(len(space)))).any(dim=4)
        assert (histogram.argmax(dim=4) == index)[there].all()
        rest = histogram.sum(dim=4) - histogram[..., index]
        assert float(rest.abs().max()) < 1e-5, "six are spread so evenly that each is alone at its own angle"


def test_a_gradient_half_way_between_two_directions_of_a_plane_is_shared_equally() -> None:
    angle = math.pi / 9 * 2.5
    values, _ = oriented_gradients(*ramp((8, 8), (math.cos(angle), math.sin(angle))), (8, 8), HogTarget(cells=(1,), eps=0))
    wanted = torch.zeros(9)
    wanted[2:4] = math.sqrt(0.5)
    torch.testing.assert_close(values.flatten(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [3, 4, 8, 9, 18])
def test_directions_of_a_plane_are_equally_spaced_over_half_a_circle(number: int) -> None:
    units, spacing = directions(2, number)
    angles = np.arange(number) * math.pi / number
    np.testing.assert_allclose(units, np.stack([np.cos(angles), np.sin(angles)], axis=1), atol=1e-12)
    assert spacing == pytest.approx(math.pi / number)


@pytest.mark.parametrize("number", [3, 5, 6, 9, 13, 20, 32])
def test_directions_of_space_are_nearly_uniform_and_leave_no_gradient_without_a_vote(number: int) -> None:
    units, spacing = directions(3, number)
    cosines = np.abs(np.array(units) @ np.array(units).T)
    np.testing.assert_allclose(np.diag(cosines), 1)
    np.fill_diagonal(cosines, 0)
    nearest = np.arccos(np.minimum(cosines.max(axis=1), 1))
    assert nearest.max() == pytest.approx(spacing)
    assert nearest.min() > 0.85 * spacing
    anywhere = np.random.default_rng(0).normal(size=(4000, 3))
    anywhere /= np.linalg.norm(anywhere, axis=1, keepdims=True)
    reached = np.arccos(np.minimum(np.abs(anywhere @ np.array(units).T).max(axis=1), 1))
    assert reached.max() < 0.98 * spacing


def test_a_line_has_one_direction_and_three_in_space_are_at_right_angles() -> None:
    units, spacing = directions(1, HogTarget(bins=9).num_directions(1))
    assert units == ((1.0,),)
    assert spacing == pytest.approx(math.pi / 2)
    assert directions(3, 3)[1] == pytest.approx(math.pi / 2)
    assert math.degrees(directions(3, 6)[1]) == pytest.approx(63.4349, abs=1e-3), "the axes of an icosahedron"


def test_gradients_are_known_where_the_voxel_and_its_neighbours_count() -> None:
    pixels, counted = ramp((5, 6), (2.0, -3.0))
    counted[0, 0, 2, 2] = False
    gradient, known = central_differences(pixels, counted)
    inside = torch.zeros(5, 6, dtype=torch.bool)
    inside[1:4, 1:5] = True
    inside[[2, 1, 3, 2, 2], [2, 2, 2, 1, 3]] = False
    assert torch.equal(known[0, 0], inside)
    assert torch.equal(gradient[:, 0, 0][:, inside], torch.tensor([2.0, -3.0])[:, None].expand(2, int(inside.sum())))
    assert not gradient[:, 0, 0][:, ~inside].any()


def test_patches_without_a_gradient_are_flat_counted_and_left_out() -> None:
    pixels, counted = ramp((24,), (5e-4,))
    pixels[..., 8:] = 5
    pixels[..., 16:] = torch.randn(8, generator=generator(0))
    counted = counted.expand(1, 2, 24).clone()
    counted[:, 1] = False
    values, kept = oriented_gradients(pixels.expand(1, 2, 24), counted, (6,), HogTarget(cells=(3,)))
    assert kept[0, :, 0].any(dim=1).tolist() == [True, True, True, True]
    target = make_target(values, kept, HogTarget(cells=(3,)))
    assert target.counted[0, :, 0].any(dim=1).tolist() == [False, True, True, True]
    assert int(target.num_flat) == 1, "what does not count at all is not flat"
    assert torch.equal(target.counted[0, 1:], kept[0, 1:])
    steep = oriented_gradients(pixels.expand(1, 2, 24), counted, (6,), HogTarget(cells=(3,), min_gradient=1e-4))
    assert int(make_target(*steep, HogTarget(cells=(3,), min_gradient=1e-4)).num_flat) == 0


def test_no_eps_and_no_threshold_give_no_nan() -> None:
    pixels, counted = ramp((8, 8), (0.0, 0.0))
    settings = HogTarget(eps=0, min_gradient=0)
    values, kept = oriented_gradients(pixels, counted, (8, 8), settings)
    assert not values.any()
    assert int(make_target(values, kept, settings).num_flat) == 1


@given(st.sampled_from([0.01, 0.5, 3.0]), st.sampled_from([0.01, 0.5]))
def test_eps_is_in_pixel_units_per_voxel(slope: float, eps: float) -> None:
    values, _ = oriented_gradients(*ramp((12,), (slope,)), (12,), HogTarget(cells=(1,), eps=eps))
    assert float(values) == pytest.approx(slope / math.hypot(slope, eps), rel=1e-4)


def test_what_cannot_be_cut_is_refused_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"target\.cells=\[2, 4\] do not divide patch \(8, 6\) on every axis; change the cells or the patch"
    ):
        oriented_gradients(*crop((8, 6)), (8, 6), HogTarget(cells=(2, 4)))
    with pytest.raises(ValueError, match=r"target\.cells=\[2, 2, 2\] gives 3 sizes and the data have 2 axes"):
        target_shape(HogTarget(cells=(2, 2, 2)), 1, (8, 8))
    with pytest.raises(ValueError, match=r"space \(2, 8\) has an axis with less than 3 voxels, where no gradient is known; use a larger"):
        oriented_gradients(*crop((2, 8)), (2, 8), HogTarget())
    with pytest.raises(ValueError, match=r"space \(9, 8\) is not a multiple of patch \(8, 8\)"):
        oriented_gradients(*crop((9, 8)), (8, 8), HogTarget())
