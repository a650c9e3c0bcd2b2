"""Weights in and out of files, and the account of what became of every tensor of both sides. Nothing is unpickled but tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae_core.sealed import advice

Kind = Literal["copied", "permuted", "computed", "interpolated", "folded", "borrowed", "new", "dropped"]
WRAPPERS = ("model", "state_dict")
"""Keys under which a checkpoint may hold its tensors."""
FILES = ("model.safetensors", "pytorch_model.bin")
"""What is looked for where a folder is given, the first that is there."""


class WeightsError(ValueError):
    """Weights cannot be read, are of no layout that is known, or do not fit; the message says what was found and what to do."""


@dataclass(frozen=True)
class Move:
    """What became of a tensor.

    Attributes:
        kind: copied; permuted (the same numbers in another order or stacked); computed (fixed, not a weight); interpolated;
            folded (added to another); borrowed (another band's, or of several); new (initialised); dropped.
        source: Names on the side that it came from; several where they are stacked or added.
        target: Name on the side that it went to; empty where it is in no tensor there.
        note: What the kind does not say.
    """

    kind: Kind
    source: tuple[str, ...]
    target: str = ""
    note: str = ""


@dataclass(frozen=True)
class Transfer:
    """What became of every tensor of a source and where every tensor of a target came from.

    Attributes:
        moves: In the order of the target.
        source: All names of the source.
        target: All names of the target.
    """

    moves: tuple[Move, ...]
    source: tuple[str, ...]
    target: tuple[str, ...]

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows (kind, source, target, number of tensors, note); tensors of all blocks share a row, with `*` for the block."""
        rows: dict[tuple[str, str, str, str], int] = {}
        for move in self.moves:
            source, target = (re.sub(r"\.\d+\.(?=\w+\.)", ".*.", name) for name in (" + ".join(move.source), move.target))
            key = (move.kind, source, target, move.note)
            rows[key] = rows.get(key, 0) + 1
        return [(kind, source, target, str(number), note) for (kind, source, target, note), number in rows.items()]

    def complete(self, allowed: Collection[str] = ()) -> None:
        """Do nothing if both sides are accounted for.

        Args:
            allowed: Names (or globs) of what may be new or dropped.

        Raises:
            WeightsError: A tensor is in no move, or a target in two, or one is new or dropped without leave; all are listed.
        """
        left = [name for move in self.moves for name in move.source]
        came = [move.target for move in self.moves if move.target]
        wrong = [f"{name} of the source is not accounted for" for name in self.source if name not in set(left)]
        wrong += [f"{name} of the target is filled {came.count(name)} times" for name in self.target if came.count(name) != 1]
        wrong += [f"{name} is told of and is not in the source" for name in dict.fromkeys(left) if name not in self.source]
        wrong += [f"{name} is told of and is not in the target" for name in dict.fromkeys(came) if name not in self.target]
        for move in self.moves:
            names = move.source if move.kind == "dropped" else (move.target,) if move.kind == "new" else ()
            wrong += [f"{name} is {move.kind}" for name in names if not any(fnmatchcase(name, pattern) for pattern in allowed)]
        if wrong:
            listed = "".join(f"\n  {line}" for line in wrong)
            raise WeightsError(f"the weights do not move completely; allow by name what may be left out:{listed}")


def weights_file(path: Path) -> Path:
    """The file of weights that a path means: itself, or the one in a folder.

    Raises:
        WeightsError: There is none.
    """
    file = next((path / name for name in FILES if (path / name).is_file()), path)
    if not file.is_file():
        raise WeightsError(f"{path} holds no weights; give a file, or a folder with {' or '.join(FILES)}")
    return file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file, of a file of `torch.save`, or of a folder that holds one, on the CPU.

    Nothing is unpickled but tensors and plain containers (`weights_only`).

    Raises:
        WeightsError: There is no such file, it cannot be read, it needs more than that, or it holds no tensor by name.
    """
    file = weights_file(path)
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # which errors a foreign file raises is documented nowhere
        if "Unsupported" not in str(error):
            raise WeightsError(f"{file} cannot be read as weights ({type(error).__name__}); is it a whole checkpoint?") from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise WeightsError(
            f"{file} holds pickled objects beside tensors{f' ({named[1]})' if named else ''}, which can run code when they are loaded; "
            "where you trust it, load it there and save its tensors alone with safetensors.torch.save_file"
        ) from error
    inner = next((found[key] for key in WRAPPERS if isinstance(found, dict) and isinstance(found.get(key), dict)), found)
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)} if isinstance(inner, dict) else {}
    if not tensors:
        raise WeightsError(f"{file} holds no tensors by name, neither at the top nor under {' or '.join(WRAPPERS)}")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a `.safetensors` file, whole or not at all.

    Raises:
        WeightsError: The disk is full or not writable.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside, dict(facts))
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise WeightsError(f"{path} could not be written: {error}; {advice(error)} and run again") from error
