"""Checkpoints that are whole or absent: written aside, flushed, checksummed, renamed. No pickle anywhere."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or does not belong to this run; the message names file and cause."""


@dataclass
class TrainState:
    """Everything that a run needs to go on bit for bit. The state of the data is the one integer `step`.

    Attributes:
        model: Holds the weights.
        optimiser: AdamW.
        step: Updates done.
        run_id: Of the tracked run, so that a resumed job continues it.
        window: Loss and gradient norm of the steps that no report has covered yet, without skipped ones.
        skipped: Steps that made no update, since their loss or gradient was not finite.
        skipped_in_row: The last so many of them came one after another.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    step: int = 0
    run_id: str | None = None
    window: list[tuple[float, float]] = field(default_factory=list)
    skipped: int = 0
    skipped_in_row: int = 0


def save(state: TrainState, folder: Path, settings: Mapping[str, Any], keep: int) -> Path:
    """Write `folder/step-NNNNNNNN`, then drop all but the newest `keep` checkpoints.

    Raises:
        CheckpointError: The disk is full or not writable; earlier checkpoints are intact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = folder / f"step-{state.step:08d}"
    aside = folder / f"step-{state.step:08d}.tmp"
    try:
        for leftover in folder.glob("step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(_weights(state.model), aside / "model.safetensors")
        save_file(_optimiser_tensors(state), aside / "optimiser.safetensors")
        record = {
            "step": state.step,
            "run_id": state.run_id,
            "window": state.window,
            "skipped": state.skipped,
            "skipped_in_row": state.skipped_in_row,
            "settings": dict(settings),
            "torch": torch.__version__,
        }
        (aside / "state.json").write_text(json.dumps(record, indent=1, sort_keys=True))
        seal(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {state.step} could not be written to {folder}: {error}; "
            f"earlier checkpoints are intact, {advice(error)} and run again"
        ) from error
    found = steps(folder)
    count = found.index(final) + 1
    for old in (*found[: max(0, count - keep)], *found[count:]):  # later ones are damaged: the run went on from before them
        shutil.rmtree(old)
    return final


def restore(state: TrainState, folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest sound checkpoint into `state`; its record, or None where there is no checkpoint yet.

    A damaged checkpoint is named through `say` and the one before it is taken.

    Raises:
        CheckpointError: There are checkpoints and none is sound, or one does not fit the model.
    """
    from safetensors.torch import load_file

    found = steps(folder)
    for path in reversed(found):
        problem = verify(path)
        if problem:
            say(f"checkpoint {path.name} is damaged ({problem}); trying the one before it")
            continue
        record: dict[str, Any] = json.loads((path / "state.json").read_text())
        _load_weights(state.model, load_file(path / "model.safetensors"), path)
        _load_optimiser(state, load_file(path / "optimiser.safetensors"))
        state.step, state.run_id = record["step"], record["run_id"]
        state.window = [(loss, norm) for loss, norm in record.get("window", [])]
        state.skipped, state.skipped_in_row = record.get("skipped", 0), record.get("skipped_in_row", 0)
        return record
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is sound; start again with another --out")
    return None


def restore_weights(model: nn.Module, folder: Path, say: Callable[[str], None]) -> int:
    """Load the weights of the newest sound checkpoint into a model; the step that they are of.

    Raises:
        CheckpointError: There is no sound checkpoint, or it does not fit the model.
    """
    from safetensors.torch import load_file

    for path in reversed(steps(folder)):
        problem = verify(path)
        if not problem:
            _load_weights(model, load_file(path / "model.safetensors"), path)
            return int(json.loads((path / "state.json").read_text())["step"])
        say(f"checkpoint {path.name} is damaged ({problem}); trying the one before it")
    raise CheckpointError(f"{folder} holds no sound checkpoint, which the decoder is in; give the folder of a run that still has its own")


def peek(folder: Path) -> dict[str, Any] | None:
    """Record of the newest sound checkpoint without loading it."""
    for path in reversed(steps(folder)):
        if not verify(path):
            record: dict[str, Any] = json.loads((path / "state.json").read_text())
            return record
    return None


def steps(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".tmp")


def seal(folder: Path) -> None:
    """Write the manifest of a folder (name, bytes, SHA-256 of each file) and flush everything to disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True))
    for path in (*files, folder / MANIFEST):
        shutil.copymode(folder / MANIFEST, path)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)


def verify(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        if not entries:
            return f"{MANIFEST} lists nothing"
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written"
            if sha256(path) != entry["sha256"]:
                return f"{name} fails its SHA-256"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def advice(error: Exception) -> str:
    """What to do about an error of writing. Safetensors tells the number of a system error in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    is_full = getattr(error, "errno", None) in full or any(f"os error {code})" in str(error) for code in full)
    return "free some space" if is_full else "check the folder"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _load_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds another model than the settings describe: {error}") from error


def _optimiser_tensors(state: TrainState) -> dict[str, Tensor]:
    """The optimiser's state by number of the parameter, and torch's random state."""
    tensors = {"rng/torch": torch.get_rng_state()}
    for number, entries in state.optimiser.state_dict()["state"].items():
        for name, value in entries.items():
            tensors[f"{number}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _load_optimiser(state: TrainState, tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors.pop("rng/torch"))
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/")
        entries.setdefault(int(number), {})[name] = value
    plain = state.optimiser.state_dict()
    plain["state"] = entries
    state.optimiser.load_state_dict(plain)
