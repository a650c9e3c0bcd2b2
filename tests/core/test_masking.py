"""Hidden sets have exact sizes, hide nothing invalid, and depend on the sample's name alone."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mae_core.masking import (
    STREAM_CROP,
    STREAM_HIDE,
    AnyHiding,
    BlockHiding,
    GridHiding,
    HidingPlan,
    RandomHiding,
    Sample,
    SliceHiding,
    TubeHiding,
    at_progress,
    check_hiding,
    counter_below,
    counter_bits,
    hide,
    num_kept,
    num_predicted,
    plan_from_hidden,
)
from tests.contracts import HidingContract, hidden_set, shown_set
from tests.synthetic_batches import generator

LAST = 2**63 - 1


class TestRandomHiding(HidingContract):
    settings = RandomHiding(mask_ratio=0.6)


class TestBlockHiding(HidingContract):
    settings = BlockHiding(mask_ratio=0.6, num_blocks=2)


class TestGridHiding(HidingContract):
    settings = GridHiding(mask_ratio=0.6)


class TestTubeHiding(HidingContract):
    settings = TubeHiding(mask_ratio=0.6)
    grid_of = staticmethod(lambda length: (1, 1, length))


class TestSliceHiding(HidingContract):
    settings = SliceHiding(mask_ratio=0.6)


STRUCTURED: list[tuple[AnyHiding, tuple[int, ...]]] = [
    (BlockHiding(), (1, 12)),
    (BlockHiding(num_blocks=3), (1, 6, 8)),
    (BlockHiding(mask_ratio=0.5), (2, 4, 4, 4)),
    (GridHiding(), (1, 6, 8)),
    (GridHiding(period=3, mask_ratio=0.8), (1, 9, 7)),
    (TubeHiding(axis=0), (1, 4, 5, 6)),
    (TubeHiding(axis="channels"), (3, 4, 5)),
    (SliceHiding(axis=1), (1, 3, 8)),
    (SliceHiding(axis="channels", mask_ratio=0.5), (4, 6)),
]


def hidden_grid(settings: AnyHiding, grid: tuple[int, ...], samples: int = 40, seed: int = 0) -> Tensor:
    """Which tokens are hidden, `(sample, *grid)`, where all are valid."""
    length = math.prod(grid)
    name = Sample(torch.zeros(samples, dtype=torch.int64), torch.arange(samples), torch.zeros(samples, dtype=torch.int64))
    plan = hide(torch.ones(samples, length, dtype=torch.bool), grid, settings, seed, name)
    assert plan.full
    assert plan.hidden.shape[1] == length - num_kept(length, settings.mask_ratio)
    return torch.zeros(samples, length, dtype=torch.bool).scatter(1, plan.hidden, value=True).reshape(samples, *grid)


@pytest.mark.parametrize(("settings", "grid"), STRUCTURED, ids=str)
def test_structured_sets_have_exact_sizes_and_differ_between_samples(settings: AnyHiding, grid: tuple[int, ...]) -> None:
    hidden = hidden_grid(settings, grid).flatten(1)
    assert (hidden.sum(dim=1) == hidden[0].sum()).all()
    assert len(hidden.unique(dim=0)) > 1


@pytest.mark.parametrize(("settings", "axis"), [(TubeHiding(axis=0), 1), (TubeHiding(axis=1), 2), (TubeHiding(axis="channels"), 0)])
def test_tubes_are_hidden_all_along_their_axis_but_for_one_that_is_cut(settings: TubeHiding, axis: int) -> None:
    grid = (3, 4, 5)
    share = hidden_grid(settings, grid).double().mean(dim=1 + axis).flatten(1)
    assert (((share > 0) & (share < 1)).sum(dim=1) <= 1).all()
    assert (share == 1).any()


@pytest.mark.parametrize(("settings", "axis"), [(SliceHiding(axis=0), 1), (SliceHiding(axis=1), 2), (SliceHiding(axis="channels"), 0)])
def test_slices_are_hidden_whole_but_for_one_that_is_cut(settings: SliceHiding, axis: int) -> None:
    grid = (3, 4, 5)
    hidden = hidden_grid(settings, grid).movedim(1 + axis, 1).flatten(2).double().mean(dim=2)
    assert (((hidden > 0) & (hidden < 1)).sum(dim=1) <= 1).all()
    assert (hidden == 1).any()


def test_one_block_is_a_box_around_a_place() -> None:
    """What is hidden lies nearer in the box's own measure than what is shown, for a stretch that can be found."""
    for hidden in hidden_grid(BlockHiding(mask_ratio=0.4), (1, 9, 11)):
        rows, columns = hidden[0].any(dim=1).nonzero().flatten(), hidden[0].any(dim=0).nonzero().flatten()
        inner = hidden[0][rows[0] + 1 : rows[-1], columns[0] + 1 : columns[-1]]
        assert inner.all(), "nothing is shown inside the box's border"


def test_three_blocks_hide_other_places_than_one() -> None:
    one, three = (hidden_grid(BlockHiding(num_blocks=number, mask_ratio=0.3), (1, 12, 12)).float() for number in (1, 3))

    def neighbours(hidden: Tensor) -> float:
        return float((hidden[..., 1:] * hidden[..., :-1]).mean() + (hidden[..., 1:, :] * hidden[..., :-1, :]).mean())

    random = hidden_grid(RandomHiding(mask_ratio=0.3), (1, 12, 12)).float()
    assert neighbours(one) > neighbours(three) > neighbours(random)


def test_a_lattice_is_shown_at_three_quarters_in_the_plane() -> None:
    for hidden in hidden_grid(GridHiding(), (1, 6, 8)):
        shown = (~hidden[0]).nonzero()
        assert len({tuple((place % 2).tolist()) for place in shown}) == 1
        assert len(shown) == 12


@pytest.mark.parametrize(("settings", "grid"), STRUCTURED, ids=str)
def test_the_first_hidden_slots_are_a_random_part(settings: AnyHiding, grid: tuple[int, ...]) -> None:
    """A decoder that predicts only the first slots must not see the same kind of place every time."""
    length, samples = math.prod(grid), 3000
    name = Sample(torch.zeros(samples, dtype=torch.int64), torch.arange(samples), torch.zeros(samples, dtype=torch.int64))
    plan = hide(torch.ones(samples, length, dtype=torch.bool), grid, settings, 0, name)
    half = num_predicted(plan.hidden.shape[1], 0.5)
    first = torch.bincount(plan.hidden[:, :half].flatten(), minlength=length).double()
    every = torch.bincount(plan.hidden.flatten(), minlength=length).double()
    often = every > 400
    share = first[often] / every[often]
    assert (share - half / plan.hidden.shape[1]).abs().max() < 0.12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TubeHiding(axis=2), r"hiding.axis=2 and the data have 2 axes; give 0 to 1, or channels"),
        (SliceHiding(axis="channels"), "hiding.axis=channels needs more than one channel group; set model.encoder.groups"),
    ],
)
def test_an_axis_that_is_not_there_is_refused(settings: TubeHiding | SliceHiding, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_hiding(settings, (1, 4, 4))
    with pytest.raises(ValueError, match=message):
        hidden_grid(settings, (1, 4, 4))


def test_a_grid_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grid \(1, 3\) holds 3 tokens and valid has 4"):
        hide(torch.ones(1, 4, dtype=torch.bool), (1, 3), RandomHiding(), 0, Sample(*[torch.arange(1)] * 3))


def test_the_ratio_goes_in_stages_from_the_first_to_the_last() -> None:
    settings = RandomHiding(mask_ratio=0.5, final_mask_ratio=0.8, num_stages=4)
    found = [at_progress(settings, progress / 100).mask_ratio for progress in range(101)]
    assert found == sorted(found)
    assert sorted(set(found)) == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert at_progress(RandomHiding(), 0.7) == RandomHiding()


@pytest.mark.parametrize(("num_hidden", "fraction", "wanted"), [(147, 0.25, 37), (10, 1.0, 10), (3, 0.01, 1), (0, 0.5, 0), (2, 0.25, 1)])
def test_the_number_of_tokens_predicted(num_hidden: int, fraction: float, wanted: int) -> None:
    assert num_predicted(num_hidden, fraction) == wanted


@given(st.integers(0, 400), st.floats(0.01, 0.99))
def test_the_count_on_the_device_is_the_count(length: int, ratio: float) -> None:
    valid = torch.zeros(1, 400, dtype=torch.bool)
    valid[0, :length] = True
    plan = hide(valid, (1, 400), RandomHiding(mask_ratio=ratio), 0, Sample(*[torch.arange(1)] * 3))
    assert int(plan.visible_used.sum()) == num_kept(length, ratio)


def one(epoch: int = 0, tile: int = 7, repeat: int = 0, seed: int = 0, length: int = 64) -> HidingPlan:
    name = Sample(*(torch.tensor([number]) for number in (epoch, tile, repeat)))
    return hide(torch.ones(1, length, dtype=torch.bool), (1, length), RandomHiding(), seed, name)


@pytest.mark.parametrize(
    ("length", "ratio", "kept"),
    [
        (1000, 0.9, 100),
        (1000, 0.8, 200),
        (1000, 0.7, 300),
        (196, 0.75, 49),
        (196, 0.9, 20),
        (512, 0.75, 128),
        (216, 0.75, 54),
        (216, 0.85, 32),
        (7, 0.5, 4),
        (25, 0.9, 3),
        (45, 0.3, 32),
        (10, 0.05, 9),
        (3, 0.01, 2),
        (2, 0.99, 1),
        (1, 0.75, 1),
        (0, 0.75, 0),
    ],
)
def test_the_number_of_tokens_kept(length: int, ratio: float, kept: int) -> None:
    assert num_kept(length, ratio) == kept
    plan = hide(torch.ones(2, length, dtype=torch.bool), (1, length), RandomHiding(mask_ratio=ratio), 0, Sample(*[torch.arange(2)] * 3))
    assert plan.visible.shape == (2, kept)
    assert plan.hidden.shape == (2, length - kept)
    assert plan.full


@given(st.integers(2, 5000), st.integers(1, 99))
@example(1000, 90)
@example(45, 30)
def test_the_number_kept_is_the_exact_share_rounded_half_up(length: int, percent: int) -> None:
    exact = math.floor(length * (1 - Fraction(percent, 100)) + Fraction(1, 2))
    assert num_kept(length, percent / 100) == max(1, min(length - 1, exact))


def splitmix(seed: int, *words: int) -> int:
    """The same hash in Python's integers."""
    state = seed % 2**64
    for word in words:
        state = (state * 0x9E3779B97F4A7C15 + word + 1) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**63


@given(st.integers(0, LAST), st.lists(st.integers(-(2**63), LAST), min_size=1, max_size=4), st.booleans())
@example(LAST, [LAST, LAST], True)
@example(0, [0], False)
@example(LAST, [-1, 2**32], False)
def test_counter_bits_are_those_of_plain_integers(seed: int, words: list[int], as_tensor: bool) -> None:
    given_words = [torch.tensor([word, 0]) for word in words] if as_tensor else words
    bits = counter_bits(seed, *given_words)
    assert bits.dtype == torch.int64
    assert int(bits.reshape(-1)[0]) == splitmix(seed, *words)


def test_counter_bits_broadcast_their_words() -> None:
    rows, columns = torch.arange(3), torch.arange(5) * 2**40
    bits = counter_bits(9, 4, rows[:, None], columns)
    assert bits.tolist() == [[splitmix(9, 4, row, column) for column in columns.tolist()] for row in rows.tolist()]


def test_streams_and_words_in_another_order_give_other_numbers() -> None:
    assert counter_bits(0, STREAM_HIDE, 1, 2) != counter_bits(0, STREAM_CROP, 1, 2)
    assert counter_bits(0, 1, 2) != counter_bits(0, 2, 1)


def test_counter_below_reaches_every_number_equally() -> None:
    drawn = counter_below(torch.tensor(7), 3, torch.arange(7000))
    found = torch.bincount(drawn, minlength=7).double()
    assert float(((found - 1000) ** 2 / 1000).sum()) < 22.5, "chi-square with 6 degrees of freedom, 1 in 1000"


@given(st.integers(2, 40), st.sampled_from([0.25, 0.5, 0.75, 0.9]), st.integers(0, 2**16), st.integers(0, LAST))
def test_any_batching_and_order_gives_the_same_sets(length: int, ratio: float, draw: int, seed: int) -> None:
    settings = RandomHiding(mask_ratio=ratio)
    valid = torch.rand(5, length, generator=generator(draw)) < 0.7
    epoch, tile, repeat = (torch.randint(0, high, (5,), generator=generator(draw + 1)) for high in (3, LAST, 4))
    name = Sample(epoch, tile, repeat)
    whole = hide(valid, (1, length), settings, seed, name)
    order = torch.randperm(5, generator=generator(draw + 2))
    mixed = hide(valid[order], (1, length), settings, seed, name.shuffled(order))
    for place, index in enumerate(order.tolist()):
        alone = hide(valid[index : index + 1], (1, length), settings, seed, name.shuffled(torch.tensor([index])))
        assert hidden_set(whole, index) == hidden_set(mixed, place) == hidden_set(alone, 0)
        assert shown_set(whole, index) == shown_set(mixed, place) == shown_set(alone, 0)


def test_every_part_of_the_name_and_the_seed_change_the_set() -> None:
    sets = [one(), one(epoch=1), one(tile=8), one(repeat=1), one(seed=1), one(epoch=2**40)]
    assert len({frozenset(hidden_set(plan, 0)) for plan in sets}) == len(sets)
    assert hidden_set(one(), 0) == hidden_set(one(), 0)


def test_every_place_is_hidden_equally_often() -> None:
    samples, length, share = 4000, 16, 0.75
    name = (torch.zeros(samples, dtype=torch.int64), torch.arange(samples), torch.zeros(samples, dtype=torch.int64))
    plan = hide(torch.ones(samples, length, dtype=torch.bool), (1, length), RandomHiding(mask_ratio=share), 11, Sample(*name))
    found = torch.bincount(plan.hidden.flatten(), minlength=length).double()
    wanted = samples * share
    statistic = float(((found - wanted) ** 2 / (wanted * (1 - share))).sum()) * (length - 1) / length
    assert statistic < 37.7, "chi-square with 15 degrees of freedom, 1 in 1000"


def test_all_sets_are_equally_likely() -> None:
    samples = 6000
    name = (torch.arange(samples), torch.zeros(samples, dtype=torch.int64), torch.zeros(samples, dtype=torch.int64))
    plan = hide(torch.ones(samples, 4, dtype=torch.bool), (1, 4), RandomHiding(mask_ratio=0.5), 12, Sample(*name))
    found = torch.bincount((1 << plan.hidden).sum(dim=1), minlength=16).double()
    found = found[found > 0]
    assert len(found) == 6
    assert float(((found - 1000) ** 2 / 1000).sum()) < 20.6, "chi-square with 5 degrees of freedom, 1 in 1000"


def test_a_hidden_set_that_is_handed_in() -> None:
    hidden = torch.tensor([[True, False, True, False, True], [False, True, False, True, True]])
    plan = plan_from_hidden(hidden)
    assert plan.full
    assert plan.visible.tolist() == [[1, 3], [0, 2]]
    assert plan.hidden.tolist() == [[0, 2, 4], [1, 3, 4]]


@given(st.integers(1, 12), st.integers(0, 2**16))
def test_uneven_hidden_sets_and_tokens_that_are_none(length: int, seed: int) -> None:
    hidden = torch.rand(4, length, generator=generator(seed)) < 0.5
    valid = torch.rand(4, length, generator=generator(seed + 1)) < 0.7
    plan = plan_from_hidden(hidden, valid)
    for index in range(4):
        assert hidden_set(plan, index) == set(torch.nonzero(hidden[index] & valid[index]).flatten().tolist())
        assert shown_set(plan, index) == set(torch.nonzero(~hidden[index] & valid[index]).flatten().tolist())
    assert bool(plan.full) == bool(plan.visible_used.all() and plan.hidden_used.all())


def test_shape_types_are_checked() -> None:
    with pytest.raises(Exception, match="valid"):
        hide(torch.ones(2, 8), (1, 8), RandomHiding(), 0, Sample(*[torch.zeros(2, dtype=torch.int64)] * 3))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_a_share_that_hides_nothing_or_all_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        RandomHiding(mask_ratio=ratio)


def mixed_valid(length: int) -> Tensor:
    return torch.arange(length)[None] < torch.tensor([length, 0, 1, length // 2])[:, None]


def test_slots_have_the_same_shape_whatever_is_valid() -> None:
    name = [torch.arange(4)] * 3
    plans = [hide(valid, (1, 20), RandomHiding(), 0, Sample(*name)) for valid in (mixed_valid(20), torch.ones(4, 20, dtype=torch.bool))]
    assert plans[0].visible.shape == plans[1].visible.shape == (4, 5)
    assert plans[0].hidden.shape == plans[1].hidden.shape == (4, 15)
    assert not plans[0].full
    assert plans[1].full
