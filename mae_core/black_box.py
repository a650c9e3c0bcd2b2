"""What is left of a step that was not finite: its raw batch, the weights before it, the losses before it. No pickle; private."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_core.augment import RawBatch
from mae_core.checkpoint import TrainState
from mae_core.context import Context
from mae_core.divergence import Judged, Taken
from mae_core.masking import Sample
from mae_core.parallel import Parallel
from mae_core.sealed import seal, verify
from mae_core.sharding import whole

RECORD, BATCHES, WEIGHTS, OPTIMISER = "record.json", "batches.safetensors", "model.safetensors", "optimiser.safetensors"
MOST_BYTES = 1 << 28
"""Of raw batches that a process writes; the first is written however large it is."""

PLAIN = ("pixels", "quality", "labels", "present", "scale", "offset", "extent", "place")


class BlackBoxError(ValueError):
    """A folder is no black box, or is damaged; the message says what is wrong."""


@dataclass(frozen=True)
class BlackBox:
    """Writes a folder for a step; every process calls it alike and writes its own part.

    Attributes:
        folder: Where the folders of steps go.
        settings: Resolved settings of the run.
        precision: What the model computed in, `bf16` or `fp32`.
        parallel: This process.
        say: Told where a folder is, or why there is none.
    """

    folder: Path
    settings: Mapping[str, Any]
    precision: str
    parallel: Parallel
    say: Callable[[str], None]

    def write(self, task: Mapping[str, Any], state: TrainState, judged: Judged) -> None:
        """Write `folder/step-NNNNNNNN/rank-N`: weights and optimiser as they were before the step, in the part of the first process.

        A disk that is full is told and does not hide what went wrong in the training.

        Args:
            task: What a replay has to know to make model and task again.
            state: Of before the step.
            judged: The step.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        step = judged.taken.step
        final = self.folder / f"step-{step:08d}" / f"rank-{self.parallel.rank}"
        aside = final.with_name(f"{final.name}.tmp")
        tensors = {WEIGHTS: weights_of(state, judged.statistics), OPTIMISER: optimiser_of(state)}  # together: they may lie in shards
        samples = judged.taken.everywhere(self.parallel)
        chosen = offending(judged.taken, any(not math.isfinite(value) for _, value in samples))
        record = {
            "format": 1,
            "step": step,
            "loss": _number(judged.loss),
            "grad_norm": _number(judged.norm),
            "lr": [group["lr"] for group in state.optimiser.param_groups],
            "rank": self.parallel.rank,
            "world": self.parallel.world,
            "precision": self.precision,
            "device": self.parallel.device.type,
            "recent": [[number, _number(loss), _number(norm)] for number, loss, norm in judged.recent],
            "samples": [[tile, _number(value)] for tile, value in samples],
            "batches": [_about(number, judged.taken.batches[number]) for number in chosen],
            "batches_of_step": len(judged.taken.batches),
            "task": task,
            "settings": self.settings,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        try:
            shutil.rmtree(aside, ignore_errors=True)
            for folder in (self.folder, final.parent, aside):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_file(_flat({number: judged.taken.batches[number] for number in chosen}), aside / BATCHES)
            for name, content in tensors.items() if self.parallel.is_first else ():
                save_file(content, aside / name)
            (aside / RECORD).write_text(json.dumps(record, indent=1))
            seal(aside)
            for path in aside.iterdir():
                path.chmod(0o600)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            self.say(f"no black box could be written to {final.parent}: {error}")
            return
        self.say(
            f"step {step} made no update: loss {judged.loss}, gradient norm {judged.norm}. Its tiles and weights are kept in "
            f"{final.parent}: data as they were fed, so leave it where they may be. Run it again with: terravox replay {final.parent}"
        )


def offending(taken: Taken, named: bool) -> list[int]:
    """Numbers of the micro-batches to keep, as far as there is room: those with a sample that is not finite; all where no process has one.

    `named`: whether a process has one.
    """
    numbers = [number for number, (_, value) in enumerate(taken.samples) if not named or not bool(value.isfinite().all())]
    kept, room = numbers[:1], MOST_BYTES - sum(_bytes(taken.batches[number]) for number in numbers[:1])
    for number in numbers[1:]:
        room -= _bytes(taken.batches[number])
        if room < 0:
            break
        kept.append(number)
    return kept


def weights_of(state: TrainState, statistics: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """All weights on the host, with running statistics as they were; every process asks, as weights may lie in shards."""
    model = state.model.state_dict(keep_vars=True)
    return {name: _on_host(statistics.get(id(tensor), tensor)) for name, tensor in model.items()}


def optimiser_of(state: TrainState) -> dict[str, Tensor]:
    """What the optimiser keeps, by number of the parameter and name."""
    entries = state.optimiser.state_dict()["state"]
    return {f"{number}/{name}": _on_host(torch.as_tensor(value)) for number, kept in entries.items() for name, value in kept.items()}


def channel_figures(raw: RawBatch) -> list[dict[str, Any]]:
    """Per sample and channel: least, mean and largest physical value where no quality flag is set, the share that counts, the scale."""
    rows = []
    for number in range(len(raw.scale)):
        tile = number if raw.place is None else int(raw.place[number])
        good = raw.quality[tile] == 0
        for channel in range(raw.scale.shape[1]):
            values = raw.pixels[tile, channel].double()[good] * float(raw.scale[number, channel]) + float(raw.offset[number, channel])
            figures = [values.min(), values.mean(), values.max()] if values.numel() else [math.nan] * 3
            rows.append(
                {
                    "tile": int(raw.sample.tile[number]),
                    "channel": channel,
                    "is_present": bool(raw.present[number, channel]),
                    "min_mean_max": [_number(float(value)) for value in figures],
                    "num_not_finite": int((~values.isfinite()).sum()),
                    "counted_fraction": float(good.double().mean()),
                    "scale_offset": [_number(float(part[number, channel])) for part in (raw.scale, raw.offset)],
                }
            )
    return rows


@dataclass(frozen=True)
class Part:
    """What one process left of a step.

    Attributes:
        record: Its `record.json`.
        batches: Raw micro-batches.
    """

    record: dict[str, Any]
    batches: list[RawBatch]


def open_parts(folder: Path) -> list[Part]:
    """The parts of a black box, the first process first.

    Raises:
        BlackBoxError: There is none, or one is damaged.
    """
    from safetensors.torch import load_file

    found = sorted(folder.glob("rank-*[0-9]"), key=lambda path: int(path.name.partition("-")[2]))
    if not found or found[0].name != "rank-0":
        raise BlackBoxError(f"{folder} is no black box (rank-0 is missing); give a folder such as RUN/black_box/step-00000012")
    parts = []
    for path in found:
        problem = verify(path)
        if problem:
            raise BlackBoxError(f"{path} is damaged: {problem}")
        record = json.loads((path / RECORD).read_text())
        if record["format"] != 1:
            raise BlackBoxError(f"{path} is of format {record['format']}, this version reads 1; replay it with the version that wrote it")
        tensors = load_file(path / BATCHES)
        parts.append(Part(record, [_batch(about, tensors) for about in record["batches"]]))
    return parts


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Weights of before the step, as `model.state_dict()` has them."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(folder / "rank-0" / WEIGHTS)
    return tensors


def _about(number: int, raw: RawBatch) -> dict[str, Any]:
    names = (raw.sample.epoch, raw.sample.tile, raw.sample.repeat)
    samples = [list(name) for name in zip(*(part.tolist() for part in names), strict=True)]
    return {"number": number, "epoch_tile_repeat": samples, "complete": raw.complete, "figures": channel_figures(raw)}


def _flat(batches: Mapping[int, RawBatch]) -> dict[str, Tensor]:
    """Every tensor of some micro-batches under a name."""
    flat: dict[str, Tensor] = {}
    for number, raw in batches.items():
        parts = {name: getattr(raw, name) for name in PLAIN}
        parts |= {f"sample/{part.name}": getattr(raw.sample, part.name) for part in fields(Sample)}
        parts |= {} if raw.context is None else {f"context/{part.name}": getattr(raw.context, part.name) for part in fields(Context)}
        # A copy: the loader's memory may be shared between tensors, which safetensors refuses.
        flat |= {f"{number}/{name}": tensor.clone().contiguous() for name, tensor in parts.items() if tensor is not None}
    return flat


def _batch(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RawBatch:
    own = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{about['number']}/")}
    kinds: tuple[tuple[str, type[Sample] | type[Context]], ...] = (("sample", Sample), ("context", Context))
    sample, context = ({part.name: own.get(f"{kind}/{part.name}") for part in fields(of)} for kind, of in kinds)
    return RawBatch(
        **{name: own.get(name) for name in PLAIN},  # type: ignore[arg-type]
        sample=Sample(**sample),  # type: ignore[arg-type]
        context=None if context["year"] is None else Context(**context),  # type: ignore[arg-type]
        complete=about["complete"],
    )


def _bytes(raw: RawBatch) -> int:
    return sum(part.numel() * part.element_size() for part in (raw.pixels, raw.quality, raw.labels) if part is not None)


def _on_host(tensor: Tensor) -> Tensor:
    """A tensor, or all shards of one, on the host."""
    return whole(tensor).detach().cpu().clone().contiguous()


def _number(value: float) -> float | str:
    """A number as JSON has it; what is none as a word."""
    return value if math.isfinite(value) else str(value)
