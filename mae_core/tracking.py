"""MLflow: one run per job, written by rank 0 only, and the model registry. The home of mlflow."""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_serializer

from mae_core.export import Description
from mae_core.settings import Settings, flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"  # whatever was set: nothing is told to anybody
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

PARAMS_PER_CALL, METRIC_INTERVAL_S = 100, 10


class TrackingSettings(Settings):
    """Where runs and models are recorded."""

    uri: str | None = Field(None, description="MLflow tracking URI (default: MLFLOW_TRACKING_URI, else sqlite beside the run)")
    experiment: str = Field("terravox", min_length=1, description="MLflow experiment")
    log_images: bool | None = Field(
        None,
        description="Draw and log pictures (reconstructions, the sheet of a store, sheets of cases where these are asked for); null: of "
        "images, and not of patients, since a face can be rebuilt from a scan of a head",
    )
    system_metrics: bool = Field(True, description="Log processor, memory and GPU use")
    register_as: str | None = Field(None, description="Name in the model registry (default: terravox-MODALITY-KIND)")

    @field_serializer("uri", when_used="json")
    def _without_password(self, uri: str | None) -> str | None:
        """What is stored with a run never holds a password."""
        return None if uri is None else redacted(uri)


class TrackingError(RuntimeError):
    """The tracker or the registry cannot be used as asked."""


@dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    name: str
    version: int
    model_id: str

    @property
    def uri(self) -> str:
        """URI of exactly this version."""
        return f"models:/{self.name}/{self.version}"


def tracking_uri(settings: TrackingSettings, out: Path) -> str:
    """The settings' URI, else the environment's, else `sqlite:///…/mlflow.db` in the folder that holds the run."""
    given = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = given or f"sqlite:///{out.resolve().parent / 'mlflow.db'}"
    if "://" not in uri and not uri.startswith("sqlite:"):
        raise TrackingError(
            f"tracking.uri={uri}: a bare folder is no longer a tracking store; use sqlite:///PATH/mlflow.db or an http address"
        )
    return uri


def artifact_folder(settings: TrackingSettings, out: Path) -> Path | None:
    """The folder of this machine that the artifacts of a new experiment go to; None where a server keeps them."""
    uri = tracking_uri(settings, out)
    return Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" if uri.startswith("sqlite:///") else None


class Tracker:
    """One MLflow run. Every metric carries its step; a resumed job goes on in the run it began.

    Args:
        settings: Where, and what.
        out: Folder of the run.
        of_patients: Whether a picture can show a patient, so that there is none unless it is asked for.

    Raises:
        TrackingError: The tracking store cannot be used.
    """

    def __init__(self, settings: TrackingSettings, out: Path, *, of_patients: bool = True) -> None:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.settings = settings
        self.images = not of_patients if settings.log_images is None else settings.log_images
        self.uri = tracking_uri(settings, out)
        self.run_id = ""
        self._told: dict[str, int] = {}
        try:
            self.client = _client(self.uri)
            self._experiment = _experiment(self.client, self.uri, settings.experiment)
        except (MlflowException, SQLAlchemyError) as error:
            raise TrackingError(f"tracking.uri={redacted(self.uri)} cannot be used: {_reason(error, self.uri)}") from error

    @contextmanager
    def run(self, name: str, run_id: str | None, config: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[Tracker]:
        """The run, new or gone on with: FINISHED at the end, KILLED when interrupted, FAILED on any other exception.

        Inside another tracker's run it is a child of that run.

        Raises:
            TrackingError: `run_id` is given and this tracking store does not know it.
        """
        import mlflow
        from mlflow.exceptions import MlflowException

        _use(self.uri)
        mlflow.set_system_metrics_sampling_interval(METRIC_INTERVAL_S)
        hidden = {"mlflow.user": _pseudonym(), "mlflow.source.name": tags["source"]}
        try:
            started = mlflow.start_run(
                run_id=run_id,
                experiment_id=None if run_id else self._experiment,
                run_name=None if run_id else name,
                nested=mlflow.active_run() is not None,
                tags={**tags, **hidden},
                log_system_metrics=self.settings.system_metrics and mlflow.active_run() is None,
            )
        except MlflowException as error:
            if run_id is None:
                raise TrackingError(f"no run can be begun in {redacted(self.uri)}: {_reason(error, self.uri)}") from error
            raise TrackingError(
                f"run {run_id} of the checkpoint cannot be continued in {redacted(self.uri)}: {_reason(error, self.uri)}; "
                "set tracking.uri to where it was begun"
            ) from error
        self.run_id = started.info.run_id
        if run_id is None:
            self._log_config(config)
        else:
            self._told = self._last_steps(started.data.metrics)
        try:
            yield self
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            raise
        except BaseException as error:
            self.client.set_tag(self.run_id, "failure", type(error).__name__)
            mlflow.end_run("FAILED")
            raise
        mlflow.end_run("FINISHED")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step, in one call; what the run was told before it was killed is not told again."""
        import mlflow

        new = {key: float(value) for key, value in values.items() if step > self._told.get(key, -1)}
        if new:
            mlflow.log_metrics(new, step=step, run_id=self.run_id, synchronous=True)

    def covered(self, step: int) -> None:
        """A checkpoint of this step is on disk for good."""

    def image(self, key: str, picture: NDArray[np.uint8], step: int) -> None:
        """Log a picture at a step, if pictures are wanted."""
        if self.images and not self._has_image(key, step):
            self.client.log_image(self.run_id, picture, key=key, step=step, synchronous=True)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def table(self, file: str, columns: Mapping[str, Sequence[str]]) -> None:
        """Log a table as a JSON artifact of columns and rows, laid out as MLflow's own tables are."""
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.client.log_dict(self.run_id, {"columns": list(columns), "data": rows}, file)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        for key, value in values.items():
            self.client.set_tag(self.run_id, key, value)

    def dataset(self, name: str, digest: str, context: str, facts: Mapping[str, str]) -> None:
        """Log a tile store as the run's input by name and digest; no path is told."""
        import mlflow
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset

        source = CodeDatasetSource(tags={"terravox.store_digest": digest, **facts})
        mlflow.log_input(MetaDataset(source, name=name, digest=digest[:36]), context=context)

    def used_model(self, version: Registered) -> None:
        """Record a registered version as an input of the run."""
        from mlflow.entities import LoggedModelInput

        if version.model_id:
            self.client.log_inputs(self.run_id, models=[LoggedModelInput(model_id=version.model_id)])
        self.tags({"parent.model_version": version.uri})

    def register(self, folder: Path, description: Description, parent: Registered | None) -> Registered:
        """Log a model folder as a pyfunc model, register it and move the alias `candidate` to the new version.

        The logged model holds the folder, a short script that serves it and a copy of this package; no pickle.
        """
        import mlflow
        import torch
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        name = self.settings.register_as or f"terravox-{description.modality}-{description.kind}"
        shape = (-1, len(description.channels), *(-1 for _ in description.crop))
        out = (
            TensorSpec(np.dtype(np.int64), (-1, *shape[2:]))
            if description.kind == "segmenter"
            else TensorSpec(np.dtype(np.float32), (-1, -1, -1))
        )
        package = Path(__file__).parent
        use = {"intended_use": description.intended_use} if description.intended_use else {}
        _use(self.uri)
        info = mlflow.pyfunc.log_model(
            name=description.kind,
            python_model=str(package / "served_model.py"),
            artifacts={"model": str(folder)},
            signature=ModelSignature(Schema([TensorSpec(np.dtype(np.float32), shape)]), Schema([out])),
            input_example=np.zeros((1, len(description.channels), *description.crop), dtype=np.float32),
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", "numpy", "pydantic", "jaxtyping", "safetensors", "monai"],
            code_paths=[str(package)],
            metadata={"channels": list(description.channels), "units": "normalised: (physical - mean) / std", **description.lineage},
            tags={"kind": description.kind, "modality": description.modality, **use},
        )
        with redirect_stderr(io.StringIO()):  # MLflow prints here past its loggers; what fails is raised
            version = mlflow.register_model(info.model_uri, name)
        done = Registered(name, int(version.version), str(info.model_id))
        self.client.set_registered_model_alias(name, "candidate", str(done.version))
        if description.intended_use:
            self.client.update_registered_model(name, description.intended_use)
        for key, value in (description.lineage | use).items():
            self.client.set_model_version_tag(name, str(done.version), key, value)
        if parent is not None:
            self.used_model(parent)
        return done

    def _last_steps(self, keys: Iterable[str]) -> dict[str, int]:
        """Last step of each metric that is logged by step; MLflow counts the system's by itself."""
        own = [key for key in keys if not key.startswith("system/")]
        return {key: max(point.step for point in self.client.get_metric_history(self.run_id, key)) for key in own}

    def _has_image(self, key: str, step: int) -> bool:
        """Whether the run got this picture before it was killed."""
        start = f"images/{key.replace('/', '~')}+step+{step}+"
        return bool(self._told) and any(item.path.startswith(start) for item in self.client.list_artifacts(self.run_id, "images"))

    def _log_config(self, config: Mapping[str, Any]) -> None:
        flat = {key: str(value)[:6000] for key, value in flatten(config).items()}
        items = list(flat.items())
        import mlflow

        for start in range(0, len(items), PARAMS_PER_CALL):
            mlflow.log_params(dict(items[start : start + PARAMS_PER_CALL]))


def fetch_model(uri: str, settings: TrackingSettings, out: Path) -> tuple[Path, Registered]:
    """Model folder of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, fetched from the registry, and which version it is.

    Raises:
        TrackingError: The registry does not know it.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    store = tracking_uri(settings, out)
    client = _client(store)
    _use(store)
    name, _, alias = uri.removeprefix("models:/").partition("@")
    try:
        if alias:
            found = client.get_model_version_by_alias(name, alias)
        else:
            name, _, version = name.partition("/")
            found = client.get_model_version(name, version)
        folder = Path(download_artifacts(f"models:/{name}/{found.version}", tracking_uri=store))
    except MlflowException as error:
        raise TrackingError(
            f"{uri} is not in the registry at {redacted(store)}: {_reason(error, store)}; see what is there with the MLflow UI"
        ) from error
    model_id = str(found.model_id or found.source.rpartition("/")[2])
    return folder / "artifacts" / "model", Registered(name, int(found.version), model_id)


def redacted(uri: str) -> str:
    """A URI without user and password."""
    head, _, tail = uri.rpartition("@")
    return f"{head.partition('://')[0]}://…@{tail}" if head else uri


def _use(uri: str) -> None:
    """Make `mlflow.log_…` write to a tracking store; the environment, by which MLflow would tell it to the next job, stays as it is."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    if before is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


def _reason(error: Exception, uri: str) -> str:
    """What MLflow says, on one line and without user and password."""
    return " ".join(str(error).split()).replace(uri.rstrip("/"), redacted(uri.rstrip("/")))


def _client(uri: str) -> MlflowClient:
    """A client; the schema of a new database is made under a lock, once, before anyone else opens it."""
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
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


def _pseudonym() -> str:
    """A name that tells users apart and does not name them."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    return "user-" + hashlib.blake2b(user.encode(), digest_size=4).hexdigest()
