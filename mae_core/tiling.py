"""Class probabilities of a whole scene from overlapping crops, blended with Gaussian weights. Any number of axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Window = tuple[slice, ...]


def windows(space: Sequence[int], crop: Sequence[int], overlap: float, step: int = 1) -> Iterator[Window]:
    """Windows of at most `crop` that cover `space`, evenly spread, neighbours sharing at least `overlap` of a crop if they can.

    All begin at multiples of `step`; above 1 the last ones may be cut off by the end of the space.
    """
    yield from itertools.product(*(windows_along(*axis, overlap, step) for axis in zip(space, crop, strict=True)))


def windows_along(size: int, length: int, overlap: float, step: int = 1) -> list[slice]:
    """The same along one axis."""
    if size <= length:
        return [slice(0, size)]
    stride = max(step, math.floor(length * (1 - overlap) + 1e-9) // step * step)
    last = -(-(size - length) // step)
    count = -(-last * step // stride) + 1
    starts = [round(index * last / (count - 1)) * step for index in range(count)]
    return [slice(start, min(start + length, size)) for start in starts]


def blend_weights(crop: Sequence[int]) -> Float[Tensor, "*space"]:
    """Gaussian about the crop's centre with a standard deviation of an eighth of its size, never below 0.1 %."""
    weights = torch.ones(())
    for size in crop:
        place = torch.arange(size) - (size - 1) / 2
        weights = weights[..., None] * torch.exp(-0.5 * (place / (size / 8)).square())
    return weights.clamp(min=1e-3)


@dataclass(frozen=True)
class Blend:
    """Weighted means of the predictions of overlapping windows, a strip of the scene at a time.

    Windows are visited in the same order however the scene is divided, so that every voxel is summed in the same order:
    strips and bands give the numbers of the whole scene, bit for bit, as far as `predict` does not hang on the company of a window.

    Attributes:
        space: Size of the scene.
        crop: Largest window.
        overlap: Least share of a crop that neighbours have in common.
        predict: Gives `(window, class, *crop)` for a list of windows; may return more than a window's size, the rest being padding.
        batch_size: Most windows that are predicted at once.
        step: Windows begin at multiples of this.
    """

    space: tuple[int, ...]
    crop: tuple[int, ...]
    overlap: float
    predict: Callable[[list[Window]], Float[Tensor, "window class *crop"]]
    batch_size: int = 1
    step: int = 1

    def whole(self) -> Float[Tensor, "class *space"]:
        """The mean over the whole scene. Memory is twice one fp32 number per class and voxel of it."""
        return torch.cat([part for _, part in self.bands(slice(0, self.space[-1]))], dim=1)

    def bands(self, strip: slice, first: int = 0) -> Iterator[tuple[Window, Float[Tensor, "class *band"]]]:
        """What is final, from the top down: windows that together cover a strip, and the mean in each.

        Windows that reach over the strip's sides or over `first` are predicted whole and used inside. In memory is one fp32
        number per class and one more for every voxel of a strip as high as a crop.

        Args:
            strip: Part of the last axis; means nothing where there is but one.
            first: Index along the first axis from which on the means are wanted.
        """
        rows = [row for row in windows_along(self.space[0], self.crop[0], self.overlap, self.step) if row.stop > first]
        beside = [windows_along(*axis, self.overlap, self.step) for axis in zip(self.space[1:], self.crop[1:], strict=True)]
        if beside:
            beside[-1] = [part for part in beside[-1] if part.start < strip.stop and part.stop > strip.start]
        area = tuple(slice(0, size) for size in self.space[1:-1]) + ((strip,) if beside else ())
        running: _Running | None = None
        for number, row in enumerate(rows):
            for batch in batched(itertools.product(*beside), self.batch_size):
                chosen = [(row, *rest) for rest in batch]
                for window, part in zip(chosen, self.predict(chosen), strict=True):
                    if running is None:
                        running = _Running(len(part), max(row.start, first), self.crop, area)
                    running.add(window, part)
            assert running is not None
            stop = rows[number + 1].start if number + 1 < len(rows) else self.space[0]
            if stop > running.first:
                yield (slice(running.first, stop), *area), running.finished(stop)


class _Running:
    """Sums and weights of the rows that are not final yet, from `first` on; what lies outside of `area` is left out."""

    def __init__(self, classes: int, first: int, crop: Sequence[int], area: Window) -> None:
        self.first, self.area = first, area
        sizes = [part.stop - part.start for part in area]
        self.total = torch.zeros(classes, crop[0], *sizes)
        self.share = torch.zeros(crop[0], *sizes)
        self.weights = blend_weights(crop)

    def add(self, window: Window, part: Float[Tensor, "class *crop"]) -> None:
        """Take in the prediction of a window."""
        frame = (slice(self.first, window[0].stop), *self.area)
        kept = [slice(max(own.start, area.start), min(own.stop, area.stop)) for own, area in zip(window, frame, strict=True)]
        inside = tuple(slice(part.start - own.start, part.stop - own.start) for part, own in zip(kept, window, strict=True))
        here = tuple(slice(part.start - area.start, part.stop - area.start) for part, area in zip(kept, frame, strict=True))
        weights = self.weights[inside]
        self.total[(slice(None), *here)] += part[(slice(None), *inside)] * weights
        self.share[here] += weights

    def finished(self, stop: int) -> Float[Tensor, "class *band"]:
        """The means of the rows before `stop`, which no later window touches; they are let go."""
        count = stop - self.first
        out = self.total[:, :count] / self.share[:count]
        for array, axis in ((self.total, 1), (self.share, 0)):
            length = array.shape[axis]
            kept = array.narrow(axis, count, length - count).clone()
            array.zero_()
            array.narrow(axis, 0, length - count).copy_(kept)
        self.first = stop
        return out


def strips(size: int, width: int, step: int) -> list[slice]:
    """Parts of an axis of at most `width`, at least one step, whose inner edges are multiples of `step`."""
    wide = max(width // step, 1) * step
    return [slice(start, min(start + wide, size)) for start in range(0, size, wide)]


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items, in order."""
    rest = iter(items)
    while part := list(itertools.islice(rest, size)):
        yield part
