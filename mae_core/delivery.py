"""Lines of a spool as calls to MLflow, each of which may be made twice and counts once."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mae_core.publisher import RefusedError, UnusableError
from mae_core.spool import Entry, Progress, Record, Spool, progress_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

SPOOL_TAG = "terravox.spool"
PARAMS_PER_CALL = 100
TIMEOUT_S, UPLOAD_TIMEOUT_S = 10, 120
NEVER = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
"""Answers that stay the same however often one asks."""
NOT_HERE = ("RESOURCE_DOES_NOT_EXIST", "ENDPOINT_NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", *NEVER)
"""Answers that say, when a run is begun, that address or rights are wrong."""


@dataclass
class Delivery:
    """Tells a spool to a tracking store of MLflow.

    Attributes:
        uri: Of the store, password included.
        spool: Whose lines these are.
        progress: How far they are told; notes of what MLflow made go there.
    """

    uri: str
    spool: Spool
    progress: Progress

    def __post_init__(self) -> None:
        self._client: MlflowClient | None = None

    def send(self, entries: Sequence[Entry]) -> None:
        """Tell lines, all of metrics or a single one."""
        from mlflow.exceptions import MlflowException

        first = entries[0].record
        try:
            if first["kind"] == "metrics":
                self._metrics([entry.record for entry in entries])
            else:
                self._one(entries[0])
        except MlflowException as error:
            if first["kind"] in ("begin", "attempt"):
                raise self._unusable(error, first) from error
            if error.error_code in NEVER:
                raise RefusedError(error.error_code) from error
            raise
        except (FileNotFoundError, ValueError, TypeError) as error:
            if first["kind"] in ("begin", "attempt"):
                raise
            raise RefusedError(type(error).__name__) from error
        except PermissionError as error:  # the folder of the artifacts; rows need not wait behind a picture
            if first["kind"] not in ("image", "artifact", "table"):
                raise
            raise RefusedError("no right to write where the store keeps its artifacts") from error

    def forget(self, entry: Entry) -> None:
        """Delete the file that was kept for a line."""
        if entry.record["kind"] in ("image", "artifact"):
            (self.spool.base / entry.record["file"]).unlink(missing_ok=True)

    def why(self, error: Exception) -> str:
        """What is wrong, in a few words without names, paths and passwords."""
        words = str(error)
        for sign, meaning in (
            ("timed out", "no answer in time"),
            ("Timeout", "no answer in time"),
            ("refused", "connection refused"),
            ("resolve", "host not found"),
            ("locked", "database is locked"),
        ):
            if sign in words:
                return f"{meaning}: {redacted(self.uri)}"
        return f"{getattr(error, 'error_code', type(error).__name__)}: {redacted(self.uri)}"

    def _one(self, entry: Entry) -> None:
        record = entry.record
        tell = {
            "begin": self._begin,
            "attempt": self._attempt,
            "image": self._image,
            "artifact": self._artifact,
            "table": self._table,
            "tags": self._tags,
            "dataset": self._dataset,
            "used_model": self._used_model,
            "end": self._end,
        }.get(record["kind"])
        if tell is not None:
            tell(record)
        elif record["kind"] == "register":
            self._register(entry)
        else:
            raise RefusedError("no kind of record that this version knows")

    @property
    def client(self) -> MlflowClient:
        """Of the store; made when it is first asked for."""
        if self._client is None:
            self._client = connect(self.uri)
        return self._client

    @property
    def _run(self) -> str:
        return self.progress.run_id

    def _begin(self, record: Record) -> None:
        """Find the run or make it, once; its settings."""
        if not self.progress.experiment_id:
            self.progress.experiment_id = experiment(self.client, self.uri, record["experiment"])
        if record["run_id"]:
            self._adopt(record["run_id"])
            return
        if not self._run:
            parent = self._parent(record)
            found = self.client.search_runs([self.progress.experiment_id], f"tags.`{SPOOL_TAG}` = '{record['key']}'", max_results=1)
            tags = {**record["tags"], SPOOL_TAG: record["key"], **({"mlflow.parentRunId": parent} if parent else {})}
            made = found[0] if found else self.client.create_run(self.progress.experiment_id, record["time_ms"], tags, record["name"])
            self.progress.run_id, self.progress.uri = made.info.run_id, redacted(self.uri)
            self.progress.save()
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in record["params"].items()]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self.client.log_batch(self._run, params=params[start : start + PARAMS_PER_CALL], synchronous=True)

    def _adopt(self, run_id: str) -> None:
        """Go on in a run that was begun without a spool; what it was told then is not told again."""
        found = self.client.get_run(run_id)
        own = [key for key in found.data.metrics if not key.startswith("system/")]
        self.progress.before = {key: max(point.step for point in self.client.get_metric_history(run_id, key)) for key in own}
        self.progress.run_id, self.progress.uri = run_id, redacted(self.uri)
        self.progress.experiment_id = found.info.experiment_id
        self.progress.save()

    def _parent(self, record: Record) -> str:
        """Id of the run that this one is a child of; empty if it is none, or its folder is gone."""
        if not record["parent"] or not (self.spool.base / record["parent"]).is_dir():
            return ""
        found = progress_of(Spool(self.spool.base / record["parent"])).run_id
        if not found:
            raise ConnectionError("the run that this one is a part of is not told yet")
        return found

    def _attempt(self, record: Record) -> None:
        """The run is running, again."""
        if record["number"] > 1:
            before = self.client.get_run(self._run).data.tags
            for key in ("failure", "failure_step"):
                if key in before:
                    self.client.delete_tag(self._run, key)
            self.client.update_run(self._run, status="RUNNING")
        self._set(record["tags"])

    def _tags(self, record: Record) -> None:
        self._set(record["values"])

    def _set(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            self.client.log_batch(self._run, tags=[RunTag(key, str(value)) for key, value in tags.items()], synchronous=True)

    def _artifact(self, record: Record) -> None:
        source = self.spool.base / record["file"]
        with patient():
            self.client.log_artifact(self._run, str(source), record["folder"])

    def _table(self, record: Record) -> None:
        self.client.log_dict(self._run, record["content"], record["file"])

    def _register(self, entry: Entry) -> None:
        from mae_core.registration import register

        with patient():
            register(self.client, self.uri, self.spool, self.progress, entry)
        if entry.record["parent"] is not None:
            self._used_model(entry.record["parent"])

    def _end(self, record: Record) -> None:
        self._set(record["tags"])
        self.client.set_terminated(self._run, status=record["status"], end_time=record["time_ms"])

    def _metrics(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        before = self.progress.before
        points = [
            Metric(key, value, record["time_ms"], record["step"])
            for record in records
            for key, value in record["values"].items()
            if record["step"] > before.get(key, -1)
        ]
        if points:
            self.client.log_batch(self._run, metrics=points, synchronous=True)

    def _image(self, record: Record) -> None:
        """A picture under the names that MLflow's own `log_image` gives, but always the same ones, so that twice is once."""
        from mlflow.tracking.multimedia import compress_image_size, convert_to_pil_image

        key, step, source = record["key"].replace("/", "~"), record["step"], self.spool.base / record["file"]
        begin = f"{key}+step+{step}+"
        if self.progress.before and any(f"/{begin}" in item.path for item in self.client.list_artifacts(self._run, "images")):
            return
        with np.load(source) as content:
            picture = convert_to_pil_image(content["picture"])
        number = uuid.uuid5(uuid.NAMESPACE_OID, f"{self._run} {record['key']} {step}")
        name = f"{begin}timestamp+{record['time_ms']}+{number}"
        with tempfile.TemporaryDirectory() as folder, patient():
            picture.save(Path(folder) / f"{name}.png")
            compress_image_size(picture).save(Path(folder) / f"{name}+compressed.webp")
            self.client.log_artifacts(self._run, folder, "images")
        self.client.set_tag(self._run, "mlflow.loggedImages", "True")

    def _dataset(self, record: Record) -> None:
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        source = CodeDatasetSource(tags={"terravox.store_digest": record["digest"], **record["facts"]})
        data = MetaDataset(source, name=record["name"], digest=record["digest"][:36])._to_mlflow_entity()  # noqa: SLF001  no public way
        tags = [InputTag("mlflow.data.context", record["context"])]
        self.client.log_inputs(self._run, datasets=[DatasetInput(data, tags)])

    def _used_model(self, record: Record) -> None:
        from mlflow.entities import LoggedModelInput

        known = self.client.get_run(self._run).inputs.model_inputs
        if record["model_id"] and record["model_id"] not in [item.model_id for item in known]:
            self.client.log_inputs(self._run, models=[LoggedModelInput(model_id=record["model_id"])])
        self._set({"parent.model_version": record["uri"]})

    def _unusable(self, error: Exception, record: Record) -> Exception:
        """What an error at the start of a run means: the error itself where waiting may help."""
        code = str(getattr(error, "error_code", ""))
        known = record.get("run_id") or self._run
        if known and code == "RESOURCE_DOES_NOT_EXIST":
            return UnusableError(
                f"run {known} of the checkpoint cannot be continued in {redacted(self.uri)}: {reason(error, self.uri)}; "
                "set tracking.uri to where it was begun"
            )
        if code in NOT_HERE and not known:
            return UnusableError(f"no run can be begun in {redacted(self.uri)}: {reason(error, self.uri)}")
        return error


def connect(uri: str) -> MlflowClient:
    """A client that fails soon; the schema of a new database is made under a lock, once, before anyone else opens it.

    Raises:
        UnusableError: A local database cannot be used.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # we tell it ourselves, once
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        if not uri.startswith("sqlite:///"):
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
        database = Path(uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        with database.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
            return client
    except (MlflowException, SQLAlchemyError, OSError) as error:
        if "locked" in str(error):
            raise
        raise UnusableError(f"tracking.uri={redacted(uri)} cannot be used: {reason(error, uri)}") from error


def experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment's id; a new one of a local database keeps its artifacts beside the database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        place = None
        if uri.startswith("sqlite:///"):
            place = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


@contextmanager
def patient() -> Iterator[None]:
    """Time for an upload: what a server does with a large file before it answers takes longer than other calls."""
    before = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(int(before), UPLOAD_TIMEOUT_S))
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before


def redacted(uri: str) -> str:
    """A URI without user and password."""
    head, _, tail = uri.rpartition("@")
    return f"{head.partition('://')[0]}://…@{tail}" if head else uri


def reason(error: Exception, uri: str) -> str:
    """What MLflow says, on one line and without user and password."""
    return " ".join(str(error).split()).replace(uri.rstrip("/"), redacted(uri.rstrip("/")))
