"""One choice at a time: the same pretraining with and without each change, several seeds, judged by probes of the features."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from mae_core.settings import Settings
from modalities.patients import of_patients
from modalities.scene import SceneError
from pipelines import pretrain_mri, pretrain_sentinel, probe
from pipelines.command_line import run
from pipelines.crosswalk_option import refuse_inside
from pipelines.labelled import missing
from pipelines.progress import console, mean_and_deviation, table
from pipelines.run_folder import RunError, begin, finish, recall, recorded

DESCRIPTION = "the same pretraining with one change at a time and several seeds, each judged by probes on held-out labels"
COLUMNS = {"linear": "linear probe", "knn": "k-NN"}


class CompareSettings(Settings):
    """Settings of `compare`."""

    data: Path = Field(description="Folder of images")
    labels: Path = Field(description="Label maps of some of the images, or one file that covers them")
    out: Path = Field(description="Folder of all runs; started again, it goes on where it stopped")
    modality: Literal["sentinel2", "mri"] = Field("sentinel2", description="What the images are")
    pretraining: tuple[str, ...] = Field((), description="Settings of every pretraining, such as train.steps=300; `--config FILE` too")
    probing: tuple[str, ...] = Field((), description="Settings of every probe")
    variants: dict[str, tuple[str, ...]] = Field({"default": ()}, min_length=1, description="Name of each variant and what it changes")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Every variant is pretrained once per seed")

    @field_validator("variants")
    @classmethod
    def _named(cls, variants: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        wrong = [name for name in variants if not name.replace("-", "").replace("_", "").isalnum()]
        if wrong:
            raise ValueError(f"variants {wrong}: a name is made of letters, digits, - and _, because a folder is named after it")
        return variants


def work(settings: CompareSettings) -> int:
    """Do it."""
    refuse_inside(settings.data, settings.modality, out=settings.out)
    config = recorded(settings, settings.modality)
    if of_patients(settings.modality):
        config |= {name: _told(config[name]) for name in ("pretraining", "probing")}
        config["variants"] = {name: _told(words) for name, words in config["variants"].items()}
    done = begin(settings.out, "compare", config, ())
    if done is None:
        figures: dict[str, Any] = {}
        for seed in settings.seeds:
            for name in settings.variants:
                figures.setdefault(name, []).append(one(settings, name, seed))
        done = finish(settings.out, "compare", config, {"figures": figures})
    tell(done["figures"])
    return 0


def _told(words: Sequence[str]) -> list[str]:
    """Words of a command line without those that can name a patient: patterns of files, and places."""
    return [word for word in words if "reader.exclude" not in word and os.sep not in word]


def one(settings: CompareSettings, name: str, seed: int) -> dict[str, Any]:
    """Pretrain and probe a variant with a seed; its figures.

    Raises:
        RunError: A step failed; it has printed why.
    """
    encoder, probed = settings.out / f"{name}-seed{seed}", settings.out / f"{name}-seed{seed}-probe"
    random = [seed] if name == next(iter(settings.variants)) else []  # once per seed is enough
    verb = pretrain_mri.main if settings.modality == "mri" else pretrain_sentinel.main
    console.rule(f"{name}, seed {seed}")
    common = ["--data", str(settings.data)]
    _run(verb, [*common, "--out", str(encoder), *settings.pretraining, *settings.variants[name], f"train.seed={seed}"], name)
    _run(
        probe.main,
        [*common, "--labels", str(settings.labels), "--encoder", str(encoder), "--out", str(probed), f"seeds={random}", *settings.probing],
        name,
    )
    found, read = recall(encoder)["figures"], recall(probed)["figures"]
    scores = {}
    for arm, probes in read["held_out"].items():
        scores[arm.partition("-seed")[0]] = {kind: measures["balanced_accuracy"] for kind, measures in probes.items()}
    seen = recall(probed).get("seen_patients")
    return {"seed": seed, "skill": found.get("val/skill"), "balanced_accuracy": scores, **({"seen_patients": seen} if seen else {})}


def _run(verb: Any, arguments: list[str], name: str) -> None:
    code = verb(arguments)
    if code:
        raise RunError(f"variant {name} failed with exit code {code}; its message is above")


def tell(figures: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table: mean and deviation over the seeds."""

    def read(runs: list[dict[str, Any]], arm: str) -> list[str]:
        return [mean_and_deviation([run["balanced_accuracy"][arm][kind] for run in runs]) for kind in COLUMNS]

    first = next(iter(figures.values()))
    rows = []
    for name, runs in figures.items():
        rows.append([name, mean_and_deviation([run["skill"] for run in runs if run["skill"] is not None], "+"), *read(runs, "pretrained")])
    rows += [[f"({arm})", "–", *read(first, arm)] for arm in ("random", "pixels")]
    table(f"balanced accuracy of probes, held-out groups, {len(first)} seeds", ["variant", "skill", *COLUMNS.values()], rows)
    console.print("Skill is told in the space of each variant's own target and hidden share, so compare probes, not skills.")


def check(settings: CompareSettings) -> list[str]:
    """Problems that only the disk can tell."""
    return missing(settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run("compare", CompareSettings, work, check=check, description=DESCRIPTION, expected=(SceneError, RunError), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
