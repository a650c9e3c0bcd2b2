"""Restores a checkpoint into a model that two processes divide, checks every bit, trains on and saves: run under torchrun.

torchrun --nproc-per-node 2 tests/core/divided_saves.py BEFORE AFTER
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

from mae_core.checkpoint import OPTIMISER, WEIGHTS, TrainState, restore, state_tensors
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.parallel import processes
from mae_core.sharding import is_divided, shard, whole
from tests.tiny_states import fresh, go_on, optimiser_for


def main(before: Path, after: Path) -> None:
    """Do it."""
    with processes("cpu") as parallel:
        model = fresh(width=5, seed=3 + parallel.rank).model
        shard(model, replace(parallel, shard=True))
        assert all(is_divided(weight) for weight in model.parameters())
        state = TrainState(model, optimiser_for(model))
        restore(state, before, print)
        for file, tensors in state_tensors(state).items():
            for name, value in load_file(before / f"step-{state.step:08d}" / file).items():
                assert torch.equal(whole(tensors[name]), value), (file, name)
        assert all(is_divided(tensor) for tensor in state_tensors(state)[WEIGHTS].values())
        assert any(is_divided(tensor) for tensor in state_tensors(state)[OPTIMISER].values())
        with CheckpointWriter(after, {}, 9, parallel) as writer:
            for _ in range(2):
                torch.manual_seed(state.step)
                go_on(state)
                writer.save(state)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
