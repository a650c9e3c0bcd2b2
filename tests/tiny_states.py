"""Trainings of a few weights that change with every step, and what can happen to their checkpoints on a disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_core.checkpoint import TrainState
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.parallel import Parallel

ALONE = Parallel(0, 1, torch.device("cpu"))
FILES = ("model.safetensors", "optimiser.safetensors", "state.json", "manifest.json")


def fresh(width: int = 3, seed: int = 0) -> TrainState:
    """A model with a normalised layer and a bias, whose optimiser numbers biases first; nothing was trained."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width), nn.Linear(width, 1))
    return TrainState(model, optimiser_for(model))


def optimiser_for(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that numbers biases first."""
    groups = [[weight for weight in model.parameters() if (weight.ndim > 1) is decays] for decays in (False, True)]
    return torch.optim.AdamW([{"params": group} for group in groups], lr=0.1)


def go_on(state: TrainState, updates: int = 1) -> None:
    """Updates with random data and random noise, so that they depend on weights, optimiser and random state."""
    for _ in range(updates):
        state.model(torch.randn(5, 2)).square().mean().backward()
        state.optimiser.step()
        state.optimiser.zero_grad()
        state.step += 1


def bits(state: TrainState) -> dict[str, Tensor]:
    """All that an update depends on."""
    tensors = {f"weight {name}": tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
    for number, entries in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser {number} {name}": torch.as_tensor(value).clone() for name, value in entries.items()}
    return tensors | {"rng": torch.get_rng_state()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two hold the same bits."""
    return left.keys() == right.keys() and all(left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left)


def save(state: TrainState, folder: Path, settings: Mapping[str, Any] | None = None, keep: int = 9) -> Path:
    """The checkpoint of a state, written and on disk."""
    with CheckpointWriter(folder, settings or {}, keep, ALONE) as writer:
        writer.save(state)
    return folder / f"step-{state.step:08d}"


def three(folder: Path) -> list[Path]:
    """Checkpoints of steps 1, 2 and 3."""
    state = fresh()
    paths = []
    for _ in range(3):
        go_on(state)
        paths.append(save(state, folder))
    return paths


def flip(path: Path) -> None:
    """Another bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)


def cut(path: Path) -> None:
    """The last byte is gone."""
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    """All bytes are gone."""
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "empty": empty, "gone": Path.unlink}
