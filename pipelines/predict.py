"""A segmenter labels files: class numbers go back as GeoTIFF or NIfTI in each source's own geometry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mae_core.checkpoint import sha256
from mae_core.export import WEIGHTS, ModelError, load_segmenter
from mae_core.segmentation import Labeller
from mae_core.settings import Settings, to_plain
from mae_core.tracking import Tracker, TrackingError, TrackingSettings
from modalities.catalogue import Catalogue, scan
from modalities.ground import metres_apart
from modalities.scene import Scene, SceneError, fingerprint
from pipelines.command_line import run
from pipelines.prepare import tell_catalogue
from pipelines.progress import console, counting
from pipelines.run_folder import RESULT, RunError, finish, model_folder, model_problems, public, reader_of

DESCRIPTION = "a segmenter labels files; class numbers go back as GeoTIFF or NIfTI in the source's own geometry"
EXPECTED = (ModelError, SceneError, TrackingError, RunError)


class PredictSettings(Settings):
    """Settings of `predict`."""

    model: str = Field(description="Run of a fine-tuning, models:/NAME@ALIAS or models:/NAME/VERSION")
    data: Path = Field(description="Image to label, or folder of images")
    out: Path = Field(description="Label file to write where data is one file, else a folder")
    overlap: float = Field(0.5, ge=0, lt=1, description="Least overlap of neighbouring crops")
    reader: dict[str, Any] = Field({}, description="Changes to the adapter's settings that the model was trained with")
    tracking: TrackingSettings = TrackingSettings(system_metrics=False)


def work(settings: PredictSettings) -> int:
    """Do it."""
    folder, version = model_folder(settings.model, settings.tracking, settings.out)
    model, about = load_segmenter(folder)
    catalogue = scan(settings.data, reader_of(about, settings.reader))
    tell_catalogue(catalogue)
    values = [value for value, _ in about.classes]
    wrong = [value for value in values if not 0 <= value <= 254]
    if wrong:
        raise RunError(f"class numbers {wrong} do not fit into a label file of bytes (0 to 254); train with smaller class numbers")
    no_label = 0 if 0 not in values or about.modality == "mri" else 255
    labeller = Labeller(model, about, settings.overlap, no_label)
    places = targets(catalogue, settings)
    counts: dict[str, dict[str, int]] = {}
    with (
        Tracker(settings.tracking, settings.out).run(
            "predict",
            None,
            public(settings),
            {"source": "pipelines/predict.py"},
        ) as tracker,
        counting("labelling") as progress,
    ):
        for number, (scene, place) in enumerate(places):
            counts[str(place)] = label_scene(labeller, scene, place)
            progress(number + 1, len(places))
        tracker.metrics({"scenes": len(places)}, 0)
        if version is not None:
            tracker.used_model(version)
    facts = {
        "figures": {"voxels_by_class": counts},
        "files": {"found": catalogue.num_files, "used": catalogue.num_used},
        "rejected": [{"file": item.file, "reason": item.reason} for item in catalogue.rejected],
        "digests": {"weights": sha256(folder / WEIGHTS), "data": fingerprint(file for scene in catalogue.scenes for file in scene.files)},
        "classes": {str(value): name for value, name in about.classes},
        "mlflow": {"run_id": tracker.run_id, "model": version.uri if version else None},
    }
    out = settings.out
    finish(out if out.is_dir() else out.parent, "predict", to_plain(settings), facts, RESULT if out.is_dir() else f"{out.name}.{RESULT}")
    for file, found in list(counts.items())[:5]:
        console.print(f"{file}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares(found).items()))
    console.print(f"[bold]{len(counts)} label files written[/] in the geometry of their sources: {out}")
    return 0


def targets(catalogue: Catalogue, settings: PredictSettings) -> list[tuple[Scene, Path]]:
    """Where the labels of each scene go; nothing is written over a source.

    Raises:
        RunError: A single image is given a name with the wrong ending, or a file would be overwritten.
    """
    scenes = catalogue.scenes
    if settings.data.is_file() or (len(scenes) == 1 and settings.out.suffix):
        suffix = scenes[0].label_suffix
        if not settings.out.name.endswith(suffix):
            raise RunError(f"--out {settings.out} is to hold the labels of one image and must end in {suffix}")
        pairs = [(scenes[0], settings.out)]
    else:
        if settings.out.is_file():
            raise RunError(f"--out {settings.out} is a file and {settings.data} holds {len(scenes)} images; give a folder")
        pairs = [(scene, settings.out / _label_name(scene, settings.data)) for scene in scenes]
    sources = {file.resolve() for scene in scenes for file in scene.files}
    for scene, place in pairs:
        if place.resolve() in sources:
            raise RunError(f"the labels of {scene.files[0]} would overwrite an image; choose another --out")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--out {settings.out} cannot be written: {error.strerror}; choose another folder") from error
    return pairs


def _label_name(scene: Scene, data: Path) -> Path:
    first = scene.files[0]
    stem = first.name.split(".")[0] if len(scene.files) == 1 else first.parent.name
    inside = first.parent.relative_to(data) if len(scene.files) == 1 else first.parent.parent.relative_to(data)
    return inside / f"{stem}_labels{scene.label_suffix}"


def label_scene(labeller: Labeller, scene: Scene, place: Path) -> dict[str, int]:
    """Label one scene into a file; number of voxels by class."""
    scale = [channel.scale for channel in scene.channels]
    offset = [channel.offset for channel in scene.channels]
    names = [channel.name for channel in scene.channels]
    labels = labeller.label(scene.read, scene.grid.space, metres_apart(scene.grid), names, scale, offset)
    scene.write_labels(place, labels, labeller.no_label)
    known = dict(labeller.description.classes)
    values, numbers = np.unique(labels, return_counts=True)
    return {known.get(int(value), "no value"): int(number) for value, number in zip(values, numbers, strict=True)}


def shares(counts: dict[str, int]) -> dict[str, float]:
    """Share of each class."""
    total = sum(counts.values())
    return {name: number / total for name, number in counts.items()}


def check(settings: PredictSettings) -> list[str]:
    """Problems that only disk and registry can tell."""
    problems = [] if settings.data.exists() else [f"data = {settings.data}: does not exist"]
    return problems + model_problems(settings.model, settings.tracking, settings.out, load_segmenter)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run("predict", PredictSettings, work, check=check, description=DESCRIPTION, expected=EXPECTED, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
