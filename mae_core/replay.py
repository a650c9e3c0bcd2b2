"""A black box run again: forward, loss and backward, with the first module that gives what is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from mae_core.augment import Normaliser, RawBatch
from mae_core.black_box import Part
from mae_core.encoders import EncoderChoice, build_encoder
from mae_core.evaluate import Pretraining
from mae_core.heads import HeadSettings, Segmenter
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.masking import STREAM_STEP, HidingSettings, counter_bits
from mae_core.parallel import Parallel
from mae_core.segmentation import Segmentation
from mae_core.store import TileStore
from mae_core.train import Task, autocast
from mae_core.vit import Block


@dataclass
class Found:
    """Where what is not finite was seen first; empty where nothing was.

    Attributes:
        output: Module whose output it was, in the order of computation; `the input` where it was fed so.
        gradient: Module at whose output the gradient was not finite, in the order of the backward pass.
        weights: Parameters whose gradient is not finite.
    """

    output: str = ""
    gradient: str = ""
    weights: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Replayed:
    """A step, or what is kept of it, run again.

    Attributes:
        loss, norm: Over the micro-batches that were kept.
        samples: Epoch, tile, repeat and summed loss of each of their samples.
        found: What is not finite, and where.
    """

    loss: float
    norm: float
    samples: list[tuple[int, int, int, float]]
    found: Found

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def model_of(facts: Mapping[str, Any]) -> nn.Module:
    """The model that `Task.facts` tells of, with new weights."""
    channels = facts["channels"]
    if facts["kind"] == "pretraining":
        return MaskedAutoencoder(ModelSettings.model_validate(facts["model"]), channels)
    encoder = build_encoder(TypeAdapter[Any](EncoderChoice).validate_python(facts["encoder"]), channels)
    for block, chance in zip(encoder.blocks, facts["drop_path"], strict=True):
        if isinstance(block, Block):
            block.drop_path = chance
    return Segmenter(encoder, HeadSettings.model_validate(facts["head"]), len(facts["values"]))


def task_of(facts: Mapping[str, Any], parallel: Parallel) -> Task:
    """The task that `Task.facts` tells of; it has no store, so it can give a loss and evaluate nothing."""
    normaliser = Normaliser.from_facts(facts["normaliser"])
    store, nothing = _channels_only(facts["channels"]), np.empty(0, np.int64)
    if facts["kind"] == "pretraining":
        model, hiding = ModelSettings.model_validate(facts["model"]), TypeAdapter[Any](HidingSettings).validate_python(facts["hiding"])
        return Pretraining(model, hiding, normaliser, facts["seed"], store, nothing, 1, parallel)
    values, names, columns = (tuple(facts[name]) for name in ("values", "names", "columns"))
    return Segmentation(values, names, columns, normaliser, store, nothing, 1, parallel)


def replay(part: Part, weights: Mapping[str, Tensor], device: torch.device, precision: str) -> Replayed:
    """What one process kept of a step, run again: the same weights, crops and hidden sets, and no update.

    Dropped paths are drawn as then for the first micro-batch of the step, and otherwise for later ones if some before them were not kept.
    """
    record, parallel = part.record, Parallel(0, 1, device)
    task, model = task_of(record["task"], parallel), model_of(record["task"])
    model.load_state_dict(dict(weights))
    model.to(device).train()
    settings = record["settings"]["train"]
    step = record["step"] - 1
    torch.manual_seed(int(counter_bits(settings["seed"], STREAM_STEP, step, record["rank"])))
    total, count, samples = torch.zeros((), device=device), torch.zeros((), device=device), []
    with watched(model) as found:
        for raw in part.batches:
            with autocast(precision, device):
                loss = task.loss(model, raw, step / settings["steps"])
            (loss.total / loss.nominal).backward()
            total, count = total + loss.total.detach(), count + loss.count
            samples += _samples(raw, loss.per_sample)
            nominal = loss.nominal
    gradients = {name: weight.grad * (nominal / count.clamp(min=1)) for name, weight in model.named_parameters() if weight.grad is not None}
    norm = torch.stack([gradient.float().norm() for gradient in gradients.values()]).norm()
    found.weights = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    return Replayed(float(total / count.clamp(min=1)), float(norm), samples, found)


@contextmanager
def watched(model: nn.Module) -> Iterator[Found]:
    """Notes the first module whose output is not finite, and the first at whose output the gradient is not."""
    found = Found()
    names = {module: name or "the model" for name, module in model.named_modules()}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        if not found.output and not _finite(args[0]):
            found.output = "the input"

    def after(module: nn.Module, args: Any, output: Any) -> None:
        del args
        name = names[module]
        for tensor in _tensors(output):
            if not found.output and not _finite(tensor):
                found.output = name
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, name=name: _note(found, gradient, name))

    handles = [model.register_forward_pre_hook(before)]
    handles += [module.register_forward_hook(after) for module in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note(found: Found, gradient: Tensor, name: str) -> None:
    if not found.gradient and not _finite(gradient):
        found.gradient = name


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _tensors(output: Any) -> Iterator[Tensor]:
    """Floating-point tensors of an output, whatever it is wrapped in."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif is_dataclass(output):
        yield from _tensors([getattr(output, part.name) for part in fields(output)])


def _samples(raw: RawBatch, per_sample: Tensor) -> list[tuple[int, int, int, float]]:
    parts = (raw.sample.epoch.tolist(), raw.sample.tile.tolist(), raw.sample.repeat.tolist(), per_sample.tolist())
    return list(zip(*parts, strict=True))


def _channels_only(channels: list[str]) -> TileStore:
    """A store of which nothing is known but what its channels are called."""
    store = object.__new__(_NoStore)
    object.__setattr__(store, "named", tuple(channels))
    return store


class _NoStore(TileStore):
    """Stands where a task wants a store and only asks for the channels."""

    named: tuple[str, ...]

    @property
    def channels(self) -> tuple[str, ...]:
        return self.named
