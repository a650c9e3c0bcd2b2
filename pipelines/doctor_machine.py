"""What the machine gives a run: cores and memory of its group, GPUs and their driver, and how processes reach each other."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from pipelines.findings import Finding, fine, problem, size, warning

Device = Literal["auto", "cpu", "cuda"]
ROOT = Path("/")
LEAST_MEMORY, LEAST_SHARED = 4 * 2**30, 2**30


def cores(root: Path = ROOT) -> float:
    """Cores that this process may use: those of its affinity or of its control group, whichever is less."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = []
    for folder in _groups(root, "cpu"):
        quota, period = (_words(folder / "cpu.max") or ["max"]), ["100000"]
        if quota == ["max"]:
            quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        values = [*quota[:2], *period][:2] if quota else []
        if len(values) == 2 and values[0].isdecimal() and int(values[1]):
            shares.append(int(values[0]) / int(values[1]))
    return min([float(usable), *shares])


def memory(root: Path = ROOT) -> tuple[int, int]:
    """Bytes that this process may use, and how many of them are free: of the machine or of its control group, whichever is less."""
    whole = psutil.virtual_memory()
    found = [(int(whole.total), int(whole.available))]
    for folder in _groups(root, "memory"):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        if limit and limit[0].isdecimal() and int(limit[0]) < 2**60:
            cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            busy = int(used[0]) - (int(cached[1]) if cached else 0) if used else 0
            found.append((int(limit[0]), max(0, int(limit[0]) - max(0, busy))))
    return min(total for total, _ in found), min(free for _, free in found)


def processor_finding(threads: int, environment: Mapping[str, str], root: Path = ROOT) -> Finding:
    """Cores, and whether torch's threads fit on them."""
    number, processes = cores(root), int(environment.get("LOCAL_WORLD_SIZE") or 1)
    told = f"{number:g} usable of {os.cpu_count()}, {threads} threads of torch" + (
        f" in each of {processes} processes" if processes > 1 else ""
    )
    if threads * processes > number + 0.5:
        fitting = max(1, int(number) // processes)
        return warning("processor", told, f"more threads than cores slow each other down: export OMP_NUM_THREADS={fitting}")
    return fine("processor", told)


def memory_finding(root: Path = ROOT) -> Finding:
    """Whether there is memory to train in."""
    total, free = memory(root)
    told = f"{size(free)} free of {size(total)}"
    if free < LEAST_MEMORY:
        return warning("memory", told, "ask for more, or lower loader.global_batch_size, loader.window_shards or loader.prefetch")
    return fine("memory", told)


def torch_findings(device: Device, environment: Mapping[str, str], root: Path = ROOT, torch: Any = None) -> list[Finding]:
    """The build of torch, the processor, the GPUs and how processes reach each other.

    Args:
        device: What is to be trained on.
        environment: Of the process.
        root: Of the file system of the machine.
        torch: The module; imported if None.
    """
    try:
        torch = importlib.import_module("torch") if torch is None else torch
    except (ImportError, OSError) as error:
        return [problem("torch", f"cannot be imported: {_first_line(error)}", "install it anew, in an environment of its own")]
    build = f"{torch.__version__}, " + (f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for processors only")
    driver = driver_version(root)
    wrong = not torch.version.cuda and bool(driver) and device != "cpu"
    own = (
        problem("torch", f"{build}, and there is an NVIDIA driver ({driver})", "install torch for CUDA, or say device=cpu")
        if wrong
        else fine("torch", build)
    )
    gpus = gpu_findings(device, driver, environment, torch)
    count = int(torch.cuda.device_count()) if torch.cuda.is_available() else 0
    return [own, processor_finding(int(torch.get_num_threads()), environment, root), *gpus, *group_findings(count, torch)]


def gpu_findings(device: Device, driver: str, environment: Mapping[str, str], torch: Any) -> list[Finding]:
    """A line for each GPU; one that says why there is none where there should be one."""
    if not torch.cuda.is_available():
        hidden = environment.get("CUDA_VISIBLE_DEVICES")
        if device == "cuda":
            why = f"hidden by CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else _why_no_gpu(torch)
            return [problem("GPU", f"none that torch can use, and device=cuda: {why}", "give the job a GPU, or say device=cpu")]
        if driver and torch.version.cuda and device == "auto" and hidden is None:
            return [problem("GPU", f"driver {driver}, and torch cannot use it: {_why_no_gpu(torch)}", "fit the driver to torch's CUDA")]
        return [fine("GPU", "none: training runs on the processor")]
    found = []
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        free, total = torch.cuda.mem_get_info(number)
        bf16 = "bf16" if major >= 8 else "no bf16"
        name = torch.cuda.get_device_name(number)
        told = f"{name}, sm_{major}{minor}, {bf16}, {size(free)} free of {size(total)}, driver {driver or 'unknown'}"
        if not _has_kernels(torch.cuda.get_arch_list(), major, minor):
            found.append(problem(f"GPU {number}", told, f"this torch has no kernels for it ({', '.join(torch.cuda.get_arch_list())})"))
        elif free < total // 2:
            found.append(warning(f"GPU {number}", told, "another process uses it; wait, or choose another with CUDA_VISIBLE_DEVICES"))
        else:
            found.append(fine(f"GPU {number}", told))
    return found


def group_findings(gpus: int, torch: Any) -> list[Finding]:
    """What processes talk through."""
    there = torch.distributed.is_available()
    backends = [name for name in ("gloo", "nccl") if there and getattr(torch.distributed, f"is_{name}_available")()]
    told = f"backends: {', '.join(backends) or 'none'}"
    if gpus > 1 and "nccl" not in backends:
        return [problem("processes", told, f"{gpus} GPUs need nccl: install torch for CUDA")]
    if "gloo" not in backends:
        return [warning("processes", told, "only one process can train")]
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        advice = "several processes would not find each other: enter the name into /etc/hosts, or set GLOO_SOCKET_IFNAME=lo on one machine"
        return [warning("processes", f"{told}; this machine's name has no address", advice)]
    return [fine("processes", told)]


def shared_memory_finding(gpus: int, folder: Path = Path("/dev/shm")) -> list[Finding]:  # noqa: S108 - where Linux keeps it
    """Whether NCCL finds the shared memory that it passes gradients through."""
    if not folder.is_dir():
        return []
    room = shutil.disk_usage(folder)
    told = f"{size(room.free)} free of {size(room.total)}"
    if gpus > 1 and room.free < LEAST_SHARED:
        return [warning("shared memory", told, "NCCL needs it between GPUs: start the container with --shm-size=8g or --ipc=host")]
    return [fine("shared memory", told)]


def driver_version(root: Path = ROOT) -> str:
    """Version of NVIDIA's driver; empty where there is none."""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _text(root / "proc/driver/nvidia/version"))
    if found:
        return found[1]
    program = shutil.which("nvidia-smi") if root == ROOT else None
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - words of ours
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if not done.returncode else ""


def _has_kernels(built: list[str], major: int, minor: int) -> bool:
    """Whether a GPU of this capability runs what was built: the same major number and no higher minor one, or any older PTX."""
    for name in built:
        kind, _, number = name.partition("_")
        digits = re.match(r"(\d+)(\d)", number)
        if digits is None:
            continue
        own = int(digits[1]), int(digits[2])
        if (kind == "sm" and own[0] == major and own[1] <= minor) or (kind == "compute" and own <= (major, minor)):
            return True
    return not built


def _why_no_gpu(torch: Any) -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return "no device is visible"


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of the control groups that limit this process, its own first."""
    top, found = root / "sys/fs/cgroup", []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, kinds, own = line.split(":", 2)
        if number == "0" and not kinds:
            start = top
        elif controller in kinds.split(","):
            start = next((top / name for name in (kinds, controller) if (top / name).is_dir()), top)
        else:
            continue
        parts = Path(own.lstrip("/")).parts
        found += [start.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    return found


def _words(file: Path) -> list[str]:
    return _text(file).split()


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
