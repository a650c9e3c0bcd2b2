"""How fast a training goes and what it needs: samples, tokens, share of the matrix product's rate, waiting, memory."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Self

import torch
from torch import Tensor, nn

from mae_core.flops import Work
from mae_core.parallel import Parallel

Shape = tuple[int, int, int]
"""Rows, inner length and columns of a matrix product."""

SHORTEST_S = 0.02
"""Products are repeated until this long has passed, so that the clock and the launch do not count."""

PROBED_SIZE = {"cpu": 1024, "cuda": 4096}
"""Size of the square product whose rate a training is compared with, by kind of device.

On a processor 512 to 2048 gave the same rate within 10 % (91 GFLOP/s on one core of an AMD EPYC), 1024 in 0.2 s; many
cores want more than 512. On a GPU it fills the multiprocessors and takes 200 MB that are given back before the first step.
"""

GIB = 2**30


class Speedometer:
    """Rates over the updates since the last look; what happens in `paused` is in none of them.

    The share of the matrix product's rate (`speed/mfu`) is operations of the model, without any that are computed twice to
    save memory, over the time and over what a square product reached on the same devices at the start of the attempt; or
    over what the model itself has reached, where that is more because other work disturbed the product.

    Args:
        work: What is done with a sample; without its operations there is no share.
        flops_per_second: Of the square product, all processes together.
    """

    def __init__(self, work: Work | None = None, flops_per_second: float = math.nan) -> None:
        self.work = work or Work()
        self.flops_per_second = flops_per_second
        self.start()

    def start(self) -> Self:
        """This; time counts from here."""
        self.waited, self.samples, self.began = 0.0, 0, perf_counter()
        return self

    def add(self, samples: int, waited: float) -> None:
        """Count the samples of an update, of all processes, and the seconds that this one waited for its share."""
        self.samples += samples
        self.waited += waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not counted as training time."""
        began = perf_counter()
        yield
        self.began += perf_counter() - began

    def close(self, parallel: Parallel) -> dict[str, float]:
        """Rates since the last call and memory so far, the same on every process; every process calls it.

        Waiting is of the process that waited longest, since the others wait for it; so is memory of the one that has most.
        """
        seconds = perf_counter() - self.began
        waited, *memory = _worst(parallel, [self.waited / seconds, *memory_gib(parallel.device).values()])
        rate = self.samples / seconds
        found = {"speed/samples_per_second": rate, "speed/data_wait_fraction": waited}
        if self.work.tokens:
            found["speed/tokens_per_second"] = rate * self.work.tokens
        if self.work.flops and self.flops_per_second > 0:
            reached = rate * self.work.flops
            self.flops_per_second = max(self.flops_per_second, reached)  # else the product was measured beside other work
            found["speed/mfu"] = reached / self.flops_per_second
        self.start()
        return found | {f"memory/{name}": value for name, value in zip(memory_gib(parallel.device), memory, strict=True)}


def speedometer(work: Work, dtype: torch.dtype, parallel: Parallel) -> Speedometer:
    """One that compares with the matrix product of the devices in use, measured now; every process calls it.

    Processes measure at once, so that those that share a processor get no more than they do when they train.
    """
    if work.flops is None:
        return Speedometer(work)
    parallel.barrier()
    own = product_rate(parallel.device, dtype, torch.get_num_threads())
    return Speedometer(work, float(parallel.sum(torch.tensor(own, dtype=torch.float64, device=parallel.device))))


@cache
def product_rate(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """Operations per second of a square matrix product; measured once per process, in a fraction of a second."""
    del num_threads  # a part of what the rate is of
    size = PROBED_SIZE[device.type]
    rate = product_rates({"square": (size, size, size)}, dtype, device)["square"]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return rate


def memory_gib(device: torch.device) -> dict[str, float]:
    """Memory by name: largest that this process had and what it has now, and largest on its GPU in tensors and with what torch holds."""
    found = {"process_peak_gib": process_peak_bytes(), "process_gib": process_bytes()}
    if device.type == "cuda":
        found["gpu_peak_gib"] = torch.cuda.max_memory_allocated(device)
        found["gpu_reserved_peak_gib"] = torch.cuda.max_memory_reserved(device)
    return {name: value / GIB for name, value in found.items() if value is not None}


def process_peak_bytes() -> int | None:
    """Largest resident memory that this process has had; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def process_bytes() -> int | None:
    """Resident memory of this process now; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], None], calls: int, device: torch.device) -> float:
    """Seconds per call, from an idle device to an idle device."""
    synchronise(device)
    began = perf_counter()
    for _ in range(calls):
        work()
    synchronise(device)
    return (perf_counter() - began) / calls


def best_time(work: Callable[[], None], device: torch.device, repeats: int = 5) -> float:
    """Shortest of some times per call, after calls that are not counted."""
    work()
    calls = max(1, math.ceil(SHORTEST_S / max(timed(work, 1, device), 1e-9)))
    return min(timed(work, calls, device) for _ in range(repeats))


def product_rates(shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Operations per second of `(rows, inner)` times transposed `(columns, inner)`, as in a linear layer, by name of the shape."""
    rates = {}
    own = torch.Generator(device).manual_seed(0)  # the process's random state stays as it is
    for name, (rows, inner, columns) in shapes.items():
        left = torch.randn(rows, inner, device=device, generator=own).to(dtype)
        weight = torch.randn(columns, inner, device=device, generator=own).to(dtype)

        def product(left: Tensor = left, weight: Tensor = weight) -> None:
            nn.functional.linear(left, weight)

        with torch.inference_mode():
            rates[name] = 2 * rows * inner * columns / best_time(product, device)
    return rates


def _worst(parallel: Parallel, own: list[float]) -> list[float]:
    """Largest of each value over the processes."""
    table = torch.zeros(parallel.world, len(own), dtype=torch.float64, device=parallel.device)
    table[parallel.rank] = torch.tensor(own, dtype=torch.float64)
    return [float(value) for value in parallel.sum(table).amax(dim=0)]
