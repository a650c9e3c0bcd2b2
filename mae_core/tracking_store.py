"""Where runs and models are recorded: the settings, the address, and the models that come from there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_serializer

from mae_core.delivery import connect, reason, redacted
from mae_core.file_systems import is_network, kind_of
from mae_core.publisher import UnusableError
from mae_core.registration import use_store
from mae_core.settings import Settings

OFFLINE = "offline"
"""The address that stands for no store."""


class TrackingSettings(Settings):
    """Where runs and models are recorded."""

    uri: str | None = Field(
        None,
        description="MLflow tracking URI, or offline: only in the run's folder, until terravox sync tells it "
        "(default: MLFLOW_TRACKING_URI, else sqlite beside the run)",
    )
    experiment: str = Field("terravox", min_length=1, description="MLflow experiment")
    log_images: bool | None = Field(
        None,
        description="Draw and log pictures (reconstructions, the sheet of a store, sheets of cases where these are asked for); null: of "
        "images, and not of patients, since a face can be rebuilt from a scan of a head",
    )
    system_metrics: bool = Field(True, description="Log processor, memory and GPU use")
    register_as: str | None = Field(None, description="Name in the model registry (default: terravox-MODALITY-KIND)")
    wait_s: int = Field(
        300, ge=0, description="Most seconds that the end of a run waits for a slow tracking store; what is left then is for terravox sync"
    )

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
    """The settings' URI, else the environment's, else `sqlite:///…/mlflow.db` in the folder that holds the run; or `offline`.

    Raises:
        TrackingError: It is a bare folder, or a database on a network file system.
    """
    given = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = given or f"sqlite:///{out.resolve().parent / 'mlflow.db'}"
    if uri == OFFLINE:
        return uri
    if "://" not in uri and not uri.startswith("sqlite:"):
        raise TrackingError(
            f"tracking.uri={uri}: a bare folder is no longer a tracking store; use sqlite:///PATH/mlflow.db or an http address"
        )
    if uri.startswith("sqlite:///") and is_network(kind := kind_of(Path(uri.removeprefix("sqlite:///")))):
        raise TrackingError(
            f"tracking.uri={uri} lies on a network file system ({kind}), whose locks SQLite cannot trust, so that two jobs can destroy it; "
            "give an http address or a path on a local disk, or tracking.uri=offline and run terravox sync later"
        )
    return uri


def artifact_folder(settings: TrackingSettings, out: Path) -> Path | None:
    """The folder of this machine that the artifacts of a new experiment go to; None where a server keeps them."""
    uri = tracking_uri(settings, out)
    return Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" if uri.startswith("sqlite:///") else None


def fetch_model(uri: str, settings: TrackingSettings, out: Path) -> tuple[Path, Registered]:
    """Model folder of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, fetched from the registry, and which version it is.

    Raises:
        TrackingError: The registry does not know it.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    store = tracking_uri(settings, out)
    if store == OFFLINE:
        raise TrackingError(f"{uri} is in a registry and tracking.uri=offline reaches none; give the folder of a run or a model")
    name, _, alias = uri.removeprefix("models:/").partition("@")
    try:
        client = connect(store)
        use_store(store)
        if alias:
            found = client.get_model_version_by_alias(name, alias)
        else:
            name, _, version = name.partition("/")
            found = client.get_model_version(name, version)
        folder = Path(download_artifacts(f"models:/{name}/{found.version}", tracking_uri=store))
    except UnusableError as error:
        raise TrackingError(str(error)) from error
    except MlflowException as error:
        raise TrackingError(
            f"{uri} is not in the registry at {redacted(store)}: {reason(error, store)}; see what is there with the MLflow UI"
        ) from error
    model_id = str(found.model_id or found.source.rpartition("/")[2])
    return folder / "artifacts" / "model", Registered(name, int(found.version), model_id)
