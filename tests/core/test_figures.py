"""Pictures have a row per sample, the right colours and the right way up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from mae_core.evaluate import Panel
from mae_core.figures import _channels, plane, reconstruction, render, save_picture


def panel(space: tuple[int, ...], channels: tuple[str, ...] = ("T1w", "T2w")) -> Panel:
    pixels = np.random.default_rng(0).normal(size=(len(channels), *space)).astype(np.float32)
    shown, filled, error = pixels.copy(), pixels.copy(), np.full_like(pixels, np.nan)
    shown[:, : space[0] // 2] = np.nan
    error[:, : space[0] // 2] = 0.3
    return Panel(pixels, shown, filled, error, channels, (0.0,) * len(channels), (1.0,) * len(channels))


@pytest.mark.parametrize("space", [(16,), (8, 12), (6, 8, 4)])
def test_a_row_per_sample(space: tuple[int, ...]) -> None:
    heights = []
    for count in (1, 3):
        picture = reconstruction([panel(space)] * count, "step 10")
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        assert len(np.unique(picture)) > 10, "something is drawn"
        heights.append(picture.shape[0])
    assert heights[1] - heights[0] == pytest.approx(470, abs=2)


def test_what_is_missing_everywhere_is_no_warning() -> None:
    empty = np.zeros((1, 8, 8), np.float32)
    nothing = np.full_like(empty, np.nan)
    assert reconstruction([Panel(empty, nothing, nothing, nothing, ("T1w",), (0.0,), (1.0,))], "").any()


def test_optical_channels_are_shown_in_true_colour_and_others_by_the_first_that_holds_anything() -> None:
    assert _channels(panel((4, 4), ("B02", "B03", "B04", "B08"))) == [2, 1, 0]
    assert _channels(panel((4, 4))) == [0]
    both = panel((4, 4), ("B02", "B03", "B04", "OLI_B2", "OLI_B3", "OLI_B4"))
    assert _channels(both) == [2, 1, 0]
    both.pixels[:3] = 0
    assert _channels(both) == [5, 4, 3], "a sample of Landsat in a store of both"
    absent = panel((4, 4))
    absent.pixels[0] = 0
    assert _channels(absent) == [1]
    absent.pixels[1] = 0
    assert _channels(absent) == [0]


def test_colours_are_those_of_the_ground() -> None:
    """Green ground of reflectance 0.1, 0.3, 0.1 is green, though each channel lies at its own mean."""
    channels, mean, std = ("B02", "B03", "B04"), (0.1, 0.3, 0.1), (0.01, 0.02, 0.03)
    pixels = np.random.default_rng(0).normal(0, 0.1, (3, 16, 16)).astype(np.float32)
    nothing = np.full_like(pixels, np.nan)
    picture = reconstruction([Panel(pixels, pixels, pixels, nothing, channels, mean, std)], "").astype(int)
    green = (picture[..., 1] > picture[..., 0] + 100) & (picture[..., 1] > picture[..., 2] + 100)
    assert green.mean() > 0.2


def test_a_plane_of_a_series_is_its_middle_date() -> None:
    series = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5).astype(np.float32)
    assert np.array_equal(plane(series, ("time", "y", "x")), np.moveaxis(series[:, 1], 0, -1))


def test_a_plane_of_an_image_is_itself_with_channels_last() -> None:
    image = np.arange(24.0).reshape(2, 3, 4).astype(np.float32)
    assert np.array_equal(plane(image), np.moveaxis(image, 0, -1))
    assert plane(image[:, 0]).shape == (1, 4, 2)


def test_a_plane_of_a_volume_is_axial_with_anterior_up_and_right_to_the_right() -> None:
    """In RAS+ the first axis runs to the right, the second to the front, the third up."""
    x, y, z = np.meshgrid(np.arange(5), np.arange(6), np.arange(7), indexing="ij")
    rows = [plane(axis[None].astype(np.float32))[..., 0] for axis in (x, y, z)]
    assert (rows[2] == 3).all(), "the middle plane"
    assert rows[0].shape == (6, 5)
    assert rows[0][0].tolist() == [0, 1, 2, 3, 4], "right is right"
    assert rows[1][:, 0].tolist() == [5, 4, 3, 2, 1, 0], "front is up"


def test_a_picture_is_written_as_it_is(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1])
    picture = render(figure)
    assert picture.shape == (50, 100, 3)
    path = tmp_path / "new folder" / "picture.png"
    save_picture(picture, path)
    assert np.array_equal(np.round(imread(path)[..., :3] * 255).astype(np.uint8), picture)
