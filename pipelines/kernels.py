"""What computes attention in a training: checked before the first step, and on a GPU the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mae_core.attention import AttentionShape, choose_kernels, pinned, product_dtype
from mae_core.parallel import Parallel
from mae_core.train import autocast


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
    with autocast(precision, parallel.device):
        dtype = product_dtype(parallel.device)
    seconds = choose_kernels(shapes, parallel.device, dtype, batch, parallel.sum)
    if seconds:
        times = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in seconds.items())
        say(f"attention by the first of these kernels that can do what is asked: {times}")
    with pinned(tuple(seconds)):
        yield list(seconds)
