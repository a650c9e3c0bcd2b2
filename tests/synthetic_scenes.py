"""Scenes made of numpy files, of any number of axes, for tests of what comes after the adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modalities.grid import Grid, Window
from modalities.scene import Channel, LabelMap, SceneError


@dataclass(frozen=True)
class SyntheticLabels:
    """Class numbers in a numpy file."""

    file: Path

    def read(self, window: Window) -> NDArray[np.int64]:
        return np.asarray(np.load(self.file)[window], np.int64)


@dataclass(frozen=True)
class SyntheticScene:
    """A scene whose pixels and quality lie in two numpy files; the voxel `damaged` of the first axis cannot be read."""

    name: str
    group: str
    folder: Path
    grid: Grid
    channels: tuple[Channel, ...]
    dtype: np.dtype[np.generic]
    damaged: int | None = None
    blocks_of: tuple[int, ...] | None = None
    times: tuple[str, ...] = ()
    voxel_digests: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()

    @property
    def block(self) -> tuple[int, ...]:
        return self.blocks_of or (1,) * len(self.grid.space)

    @property
    def files(self) -> tuple[Path, ...]:
        return self.folder / f"{self.name}.npy", self.folder / f"{self.name}-quality.npy"

    @property
    def label_suffix(self) -> str:
        return ".npy"

    def read(self, window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        if self.damaged is not None and window[0].start <= self.damaged < window[0].stop:
            raise SceneError(f"{self.name} is damaged at row {self.damaged}")
        pixels, quality = (np.load(file, mmap_mode="r") for file in self.files)
        return np.array(pixels[(slice(None), *window)]), np.array(quality[window])

    def open_labels(self, path: Path) -> LabelMap:
        return SyntheticLabels(path)

    def write_labels(self, path: Path, labels: NDArray[np.uint8], no_label: int) -> None:
        np.save(path, labels)


@dataclass(frozen=True)
class Scenes:
    """A catalogue of nothing but scenes."""

    scenes: tuple[SyntheticScene, ...]


def make_scene(
    folder: Path,
    name: str,
    space: tuple[int, ...],
    *,
    group: str | None = None,
    channels: tuple[str, ...] = ("A", "B"),
    dtype: str = "uint16",
    scale: float = 1.0,
    offset: float = 0.0,
    quality: NDArray[np.uint8] | None = None,
    origin: float = 0.0,
    damaged: int | None = None,
) -> SyntheticScene:
    """A scene of noise that is the same for the same name; real numbers are NaN wherever the quality is not 0."""
    rng = np.random.default_rng(list(name.encode()))
    pixels = rng.normal(5000, 300, (len(channels), *space)).round(3).astype(dtype)
    if quality is None:
        quality = np.where(rng.random(space) < 0.1, rng.choice([1, 2, 16, 32], space), 0).astype(np.uint8)
    if pixels.dtype.kind in "fc":
        pixels[:, quality != 0] = np.nan
    else:
        pixels[:, quality != 0] = np.iinfo(pixels.dtype).max
    matrix = np.diag([*[10.0] * len(space), 1.0])
    matrix[:-1, -1] = origin
    named = tuple(Channel(channel, None, None, scale, offset) for channel in channels)
    scene = SyntheticScene(name, group or name, folder, Grid.from_matrix(space, matrix, "", "m"), named, pixels.dtype, damaged)
    for file, values in zip(scene.files, (pixels, quality), strict=True):
        np.save(file, values)
    return scene


def three_places(folder: Path) -> Scenes:
    """Scenes of 6, 6 and 1 tiles of 8×8."""
    return Scenes(tuple(make_scene(folder, name, space) for name, space in (("a", (20, 13)), ("b", (17, 16)), ("c", (6, 5)))))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
