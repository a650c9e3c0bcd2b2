"""An encoder and labels become a segmenter, with the same network from random weights beside it under the same schedule."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from mae_core.augment import LabelledAugmentSettings
from mae_core.bands import BandSettings
from mae_core.case_metrics import CaseSettings
from mae_core.checkpoint import TrainState, restore
from mae_core.encoders import AnyEncoder, build_encoder
from mae_core.export import WEIGHTS, Description, ModelError, load_description, load_encoder, save_model
from mae_core.flops import segmentation_work
from mae_core.foreground import Foreground
from mae_core.heads import HeadSettings, Segmenter
from mae_core.loader import LoaderSettings, Stream
from mae_core.optim import OptimSettings, learning_rate, make_optimiser
from mae_core.parallel import Parallel, ParallelSettings, processes
from mae_core.sealed import sha256
from mae_core.segmentation import Segmentation, confusion_by_scene, layer_number, measures
from mae_core.sharding import gathered, shard
from mae_core.spool import FOLDER
from mae_core.store import Split, TileStore
from mae_core.tracking import Registered, Tracker, TrackingSettings
from mae_core.train import TrainSettings, train
from mae_core.vit import Block, Encoder
from modalities.label_file import LabelOptions
from modalities.patients import of_patients
from modalities.scene import SceneError
from pipelines.attempt import attempt
from pipelines.bands import store_matching
from pipelines.before_training import checkpoint_bytes, training_problems
from pipelines.case_report import summary as case_summary
from pipelines.case_scores import Case, Judge, Row, held_out_cases, plain_rows, rows_from, table_of, write_csv
from pipelines.command_line import run
from pipelines.compute_time import compute_of, compute_words
from pipelines.contamination import SeenSettings, TrainingData, Verdict, files_of, load_training_data, trained_on, verdict_facts, verdict_on
from pipelines.crosswalk_option import CrosswalkPath
from pipelines.finetune_report import tell
from pipelines.frozen_split import split_digest
from pipelines.kernels import checked_attention
from pipelines.label_volume import log_sheets, write_sheet
from pipelines.labelled import Colour, colours_of, fitting_crop, labelled_data, labelled_task, missing
from pipelines.launch_words import tell_launch, voice
from pipelines.lease import confirm
from pipelines.preparation import PreparationError, PrepareSettings
from pipelines.pretrain import EXPECTED as PRETRAIN_EXPECTED
from pipelines.pretrain import MAY_DIFFER as PRETRAIN_MAY_DIFFER
from pipelines.pretrain import spread
from pipelines.progress import console
from pipelines.run_folder import RUN, Claim, RunError, claimed, finish, model_folder, model_problems, public, recall, recorded, write_json
from pipelines.statements import Licence, card_lines, statements_of

DESCRIPTION = "an encoder and labels become a registered segmenter, beside the same network from random weights"
EXPECTED = (*PRETRAIN_EXPECTED, SceneError, PreparationError, ModelError)
CASES_TABLE, SCORES = "cases.csv", ("scores.json", "confusion.json", "cases.json")
MAY_DIFFER = (*PRETRAIN_MAY_DIFFER, "encoder", "data", "labels", "out", "crosswalk", "prepare.num_workers", "prepare.scheduler")


class FinetuneSettings(SeenSettings):
    """Settings of `finetune_segmentation`."""

    encoder: str = Field(description="Run of a pretraining, models:/NAME@ALIAS or models:/NAME/VERSION")
    data: Path = Field(description="Folder of images, or one file")
    labels: Path = Field(description="Folder of labels (rasters, polygons, points) named like the images, or one file that covers them")
    label_options: LabelOptions = LabelOptions()
    out: Path = Field(description="Folder of the run")
    init: Literal["pretrained", "scratch", "both"] = Field("both", description="Weights to begin with: one arm, or both side by side")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Each arm is trained once per seed")
    class_names: tuple[str, ...] = Field((), description="Names of the classes by rising number (default: class N)")
    class_colours: tuple[Colour, ...] = Field((), description="#rrggbb of the classes by rising number (default: as in the labels)")
    ignore: tuple[int, ...] = Field((), description="Class numbers that count nowhere")
    label_fraction: float = Field(1.0, gt=0, le=1, description="Share of the training groups whose labels are used")
    reader: dict[str, Any] = Field({}, description="Changes to the adapter's settings that the encoder was pretrained with")
    bands: BandSettings = BandSettings()
    crop: tuple[int, ...] = Field((), max_length=3, description="Voxels per axis that the model sees; empty: as in pretraining")
    overlap: float = Field(0.5, ge=0, lt=1, description="Least overlap of neighbouring crops when held-out tiles are labelled")
    layer_decay: float = Field(0.75, gt=0, le=1, description="Factor on the learning rate from each layer to the one below")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Chance that a ViT's last block is passed by in training; less in earlier ones")
    cases: CaseSettings = CaseSettings()
    sheets: bool = Field(
        False, description="Write a picture of every held-out scan with both outlines; it shows a patient (to MLflow with log_images only)"
    )
    head: HeadSettings = HeadSettings()
    prepare: PrepareSettings = PrepareSettings()
    augment: LabelledAugmentSettings = LabelledAugmentSettings()
    loader: LoaderSettings = LoaderSettings(global_batch_size=16)
    optim: OptimSettings = OptimSettings(base_lr=8e-3, betas=(0.9, 0.999))
    train: TrainSettings = TrainSettings(steps=400, eval_steps=100)
    parallel: ParallelSettings = ParallelSettings()
    tracking: TrackingSettings = TrackingSettings()
    crosswalk: CrosswalkPath = None
    weights_licence: Licence = Field("", description="Licence that the weights are given on under, as an SPDX name; empty: not stated")
    take_over: bool = Field(False, description="Go on with a run although another job seems to work on it; that one will stop")


@dataclass(frozen=True)
class Job:
    """What both arms share.

    Attributes:
        settings: Of the verb, crop spelled out.
        encoder: Pretrained.
        about: Its description.
        store: Labelled tiles.
        rows: Training tiles.
        task: Loss and evaluation.
        parallel: This process.
        config: Resolved settings as they are recorded.
        parent: Registered version of the encoder, if it is known.
        cases: Held-out scans and X-ray pictures; none where images show places.
        training_data: What the encoder was trained on, if it is known.
        verdict: Whether what is held out was among it; None for what shows no patients, and where no arm begins with the encoder.
    """

    settings: FinetuneSettings
    encoder: AnyEncoder
    about: Description
    store: TileStore
    rows: NDArray[np.int64]
    task: Segmentation
    parallel: Parallel
    config: dict[str, Any]
    parent: Registered | None = None
    cases: tuple[Case, ...] = ()
    training_data: TrainingData | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Scored:
    """What an arm is judged by.

    Attributes:
        scores: By name, over all voxels of whole held-out tiles.
        confusion: Voxels by true and predicted class.
        rows: Of every held-out case and class; none where images show places.
    """

    scores: dict[str, float]
    confusion: list[list[int]]
    rows: list[Row]


def work(settings: FinetuneSettings) -> int:
    """Do it."""
    folder, version = model_folder(settings.encoder, settings.tracking, settings.out)
    encoder, about = load_encoder(folder)
    if settings.sheets and about.modality == "xray":
        raise RunError("sheets=true draws the three planes of volumes, and these are X-ray pictures; leave it out")
    seen = load_training_data(folder)
    data = labelled_data(settings, about, seen if settings.split_like_pretraining else None)
    store, verdict = data.store, None
    if settings.init != "scratch":
        verdict = verdict_on(seen, store, allow=settings.allow_seen_patients)
    settings = settings.model_copy(update={"crop": fitting_crop(settings, about, store)})
    config = recorded(settings, store.kind) | {"store_digest": store.digest, "encoder_weights": sha256(folder / WEIGHTS)}
    config |= {"split_digest": split_digest(store.index)}
    with processes(settings.train.device, settings.parallel) as parallel:
        claim = Claim("finetune_segmentation", config, MAY_DIFFER, settings.take_over)
        with claimed(settings.out, claim, parallel) as done:
            if done is None:
                cases = held_out_cases(store.index.scene[store.rows(judged_side(store))].tolist(), data.pairs)
                job = make_job(settings, encoder, about, store, parallel, config)
                result = _compare(replace(job, parent=version, cases=tuple(cases), training_data=seen, verdict=verdict))
            else:
                result = done
                if parallel.is_first:
                    console.print(f"run {settings.out} is finished; its result is told again")
    if result:
        tell(result, settings.out)
    return 0


def make_job(
    settings: FinetuneSettings, encoder: AnyEncoder, about: Description, store: TileStore, parallel: Parallel, config: dict[str, Any]
) -> Job:
    """The task with its augmentation and the rows that it is trained and judged on."""
    if settings.drop_path and about.encoder.kind != "vit":
        raise RunError(f"drop_path={settings.drop_path} passes by blocks of a ViT and this encoder is {about.encoder.kind}; leave it out")
    batch = settings.loader.micro_batch_size or settings.loader.global_batch_size // parallel.world
    task = labelled_task(settings, about, store, batch, parallel)
    placed = foreground_of(settings, task)
    normaliser = replace(task.normaliser, seed=settings.train.seed, augment=settings.augment, foreground=placed)
    task = replace(task, normaliser=normaliser, held_out=spread(task.held_out, settings.train.eval_tiles))
    return Job(settings, encoder, about, store, _labelled_rows(store, settings), task, parallel, config)


def foreground_of(settings: FinetuneSettings, task: Segmentation) -> Foreground | None:
    """What a share of the crops is placed on: all classes but 0, or but the lowest where there is no 0."""
    background = 0 if 0 in (*task.values, *settings.ignore) else min(task.values)
    fraction = settings.augment.foreground_fraction
    return Foreground(fraction, tuple(value for value in task.values if value != background)) if fraction else None


def _labelled_rows(store: TileStore, settings: FinetuneSettings) -> NDArray[np.int64]:
    """Training rows of the first `label_fraction` of the groups, at least one."""
    rows = store.rows("train")
    groups = list(dict.fromkeys(store.index.group[rows].tolist()))
    kept = set(groups[: max(1, round(settings.label_fraction * len(groups)))])
    return np.asarray([row for row in rows if store.index.group[row] in kept], dtype=np.int64)


def _compare(job: Job) -> dict[str, Any]:
    """Train every arm with every seed; scores, registration and `result.json`."""
    settings, out = job.settings, job.settings.out
    arms = ["pretrained", "scratch"] if settings.init == "both" else [settings.init]
    with ExitStack() as stack:
        tracker = None
        if job.parallel.is_first:
            known = recall(out, RUN).get("run_id")
            tracker = stack.enter_context(
                Tracker(settings.tracking, out, say=console.print).run(
                    out.name,
                    known,
                    public(settings, job.store.kind) | {"store_digest": job.store.digest},
                    {"source": "pipelines/finetune_segmentation.py"},
                )
            )
            write_json(out / RUN, {"run_id": tracker.run_id})
            facts = {"tiles": str(len(job.store)), "classes": ",".join(job.task.names), "split_digest": job.config["split_digest"]}
            tracker.tags({} if job.verdict is None else {"seen_patients": job.verdict.words})
            tracker.dataset(job.store.kind, job.store.digest, "fine-tuning", facts)
        found = {(arm, seed): train_arm(job, arm, seed, tracker) for arm in arms for seed in settings.seeds}
        if tracker is None:
            return {}
        confirm(out)
        for arm in arms:
            own = [found[arm, seed].scores for seed in settings.seeds]
            tracker.metrics({f"held_out/{arm}/{name}": mean(part[name] for part in own if name in part) for name in own[0]}, 0)
        cases = _cases(job, {key: part.rows for key, part in found.items()}, tracker)
        facts = _register(job, arms[0], tracker)
    facts["mlflow"] = {**tracker.facts(), "encoder": job.parent.uri if job.parent and arms[0] == "pretrained" else None}
    summary: dict[str, Any] = {
        "arms": arms,
        "seeds": list(settings.seeds),
        "classes": list(job.task.names),
        "held_out": {f"{arm}-seed{seed}": part.scores for (arm, seed), part in found.items()},
        "confusion": {f"{arm}-seed{seed}": part.confusion for (arm, seed), part in found.items()},
        **cases,
        "side": (side := judged_side(job.store)),
    }
    bands = store_matching(job.about, job.store, settings.bands).table()
    groups = {name: len(set(job.store.index.group[rows].tolist())) for name, rows in (("train", job.rows), (side, job.store.rows(side)))}
    facts |= {"intended_use": job.about.intended_use} if job.about.intended_use else {}
    facts |= {"compute": compute_of(*(out / f"{arm}-seed{seed}" for arm, seed in found))}
    return finish(
        out,
        "finetune_segmentation",
        job.config,
        {"figures": summary, "groups": groups, "bands": bands, **facts, **verdict_facts(job.verdict)},
    )


def _cases(job: Job, found: dict[tuple[str, int], list[Row]], tracker: Tracker) -> dict[str, Any]:
    """Figures over cases for `result.json`; every row goes into `cases.csv`, and as a table to the tracker."""
    if not any(found.values()):
        return {}
    columns = table_of(found)
    write_csv(job.settings.out / CASES_TABLE, columns)
    tracker.table("cases.json", columns)
    figures = case_summary(found, job.settings.cases)
    for arm, classes in figures["arms"].items():
        for name, measures_of in classes.items():
            known = {measure: entry["mean"] for measure, entry in measures_of.items() if isinstance(entry, dict)}
            tracker.metrics({f"cases/{arm}/{measure}/{name}": value for measure, value in known.items() if value is not None}, 0)
    return {"cases": figures}


def judged_side(store: TileStore) -> Split:
    """The tiles that the last figures are from: named regions (`prepare.split.regions`) where there are any, else what is held out."""
    return "test" if len(store.rows("test")) else "val"


def train_arm(job: Job, arm: str, seed: int, tracker: Tracker | None) -> Scored:
    """Train one arm, or go on with it, and score it on whole held-out tiles and cases."""
    settings, folder = job.settings, job.settings.out / f"{arm}-seed{seed}"
    if all((folder / name).is_file() for name in SCORES):
        if tracker is not None:
            tracker.finished_part(folder / FOLDER)
        known, voxels, cases = (recall(folder, name) for name in SCORES)
        return Scored({name: float(value) for name, value in known.items()}, voxels["voxels"], rows_from(cases["rows"]))
    model = new_segmenter(job, arm, seed)
    todo = segmentation_work(f"{arm} seed {seed}", model, settings.crop)
    shard(model, job.parallel)
    lr = learning_rate(settings.optim, settings.loader.global_batch_size)
    layers, say = partial(layer_number, depth=job.about.encoder.depth), voice(job.parallel)
    state = TrainState(model, make_optimiser(model, settings.optim, lr, layers, settings.layer_decay))
    restore(state, folder / "checkpoints", say)
    task = replace(job.task, normaliser=replace(job.task.normaliser, seed=seed))
    stream = Stream(job.store, job.rows, settings.loader, seed, job.parallel)
    tell_launch(stream, settings.optim, say)
    with ExitStack() as stack:
        child = None
        if tracker is not None:
            tags = {"source": "pipelines/finetune_segmentation.py", "arm": arm, "seed": str(seed)}
            child = stack.enter_context(
                Tracker(settings.tracking, settings.out, folder=folder / FOLDER, say=console.print).run(
                    f"{settings.out.name}-{arm}-{seed}", state.run_id, {"init": arm, "seed": seed}, tags, step=state.step
                )
            )
            state.run_id = child.run_id
        running = stack.enter_context(attempt(todo, folder, state, stream, settings.train, job.config, child))
        encoder = model.encoder
        tokens = math.prod(encoder.layout(settings.crop).full_grid)
        shapes = [encoder.attention_shape(tokens)] if isinstance(encoder, Encoder) else []
        with checked_attention(shapes, settings.train.precision, task.batch_size, job.parallel, say), running.loop():
            train(task, state, stream, settings.train, settings.optim, running.surroundings, running.report)
        model = gathered(model, lambda: new_segmenter(job, arm, seed))
        scores, confused = score(replace(task, held_out=job.store.rows(judged_side(job.store))), model.eval(), settings.overlap)
        about = segmenter_description(job, arm, seed, child.run_id if child is not None else "")
        judge = Judge(about, settings.overlap, settings.bands, task.batch_size, settings.cases, job.parallel)
        rows = judge.rows(model, job.cases, partial(write_sheet, about, folder / "sheets") if settings.sheets else None)
        if child is not None:
            child.metrics({f"held_out/{name}": value for name, value in scores.items()}, state.step)
            log_sheets(child, folder / "sheets", [case.scene.name for case in job.cases] if settings.sheets else [], state.step)
            save_model(folder / "model", model, about, training_files(job, arm))
            write_json(folder / "cases.json", {"rows": plain_rows(rows)})
            write_json(
                folder / "confusion.json", {"rows": "labelled", "columns": "predicted", "classes": job.task.names, "voxels": confused}
            )
            write_json(folder / "scores.json", scores)
    job.parallel.barrier()
    return Scored(scores, confused, rows)


def new_segmenter(job: Job, arm: str, seed: int) -> Segmenter:
    """A segmenter whose arms differ in nothing but the encoder's weights."""
    torch.manual_seed(seed)
    model = Segmenter(build_encoder(job.about.encoder, job.about.channels), job.settings.head, len(job.task.values))
    for number, block in enumerate(model.encoder.blocks):
        if isinstance(block, Block):
            block.drop_path = job.settings.drop_path * number / max(1, len(model.encoder.blocks) - 1)
    if arm == "pretrained":
        model.encoder.load_state_dict(job.encoder.state_dict())
    return model.to(job.parallel.device)


def score(task: Segmentation, model: Segmenter, overlap: float) -> tuple[dict[str, float], list[list[int]]]:
    """Dice and IoU per class over all held-out voxels and the mean over scenes of each scene's Dice; voxels by true and predicted class.

    Raises:
        RunError: No held-out voxel has both a value and a class.
    """
    totals = confusion_by_scene(task, model, overlap)
    total = torch.stack(list(totals.values())).sum(dim=0)
    if not total.any():
        raise RunError("no voxel of the held-out tiles has both a value and a class that counts; give more labels, or hold out others")
    scores = dict(measures(total, task.names))
    by_scene = [dict(measures(total, task.names)) for total in totals.values()]
    for name in task.names:
        values = [part[f"dice/{name}"] for part in by_scene if f"dice/{name}" in part]
        if values:
            scores[f"scene_dice/{name}"] = mean(values)
    return scores, [[int(count) for count in row] for row in total]


def training_files(job: Job, arm: str) -> dict[str, bytes]:
    """What is kept beside the segmenter of an arm: what it and the encoder that it began with were trained on."""
    begun = "the encoder that it began with" if arm == "pretrained" else ""
    return files_of(trained_on(job.training_data if begun else None, job.store, "fine-tuning", begun))


def segmenter_description(job: Job, arm: str, seed: int, run_id: str) -> Description:
    """What the segmenter of an arm is, how it is fed and where it comes from."""
    lineage = {**job.about.lineage, "labelled_store_digest": job.store.digest, "finetuning_run": run_id, "init": arm}
    if arm == "pretrained":
        lineage |= {"encoder_weights": job.config["encoder_weights"]} | ({"encoder_version": job.parent.uri} if job.parent else {})
        lineage |= {} if job.verdict is None else {"seen_patients": job.verdict.words}
    compute = compute_words(compute_of(job.settings.out / f"{arm}-seed{seed}"))
    facts = card_lines(
        statements_of(job.store), job.settings.weights_licence, f"fine-tuning: {compute}", is_patients=of_patients(job.store.kind)
    )
    if arm == "pretrained":
        facts = {**{f"Encoder: {name}": said for name, said in job.about.facts.items()}, **facts}
    return job.about.model_copy(
        update={
            "kind": "segmenter",
            "crop": job.settings.crop,
            "head": job.settings.head,
            "classes": tuple(zip(job.task.values, job.task.names, strict=True)),
            "colours": colours_of(job.settings, job.store, job.task.values),
            "bands": job.settings.bands.model_copy(update={"accept_units": False}),
            "modality": job.store.kind,
            "reader": job.store.attributes["reader"],
            "lineage": lineage,
            "facts": facts,
        }
    )


def _register(job: Job, arm: str, tracker: Tracker) -> dict[str, Any]:
    """Register the first seed of an arm; lineage to the encoder version where the arm began with it."""
    folder = job.settings.out / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(job.settings.out / f"{arm}-seed{job.settings.seeds[0]}" / "model", folder)
    parent = job.parent if arm == "pretrained" else None
    tracker.register(folder, load_description(folder, "segmenter"), parent)
    return {
        "digests": {
            "store": job.store.digest,
            "split": job.config["split_digest"],
            "weights": sha256(folder / WEIGHTS),
            "encoder": job.config["encoder_weights"],
        },
    }


def check(settings: FinetuneSettings) -> list[str]:
    """Problems that only disk, machine and tracker can tell."""
    sizes: list[int] = []

    def load(folder: Path) -> None:
        sizes.append(checkpoint_bytes(load_encoder(folder)[0]))

    problems = missing(settings) + model_problems(settings.encoder, settings.tracking, settings.out, load)
    runs = len(settings.seeds) * (2 if settings.init == "both" else 1)
    return problems + training_problems(settings, sum(sizes), console.print, runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run(
        "finetune_segmentation",
        FinetuneSettings,
        work,
        check=check,
        description=DESCRIPTION,
        defaults={"prepare.split.val_fraction": 0.25},
        expected=EXPECTED,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
