"""The command `terravox`, which runs the verbs by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version

VERBS = (
    ("catalogue", "folder of scans to a table of every volume, used or not and why, under pseudonyms"),
    ("prepare", "files to a tile store: what training reads"),
    ("store", "what a tile store holds, whether it is whole; tiles as files, one page of pictures, several stores as one"),
    ("pretrain", "tile store to a pretrained encoder"),
    ("pretrain_sentinel", "folder of Sentinel-2 products to tiles, encoder and registry in one command"),
    ("pretrain_mri", "folder of MRI volumes to tiles, encoder and registry in one command"),
    ("finetune_segmentation", "encoder and labels to a segmenter"),
    ("probe", "encoder and labels to what a linear map and nearest neighbours read out of frozen features"),
    ("compare", "one choice at a time: the same pretraining with changes and seeds, judged by probes"),
    ("predict", "segmenter and scenes to label maps in the geometry of the source files"),
    ("reconstruct", "pretraining run and images to rasters of what is there, what was shown and what was predicted"),
    ("replay", "a step that was not finite, run again from its black box: where what is not finite comes from"),
    ("checkpoints", "the checkpoints of a run, each verified: exit code 1 if any is damaged"),
    ("convert", "weights of published autoencoders in, our encoders for MONAI out"),
    ("sync", "runs that the tracking server missed, or of a cluster without a way out, to MLflow"),
    ("demo", "the whole line on a small sample, on any machine"),
    ("doctor", "what would fail on this machine, or of a command, before it fails"),
    ("benchmark", "training step, preparation, loader and codecs against what the machine can do and against other libraries"),
)
"""Every verb with what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the verb that the first argument names; 2 if it names none."""
    words = list(sys.argv[1:] if argv is None else argv)
    match words[:1]:
        case [] | ["--help" | "-h" | "help"]:
            print(help_text())
            return 0 if words else 2
        case ["--version"]:
            print(f"terravox {_version()}")
            return 0
    names = [name for name, _ in VERBS]
    if words[0] not in names:
        near = get_close_matches(words[0].replace("-", "_"), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"verbs are {', '.join(names)}"
        print(f"terravox: unknown verb {words[0]}; {hint}", file=sys.stderr)
        return 2
    return verb(words[0])(words[1:])


def verb(name: str) -> Callable[[Sequence[str]], int]:  # noqa: C901 - one case per verb
    """The `main` of a verb, imported only now, so that the others cost nothing."""
    match name:
        case "catalogue":
            from pipelines.catalogue import main as chosen
        case "prepare":
            from pipelines.prepare import main as chosen
        case "store":
            from pipelines.store import main as chosen
        case "pretrain":
            from pipelines.pretrain import main as chosen
        case "pretrain_sentinel":
            from pipelines.pretrain_sentinel import main as chosen
        case "pretrain_mri":
            from pipelines.pretrain_mri import main as chosen
        case "finetune_segmentation":
            from pipelines.finetune_segmentation import main as chosen
        case "probe":
            from pipelines.probe import main as chosen
        case "compare":
            from pipelines.compare import main as chosen
        case "predict":
            from pipelines.predict import main as chosen
        case "reconstruct":
            from pipelines.reconstruct import main as chosen
        case "replay":
            from pipelines.replay import main as chosen
        case "checkpoints":
            from pipelines.checkpoints import main as chosen
        case "convert":
            from pipelines.convert import main as chosen
        case "sync":
            from pipelines.sync import main as chosen
        case "demo":
            from pipelines.demo import main as chosen
        case "benchmark":
            from pipelines.benchmark import main as chosen
        case "doctor":
            from pipelines.doctor import main as chosen
        case _:
            raise ValueError(f"{name} is no verb; verbs are {', '.join(name for name, _ in VERBS)}")
    return chosen


def help_text() -> str:
    """What `terravox --help` prints."""
    width = max(len(name) for name, _ in VERBS) + 2
    lines = ["usage: terravox VERB [--config FILE]... [KEY=VALUE | --KEY VALUE]...", "       terravox VERB --help", "", "verbs:"]
    return "\n".join([*lines, *(f"  {name:<{width}}{what}" for name, what in VERBS)])


def _version() -> str:
    try:
        return version("terravox")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
