"""Attention among tokens: the one call that every block makes, its check against the formula, and the choice of a kernel."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}
"""Torch's kernels by the names that are told."""

FP32_ROUNDINGS, SHORT_ROUNDINGS = 512, 8
"""How many roundings of its type an element may be off, in shares of the largest. On a processor 32 were seen in fp32, where sums are
rounded too (1729 tokens), and 3 in bf16 and fp16, whose sums are kept in fp32."""

CHECKED_SCORES = {"cpu": 2**18, "cuda": 2**26}
"""Most scores of a sample that is checked, by kind of device; where the model has more, fewer heads are looked at."""

TIMED_SCORES = 2**27
"""Most scores of a call that is timed, so that the kernel that keeps them all fits into memory."""

Attend = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]


class AttentionError(RuntimeError):
    """A kernel does not compute attention; the message says which, where, and by how much it is off."""


@dataclass(frozen=True)
class AttentionShape:
    """One kind of attention in a model.

    Attributes:
        part: Of the model, such as `encoder`.
        heads: Number of heads.
        head_width: Width of each.
        queries: Tokens that look.
        keys: Tokens that are looked at.
    """

    part: str
    heads: int
    head_width: int
    queries: int
    keys: int

    def __str__(self) -> str:
        return f"{self.part}, {self.heads} heads of {self.head_width}, {self.queries} queries on {self.keys} keys"


def attend(
    query: Float[Tensor, "batch query width"],
    key: Float[Tensor, "batch key width"],
    value: Float[Tensor, "batch key width"],
    heads: int,
    used: Bool[Tensor, "batch key"] | None,
) -> Float[Tensor, "batch query width"]:
    """Multi-head attention through torch's fused kernel; keys that are not `used` are seen by no query.

    In a sample without any used key the result is not a number: see `attended`.
    """
    query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=None if used is None else used[:, None, None, :])
    return mixed.transpose(1, 2).flatten(2)


def written_out(query: Tensor, key: Tensor, value: Tensor, heads: int, used: Tensor | None) -> Tensor:
    """What `attend` gives, by its formula (Vaswani et al. 2017, section 3.2) in the dtype of the arguments."""
    query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    if used is not None:
        scores = scores.masked_fill(~used[:, None, None, :], -math.inf)
    return (scores.softmax(dim=3) @ value).transpose(1, 2).flatten(2)


def attended(used: Bool[Tensor, "batch token"], num_prefix: int) -> Bool[Tensor, "batch prefix_and_token"]:
    """The tokens that may be looked at, behind a prefix that always may; all where there is none, since nothing gives no mean."""
    if num_prefix:
        return F.pad(used, (num_prefix, 0), value=True)
    return used | ~used.any(dim=1, keepdim=True)


def check_heads(width: int, heads: int) -> None:
    """Refuse a width that heads do not divide.

    Raises:
        ValueError: They do not.
    """
    if width % heads:
        raise ValueError(f"width {width} cannot be divided among {heads} heads")


def product_dtype(device: torch.device) -> torch.dtype:
    """What matrices are multiplied in here and now: autocast's dtype, or fp32 where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def allowed_error(dtype: torch.dtype) -> float:
    """Largest error of an element, over the largest element, that comes from rounding."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return FP32_ROUNDINGS * torch.finfo(dtype).eps
    return SHORT_ROUNDINGS * torch.finfo(torch.bfloat16 if dtype == torch.float32 else dtype).eps


def check_attention(shape: AttentionShape, device: torch.device, dtype: torch.dtype, *, excluding: bool, call: Attend = attend) -> None:
    """Compare the kernel in use with the formula in fp32: two samples of noise, the result and all gradients.

    Kernels have been wrong for some lengths, masks and devices only (PyTorch issue 196678), so it is the model's own shape that counts.

    Args:
        shape: Of the model.
        device: Where it is trained.
        dtype: What it is trained in.
        excluding: Leave out a quarter of the keys, as where tokens are missing.
        call: What is checked.

    Raises:
        AttentionError: An element is off by more than `allowed_error`, or not a number.
    """
    most = CHECKED_SCORES[device.type] // (shape.queries * shape.keys)
    shape = replace(shape, heads=max(1, min(shape.heads, most)))
    generator, width = torch.Generator().manual_seed(0), shape.heads * shape.head_width
    # Queries, keys and values lie side by side in memory, as they come out of one linear layer.
    packed = torch.randn(2, max(shape.queries, shape.keys), 3 * width, generator=generator).to(device, dtype)
    slope = torch.randn(2, shape.queries, width, generator=generator).to(device, dtype)
    used = None
    if excluding:
        used = torch.rand(2, shape.keys, generator=generator) < 0.75
        used[:, 0] = True
        used = used.to(device)

    def outcome(function: Attend, kind: torch.dtype) -> list[Tensor]:
        query, key, value = (part.detach().to(kind).requires_grad_() for part in packed.chunk(3, dim=2))
        out = function(query[:, : shape.queries], key[:, : shape.keys], value[:, : shape.keys], shape.heads, used)
        out.backward(slope.to(kind))
        return [out.detach(), *(torch.zeros_like(part) if part.grad is None else part.grad for part in (query, key, value))]

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        found, wanted = outcome(call, dtype), outcome(written_out, torch.float32)
    allowed = allowed_error(dtype)
    # One key alone gives queries and keys no gradient, so the three are measured by the largest of them.
    scales = [float(part.abs().max()) for part in wanted]
    scales[1:] = [max(scales[1:])] * 3
    names = ("result", "gradient of queries", "gradient of keys", "gradient of values")
    for name, part, true, scale in zip(names, found, wanted, scales, strict=True):
        error = float((part.float() - true).abs().max()) / scale
        if not error <= allowed:
            raise AttentionError(
                f"attention is wrong on {_spoken(device)} in {str(dtype).removeprefix('torch.')} with {'some' if excluding else 'no'} "
                f"keys left out ({shape}, 2 samples): {name} is off by {error:.2g} of the largest element, allowed {allowed:.2g}; "
                "take another version of torch, or another train.precision"
            )


def kernel_seconds(
    name: str, shapes: Sequence[AttentionShape], device: torch.device, dtype: torch.dtype, batch: int, clock: Callable[..., float]
) -> float:
    """Time that a kernel takes for one forward and backward call of each shape; infinite if it is not there or is wrong.

    A kernel that cannot leave out keys may still serve where all are used: torch then takes the next one that can.
    """
    with pinned((name,)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says why a kernel is not there
        try:
            for shape in shapes:
                check_attention(shape, device, dtype, excluding=False)
            for shape in shapes:
                try:
                    check_attention(shape, device, dtype, excluding=True)
                except AttentionError:
                    raise
                except RuntimeError:
                    continue
            return sum(clock(_call(shape, device, dtype, batch), device) for shape in shapes)
        except RuntimeError:
            return math.inf


def choose_kernels(
    shapes: Sequence[AttentionShape],
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> dict[str, float]:
    """Seconds of the kernels that may be used, the fastest first, once they have been checked.

    Empty on a processor, where torch's own choice is checked and nothing is timed.

    Args:
        shapes: Of the model.
        device: Where it is trained.
        dtype: What it is trained in.
        batch: Samples of a call that is timed.
        total: Sums over processes, so that all choose the same.

    Raises:
        AttentionError: What is to be used is wrong.
    """
    if device.type != "cuda" or not shapes:
        for shape in shapes:
            for excluding in (False, True):
                check_attention(shape, device, dtype, excluding=excluding)
        return {}
    names = candidates()
    seconds = torch.tensor([kernel_seconds(name, shapes, device, dtype, batch, best_seconds) for name in names], device=device)
    return fastest_first(dict(zip(names, total(seconds).tolist(), strict=True)), device, dtype)


def candidates() -> tuple[str, ...]:
    """Kernels to choose from: all of them, or the plain one where torch is told to be deterministic."""
    return ("plain",) if torch.are_deterministic_algorithms_enabled() else tuple(KERNELS)


def fastest_first(seconds: Mapping[str, float], device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The kernels that have a time, the fastest first.

    Raises:
        AttentionError: None has.
    """
    found = {name: value for name, value in sorted(seconds.items(), key=lambda item: item[1]) if math.isfinite(value)}
    if not found:
        raise AttentionError(
            f"no kernel of {', '.join(seconds)} computes attention on {_spoken(device)} in {str(dtype).removeprefix('torch.')}; "
            "take another version of torch, or another train.precision"
        )
    return found


@contextmanager
def pinned(kernels: Sequence[str]) -> Iterator[None]:
    """Torch takes the first of these kernels that can do what is asked of it, and no other; its own choice where none is given."""
    if not kernels:
        yield
        return
    with sdpa_kernel([KERNELS[name] for name in kernels], set_priority=True):
        yield


def best_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Shortest of some times of a call on a GPU, after one that is not counted."""
    times = []
    for _ in range(6):
        torch.cuda.synchronize(device)
        began = perf_counter()
        work()
        torch.cuda.synchronize(device)
        times.append(perf_counter() - began)
    return min(times[1:])


def _call(shape: AttentionShape, device: torch.device, dtype: torch.dtype, batch: int) -> Callable[[], None]:
    """A forward and backward call of a shape on noise."""
    size = max(1, min(batch, TIMED_SCORES // (shape.heads * shape.queries * shape.keys)))
    width = shape.heads * shape.head_width
    query = torch.randn(size, shape.queries, width, device=device, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(size, shape.keys, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))

    def work() -> None:
        with torch.autocast(device.type, enabled=False):
            attend(query, key, value, shape.heads, None).backward(query.detach())

    return work


def _spoken(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
