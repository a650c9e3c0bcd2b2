"""The verb from store to registry: told once, killed and gone on with to the same bytes, refused with words, the same on two processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from mae_core.export import load_encoder
from mae_core.nd import patchify
from mae_core.parallel import Parallel
from mae_core.sealed import seal, sha256
from mae_core.store import TileStore
from mae_core.tracking import Registered, TrackingSettings, fetch_model
from pipelines import pretrain as verb
from pipelines.frozen_split import split_digest
from pipelines.pretrain import main
from tests.tiny_runs import (
    OF_THE_MACHINE,
    ROOT,
    TINY,
    arguments,
    environment,
    one_thread,
    quick,
    shared_store,
    shared_tracking,
    tiny_recipe,
    two_processes,
)

__all__ = ["quick"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]
SCRIPT = ROOT / "pipelines" / "pretrain.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shared_tracking(tmp_path_factory)


@pytest.fixture(scope="module")
def client(uri: str, finished: Finished) -> MlflowClient:
    return MlflowClient(uri)


@dataclass(frozen=True)
class Finished:
    """An undisturbed run."""

    out: Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def finished(store: TileStore, uri: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("finished") / "run"
    with one_thread():
        assert main(arguments(store, out, uri)) == 0
    return Finished(out, json.loads((out / "result.json").read_text()))


@contextmanager
def failing(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> Iterator[Callable[[list[str]], None]]:
    """Runs the verb, which must end with an exit code and all the words on stderr."""

    def call(argv: list[str]) -> None:
        assert main(argv) == code
        errors = capsys.readouterr().err
        assert not [word for word in words if word not in errors], errors
        assert "Traceback" not in errors

    yield call


def run_named(client: MlflowClient, name: str) -> Run:
    """The only run of that name."""
    experiment = client.get_experiment_by_name("terravox")
    assert experiment is not None
    (found,) = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == name]
    return found


def history(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def test_the_result_holds_figures_digests_settings_and_versions(finished: Finished, store: TileStore, uri: str) -> None:
    result = finished.result
    assert result["verb"] == "pretrain"
    assert {"train/loss", "val/error", "val/skill", "val/skill/A", "val/skill/B"} <= result["figures"].keys()
    weights = sha256(finished.out / "model" / "model.safetensors")
    assert result["digests"] == {"store": store.digest, "split": split_digest(store.index), "weights": weights}
    assert result["mlflow"]["uri"] == uri
    assert result["mlflow"]["alias"] == "models:/terravox-raster-encoder@candidate"
    assert result["config"]["crop"] == [8, 8]
    assert result["config"]["model"]["encoder"]["patch"] == [4, 4]
    assert result["config"]["store_digest"] == store.digest
    assert {"python", "torch", "mlflow"} <= result["versions"].keys()


def test_the_folder_holds_what_it_should(finished: Finished) -> None:
    files = {str(path.relative_to(finished.out)) for path in finished.out.rglob("*") if path.is_file()}
    whole = {"config.json", "run.json", "result.json", "model/manifest.json", "model/model.json", "model/model.safetensors"}
    kept = {
        f"checkpoints/step-{step:08d}/{name}.{end}"
        for step in (6, 8)
        for name, end in (("model", "safetensors"), ("optimiser", "safetensors"), ("state", "json"), ("manifest", "json"))
    }
    told = {"checkpoints/latest", "compute.json", "model/README.md"}
    told |= {f"tracking/run-0001/{name}" for name in ("spool.jsonl", "published.json", "lock")}
    assert files == whole | kept | told | {f"panels/step-{step:08d}.png" for step in (4, 8)}


def test_the_model_says_how_it_is_fed(finished: Finished, store: TileStore) -> None:
    encoder, about = load_encoder(finished.out / "model")
    assert about.channels == encoder.channels == ("A", "B")
    assert about.mean == tuple(store.statistics.mean.tolist())
    assert (about.modality, about.crop, about.spacing, about.spacing_unit) == ("raster", (8, 8), (10.0, 10.0), "m")
    assert about.lineage == {"store_digest": store.digest, "pretraining_run": finished.result["mlflow"]["run_id"]}


def test_the_run_is_finished_and_holds_curves_settings_data_and_pictures(
    finished: Finished, client: MlflowClient, store: TileStore
) -> None:
    run = client.get_run(finished.result["mlflow"]["run_id"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    for key in ("train/loss", "train/grad_norm", "train/lr"):
        assert [step for step, _ in history(client, run, key)] == list(range(1, 9))
    assert [step for step, _ in history(client, run, "val/skill")] == [4, 8]
    assert history(client, run, "train/loss")[-1][1] == finished.result["figures"]["train/loss"]
    assert (run.data.params["loader.global_batch_size"], run.data.params.get("tracking.uri")) == ("4", None)
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("raster", store.digest[:36])
    assert store.digest in data.dataset.source
    assert str(store.path) not in str(run.to_dictionary())
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "images") if item.path.endswith(".png")]
    assert sorted(name.split("+")[:3] for name in pictures) == [["images/val~reconstruction", "step", step] for step in ("4", "8")]


def test_the_encoder_is_registered_without_a_pickle(finished: Finished, client: MlflowClient) -> None:
    about = finished.result["mlflow"]
    version = client.get_model_version(*about["model"].removeprefix("models:/").split("/"))
    assert "candidate" in client.get_registered_model("terravox-raster-encoder").aliases
    assert version.tags["pretraining_run"] == about["run_id"]
    folder = Path(client.get_logged_model(about["model_id"]).artifact_location.removeprefix("file://"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / "artifacts" / "model" / "model.safetensors" in files
    assert {path.suffix for path in files} <= {".py", ".typed", ".json", ".safetensors", ".txt", ".yaml", ".md", ""}
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80"], "a pickle of protocol 2 and above begins with this byte"
    description = (folder / "MLmodel").read_text()
    assert "loader_module: mlflow.pyfunc.loaders.code_model" in description
    assert "pkl" not in description
    assert "python_model:" not in description, "the key under which MLflow names a pickled model"


def test_what_mlflow_serves_is_our_encoder(
    finished: Finished, client: MlflowClient, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    about = finished.result["mlflow"]
    client.set_registered_model_alias("terravox-raster-encoder", "candidate", about["model"].rpartition("/")[2])
    with mlflow_at(uri):
        served = mlflow.pyfunc.load_model(about["alias"])
    pixels = np.random.default_rng(0).normal(size=(3, 2, 12, 8)).astype(np.float32)
    encoder, _ = load_encoder(finished.out / "model")
    with torch.inference_mode():
        features = encoder(patchify(torch.from_numpy(pixels), (4, 4)), torch.arange(6).expand(3, -1), (3, 2))[:, 1:]
    np.testing.assert_allclose(served.predict(pixels), features.numpy(), rtol=0, atol=1e-6)
    folder, version = fetch_model(about["alias"], TrackingSettings(uri=uri), tmp_path)
    assert sha256(folder / "model.safetensors") == finished.result["digests"]["weights"]
    assert version == Registered("terravox-raster-encoder", int(about["model"].rpartition("/")[2]), about["model_id"])


@contextmanager
def mlflow_at(uri: str) -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)


def test_a_finished_run_is_told_again_and_nothing_is_done(
    finished: Finished, store: TileStore, uri: str, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> tuple[Any, ...]:
        files = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}
        versions = client.search_model_versions("name='terravox-raster-encoder'")
        return files, len(versions), client.get_run(finished.result["mlflow"]["run_id"])

    before = str(state())
    assert main(arguments(store, finished.out, uri, train__log_steps=3, train__keep_checkpoints=9, loader__num_threads=1)) == 0
    assert "is finished; its result is told again" in capsys.readouterr().out
    assert str(state()) == before


def test_on_other_processes_a_finished_run_is_told_by_the_first_only(
    finished: Finished, store: TileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Parallel):
        def any(self, value: bool) -> bool:
            assert value is False
            return True

    @contextmanager
    def second(_: str, __: object) -> Iterator[Parallel]:
        yield Second(1, 2, torch.device("cpu"))

    monkeypatch.setattr(verb, "processes", second)
    assert verb.pretrain(store, finished.out, tiny_recipe()) == {}


def test_other_settings_are_refused_by_name(
    finished: Finished, store: TileStore, uri: str, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = ("holds a run with other settings", "\n  model.decoder.width: 16 -> 24", "\n  train.steps: 8 -> 9")
    with failing(capsys, 1, *words) as call:
        call(arguments(store, finished.out, uri, train__steps=9, model__decoder__width=24))
    other = shared_store(tmp_path_factory, 3)
    with failing(capsys, 1, f'store_digest: "{store.digest}" -> "{other.digest}"') as call:
        call(arguments(other, finished.out, uri, crop=[4, 8, 8]))


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"model.encoder.patch": [4, 4, 4]}, 1, "model.encoder.patch=[4, 4, 4] gives 3 sizes and the data have 2 axes"),
        ({"crop": [8, 8, 8]}, 1, "crop=[8, 8, 8] gives 3 sizes and the data have 2 axes"),
        ({"crop": [10]}, 1, "space (10, 10) is not a multiple of patch (4, 4) on every axis; change the crop or the patch"),
        ({"crop": [16]}, 1, "crop=[16, 16] does not fit into the store's tiles of [12, 12]; lower crop, or prepare larger tiles"),
        ({"crop": [4]}, 1, "crop=[4, 4] holds only 1 tokens of [4, 4]; raise crop or lower model.encoder.patch"),
        ({"crop": [-8]}, 2, "crop"),
        ({"loader.micro_batch_size": 3}, 1, "loader.micro_batch_size=3 does not divide a process's share of 4 samples"),
        ({"train.step": 3}, 2, "train.steps"),
        ({"tracking.uri": "mlruns"}, 1, "tracking.uri=mlruns: a bare folder is no longer a tracking store"),
    ],
)
def test_what_does_not_fit_is_refused_with_words(
    store: TileStore, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int, words: str
) -> None:
    argv = arguments(store, tmp_path / "run", uri)
    with failing(capsys, code, words) as call:
        call([*argv, *(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items())])
    assert not list(tmp_path.glob("run/checkpoints")), "nothing was trained"


def test_an_unknown_store_is_told(tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with failing(capsys, 1, f"{tmp_path} has no manifest.json: it is not a tile store; run prepare to make one") as call:
        call(arguments(tmp_path, tmp_path / "run", uri))
    assert not (tmp_path / "run").exists()


def test_a_file_and_a_foreign_folder_are_left_alone(store: TileStore, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with failing(capsys, 1, f"--out {tmp_path / 'thesis.txt'} is a file") as call:
        call(arguments(store, tmp_path / "thesis.txt", uri))
    with failing(capsys, 1, f"--out {tmp_path} is not empty and holds no run (thesis.txt)") as call:
        call(arguments(store, tmp_path, uri))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_check_finds_what_is_wrong_and_does_nothing(
    store: TileStore, uri: str, tmp_path: Path, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    with failing(capsys, 2, "2 problems", "crop=[16, 16] does not fit", "tracking.uri=mlruns") as call:
        call([*arguments(store, tmp_path / "run", "mlruns", crop=[16]), "--check"])
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments(store, finished.out, uri), "--check"]) == 0
    assert "would resume at step 8" in capsys.readouterr().out


def test_a_run_that_fails_says_so_and_writes_no_result(
    store: TileStore, uri: str, tmp_path: Path, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    with failing(capsys, 1, "not finite", "lower optim.base_lr") as call:
        call(arguments(store, tmp_path / "failed", uri, optim__base_lr=1e38, tracking__log_images=False))
    run = run_named(client, "failed")
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "TrainingError")
    assert not (tmp_path / "failed" / "result.json").exists()


def test_a_password_is_neither_stored_nor_told(
    store: TileStore, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(arguments(store, tmp_path / "run", "http://anna:topsecret@127.0.0.1:9")) == 0, "no tracking store, and training goes on"
    out, errors = capfd.readouterr()
    assert out.count("tracking is lost (connection refused: http://…@127.0.0.1:9)") == 1
    assert f"run: terravox sync {tmp_path / 'run'}" in out
    told = json.loads((tmp_path / "run" / "result.json").read_text())["mlflow"]
    assert told == {"uri": "http://…@127.0.0.1:9", "run_id": told["run_id"], "pending": True}
    assert "topsecret" not in out + errors
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"topsecret" in path.read_bytes()]


def test_a_checkpoint_of_a_run_that_is_not_there_is_told(
    finished: Finished, store: TileStore, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.out, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        record = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**record, "run_id": "f" * 32}))
        seal(folder)
    words = (f"run {'f' * 32} of the checkpoint cannot be continued in {uri}", "set tracking.uri to where it was begun")
    with failing(capsys, 1, *words) as call:
        call(arguments(store, tmp_path / "run", uri))


def test_killed_before_its_result_was_written_it_is_told_from_the_tracker(
    finished: Finished, store: TileStore, uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    shutil.copytree(finished.out, tmp_path / "run")
    for name in ("result.json", "model/model.json"):
        (tmp_path / "run" / name).unlink()
    assert main(arguments(store, tmp_path / "run", uri)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["digests"] == finished.result["digests"]
    assert result["mlflow"]["run_id"] == finished.result["mlflow"]["run_id"]
    assert result["figures"] == pytest.approx(finished.result["figures"])
    client.set_registered_model_alias("terravox-raster-encoder", "candidate", finished.result["mlflow"]["model"].rpartition("/")[2])


def test_killed_and_run_again_it_ends_in_the_same_bytes_as_one_run(
    finished: Finished, store: TileStore, uri: str, client: MlflowClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed with SIGKILL behind the checkpoint of step 3, while step 4 is already told to the tracker and its picture drawn."""
    argv = arguments(store, out := tmp_path / "killed", uri)
    with subprocess.Popen([sys.executable, str(SCRIPT), *argv], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        patience = time.monotonic() + 120
        there = (out / "panels" / "step-00000004.png", out / "checkpoints" / "latest")
        while not all(map(Path.exists, there)) and job.poll() is None and time.monotonic() < patience:
            time.sleep(0.005)
        job.kill()
        text = job.communicate()[0].decode()
    assert job.returncode == -signal.SIGKILL, text
    assert (out / "checkpoints" / "step-00000003").is_dir()
    assert not (out / "result.json").exists()
    run = run_named(client, "killed")
    assert run.info.status == "RUNNING"
    told = history(client, run, "train/loss")
    assert told == history(client, client.get_run(finished.result["mlflow"]["run_id"]), "train/loss")[: len(told)]
    assert len(told) <= 6, "nothing is told that no checkpoint covers"

    capfd.readouterr()
    assert main(argv) == 0
    said = capfd.readouterr()
    assert "resuming at step " in said.out
    assert said.err == ""
    last = "checkpoints/step-00000008"
    for name in ("model/model.safetensors", f"{last}/model.safetensors", f"{last}/optimiser.safetensors"):
        assert (out / name).read_bytes() == (finished.out / name).read_bytes(), name
    run = run_named(client, "killed")
    whole = client.get_run(finished.result["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    for key in sorted(key for key in whole.data.metrics if not key.startswith(OF_THE_MACHINE)):
        assert history(client, run, key) == history(client, whole, key), key
    assert len(run.inputs.dataset_inputs) == 1
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "images") if item.path.endswith(".png")]
    assert sorted(name.split("+")[2] for name in pictures) == ["4", "8"]
    result = json.loads((out / "result.json").read_text())
    assert result["digests"] == finished.result["digests"]
    assert {key: value for key, value in result["figures"].items() if not key.startswith(OF_THE_MACHINE)} == {
        key: value for key, value in finished.result["figures"].items() if not key.startswith(OF_THE_MACHINE)
    }


def test_two_processes_give_the_curves_of_one(finished: Finished, store: TileStore, uri: str, client: MlflowClient, tmp_path: Path) -> None:
    """The micro-batches of the two ranks count unevenly: the tiles of place `b` have a third less."""
    out = tmp_path / "two"
    result = two_processes(SCRIPT, *arguments(store, out, uri, loader__micro_batch_size=1, tracking__log_images=False))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pretraining done") == 1, "only the first process speaks"
    run, alone = run_named(client, "two"), client.get_run(finished.result["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    for key in ("train/loss", "train/grad_norm", "val/error", "val/error_of_visible_mean", "val/error_of_interpolation"):
        assert dict(history(client, run, key)) == pytest.approx(dict(history(client, alone, key)), rel=1e-5), key
        assert len(history(client, run, key)) == len(history(client, alone, key))


def test_three_axes_go_the_whole_way(tmp_path_factory: pytest.TempPathFactory, uri: str, client: MlflowClient, tmp_path: Path) -> None:
    volumes = shared_store(tmp_path_factory, 3)
    changes = {"crop": [4, 8, 8], "tracking.register_as": "volumes", "train.steps": 2, "tracking.log_images": False}
    argv = arguments(volumes, tmp_path / "volumes", uri, **changes)
    assert main(argv) == 0
    encoder, about = load_encoder(tmp_path / "volumes" / "model")
    assert (about.crop, encoder.settings.patch) == ((4, 8, 8), (4, 4, 4))
    assert "candidate" in client.get_registered_model("volumes").aliases
    assert not (tmp_path / "volumes" / "panels").exists(), "pictures were not wanted"


def test_the_tiny_settings_are_all_known() -> None:
    """A renamed setting must not pass as the default here."""
    assert tiny_recipe().train.steps == TINY["train.steps"]


def test_a_model_is_fetched_by_a_new_process_that_stands_elsewhere(finished: Finished, uri: str, tmp_path: Path) -> None:
    """The registry is that of the tracking store, not MLflow's default in the working folder."""
    code = "import sys; from pathlib import Path; from mae_core.tracking import TrackingSettings, fetch_model; "
    code += "print(fetch_model(sys.argv[1], TrackingSettings(uri=sys.argv[2]), Path('run'))[0])"
    command = [sys.executable, "-c", code, finished.result["mlflow"]["alias"], uri]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert load_encoder(Path(done.stdout.strip().splitlines()[-1]))[1].kind == "encoder"
    assert not list(tmp_path.iterdir()), "no second store was made in the working folder"


@pytest.mark.parametrize(
    ("by_channel", "overall", "said"),
    [
        ({"B02": 0.1, "B11": 0.2}, 0.15, "[bold]it learned[/]: skill +0.150"),
        ({"B02": 0.1, "B11": -0.2}, 0.05, "it learned in part[/], 1 of 2 channels: skill +0.050"),
        ({"B02": 0.1, "B11": -0.2}, -0.05, "it has not learned yet[/]: skill -0.050"),
        ({}, 0.15, "it learned[/]: skill +0.150 over the best trivial predictor (0: none, 1: perfect)"),
    ],
    ids=["all", "part", "none", "no channels"],
)
def test_one_line_says_whether_it_learned(by_channel: dict[str, float], overall: float, said: str) -> None:
    line = verb.learned({"val/skill": overall, "val/error": 0.5} | {f"val/skill/{name}": value for name, value in by_channel.items()})
    assert said in line
    assert "\n" not in line
    assert all(f"{name} {value:+.3f}" in line for name, value in by_channel.items())
