"""Tiny stores, recipes and runs of a pretraining in two and three axes; what is expensive is made once per session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_core.checkpoint import TrainState
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.evaluate import Pretraining
from mae_core.loader import Stream
from mae_core.mae import MaskedAutoencoder
from mae_core.optim import learning_rate, make_optimiser
from mae_core.parallel import Parallel
from mae_core.stopping import SIGNALS
from mae_core.store import TileStore
from mae_core.train import Report, Surroundings, train
from modalities.quality import Quality
from pipelines.config_files import put
from pipelines.preparation import PrepareSettings, prepare
from pipelines.pretrain import PretrainRecipe, resolved
from pipelines.pretrain_start import make_normaliser
from pipelines.tiling_plan import SplitSettings
from tests.synthetic_scenes import Scenes, make_scene

ROOT = Path(__file__).resolve().parents[1]
ALONE = Parallel(0, 1, torch.device("cpu"))
SPACES = {2: ((12, 12), (36, 24)), 3: ((8, 8, 8), (8, 24, 16))}
"""Tile and scene by number of axes; every scene gives six tiles."""

OF_THE_MACHINE = ("speed/", "memory/", "checkpoint/")
"""How the names of metrics begin that tell of the machine, so that no two runs have the same."""

TINY: dict[str, Any] = {
    "crop": [8],
    "model.encoder.preset": "nano",
    "model.encoder.patch": [4],
    "model.decoder.width": 16,
    "model.decoder.depth": 1,
    "model.decoder.heads": 2,
    "loader.global_batch_size": 4,
    "optim.base_lr": 0.05,
    "train.steps": 8,
    "train.log_steps": 1,
    "train.eval_steps": 4,
    "train.checkpoint_steps": 3,
    "train.precision": "fp32",
    "train.device": "cpu",
}
"""Settings, by dotted name, of a run of seconds."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: quick where cores are shared, and the same bits in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For files that call verbs, which put a folder on the path: it is taken off again, and one thread is quicker on what is tiny."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    with one_thread():
        yield


@contextmanager
def signals_restored() -> Iterator[None]:
    """What handled the signals before handles them after: a verb that was stopped leaves them without effect, since its process ends."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """For files that read printed tables: none is folded."""
    monkeypatch.setenv("COLUMNS", "240")


def tiny_store(folder: Path, axes: int = 2) -> TileStore:
    """A store of three places with six tiles each; a third of the voxels of place `b` has no value, so samples count unevenly."""
    if not (folder / "store" / "manifest.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tile, space = SPACES[axes]
        empty = np.zeros(space, dtype=np.uint8)
        empty[..., : space[-1] // 3] = Quality.NODATA
        scenes = Scenes(tuple(make_scene(folder, name, space, quality=empty if name == "b" else None) for name in "abc"))
        settings = PrepareSettings(
            tile=tile, tiles_per_shard=4, num_workers=0, min_valid_fraction=0.1, split=SplitSettings(val_fraction=0.2, seed=1)
        )
        prepare(scenes, folder / "store", settings, attributes={"kind": "raster", "reader": {}})
    return TileStore.open(folder / "store")


def shared_store(factory: pytest.TempPathFactory, axes: int = 2) -> TileStore:
    """The tiny store of this session, which no test may change."""
    return tiny_store(factory.getbasetemp() / f"tiny-{axes}d", axes)


def shared_tracking(factory: pytest.TempPathFactory) -> str:
    """Address of the tracking store of this session; its schema costs seconds."""
    return f"sqlite:///{factory.getbasetemp() / 'tracking' / 'mlflow.db'}"


def logged_sheets(uri: str, run_id: str) -> dict[str, Path]:
    """Pictures of scans that a run was told, by the pseudonym of the scan."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    paths = [item.path for item in client.list_artifacts(run_id, "images")]
    return {
        path.partition("sheet~")[2].partition("+step+")[0]: Path(client.download_artifacts(run_id, path))
        for path in paths
        if path.endswith(".png")
    }


def tiny_recipe(**changes: Any) -> PretrainRecipe:
    """The tiny recipe with changes by dotted name, where `__` stands for the dot."""
    tree: dict[str, Any] = {}
    for key, value in {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        put(tree, key, value)
    return PretrainRecipe.model_validate(tree)


def arguments(store: TileStore | Path, out: Path, uri: str, **changes: Any) -> list[str]:
    """The command line of `pretrain` for the tiny recipe with changes, as `tiny_recipe` takes them."""
    own = {"store": str(store.path if isinstance(store, TileStore) else store), "out": str(out)}
    tracked = {"tracking.uri": uri, "tracking.system_metrics": False}
    values = {**TINY, **tracked, **{name.replace("__", "."): value for name, value in changes.items()}, **own}
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


@dataclass(frozen=True)
class TinyRun:
    """The parts of a pretraining as the verb puts them together, without folder and tracker."""

    recipe: PretrainRecipe
    state: TrainState
    stream: Stream
    task: Pretraining

    def train(
        self, last: int | None = None, checkpoints: Path | None = None, told: list[Report] | None = None, **around: Any
    ) -> list[Report]:
        """Train to step `last` (default: the recipe's) of the schedule of the whole run; all reports. Checkpoints go into a folder.

        A run that ends earlier is cut off from outside, as a kill would; `told` holds the reports of one that raises, too.
        """
        reports: list[Report] = [] if told is None else told

        def report(what: Report) -> None:
            reports.append(what)
            if what.step == last and "train/loss" in what.metrics:
                raise _CutOffError

        keep = self.recipe.train.keep_checkpoints
        writer = None if checkpoints is None else CheckpointWriter(checkpoints, {}, keep, self.stream.parallel)
        surroundings = Surroundings(writer, **around)
        with suppress(_CutOffError), writer or nullcontext():
            train(self.task, self.state, self.stream, self.recipe.train, self.recipe.optim, surroundings, report)
        return reports


class _CutOffError(Exception):
    pass


def tiny_run(store: TileStore, recipe: PretrainRecipe, parallel: Parallel = ALONE) -> TinyRun:
    """A run at step 0."""
    recipe = resolved(recipe, store)
    torch.manual_seed(recipe.train.seed)
    model = MaskedAutoencoder(recipe.model, store.channels)
    state = TrainState(model, make_optimiser(model, recipe.optim, learning_rate(recipe.optim, recipe.loader.global_batch_size)))
    stream = Stream(store, store.rows("train"), recipe.loader, recipe.train.seed, parallel)
    normaliser = make_normaliser(store, recipe.crop, recipe.train.seed, recipe.augment)
    held_out = store.rows("val")
    task = Pretraining(recipe.model, recipe.hiding, normaliser, recipe.train.seed, store, held_out, 4, parallel)
    return TinyRun(recipe, state, stream, task)


def curve(reports: list[Report], key: str = "train/loss") -> dict[int, float]:
    """Value of a metric by step."""
    return {report.step: report.metrics[key] for report in reports if key in report.metrics}


def environment() -> dict[str, str]:
    """Environment of a process that trains: one thread, no GPU, the loopback interface, nothing of another run."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_TRACKING", "MLFLOW_RUN"))}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}


def two_processes(script: Path, *words: str, timeout_s: int = 180) -> subprocess.CompletedProcess[str]:
    """What two gloo processes under torchrun gave; they are all gone when it returns."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    command = [*launcher, str(script), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True) as job:
        try:
            out, errors = job.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            job.terminate()  # the launcher ends its workers, which a kill would leave alone
            raise
    return subprocess.CompletedProcess(command, job.returncode, out, errors)
