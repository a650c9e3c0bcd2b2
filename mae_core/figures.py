"""Pictures: reconstruction panels for the tracker and label maps for a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave
from numpy.typing import NDArray

from mae_core.evaluate import Panel

TRUE_COLOUR = (("B04", "B03", "B02"), ("OLI_B4", "OLI_B3", "OLI_B2"), ("ETM_B3", "ETM_B2", "ETM_B1"), ("TM_B3", "TM_B2", "TM_B1"))
"""Channels shown as red, green and blue where a sample has them: Sentinel-2, then the Landsats."""


def reconstruction(panels: Sequence[Panel], title: str) -> NDArray[np.uint8]:
    """One picture `(height, width, 3)` with a row per sample: input, what was shown, prediction, error.

    Optical scenes are shown in true colour: red, green and blue in physical units under one stretch, so that colours are those
    of the ground. Others are shown by the first channel that they have; volumes by the middle plane of their last axis (axial in
    RAS+, anterior upward), time series by their middle date. Stretched between the 1st and 99th percentile of the input.
    """
    figure = Figure(figsize=(9.2, 2.35 * len(panels) + 0.5), dpi=100, layout="constrained")
    axes = figure.subplots(len(panels), 4, squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        chosen = _channels(panel)
        mean, std = (np.asarray(values, np.float32)[chosen] for values in (panel.mean, panel.std))
        images = [plane(part[chosen], panel.axes) * std + mean for part in (panel.pixels, panel.shown, panel.filled)]
        low, high = np.percentile(images[0], [1, 99])
        spread = max(float(high - low), 1e-6 * float(std.max()))
        for place, image, name in zip(row, images, ("input", "shown", "prediction"), strict=False):
            grey = np.where(np.isnan(image), 0.5, np.clip((image - low) / spread, 0, 1))
            place.imshow(grey if grey.shape[-1] == 3 else grey[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            place.set_title(name, fontsize=8)
        _error(row[3], plane(panel.error[chosen], panel.axes))
        names = "/".join(panel.channels[index] for index in chosen)
        row[0].set_ylabel(names, fontsize=8)
        for place in row:
            place.set_xticks([])
            place.set_yticks([])
    figure.suptitle(title, fontsize=9)
    return render(figure)


def _error(place: object, error: NDArray[np.float32]) -> None:
    """Mean absolute error over the shown channels, in standard deviations; white where nothing was predicted."""
    counted = np.isfinite(error)
    total = np.where(counted, error, 0).sum(axis=-1)
    mean = np.where(counted.any(axis=-1), total / np.maximum(counted.sum(axis=-1), 1), np.nan)
    image = place.imshow(mean, cmap="magma", vmin=0, vmax=1.5, interpolation="nearest")  # type: ignore[attr-defined]
    place.set_title("|error| (std)", fontsize=8)  # type: ignore[attr-defined]
    place.figure.colorbar(image, ax=place, fraction=0.046)  # type: ignore[attr-defined]


def render(figure: Figure) -> NDArray[np.uint8]:
    """A figure as an RGB array."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_picture(picture: NDArray[np.uint8], path: Path) -> None:
    """Write a picture as PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, picture)


def read_picture(path: Path) -> NDArray[np.uint8]:
    """The picture that `save_picture` wrote, `(height, width, 3)`."""
    picture: NDArray[np.uint8] = np.rint(imread(path)[..., :3] * 255).astype(np.uint8)
    return picture


def _channels(panel: Panel) -> list[int]:
    return shown_channels(panel.channels, [bool(np.any(part)) for part in panel.pixels])


def shown_channels(channels: Sequence[str], there: Sequence[bool]) -> list[int]:
    """Places of the three channels that give true colour, where all are there; else of the first that is."""
    filled = [index for index in range(len(channels)) if there[index]]
    for colours in TRUE_COLOUR:
        found = [index for name in colours for index in filled if channels[index] == name]
        if len(found) == len(colours):
            return found
    return filled[:1] or [0]


def plane(array: NDArray[np.float32], axes: Sequence[str] = ()) -> NDArray[np.float32]:
    """`(row, column, channel)` of `(channel, *space)` with one to three axes.

    Of a time series the middle date, of any other volume the middle last-axis plane.
    """
    if array.ndim == 4 and tuple(axes[:1]) == ("time",):
        array = array[:, array.shape[1] // 2]
    elif array.ndim == 4:
        array = array[..., array.shape[-1] // 2].swapaxes(1, 2)[:, ::-1]
    if array.ndim == 2:
        array = array[:, None]
    return np.moveaxis(array, 0, -1)
