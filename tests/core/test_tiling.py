"""Windows cover the scene and overlap as asked; blending is exact where the predictions agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mae_core.tiling import Blend, Window, blend_weights, strips, windows, windows_along


@st.composite
def scenes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    axes = draw(st.integers(1, 3))
    space = draw(st.tuples(*[st.integers(1, 30 if axes < 3 else 14)] * axes))
    crop = draw(st.tuples(*[st.integers(2, 12)] * axes))
    return space, crop, draw(st.sampled_from([0.0, 0.25, 0.5, 0.7]))


@given(scenes())
def test_windows_cover_the_scene_and_stay_in_it(case: tuple[tuple[int, ...], tuple[int, ...], float]) -> None:
    space, crop, overlap = case
    seen = torch.zeros(space, dtype=torch.int64)
    for window in windows(space, crop, overlap):
        assert all(0 <= part.start < part.stop <= size for part, size in zip(window, space, strict=True))
        assert [part.stop - part.start for part in window] == [min(pair) for pair in zip(space, crop, strict=True)]
        seen[window] += 1
    assert seen.min() >= 1


@given(st.integers(2, 200), st.integers(1, 40), st.integers(0, 95))
def test_neighbours_share_at_least_what_was_asked(size: int, crop: int, percent: int) -> None:
    starts = [window[0].start for window in windows((size,), (crop,), percent / 100)]
    steps = [after - before for before, after in pairwise(starts)]
    assert all(step >= 1 for step in steps)
    assert all(100 * (crop - step) >= crop * percent or step == 1 for step in steps)
    assert max(steps, default=0) - min(steps, default=0) <= 1, "evenly spread"


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 12), st.integers(0, 95))
def test_windows_begin_at_steps_and_reach_the_end(size: int, step: int, steps: int, percent: int) -> None:
    length = step * steps
    found = windows_along(size, length, percent / 100, step)
    assert all(part.start % step == 0 and part.stop == min(part.start + length, size) for part in found)
    assert (found[0].start, found[-1].stop) == (0, size)
    assert all(one.start < two.start <= one.stop for one, two in pairwise(found)), "no gap"
    assert all(two.start - one.start <= max(step, length * (100 - percent) / 100) for one, two in pairwise(found))
    assert len(found) == 1 or found[-2].stop < size, "no window more than needed"


@pytest.mark.parametrize(
    ("size", "crop", "overlap", "count"),
    [(100, 10, 0.0, 10), (100, 10, 0.9, 91), (400, 100, 0.9, 31), (96, 64, 0.5, 2), (96, 32, 0.5, 5), (8, 8, 0.5, 1)],
)
def test_no_more_windows_than_needed(size: int, crop: int, overlap: float, count: int) -> None:
    assert len(list(windows((size,), (crop,), overlap))) == count


def test_weights_are_a_gaussian_that_is_never_nothing() -> None:
    weights = blend_weights((16, 8))
    assert weights.shape == (16, 8)
    assert weights.min() == pytest.approx(1e-3)
    assert torch.equal(weights, weights.flip([0, 1]))
    assert float(weights[8, 4]) == pytest.approx(math.exp(-0.5 * (0.5 / 2) ** 2 - 0.5 * 0.5**2))


def blended(space: tuple[int, ...], crop: tuple[int, ...], overlap: float, predict: Callable[[Window], Tensor]) -> Tensor:
    return Blend(space, crop, overlap, lambda windows: torch.stack([predict(window) for window in windows])).whole()


def field(window: Window, space: tuple[int, ...]) -> Tensor:
    """Two classes whose values tell the place in the scene."""
    number = torch.arange(math.prod(space), dtype=torch.float32).reshape(space) / math.prod(space)
    return torch.stack([number, 1 - number])[(slice(None), *window)]


@given(scenes())
def test_a_function_of_the_place_is_reproduced(case: tuple[tuple[int, ...], tuple[int, ...], float]) -> None:
    space, crop, overlap = case
    result = blended(space, crop, overlap, lambda window: field(window, space))
    torch.testing.assert_close(result, field((slice(None),) * len(space), space), rtol=0, atol=2e-6)


def test_a_constant_stays_itself() -> None:
    result = blended((50, 33), (16, 12), 0.5, lambda window: torch.full((3, *(part.stop - part.start for part in window)), 0.25))
    torch.testing.assert_close(result, torch.full((3, 50, 33), 0.25), rtol=0, atol=1e-6)


def test_what_a_model_pads_is_cut_off() -> None:
    space, crop = (5, 20), (8, 8)

    def predict(window: Window) -> Tensor:
        inside = field(window, space)
        return torch.nn.functional.pad(inside, (0, 8 - inside.shape[2], 0, 8 - inside.shape[1]), value=99.0)

    torch.testing.assert_close(blended(space, crop, 0.5, predict), field((slice(None),) * 2, space), rtol=0, atol=1e-6)


def test_the_middle_of_a_window_weighs_more_than_its_border() -> None:
    """Two windows that disagree: each voxel leans to the window in which it is nearer to the centre."""
    result = blended((12,), (8,), 0.5, lambda window: torch.full((1, 8), float(window[0].start > 0)))[0]
    assert result[:4].tolist() == [0] * 4
    assert result[8:].tolist() == [1] * 4
    assert float(result[4]) < 0.5 < float(result[7])
    assert float(result[5] + result[6]) == pytest.approx(1)


def naive(space: tuple[int, ...], crop: tuple[int, ...], overlap: float, predict: Callable[[Window], Tensor]) -> Tensor:
    """The mean with the whole scene in memory, window by window."""
    total, share = torch.zeros(2, *space), torch.zeros(space)
    weights = blend_weights(crop)
    for window in windows(space, crop, overlap):
        inside = tuple(slice(0, part.stop - part.start) for part in window)
        total[(slice(None), *window)] += predict(window)[(slice(None), *inside)] * weights[inside]
        share[window] += weights[inside]
    return total / share


def noise(window: Window) -> Tensor:
    """Another prediction of each window, so that how they are blended is seen."""
    seed = hash(tuple((part.start, part.stop) for part in window)) % 2**31
    return torch.rand(2, *(part.stop - part.start for part in window), generator=torch.Generator().manual_seed(seed))


@given(scenes(), st.data())
def test_strips_and_bands_from_anywhere_are_the_whole_scene_bit_for_bit(
    case: tuple[tuple[int, ...], tuple[int, ...], float], data: st.DataObject
) -> None:
    space, crop, overlap = case
    wanted = naive(space, crop, overlap, noise)
    batch = data.draw(st.integers(1, 5), "batch")
    blend = Blend(space, crop, overlap, lambda chosen: torch.stack([noise(window) for window in chosen]), batch)
    assert torch.equal(blend.whole(), wanted)
    first = data.draw(st.integers(0, space[0] - 1), "first")
    width = space[-1] if len(space) == 1 else data.draw(st.integers(1, space[-1]), "width")
    found = torch.full_like(wanted, torch.nan)
    for strip in strips(space[-1], width, 1):
        stop = first
        for window, part in blend.bands(strip, first):
            assert window[0].start == stop, "bands follow each other"
            stop = window[0].stop
            assert torch.isnan(found[(slice(None), *window)]).all(), "nothing is given twice"
            found[(slice(None), *window)] = part
        assert stop == space[0]
    assert torch.equal(found[:, first:], wanted[:, first:])
    assert torch.isnan(found[:, :first]).all()


def test_only_windows_that_are_needed_are_predicted() -> None:
    seen: list[Window] = []

    def predict(chosen: list[Window]) -> Tensor:
        seen.extend(chosen)
        return torch.stack([noise(window) for window in chosen])

    blend = Blend((40, 30), (8, 8), 0.5, predict, 3)
    list(blend.bands(slice(10, 20), 20))
    wanted = [window for window in windows((40, 30), (8, 8), 0.5) if window[0].stop > 20 and 2 < window[1].start < 20]
    assert seen == wanted


def test_strips_begin_at_steps() -> None:
    assert strips(1300, 700, 512) == [slice(0, 512), slice(512, 1024), slice(1024, 1300)]
    assert strips(1300, 5000, 512) == [slice(0, 1300)]
    assert strips(100, 1, 512) == [slice(0, 100)]


def test_blending_is_monais_sliding_window_with_gaussian_weights() -> None:
    """Where both choose the same windows: MONAI pushes its last one back to the border, ours are spread evenly."""
    from monai.inferers import sliding_window_inference

    space, crop = (24, 20, 12), (8, 8, 4)
    image = torch.rand((1, 1, *space), generator=torch.Generator().manual_seed(0))

    def network(part: Tensor) -> Tensor:
        """Another answer for the same voxel in every window that it lies in."""
        inner = part - part.mean(dim=(2, 3, 4), keepdim=True)
        return torch.cat([inner, inner.square()], dim=1)

    wanted = sliding_window_inference(image, crop, 3, network, overlap=0.5, mode="gaussian")
    found = Blend(space, crop, 0.5, lambda chosen: torch.cat([network(image[(..., *window)]) for window in chosen]), 3).whole()
    torch.testing.assert_close(found, wanted[0], rtol=1e-5, atol=1e-6)
