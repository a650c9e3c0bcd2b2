"""Memory that ran out in a step: shapes, and a micro-batch size that might fit, in place of a trace; the weights are left whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mae_core.augment import RawBatch
from mae_core.checkpoint import TrainState
from mae_core.divergence import TrainingError
from mae_core.loader import Stream


class TrainingMemoryError(TrainingError):
    """Memory ran out before the update of a step; the message names shapes and what to set."""


@contextmanager
def within_memory(raw: RawBatch, stream: Stream, state: TrainState) -> Iterator[None]:
    """Around forward and backward pass of a micro-batch.

    Raises:
        TrainingMemoryError: Memory of the device or of this machine ran out. Torch has a class for the first, and words for the second.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        state.optimiser.zero_grad(set_to_none=True)
        raise TrainingMemoryError(words(raw, stream, state.step, str(error))) from error


def words(raw: RawBatch, stream: Stream, done: int, cause: str) -> str:
    """What ran out of memory, and the micro-batch that might not. `done`: updates of the weights."""
    share, size = stream.share, len(raw.scale)
    smaller = [part for part in range(1, size // 2 + 1) if share % part == 0]
    tile, kind = "×".join(map(str, raw.pixels.shape[2:])), str(raw.pixels.dtype).removeprefix("torch.")
    if smaller:
        advice = (
            f"run the same command again with loader.micro_batch_size={smaller[-1]}: it divides the {share} samples of an update that are "
            "a process's share, and leaves the gradient as it is"
        )
    else:
        advice = "not even one sample fits: in a new run, lower crop or take a smaller model.encoder.preset"
    return (
        f"step {done + 1}: memory ran out on {stream.parallel.device.type}, in a micro-batch of {size} samples of {raw.scale.shape[1]} "
        f"channels from tiles of {tile} ({kind}). The weights are whole, those of step {done}, and checkpoints were not touched; {advice}. "
        f"Cause: {(cause.strip() or 'not told').splitlines()[0][:200]}"
    )
