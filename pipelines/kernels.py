"""What computes attention in a training: checked before the first step, and on a GPU the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from mae_core.attention import AttentionShape, choose_kernels, pinned, product_dtype
from mae_core.parallel import Parallel
from mae_core.train import autocast


def trained_in(precision: str, device: torch.device) -> torch.dtype:
    """What a training of this precision multiplies matrices in."""
    with autocast(precision, device):
        return product_dtype(device)


@contextmanager
def checked_attention(
    shapes: Sequence[AttentionShape], precision: str, batch: int, parallel: Parallel, say: Callable[[str], None]
) -> Iterator[list[str]]:
    """Inside, attention is computed by kernels that agree with the formula: on a GPU these, the fastest first.

    Args:
        shapes: Of the model that is trained.
        precision: It is trained in.
        batch: Samples that go through the model at once.
        parallel: This process.
        say: Is told the choice.

    Raises:
        AttentionError: None computes what it should.
    """
    device = parallel.device
    seconds = choose_kernels(shapes, device, trained_in(precision, device), batch, parallel.sum)
    if seconds:
        times = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in seconds.items())
        say(f"attention by the first of these kernels that can do what is asked: {times}")
    with pinned(tuple(seconds)):
        yield list(seconds)
