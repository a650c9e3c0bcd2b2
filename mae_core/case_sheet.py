"""A picture to check one labelled scan by eye: three planes through its largest object, outlines of prediction and reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from mae_core.case_metrics import around, largest
from mae_core.figures import render

Rgb = tuple[int, int, int]

PALETTE: tuple[Rgb, ...] = ((255, 64, 48), (255, 200, 0), (80, 200, 60), (230, 90, 230), (255, 140, 30), (110, 120, 255), (200, 150, 110))
"""Of classes that have no colour of their own; they begin again after the last."""
REFERENCE = "#00e5ff"
"""Outlines of the reference, in every class; no colour of the palette is like it."""
CONVENTION = "radiological convention: the patient's right is on the left of the picture"
MARGIN_MM = 10.0
"""Around the object in the enlarged planes."""
MAX_NAMED = 12
"""Classes that the legend names."""


SPOTS = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
"""Where the letters of a view stand, as shares of its width and height, and how they are aligned."""


@dataclass(frozen=True)
class View:
    """How a plane is laid out: axes of the array that run to the right and down, and the letters at its four sides."""

    name: str
    fixed: int
    across: int
    down: int
    letters: str


VIEWS = (View("axial", 2, 0, 1, "RLAP"), View("coronal", 1, 0, 2, "RLSI"), View("sagittal", 0, 1, 2, "APSI"))
"""In RAS+ all axes are shown backwards, which puts the right of the patient on the left: the radiological convention."""


@dataclass(frozen=True, eq=False)
class CasePicture:
    """What is to be seen, in RAS+ order.

    Attributes:
        title: A pseudonym, and nothing else.
        image: One channel.
        predicted: Class numbers; 0 and below are not drawn.
        reference: Class numbers, or None.
        spacing_mm: Between voxels.
        names: Of the classes.
        colours: Of some classes.
    """

    title: str
    image: Float[np.ndarray, "x y z"]
    predicted: Integer[np.ndarray, "x y z"]
    reference: Integer[np.ndarray, "x y z"] | None
    spacing_mm: tuple[float, ...]
    names: Mapping[int, str]
    colours: Mapping[int, Rgb]


def case_sheet(case: CasePicture) -> NDArray[np.uint8]:
    """The picture `(height, width, 3)`.

    The planes go through the largest connected object of the reference, or where it has none of the prediction, each where
    it is largest; without any object through the middle. A second row shows the neighbourhood of an object that is small.
    """
    shown = case.reference if case.reference is not None and (case.reference > 0).any() else case.predicted
    thing = largest(shown > 0)
    box = around(thing) if thing.any() else tuple(slice(0, size) for size in thing.shape)
    centre = tuple(_fullest(thing, axis) for axis in range(3))
    reach = [(part.stop - part.start) / size for part, size in zip(box, thing.shape, strict=True)]
    is_small = bool(thing.any()) and max(reach) < 0.4
    figure = Figure(figsize=(10.5, 7.6 if is_small else 4.3), dpi=110, layout="constrained", facecolor="black")
    rows = figure.subplots(2 if is_small else 1, 3, squeeze=False)
    low, high = _window(case.image)
    for number, row in enumerate(rows):
        for place, view in zip(row, VIEWS, strict=True):
            _draw(place, case, view, centre[view.fixed], (low, high))
            if number:
                _enlarge(place, case, view, box)
    figure.suptitle(case.title, fontsize=10, color="white")
    legend = figure.legend(handles=_legend(case), loc="outside lower center", ncols=6, fontsize=8, facecolor="black", labelcolor="white")
    legend.set_title(CONVENTION, FontProperties(size=8))
    legend.get_title().set_color("white")
    return render(figure)


def _fullest(thing: NDArray[np.bool_], axis: int) -> int:
    """Index of the plane across an axis that holds most of an object; the middle where there is none."""
    if not thing.any():
        return int(thing.shape[axis] // 2)
    return int(np.argmax(thing.sum(axis=tuple(other for other in range(3) if other != axis))))


def _window(image: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Values that are black and white: the 1st percentile of all, and the 99.5th of what is brighter than the mean, which is no air."""
    values = image[np.isfinite(image)]
    bright = values[values > values.mean()] if len(values) else values
    if not len(bright):
        return 0.0, 1.0
    low, high = float(np.percentile(values, 1)), float(np.percentile(bright, 99.5))
    return low, max(high, low + 1e-6)


def _plane(array: NDArray[Any], view: View, index: int) -> NDArray[Any]:
    """Rows and columns of a plane as they are seen: both axes run backwards."""
    plane: NDArray[Any] = array.take(index, axis=view.fixed)
    return plane.T[::-1, ::-1]


def _draw(place: Any, case: CasePicture, view: View, index: int, ends: tuple[float, float]) -> None:
    aspect = case.spacing_mm[view.down] / case.spacing_mm[view.across]
    place.imshow(_plane(case.image, view, index), cmap="gray", vmin=ends[0], vmax=ends[1], interpolation="nearest", aspect=aspect)
    for array, is_reference in ((case.predicted, False), (case.reference, True)):
        if array is None:
            continue
        plane = _plane(array, view, index)
        for value in np.unique(plane[plane > 0]):
            colour = REFERENCE if is_reference else _hex(_colour(case, int(value)))
            inside = np.pad((plane == value).astype(np.float32), 1)  # an object at the border of the image is outlined there, too
            axes = [np.arange(size) - 1 for size in inside.shape]
            style = "dashed" if is_reference else "solid"
            place.contour(axes[1], axes[0], inside, levels=[0.5], colors=[colour], linewidths=1.1, linestyles=[style])
    height, width = plane_size(case, view)
    place.set_xlim(-0.5, width - 0.5)
    place.set_ylim(height - 0.5, -0.5)
    place.set_xticks([])
    place.set_yticks([])
    place.set_title(view.name, fontsize=8, color="white")
    for letter, (x, y, across, up) in zip(view.letters, SPOTS, strict=True):
        text = place.text(x, y, letter, transform=place.transAxes, color="white", fontsize=9, ha=across, va=up)
        text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def plane_size(case: CasePicture, view: View) -> tuple[int, int]:
    """Rows and columns of a view."""
    return case.image.shape[view.down], case.image.shape[view.across]


def _enlarge(place: Any, case: CasePicture, view: View, box: Sequence[slice]) -> None:
    """Show the neighbourhood of an object only."""
    limits = []
    for axis in (view.across, view.down):
        size, margin = case.image.shape[axis], MARGIN_MM / case.spacing_mm[axis]
        limits.append((size - box[axis].stop - margin - 0.5, size - 1 - box[axis].start + margin + 0.5))
    place.set_xlim(*limits[0])
    place.set_ylim(*reversed(limits[1]))
    place.set_title(f"{view.name}, enlarged", fontsize=8, color="white")


def _legend(case: CasePicture) -> list[Line2D]:
    there = [int(value) for value in np.unique(case.predicted) if value > 0]
    lines = [Line2D([], [], color=_hex(_colour(case, value)), label=case.names.get(value, f"class {value}")) for value in there[:MAX_NAMED]]
    if len(there) > MAX_NAMED:
        lines.append(Line2D([], [], color="black", label=f"and {len(there) - MAX_NAMED} more"))
    if not there:
        lines.append(Line2D([], [], color="black", label="nothing predicted"))
    if case.reference is not None:
        lines.append(Line2D([], [], color=REFERENCE, linestyle="dashed", label="reference"))
    return lines


def _colour(case: CasePicture, value: int) -> Rgb:
    return case.colours.get(value) or PALETTE[sorted([*case.names, value]).index(value) % len(PALETTE)]


def _hex(colour: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
