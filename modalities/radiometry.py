"""What the pixels of a Sentinel-2 image say about its numbers, whatever its metadata say: was 1000 added, are they reflectance at all.

Since baseline 04.00 a product stores reflectance · 10000 + 1000. Archives subtract the 1000 again, or add it to older scenes, and
catalogues are wrong about it, so a convention that metadata name is held against the darkest pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from modalities.raster_file import BandFile, read_bands
from modalities.scene import SceneError

Answer = Literal["yes", "no", "unknown"]

WINDOW = 192
"""Rows and columns of a looked-at part; files up to three times that size are looked at as a whole."""

LARGE = 4000
"""Pixels along a side from which on a band is only looked at where few smaller ones are there, and in five parts instead of nine."""

ENOUGH = 256
"""Fewer valid pixels than this in a band say nothing."""

BORDER = 3
"""Pixels this near to one without a value are left out: resampling has mixed the two."""

DARK, DARKEST = 850.0, 600.0
"""Numbers that +1000 would make reflectances of -0.015 and -0.04: half of a band is never below the first, one
hundredth of two bands never below the second. Surface reflectance does fall a little below zero over water and in shadow."""

FLOOR, NEAR = 900.0, 1200.0
"""Between these lie the darkest pixels of an image that carries +1000: water and shadow in infrared, any ground in B10."""

PATH_BLUE, PATH_COAST = 1350.0, 1500.0
"""With +1000, B02 and B01 at the top of the atmosphere are never below these: air alone reflects 0.04 and 0.06 of that light."""

INFRARED = ("B06", "B07", "B08", "B8A", "B11", "B12")
OUT_OF_ORDER = (
    "its B10, the darkest band wherever there is light, is brighter than another one: "
    "the bands are in another order, name the right one with reader.bands or reader.layouts"
)
SNOW = 1.6
"""Half of a band is never brighter than this: fresh snow under a low sun comes to 1.3."""

SIXTEEN_BITS = 65535 / 10000
"""Portals export reflectance as a share of 65535; the product's own steps stay visible as multiples of this."""


@dataclass(frozen=True)
class Sample:
    """Stored numbers of a band at some places: how many were valid, and their percentiles 0.1, 1, 50 and 99.

    Attributes:
        sixteen_bits: Share of the numbers that are whole steps of 1/10000 on a scale of 0 … 65535.
        distinct: How many different numbers there are.
        dtype: Of the file.
    """

    count: int
    lowest: float
    low: float
    median: float
    high: float
    sixteen_bits: float = 0.0
    distinct: int = 0
    dtype: str = "uint16"


@dataclass(frozen=True)
class Verdict:
    """What the pixels say.

    Attributes:
        plus_1000: Whether 1000 was added to the stored numbers.
        evidence: The figures that it rests on.
        wrong_scale: Why the numbers cannot be reflectance · 10000, with the remedy; empty where they can.
        wrong_order: Why the bands cannot be those that they are called; empty where they can.
        brightest: The largest of the bands' medians, as stored; zero where nothing was looked at.
    """

    plus_1000: Answer
    evidence: str
    wrong_scale: str = ""
    wrong_order: str = ""
    brightest: float = 0.0


def look(bands: Iterable[BandFile]) -> dict[str, Sample]:
    """Samples per band, from the coarsest file of each; bands without enough valid pixels are left out.

    Whole blocks of at most nine places are unpacked per band, and large files are passed over where five smaller bands
    are there, so that a product of 10980² pixels costs a second or two. What cannot be read says nothing here: whoever
    reads all of it meets it again, and reports it.
    """
    coarsest: dict[str, BandFile] = {}
    for band in sorted(bands, key=lambda band: (int(np.prod(band.grid.space)), str(band.path))):
        coarsest.setdefault(band.channel.name, band)
    small = {name: band for name, band in coarsest.items() if max(band.grid.space) <= LARGE * 1.5}
    chosen = small if len(small) >= 5 else coarsest
    together: dict[tuple[object, tuple[int, ...]], list[BandFile]] = {}
    for band in chosen.values():
        together.setdefault((band.path, band.grid.space), []).append(band)
    found: dict[str, Sample] = {}
    for group in together.values():
        try:
            parts = [read_bands(group, window) for window in _windows(group[0].grid.space, group[0].block)]
        except SceneError:
            continue
        for i, band in enumerate(group):
            values = np.concatenate([pixels[i][_inner(flags[i] == 0)] for pixels, flags in parts])
            if values.size >= ENOUGH:
                found[band.channel.name] = summarise(values)
    return found


def summarise(values: NDArray[np.generic]) -> Sample:
    """The sample of some valid stored numbers."""
    ordered = np.sort(values)  # whole numbers of 16 bits are sorted in linear time, and what follows is quick on them
    numbers = ordered.astype(np.float64)
    lowest, low, median, high = np.percentile(numbers, (0.1, 1, 50, 99))
    stepped = np.rint(np.rint(numbers / SIXTEEN_BITS) * SIXTEEN_BITS) == numbers
    return Sample(
        values.size,
        float(lowest),
        float(low),
        float(median),
        float(high),
        float(stepped.mean()),
        1 + int(np.count_nonzero(np.diff(numbers))),
        values.dtype.name,
    )


def judge(samples: Mapping[str, Sample], level: str = "") -> Verdict:
    """The verdict on the samples of one image.

    **No** +1000 when B10 (or, at the top of the atmosphere, any band) has pixels below 900, when B01 or B02 there is as
    dark as air alone would not be, when half of a band lies below 850, or one hundredth of two bands below 600.
    **Yes** when no band has pixels below 900 and B10, or two of the infrared bands, come down to 900 … 1200.
    Else **unknown**: cloud, snow or desert all over, with nothing dark in sight. B09 of surface reflectance is not
    asked: its correction for water vapour throws it far below zero.

    What can deceive it: B10 over a plateau above 4 km or under thick cirrus all over (a false yes), and an image
    of nothing but a grey surface of reflectance 0.10 (a false yes); both are overruled by naming the offset for the file.
    """
    if not samples:
        return Verdict("unknown", f"fewer than {ENOUGH} valid pixels")
    return replace(_judge(samples, level), brightest=max(sample.median for sample in samples.values()))


def _judge(samples: Mapping[str, Sample], level: str) -> Verdict:
    if _is_out_of_order(samples):
        return Verdict("unknown", "", wrong_order=OUT_OF_ORDER)
    doubt = _wrong_scale(samples)
    if doubt:
        return Verdict("unknown", "", doubt)
    top = level == "L1C" or "B10" in samples
    asked = {name: sample for name, sample in samples.items() if top or name != "B09"}
    if not asked:
        return Verdict("unknown", "only B09 could be looked at")
    darkest = min(asked, key=lambda name: asked[name].low)
    evidence = f"the darkest hundredth of {darkest} begins at {asked[darkest].low:.0f}"
    below = [name for name, sample in asked.items() if sample.low < DARKEST]
    dim = [name for name, sample in asked.items() if sample.median < DARK]
    bare_air = top and (_low(samples, "B02") < PATH_BLUE or _low(samples, "B01") < PATH_COAST)
    if dim or len(below) >= 2 or (top and asked[darkest].low < FLOOR):
        return Verdict("no", evidence)
    if bare_air:
        return Verdict("no", f"B02 is as dark as {_low(samples, 'B02'):.0f}, less than air alone would be with +1000")
    near = [name for name in INFRARED if name in asked and FLOOR <= asked[name].lowest <= NEAR]
    cirrus = "B10" in asked and FLOOR <= asked["B10"].low <= NEAR
    if min(sample.lowest for sample in asked.values()) >= FLOOR and (cirrus or len(near) >= 2):
        shown = "B10" if cirrus else near[0]
        return Verdict(
            "yes", f"no pixel is darker than {min(s.lowest for s in asked.values()):.0f}, {shown} begins at {asked[shown].lowest:.0f}"
        )
    return Verdict("unknown", f"{evidence}, there is nothing dark enough to tell")


def _is_out_of_order(samples: Mapping[str, Sample]) -> bool:
    """True when a band is darker than B10: the air swallows its light, and cirrus brightens all bands alike."""
    return "B10" in samples and min(sample.median for sample in samples.values()) < samples["B10"].median - 300


def _wrong_scale(samples: Mapping[str, Sample]) -> str:
    """Why these are not reflectances · 10000, and what to do; else nothing."""
    first = next(iter(samples.values()))
    brightest = max(sample.high for sample in samples.values())
    if first.dtype in ("uint8", "int8"):
        return f"its numbers are of 8 bits, a picture rather than reflectance; {say_scale('…')} or leave it out with reader.exclude"
    if first.dtype.startswith("float"):
        return f"its numbers are reflectance itself, not · 10000; {say_scale('1')}" if brightest < 5 else ""
    if all(sample.sixteen_bits > 0.99 and sample.distinct >= 30 for sample in samples.values()):
        return f"its numbers are whole steps of 6.5535, as a portal writes reflectance · 65535; {say_scale('1.5259021896696422e-05')}"
    near = [samples[name] for name in INFRARED[:4] if name in samples]
    seen = [samples[name] for name in ("B01", "B02", "B03", "B04", "B05") if name in samples]
    infrared, visible = (max((sample.median for sample in group), default=0.0) for group in (near, seen))
    if infrared > 11000 and visible < 0.8 * infrared:
        return f"half of its near infrared is above 1.1 if it is reflectance · 10000, and cloud or snow it is not; {say_scale('…')}"
    if max(sample.median for sample in samples.values()) > 1e4 * SNOW:
        return f"half of a band is above {SNOW} if it is reflectance · 10000, brighter than snow; {say_scale('…')}"
    if near and "B03" in samples and brightest < 1000 and max(sample.high for sample in near) > 2.5 * samples["B03"].high:
        return (
            "its near infrared is far above its green, as over leaves, yet below 0.1 everywhere if it is reflectance · 10000: "
            f"probably reflectance · 1000; {say_scale('0.001')}"
        )
    return ""


def say_scale(scale: str) -> str:
    """The remedy for numbers on another scale."""
    return f"say reader.layouts=[{{match: …, scale: {scale}, offset: 0}}], or reader.scale for all files"


def _low(samples: Mapping[str, Sample], name: str) -> float:
    return samples[name].low if name in samples else np.inf


def _windows(space: Sequence[int], block: Sequence[int]) -> list[tuple[slice, slice]]:
    """All of a small image; else parts spread over it, which begin with a block where blocks are at least as large."""
    if max(space) <= 3 * WINDOW:
        return [(slice(0, space[0]), slice(0, space[1]))]
    thirds = (1 / 6, 1 / 2, 5 / 6)
    places = [(i, j) for i in thirds for j in thirds]
    if max(space) > LARGE:
        places = places[::2]
    windows = []
    for place in places:
        begin = [max(int(share * size) - WINDOW // 2, 0) for share, size in zip(place, space, strict=True)]
        row, column = (start - start % step if step >= WINDOW else start for start, step in zip(begin, block, strict=True))
        windows.append((slice(row, min(row + WINDOW, space[0])), slice(column, min(column + WINDOW, space[1]))))
    return windows


def _inner(valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The valid pixels that have none but valid ones within `BORDER`."""
    if valid.all():
        return valid
    inner = valid.copy()
    for axis in (0, 1):
        spread = inner.copy()
        for step in range(1, BORDER + 1):
            near, far = [slice(None)] * 2, [slice(None)] * 2
            near[axis], far[axis] = slice(step, None), slice(None, -step)
            spread[tuple(near)] &= inner[tuple(far)]
            spread[tuple(far)] &= inner[tuple(near)]
        inner = spread
    return inner
