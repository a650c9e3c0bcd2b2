"""What a machine can do and where its time goes: rates of copies, memory, shares of operators."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from mae_core.speed import Shape, best_time, synchronise

SQUARES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Sizes of the square products by kind of device."""

COPIED_BYTES = 2**28
"""Size of the array that is copied; more than any cache holds."""

GROUPS = {
    "attention": r"scaled_dot_product|flash|fmha|sdpa|softmax",
    "optimiser": r"adam|multi_tensor|_foreach|optimizer|vector_norm|clip",
    "norm": r"layer_?norm",
    "matmul": r"addmm|::b?mm\b|baddbmm|gemm|cutlass|xmma|nvjet|linear|matmul|einsum|convolution|conv\dd",
    "copy": r"copy|::cat\b|CatArray|gather|scatter|index|contiguous|clone|Memcpy|Memset|::to\b|fill|zero|stack|sort|expand|repeat",
    "elementwise": r"::(add|sub|mul|div|gelu|sum|mean|where|square|pow|sqrt|rsqrt|neg|abs|var|std|bitwise|lt|gt|ge|le|eq)"
    r"|::(logical|clamp|remainder|native_dropout|relu|bernoulli|rand)|elementwise|reduce|triton|fused",
}
"""Names of operators (processor) and kernels (GPU) by group; the first that fits. What fits none is `other`."""


def squares(sizes: Sequence[int], device: torch.device) -> dict[str, Shape]:
    """Square products by name; the sizes usual for a kind of device if none are given."""
    return {f"square {size}": (size, size, size) for size in sizes or SQUARES[device.type]}


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * COPIED_BYTES / best_time(copy, device)


def kept_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward pass besides the model's own parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    del value
    return sum(sizes.values())


def state_bytes(model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Bytes of weights and of the optimiser's moments."""
    moments = [value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *moments))


def operator_shares(work: Callable[[], None], calls: int, device: torch.device) -> dict[str, float]:
    """Share of each group of operators in the time of some calls: of kernels on a GPU, of operators on a processor."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            work()
        synchronise(device)
    times = [
        (event.key, float(event.self_device_time_total if cuda else event.self_cpu_time_total))
        for event in profiler.key_averages()
        if str(event.device_type).endswith("CUDA") == cuda
    ]
    return shares_of(times)


def shares_of(times: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Share of each group, the largest first, from names and times."""
    sums = dict.fromkeys((*GROUPS, "other"), 0.0)
    for name, time in times:
        sums[group_of(name)] += time
    whole = sum(sums.values()) or 1.0
    return {group: time / whole for group, time in sorted(sums.items(), key=lambda item: -item[1])}


def group_of(name: str) -> str:
    """Group of an operator or kernel."""
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def description(device: torch.device) -> dict[str, Any]:
    """What was measured on: device, threads, versions, and what sets the speed of matrix products."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fp32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _processor() -> str:
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return str(found.get("cpu_name") or platform.processor() or platform.machine())
