"""A segmenter labels files: class numbers go back as COG or NIfTI in each source's own geometry."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from pydantic import Field

from mae_core.bands import Matching
from mae_core.export import WEIGHTS, Description, ModelError, load_description, load_segmenter
from mae_core.labelling import Labeller
from mae_core.launch import LaunchError
from mae_core.parallel import DeviceError, RankError, processes
from mae_core.sealed import sha256
from mae_core.settings import Settings
from mae_core.spool import FOLDER
from mae_core.tracking import Tracker, TrackingError, TrackingSettings
from modalities.catalogue import Catalogue, scan
from modalities.cog import UNFINISHED, little_cache
from modalities.patients import of_patients
from modalities.scene import Rejected, Scene, SceneError, fingerprint
from pipelines.bands import PredictBandSettings, scene_matching, tell_bands
from pipelines.command_line import run
from pipelines.crosswalk_option import CrosswalkPath, refuse_crosswalk, refuse_inside, tell_crosswalk
from pipelines.label_job import Job, Labelled, Stored
from pipelines.label_scene import beside, label_scene
from pipelines.label_volume import log_sheet
from pipelines.prepare import VOLUMES, tell_catalogue
from pipelines.progress import console, counting, show_thousands
from pipelines.run_folder import RESULT, RunError, finish, model_folder, model_problems, public, reader_of, recorded
from pipelines.tracked import tell_pending
from pipelines.withheld import missing_paths

DESCRIPTION = "a segmenter labels files; class numbers go back as COG or NIfTI in the source's own geometry"
EXPECTED = (ModelError, SceneError, TrackingError, RunError, DeviceError, LaunchError, RankError)

BATCH_VOXELS = 1 << 18
"""Of the crops that are predicted at once, unless it is set: enough to be quick on a processor, little enough for its memory."""


class PredictSettings(Settings):
    """Settings of `predict`."""

    model: str = Field(description="Run of a fine-tuning, models:/NAME@ALIAS or models:/NAME/VERSION")
    data: Path = Field(description="Image to label, or folder of images")
    out: Path = Field(description="Label file to write where data is one file, else a folder")
    overlap: float = Field(0.5, ge=0, lt=1, description="Least overlap of neighbouring crops")
    probabilities: Stored = Field(
        "none", description="Also write a raster or volume with a band per class: none, uint8 (in parts of 250, with its scale) or float32"
    )
    sheets: bool = Field(
        False,
        description="Also write a picture of every scan to check its labels by eye; it shows a patient (to MLflow with log_images only)",
    )
    dicom_seg: bool = Field(
        False, description="Also write the labels of DICOM series as DICOM-SEG, which names the patient, as the standard wants (mode 0600)"
    )
    compress: Literal["deflate", "zstd"] = Field("deflate", description="Of rasters; zstd is faster, old readers do not know it")
    bands: PredictBandSettings = PredictBandSettings()
    batch_size: int = Field(0, ge=0, description="Crops that are predicted at once; 0: as many as hold a quarter of a million voxels")
    memory_mb: int = Field(512, ge=64, description="For the rows of a raster that are at work; a wider one is done in strips of columns")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs")
    reader: dict[str, Any] = Field({}, description="Changes to the adapter's settings that the model was trained with")
    tracking: TrackingSettings = TrackingSettings(system_metrics=False)
    crosswalk: CrosswalkPath = None


def work(settings: PredictSettings) -> int:
    """Do it; 1 if a scene failed."""
    folder, registered = model_folder(settings.model, settings.tracking, settings.out)
    model, about = load_segmenter(folder)
    reader = reader_of(about, settings.reader)
    refuse_inside(settings.data, reader.kind, out=settings.out, crosswalk=settings.crosswalk)
    refuse_crosswalk(settings.crosswalk, reader.kind, settings.out, settings.tracking)
    catalogue = scan(settings.data, reader)
    tell_catalogue(catalogue)
    tell_crosswalk(settings.crosswalk, catalogue, settings.out, settings.tracking)
    places = targets(catalogue, settings)
    make_folders(places, settings.out)
    spool = spool_folder(settings.out, places)
    with (
        processes(settings.device) as parallel,
        Tracker(settings.tracking, settings.out, folder=spool, passing=True, say=console.print).run(
            "predict", None, public(settings, reader.kind), {"source": "pipelines/predict.py"}
        ) as tracker,
        little_cache(),
    ):
        labeller = Labeller(
            model.to(parallel.device),
            about,
            settings.overlap,
            no_label(about),
            settings.batch_size or max(1, BATCH_VOXELS // math.prod(about.crop)),
        )
        name = registered.uri if registered else f"run {Path(settings.model).name}"
        memory, program = settings.memory_mb << 20, f"terravox {version('terravox')}"
        bands = settings.bands.for_model(about)
        if bands.match not in (settings.bands.match, "name"):
            console.print(f"channels are matched by {bands.match}, as in the model's fine-tuning; bands.match=name: by their names alone")
        how = (
            settings.probabilities,
            settings.compress,
            memory,
            program,
            settings.sheets,
            settings.dicom_seg,
            partial(log_sheet, tracker, 0),
        )
        job = Job(labeller, sha256(folder / WEIGHTS), name, bands, *how)
        done, failed, seconds = label_all(job, places)
        tracker.metrics({"scenes": len(done), "seconds": seconds}, 0)
        if registered is not None:
            tracker.used_model(registered)
    figures = {"voxels_by_class": {str(place): found.counts for place, found in done.items()}, **_speed(places, done, seconds)}
    facts: dict[str, Any] = {
        "figures": figures,
        "files": {"found": catalogue.num_files, "used": catalogue.num_used},
        "rejected": [{"file": item.file, "reason": item.reason} for item in (*catalogue.rejected, *failed)],
        "digests": {"weights": job.weights, "data": fingerprint(file for scene in catalogue.scenes for file in scene.files)},
        "classes": {str(value): name for value, name in about.classes},
        "bands": {str(place): found.matching.table() for place, found in done.items()},
        "mlflow": {**tracker.facts(), "model": registered.uri if registered else None},
    }
    facts |= {"intended_use": about.intended_use} if about.intended_use else {}
    out = settings.out
    finish(
        out if out.is_dir() else out.parent,
        "predict",
        recorded(settings, reader.kind),
        facts,
        RESULT if out.is_dir() else f"{out.name}.{RESULT}",
    )
    tell(done, failed, figures, out)
    tell_pending(facts["mlflow"], out if out.is_dir() else spool)
    return 1 if failed else 0


def no_label(about: Description) -> int:
    """Class number for "nothing here": 0, which is the background of volumes, or 255 where 0 is a class of rasters.

    Raises:
        RunError: The model's class numbers do not fit into bytes beside it.
    """
    values = [value for value, _ in about.classes]
    wrong = [value for value in values if not 0 <= value <= 254]
    if wrong:
        raise RunError(f"class numbers {wrong} do not fit into a label file of bytes (0 to 254); train with smaller class numbers")
    return 0 if 0 not in values or about.modality in VOLUMES else 255


def label_all(job: Job, places: Sequence[tuple[Scene, Path]]) -> tuple[dict[Path, Labelled], list[Rejected], float]:
    """What became of each scene, those that failed with their reasons, and how long it took.

    Raises:
        SceneError, RunError: Every scene failed; this is the first one's reason.
    """
    done: dict[Path, Labelled] = {}
    failed: list[Rejected] = []
    matchings: list[Matching] = []
    before, total = 0, sum(_size(scene) for scene, _ in places)
    began = monotonic()
    with counting("labelling", "kvoxel") as progress:
        for scene, place in places:
            voxel_bytes = len(scene.channels) * scene.dtype.itemsize
            progress.unit_bytes = voxel_bytes * 1000
            try:
                done[place] = label_scene(job, scene, place, partial(show_thousands, progress, before, total))
                if (told := done[place].matching) not in matchings:
                    matchings.append(told)
                    tell_bands(told, f"channels of {scene.name}" + (" and others like it" if len(places) > 1 else ""))
            except (SceneError, RunError) as error:
                if len(places) == 1 or len(failed) == len(places) - 1:
                    raise
                failed.append(Rejected(scene.name, str(error)))
                console.print(f"[yellow]not labelled[/] {scene.name}: {error}")
            before += _size(scene)
            progress(before // 1000, total // 1000)
    return done, failed, monotonic() - began


def _size(scene: Scene) -> int:
    return math.prod(scene.grid.space)


def _speed(places: Sequence[tuple[Scene, Path]], done: Mapping[Path, Labelled], seconds: float) -> dict[str, float]:
    """Seconds and the stored megabytes a second of scenes that were not there before."""
    new = [scene for scene, place in places if place in done and not done[place].is_kept]
    stored = sum(_size(scene) * len(scene.channels) * scene.dtype.itemsize for scene in new) / 1e6
    return {"seconds": round(seconds, 2), "megabytes": round(stored, 1), "megabytes_per_second": round(stored / max(seconds, 1e-6), 2)}


def tell(done: Mapping[Path, Labelled], failed: Sequence[Rejected], figures: Mapping[str, Any], out: Path) -> None:
    """Say what was made of what, how fast, and what was not made."""
    for file, found in list(done.items())[:5]:
        console.print(f"{file}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares(found.counts).items()))
    if len(done) > 5:
        total: Counter[str] = Counter()
        for found in done.values():
            total.update(found.counts)
        console.print(f"all {len(done)} scenes: " + ", ".join(f"{name} {share:.1%}" for name, share in shares(total).items()))
    kept = sum(found.is_kept for found in done.values())
    resumed = [found.rows for found in done.values() if found.rows and not found.is_kept]
    notes = [f"{kept} were there already, made from the same model, data and settings"] if kept else []
    notes += [f"{len(resumed)} went on after {sum(resumed)} rows of an interrupted call"] if resumed else []
    notes += [f"[yellow]{len(failed)} failed, see above[/]"] if failed else []
    speed = f"{figures['megabytes']:.1f} MB of pixels in {figures['seconds']:.1f} s, {figures['megabytes_per_second']:.1f} MB/s"
    console.print(f"[bold]{len(done)} label files written[/] in the geometry of their sources: {out}")
    console.print("  " + "; ".join([speed, *notes]))


def targets(catalogue: Catalogue, settings: PredictSettings) -> list[tuple[Scene, Path]]:
    """Where the labels of each scene go; nothing is written over a source, nor twice.

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
            raise RunError(f"--out {settings.out} is a file and {catalogue.label} holds {len(scenes)} images; give a folder")
        short = [_full_name(scene) if of_patients(catalogue.kind) else _label_name(scene, settings.data) for scene in scenes]
        twice = {name for name, count in Counter(short).items() if count > 1}
        full = [_full_name(scene) if name in twice else name for scene, name in zip(scenes, short, strict=True)]
        pairs = [(scene, settings.out / name) for scene, name in zip(scenes, full, strict=True)]
    sources = {file.resolve() for scene in scenes for file in scene.files}
    for scene, place in pairs:
        if place.resolve() in sources or beside(place).resolve() in sources:
            image = scene.name if of_patients(catalogue.kind) else scene.files[0]
            raise RunError(f"the labels of {image} would overwrite an image; choose another --out")
    return pairs


def make_folders(places: Sequence[tuple[Scene, Path]], out: Path) -> None:
    """Make the folders that label files go to.

    Raises:
        RunError: They cannot be made.
    """
    for _, place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--out {out} cannot be written: {error.strerror}; choose another folder") from error


def _label_name(scene: Scene, data: Path) -> Path:
    """By its file up to the first dot, where it has one file of its own."""
    first = scene.files[0]
    if len(scene.files) > 1:
        return _full_name(scene)
    return first.parent.relative_to(data.absolute()) / f"{first.name.split('.')[0]}_labels{scene.label_suffix}"


def _full_name(scene: Scene) -> Path:
    return Path(*(part for part in Path(scene.name).parts if part not in ("/", ".."))).with_name(
        f"{Path(scene.name).name}_labels{scene.label_suffix}"
    )


def shares(counts: dict[str, int]) -> dict[str, float]:
    """Share of each class."""
    total = sum(counts.values())
    return {name: number / total for name, number in counts.items()}


def spool_folder(out: Path, places: Sequence[tuple[Scene, Path]]) -> Path:
    """Where what is told to the tracker is kept: in the folder of the label maps, or beside a single one."""
    return out.with_name(f"{out.name}.{FOLDER}") if out in [place for _, place in places] else out / FOLDER


def check(settings: PredictSettings) -> list[str]:
    """Problems that only disk and registry can tell."""
    problems = model_problems(settings.model, settings.tracking, settings.out, load_segmenter)
    if problems:
        return [*problems, *missing_paths(None, {"data": settings.data})]
    about = load_description(model_folder(settings.model, settings.tracking, settings.out)[0], "segmenter")
    try:
        no_label(about)
        reader = reader_of(about, settings.reader)
        if absent := missing_paths(reader.kind, {"data": settings.data}):
            return absent
        refuse_inside(settings.data, reader.kind, out=settings.out, crosswalk=settings.crosswalk)
        refuse_crosswalk(settings.crosswalk, reader.kind, settings.out, settings.tracking)
        places = targets(scan(settings.data, reader), settings)
        for scene, _ in places:
            scene_matching(about, scene, settings.bands.for_model(about))
    except EXPECTED as error:
        return [str(error)]
    begun = [place for _, place in places if place.with_name(f".{place.name}{UNFINISHED}").is_dir()]
    console.print(f"{len(places)} images would be labelled" + (f", {len(begun)} of them begun by an interrupted call" if begun else ""))
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run("predict", PredictSettings, work, check=check, description=DESCRIPTION, expected=EXPECTED, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
