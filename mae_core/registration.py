"""A model folder becomes a version in MLflow's registry, whatever interrupts it and however often it is begun again."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mae_core.export import WEIGHTS, Description, load_description
from mae_core.publisher import RefusedError
from mae_core.sealed import sha256
from mae_core.spool import Entry, Progress, Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

SOURCE_TAG = "terravox.source"


def register(client: MlflowClient, uri: str, spool: Spool, progress: Progress, entry: Entry) -> None:
    """Log the model folder that a line names, register it and move the alias `candidate` to the new version, last of all.

    The logged model holds the folder, a short script that serves it and a copy of this package; no pickle. Each thing that MLflow makes
    carries the name of the line, so that it is found again after a kill.

    Raises:
        RefusedError: The folder is not what it was.
    """
    record, number = entry.record, str(entry.end)
    source = f"{record['key']}/{number}"
    folder = spool.base / record["folder"]
    about = load_description(folder, record["model_kind"])
    if sha256(folder / WEIGHTS) != record["digest"]:
        raise RefusedError("the model folder holds other weights than when it was handed over")
    notes = progress.models.setdefault(number, {})
    if "model_id" not in notes:
        notes["model_id"] = _logged(client, uri, progress, source, folder, about)
        progress.save()
    name = record["name"]
    if "version" not in notes:
        notes["name"], notes["version"] = name, _version(client, name, source, notes["model_id"], progress.run_id)
        progress.save()
    version = notes["version"]
    if about.intended_use:
        client.update_registered_model(name, about.intended_use)
    use = {"intended_use": about.intended_use} if about.intended_use else {}
    for key, value in (about.lineage | use).items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_alias(name, "candidate", version)


def _logged(client: MlflowClient, uri: str, progress: Progress, source: str, folder: Path, about: Description) -> str:
    """Id of the logged model of a line; made, or filled again where filling it was cut off."""
    import mlflow
    import torch
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    use = {"intended_use": about.intended_use} if about.intended_use else {}
    tags = {"kind": about.kind, "modality": about.modality, **use, SOURCE_TAG: source}
    found = client.search_logged_models([progress.experiment_id], f"tags.`{SOURCE_TAG}` = '{source}'", max_results=1)
    params = client.get_run(progress.run_id).data.params
    model = found[0] if found else client.create_logged_model(progress.experiment_id, about.kind, progress.run_id, tags, params)
    if model.status == "READY":
        return str(model.model_id)
    shape = (-1, len(about.channels), *(-1 for _ in about.crop))
    out = TensorSpec(np.dtype(np.int64), (-1, *shape[2:])) if about.kind == "segmenter" else TensorSpec(np.dtype(np.float32), (-1, -1, -1))
    package = Path(__file__).parent
    use_store(uri)
    mlflow.pyfunc.log_model(
        name=about.kind,
        model_id=model.model_id,
        python_model=str(package / "served_model.py"),
        artifacts={"model": str(folder)},
        signature=ModelSignature(Schema([TensorSpec(np.dtype(np.float32), shape)]), Schema([out])),
        input_example=np.zeros((1, len(about.channels), *about.crop), dtype=np.float32),
        pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", "numpy", "pydantic", "jaxtyping", "safetensors", "monai"],
        code_paths=[str(package)],
        metadata={"channels": list(about.channels), "units": "normalised: (physical - mean) / std", **about.lineage},
    )
    outputs = client.get_run(progress.run_id).outputs
    if outputs is None or model.model_id not in [item.model_id for item in outputs.model_outputs]:
        client.log_outputs(progress.run_id, [LoggedModelOutput(model.model_id, 0)])
    return str(model.model_id)


def _version(client: MlflowClient, name: str, source: str, model_id: str, run_id: str) -> str:
    """Number of the version of a line in the registry; made if it is not there."""
    import mlflow

    found = [item for item in client.search_model_versions(f"name = '{name}'") if item.tags.get(SOURCE_TAG) == source]
    if found:
        return str(found[0].version)
    with redirect_stderr(io.StringIO()):  # MLflow prints here past its loggers; what fails is raised
        return str(mlflow.register_model(f"models:/{model_id}", name, tags={SOURCE_TAG: source}).version)


def use_store(uri: str) -> None:
    """Make `mlflow.log_…` write to a tracking store; the environment, by which MLflow would tell it to the next job, stays as it is."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    if before is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before
