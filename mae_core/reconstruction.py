"""What a masked autoencoder shows and predicts of a scene of any size, crop by crop, in the units that the file stores."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_core.augment import Batch
from mae_core.evaluate import EVALUATION_SEED
from mae_core.export import Description
from mae_core.labelling import Rows, Source, fed, padded, repeated
from mae_core.mae import MaskedAutoencoder, tokens_valid
from mae_core.masking import AnyHiding, Sample, at_progress, hide
from mae_core.segmentation import columns_of
from mae_core.tiling import Window, batched


@dataclass(frozen=True)
class Reconstruction:
    """A window of a scene; arrays are `(channel, *window)` in stored units, NaN where there is nothing, channels in the source's order.

    Attributes:
        window: Where it lies.
        original: What the file holds.
        shown: The same where the model saw it.
        predicted: What the model predicts where it did not; NaN too in patches that hold too little to be hidden, and in channels that
            the model does not know.
    """

    window: Window
    original: NDArray[np.float32]
    shown: NDArray[np.float32]
    predicted: NDArray[np.float32]


@dataclass(frozen=True)
class Reconstructor:
    """A masked autoencoder with its decoder and all that is needed to feed it a scene.

    A scene is cut into crops side by side from its first voxel on. What is hidden of each is a pure function of the seed, the scene's
    name and the number of the crop. Where the target is normalised, predictions are brought back with each patch's **true** mean and
    standard deviation, which are not predicted.

    Attributes:
        model: In evaluation mode.
        description: Of the encoder that was exported with it.
        hiding: How much is hidden, and how.
        batch_size: Crops at once.
        seed: Of what is hidden.
    """

    model: MaskedAutoencoder
    description: Description
    hiding: AnyHiding
    batch_size: int = 8
    seed: int = EVALUATION_SEED

    @torch.inference_mode()
    def windows(self, source: Source, name: str, strip: slice) -> Iterator[Reconstruction]:
        """Each crop of a strip of the last axis, row by row of crops; the strip begins at a multiple of the crop.

        Raises:
            ModelError: The scene has none of the model's channels.
        """
        crop = self.description.crop
        starts = [range(0, size, length) for size, length in zip(source.space, crop, strict=True)]
        starts[-1] = range(strip.start, strip.stop, crop[-1])
        rows = Rows(source, crop, strip)
        for first in starts[0]:
            for batch in batched(itertools.product((first,), *starts[1:]), self.batch_size):
                chosen = [
                    tuple(slice(start, min(start + length, size)) for start, length, size in zip(place, crop, source.space, strict=True))
                    for place in batch
                ]
                yield from self._reconstructed(source, name, chosen, [rows.window(window) for window in chosen])

    def _reconstructed(
        self, source: Source, name: str, windows: list[Window], parts: list[tuple[NDArray[np.generic], NDArray[np.uint8]]]
    ) -> Iterator[Reconstruction]:
        about = self.description
        columns = columns_of(about.channels, source.channels)
        stored = np.stack([padded(pixels, about.crop, 0) for pixels, _ in parts])
        quality = torch.from_numpy(np.stack([padded(flags, about.crop, about.no_value) for _, flags in parts]))
        there = (quality & about.no_value) == 0
        present = (torch.tensor(columns) >= 0).expand(len(windows), -1)
        batch = Batch(
            fed(about, source, columns, stored, there), quality, None, present, self._sample(source, name, windows),
            repeated(source.context, len(windows)),
        )  # fmt: skip
        for place, (seen, guess) in enumerate(zip(*self._pictures(batch), strict=True)):
            inside = tuple(slice(0, part.stop - part.start) for part in windows[place])
            original = stored[place][(slice(None), *inside)].astype(np.float32)
            original[:, ~there[place][inside].numpy()] = np.nan
            shown, predicted = np.full_like(original, np.nan), np.full_like(original, np.nan)
            for number, column in enumerate(columns):
                if column < 0:
                    continue
                was_seen = seen[number][inside].numpy()
                shown[column] = np.where(was_seen, original[column], np.nan)
                physical = guess[number][inside].double().numpy() * about.std[number] + about.mean[number]
                stored_units = (physical - source.offset[column]) / source.scale[column]
                predicted[column] = np.where(was_seen | np.isnan(original[column]), np.nan, stored_units)
            yield Reconstruction(windows[place], original, shown, predicted)

    def _pictures(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which voxels of each channel were seen, and what is predicted in normalised units (NaN elsewhere), `(batch, channel, *crop)`."""
        model = self.model
        layout = model.encoder.layout(batch.pixels.shape[2:])
        valid = tokens_valid(layout, batch.counted, batch.present, model.settings.min_token_valid_fraction)
        plan = hide(valid, layout.full_grid, at_progress(self.hiding, 1.0), self.seed, batch.sample)
        output = model(batch.pixels, batch.counted, batch.present, plan, batch.context)
        plan = output.plan
        patches = layout.split(batch.pixels)
        _, seen = layout.join(layout.pick(patches, plan.visible), plan.visible, plan.visible_used)
        values = model.predicted_pixels(output)
        assert values is not None
        guess, guessed = layout.join(values.to(batch.pixels.dtype), plan.hidden, plan.hidden_used)
        seen = seen.expand_as(batch.pixels)
        return seen, torch.where(guessed.expand_as(guess), guess, torch.nan)

    def _sample(self, source: Source, name: str, windows: list[Window]) -> Sample:
        """Names of crops: the scene's digest, and the number of the crop in the scene, whatever is computed together."""
        crop = self.description.crop
        counts = [math.ceil(size / length) for size, length in zip(source.space, crop, strict=True)]
        places = [[part.start // length for part, length in zip(window, crop, strict=True)] for window in windows]
        numbers = torch.tensor([int(np.ravel_multi_index(place, counts)) for place in places])
        scene = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)
        return Sample(torch.full_like(numbers, scene), numbers, torch.zeros_like(numbers))
