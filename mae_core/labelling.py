"""A segmenter labels a scene of any size: bands of class numbers and probabilities that are final, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_core.augment import normalise
from mae_core.context import Context
from mae_core.export import Description
from mae_core.heads import Segmenter
from mae_core.native import common_footprint
from mae_core.segmentation import chances, columns_of
from mae_core.tiling import Blend, Window, strips

Reader = Callable[[Window], tuple[NDArray[np.generic], NDArray[np.uint8]]]
"""Pixels `(channel, *space)` as stored and quality flags of a window of a scene."""

MIN_ROWS = 64
"""Least number of rows that are read at once, so that a file of one-line strips is not opened for every line."""

MAX_READ_BYTES = 1 << 28
"""A source whose blocks are so high that one row of them takes more than this is read by fewer rows, its blocks unpacked repeatedly."""


@dataclass(frozen=True)
class Source:
    """A scene as a model sees it.

    Attributes:
        read: Gives any window of it.
        space: Its size.
        block: What the source unpacks at once, in voxels per axis.
        itemsize: Bytes of a stored value.
        channels: Names, as the model knows them, in the order of the pixels' first axis.
        scale, offset: Physical value = stored · scale + offset, by channel.
        context: What else is known of it, as a batch of one.
    """

    read: Reader
    space: tuple[int, ...]
    block: tuple[int, ...]
    itemsize: int
    channels: tuple[str, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    context: Context


@dataclass(frozen=True)
class Band:
    """A part of a scene that is done.

    Attributes:
        window: Where it lies.
        labels: Class numbers `(*band)`, `no_label` where the scene has no value.
        probabilities: `(class, *band)` in fp32; NaN where the scene has no value.
    """

    window: Window
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Labeller:
    """A segmenter with all that is needed to label whole scenes.

    Attributes:
        model: In evaluation mode, on the device where it is to run.
        description: How it is fed.
        overlap: Least share of a crop that neighbouring crops have in common.
        no_label: Class number written where a scene has no value.
        batch_size: Crops that are predicted at once.
    """

    model: Segmenter
    description: Description
    overlap: float
    no_label: int
    batch_size: int = 8

    def label(self, source: Source) -> NDArray[np.uint8]:
        """Class numbers `(*space)` of a whole scene, which is held in memory.

        Raises:
            ModelError: The scene has none of the model's channels.
        """
        parts = [band.labels for band in self.bands(source, slice(0, source.space[-1]))]
        return np.concatenate(parts)

    @torch.inference_mode()
    def bands(self, source: Source, strip: slice, first: int = 0) -> Iterator[Band]:
        """Bands from index `first` of the first axis on that together cover a strip of the last axis, from the top down.

        Any strips and any `first` give the numbers of the whole scene. Held in memory are as many rows of the strip as a crop
        is high: their stored pixels, rounded up to the source's blocks, and one fp32 number per class.

        Raises:
            ModelError: The scene has none of the model's channels.
        """
        about = self.description
        columns = columns_of(about.channels, source.channels)
        present = torch.tensor([[column >= 0 for column in columns]])
        rows = Rows(source, about.crop, strip)

        def predict(windows: list[Window]) -> Tensor:
            parts = [rows.window(window) for window in windows]
            flags = [padded(quality & about.no_value, about.crop, about.no_value) for _, quality in parts]
            known = torch.from_numpy(np.stack(flags)) == 0
            out = torch.zeros(len(windows), len(about.classes), *about.crop)
            some = known.flatten(1).any(dim=1)  # a crop without any value is labelled nowhere
            if some.any():
                pixels = fed(about, source, columns, np.stack([padded(part, about.crop, 0) for part, _ in parts]), known)
                device = next(self.model.parameters()).device
                context = repeated(source.context, int(some.sum())).to(device)
                there = present.expand(int(some.sum()), -1).to(device)
                out[some] = chances(self.model, about.crop, pixels[some].to(device), known[some].to(device), context, there)
            return out

        step = common_footprint([1, *about.encoder.footprints.values()])
        blend = Blend(source.space, about.crop, self.overlap, predict, self.batch_size, step)
        values = torch.tensor([value for value, _ in about.classes], dtype=torch.uint8)
        for window, chance in blend.bands(strip, first):
            known = torch.from_numpy((rows.window(window)[1] & about.no_value) == 0)
            labels = torch.where(known, values[chance.argmax(dim=0)], self.no_label).to(torch.uint8)
            yield Band(window, labels.numpy(), torch.where(known, chance, torch.nan).numpy())

    def strips(self, source: Source, memory_bytes: int, step: int) -> list[slice]:
        """Parts of the last axis, in steps, whose rows take at most `memory_bytes` each; one for most scenes."""
        about = self.description
        between = math.prod(source.space[1:-1])
        summed = about.crop[0] * (len(about.classes) + 1) * 4 * 2
        kept = (about.crop[0] + 2 * read_rows(source)) * (len(source.channels) * source.itemsize + 1)
        return strips(source.space[-1], memory_bytes // (between * (summed + kept)), step)


def read_rows(source: Source) -> int:
    """Rows that are read at once: whole blocks, unless these are huge."""
    block = source.block[0]
    rows = -(-MIN_ROWS // block) * block
    row_bytes = math.prod(source.space[1:]) * len(source.channels) * source.itemsize
    return rows if rows * row_bytes <= MAX_READ_BYTES else min(rows, max(MIN_ROWS, MAX_READ_BYTES // row_bytes))


class Rows:
    """The rows of a strip, and of what crops reach beyond it, that were read and are still needed."""

    def __init__(self, source: Source, crop: Sequence[int], strip: slice) -> None:
        self.source, self.step = source, read_rows(source)
        size = source.space[-1]
        reach = slice(max(0, strip.start - crop[-1]), min(size, strip.stop + crop[-1]))
        self.area = (*(slice(0, length) for length in source.space[1:-1]), reach)[: len(source.space) - 1]
        self.pieces: list[tuple[int, int, NDArray[np.generic], NDArray[np.uint8]]] = []

    def window(self, window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        """Pixels and flags of a window; the first index never goes back."""
        rows, size = window[0], self.source.space[0]
        self.pieces = [piece for piece in self.pieces if piece[1] > rows.start]
        while not self.pieces or self.pieces[-1][1] < rows.stop:
            start = self.pieces[-1][1] if self.pieces else rows.start
            stop = min((start // self.step + 1) * self.step, size)
            self.pieces.append((start, stop, *self.source.read((slice(start, stop), *self.area))))
        inside = tuple(slice(part.start - area.start, part.stop - area.start) for part, area in zip(window[1:], self.area, strict=True))
        pixels, quality = [], []
        for start, stop, values, flags in self.pieces:
            part = slice(max(rows.start, start) - start, min(rows.stop, stop) - start)
            if part.start < part.stop:
                pixels.append(values[(slice(None), part, *inside)])
                quality.append(flags[(part, *inside)])
        return np.concatenate(pixels, axis=1), np.concatenate(quality)


def fed(about: Description, source: Source, columns: Sequence[int], stored: NDArray[np.generic], known: Tensor) -> Tensor:
    """Crops as a model is fed: its channels, `columns` of the source's, in normalised units; zero where there is nothing."""
    chosen = torch.from_numpy(np.ascontiguousarray(stored[:, [max(column, 0) for column in columns]]))
    gains = [torch.tensor([[values[max(column, 0)] for column in columns]]) for values in (source.scale, source.offset)]
    pixels = normalise(chosen, gains[0], gains[1], about.mean, about.std)
    there = (torch.tensor(columns) >= 0).reshape(1, -1, *(1,) * len(source.space))
    return torch.where(known[:, None] & there, pixels, 0.0)


def padded(array: NDArray[Any], crop: Sequence[int], fill: int) -> NDArray[Any]:
    """The array made as large as a crop at the ends of its last axes."""
    missing = [want - have for want, have in zip(crop, array.shape[-len(crop) :], strict=True)]
    if not any(missing):
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - len(crop)) + [(0, extra) for extra in missing], constant_values=fill)


def repeated(context: Context, number: int) -> Context:
    """The context of one sample for so many."""
    parts = (getattr(context, part.name) for part in fields(context))
    return Context(*(part.expand(number, *part.shape[1:]) for part in parts))
