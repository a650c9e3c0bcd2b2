"""Codes of places: written out, in tokens or in millimetres, fixed or learned, interpolated on the real grid."""

from __future__ import annotations

import math

import pytest
import torch

from mae_core.positions import Places, Positions, PositionSettings, interpolated, sincos_codes, sincos_positions

GRIDS = [(7,), (3, 5), (2, 3, 4)]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_reversed_order_is_the_code_of_the_transposed_grid(grid: tuple[int, ...]) -> None:
    codes = sincos_positions(grid, 24, "reversed").reshape(*grid, 24)
    other = sincos_positions(grid[::-1], 24).reshape(*grid[::-1], 24)
    torch.testing.assert_close(codes, other.permute(*reversed(range(len(grid))), len(grid)), rtol=0, atol=0)


def test_published_weights_have_the_last_axis_first() -> None:
    """The first half of the width varies along columns, as in the published weights; ours along rows."""
    published, ours = (sincos_positions((3, 5), 16, order).reshape(3, 5, 16) for order in ("reversed", "array"))
    assert torch.equal(published[0, :, :8], published[2, :, :8])
    assert not torch.equal(published[:, 0, :8], published[:, 4, :8])
    assert torch.equal(ours[:, 0, :8], ours[:, 4, :8])


@pytest.mark.parametrize("grid", GRIDS)
def test_the_formula_written_out(grid: tuple[int, ...]) -> None:
    dim, axes = 26, len(grid)
    pairs = dim // (2 * axes)
    codes = sincos_positions(grid, dim)
    for number, place in enumerate(torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, axes).tolist()):
        wanted = []
        for coordinate in place:
            angles = [coordinate / 10000 ** (pair / pairs) for pair in range(pairs)]
            wanted += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(codes[number, : len(wanted)], torch.tensor(wanted), rtol=0, atol=1e-6)
        assert not codes[number, len(wanted) :].any()


@pytest.mark.parametrize("grid", GRIDS)
def test_half_the_spacing_and_twice_the_grid_leave_the_codes_of_the_same_places(grid: tuple[int, ...]) -> None:
    positions = Positions(PositionSettings(unit="physical", reference=4.0), 24)
    fine = tuple(2 * size for size in grid)
    coarse = positions(torch.arange(math.prod(grid))[None], grid, torch.full((1, len(grid)), 4.0))
    finer = positions(torch.arange(math.prod(fine))[None], fine, torch.full((1, len(grid)), 2.0))
    every_second = finer.reshape(*fine, 24)[tuple(slice(None, None, 2) for _ in grid)].reshape(1, -1, 24)
    torch.testing.assert_close(every_second, coarse, rtol=0, atol=1e-6)


def test_physical_positions_at_the_reference_are_those_in_tokens() -> None:
    ids = torch.tensor([[14, 0, 7]])
    physical = Positions(PositionSettings(unit="physical", reference=10.0), 16)(ids, (3, 5), torch.full((1, 2), 10.0))
    torch.testing.assert_close(physical, Positions(PositionSettings(), 16)(ids, (3, 5)), rtol=0, atol=1e-5)


def test_samples_of_several_resolutions_in_one_batch_have_their_own_codes() -> None:
    ids = torch.arange(6).expand(2, -1)
    codes = Positions(PositionSettings(unit="physical"), 16)(ids, (2, 3), torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
    rows = codes.reshape(2, 2, 3, 16)
    torch.testing.assert_close(rows[0, :, 0], rows[1, :, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(rows[0, :, 1], rows[1, :, 1])


def test_physical_positions_without_a_spacing_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the distance between tokens of every sample; the data give none"):
        Positions(PositionSettings(unit="physical"), 16)(torch.zeros(1, 1, dtype=torch.int64), (2, 2))


@pytest.mark.parametrize(("old", "new"), [((5,), (9,)), ((3, 5), (5, 9)), ((2, 3, 4), (3, 5, 7)), ((4, 4), (2, 7)), ((1, 3), (4, 3))])
def test_a_ramp_stays_a_ramp_on_the_real_grid(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Each axis by itself: an implementation that flattens the grid to one line fails."""
    places = torch.cartesian_prod(*(torch.linspace(0, 1, size) for size in old)).reshape(-1, len(old))
    wanted = torch.cartesian_prod(*(torch.linspace(0, 1, size) for size in new)).reshape(-1, len(new))
    wanted = torch.where(torch.tensor(old) > 1, wanted, 0.0)
    torch.testing.assert_close(interpolated(places, old, new), wanted, rtol=0, atol=1e-6)


def test_a_learned_table_is_looked_up_and_learns() -> None:
    positions = Positions(PositionSettings(kind="learned", grid=(3, 5)), 8)
    ids = torch.tensor([[14, 0, 7]])
    assert torch.equal(positions(ids, (3, 5))[0], positions.table_token[[14, 0, 7]])
    positions(ids, (6, 5)).sum().backward()
    assert positions.table_token.grad is not None


def test_a_table_of_other_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the table of positions has 2 axes \(3, 5\) and the data have 3"):
        Positions(PositionSettings(kind="learned", grid=(3, 5)), 8)(torch.zeros(1, 1, dtype=torch.int64), (2, 2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "learned"}, "needs positions.grid"),
        ({"kind": "learned", "grid": (2, 2), "unit": "physical"}, "has no physical unit"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Positions(PositionSettings.model_validate(settings), 16)


def test_a_width_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="a width of 4 is too small for positions on 3 axes; use at least 6"):
        sincos_codes(torch.zeros(1, 3), 4)


def test_the_same_place_in_two_groups_differs_by_the_groups_code() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        places = Places(PositionSettings(), 2, 16)
    codes = places(torch.tensor([[1, 7]]), (2, 3))
    torch.testing.assert_close(codes[0, 1] - codes[0, 0], places.group_token[1] - places.group_token[0], rtol=0, atol=1e-6)
    assert "group_token" not in dict(Places(PositionSettings(), 1, 16).named_parameters())
