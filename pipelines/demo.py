"""The main job on small real samples: prepare, pretrain, register, fine-tune, register, predict. Or on the user's own files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from mae_core.settings import Settings
from modalities.catalogue import scan
from modalities.medical import MriSettings
from modalities.patients import of_patients
from modalities.samples import TISSUES, write_mri_sample, write_satellite_sample
from modalities.scene import SceneError
from pipelines import finetune_segmentation, predict, pretrain_mri, pretrain_sentinel
from pipelines.command_line import run
from pipelines.progress import console, table
from pipelines.run_folder import RunError, recall, write_json
from pipelines.tracked import ui_command

DESCRIPTION = "the whole chain on small real samples, or on your own files, in a few minutes on two cores"
QUICK = ("train.log_steps=5", "train.checkpoint_steps=100", "tracking.experiment=terravox-demo")
NANO = "model.encoder.preset=nano"
SATELLITE = (
    "train.steps=300",
    "train.eval_steps=100",
    "loader.global_batch_size=32",
    "optim.base_lr=8e-3",
    "model.encoder.patch=[4]",
    NANO,
)
VOLUMES = ("train.steps=160", "train.eval_steps=40", "loader.global_batch_size=16", "optim.base_lr=1.6e-2", "augment.flips=false", NANO)
SEGMENT = (
    "train.steps=80",
    "train.eval_steps=40",
    "loader.global_batch_size=4",
    "optim.base_lr=1.2e-1",
    "augment.flips=false",
    "head.features=8",
    "overlap=0.25",
)
BLOCKS = ("prepare.split.unit=block", "prepare.split.block_tiles=1", "prepare.split.val_fraction=0.2")
ENDINGS = {"mri": ".nii.gz", "sentinel2": ".tif"}


class DemoSettings(Settings):
    """Settings of `demo`."""

    out: Path = Field(Path("runs/demo"), description="Folder for all that is made; started again, it goes on where it stopped")
    data: Path | None = Field(None, description="Your own folder of images instead of the samples")
    labels: Path | None = Field(None, description="Label maps of your images; without them no segmenter is made")
    modality: Literal["sentinel2", "mri"] = Field("mri", description="What your own images are")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="The segmenter is trained once per seed, pretrained and from scratch")


def work(settings: DemoSettings) -> int:
    """Do it."""
    out = settings.out
    if settings.data is not None:
        done = _chain(out, settings.modality, settings.data, settings.labels, (), settings.seeds)
    else:
        console.rule("satellite: a Sentinel-2 scene")
        done = _chain(out, "sentinel2", write_satellite_sample(out / "sample"), None, ("prepare.tile=[60,60]", *BLOCKS), settings.seeds)
        console.rule("medical: the MNI152 T1 template and its tissues")
        images, labels = write_mri_sample(out / "sample")
        done |= _chain(out, "mri", images, labels, ("prepare.tile=[50,59,48]", *BLOCKS), settings.seeds)
    write_json(out / "result.json", {"verb": "demo", "made": done})
    console.rule("what was made")
    table("", ("what", "where"), list(done.items()))
    uri = recall(out / f"{settings.modality if settings.data else 'mri'}-encoder")["mlflow"]["uri"]
    console.print(f"See runs, curves, pictures and registered models:  {ui_command(uri)}")
    return 0


def _name(run: Path) -> str:
    """What the next verb is given: the alias of the registered model, or the run's folder where it is not registered yet."""
    return str(recall(run)["mlflow"].get("alias", run))


def _chain(out: Path, modality: str, images: Path, labels: Path | None, split: Sequence[str], seeds: Sequence[int]) -> dict[str, str]:
    """Pretrain, and with labels fine-tune and predict; what was made."""
    encoder = out / f"{modality}-encoder"
    own = VOLUMES if modality == "mri" else SATELLITE
    verb = pretrain_mri.main if modality == "mri" else pretrain_sentinel.main
    _run(verb, ["--data", str(images), "--out", str(encoder), *split, *own, *QUICK])
    found = recall(encoder)
    done = {f"{modality} encoder": f"{_name(encoder)}, held-out skill {found['figures'].get('val/skill', float('nan')):+.3f}"}
    if labels is None:
        return done
    segmenter = out / f"{modality}-segmenter"
    names = f"class_names=[{','.join(TISSUES)}]" if split else "class_names=[]"
    arguments = ["--encoder", _name(encoder), "--data", str(images), "--labels", str(labels), "--out", str(segmenter)]
    _run(finetune_segmentation.main, [*arguments, names, f"seeds={list(seeds)}", *split, *SEGMENT, *QUICK])
    held_out = recall(segmenter)["figures"]["held_out"]
    dice = ", ".join(f"{arm} {scores['mean_dice']:.3f}" for arm, scores in held_out.items())
    done[f"{modality} segmenter"] = f"{_name(segmenter)}, held-out mean Dice {dice}"
    first = _first(images, modality)
    name = "first" if of_patients(modality) and not split else first.name.split(".")[0]
    place = out / f"{name}_labels{ENDINGS[modality]}"
    _run(
        predict.main,
        [
            "--model",
            _name(segmenter),
            "--data",
            str(first),
            "--out",
            str(place),
            "overlap=0.1",
            "tracking.experiment=terravox-demo",
        ],
    )
    done["predicted labels"] = str(place)
    return done


def _first(images: Path, modality: str) -> Path:
    """The first image by name; of scans, the first that can be used.

    Raises:
        RunError: All scans are DICOM series.
    """
    if modality == "mri":
        files = [file for scene in scan(images, MriSettings()).scenes for file in scene.files if file.name.endswith(ENDINGS["mri"])]
        if not files:
            raise RunError("the demo labels one NIfTI file at its end, and no usable scan of --data is one; use predict for DICOM")
        return min(files)
    return min(path for path in images.rglob("*") if path.is_file() and path.name.endswith(ENDINGS[modality]))


def _run(verb: object, arguments: list[str]) -> None:
    """Run a verb as a user would.

    Raises:
        RunError: It ended with an error, which it has printed.
    """
    assert callable(verb)
    code = verb(arguments)
    if code:
        raise RunError(f"a step of the demo failed with exit code {code}; its message is above")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run("demo", DemoSettings, work, description=DESCRIPTION, expected=(SceneError, RunError), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
