"""A verb that is sent a signal ends with 75, wherever it is; run again it goes on, and what it leaves says so to a batch script."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from mae_core.checkpoint import peek
from mae_core.evaluate import Pretraining
from mae_core.parallel import Parallel
from mae_core.settings import Settings
from mae_core.stopping import REQUEUE, Stopped, StopRequest
from mae_core.store import TileStore
from modalities.grid import Window
from pipelines import pretrain
from pipelines.attempt import _loop
from pipelines.command_line import run
from pipelines.compute_time import ComputeTime
from pipelines.preparation import PrepareSettings, prepare
from pipelines.requeue import STOPPED, tell_stop
from tests.synthetic_scenes import Scenes, SyntheticScene, make_scene, tree
from tests.tiny_runs import arguments, quick, shared_store, shared_tracking, signals_restored

__all__ = ["quick"]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with signals_restored():
        yield


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


def struck(work: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function, in whose first call this process is sent a signal, thrice."""
    calls: list[int] = []

    def told(*given: Any, **named: Any) -> Any:
        calls.append(number)
        for _ in range(3 * (len(calls) == 1)):
            os.kill(os.getpid(), number)
        return work(*given, **named)

    return told


def statuses(uri: str, name: str) -> list[str]:
    """What the tracking store says of every run of that name."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("terravox")
    return [run.info.status for run in client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")]


def test_a_pretraining_that_is_stopped_again_and_again_gets_done(
    store: TileStore, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the loop, in its evaluation, in its last step, and while the model is exported."""
    out = tmp_path / "stopped-often"
    uri = shared_tracking(tmp_path_factory)
    words = arguments(store, out, uri, tracking__log_images=False, train__log_steps=2)
    places = [
        (pretrain, "restore", signal.SIGTERM, None, "asked to stop (SIGTERM); what is finished is kept"),
        (Pretraining, "evaluate", signal.SIGUSR1, 5, "asked to stop (SIGUSR1); step 5 of 8 is saved"),
        (Pretraining, "evaluate", signal.SIGTERM, 8, "asked to stop (SIGTERM); what is finished is kept"),
        (pretrain, "save_model", signal.SIGUSR2, 8, "asked to stop (SIGUSR2); what is finished is kept"),
    ]
    for owner, name, number, step, told in places:
        with pytest.MonkeyPatch.context() as patched, signals_restored():
            patched.setattr(owner, name, struck(getattr(owner, name), number))
            assert pretrain.main(words) == REQUEUE
        errors = capsys.readouterr().err
        assert f"terravox pretrain: {told}; run the same command again to go on" in errors
        assert "Traceback" not in errors
        assert (peek(out / "checkpoints") or {"step": None})["step"] == step
        assert json.loads((out / STOPPED).read_text()) == {"exit_code": REQUEUE}
        assert not (out / "result.json").exists()
        assert step is None or statuses(uri, out.name) == ["KILLED"]
    assert pretrain.main(words) == 0
    assert (out / "result.json").is_file()
    assert not (out / STOPPED).exists()
    assert not (out / "ranks").exists()
    assert statuses(uri, out.name) == ["FINISHED"]


@dataclass(frozen=True)
class OneOfTwo(Parallel):
    """A process beside another one, which was asked to stop."""

    def any(self, value: bool) -> bool:
        return True


def test_where_another_process_was_asked_in_the_last_step_this_one_stops_too(tmp_path: Path) -> None:
    own = OneOfTwo(0, 2, torch.device("cpu"))
    loop = _loop(StopRequest(), own, ComputeTime(tmp_path, own))
    with pytest.raises(Stopped, match=r"asked to stop \(by another process\)") as stopped, loop:
        pass
    assert stopped.value.together


class NoSettings(Settings):
    """A verb without a folder."""


@dataclass(frozen=True)
class Striking(SyntheticScene):
    """In whose first reading the process is sent a signal."""

    def read(self, window: Window) -> Any:
        if not (self.folder / "struck").exists():
            (self.folder / "struck").touch()
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().read(window)


def test_a_preparation_that_is_stopped_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = PrepareSettings(tile=(8, 8), tiles_per_shard=2, num_workers=0)
    first, second = (make_scene(tmp_path, name, (17, 9)) for name in "ab")
    whole = tree(prepare(Scenes((first, second)), tmp_path / "whole", settings).path)
    scenes = Scenes((first, Striking(**vars(second))))

    def work(_: NoSettings) -> None:
        prepare(scenes, tmp_path / "out", settings)

    codes = []
    for _ in range(2):
        with signals_restored():
            codes.append(run("prepare", NoSettings, work, description="", argv=[]))
    assert codes == [REQUEUE, 0]
    assert "terravox prepare: asked to stop (SIGUSR1); what is finished is kept; run the same command again" in capsys.readouterr().err
    assert tree(tmp_path / "out") == whole


class WithFolder(Settings):
    """A verb with a folder."""

    out: Path


def test_the_first_speaks_where_all_stop_together_and_a_folder_that_is_no_run_gets_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = WithFolder(out=tmp_path)
    tell_stop("prepare", settings, Stopped("asked"))
    assert not list(tmp_path.iterdir())
    assert "terravox prepare: asked; run" in capsys.readouterr().err
    (tmp_path / "config.json").touch()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    tell_stop("pretrain", settings, Stopped("asked", together=True))
    assert capsys.readouterr().err == ""
    assert not (tmp_path / STOPPED).exists()
    tell_stop("pretrain", settings, Stopped("asked"))
    assert (tmp_path / STOPPED).is_file()
