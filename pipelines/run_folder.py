"""The folder of a run: which settings it was begun with, whether it is finished, and what it gave."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from mae_core.export import Description, ModelError
from mae_core.parallel import Parallel
from mae_core.sealed import write_flushed
from mae_core.settings import differences, to_plain
from mae_core.tracking import Registered, TrackingError, TrackingSettings, fetch_model, tracking_uri
from modalities.catalogue import ReaderSettings
from modalities.patients import of_patients
from pipelines.lease import hold
from pipelines.progress import console
from pipelines.withheld import SOURCES

CONFIG, RESULT, RUN = "config.json", "result.json", "run.json"
PATHS = ("data", "labels", "out", "store", "encoder", "model", "crosswalk")
LIBRARIES = ("terravox", "torch", "numpy", "zarr", "rasterio", "nibabel", "monai", "mlflow")


class RunError(RuntimeError):
    """A run folder cannot be used as asked; the message says why and what to do."""


def begin(out: Path, verb: str, config: Mapping[str, Any], may_differ: Collection[str]) -> dict[str, Any] | None:
    """Claim a folder for a run, or go on in it; the result where the run is already finished.

    Args:
        out: New, empty, or the folder of a run of the same verb and settings.
        verb: What is run.
        config: Resolved settings.
        may_differ: Dotted keys that a continued run may change.

    Raises:
        RunError: The folder holds something else, or a run with other settings; the message lists them.
    """
    try:
        if out.is_file():
            raise RunError(f"--out {out} is a file; give the name of a folder")
        out.mkdir(parents=True, exist_ok=True)
        before = _read(out / CONFIG)
        if before is None:
            strangers = [path.name for path in out.iterdir() if not path.name.endswith(".tmp")]
            if strangers:
                raise RunError(f"--out {out} is not empty and holds no run ({', '.join(sorted(strangers)[:3])}); choose another folder")
            write_json(out / CONFIG, {"verb": verb, "settings": dict(config)})
            return None
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror}; choose another folder") from error
    if before["verb"] != verb:
        raise RunError(f"--out {out} holds a run of {before['verb']}, not of {verb}; choose another folder")
    other = differences(before["settings"], config, may_differ)
    if other:
        lines = "".join(f"\n  {line}" for line in other)
        raise RunError(f"--out {out} holds a run with other settings; choose another folder, or give the old settings again:{lines}")
    return _read(out / RESULT)


@dataclass(frozen=True)
class Claim:
    """How a run is begun.

    Attributes:
        verb: What is run.
        config: Resolved settings.
        may_differ: Dotted keys that a continued run may change.
        take_over: Whether it may be taken from a job that still works on it.
    """

    verb: str
    config: Mapping[str, Any]
    may_differ: Collection[str]
    take_over: bool = False


@contextmanager
def claimed(out: Path, claim: Claim, parallel: Parallel) -> Iterator[dict[str, Any] | None]:
    """A folder for a run of this job alone, while the context lasts: None, or the result where the run is already finished.

    The result is empty on all processes but the first, which is the one that holds the folder.

    Raises:
        RunError: As `begin`.
        LeaseError: Another job works on the run.
    """
    with ExitStack() as stack:
        done = lease = None
        if parallel.is_first:
            done = begin(out, claim.verb, claim.config, claim.may_differ)
            if done is None:
                try:
                    lease = stack.enter_context(hold(out, console.print, take_over=claim.take_over))
                except OSError as error:
                    raise RunError(f"--out {out} cannot be written: {error.strerror}; choose another folder") from error
                done = begin(out, claim.verb, claim.config, claim.may_differ)  # as the job that held it last has left it
        yield (done or {}) if parallel.any(done is not None) else None
        if lease is not None:
            lease.finished = (out / RESULT).is_file()


def finish(out: Path, verb: str, config: Mapping[str, Any], facts: Mapping[str, Any], name: str = RESULT) -> dict[str, Any]:
    """Write `result.json`: figures and digests with the settings and versions that gave them."""
    result = {
        "verb": verb,
        **facts,
        "config": dict(config),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "commit": code_commit(Path(__file__).resolve().parents[1]),
        "hardware": _hardware(),
    }
    write_json(out / name, result)
    return result


def code_commit(checkout: Path) -> str:
    """The git commit of a checkout, with `-dirty` behind it where files differ from it; empty where there is no checkout or no git."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603  words of ours
    except OSError:
        return ""


def _hardware() -> dict[str, Any]:
    """What the run was made on, without the machine's name; GPUs where torch was used."""
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if torch is not None else []
    return {"processor": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}


def model_folder(name: str, tracking: TrackingSettings, out: Path) -> tuple[Path, Registered | None]:
    """Model folder of a run or of a registered version.

    Raises:
        RunError: `name` is neither.
    """
    if name.startswith("models:/"):
        uri = tracking_uri(tracking, out)
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():  # asking MLflow would make it
            raise RunError(f"{name}: there is no registry at {uri}; set tracking.uri to where it was registered")
        return fetch_model(name, tracking, out)
    run_folder = Path(name)
    if not run_folder.is_dir():
        raise RunError(f"{name} is neither the folder of a run nor models:/NAME@ALIAS")
    result = recall(run_folder)
    uri = str(result.get("mlflow", {}).get("model", ""))
    version = None
    if uri:
        _, registered, number = uri.split("/")
        version = Registered(registered, int(number), str(result["mlflow"].get("model_id", "")))
    return run_folder / "model", version


def reader_of(about: Description, changes: Mapping[str, Any]) -> ReaderSettings:
    """The adapter's settings that a model was trained with, and what the user changes in them, at any depth; another `kind` begins anew.

    Raises:
        RunError: A change does not fit the adapter.
    """
    own = about.reader.get("kind", about.modality)
    kind = changes.get("kind", own)
    trained_with = about.reader if kind == own else {}
    try:
        return TypeAdapter[ReaderSettings](ReaderSettings).validate_python(_changed(trained_with, changes))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, entry['loc'][1:])) or 'kind'}: {entry['msg']}" for entry in error.errors())
        raise RunError(f"reader={dict(changes)} does not fit the adapter {kind}: {wrong}") from error


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(settings)
    for key, value in changes.items():
        before = changed.get(key)
        changed[key] = _changed(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return changed


def model_problems(name: str, tracking: TrackingSettings, out: Path, load: Callable[[Path], object]) -> list[str]:
    """What keeps a model from being loaded, for `--check`."""
    try:
        load(model_folder(name, tracking, out)[0])
    except (RunError, ModelError, TrackingError) as error:
        return [str(error)]
    return []


def recorded(settings: BaseModel, kind: str | None = None) -> dict[str, Any]:
    """Settings as they are kept with a run: of patients without places in the archive, and without patterns of files' names.

    Args:
        settings: Of a verb.
        kind: Of the files that it reads; None where it is not known, which counts as patients.
    """
    plain = _without_split_file(to_plain(settings))
    if kind is not None and not of_patients(kind):
        return {name: value for name, value in plain.items() if name != "crosswalk"}
    kept = {name: value for name, value in plain.items() if name not in SOURCES}
    if isinstance(kept.get("reader"), Mapping):
        kept["reader"] = without_patterns(kept["reader"])
    return kept


def public(settings: BaseModel, kind: str | None = None) -> dict[str, Any]:
    """What of `recorded` may be told to a tracker."""
    return without_paths({name: value for name, value in recorded(settings, kind).items() if name not in PATHS})


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without paths of the user's at any depth, since a folder can be named after a patient; models of the registry stay."""

    def stays(name: str, value: object) -> bool:
        return name not in (*PATHS, "uri") or not isinstance(value, str) or value.startswith("models:/")

    return {name: without_paths(value) if isinstance(value, Mapping) else value for name, value in settings.items() if stays(name, value)}


def _without_split_file(plain: dict[str, Any]) -> dict[str, Any]:
    """Settings without where a frozen split lies; what it says is told by its digest."""
    prepare = plain.get("prepare")
    if not isinstance(prepare, Mapping) or "split" not in prepare:
        return plain
    return {**plain, "prepare": {**prepare, "split": {**prepare["split"], "file": None}}}


def without_patterns(reader: Mapping[str, Any]) -> dict[str, Any]:
    """A reader's settings as JSON, without patterns of files to leave out: such a pattern can name a patient."""
    return {name: value for name, value in reader.items() if name != "exclude"}


def recall(folder: Path, name: str = RESULT) -> dict[str, Any]:
    """What a JSON file of a run folder holds; empty where it is missing."""
    return _read(folder / name) or {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all, even where the machine fails."""
    aside = path.with_name(path.name + ".tmp")
    write_flushed(aside, [(json.dumps(content, indent=1, default=str) + "\n").encode()])
    aside.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); choose another --out") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (it holds no JSON object); choose another --out")
    return content
