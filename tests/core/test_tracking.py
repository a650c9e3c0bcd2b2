"""Runs end in the state that they ended in, go on where they were killed, and name neither the user nor a password."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mae_core.stopping import TakenOverError
from mae_core.tracking import Tracker, TrackingError, TrackingSettings, fetch_model, redacted, tracking_uri
from tests.tiny_runs import ROOT, environment, shared_tracking

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]
TAGS = {"source": "pipelines/pretrain.py"}
CONFIG = {"train": {"steps": 3, "betas": [0.9, 0.95]}, "long": "x" * 7000}


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    return TrackingSettings(uri=shared_tracking(tmp_path_factory), system_metrics=False)


@pytest.fixture
def tracker(settings: TrackingSettings, tmp_path: Path) -> Tracker:
    return Tracker(settings, tmp_path / "run", of_patients=False)


def status(tracker: Tracker) -> str:
    return str(tracker.client.get_run(tracker.run_id).info.status)


def points(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tracker.client.get_metric_history(tracker.run_id, key)]


def test_the_settings_come_before_the_environment_and_both_before_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "first"
    assert tracking_uri(TrackingSettings(), out) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(TrackingSettings(), Path("first")) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example")
    assert tracking_uri(TrackingSettings(), out) == "https://tracking.example"
    assert tracking_uri(TrackingSettings(uri="sqlite:////data/mlflow.db"), out) == "sqlite:////data/mlflow.db"


@pytest.mark.parametrize("uri", ["mlruns", "/data/mlruns", "./x"])
def test_a_bare_folder_is_refused_with_what_to_give(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = rf"tracking\.uri={uri}: a bare folder is no longer a tracking store; use sqlite:///PATH/mlflow\.db or an http address"
    with pytest.raises(TrackingError, match=words):
        tracking_uri(TrackingSettings(uri=uri), Path("run"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=words):
        Tracker(TrackingSettings(), Path("run"))


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("https://anna:secret@host:5000/x", "https://…@host:5000/x"),
        ("https://anna:se@cret@host", "https://…@host"),
        ("postgresql+psycopg2://u:p@db/mlflow", "postgresql+psycopg2://…@db/mlflow"),
        ("https://host:5000", "https://host:5000"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_user_and_password_are_left_out(uri: str, told: str) -> None:
    assert redacted(uri) == told


def test_a_run_is_running_and_then_finished(tracker: Tracker) -> None:
    with tracker.run("first", None, CONFIG, TAGS) as run:
        assert run is tracker
        assert status(tracker) == "RUNNING"
        run.metrics({"train/loss": 2.0, "train/lr": 0.1}, step=1)
        run.metrics({"train/loss": np.float32(1.5)}, step=2)
        run.metrics({}, step=3)
        run.tags({"extra": "yes"})
    assert status(tracker) == "FINISHED"
    found = tracker.client.get_run(tracker.run_id)
    assert found.info.run_name == "first"
    assert points(tracker, "train/loss") == [(1, 2.0), (2, 1.5)]
    assert points(tracker, "train/lr") == [(1, 0.1)]
    assert found.data.params["train.steps"] == "3"
    assert found.data.params["train.betas"] == "[0.9, 0.95]"
    assert len(found.data.params["long"]) == 6000
    assert found.data.tags["source"] == found.data.tags["mlflow.source.name"] == "pipelines/pretrain.py"
    assert found.data.tags["extra"] == "yes"


def test_a_value_that_is_no_number_stays_none(tracker: Tracker) -> None:
    with tracker.run("nan", None, CONFIG, TAGS) as run:
        run.metrics({"val/skill": math.nan, "val/error": 1.0}, step=1)
    [(step, value)] = points(tracker, "val/skill")
    assert step == 1
    assert math.isnan(value)


@pytest.mark.parametrize(("error", "state"), [(ValueError("x"), "FAILED"), (SystemExit(1), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_run_that_breaks_off_says_so(tracker: Tracker, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), tracker.run("broken", None, {}, TAGS):
        raise error
    assert status(tracker) == state
    kind = tracker.client.get_run(tracker.run_id).data.tags.get("failure")
    assert kind == (type(error).__name__ if state == "FAILED" else None)


def test_a_run_that_another_job_has_taken_over_is_left_as_it_is(tracker: Tracker) -> None:
    with pytest.raises(TakenOverError), tracker.run("taken over", None, {}, TAGS):
        raise TakenOverError("by another")
    assert status(tracker) == "RUNNING"
    assert "failure" not in tracker.client.get_run(tracker.run_id).data.tags


def test_a_killed_run_goes_on_as_one_run_with_each_step_once(settings: TrackingSettings, tracker: Tracker, tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    with tracker.run("one", None, CONFIG, TAGS):
        for step in (1, 2, 3):
            tracker.metrics({"train/loss": float(step)}, step)
        tracker.image("val/reconstruction", picture, 2)
    later = Tracker(settings, tmp_path / "run", of_patients=False)
    with later.run("one", tracker.run_id, {"train": {"steps": 999}}, TAGS):
        assert later.run_id == tracker.run_id
        assert status(later) == "RUNNING"
        for step in (2, 3, 4):
            later.metrics({"train/loss": float(step), "val/skill": 0.5}, step)
            later.image("val/reconstruction", picture, step)
    assert status(later) == "FINISHED"
    assert points(later, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert points(later, "val/skill") == [(2, 0.5), (3, 0.5), (4, 0.5)]
    names = [item.path for item in later.client.list_artifacts(later.run_id, "images") if item.path.endswith(".png")]
    assert sorted(name.split("+")[2] for name in names) == ["2", "3", "4"]
    assert later.client.get_run(later.run_id).data.params["train.steps"] == "3"


def test_a_part_that_an_attempt_before_finished_is_told_too(settings: TrackingSettings, tmp_path: Path) -> None:
    places = {"out": tmp_path, "folder": tmp_path / "arm" / "tracking"}
    offline = settings.model_copy(update={"uri": "offline"})
    part = Tracker(offline, **places)
    with suppress(TakenOverError), Tracker(offline, tmp_path).run("whole", None, CONFIG, TAGS), part.run("arm", None, {}, TAGS, step=0):
        part.metrics({"train/loss": 2.0}, step=1)
        part.covered(1)
        raise TakenOverError  # as after a kill there is no end
    whole = Tracker(settings, tmp_path)
    with whole.run("whole", None, CONFIG, TAGS) as run:
        run.finished_part(places["folder"])
    assert not whole.pending
    part.uri = whole.uri
    assert (status(part), points(part, "train/loss")) == ("FINISHED", [(1, 2.0)])
    assert part.client.get_run(part.run_id).data.tags["mlflow.parentRunId"] == whole.run_id
    lines = (places["folder"] / "run-0001" / "spool.jsonl").read_bytes()
    with whole.run("whole", whole.run_id, CONFIG, TAGS) as run:
        run.finished_part(places["folder"])
    assert (places["folder"] / "run-0001" / "spool.jsonl").read_bytes() == lines


def test_a_run_that_is_not_there_is_told(tracker: Tracker) -> None:
    words = rf"run {'0' * 32} of the checkpoint cannot be continued in sqlite:///.*; set tracking\.uri to where it was begun"
    with pytest.raises(TrackingError, match=words), tracker.run("x", "0" * 32, {}, TAGS):
        pass


def test_pictures_can_be_left_out(settings: TrackingSettings, tmp_path: Path) -> None:
    for asked, of_patients, drawn in ((False, False, False), (None, True, False), (None, False, True), (True, True, True)):
        tracker = Tracker(settings.model_copy(update={"log_images": asked}), tmp_path / "run", of_patients=of_patients)
        with tracker.run("pictures", None, {}, TAGS):
            tracker.image("val/reconstruction", np.zeros((4, 4, 3), np.uint8), 1)
        assert bool(tracker.client.list_artifacts(tracker.run_id)) is drawn


def test_files_and_data_are_logged(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("all is well")
    with tracker.run("files", None, {}, TAGS):
        tracker.artifact(tmp_path / "report.txt", "reports")
        for _ in range(2):
            tracker.dataset("mri", "f" * 64, "pretraining", {"tiles": "12"})
    assert [item.path for item in tracker.client.list_artifacts(tracker.run_id, "reports")] == ["reports/report.txt"]
    found = tracker.client.get_run(tracker.run_id).inputs.dataset_inputs
    assert [(item.dataset.name, item.dataset.digest) for item in found] == [("mri", "f" * 36)]
    assert "f" * 64 in found[0].dataset.source
    assert str(tmp_path) not in str(found)


def test_artifacts_of_a_local_store_lie_beside_it(tracker: Tracker) -> None:
    with tracker.run("place", None, {}, TAGS):
        pass
    beside = Path(tracker.uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert tracker.client.get_run(tracker.run_id).info.artifact_uri.startswith(beside.as_uri())


def test_the_user_is_not_named(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "anna-mustermann")
    with tracker.run("private", None, {}, TAGS):
        tracker.metrics({"train/loss": 1.0}, 1)
    found = tracker.client.get_run(tracker.run_id)
    assert found.data.tags["mlflow.user"].startswith("user-")
    assert "anna" not in str(found.to_dictionary())
    folder = Path(tracker.uri.removeprefix("sqlite:///")).parent
    assert not [path for path in folder.rglob("*") if path.is_file() and b"anna-mustermann" in path.read_bytes()]


def test_a_user_without_a_name_can_track(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    with tracker.run("container", None, {}, TAGS):
        pass
    assert status(tracker) == "FINISHED"


def test_the_address_of_one_job_is_not_that_of_the_next(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracker.run("first", None, {}, TAGS):
        assert "MLFLOW_TRACKING_URI" not in os.environ
    assert tracking_uri(TrackingSettings(), tmp_path / "other") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example")
    with tracker.run("second", None, {}, TAGS):
        assert os.environ["MLFLOW_TRACKING_URI"] == "https://tracking.example"


def test_it_says_nothing_of_its_own(tracker: Tracker, capfd: pytest.CaptureFixture[str]) -> None:
    with tracker.run("quiet", None, {}, TAGS):
        tracker.metrics({"train/loss": 1.0}, 1)
    out, errors = capfd.readouterr()
    assert (out, errors) == ("", "")


@pytest.mark.parametrize("uri", ["models:/nothing-here@champion", "models:/nothing-here/3"])
def test_a_model_that_is_not_there_is_told(settings: TrackingSettings, tmp_path: Path, uri: str) -> None:
    with pytest.raises(TrackingError, match=rf"{uri} is not in the registry at sqlite:///.*; see what is there with the MLflow UI"):
        fetch_model(uri, settings, tmp_path)


def test_processes_that_make_a_new_store_at_once_all_succeed(tmp_path: Path) -> None:
    """Without the lock, most of them fail on tables that another has just made. Forked behind the imports, which cost seconds each."""
    script = """
import os, sys
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from mae_core.tracking import Tracker, TrackingSettings

def work(number):
    tracker = Tracker(TrackingSettings(system_metrics=False), Path(sys.argv[1]) / str(number), say=print)
    with tracker.run("one", None, {"a": 1}, TAGS) as run:
        run.metrics({"loss": number}, 1)
    if run.pending:
        os._exit(1)

TAGS = {"source": "x"}
children = []
for number in range(8):
    child = os.fork()
    if child == 0:
        work(number)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "")
    client = Tracker(TrackingSettings(), tmp_path / "run").client
    (experiment,) = [found for found in client.search_experiments() if found.name == "terravox"]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted((run.info.status, run.data.metrics["loss"], run.data.params["a"]) for run in runs) == [
        ("FINISHED", float(number), "1") for number in range(8)
    ]


def test_nothing_is_told_to_anybody_whatever_the_environment_says(tmp_path: Path) -> None:
    """In a process of its own, since MLflow sends nothing where it sees pytest."""
    script = """
import socket, sys
tried = []

def refused(self, address):
    tried.append(address)
    raise ConnectionRefusedError(str(address))

socket.socket.connect = socket.socket.connect_ex = refused
from pathlib import Path
from mae_core.tracking import Tracker, TrackingSettings
with Tracker(TrackingSettings(system_metrics=False), Path(sys.argv[1])).run("quiet", None, {"a": 1}, {"source": "x"}) as run:
    run.metrics({"loss": 1.0}, 1)
from mlflow.telemetry.client import get_telemetry_client
from mlflow.telemetry.utils import is_telemetry_disabled
print(tried, get_telemetry_client(), is_telemetry_disabled())
"""
    signs = ("PYTEST", "CI", "GITHUB", "MLFLOW", "DO_NOT_TRACK")
    kept = {key: value for key, value in environment().items() if not key.startswith(signs)}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    env = {**kept, "MLFLOW_DISABLE_TELEMETRY": "false"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "[] None True\n", result.stderr
