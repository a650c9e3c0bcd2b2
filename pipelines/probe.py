"""What frozen features tell: linear probe and nearest neighbours of an encoder, of random weights and of the pixels themselves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mae_core.bands import BandSettings
from mae_core.encoders import AnyEncoder, build_encoder
from mae_core.export import WEIGHTS, Description, load_encoder
from mae_core.parallel import Parallel, processes
from mae_core.probes import PIXELS, LinearSettings, Samples, classification_measures, collect, knn, linear_probe
from mae_core.sealed import sha256
from mae_core.segmentation import Segmentation, confusion
from mae_core.store import TileStore
from mae_core.tracking import Registered, Tracker, TrackingSettings
from modalities.label_file import LabelOptions
from pipelines.bands import store_matching
from pipelines.command_line import run
from pipelines.contamination import SeenSettings, Verdict, load_training_data, verdict_facts, verdict_on
from pipelines.finetune_segmentation import EXPECTED
from pipelines.frozen_split import split_digest
from pipelines.labelled import Colour, labelled_store, labelled_task, missing
from pipelines.preparation import PrepareSettings
from pipelines.progress import console, table
from pipelines.run_folder import RUN, RunError, begin, finish, model_folder, model_problems, public, recall, recorded, write_json
from pipelines.tracked import tell_tracked

DESCRIPTION = "what a linear map and nearest neighbours read out of frozen features, beside random weights and the pixels themselves"
MAY_DIFFER = (
    "encoder",
    "data",
    "labels",
    "out",
    "batch_size",
    "device",
    "prepare.num_workers",
    "prepare.scheduler",
    "prepare.memory_limit",
    "tracking",
)
PRETRAINED = "pretrained"
MEASURES = {"balanced_accuracy": "balanced", "macro_f1": "macro F1", "accuracy": "accuracy"}
"""Measures in the order of the table, with the heads of their columns."""


class ProbeSettings(SeenSettings):
    """Settings of `probe`."""

    encoder: str = Field(description="Run of a pretraining, models:/NAME@ALIAS or models:/NAME/VERSION")
    data: Path = Field(description="Folder of images, or one file")
    labels: Path = Field(description="Folder of labels (rasters, polygons, points) named like the images, or one file that covers them")
    label_options: LabelOptions = LabelOptions()
    out: Path = Field(description="Folder of the run")
    level: Literal["token", "tile"] = Field("token", description="What has a class: each token, or the crop at the centre of each tile")
    pool: Literal["mean", "class"] = Field("mean", description="Features of a tile: the mean over its tokens, or the class token")
    max_tokens: int = Field(8192, ge=2, description="Samples per side of the split at most, drawn evenly from its tiles")
    seed: int = Field(0, ge=0, description="Draws samples, and the training groups that the linear probe's penalty is chosen on")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="Random weights to compare with, one encoder per seed; empty for none")
    class_names: tuple[str, ...] = Field((), description="Names of the classes by rising number (default: class N)")
    class_colours: tuple[Colour, ...] = Field((), description="#rrggbb of the classes by rising number (default: as in the labels)")
    ignore: tuple[int, ...] = Field((), description="Class numbers that count nowhere")
    reader: dict[str, Any] = Field({}, description="Changes to the adapter's settings that the encoder was pretrained with")
    bands: BandSettings = BandSettings()
    crop: tuple[int, ...] = Field((), max_length=3, description="Voxels per axis that the model sees; empty: as in pretraining")
    linear: LinearSettings = LinearSettings()
    k: int = Field(20, ge=1, description="Nearest neighbours that vote")
    temperature: float = Field(0.07, gt=0, description="A neighbour of cosine similarity s votes with exp(s / temperature)")
    batch_size: int = Field(16, ge=1, description="Tiles at once through the encoder")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if torch sees one")
    prepare: PrepareSettings = PrepareSettings()
    tracking: TrackingSettings = TrackingSettings(system_metrics=False)


def work(settings: ProbeSettings) -> int:
    """Do it."""
    folder, version = model_folder(settings.encoder, settings.tracking, settings.out)
    encoder, about = load_encoder(folder)
    seen = load_training_data(folder)
    store = labelled_store(settings, about, seen if settings.split_like_pretraining else None)
    verdict = verdict_on(seen, store, allow=settings.allow_seen_patients)
    digests = {"store": store.digest, "split": split_digest(store.index), "encoder": sha256(folder / WEIGHTS)}
    config = recorded(settings, store.kind) | {"store_digest": digests["store"], "encoder_weights": digests["encoder"]}
    with processes(settings.device) as parallel:
        if parallel.world > 1:
            raise RunError("probe runs in one process; start it without torchrun")
        done = begin(settings.out, "probe", config, MAY_DIFFER)
        if done is not None:
            console.print(f"run {settings.out} is finished; its result is told again")
        else:
            task = make_task(settings, about, store, parallel)
            figures = measured(settings, task, encoder, about)
            told = track(settings, task, figures, version, verdict)
            bands = store_matching(about, store, settings.bands).table()
            facts = {"figures": figures, "bands": bands, "digests": digests, "mlflow": told, **verdict_facts(verdict)}
            done = finish(settings.out, "probe", config, facts)
    tell(done, settings.out)
    return 0


def make_task(settings: ProbeSettings, about: Description, store: TileStore, parallel: Parallel) -> Segmentation:
    """Classes, channels and crops, checked against the encoder.

    Raises:
        RunError: There are fewer than two classes, nothing is held out, or the values are in other units.
    """
    task = labelled_task(settings, about, store, settings.batch_size, parallel)
    if not len(task.held_out):
        raise RunError("no tile is held out, so nothing can be judged; set prepare.split.val_fraction above 0")
    return task


def measured(settings: ProbeSettings, task: Segmentation, encoder: AnyEncoder, about: Description) -> dict[str, Any]:
    """Scores of both probes for every arm, with how many samples of each class they were fitted and judged on.

    Raises:
        RunError: A side of the split has fewer than two classes.
    """
    encoders = {PRETRAINED: encoder.to(task.parallel.device)}
    for seed in settings.seeds:
        torch.manual_seed(seed)
        encoders[f"random-seed{seed}"] = build_encoder(about.encoder, about.channels).eval().to(task.parallel.device)
    sides = {}
    for side, rows in (("train", task.store.rows("train")), ("val", task.held_out)):
        console.print(f"features of {len(rows)} tiles ({side}) by {len(encoders)} encoders")
        sides[side] = collect(task, encoders, rows, settings.level, settings.pool, settings.max_tokens, settings.seed)
    counts = {side: counted(samples.classes, task.names) for side, samples in sides.items()}
    for side, found in counts.items():
        if sum(number > 0 for number in found.values()) < 2:
            hint = "use level=token" if settings.level == "tile" else "give more labels, or other ones to ignore"
            raise RunError(f"the {settings.level}s of side {side} have fewer than two classes: {found}; {hint}")
    train, held_out = sides["train"], sides["val"]
    scores, fits = {}, {}
    for arm in sides["train"].features:
        scores[arm], fits[arm] = judged(settings, train, held_out, arm, len(task.names))
        if not fits[arm]["converged"]:
            console.print(f"[yellow]linear probe of {arm}: not converged[/]; raise linear.max_iterations or the least of linear.l2")
    constant = torch.full_like(held_out.classes, int(train.classes.bincount(minlength=len(task.names)).argmax()))
    return {
        "level": settings.level,
        "classes": list(task.names),
        "samples": counts,
        "groups": {side: len(samples.groups.unique()) for side, samples in sides.items()},
        "held_out": scores,
        "linear": fits,
        "most_frequent_class": classification_measures(confusion(constant, held_out.classes, len(task.names))),
    }


def judged(
    settings: ProbeSettings, train: Samples, held_out: Samples, arm: str, num_classes: int
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Measures of both probes of an arm, and how the linear one came out."""
    sides = train.features[arm], train.classes
    test = held_out.features[arm]
    linear = linear_probe(*sides, train.groups, test, num_classes, settings.linear, settings.seed)
    guesses = {"linear": linear.classes, "knn": knn(*sides, test, num_classes, settings.k, settings.temperature)}
    scores = {probe: classification_measures(confusion(guess, held_out.classes, num_classes)) for probe, guess in guesses.items()}
    return scores, {"l2": linear.l2, "converged": linear.converged}


def counted(classes: Tensor, names: Sequence[str]) -> dict[str, int]:
    """Number of samples by class."""
    return dict(zip(names, classes.bincount(minlength=len(names)).tolist(), strict=True))


def track(
    settings: ProbeSettings, task: Segmentation, figures: dict[str, Any], version: Registered | None, verdict: Verdict | None
) -> dict[str, Any]:
    """Tell the tracker; where it was told."""
    out, store = settings.out, task.store
    config = public(settings, store.kind) | {"store_digest": store.digest}
    known = recall(out, RUN).get("run_id")
    tags = {"source": "pipelines/probe.py"}
    with Tracker(settings.tracking, out, say=console.print).run(out.name, known, config, tags) as tracker:
        write_json(out / RUN, {"run_id": tracker.run_id})
        facts = {"tiles": str(len(store)), "classes": ",".join(task.names), "split_digest": split_digest(store.index)}
        tracker.dataset(store.kind, store.digest, "probing", facts)
        tracker.tags({} if verdict is None else {"seen_patients": verdict.words})
        values = {
            f"held_out/{arm}/{probe}/{name}": value
            for arm, probes in figures["held_out"].items()
            for probe, measures in probes.items()
            for name, value in measures.items()
        }
        tracker.metrics(values, 0)
        if version is not None:
            tracker.used_model(version)
    return {**tracker.facts(), "encoder": version.uri if version else None}


def tell(result: dict[str, Any], out: Path) -> None:
    """Print the table of all arms and what it means."""
    figures = result["figures"]
    scores, groups = figures["held_out"], figures["groups"]
    random = [name for name in scores if name not in (PRETRAINED, PIXELS)]
    arms = {PRETRAINED: [PRETRAINED], "random weights": random, PIXELS: [PIXELS]}
    rows = []
    for probe, spelled in (("linear", "linear"), ("knn", "k-NN")):
        for title, names in arms.items():
            if names:
                rows.append([title, spelled, *(spoken([scores[name][probe][key] for name in names]) for key in MEASURES)])
    rows.append(["most frequent class", "none", *(f"{figures['most_frequent_class'][key]:.3f}" for key in MEASURES)])
    table(f"frozen features of {figures['level']}s, held-out groups", ["features", "probe", *MEASURES.values()], rows)
    for side, what in (("train", "fitted on"), ("val", "judged on")):
        found = ", ".join(f"{number} {name}" for name, number in figures["samples"][side].items())
        console.print(f"{what} {sum(figures['samples'][side].values())} {figures['level']}s of {groups[side]} groups: {found}")
    console.print("balanced: mean share of each class's samples that is found; random weights: mean of the seeds, least and most.")
    tell_tracked({key: value for key, value in result["mlflow"].items() if key != "encoder"}, out)


def spoken(values: Sequence[float]) -> str:
    """The mean, with least and most where there are several."""
    return f"{mean(values):.3f}" + (f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else "")


def check(settings: ProbeSettings) -> list[str]:
    """Problems that only the disk can tell."""
    return missing(settings) + model_problems(settings.encoder, settings.tracking, settings.out, load_encoder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run(
        "probe",
        ProbeSettings,
        work,
        check=check,
        description=DESCRIPTION,
        defaults={"prepare.split.val_fraction": 0.25},
        expected=EXPECTED,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
