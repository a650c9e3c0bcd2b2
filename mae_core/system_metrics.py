"""Use of processor, memory, disk, network and GPUs, under the names that MLflow gives them."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from typing import Any

import psutil

INTERVAL_S = 10.0


class Sampler:
    """Tells the use of the machine every ten seconds, in a thread, for as long as the context lasts.

    Args:
        tell: Called with names and values, and a step that counts on from `first`.
        first: Number of the first sample.
    """

    def __init__(self, tell: Callable[[dict[str, float], int], None], first: int) -> None:
        self._tell, self._step = tell, first
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="system metrics", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(1.0)

    def _loop(self) -> None:
        network = psutil.net_io_counters()
        gpus = _gpus()
        psutil.cpu_percent()
        while not self._over.wait(INTERVAL_S):
            self._tell({f"system/{name}": value for name, value in (sample(network) | gpu_sample(gpus)).items()}, self._step)
            self._step += 1


def sample(network: Any) -> dict[str, float]:
    """Use of the machine now; the processor's since the last call, the network's since `network` was counted."""
    memory, disk, now = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / 1e6,
        "disk_available_megabytes": disk.free / 1e6,
    }
    if now is not None and network is not None:  # a machine without interfaces has no counters
        values["network_receive_megabytes"] = (now.bytes_recv - network.bytes_recv) / 1e6
        values["network_transmit_megabytes"] = (now.bytes_sent - network.bytes_sent) / 1e6
    return {name: round(float(value), 1) for name, value in values.items()}


def _gpus() -> Any:
    """NVIDIA's library where it is installed and finds a GPU, else None."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
    except library.NVMLError:
        return None
    return library


def gpu_sample(library: Any) -> dict[str, float]:
    """Memory, use and power of every GPU; what one does not tell is left out."""
    values: dict[str, float] = {}
    for number in range(library.nvmlDeviceGetCount() if library is not None else 0):
        handle = library.nvmlDeviceGetHandleByIndex(number)
        for read in (_memory, _use, _power):
            try:
                found = read(library, handle)
            except library.NVMLError:
                continue
            values |= {f"gpu_{number}_{name}": round(float(value), 1) for name, value in found.items()}
    return values


def _memory(library: Any, handle: Any) -> dict[str, float]:
    memory = library.nvmlDeviceGetMemoryInfo(handle)
    return {"memory_usage_percentage": memory.used / memory.total * 100, "memory_usage_megabytes": memory.used / 1e6}


def _use(library: Any, handle: Any) -> dict[str, float]:
    return {"utilization_percentage": library.nvmlDeviceGetUtilizationRates(handle).gpu}


def _power(library: Any, handle: Any) -> dict[str, float]:
    used, most = library.nvmlDeviceGetPowerUsage(handle), library.nvmlDeviceGetEnforcedPowerLimit(handle)
    return {"power_usage_watts": used / 1000, "power_usage_percentage": used / most * 100}
