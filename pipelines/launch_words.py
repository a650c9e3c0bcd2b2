"""Who speaks among several processes, and a line on how many they are and what an update is made of."""

from __future__ import annotations

from collections.abc import Callable

from mae_core.loader import Stream
from mae_core.optim import OptimSettings, learning_rate
from mae_core.parallel import Parallel
from pipelines.progress import console


def voice(parallel: Parallel) -> Callable[[str], None]:
    """Prints on the console in the first process; in the others nothing."""
    return console.print if parallel.is_first else _nothing


def tell_launch(stream: Stream, optim: OptimSettings, say: Callable[[str], None]) -> None:
    """Say how many processes there are, how the batch of an update is divided among them and which learning rate follows from it."""
    parallel, batch = stream.parallel, stream.settings.global_batch_size
    micro, turns = stream.share // stream.micro_batches, stream.micro_batches
    many = "1 process" if parallel.world == 1 else f"{parallel.world} processes"
    held = "divided among them (FSDP2)" if parallel.shard else "whole on each (DDP)"
    model = f", the model {held}" if parallel.world > 1 else ""
    say(
        f"{many} on {parallel.device.type}{model}; an update from {batch} samples = {many} · {micro} at once · {turns} in turn; "
        f"lr {learning_rate(optim, batch):.2e} = {optim.base_lr:g} · {batch} / 256"
    )


def _nothing(_: object) -> None:
    """Say nothing: this is not the first process."""
