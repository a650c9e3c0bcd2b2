"""What MLflow runs when it loads one of our models: a model folder behind `predict`. Needs torch, not MLflow's pickles.

`predict` takes fp32 `(batch, channel, *space)` in normalised units, `(physical − mean) / std`, channels and statistics as
in the model's metadata, every axis a multiple of the patch. A segmenter gives class numbers `(batch, *space)`, an encoder
features `(batch, token, width)` without the class token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.models import set_model
from numpy.typing import NDArray
from torch import nn

from mae_core.export import DESCRIPTION, Description, load_encoder, load_segmenter
from mae_core.nd import patchify, token_grid


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """An encoder or a segmenter as a pyfunc model."""

    def load_context(self, context: Any) -> None:
        """Load the model folder that was logged as the artifact `model`."""
        folder = Path(context.artifacts["model"])
        self.kind = Description.model_validate_json((folder / DESCRIPTION).read_text()).kind
        self.model: nn.Module
        self.model, self.description = load_segmenter(folder) if self.kind == "segmenter" else load_encoder(folder)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> NDArray[Any]:
        """Class numbers or features of a batch."""
        del context, params
        pixels = torch.from_numpy(np.ascontiguousarray(model_input, dtype=np.float32))
        grid = token_grid(pixels.shape[2:], self.description.encoder.patch)
        with torch.inference_mode():
            if self.kind == "segmenter":
                best = self.model(pixels, torch.ones_like(pixels[:, 0], dtype=torch.bool)).argmax(dim=1)
                values = torch.tensor([value for value, _ in self.description.classes])
                return np.asarray(values[best])
            patches = patchify(pixels, self.description.encoder.patch)
            ids = torch.arange(patches.shape[1]).expand(len(pixels), -1)
            return np.asarray(self.model(patches, ids, grid)[:, 1:])


set_model(ServedModel())
