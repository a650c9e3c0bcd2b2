"""DICOM frames become volumes: those of a series are split by what they show, ordered along the normal, and set on a lattice.

Neither file names nor instance numbers decide where a slice lies, only its position. Nothing here reads a file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modalities.dicom_facts import Facts, Frame
from modalities.nifti_file import MAX_SHEAR, MAX_SPACING_MM, MIN_SPACING_MM
from modalities.scene import SceneError

SAME_DIRECTION = 1e-3
"""Directions whose parts differ by no more are one: a twentieth of a degree."""
SAME_MM = 1e-3
SAME_POSITION_MM = 0.01
"""Slices that lie no further apart along the normal lie at one position."""
MAX_UNEVEN = 0.1
"""A slice further from its place on an even lattice than this share of the distance between slices is refused; positions are often
written with a tenth of a millimetre, so some unevenness is none."""
NOTED_UNEVEN = 0.01
"""From here on, the volume is flagged `uneven_slices`."""
COMPONENTS = {"P": "phase", "PHASE": "phase", "R": "real", "REAL": "real", "I": "imaginary", "IMAGINARY": "imaginary"} | {
    "PHASE MAP": "phase",
    "R_IR": "real",
}

UNWANTED = ("localizer", "not_magnitude")
"""Codes of images that are sound and not looked for."""


@dataclass(frozen=True)
class Plane:
    """A frame of a file."""

    facts: Facts
    frame: Frame

    @property
    def first_to_last(self) -> tuple[float | str, ...]:
        """Sorts planes of one position by time, the same whatever the files are called."""
        return (*self.frame.order, self.frame.number, self.facts.instance)


@dataclass(frozen=True, eq=False)
class Stack:
    """Planes of one volume, in their order along the normal.

    Attributes:
        planes: Which.
        place: UID of the series, with what tells this stack from others of it.
        affine: `(column, row, slice)` to RAS+ millimetres.
        flags: `uneven_slices`, `lossy`.
    """

    planes: tuple[Plane, ...]
    place: str = field(repr=False)
    affine: NDArray[np.float64]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unfit:
    """Planes that make no volume: where they belong, and why."""

    planes: tuple[Plane, ...]
    place: str = field(repr=False)
    reason: str
    code: str
    unwanted: bool = False


def stacks_of(series: str, facts: Iterable[Facts]) -> tuple[list[tuple[Stack, ...]], list[Unfit]]:
    """The volumes of one series, and the planes that make none. A volume that was taken several times is a tuple of its moments."""
    planes = sorted((Plane(item, frame) for item in facts for frame in item.frames), key=lambda plane: plane.first_to_last)
    stacks: list[tuple[Stack, ...]] = []
    unfit: list[Unfit] = []
    parts = _split(planes)
    for name, part in parts:
        place = series if len(parts) == 1 else f"{series}/{name}"
        try:
            _check_planes(part)
            sets, are_moments = _sets(part)
        except SceneError as error:
            unfit.append(Unfit(tuple(part), place, str(error), error.code, error.code in UNWANTED))
            continue
        for members in [[*sets.items()]] if are_moments else [[item] for item in sets.items()]:
            inner = place if are_moments else "/".join([place, *(label for label, _ in members if label)])
            try:
                stacks.append(tuple(_stack(moment, f"{inner}/{label}" if are_moments else inner) for label, moment in members))
            except SceneError as error:
                unfit.append(Unfit(tuple(plane for _, moment in members for plane in moment), inner, str(error), error.code))
    return stacks, unfit


def _stack(planes: Sequence[Plane], place: str) -> Stack:
    ordered, affine, flags = _lattice(planes)
    lossy = ("lossy",) if any(plane.facts.lossy for plane in ordered) else ()
    return Stack(ordered, place, affine, (*flags, *lossy))


def _split(planes: Sequence[Plane]) -> list[tuple[str, list[Plane]]]:
    """Planes that differ in nothing but position and time, each with what tells them apart."""
    clusters: tuple[_Clusters, ...] = (_Clusters(SAME_DIRECTION), _Clusters(SAME_MM))
    parts: defaultdict[str, list[Plane]] = defaultdict(list)
    for plane in planes:
        frame, pixels = plane.frame, plane.facts.pixels
        key = (
            clusters[0].of(frame.orientation),
            clusters[1].of(frame.spacing),
            (pixels.rows, pixels.columns, pixels.bits_allocated, pixels.bits_stored, pixels.signed, pixels.samples, pixels.photometric),
            frame.image_type,
            (frame.echo[0], round(frame.echo[1], 1)),
            None if frame.b_value is None else round(frame.b_value),
        )
        parts[repr(key)].append(plane)
    return sorted(parts.items())


class _Clusters:
    """Numbers that are nearly the same count as the first of them that came."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._known: list[tuple[float, ...]] = []

    def of(self, numbers: tuple[float, ...] | None) -> tuple[float, ...] | None:
        """What these numbers count as, rounded."""
        if numbers is None:
            return None
        near = [known for known in self._known if np.abs(np.subtract(known, numbers)).max() <= self._tolerance]
        if not near:
            self._known.append(numbers)
        return tuple(round(number, 3) + 0.0 for number in (near or [numbers])[0])


def _check_planes(planes: Sequence[Plane]) -> None:
    """Refuses what no lattice can be made of, by the first plane of a part or by any."""
    facts, frame = planes[0].facts, planes[0].frame
    kinds = {part for value in frame.image_type for part in value.split("_")}
    if "LOCALIZER" in kinds:
        raise SceneError("a localiser, made to plan others by", "localizer")
    component = next((COMPONENTS[value] for value in frame.image_type[2:] if value in COMPONENTS), None)
    if component is not None and facts.modality == "MR":
        raise SceneError(f"a {component} image, while magnitudes are wanted", "not_magnitude")
    if any(plane.frame.position is None or plane.frame.orientation is None for plane in planes):
        raise SceneError(
            "no ImagePositionPatient or ImageOrientationPatient, so nobody knows where it lies; export it again", "no_position"
        )
    if frame.spacing is None:
        raise SceneError("no PixelSpacing, so nobody knows how large it is; export it again", "no_spacing")
    rows_columns = np.reshape(frame.orientation or (), (2, 3))
    if np.abs(rows_columns @ rows_columns.T - np.eye(2)).max() > SAME_DIRECTION:
        raise SceneError("ImageOrientationPatient holds no two unit vectors at a right angle", "bad_orientation")


def _sets(planes: Sequence[Plane]) -> tuple[dict[str, list[Plane]], bool]:
    """Planes in sets that hold each position once, by what tells these apart, and whether they are moments of one volume.

    Where positions repeat, the first of these tags decides that gives every set the same positions: the temporal position, the
    inversion time and flip angle, the direction of diffusion, the acquisition number. Where none does, the k-th image of every position
    by acquisition number, instance number and time of day makes the k-th set, if all positions have equally many.

    Raises:
        SceneError: Positions repeat and nothing tells the images of one apart.
    """
    heights = _heights(planes)
    place = dict(zip(map(id, planes), heights, strict=True))
    counts = list(np.unique(heights, return_counts=True)[1])
    if max(counts) == 1:
        return {"": list(planes)}, False
    ways: tuple[tuple[Callable[[Frame], Hashable], bool], ...] = (
        (lambda frame: frame.temporal, True),
        (lambda frame: frame.contrast, False),
        (lambda frame: frame.gradient, True),
        (lambda frame: frame.order[0], True),
    )
    for way, is_time in ways:
        sets: defaultdict[Hashable, list[Plane]] = defaultdict(list)
        for plane in planes:
            sets[way(plane.frame)].append(plane)
        whole = [sorted(place[id(plane)] for plane in members) for members in sets.values()]
        if len(sets) > 1 and all(each == whole[0] and len(set(each)) == len(each) for each in whole):
            ordered = sorted(sets.items(), key=lambda item: (repr(type(item[0])), item[0]))
            return {repr(key): members for key, members in ordered}, is_time
    distinct = {(place[id(plane)], plane.frame.order, plane.frame.number, plane.facts.pixels.num_frames > 1) for plane in planes}
    if min(counts) != max(counts) or len(distinct) != len(planes):
        repeated = sum(count > 1 for count in counts)
        raise SceneError(
            f"{len(planes)} images lie at {len(counts)} positions, {repeated} of them with several images that no time tells apart",
            "duplicate_slice",
        )
    by_place: defaultdict[int, list[Plane]] = defaultdict(list)
    for plane in planes:  # in order of time
        by_place[place[id(plane)]].append(plane)
    return {f"occurrence {k}": [members[k] for members in by_place.values()] for k in range(counts[0])}, True


def _normal(plane: Plane) -> NDArray[np.float64]:
    along_row, along_column = np.reshape(plane.frame.orientation or (), (2, 3))
    return np.cross(along_row, along_column)


def _heights(planes: Sequence[Plane]) -> list[int]:
    """Number of the position along the normal that each plane lies at."""
    height = np.array([plane.frame.position for plane in planes], float) @ _normal(planes[0])
    order = np.argsort(height, kind="stable")
    numbers = np.empty(len(planes), int)
    numbers[order] = np.concatenate([[0], np.cumsum(np.diff(height[order]) > SAME_POSITION_MM)])
    return [int(number) for number in numbers]


def _lattice(planes: Sequence[Plane]) -> tuple[tuple[Plane, ...], NDArray[np.float64], tuple[str, ...]]:
    """Planes ordered along the normal, the affine to RAS+, and what is doubtful.

    Raises:
        SceneError: They make no even, right-angled stack.
    """
    if len(planes) == 1:
        raise SceneError("a single slice, which has no thickness to step by", "single_slice")
    normal = _normal(planes[0])
    positions = np.array([plane.frame.position for plane in planes], float)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    step = (positions[-1] - positions[0]) / (len(planes) - 1)
    distance = float(step @ normal)
    off = positions - positions[0] - np.arange(len(planes))[:, None] * step
    uneven = float(np.abs(off @ normal).max()) / distance
    if uneven > MAX_UNEVEN:
        raise _uneven(np.diff(positions @ normal))
    aside = float(np.linalg.norm(step - distance * normal)) / float(np.linalg.norm(step))
    if aside > MAX_SHEAR:
        degrees = float(np.degrees(np.arcsin(min(1.0, aside))))
        raise SceneError(
            f"slices are stacked {degrees:.1f} degrees off their normal (gantry tilt); resample it to a right-angled grid", "gantry_tilt"
        )
    if float(np.linalg.norm(off, axis=1).max()) > MAX_UNEVEN * distance:
        raise SceneError("slices lie beside each other's axis; they belong to no one stack", "uneven_spacing")
    across, down = planes[0].frame.spacing or (0.0, 0.0)
    if not MIN_SPACING_MM <= min(across, down, distance) <= max(across, down, distance) <= MAX_SPACING_MM:
        raise SceneError(
            f"spacing {across:.4g} x {down:.4g} x {distance:.4g} mm is not between {MIN_SPACING_MM} and {MAX_SPACING_MM} mm",
            "absurd_spacing",
        )
    along_row, along_column = np.reshape(planes[0].frame.orientation or (), (2, 3))
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * across, along_column * down, step, positions[0]], axis=1)
    affine[:2] *= -1  # L, P, S to R, A, S
    flags = ("uneven_slices",) if uneven > NOTED_UNEVEN else ()
    return tuple(planes[k] for k in order), affine + 0.0, flags


def _uneven(distances: NDArray[np.float64]) -> SceneError:
    """What is wrong with distances that are not all the same: a hole, or no rule at all."""
    usual = float(np.median(distances))
    multiples = np.rint(distances / usual)
    regular = bool((np.abs(distances - multiples * usual) <= MAX_UNEVEN * usual).all()) and multiples.min() >= 1
    if regular:
        holes = int((multiples - 1).sum())
        return SceneError(
            f"{holes} slices are missing between {len(distances) + 1} that lie {usual:.3f} mm apart; copy them again", "missing_slice"
        )
    return SceneError(
        f"slices lie {distances.min():.3f} to {distances.max():.3f} mm apart; at most {MAX_UNEVEN:.0%} off an even lattice is allowed",
        "uneven_spacing",
    )
