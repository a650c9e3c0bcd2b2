"""`terravox sync` finishes what a run began: recorded, registered and noted in its result, once, whatever interrupts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from mae_core.spool import progress_of, spools_in
from pipelines import pretrain, sync
from tests.tiny_runs import arguments, quick, shared_store, shared_tracking

__all__ = ["quick"]
NAME = "terravox-raster-encoder"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shared_tracking(tmp_path_factory)


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")


def state(client: MlflowClient) -> tuple[str, int]:
    """Version of the alias and number of versions."""
    try:
        return str(client.get_registered_model(NAME).aliases.get("candidate", "")), len(client.search_model_versions(f"name = '{NAME}'"))
    except mlflow.exceptions.MlflowException:
        return "", 0


def test_a_run_of_an_offline_machine_is_recorded_registered_and_noted(
    uri: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, short = tmp_path / "run", {"train__steps": 2, "train__eval_steps": 2, "train__checkpoint_steps": 1}
    assert pretrain.main(arguments(shared_store(tmp_path_factory), out, "offline", **short)) == 0
    said = capsys.readouterr().out
    assert f"run: terravox sync {out}" in said
    before: dict[str, Any] = json.loads((out / "result.json").read_text())
    assert before["mlflow"] == {"uri": "offline", "run_id": before["mlflow"]["run_id"], "pending": True}
    assert sync.main([str(out)]) == 1, "it was not said where to"
    assert "was recorded offline; say where it is to go: tracking.uri=ADDRESS" in capsys.readouterr().err

    client = MlflowClient(uri)
    alias, versions = state(client)
    words = [str(out), f"tracking.uri={uri}"]
    for call in ("mlflow.models.model.Model.log", "mlflow.register_model", "mlflow.MlflowClient.set_registered_model_alias"):
        with monkeypatch.context() as patch:
            patch.setattr(call, cut_off)
            assert sync.main(words) == 1
        assert "run the same command again" in capsys.readouterr().out
        assert state(client)[0] == alias, "the alias moves last"
        assert json.loads((out / "result.json").read_text())["mlflow"]["pending"] is True
    assert sync.main(words) == 0
    assert state(client) == (str(versions + 1) if not alias else str(int(alias) + 1), versions + 1)

    after = json.loads((out / "result.json").read_text())
    version = client.get_model_version_by_alias(NAME, "candidate")
    assert {**before, "mlflow": after["mlflow"]} == after
    assert after["mlflow"] == {
        "uri": uri,
        "run_id": version.run_id,
        "model": f"models:/{NAME}/{version.version}",
        "model_id": after["mlflow"]["model_id"],
        "alias": f"models:/{NAME}@candidate",
    }
    run = client.get_run(version.run_id)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", before["figures"]["train/loss"])
    assert [item.model_id for item in run.outputs.model_outputs] == [after["mlflow"]["model_id"]]
    assert version.tags["pretraining_run"] == run.data.tags["terravox.spool"] == before["mlflow"]["run_id"], "the name it had offline"
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    assert sync.main(words) == 0
    assert state(client)[1] == versions + 1
    assert written == {path: path.stat().st_mtime_ns for path in written}, "nothing is left to do"
    (spool,) = spools_in(out / "tracking")
    assert progress_of(spool).offset == spool.size()


def cut_off(*_: object, **__: object) -> None:
    raise ConnectionError("the cable was pulled")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "runs"),
        (["nothing-here"], 1, "nothing-here is not the folder of a run"),
        (["."], 1, "holds nothing that was to be tracked (no tracking/run-…); give the folder of a run"),
    ],
)
def test_what_is_no_run_is_told(
    words: list[str], code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sync.main(words) == code
    assert told in capsys.readouterr().err


def test_a_password_is_asked_for_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "tracking" / "run-0001"
    folder.mkdir(parents=True)
    (folder / "spool.jsonl").write_text(json.dumps({"kind": "begin", "uri": "https://…@host", "parent": None}) + "\n")
    assert sync.main([str(tmp_path / "run")]) == 1
    assert "the password of https://…@host is kept nowhere; give tracking.uri=ADDRESS, or MLFLOW_TRACKING_URI" in capsys.readouterr().err
