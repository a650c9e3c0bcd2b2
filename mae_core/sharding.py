"""A model divided among processes (FSDP2), and brought together again for evaluation, checkpoints and export.

Outside of the model: nothing in it knows of this file. Where nothing is divided, every function here does what one process needs.
Weights travel and are summed in the precision that they are kept in; autocast is left to the loop.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.parallel import Parallel

M = TypeVar("M", bound=nn.Module)


def shard(model: nn.Module, parallel: Parallel) -> None:
    """Divide a model in place where `parallel.shard` asks for it: block by block of encoder and decoder, then the rest.

    It must hold the same weights on every process, and the optimiser is made afterwards.
    """
    if not parallel.shard:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Its warning holds for whoever changes such an output in place; the loop and the tasks change none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(parallel.device.type, (parallel.world,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_divided(item: object) -> bool:
    """Whether a model or a tensor is divided among processes."""
    fsdp, tensor = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch.distributed.tensor")
    return (fsdp is not None and isinstance(item, fsdp.FSDPModule)) or (tensor is not None and isinstance(item, tensor.DTensor))


@contextmanager
def reduced(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward pass: gradients travel between processes only with the last micro-batch of an update."""
    if is_divided(model):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each tensor that this process holds: a view, to be changed in place."""
    return [tensor.to_local() if is_divided(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def clip_norm(weights: Iterable[Tensor], most: float) -> Tensor:
    """Norm of all gradients together, which are scaled down to at most `most`; the same on every process."""
    norm = nn.utils.clip_grad_norm_(weights, most)
    return whole(norm)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; every process must ask."""
    full: Tensor = tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]
    return full


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights, so that a forward pass waits for nobody, however many each of them makes.

    Held-out tiles are shared out unevenly, and the first process looks at some for itself. Holding the weights once more during an
    evaluation costs a quarter of what weights, gradients and AdamW's two moments take undivided.
    """
    _same_buffers(model)
    parts = [part for part in model.modules() if is_divided(part)] if is_divided(model) else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
        part.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        for part in parts:
            part.reshard()  # type: ignore[operator]
            part.set_reshard_after_forward(part is not model, recurse=False)  # type: ignore[operator]


def gathered(model: M, build: Callable[[], M]) -> M:
    """The model with all weights on every process; itself where it is not divided, else another that `build` gives. A collective."""
    _same_buffers(model)
    if not is_divided(model):
        return model
    other = build()
    other.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    return other


def _same_buffers(model: nn.Module) -> None:
    """Give every process the first one's running statistics, which are those that a checkpoint holds."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Members of the lists of modules in encoder and decoder, none inside another."""
    found: list[nn.Module] = []
    for part in ("encoder", "decoder"):
        inner = getattr(model, part, None)
        lists = [] if inner is None else [item for item in inner.modules() if isinstance(item, nn.ModuleList)]
        members = [member for group in lists for member in group if not isinstance(member, nn.ModuleList)]
        inside = {id(deep) for member in members for deep in member.modules() if deep is not member}
        found += [member for member in members if id(member) not in inside and any(True for _ in member.parameters())]
    return found
