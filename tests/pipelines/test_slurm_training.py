"""Launch files say what they should, and the job of a stand-in for Slurm is pre-empted, requeued and ends in the bits of a quiet run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mae_core.checkpoint import steps
from tests.tiny_runs import ROOT, arguments, environment, quick, shared_store

__all__ = ["quick"]

CLUSTER = ROOT / "configs" / "cluster"
SBATCH = CLUSTER / "pretrain.sbatch"
PATIENCE_S = 120
PROGRAMS = {
    "sbatch": """
id=$((20000 + $$ % 10000))
mkdir "$JOBS/$id"
export SLURM_JOB_ID=$id SLURM_JOB_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_RESTART_COUNT=0
script=$1; shift
while true; do
  bash "$script" "$@" >> "$JOBS/$id/log" 2>&1 < /dev/null
  echo $? >> "$JOBS/$id/codes"
  [ -e "$JOBS/$id/requeue" ] || break
  rm "$JOBS/$id/requeue"
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
""",
    "srun": """
echo "$@" >> "$JOBS/$SLURM_JOB_ID/steps"
while [ "${1#--}" != "$1" ]; do shift; done
pids=()
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  pids+=($!)
done
echo "${pids[@]}" > "$JOBS/$SLURM_JOB_ID/tasks"
worst=0
for pid in "${pids[@]}"; do
  wait "$pid"; code=$?
  [ $code -gt $worst ] && worst=$code
done
exit $worst
""",
    "scontrol": """
[ "$1" = requeue ] && touch "$JOBS/$2/requeue"
""",
}
"""What Slurm does with a job, here on this machine; `sbatch` comes back when the job is over, so that a test can wait for it."""

QUIET = """
import os, sys
from pathlib import Path

sys.path.insert(0, os.getcwd())
from mae_core.parallel import processes
from mae_core.store import TileStore
from tests.tiny_runs import one_thread, tiny_recipe, tiny_run

store, folder, steps = TileStore.open(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with one_thread(), processes("cpu") as parallel:
    tiny_run(store, tiny_recipe(train__steps=steps, train__checkpoint_steps=steps), parallel).train(checkpoints=folder)
"""


def directives(text: str) -> dict[str, str]:
    """Options that Slurm reads from a script, by name."""
    words = (line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH "))
    return dict(word.partition("=")[::2] for word in words)


def test_the_job_script_asks_for_what_it_tells() -> None:
    text = SBATCH.read_text()
    assert subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True, check=True).stderr == ""
    found = directives(text)
    assert found["ntasks-per-node"] == found["gpus-per-node"], "a process for each GPU"
    assert found["requeue"] == ""
    assert found["open-mode"] == "append", "the log of the first attempt stays"
    name, _, seconds = found["signal"].partition("@")
    assert getattr(signal, f"SIG{name}") is signal.SIGTERM
    assert int(seconds) == 600
    assert "Ten minutes before the time limit" in text.replace("ten", "Ten")
    assert re.search(r'\[ "\$code" -eq 75 \]', text)
    before_directives = text.partition("\n#SBATCH")[0]
    assert all(line.startswith("#") for line in before_directives.splitlines()), "Slurm reads none after the first command"


@pytest.mark.parametrize("name", sorted(path.name for path in CLUSTER.iterdir()))
def test_a_launch_file_opens_with_what_it_is_and_its_command(name: str) -> None:
    text = (CLUSTER / name).read_text()
    header = "\n".join(line for line in text[: re.search(r"^[^#\n]", text, re.MULTILINE).start()].splitlines() if line.startswith("# "))
    assert f"configs/cluster/{name}" in header
    assert "What to change: " in header
    assert "not yet measured" in header
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / config).is_file(), config


def test_the_manifest_of_kubernetes_names_one_runtime_and_leaves_time_to_save() -> None:
    runtime, job = list(yaml.safe_load_all((CLUSTER / "trainjob.yaml").read_text()))
    assert {part["apiVersion"] for part in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert [part["kind"] for part in (runtime, job)] == ["TrainingRuntime", "TrainJob"]
    assert job["spec"]["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert job["spec"]["suspend"] is False

    jobs: dict[str, Any] = runtime["spec"]["template"]["spec"]
    node = jobs["replicatedJobs"][0]
    assert node["name"] == "node"
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a policy for failures of pods needs it"
    assert node["template"]["spec"]["podFailurePolicy"]["rules"][0]["action"] == "FailJob"
    assert jobs["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    trainer = job["spec"]["trainer"]
    given = {entry["name"]: entry["value"] for entry in trainer["env"]}
    assert all(isinstance(value, str) for value in given.values()), "Kubernetes takes no number there"
    assert 300 <= int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert trainer["command"] == ["torchrun", "pipelines/pretrain.py"]
    assert {word.partition("=")[0] for word in trainer["args"] if "=" in word} == {"store", "out"}


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


@pytest.mark.fault
def test_a_job_that_is_preempted_is_requeued_and_ends_in_the_bits_of_a_quiet_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    store, out, jobs, last = shared_store(tmp_path_factory), tmp_path / "run", tmp_path / "jobs", 60
    (tmp_path / "bin").mkdir()
    jobs.mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    here = {
        **environment(),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "JOBS": str(jobs),
        "PYTHONPATH": str(ROOT),
    }
    changes = {"train__steps": last, "train__checkpoint_steps": 4, "train__eval_steps": last, "tracking__log_images": False}
    words = arguments(store, out, "offline", **changes)
    sbatch = shutil.which("sbatch", path=here["PATH"])
    with subprocess.Popen([sbatch, str(SBATCH), *words], cwd=ROOT, env=here) as job:
        wait_for(lambda: bool(steps(out / "checkpoints")) or job.poll() is not None)
        (own,) = jobs.iterdir()
        for pid in (own / "tasks").read_text().split():
            os.kill(int(pid), signal.SIGTERM)
        assert job.wait(PATIENCE_S) == 0
    log = (own / "log").read_text()
    assert (own / "codes").read_text().split() == ["75", "0"], log
    stopped = re.search(r"terravox pretrain: asked to stop \(SIGTERM\); step (\d+) of 60 is saved; run the same command again", log)
    assert stopped, log
    assert f"resuming at step {stopped[1]} of 60" in log
    assert log.count("terravox pretrain: asked to stop") == 1, "the first process speaks for both"
    assert all("--kill-on-bad-exit=0" in line for line in (own / "steps").read_text().splitlines())
    assert json.loads((out / "result.json").read_text())["verb"] == "pretrain"
    assert not (out / "stopped.json").exists()
    assert not (out / "ranks").exists()

    (tmp_path / "quiet.py").write_text(QUIET)
    given = {**here, "SLURM_JOB_ID": own.name, "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "127.0.0.1"}
    quiet = [sys.executable, str(tmp_path / "quiet.py"), str(store.path), str(tmp_path / "quiet"), str(last)]
    subprocess.run([str(tmp_path / "bin" / "srun"), *quiet], cwd=ROOT, env=given, check=True)
    ended, wanted = (load_file(steps(folder)[-1] / "model.safetensors") for folder in (out / "checkpoints", tmp_path / "quiet"))
    assert ended.keys() == wanted.keys()
    assert all(torch.equal(ended[name], wanted[name]) for name in wanted)
