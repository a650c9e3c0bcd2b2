"""What a checkpoint holds and how a training comes back from it: safetensors and JSON, whole or refused by name. No pickle anywhere."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_core.full_state import names_by_number, optimiser_of, take_optimiser, take_weights, weights_of
from mae_core.sealed import MANIFEST, verify

FORMAT = 2
WEIGHTS, OPTIMISER, RECORD, POINTER = "model.safetensors", "optimiser.safetensors", "state.json", "latest"
RANDOM = "rng/torch"
NAME = re.compile(r"step-(\d{8,})")

Say = Callable[[str], None]


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


class Stored(NamedTuple):
    """What a checkpoint holds: its record, weights by name, and the optimiser's state by `parameter/entry` with torch's random state."""

    record: dict[str, Any]
    weights: dict[str, Tensor]
    optimiser: dict[str, Tensor]


def restore(state: TrainState, folder: Path, say: Say) -> dict[str, Any] | None:
    """Load the newest sound checkpoint into `state`; its record, or None where there is no checkpoint yet.

    It is the one that the pointer names. A damaged checkpoint is named through `say` and the one before it is taken.

    Raises:
        CheckpointError: There are checkpoints and none is sound, or one is of a later format, not to be trusted or of another model.
    """
    for path in _sound(folder, say):
        stored = _migrated(_read(path), state, path, say)
        try:
            take_weights(state.model, stored.weights)
        except RuntimeError as error:
            raise CheckpointError(f"{path} holds another model than the settings describe: {error}") from error
        torch.set_rng_state(stored.optimiser.pop(RANDOM))
        try:
            take_optimiser(state.model, state.optimiser, stored.optimiser)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} holds the state of another optimiser than the settings describe: {error}") from error
        record = stored.record
        state.step, state.run_id = record["step"], record["run_id"]
        state.window = [(loss, norm) for loss, norm in record["window"]]
        state.skipped, state.skipped_in_row = record["skipped"], record["skipped_in_row"]
        return record
    if found := steps(folder):
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is sound; start again with another --out")
    return None


def restore_weights(model: nn.Module, folder: Path, say: Say) -> int:
    """Load the weights of the newest sound checkpoint into a model; the step that they are of.

    Raises:
        CheckpointError: There is no sound checkpoint, or it is of a later format, not to be trusted or of another model.
    """
    for path in _sound(folder, say):
        stored = _read(path)
        try:
            take_weights(model, stored.weights)
        except RuntimeError as error:
            raise CheckpointError(f"{path} holds another model than the settings describe: {error}") from error
        return int(stored.record["step"])
    raise CheckpointError(f"{folder} holds no sound checkpoint, which the decoder is in; give the folder of a run that still has its own")


def peek(folder: Path) -> dict[str, Any] | None:
    """Record of the newest sound checkpoint without loading it."""
    for path in _sound(folder, _silent):
        record: dict[str, Any] = json.loads((path / RECORD).read_text())
        return record
    return None


def steps(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir() and NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step of a finished checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The checkpoint that the pointer names, or None where there is no pointer that can be read."""
    try:
        name = (folder / POINTER).read_text().strip()
    except (OSError, ValueError):
        return None
    return folder / name if NAME.fullmatch(name) else None


def problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    found = verify(path)
    if found:
        return found
    listed = json.loads((path / MANIFEST).read_text())
    missing = [name for name in (WEIGHTS, OPTIMISER, RECORD) if name not in listed]
    return f"{MANIFEST} does not list {', '.join(missing)}" if missing else None


def state_tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Tensors of a training by file and name: weights, and the optimiser's state with torch's random state."""
    optimiser = {RANDOM: torch.get_rng_state(), **optimiser_of(state.model, state.optimiser)}
    return {WEIGHTS: weights_of(state.model), OPTIMISER: optimiser}


def _sound(folder: Path, say: Say) -> Iterator[Path]:
    """Sound checkpoints: the one that the pointer names, those before it, and last those behind it, which were never vouched for.

    Damaged ones are told, and a pointer that is no help.

    Raises:
        CheckpointError: Another user may have altered them.
    """
    found = steps(folder)
    if not found:
        return
    refuse_others([folder])
    latest = newest(folder)
    if latest not in found:
        if (folder / POINTER).exists():
            what = "cannot be read" if latest is None else f"names {latest.name}, which is not there"
            say(f"the pointer {POINTER} {what}; the newest sound checkpoint is taken")
        latest = found[-1]
    until = found.index(latest) + 1
    for path in (*reversed(found[:until]), *reversed(found[until:])):
        refuse_others([path, *path.iterdir()])
        wrong = problem(path)
        if wrong is None:
            yield path
        else:
            say(f"checkpoint {path.name} is damaged ({wrong}); trying the one before it")


def refuse_others(paths: Iterable[Path]) -> None:
    """Refuse what belongs to another user and can be written by more than its owner.

    Raises:
        CheckpointError: It is so.
    """
    for path in paths:
        found = path.stat()
        if found.st_uid != os.geteuid() and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CheckpointError(
                f"{path} belongs to another user (uid {found.st_uid}) and more than its owner may write to it, so what it holds cannot "
                "be trusted; make a copy of your own, or have its owner run chmod -R go-w on it"
            )


def _read(path: Path) -> Stored:
    """What a sound checkpoint of a known format holds.

    Raises:
        CheckpointError: It is of a format of later versions.
    """
    from safetensors.torch import load_file

    record: dict[str, Any] = json.loads((path / RECORD).read_text())
    if record.get("format", 1) > FORMAT:
        wrote = record.get("versions", {}).get("terravox", "(not known)")
        raise CheckpointError(
            f"{path} is of format {record['format']}, written by terravox {wrote}; this terravox reads formats 1 to {FORMAT}. "
            "Go on with the version that wrote it, or start again with another --out"
        )
    return Stored(record, load_file(path / WEIGHTS), load_file(path / OPTIMISER))


def _migrated(stored: Stored, state: TrainState, path: Path, say: Say) -> Stored:
    """What a checkpoint of an older format says in today's; each step is told."""
    while (was := stored.record.get("format", 1)) < FORMAT:
        migrate = MIGRATIONS[was]
        stored = migrate(stored, state)
        stored.record["format"] = was + 1
        say(f"checkpoint {path.name} is of format {was}; migration {migrate.__name__} brings it to format {was + 1}")
    return stored


def parameters_by_name(stored: Stored, state: TrainState) -> Stored:
    """Format 1 to 2: the optimiser's state stands under names of parameters instead of their numbers."""
    names = names_by_number(state.model, state.optimiser)
    renamed = {}
    for key, value in stored.optimiser.items():
        number, _, entry = key.partition("/")
        if key != RANDOM and int(number) >= len(names):
            raise CheckpointError(f"the checkpoint holds the state of parameter {number} and {len(names)} are trained here")
        renamed[key if key == RANDOM else f"{names[int(number)]}/{entry}"] = value
    return Stored({"window": [], "skipped": 0, "skipped_in_row": 0, **stored.record}, stored.weights, renamed)


MIGRATIONS: dict[int, Callable[[Stored, TrainState], Stored]] = {1: parameters_by_name}
"""By the format that each begins with."""


def _silent(_: str) -> None:
    """Say nothing: nothing is loaded."""
