"""How long a training kept which devices busy, over all of its attempts, as far as they lived to write it down."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from mae_core.parallel import Parallel
from pipelines.run_folder import RunError, recall, write_json

COMPUTE = "compute.json"
"""In the folder of a training: an entry for each attempt at it."""


class ComputeTime:
    """Writes down how long this attempt has lasted, whenever it is asked to; an attempt that is killed keeps what it last wrote."""

    def __init__(self, folder: Path, parallel: Parallel) -> None:
        self._folder = folder
        self._lock = Lock()
        self._began = time.monotonic()
        self._earlier = _attempts(folder)
        is_gpu = parallel.device.type == "cuda"
        name = torch.cuda.get_device_name(parallel.device) if is_gpu else "CPU"
        self._about = {"device": name, "is_gpu": is_gpu, "count": parallel.world * (1 if is_gpu else torch.get_num_threads())}

    def note(self, _: object = None) -> None:
        """Write it down, if the disk takes it: a training does not end for that."""
        with self._lock, suppress(OSError):
            now = {**self._about, "seconds": round(time.monotonic() - self._began, 3)}
            write_json(self._folder / COMPUTE, {"attempts": [*self._earlier, now]})


def compute_of(*folders: Path) -> dict[str, Any]:
    """What the trainings in some folders have used, for `result.json`: device-hours, which of a CPU are hours of threads."""
    attempts: list[Mapping[str, Any]] = [item for folder in folders for item in _attempts(folder)]

    def hours(*, is_gpu: bool) -> float:
        seconds = sum(float(item["seconds"]) * int(item["count"]) for item in attempts if item["is_gpu"] is is_gpu)
        return round(seconds / 3600, 6)

    return {
        "gpu_hours": hours(is_gpu=True),
        "cpu_thread_hours": hours(is_gpu=False),
        "hours": round(sum(item["seconds"] for item in attempts) / 3600, 6),
        "attempts": len(attempts),
        "devices": sorted({f"{item['count']} × {item['device']}" for item in attempts}),
    }


def compute_words(found: Mapping[str, Any]) -> str:
    """The same in a line."""
    kinds = {"gpu_hours": "GPU-hours", "cpu_thread_hours": "hours of CPU threads"}
    used = " and ".join(f"{found[key]:.3g} {unit}" for key, unit in kinds.items() if found[key])
    attempts = f"{found['attempts']} attempt{'' if found['attempts'] == 1 else 's'}"
    return f"{used} on {', '.join(found['devices'])}, in {attempts}" if used else "not recorded"


def _attempts(folder: Path) -> list[dict[str, Any]]:
    """Those that are written down; none where the file is damaged, since no training is worth less for that."""
    try:
        return list(recall(folder, COMPUTE).get("attempts", []))
    except RunError:
        return []
