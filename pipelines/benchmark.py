"""How close a training step comes to the matrix product of the same machine, both measured in one run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from pydantic import Field

from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.masking import RandomHiding, Sample, hide, num_kept
from mae_core.nd import per_axis, token_grid, token_valid
from mae_core.optim import OptimSettings, make_optimiser
from mae_core.settings import Settings, to_plain
from pipelines.command_line import run
from pipelines.progress import console, table
from pipelines.run_folder import RunError, write_json

DESCRIPTION = "a training step against the matrix product measured in the same run; ratios, not absolute times, are to be compared"


class BenchmarkSettings(Settings):
    """Settings of `benchmark`."""

    out: Path | None = Field(None, description="JSON file to write the figures to")
    space: tuple[int, ...] = Field((96, 96), min_length=1, max_length=3, description="Voxels per axis of a crop")
    channels: int = Field(10, ge=1, description="Channels of a crop")
    batch_size: int = Field(32, ge=1, description="Samples of a step")
    repeats: int = Field(7, ge=3, description="Steps that are timed, after two that are not")
    model: ModelSettings = ModelSettings()
    hiding: RandomHiding = RandomHiding()


def work(settings: BenchmarkSettings) -> int:
    """Do it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    patch = per_axis(settings.model.encoder.patch, len(settings.space), "model.encoder.patch")
    encoder = settings.model.encoder.model_copy(update={"patch": patch})
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"encoder": encoder})})
    step, losses = training_step(settings, device)
    ceiling = matrix_product_rate(device)
    seconds = timed(step, settings.repeats, device)
    if not all(math.isfinite(value) for value in losses) or not losses[-1] < losses[0]:
        raise RunError(f"no rate is reported: the loss is not finite or does not fall: {losses[0]:.4f} to {losses[-1]:.4f}")
    rate = settings.batch_size / median(seconds)
    work_rate = flops_per_sample(settings) * rate
    figures = {
        "samples_per_second": rate,
        "slowest_to_fastest_step": max(seconds) / min(seconds),
        "gflops_per_sample": flops_per_sample(settings) / 1e9,
        "gflops_per_second": work_rate / 1e9,
        "matrix_product_gflops_per_second": ceiling / 1e9,
        "fraction_of_matrix_product": work_rate / ceiling,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    title = f"{encoder.preset}, {settings.channels} channels, {'×'.join(map(str, settings.space))}, fp32, {device.type}"
    table(title, ("figure", "value"), [(name, f"{value:.4g}") for name, value in figures.items()])
    if settings.out is not None:
        write_json(settings.out, {"verb": "benchmark", "figures": figures, "config": to_plain(settings), "torch": torch.__version__})
        console.print(f"written to {settings.out}")
    return 0


def training_step(settings: BenchmarkSettings, device: torch.device) -> tuple[Callable[[], None], list[float]]:
    """A function that does one update on a fixed batch of noise with structure, and the list that its losses go to."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(settings.model, [f"channel {index}" for index in range(settings.channels)]).to(device)
    optimiser = make_optimiser(model, OptimSettings(), 1e-3)
    ramp = torch.linspace(0, 12, settings.space[-1], device=device).sin()
    pixels = torch.randn(settings.batch_size, settings.channels, *settings.space, device=device) * 0.1 + ramp
    counted = torch.ones_like(pixels[:, 0], dtype=torch.bool)
    present = torch.ones_like(pixels.flatten(2)[..., 0], dtype=torch.bool)
    valid = token_valid(counted, settings.model.encoder.patch, 0.5)
    number = torch.arange(settings.batch_size)
    losses: list[float] = []

    def step() -> None:
        plan = hide(valid, (1, valid.shape[1]), settings.hiding, 0, Sample(number * 0 + len(losses), number, number * 0))
        output = model(pixels, counted, present, plan)
        loss = output.error_sum.sum() / output.count.sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    return step, losses


def timed(step: Callable[[], None], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each call after two that are not counted."""
    seconds = []
    for number in range(repeats + 2):
        began = perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            seconds.append(perf_counter() - began)
    return seconds


def matrix_product_rate(device: torch.device, size: int = 1536) -> float:
    """Operations per second of a large square fp32 matrix product, best of five."""
    left, right = torch.randn(2, size, size, device=device)

    def product() -> None:
        torch.matmul(left, right)

    seconds = timed(product, 5, device)
    return 2 * size**3 / min(seconds)


def flops_per_sample(settings: BenchmarkSettings) -> float:
    """Operations of forward and backward for one sample; matrix products only, a multiply-add counting two.

    The embedding of visible tokens has no gradient to its input, so it counts twice, all else three times.
    """
    model = MaskedAutoencoder(settings.model, ["any"])
    encoder, depth = settings.model.encoder, len(model.decoder.blocks)
    width, tokens = model.decoder.embed.out_features, math.prod(token_grid(settings.space, encoder.patch))
    kept = num_kept(tokens, settings.hiding.mask_ratio)
    voxels = math.prod(encoder.patch) * settings.channels

    def block(length: int, dim: int) -> float:
        return length * (4 + 2 * encoder.mlp_ratio) * dim**2 + 2 * length**2 * dim

    embed = kept * voxels * encoder.width
    forward = encoder.depth * block(kept + 1, encoder.width) + (kept + 1) * encoder.width * width
    forward += depth * block(tokens + 1, width) + (tokens - kept) * width * voxels
    return 2 * (3 * forward + 2 * embed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run("benchmark", BenchmarkSettings, work, description=DESCRIPTION, expected=(RunError,), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
