"""A pretraining's picture of files: what they hold, what was shown and what was predicted, as rasters in the files' own units."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from mae_core.bands import BandSettings
from mae_core.checkpoint import CheckpointError, restore_weights
from mae_core.evaluate import EVALUATION_SEED
from mae_core.export import WEIGHTS, Description, ModelError, load_description
from mae_core.labelling import Source
from mae_core.launch import LaunchError
from mae_core.mae import MaskedAutoencoder
from mae_core.masking import AnyHiding, at_progress
from mae_core.parallel import DeviceError, RankError, processes
from mae_core.reconstruction import Reconstruction, Reconstructor
from mae_core.sealed import sha256
from mae_core.settings import Settings, to_plain
from mae_core.targets import HogTarget
from mae_core.tiling import strips
from modalities.catalogue import Catalogue, scan
from modalities.cog import BLOCK, Layout, OnMap, RasterBand, RasterWriter, little_cache
from modalities.scene import Rejected, Scene, SceneError, fingerprint
from pipelines.bands import scene_matching, tell_bands
from pipelines.command_line import run
from pipelines.crosswalk_option import refuse_inside
from pipelines.label_scene import source_of
from pipelines.prepare import tell_catalogue
from pipelines.pretrain import PretrainRecipe
from pipelines.progress import console, counting, show_thousands, table
from pipelines.run_folder import CONFIG, RunError, finish, reader_of, recall, recorded
from pipelines.withheld import kind_of, missing_paths

DESCRIPTION = (
    "a pretraining run and images become rasters of what is there, what was shown and what was predicted, in the images' own units"
)
EXPECTED = (ModelError, SceneError, CheckpointError, RunError, DeviceError, LaunchError, RankError)
PARTS = ("input", "shown", "predicted")
STRIP = 2048
"""Columns that are at work at once, rounded up to whole crops and tiles of the written file."""

NOTES = {
    "input": "what the file holds",
    "shown": "what the model saw of it",
    "predicted": "in hidden patches only; where the target is normalised, each patch's true mean and standard deviation, which are not "
    "predicted, bring it back to these units",
}
"""What the three rasters of an image are."""


class ReconstructSettings(Settings):
    """Settings of `reconstruct`."""

    run: Path = Field(description="Folder of a finished pretraining, with its checkpoints")
    data: Path = Field(description="Image, or folder of images")
    out: Path = Field(description="Folder to write to: NAME_input.tif, NAME_shown.tif and NAME_predicted.tif for each image")
    mask_ratio: float | None = Field(None, gt=0, lt=1, description="Share of patches that is hidden; without it that of the pretraining")
    seed: int = Field(EVALUATION_SEED, ge=0, description="Of what is hidden; the same seed hides the same patches of a scene")
    bands: BandSettings = BandSettings()
    batch_size: int = Field(8, ge=1, description="Crops at once")
    compress: Literal["deflate", "zstd"] = Field("deflate", description="Of the rasters")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs")
    reader: dict[str, Any] = Field({}, description="Changes to the adapter's settings that the model was trained with")


@dataclass
class Errors:
    """What was predicted against what was there, by channel, in physical units.

    Attributes:
        sums: Number of voxels, sums of squared errors, of true values and of their squares.
    """

    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, part: Reconstruction, source: Source) -> None:
        """Take in a window."""
        for number, name in enumerate(source.channels):
            judged = np.isfinite(part.predicted[number]) & np.isfinite(part.original[number])
            true = part.original[number][judged].astype(np.float64) * source.scale[number] + source.offset[number]
            wrong = part.predicted[number][judged].astype(np.float64) * source.scale[number] + source.offset[number] - true
            self._take(name, np.array([judged.sum(), np.square(wrong).sum(), true.sum(), np.square(true).sum()]))

    def join(self, other: Errors) -> None:
        """Take in those of another scene."""
        for name, sums in other.sums.items():
            self._take(name, sums)

    def _take(self, name: str, sums: NDArray[np.float64]) -> None:
        self.sums[name] = self.sums.get(name, np.zeros(4)) + sums

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """Root mean squared error and standard deviation of the channels of which anything was predicted."""
        out = {}
        for name, (count, square, total, squares) in self.sums.items():
            if count:
                variance = max(squares / count - (total / count) ** 2, 0.0)
                out[name] = {"rmse": math.sqrt(square / count), "std": math.sqrt(variance), "voxels": int(count)}
        return out


def work(settings: ReconstructSettings) -> int:
    """Do it; 1 if a scene failed."""
    recipe, about = opened_run(settings.run)
    reader = reader_of(about, settings.reader)
    refuse_inside(settings.data, reader.kind, out=settings.out)
    catalogue = scan(settings.data, reader)
    tell_catalogue(catalogue)
    places = targets(catalogue, settings)
    errors, failed = Errors(), list[Rejected]()
    with processes(settings.device) as parallel, little_cache(), counting("reconstructing", "kvoxel") as progress:
        model = MaskedAutoencoder(recipe.model, about.channels)
        step = restore_weights(model, settings.run / "checkpoints", console.print)
        reconstructor = Reconstructor(
            model.to(parallel.device).eval(), about, hiding_of(recipe, settings), settings.batch_size, settings.seed
        )
        total, before = sum(math.prod(scene.grid.space) for scene, _ in places), 0
        for scene, place in places:
            try:
                errors.join(write_scene(reconstructor, scene, place, settings, partial(show_thousands, progress, before, total)))
            except (SceneError, RunError) as error:
                if len(failed) == len(places) - 1:
                    raise
                failed.append(Rejected(scene.name, str(error)))
                console.print(f"[yellow]not reconstructed[/] {scene.name}: {error}")
            before += math.prod(scene.grid.space)
    facts = {
        "figures": {"hidden": errors.figures, "scenes": len(places) - len(failed), "step": step},
        "rejected": [{"file": item.file, "reason": item.reason} for item in (*catalogue.rejected, *failed)],
        "digests": {
            "weights": sha256(settings.run / "model" / WEIGHTS),
            "data": fingerprint(file for scene, _ in places for file in scene.files),
        },
    }
    finish(settings.out, "reconstruct", recorded(settings, catalogue.kind), facts)
    tell(errors, len(places) - len(failed), settings.out)
    return 1 if failed else 0


def tell(errors: Errors, count: int, out: Path) -> None:
    """Say what was made, and how well what was hidden was predicted."""
    rows = [[name, f"{found['rmse']:.4g}", f"{found['std']:.4g}"] for name, found in errors.figures.items()]
    table("hidden voxels, in physical units", ["channel", "error (rms)", "spread (std)"], rows)
    console.print(f"[bold]{count} images, three rasters each[/]: {out}")
    console.print(f"  predicted: {NOTES['predicted']}")
    console.print("  whether the model learned is told by the run's skill, not by these errors: a patch's true mean alone makes them small")


def opened_run(folder: Path) -> tuple[PretrainRecipe, Description]:
    """What a finished pretraining was set to, and what describes its encoder.

    Raises:
        RunError: There is no such run, or its settings are not those of a pretraining.
        ModelError: It is not finished, or its target cannot be brought back to pixels.
    """
    config = recall(folder, CONFIG)
    if not config:
        raise RunError(f"{folder} is no folder of a run ({CONFIG} is missing); give the --out of a pretraining")
    about = load_description(folder / "model", "encoder")
    known = {name: value for name, value in config["settings"].items() if name in PretrainRecipe.model_fields and name != "tracking"}
    try:
        recipe = PretrainRecipe.model_validate(known)
    except ValidationError as error:
        raise RunError(f"{folder / CONFIG} does not hold the settings of a pretraining that this version reads: {error}") from error
    if isinstance(recipe.model.target, HogTarget):
        raise ModelError(f"{folder} was trained with target.kind=hog, which does not lead back to pixels; train with normalised_pixels")
    return recipe, about


def hiding_of(recipe: PretrainRecipe, settings: ReconstructSettings) -> AnyHiding:
    """How patches are hidden: as at the end of the pretraining, but for what is set."""
    hiding = at_progress(recipe.hiding, 1.0)
    return hiding if settings.mask_ratio is None else hiding.model_copy(update={"mask_ratio": settings.mask_ratio})


def targets(catalogue: Catalogue, settings: ReconstructSettings) -> list[tuple[Scene, Path]]:
    """What the files of each scene begin with.

    Raises:
        RunError: `out` cannot be a folder, scenes are not rasters, or one of their files would be written over.
    """
    if settings.out.is_file():
        raise RunError(f"--out {settings.out} is a file; give the name of a folder")
    other = [scene.name for scene in catalogue.scenes if not isinstance(scene, OnMap) or len(scene.grid.space) != 2]
    if other:
        hint = "look at the pictures in the run's folder `panels`, which a run over patients has with tracking.log_images=true only"
        raise RunError(f"{other[0]} is no image of two axes; {hint}")
    names = [Path(*(part for part in Path(scene.name).parts if part not in ("/", ".."))) for scene in catalogue.scenes]
    places = [settings.out / name for name in names]
    sources = {file.resolve() for scene in catalogue.scenes for file in scene.files}
    for written in (part_file(place, part) for place in places for part in PARTS):
        if written.resolve() in sources:
            raise RunError(f"{written} would be written over, which is one of the images; choose another --out")
    return list(zip(catalogue.scenes, places, strict=True))


def part_file(place: Path, part: str) -> Path:
    """The raster of one of `PARTS`."""
    return place.with_name(f"{place.name}_{part}.tif")


def write_scene(
    reconstructor: Reconstructor, scene: Scene, place: Path, settings: ReconstructSettings, progress: Callable[[int], None]
) -> Errors:
    """Write the three rasters of a scene, each whole or not at all; the errors in what was hidden.

    Raises:
        RunError: The scene's channels are not the model's, or hold something else.
        SceneError: It cannot be read, or the rasters not written.
    """
    assert isinstance(scene, OnMap)
    matching = scene_matching(reconstructor.description, scene, settings.bands)
    if matching.absent or matching.unknown:
        tell_bands(matching, f"channels of {scene.name}")
    source, errors = source_of(scene, matching.names), Errors()
    height, width = source.space
    crop = reconstructor.description.crop
    wide = math.lcm(BLOCK, crop[1])
    writers: dict[str, RasterWriter] = {}
    try:
        for part in PARTS:
            layout = _layout(scene, part, reconstructor, settings)
            writers[part] = RasterWriter(part_file(place, part), layout, "")
        for strip in strips(width, max(STRIP, wide), wide):
            row: list[Reconstruction] = []
            for found in reconstructor.windows(source, scene.name, strip):
                errors.add(found, source)
                row.append(found)
                if found.window[1].stop < strip.stop:
                    continue
                rows = found.window[0]
                for part, writer in writers.items():
                    writer.write((rows, strip), np.concatenate([_of(one, part) for one in row], axis=2))
                progress(strip.start * height + rows.stop * (strip.stop - strip.start))
                row = []
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.discard()
    return errors


def _of(found: Reconstruction, part: str) -> NDArray[np.float32]:
    return {"input": found.original, "shown": found.shown, "predicted": found.predicted}[part]


def _layout(scene: Scene, part: str, reconstructor: Reconstructor, settings: ReconstructSettings) -> Layout:
    assert isinstance(scene, OnMap)
    height, width = scene.grid.space
    bands = tuple(RasterBand(channel.name, channel.scale, channel.offset, channel.unit) for channel in scene.channels)
    tags = {
        "TIFFTAG_SOFTWARE": f"terravox {version('terravox')}",
        "TERRAVOX_PART": f"{part}: {NOTES[part]}",
        "TERRAVOX_RUN": settings.run.resolve().name,
        "TERRAVOX_HIDING": json.dumps({**to_plain(reconstructor.hiding), "seed": reconstructor.seed}),
        "TERRAVOX_SOURCE": f"{scene.name} blake2b:{fingerprint(scene.files)}",
    }
    return Layout((height, width), scene.place(), bands, "float32", np.nan, "average", tags=tags, compress=settings.compress)


def check(settings: ReconstructSettings) -> list[str]:
    """Problems that only the disk can tell."""
    problems = missing_paths(kind_of(to_plain(settings)), {"data": settings.data})
    try:
        recipe, about = opened_run(settings.run)
        restore_weights(MaskedAutoencoder(recipe.model, about.channels), settings.run / "checkpoints", console.print)
        if not problems:
            for scene, _ in targets(scan(settings.data, reader_of(about, settings.reader)), settings):
                scene_matching(about, scene, settings.bands)
    except EXPECTED as error:
        problems.append(str(error))
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run("reconstruct", ReconstructSettings, work, check=check, description=DESCRIPTION, expected=EXPECTED, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
