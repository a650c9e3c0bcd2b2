"""What a process is started with: variables of launchers and libraries, limits, the mask of new files, the clock."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import pairwise
from time import monotonic, time

from mae_core.launch import LaunchError, launched
from pipelines.findings import Finding, fine, problem, size, warning

LEAST_FILES = 1024
CLOCK_SLACK_S = 2.0
LEAKING = {
    "MLFLOW_RUN_ID": "whatever calls MLflow goes on with that run: unset it",
    "MLFLOW_EXPERIMENT_ID": "it names an experiment that other calls of MLflow go to: unset it, and set tracking.experiment",
    "MLFLOW_EXPERIMENT_NAME": "it names an experiment that other calls of MLflow go to: unset it, and set tracking.experiment",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for: unset it, but to look for an error",
    "TORCH_DISTRIBUTED_DEBUG": "collectives are checked one by one: unset it, but to look for an error",
}
"""Variables that change a run unseen, with what to do."""

WEAKENING = ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
"""Variables that let a model of others run code when it is loaded."""


def launch_findings(environment: Mapping[str, str]) -> list[Finding]:
    """Whether the environment of a launch on several processes is whole."""
    try:
        launch = launched(environment)
    except LaunchError as error:
        return [problem("launch", str(error), "")]
    return [fine("launch", "one process" if launch.world == 1 else f"rank {launch.rank} of {launch.world} processes, by {launch.by}")]


def variable_findings(environment: Mapping[str, str]) -> list[Finding]:
    """A line for every variable that changes a run unseen."""
    found = [
        warning("environment", f"{name} is set", advice) for name, advice in LEAKING.items() if environment.get(name) not in (None, "", "0")
    ]
    found += [
        warning("environment", f"{name}={environment[name]}", "loading a model may then run code of others: unset it")
        for name in WEAKENING
        if environment.get(name, "").lower() in ("1", "true", "yes", "y")
    ]
    return found or [fine("environment", "no variable that would change a run unseen")]


def limit_findings(need_bytes: int = 0, limit: Callable[[int], tuple[int, int]] = resource.getrlimit) -> list[Finding]:
    """Limits on what a process may use.

    Args:
        need_bytes: Of the largest file that will be written.
        limit: Soft and hard limit by number.
    """
    found = []
    files, largest, room = (limit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS))
    infinity = resource.RLIM_INFINITY
    if files not in (infinity, -1) and files < LEAST_FILES:
        found.append(warning("limits", f"{files} open files", f"ulimit -n {LEAST_FILES}, or more with several processes"))
    if largest not in (infinity, -1):
        level = problem if need_bytes > largest else warning
        found.append(level("limits", f"files of at most {size(largest)}", "a checkpoint may not fit: ulimit -f unlimited"))
    if room not in (infinity, -1):
        found.append(
            warning("limits", f"an address space of at most {size(room)}", "torch reserves more than it uses: ulimit -v unlimited")
        )
    return found or [fine("limits", f"{'any number of' if files in (infinity, -1) else files} open files, files of any size")]


def umask_finding(*, patients: bool) -> Finding:
    """Who may read and change what a run writes."""
    now = os.umask(0o077)
    os.umask(now)
    told = f"{now:03o}"
    if not now & 0o002:
        return warning("umask", told, "everybody may change what a run writes: umask 022, or 077")
    if patients and now & 0o044 != 0o044:
        return warning("umask", told, "others on this machine may read what is made of patients' scans: umask 077")
    if not now & 0o020:
        return warning("umask", told, "the group may change checkpoints, which are loaded later: umask 022, or 077")
    return fine("umask", told)


def clock_finding(skew_s: float | None, ticks: Callable[[], float] = monotonic, now: Callable[[], float] = time) -> Finding:
    """Whether time goes forward, and whether this machine and the file system agree on it.

    Args:
        skew_s: By how much this machine's clock is ahead of the file system's; None if it is not known.
        ticks: Of the clock that intervals are measured with.
        now: Wall clock.
    """
    seen = [ticks() for _ in range(100)]
    today = datetime.fromtimestamp(now(), UTC)
    told = f"{today.isoformat(timespec='seconds')}, time zone {today.astimezone().tzname()}"
    if any(later < earlier for earlier, later in pairwise(seen)):
        return problem("clock", "the monotonic clock goes backwards", "timeouts cannot work on this machine; tell its administrator")
    if skew_s is not None and abs(skew_s) > CLOCK_SLACK_S:
        told += f", {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the file system's"
        return warning("clock", told, "steps, retention and leases do not mind; times in logs and in MLflow will differ: set it by NTP")
    if today < datetime(2025, 1, 1, tzinfo=UTC):
        return warning("clock", told, "long ago: https to a tracking server would fail; set it by NTP")
    return fine("clock", told)
