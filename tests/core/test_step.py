"""A training step tells the device what to do and never waits for it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae_core.augment import AugmentSettings, Batch, Normaliser, RawBatch
from mae_core.context import only_spacing
from mae_core.decoders import CrossDecoderSettings
from mae_core.divergence import RunningStatistics, Taken
from mae_core.evaluate import Pretraining
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.masking import RandomHiding
from mae_core.optim import OptimSettings, make_optimiser, step_unless
from mae_core.parallel import Parallel
from mae_core.positions import PositionSettings
from mae_core.segmentation import class_indices, present_of
from mae_core.sparse_conv import SparseConvSettings
from mae_core.stopping import StopRequest
from mae_core.store import TileStore
from mae_core.train import Loss, _own_sums
from mae_core.vit import EncoderSettings
from tests.synthetic_batches import CHANNELS, model_of, names, one_thread

__all__ = ["one_thread"]

LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero"}
"""Operators whose result, or its shape, depends on values, for which the host has to wait."""

MODELS = {
    "two axes": ModelSettings(encoder=EncoderSettings(preset="nano", patch=(4, 4))),
    "three axes": ModelSettings(encoder=EncoderSettings(preset="nano", patch=(4, 4, 4))),
    "convolutions": ModelSettings(encoder=SparseConvSettings(preset="nano", patch=(4, 4))),
    "cross-attention": ModelSettings(
        encoder=EncoderSettings(preset="nano", patch=(4, 4)), decoder=CrossDecoderSettings(predicted_fraction=0.5)
    ),
    "groups": ModelSettings(encoder=EncoderSettings(preset="nano", patch=(4, 4), groups="each")),
}
EVERYTHING = AugmentSettings(quarter_turns=True, resized_crop=(0.2, 1.0), intensity=0.1, channel_drop_fraction=0.2)
CASES = {name: (settings, AugmentSettings()) for name, settings in MODELS.items()} | {"augmented": (MODELS["two axes"], EVERYTHING)}


class Waits(TorchDispatchMode):
    """Notes the places in `mae_core` at which the host would wait for a device.

    That is a look at values, and a copy between devices that is not told to go on: torch lets the host wait for the whole queue then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in LOOKS or (name.startswith("index") and awkward(args)):
            self.note(str(function))
        out = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            devices = {part.device.type for part in (*args, out) if isinstance(part, Tensor)}
            if len(devices) > 1 and not ((kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2])):
                self.note(str(function))
        return out

    def note(self, what: str) -> None:
        """Remember the innermost function of the core that runs, or the operator where it is none of ours."""
        inside = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent.name == "mae_core"]
        self.places.add(f"{Path(inside[-1].filename).stem}.{inside[-1].name}" if inside else what)


def awkward(args: Any) -> bool:
    """Whether something is indexed by a boolean, which has to be counted, or from another device."""
    indices = [part for part in args[1] if part is not None] if isinstance(args[1], list | tuple) else []
    return any(part.dtype == torch.bool or part.device != args[0].device for part in indices)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """The note taker; `torch.tensor` and its like on a device, which no operator shows, are noted too."""
    noted, plain = Waits(), torch.tensor

    def tensor(*args: Any, **kwargs: Any) -> Tensor:
        if torch.device(kwargs.get("device") or "cpu").type != "cpu":
            noted.note("torch.tensor")
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    alike = Tensor.new_tensor

    def new_tensor(like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if like.device.type != "cpu":
            noted.note("new_tensor")
        return alike(like, *args, **kwargs)

    monkeypatch.setattr(Tensor, "new_tensor", new_tensor)
    return noted


def raw_batch(axes: int) -> RawBatch:
    """Complete tiles of 12 voxels an axis, with the distance between voxels, as the loader gives them."""
    space = (12,) * axes
    pixels, quality = torch.ones(2, len(CHANNELS), *space, dtype=torch.int16), torch.zeros(2, *space, dtype=torch.uint8)
    scale, extent = torch.ones(2, len(CHANNELS)), torch.tensor([space] * 2)
    context = only_spacing(torch.ones(2, axes))
    return RawBatch(pixels, quality, None, torch.ones_like(scale, dtype=torch.bool), scale, 0 * scale, extent, names(2), context, True)


def task_of(settings: ModelSettings, device: torch.device, augment: AugmentSettings) -> Pretraining:
    crop = (8,) * len(settings.encoder.patch)
    normaliser = Normaliser(crop, (0.0,) * 3, (1.0,) * 3, 1, 0, augment)
    store = object.__new__(TileStore)  # nothing is evaluated, so nothing is read
    return Pretraining(settings, RandomHiding(), normaliser, 0, store, np.zeros(0, dtype=np.int64), 2, Parallel(0, 1, device))


def backward(task: Pretraining, model: MaskedAutoencoder) -> Taken:
    """What the loop does before it updates the weights."""
    loss = task.loss(model, raw_batch(len(task.normaliser.crop)), 0.0)
    (loss.total / loss.nominal).backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    torch._foreach_mul_(gradients, loss.nominal / loss.count.clamp(min=1))
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return Taken(1, loss.total.detach() / loss.count.clamp(min=1), norm, torch.zeros(()), [(loss.tile, loss.per_sample)], [])


@pytest.mark.parametrize(("settings", "augment"), CASES.values(), ids=list(CASES))
def test_no_step_waits_for_a_device(settings: ModelSettings, augment: AugmentSettings, waits: Waits) -> None:
    """On torch's device without values, a look at one is an error, and copies to it are seen as those to a GPU would be."""
    device = torch.device("meta")
    task, model = task_of(settings, device, augment), model_of(settings).to(device).train()
    backward(task, model)  # fills what is kept from step to step
    with waits:
        backward(task, model)
    assert not waits.places


@pytest.mark.parametrize("name", ["two axes", "three axes", "convolutions"])
def test_no_step_looks_at_a_value(name: str, waits: Waits) -> None:
    settings = MODELS[name]
    task, model = task_of(settings, torch.device("cpu"), AugmentSettings()), model_of(settings).train()
    optimiser = make_optimiser(model, OptimSettings(), 1e-3)
    statistics = RunningStatistics(nn.ModuleList([model, nn.BatchNorm1d(1)]))
    before = [weight.clone() for weight in model.parameters()]
    with waits:
        for _ in range(2):
            statistics.remember()
            taken = backward(task, model)
            step_unless(taken.skipped, optimiser)
            statistics.put_back(taken.skipped)
            optimiser.zero_grad(set_to_none=True)
    assert not waits.places
    assert any(not old.equal(new) for old, new in zip(before, model.parameters(), strict=True)), "it is a step"


def test_waiting_is_seen(waits: Waits) -> None:
    far = torch.zeros(3, device="meta")
    for wait in (
        lambda: torch.zeros(3).sum().item(),
        lambda: bool((torch.zeros(3) > 0).any()),
        lambda: torch.zeros(3).nonzero(),
        lambda: torch.zeros(3)[torch.zeros(3) > 0],
        lambda: far[torch.zeros(2, dtype=torch.int64)],
        lambda: torch.zeros(3).unique(),
        lambda: torch.equal(torch.zeros(3), torch.zeros(3)),
        lambda: torch.zeros(3).to("meta"),
        lambda: far.copy_(torch.zeros(3)),
        lambda: torch.tensor([1.0], device="meta"),
        lambda: far.new_tensor([1.0]),
    ):
        waits.places.clear()
        with waits:
            wait()
        assert waits.places, wait
    waits.places.clear()
    with waits:
        torch.zeros(3).to("meta", non_blocking=True)
        far.copy_(torch.zeros(3), non_blocking=True)
        torch.where(far > 0, far, math.nan)
    assert not waits.places


def test_physical_positions_do_not_wait_either(waits: Waits) -> None:
    encoder = EncoderSettings(preset="nano", patch=(4, 4), positions=PositionSettings(unit="physical"))
    settings = ModelSettings(encoder=encoder)
    task, model = task_of(settings, torch.device("meta"), AugmentSettings()), model_of(settings).to("meta").train()
    with waits:
        backward(task, model)
    assert not waits.places


def test_what_processes_add_up_is_made_without_waiting(waits: Waits) -> None:
    part = torch.zeros((), device="meta")
    with waits:
        sums = _own_sums([Loss(part, part, part, part, 1.0)] * 2, StopRequest())
    assert sums.shape == (3,)
    assert not waits.places


@pytest.mark.parametrize("columns", [(0, 1, 2), (2, -1, 0)])
def test_a_segmenters_channels_and_classes_do_not_wait(columns: tuple[int, ...], waits: Waits) -> None:
    names_of, there = names(2), torch.ones(2, 3, dtype=torch.bool, device="meta")
    batch = Batch(torch.zeros(2, 3, 8, 8, device="meta"), torch.zeros(2, 8, 8, dtype=torch.uint8, device="meta"), None, there, names_of)
    with waits:
        assert present_of(batch, columns).shape == (2, 3)
        assert class_indices(torch.zeros(2, 8, 8, dtype=torch.int16, device="meta"), (0, 4)).dtype == torch.int16
    assert not waits.places
