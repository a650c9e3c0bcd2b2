"""What a tracking server does is no matter of the training; told later, a run is the one that a quiet day would have given."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from mae_core.publisher import Publisher
from mae_core.spool import Spool, progress_of, spools_in
from mae_core.stopping import Stopped
from mae_core.tracking import Tracker, TrackingSettings
from pipelines.sync import main as sync
from tests.tiny_runs import ROOT, environment, quick, shared_tracking

__all__ = ["quick"]
PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
CONFIG = {"train": {"steps": 4, "betas": [0.9, 0.95]}, **{f"setting_{number}": number for number in range(120)}}
PASSING = ("attempt", "failure", "job", "resumed_from_step", "mlflow.loggedImages")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("mae_core.tracking.QUIET_WAIT_S", 0.3)
    monkeypatch.setattr("mae_core.publisher.INTERVAL_S", 0.05)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shared_tracking(tmp_path_factory)


@pytest.fixture(scope="module")
def quiet(uri: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that MLflow knows of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    tracker = tell(out, uri)
    assert not tracker.pending
    return everything(uri, tracker.run_id)


def tell(out: Path, uri: str, first: int = 1, last: int = 4, *, run_id: str | None = None, cut: BaseException | None = None) -> Tracker:
    """A run that reports every step, draws every second one and is saved at every third and last; cut off behind a step if wished."""
    settings = TrackingSettings(uri=uri, system_metrics=False, wait_s=60)
    tracker = Tracker(settings, out, of_patients=False, say=SAID.append)
    with tracker.run("run", run_id, CONFIG, {"source": "pipelines/pretrain.py"}, step=first - 1):
        tracker.dataset("raster", "d" * 64, "pretraining", {"tiles": "12"})
        for step in range(first, last + 1):
            tracker.metrics({"train/loss": 1 / step, "val/skill": float("nan")}, step)
            if step % 2 == 0:
                tracker.image("val/reconstruction", PICTURE, step)
            if step % 3 == 0 or step == 4:
                tracker.covered(step)
        if cut is not None:
            raise cut
        tracker.table("cases.json", {"case": ["a", "b"], "dice": ["0.5", "0.6"]})
    return tracker


SAID: list[str] = []


def everything(uri: str, run_id: str) -> dict[str, Any]:
    """What MLflow has of a run, without ids, times and the tags of its attempts."""
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    tags = {name: value for name, value in run.data.tags.items() if not name.startswith(("terravox.spool", *PASSING))}
    rows = {
        key: [(point.step, np.float64(point.value).tobytes()) for point in client.get_metric_history(run_id, key)]
        for key in run.data.metrics
    }
    files = [item.path for item in client.list_artifacts(run_id)] + [item.path for item in client.list_artifacts(run_id, "images")]
    return {
        "status": run.info.status,
        "params": run.data.params,
        "tags": tags,
        "rows": rows,
        "files": sorted(re.sub(r"timestamp\+\d+\+[0-9a-f-]+", "", path) for path in files),
        "datasets": [(item.dataset.name, item.dataset.digest, item.dataset.source) for item in run.inputs.dataset_inputs],
    }


def runs_of(uri: str, spool: Spool) -> list[str]:
    """Ids of the runs that carry a spool's key."""
    client, key = MlflowClient(uri), spool.known().key
    experiment = client.get_experiment_by_name("terravox")
    assert experiment is not None
    return [run.info.run_id for run in client.search_runs([experiment.experiment_id], f"tags.`terravox.spool` = '{key}'")]


@contextmanager
def server(status: int, delay_s: float = 0.0) -> Iterator[str]:
    """Address of a server that answers everything in one way."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            over.wait(delay_s)
            self.send_response(status)
            self.end_headers()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    stub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=stub.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{stub.server_address[1]}"
    finally:
        over.set()
        stub.shutdown()
        thread.join()
        stub.server_close()


@pytest.mark.parametrize("fault", ["down", "errors", "silent", "offline"])
def test_through_an_outage_a_run_goes_on_and_is_told_later_as_it_was(
    fault: str, uri: str, quiet: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SAID.clear()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with server(500 if fault == "errors" else 200, 30 if fault == "silent" else 0) as address:
        tracker = tell(tmp_path / "run", {"down": "http://127.0.0.1:9", "offline": "offline"}.get(fault, address))
    (spool,) = spools_in(tmp_path / "run" / "tracking")
    assert tracker.pending
    assert tracker.facts()["pending"] is True
    assert tracker.run_id == spool.known().key, "there is no other name yet"
    assert len([line for line in SAID if "tracking is lost" in line]) == (fault != "offline"), SAID

    for _ in range(2):
        assert sync([str(tmp_path / "run"), f"tracking.uri={uri}"]) == 0, capsys.readouterr()
    (run_id,) = runs_of(uri, spool)
    assert everything(uri, run_id) == quiet
    lines = [record for record, _ in spool.read()]
    info = MlflowClient(uri).get_run(run_id).info
    assert (info.start_time, info.end_time) == (lines[0]["time_ms"], lines[-1]["time_ms"])
    points = MlflowClient(uri).get_metric_history(run_id, "train/loss")
    assert [point.timestamp for point in points] == [line["time_ms"] for line in lines if line["kind"] == "metrics"]
    assert list((spool.folder / "files").iterdir()) == [], "pictures stay no longer than they must"


def test_whoever_forgets_how_far_it_came_tells_all_again_and_nothing_is_there_twice(
    uri: str, quiet: dict[str, Any], tmp_path: Path
) -> None:
    tracker = tell(tmp_path / "run", uri)
    (spool,) = spools_in(tmp_path / "run" / "tracking")
    kept = progress_of(spool)
    half = [end for _, end in spool.read()][4]
    for offset, run_id in ((half, tracker.run_id), (0, "")):
        kept.offset, kept.run_id = offset, run_id
        kept.save()
        assert sync([str(tmp_path / "run"), f"tracking.uri={uri}"]) == 0
        assert runs_of(uri, spool) == [tracker.run_id]
        assert everything(uri, tracker.run_id) == quiet


def test_killed_in_the_middle_of_telling_it_is_told_once(uri: str, quiet: dict[str, Any], tmp_path: Path) -> None:
    tell(tmp_path / "run", "offline")
    (spool,) = spools_in(tmp_path / "run" / "tracking")
    script = "import sys, time; import mae_core.delivery as d; send = d.Delivery.send; "
    script += "d.Delivery.send = lambda self, entries: (send(self, entries), time.sleep(0.2))[0]; "
    script += "from pipelines.sync import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, str(tmp_path / "run"), f"tracking.uri={uri}"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        patience = time.monotonic() + 120
        while progress_of(spool).offset < spool.size() // 2 and job.poll() is None and time.monotonic() < patience:
            time.sleep(0.005)
        assert sync([str(tmp_path / "run"), f"tracking.uri={uri}"]) == 1, "two at once: the second leaves it alone"
        job.kill()
        said = job.communicate()[0].decode()
    assert job.returncode == -signal.SIGKILL, said
    assert progress_of(spool).offset < spool.size()
    assert sync([str(tmp_path / "run"), f"tracking.uri={uri}"]) == 0
    (run_id,) = runs_of(uri, spool)
    assert everything(uri, run_id) == quiet


@pytest.mark.parametrize(
    ("cut", "status", "told"),
    [(ValueError("anna"), "FAILED", [1, 2]), (Stopped("SIGTERM"), "KILLED", [1, 2]), (KeyboardInterrupt(), "KILLED", [1, 2])],
)
def test_cut_off_and_gone_on_with_it_is_one_run_with_one_row_a_step(
    cut: BaseException, status: str, told: list[int], uri: str, quiet: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with pytest.raises(type(cut)):
        tell(tmp_path / "run", uri, 1, 2, cut=cut)
    (spool,) = spools_in(tmp_path / "run" / "tracking")
    (run_id,) = runs_of(uri, spool)
    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == status
    assert [step for step, _ in everything(uri, run_id)["rows"]["train/loss"]] == told, "all that is known is told"
    assert (run.data.tags.get("failure"), run.data.tags.get("failure_step")) == (
        ("ValueError", "2") if status == "FAILED" else (None, None)
    )
    assert "anna" not in str(run.to_dictionary())

    monkeypatch.delenv("SLURM_JOB_ID")
    again = tell(tmp_path / "run", uri, 1, 4, run_id=run_id)
    assert again.run_id == run_id
    assert everything(uri, run_id) == quiet
    tags = MlflowClient(uri).get_run(run_id).data.tags
    assert {name: tags.get(name) for name in ("attempt", "attempt.1", "attempt.2", "failure", "resumed_from_step")} == {
        "attempt": "2",
        "attempt.1": "from step 0, slurm 4711",
        "attempt.2": "from step 0",
        "failure": None,
        "resumed_from_step": "0",
    }


def test_a_step_that_no_checkpoint_covers_is_not_published_yet(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(TrackingSettings(uri=uri, system_metrics=False), tmp_path / "run")
    with tracker.run("gate", None, {}, {"source": "x"}, step=0):
        for step in (1, 2, 3):
            tracker.metrics({"train/loss": float(step)}, step)
        publisher = tracker._publisher
        assert publisher is not None
        assert publisher.drain(60)
        assert "train/loss" not in everything(uri, tracker.run_id)["rows"]
        tracker.covered(2)
        assert publisher.drain(60)
        assert [step for step, _ in everything(uri, tracker.run_id)["rows"]["train/loss"]] == [1, 2]
    assert [step for step, _ in everything(uri, tracker.run_id)["rows"]["train/loss"]] == [1, 2, 3]


def test_parts_of_a_run_are_its_children_when_they_are_told_later(uri: str, tmp_path: Path) -> None:
    settings = TrackingSettings(uri="offline", system_metrics=False)
    out = tmp_path / "fine"
    with Tracker(settings, out).run("whole", None, {}, {"source": "x"}) as whole:
        for arm in ("pretrained-seed0", "scratch-seed0"):
            with Tracker(settings, out, folder=out / arm / "tracking").run(arm, None, {"arm": arm}, {"source": "x"}, step=0) as part:
                part.metrics({"train/loss": 1.0}, 1)
        whole.metrics({"held_out/dice": 0.5}, 0)
    assert sync([str(out), f"tracking.uri={uri}"]) == 0
    (run_id,) = runs_of(uri, spools_in(out / "tracking")[0])
    for arm in ("pretrained-seed0", "scratch-seed0"):
        (spool,) = spools_in(out / arm / "tracking")
        (child,) = runs_of(uri, spool)
        found = MlflowClient(uri).get_run(child)
        assert (found.info.run_name, found.data.tags["mlflow.parentRunId"], found.info.status) == (arm, run_id, "FINISHED")


def test_what_is_refused_for_ever_is_left_out_told_and_holds_nothing_up(uri: str, tmp_path: Path) -> None:
    SAID.clear()
    tracker = Tracker(TrackingSettings(uri=uri, system_metrics=False), tmp_path / "run", say=SAID.append)
    with tracker.run("refused", None, {}, {"source": "x"}):
        tracker.metrics({"good": 1.0}, 1)
        tracker.metrics({"bad*name": 1.0}, 1)
        tracker.metrics({"good": 2.0}, 2)
    assert not tracker.pending
    assert [step for step, _ in everything(uri, tracker.run_id)["rows"]["good"]] == [1, 2]
    assert tracker.facts()["refused"] == ["metrics: INVALID_PARAMETER_VALUE"]
    assert len(SAID) == 1
    assert "refuses a record" in SAID[0]


def test_rows_do_not_wait_behind_a_file_that_may_not_be_put_where_the_artifacts_lie(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(client: MlflowClient, *_: object) -> None:
        raise PermissionError(13, "Permission denied", "/nowhere")

    monkeypatch.setattr(MlflowClient, "log_artifact", denied)
    (tmp_path / "file.txt").write_text("x")
    tracker = Tracker(TrackingSettings(uri=uri, system_metrics=False), tmp_path / "run")
    with tracker.run("denied", None, {}, {"source": "x"}):
        tracker.artifact(tmp_path / "file.txt")
        tracker.metrics({"good": 1.0}, 1)
    assert not tracker.pending
    assert tracker.facts()["refused"] == ["artifact: no right to write where the store keeps its artifacts"]
    assert [step for step, _ in everything(uri, tracker.run_id)["rows"]["good"]] == [1]


def test_a_publisher_is_told_of_nothing_by_a_run_without_lines(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "tracking" / "run-0001")
    spool.folder.mkdir(parents=True)
    spool.open()
    publisher = Publisher(spool, lambda progress: pytest.fail("no store is asked"), SAID.append)
    publisher.publish()
    publisher.release()
    assert not publisher.pending
