"""Who takes part in the benchmark of the step: settings, the batch that all share, our model and its peers, each ready to train."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mae_core.flops import counted_flops, products, training_flops
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.masking import RandomHiding, Sample, hide
from mae_core.nd import per_axis, token_grid
from mae_core.optim import OptimSettings, make_optimiser
from mae_core.settings import Settings
from mae_core.train import autocast
from pipelines.benchmark_peers import Peer, PeerError, PeerShape, make_peer
from pipelines.kernels import trained_in
from pipelines.run_folder import RunError

EAGER, COMPILED = "terravox", "terravox compiled"


class StepSettings(Settings):
    """Settings of `benchmark step`."""

    out: Path | None = Field(None, description="JSON file to write the figures to")
    space: tuple[Annotated[int, Field(ge=1)], ...] = Field((96, 96), min_length=1, max_length=3, description="Voxels per axis of a crop")
    channels: int = Field(10, ge=1, description="Channels of a crop")
    batch_size: int = Field(32, ge=1, description="Samples of a step")
    rounds: int = Field(7, ge=3, description="Turns; in each, every model does its steps")
    steps: int = Field(1, ge=1, description="Steps of a model in a round, timed together")
    warmup_steps: int = Field(3, ge=2, description="Steps of every model that are not timed; compilation falls into them")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the hardware computes it, else fp32")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if torch sees one")
    threads: int | None = Field(None, ge=1, description="Threads of torch on a processor (default: torch's own choice)")
    lr: float = Field(3e-4, gt=0, description="Learning rate; only so that the loss falls and the step is a real one")
    seed: int = Field(0, ge=0, description="Of weights, pixels and hidden sets")
    peers: tuple[Peer, ...] = Field(("transformers", "monai"), description="Libraries to compare with; one that cannot take part is named")
    compile: bool = Field(False, description="Measure ours compiled (torch.compile, one graph) beside ours as it is")
    compile_backend: Literal["inductor", "aot_eager"] = Field("inductor", description="What compiles; aot_eager only records the graph")
    profile: bool = Field(False, description="Also the share of each group of operators in the step")
    square_sizes: tuple[Annotated[int, Field(ge=16)], ...] = Field((), description="Square matrix products to measure (default: by device)")
    max_drift_fraction: float = Field(
        0.3, gt=0, description="Refuse if the matrix product is faster or slower by more than this afterwards"
    )
    datasheet_tflops: float | None = Field(None, gt=0, description="Dense peak of the device at this precision, for the MFU of datasheets")
    model: ModelSettings = ModelSettings()
    hiding: RandomHiding = RandomHiding()


@dataclass
class Contestant:
    """A model that is trained, and what was measured of it.

    Attributes:
        name: As it is told.
        model: Holds the weights.
        loss: Loss of the step of a number, on the batch that all share.
        optimiser: Updates the weights.
        flops: Operations of forward and backward for one sample.
        version: Of its library.
        losses: Of every step, on the device.
        seconds: Per step, one value a round.
        peak_bytes: Largest memory of a step with its own weights and moments; None where the device does not tell.
        kept_bytes: What the forward pass of a batch keeps for the backward pass; None where it was not looked at.
    """

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    optimiser: torch.optim.Optimizer
    flops: int
    version: str
    losses: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    kept_bytes: int | None = None

    def step(self) -> None:
        """One update of the weights; nothing in it waits for the device."""
        loss = self.loss(len(self.losses))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), OptimSettings().clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())


@dataclass(frozen=True)
class Bench:
    """What all models share.

    Attributes:
        settings: With one patch size per axis.
        device: Where everything lies.
        pixels: The batch, `(batch, channel, *space)`.
    """

    settings: StepSettings
    device: torch.device
    pixels: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """What matrices are multiplied in."""
        return trained_in(self.settings.precision, self.device)


def make_bench(settings: StepSettings) -> Bench:
    """The device and a batch with structure that a model can learn in a few steps.

    Raises:
        RunError: A GPU is asked for and there is none, or the crop is no multiple of the patch.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RunError("device=cuda, but torch sees no GPU; use device=auto or install a CUDA build of torch")
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    own = settings.model.encoder
    try:
        patch = per_axis(own.patch, len(settings.space), "model.encoder.patch")
        token_grid(settings.space, own.stride or patch)
    except ValueError as error:
        raise RunError(str(error)) from error
    model = settings.model.model_copy(update={"encoder": own.model_copy(update={"patch": patch})})
    generator = torch.Generator().manual_seed(settings.seed)
    pixels = torch.randn(settings.batch_size, settings.channels, *settings.space, generator=generator) * 0.1
    for axis, size in enumerate(reversed(settings.space)):
        pixels += torch.linspace(0, 12, size).sin().reshape(-1, *(1,) * axis)
    return Bench(settings.model_copy(update={"model": model}), device, pixels.to(device))


def make_ours(bench: Bench) -> list[Contestant]:
    """Our model as it is, and compiled if that is asked for."""
    torch.manual_seed(bench.settings.seed)
    made = [our_contestant(bench, EAGER)]
    if bench.settings.compile:
        torch.manual_seed(bench.settings.seed)
        made.append(our_contestant(bench, COMPILED))
    return made


def our_contestant(bench: Bench, name: str) -> Contestant:
    """Our model with its loss: hidden sets by counter, then forward."""
    settings, device, size = bench.settings, bench.device, bench.settings.batch_size
    model = MaskedAutoencoder(settings.model, [f"channel {index}" for index in range(settings.channels)]).to(device).train()
    called: Callable[..., Any] = model
    if name == COMPILED:
        called = torch.compile(model, fullgraph=True, dynamic=False, backend=settings.compile_backend)
    grid = model.encoder.layout(settings.space).full_grid
    valid = torch.ones(size, math.prod(grid), dtype=torch.bool, device=device)
    counted = torch.ones(size, *settings.space, dtype=torch.bool, device=device)
    present = torch.ones(size, settings.channels, dtype=torch.bool, device=device)
    number = torch.arange(size, device=device)

    def loss(step: int) -> Tensor:
        sample = Sample(torch.full_like(number, step), number, torch.zeros_like(number))
        plan = hide(valid, grid, settings.hiding, settings.seed, sample, full=True)
        with autocast(settings.precision, device):
            output = called(bench.pixels, counted, present, plan)
        return output.error_sum.sum() / output.count.sum()  # type: ignore[no-any-return]

    flops = training_flops(products(model, settings.space, settings.hiding.mask_ratio))
    return Contestant(name, model, loss, make_optimiser(model, OptimSettings(), settings.lr), flops, "this tree")


def make_peers(bench: Bench) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that can take part, and why the others cannot."""
    taking_part: list[Contestant] = []
    left_out: dict[str, str] = {}
    for name in bench.settings.peers:
        try:
            taking_part.append(peer_contestant(bench, name))
        except PeerError as error:
            left_out[name] = str(error)
    return taking_part, left_out


def peer_contestant(bench: Bench, name: Peer) -> Contestant:
    """A peer of our shape, with the same batch, precision and optimiser.

    Raises:
        PeerError: It is not installed, does not do this shape, or fails in a step.
    """
    settings = bench.settings
    own = settings.model.encoder
    decoder = settings.model.decoder.shape(own.preset)
    shape = PeerShape(own.preset, decoder, own.mlp_ratio, settings.channels, settings.space, own.patch, settings.hiding.mask_ratio)
    torch.manual_seed(settings.seed)
    model, loss_of, version = make_peer(name, shape)
    model.to(bench.device)

    def loss(_: int) -> Tensor:
        with autocast(settings.precision, bench.device):
            return loss_of(bench.pixels)

    try:
        flops = counted_flops(lambda: loss_of(bench.pixels[:1]))
        loss(0).backward()
    except RuntimeError as error:
        raise PeerError(f"{name} {version} fails in a step in {bench.dtype}: {str(error).splitlines()[0]}") from error
    model.zero_grad(set_to_none=True)
    return Contestant(f"{name} {version}", model, loss, make_optimiser(model, OptimSettings(), settings.lr), flops, version)
