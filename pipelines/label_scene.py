"""One scene becomes label files: rasters row by row, resumed where a kill left them; volumes whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mae_core.context import Context, days_and_years
from mae_core.labelling import Band, Source
from mae_core.loader import METRES, UNMEASURED
from mae_core.settings import to_plain
from modalities.cog import BLOCK, DIGEST_TAG, Layout, OnMap, RasterBand, RasterWriter, count_values, made_from
from modalities.ground import centres, metres_apart
from modalities.scene import Scene, fingerprint
from modalities.volume import VolumeScene
from pipelines.bands import scene_matching
from pipelines.label_job import STEPS, Job, Labelled, Stored
from pipelines.label_volume import label_volume


def source_of(scene: Scene, names: Sequence[str]) -> Source:
    """A scene as a model sees it, its channels under the names that the model has for them."""
    channels = scene.channels
    return Source(
        scene.read,
        scene.grid.space,
        scene.block,
        scene.dtype.itemsize,
        tuple(names),
        tuple(channel.scale for channel in channels),
        tuple(channel.offset for channel in channels),
        context_of(scene),
    )


def context_of(scene: Scene) -> Context:
    """What is known of a scene besides its voxels, as training tells it of tiles: its first date, its middle, metres between voxels."""
    grid = scene.grid
    spacing = torch.tensor([metres_apart(grid)], dtype=torch.float32) * METRES.get(grid.unit, 1.0)
    day, year = days_and_years([next(iter(scene.times), "")])
    latitude, longitude = (torch.from_numpy(part.astype(np.float32)) for part in centres([grid.frame], [grid.matrix.ravel()], [grid.space]))
    return Context(day, year, latitude, longitude, spacing if grid.unit not in UNMEASURED else torch.full_like(spacing, torch.nan), spacing)


def label_scene(job: Job, scene: Scene, place: Path, progress: Callable[[int], None]) -> Labelled:
    """Label a scene into a file, and its probabilities into another.

    Raises:
        RunError: The scene's channels are not the model's, or hold something else.
        SceneError: It cannot be read, or the files not written.

    Args:
        job: How.
        scene: What.
        place: Of the labels.
        progress: Is told how many voxels are done, counting those of an earlier call.
    """
    about = job.labeller.description
    known = dict(about.classes)
    matching = scene_matching(about, scene, job.bands)
    source = source_of(scene, matching.names)
    if isinstance(scene, OnMap) and len(scene.grid.space) == 2:
        rows, is_kept = _label_raster(job, scene, source, place, progress)
        found = count_values(place)
        return Labelled({known.get(value, "no value"): number for value, number in found.items()}, matching, rows, is_kept)
    if isinstance(scene, VolumeScene):
        return label_volume(job, scene, source, matching, place, progress)
    labels = np.empty(source.space, np.uint8)
    for band in job.labeller.bands(source, slice(0, source.space[-1])):
        labels[band.window] = band.labels
        progress(band.window[0].stop * (labels.size // len(labels)))
    scene.write_labels(place, labels, job.labeller.no_label)
    values, numbers = np.unique(labels, return_counts=True)
    return Labelled({known.get(int(value), "no value"): int(number) for value, number in zip(values, numbers, strict=True)}, matching)


def beside(place: Path) -> Path:
    """Where the probabilities go that belong to a label raster."""
    return place.with_name(place.stem.removesuffix("_labels") + "_probabilities.tif")


def _label_raster(job: Job, scene: Scene, source: Source, place: Path, progress: Callable[[int], None]) -> tuple[int, bool]:
    """Rows that were there already, and whether that was everything."""
    outputs = {name: (path, layout) for name, path, layout in _outputs(job, scene, source, place)}
    if all(made_from(path) == layout.tags[DIGEST_TAG] for path, layout in outputs.values()):
        progress(int(np.prod(scene.grid.space)))
        return scene.grid.space[0], True
    writers: dict[str, RasterWriter] = {}
    try:
        for name, (path, layout) in outputs.items():
            writers[name] = RasterWriter(path, layout, layout.tags[DIGEST_TAG])
        column, row = min(writer.position for writer in writers.values())
        for writer in writers.values():
            writer.go_to(column, row)
        _label_rows(job, source, writers, progress)
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.close()
    return (scene.grid.space[0] if column else row), False


def _label_rows(job: Job, source: Source, writers: Mapping[str, RasterWriter], progress: Callable[[int], None]) -> None:
    column, row = writers["labels"].position
    height = source.space[0]
    for strip in job.labeller.strips(source, job.memory_bytes, BLOCK):
        if strip.stop <= column:
            continue
        for band in job.labeller.bands(source, strip, row):
            for name, writer in writers.items():
                writer.write(band.window, band.labels[None] if name == "labels" else _stored(band, job.probabilities))
            progress(strip.start * height + band.window[0].stop * (strip.stop - strip.start))
        row = 0


def _stored(band: Band, how: Stored) -> NDArray[np.float32 | np.uint8]:
    if how == "float32":
        return band.probabilities
    parts = np.rint(band.probabilities * STEPS)
    return np.where(np.isnan(parts), 255, parts).astype(np.uint8)


def _outputs(job: Job, scene: Scene, source: Source, place: Path) -> list[tuple[str, Path, Layout]]:
    assert isinstance(scene, OnMap)
    about = job.labeller.description
    height, width = scene.grid.space
    print_of = fingerprint(scene.files)
    times = [file.stat().st_mtime_ns for file in scene.files]  # a fingerprint is blind to a change in the middle
    made = {
        "weights": job.weights,
        "description": to_plain(about),
        "overlap": job.labeller.overlap,
        "no_label": job.labeller.no_label,
        "source": [print_of, times, scene.grid.space, source.channels, [str(channel) for channel in scene.channels]],
        "compress": job.compress,
        "software": job.software,
    }
    tags = {
        "TIFFTAG_SOFTWARE": job.software,
        "TERRAVOX_MODEL": job.model,
        "TERRAVOX_WEIGHTS": f"sha256:{job.weights}",
        "TERRAVOX_SOURCE": f"{scene.name} blake2b:{print_of}",
        "TERRAVOX_CLASSES": json.dumps({str(value): name for value, name in about.classes}, ensure_ascii=False),
    }

    def layout(bands: tuple[RasterBand, ...], dtype: str, nodata: float, overviews: Literal["nearest", "average"]) -> Layout:
        key = hashlib.sha256(json.dumps([made, dtype, len(bands)], sort_keys=True).encode()).hexdigest()
        classes = about.classes if overviews == "nearest" else ()
        named = {**tags, DIGEST_TAG: key}
        return Layout(
            (height, width), scene.place(), bands, dtype, nodata, overviews, classes, about.colours if classes else (), named, job.compress
        )

    out = [("labels", place, layout((RasterBand("class"),), "uint8", job.labeller.no_label, "nearest"))]
    if job.probabilities != "none":
        is_byte = job.probabilities == "uint8"
        bands = tuple(RasterBand(name, 1 / STEPS if is_byte else 1.0) for _, name in about.classes)
        out.append(("probabilities", beside(place), layout(bands, job.probabilities, 255 if is_byte else np.nan, "average")))
    return out
