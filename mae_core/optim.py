"""AdamW with the paper's groups, learning-rate rule and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from mae_core.settings import Settings


class OptimSettings(Settings):
    """Optimiser; defaults are the paper's pretraining recipe (He et al. 2021, table 8)."""

    base_lr: float = Field(1.5e-4, gt=0, description="Learning rate per 256 samples; lr = base_lr · global batch / 256")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's momenta")
    weight_decay: float = Field(0.05, ge=0, description="Decay of matrices; none on biases, norms and tokens")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises linearly")
    min_lr_fraction: float = Field(0.0, ge=0, le=1, description="Rate at the last step over the highest rate")
    clip_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm")


def learning_rate(settings: OptimSettings, global_batch: int) -> float:
    """Highest learning rate by the linear rule of Goyal et al. (2017)."""
    return settings.base_lr * global_batch / 256


def lr_factor(step: int, num_steps: int, settings: OptimSettings) -> float:
    """Factor on the highest rate at `step` of `num_steps`: linear warm-up, then half a cosine that ends at the minimum."""
    warmup = round(settings.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - 1 - warmup)
    low = settings.min_lr_fraction
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimiser(
    model: nn.Module, settings: OptimSettings, lr: float, layer_of: Callable[[str], int] | None = None, layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """AdamW in which every trained parameter is in exactly one group.

    Only tensors of two and more axes that are not tokens decay. With `layer_of`, a parameter `n` layers below the
    last has its rate multiplied by `layer_decay ** n` (Clark et al. 2020, as the paper uses for fine-tuning); the
    factor is kept in the group as `lr_scale`.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    last = max((layer_of(name) for name, _ in named), default=0) if layer_of else 0
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, weight in named:
        decays = weight.ndim >= 2 and not name.endswith("_token")
        groups.setdefault((layer_of(name) if layer_of else last, decays), []).append(weight)
    parts = []
    for (layer, decays), weights in sorted(groups.items(), key=lambda item: item[0]):
        scale = layer_decay ** (last - layer)
        parts.append({"params": weights, "weight_decay": settings.weight_decay if decays else 0.0, "lr_scale": scale, "lr": lr * scale})
    return torch.optim.AdamW(parts, lr=lr, betas=settings.betas, fused=True)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, each with its own factor."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"]


def step_unless(skipped: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """Move the weights, or leave weights and state as they are where the scalar `skipped` is 1.

    A fused optimiser is told on the device, as a scaler of gradients would tell it, and nobody waits; another asks here.
    """
    if optimiser.defaults.get("fused"):
        optimiser.found_inf = skipped  # type: ignore[attr-defined]
        optimiser.step()
        del optimiser.found_inf  # type: ignore[attr-defined]
    elif not bool(skipped):
        optimiser.step()
