"""Makes `curves.json`: the loss of twenty steps of a nano model in two and three axes, on the CPU in fp32.

    python -m tests.golden.make_curves

A refactor leaves these numbers as they are; whoever changes the method on purpose makes them anew and says why.
Everything takes part that decides what is computed: stored integers, crops and flips, normalisation, hidden sets, model,
target, optimiser and schedule.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mae_core.augment import AugmentSettings, Normaliser, RawBatch
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.masking import RandomHiding, Sample, hide
from mae_core.nd import token_grid, token_valid
from mae_core.optim import OptimSettings, learning_rate, lr_factor, make_optimiser, set_lr
from mae_core.vit import EncoderSettings
from tests.synthetic_batches import CHANNELS, waves

CURVES = Path(__file__).with_name("curves.json")
STEPS, BATCH = 20, 4
SPACES = {2: ((24, 20), (16, 16), (4, 4)), 3: ((10, 12, 8), (8, 8, 8), (4, 4, 4))}
"""Tile, crop and patch by number of axes."""
OPTIM = OptimSettings(base_lr=0.064, warmup_fraction=0.2)


def tiles(axes: int, step: int) -> RawBatch:
    """The raw batch of a step: uint16 waves, some voxels without a value, one sample that lacks a channel."""
    space, names = SPACES[axes][0], range(step * BATCH, (step + 1) * BATCH)
    pixels = np.stack([np.round(2000 + 1800 * waves(space, len(CHANNELS), tile)).astype(np.uint16) for tile in names])
    quality = np.stack([(np.random.default_rng(tile).random(space) < 0.05).astype(np.uint8) for tile in names])
    present = torch.ones(BATCH, len(CHANNELS), dtype=torch.bool)
    present[0, 1] = False
    zero = torch.zeros(BATCH, dtype=torch.int64)
    scale = torch.full((BATCH, len(CHANNELS)), 1e-4)
    sample = Sample(zero + step, torch.tensor(names), zero)
    extent = torch.tensor([space] * BATCH)
    return RawBatch(torch.from_numpy(pixels), torch.from_numpy(quality), None, present, scale, 0 * scale, extent, sample)


def curve(axes: int) -> list[float]:
    """Losses of the steps."""
    _, crop, patch = SPACES[axes]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MaskedAutoencoder(ModelSettings(encoder=EncoderSettings(preset="nano", patch=patch)), CHANNELS)
    normaliser = Normaliser(crop, (0.2,) * 3, (0.08,) * 3, 1, 0, AugmentSettings(quarter_turns=True))
    lr = learning_rate(OPTIM, BATCH)
    optimiser = make_optimiser(model, OPTIM, lr)
    losses = []
    for step in range(STEPS):
        set_lr(optimiser, lr * lr_factor(step, STEPS, OPTIM))
        batch = normaliser(tiles(axes, step), torch.device("cpu"))
        valid = token_valid(batch.counted, patch, model.settings.min_token_valid_fraction)
        plan = hide(valid, (1, *token_grid(crop, patch)), RandomHiding(), 0, batch.sample)
        output = model(batch.pixels, batch.counted, batch.present, plan)
        loss = output.error_sum.sum() / output.count.sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimiser.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    made = {"torch": torch.__version__, "machine": platform.machine(), "losses": {str(axes): curve(axes) for axes in SPACES}}
    CURVES.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
