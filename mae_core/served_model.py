"""What MLflow runs when it loads one of our models: a model folder behind `predict`. Needs torch, not MLflow's pickles.

`predict` takes fp32 `(batch, channel, *space)` in normalised units, `(physical − mean) / std`, channels and statistics as
in the model's metadata, every axis a multiple of the patch, voxels as far apart as in training. A segmenter gives class
numbers `(batch, *space)`, an encoder features `(batch, token, width)` without class token and registers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.models import set_model
from numpy.typing import NDArray

from mae_core.context import only_spacing
from mae_core.encoders import AnyEncoder
from mae_core.export import DESCRIPTION, Description, load_encoder, load_segmenter
from mae_core.heads import Segmenter
from mae_core.vit import all_tokens


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """An encoder or a segmenter as a pyfunc model."""

    def load_context(self, context: Any) -> None:
        """Load the model folder that was logged as the artifact `model`."""
        folder = Path(context.artifacts["model"])
        kind = Description.model_validate_json((folder / DESCRIPTION).read_text()).kind
        self.model: Segmenter | AnyEncoder
        self.model, self.description = load_segmenter(folder) if kind == "segmenter" else load_encoder(folder)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> NDArray[Any]:
        """Class numbers or features of a batch."""
        del context, params
        pixels = torch.from_numpy(np.ascontiguousarray(model_input, dtype=np.float32))
        with torch.inference_mode():
            context = only_spacing(torch.tensor([self.description.spacing], dtype=torch.float32).expand(len(pixels), -1))
            if isinstance(self.model, Segmenter):
                best = self.model(pixels, torch.ones_like(pixels[:, 0], dtype=torch.bool), context).argmax(dim=1)
                values = torch.tensor([value for value, _ in self.description.classes])
                return np.asarray(values[best])
            every = all_tokens(self.model.layout(pixels.shape[2:]), pixels)
            return np.asarray(self.model(every.patches, every.ids, every.layout.grid, None, None, context)[:, self.model.num_prefix :])


set_model(ServedModel())
