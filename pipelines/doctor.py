"""What would fail is told before it fails: the machine, the disk, the tracking store and, if it is named, the command of a run."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.text import Text

from mae_core.settings import Settings
from modalities.patients import of_patients
from modalities.pseudonyms import key_file
from pipelines.command_line import parse, run
from pipelines.doctor_disk import existing, folder_findings, store_finding, try_writing
from pipelines.doctor_machine import memory_finding, shared_memory_finding, torch_findings
from pipelines.doctor_process import clock_finding, launch_findings, limit_findings, umask_finding, variable_findings
from pipelines.doctor_software import software_findings
from pipelines.doctor_tracking import tracking_findings
from pipelines.findings import Finding, fine, problem, warning
from pipelines.withheld import kind_of

DESCRIPTION = "what would fail on this machine, before it fails; with the name and the settings of a verb, what would fail of that command"
USAGE = "python pipelines/doctor.py [KEY=VALUE]... [VERB [the words of its command]]; --json is short for format=json"
TRAINING = ("pretrain", "pretrain_sentinel", "pretrain_mri", "finetune_segmentation")
COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


class DoctorTracking(Settings):
    """Where runs would be recorded."""

    uri: str | None = Field(None, description="MLflow tracking URI (default: MLFLOW_TRACKING_URI, else sqlite beside the runs)")


class DoctorSettings(Settings):
    """Settings of `doctor`."""

    out: Path = Field(Path("runs/new"), description="Folder of a run; it need not exist, and a file is written beside it for a moment")
    store: str | None = Field(None, description="Tile store to look at: that it can be read and all files have their sizes")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="What will be trained on; cuda: that there is no GPU is a problem")
    patients: bool = Field(
        False, description="Look at what scans of patients need too: the key of pseudonyms, and who may read what is written"
    )
    tracking: DoctorTracking = DoctorTracking()
    format: Literal["text", "json"] = Field("text", description="For people or for machines; --json is short for json")


def findings(settings: DoctorSettings) -> list[Finding]:
    """A line for everything that was looked at."""
    environment = os.environ
    trial = try_writing(settings.out)
    patients = settings.patients or _shows_patients(settings.store)
    found = [*software_findings(), *torch_findings(settings.device, environment), memory_finding()]
    gpus = sum(finding.subject.startswith("GPU ") for finding in found)
    found += [*shared_memory_finding(gpus), *launch_findings(environment), *limit_findings(), umask_finding(patients=patients)]
    found += [*variable_findings(environment), clock_finding(trial.skew_s)]
    found += folder_findings("out", settings.out, trial=trial)
    found += [] if settings.store is None else [store_finding(settings.store)]
    found += _tracking(settings)
    return [*found, key_finding(key_file())] if patients else found


def key_finding(file: Path) -> Finding:
    """Whether the key that pseudonyms are made with is there and nobody else's; it is not read."""
    try:
        found = file.stat()
    except FileNotFoundError:
        if os.access(existing(file), os.W_OK):
            return fine("key of pseudonyms", "none yet; the first run on patients' scans makes it")
        return problem("key of pseudonyms", "none, and it cannot be made where it belongs", "set TERRAVOX_KEY_FILE to a file of your own")
    except OSError as error:
        return problem("key of pseudonyms", error.strerror or "cannot be read", "set TERRAVOX_KEY_FILE to a file of your own")
    if found.st_mode & 0o077:
        return problem("key of pseudonyms", f"mode {found.st_mode & 0o777:04o}: others can read it", "chmod 600 it")
    if not os.access(file, os.R_OK):
        return problem("key of pseudonyms", "cannot be read", "set TERRAVOX_KEY_FILE to a file of your own")
    return fine("key of pseudonyms", f"there, mode {found.st_mode & 0o777:04o}")


def command_findings(verb: str, words: Sequence[str]) -> list[Finding]:
    """What `--check` of a verb says of a command."""
    subject, said, told = f"settings of {verb}", io.StringIO(), io.StringIO()
    with redirect_stdout(told), redirect_stderr(said):
        code = main_of(verb)([*words, "--check"])
    found = [
        warning(subject, line.removeprefix("warning: "), "see the settings")
        for line in told.getvalue().splitlines()
        if line.startswith("warning: ")
    ]
    if code == 0:
        return [*found, fine(subject, "valid")]
    lines = [line.strip() for line in said.getvalue().splitlines() if line.strip()]
    wrong = [line for line in lines if not line.startswith(f"terravox {verb}:")] or lines
    return [*found, *(problem(subject, line, "") for line in wrong)]


def main_of(verb: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a verb that trains, imported only now."""
    match verb:
        case "pretrain":
            from pipelines.pretrain import main as chosen
        case "pretrain_sentinel":
            from pipelines.pretrain_sentinel import main as chosen
        case "pretrain_mri":
            from pipelines.pretrain_mri import main as chosen
        case "finetune_segmentation":
            from pipelines.finetune_segmentation import main as chosen
        case _:
            raise ValueError(f"{verb} trains nothing; what does is {', '.join(TRAINING)}")
    return chosen


def work(settings: DoctorSettings, command: Sequence[str] = ()) -> int:
    """Do it: 1 if there is a problem."""
    found = findings(settings)
    found += command_findings(command[0], command[1:]) if command else []
    counts = {level: sum(finding.level == level for finding in found) for level in COLOURS}
    if settings.format == "json":
        print(json.dumps({**counts, "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        tell(found)
    return 1 if counts["problem"] else 0


def tell(found: Sequence[Finding]) -> None:
    """Print a line for each, and what to do under those that ask for it."""
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(finding.subject) for finding in found) + 2
    for finding in found:
        console.print(
            Text(f"{finding.level:<9}", COLOURS[finding.level]), finding.subject.ljust(width), finding.found, sep="", markup=False
        )
        if finding.advice:
            console.print(" " * (9 + width) + "→ " + finding.advice, markup=False)
    problems, warnings = (sum(finding.level == level for finding in found) for level in ("problem", "warning"))
    console.print(f"problems: {problems}, warnings: {warnings}" if problems or warnings else "nothing stands in the way")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The doctor's own words, and those of the command that is asked about."""
    for place, word in enumerate(words):
        value_of_another = place and words[place - 1].startswith("--") and "=" not in words[place - 1] and words[place - 1] != "--json"
        if word in TRAINING and not value_of_another:
            return list(words[:place]), list(words[place:])
    return list(words), []


def asked_about(command: Sequence[str]) -> dict[str, Any]:
    """What of the doctor's own settings a command says."""
    tree = parse(command[1:]).tree if command else {}
    found: dict[str, Any] = {name: str(tree[name]) for name in ("out", "store") if isinstance(tree.get(name), (str, Path))}
    if isinstance(uri := (tree.get("tracking") or {}).get("uri"), str):
        found["tracking.uri"] = uri
    if (device := (tree.get("train") or {}).get("device")) in ("auto", "cpu", "cuda"):
        found["device"] = device
    return {**found, "patients": True} if command[:1] == ["pretrain_mri"] else found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    own, command = split_words(sys.argv[1:] if argv is None else argv)
    words = ["format=json" if word == "--json" else word for word in own]
    return run(
        "doctor",
        DoctorSettings,
        partial(work, command=command),
        description=f"{DESCRIPTION}. {USAGE}",
        defaults=asked_about(command),
        argv=words,
    )


def _tracking(settings: DoctorSettings) -> list[Finding]:
    try:
        from mae_core.tracking import TrackingError, TrackingSettings, tracking_uri
    except ImportError as error:
        return [problem("tracking", f"cannot be looked at: {error}", "install what is missing")]
    try:
        return tracking_findings(tracking_uri(TrackingSettings(uri=settings.tracking.uri), settings.out), os.environ)
    except TrackingError as error:
        return [problem("tracking", str(error), "")]


def _shows_patients(store: str | None) -> bool:
    kind = kind_of({"store": store}) if store is not None else ""
    return bool(kind) and of_patients(str(kind))


if __name__ == "__main__":
    sys.exit(main())
