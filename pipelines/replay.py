"""A black box run again: does the step give what is not finite, in which module, and by which tiles?"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mae_core.black_box import BlackBoxError, Part, load_weights, open_parts
from mae_core.parallel import DeviceError, processes
from mae_core.replay import Replayed, replay
from mae_core.settings import Settings
from pipelines.command_line import run
from pipelines.progress import console, table

DESCRIPTION = (
    "a step that was not finite, run again from its black box alone; exit code 0 if it is finite now, 1 if it is not. "
    "Run it as: python pipelines/replay.py RUN/black_box/step-NNNNNNNN [KEY=VALUE]..."
)
MOST_ROWS = 16


class ReplaySettings(Settings):
    """Settings of `replay`."""

    box: Path = Field(description="Folder of a step, such as RUN/black_box/step-00000012; also the first word")
    precision: Literal["as_then", "fp32", "bf16"] = Field("as_then", description="What the model computes in")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if torch sees one")


def work(settings: ReplaySettings) -> int:
    """Do it."""
    parts = open_parts(settings.box)
    weights = load_weights(settings.box)
    tell_then(parts)
    is_finite = True
    with processes(settings.device) as parallel:
        for part in parts:
            if not part.batches:
                continue
            precision = part.record["precision"] if settings.precision == "as_then" else settings.precision
            done = replay(part, weights, parallel.device, precision)
            tell(part, done, f"{precision} on {parallel.device.type}")
            is_finite = is_finite and done.is_finite
    console.print("it is finite now: what was not finite is not reproduced" if is_finite else "[bold]it is not finite again[/]")
    return 0 if is_finite else 1


def tell_then(parts: Sequence[Part]) -> None:
    """Print what the step was, and the losses before it."""
    record = parts[0].record
    console.print(
        f"step {record['step']} of {record['settings']['train']['steps']}, {record['world']} processes, {record['precision']} on "
        f"{record['device']}, torch {record['versions']['torch']}: loss {record['loss']}, gradient norm {record['grad_norm']}, "
        f"lr {max(record['lr']):.3g}"
    )
    recent = "; ".join(f"{step}: {_short(loss)} ({_short(norm)})" for step, loss, norm in record["recent"][-8:])
    console.print(f"losses (gradient norms) by step: {recent}")
    for name in record["task"]["left_out"]:
        console.print(f"[yellow]{name} is left out[/]: it is not kept in a black box, so its share of the loss is missing")


def tell(part: Part, done: Replayed, where: str) -> None:
    """Print what running a part again gave."""
    record, found = part.record, done.found
    kept, whole = len(part.batches), record["batches_of_step"]
    console.print(
        f"process {record['rank']}, {kept} of its {whole} micro-batches, {where}: loss {done.loss:.6g}, gradient norm {done.norm:.6g}"
    )
    bad = [sample for sample in done.samples if not math.isfinite(sample[3])]
    rows = [(str(tile), str(epoch), str(repeat), f"{loss:.6g}") for epoch, tile, repeat, loss in bad or done.samples]
    table("samples that are not finite" if bad else "summed losses by sample", ("tile", "epoch", "repeat", "loss"), rows[:MOST_ROWS])
    names = {sample[1] for sample in (bad or done.samples)}
    figures = [row for about in record["batches"] for row in about["figures"] if row["tile"] in names]
    table("what was fed, where no quality flag is set", HEAD, [_row(row, record["task"]["channels"]) for row in figures[:MOST_ROWS]])
    if max(len(rows), len(figures)) > MOST_ROWS:
        console.print(f"… and more: {len(rows)} samples, {len(figures)} channels of samples; all are in rank-{record['rank']}/record.json")
    if found.output:
        console.print(f"first output that is not finite: [bold]{found.output}[/]")
    if found.gradient and not found.output:
        console.print(f"first gradient that is not finite, going backward: at the output of [bold]{found.gradient}[/]")
    if found.weights:
        first = ", ".join(found.weights[:3])
        console.print(f"{len(found.weights)} weights have a gradient that is not finite; the first are {first}")


HEAD = ("tile", "channel", "there", "min", "mean", "max", "not finite", "counted", "scale", "offset")


def _row(row: dict[str, Any], channels: Sequence[str]) -> tuple[str, ...]:
    values = (_short(value) for value in (*row["min_mean_max"], row["num_not_finite"], row["counted_fraction"], *row["scale_offset"]))
    return (str(row["tile"]), channels[row["channel"]], "yes" if row["is_present"] else "no", *values)


def _short(value: float | str) -> str:
    return f"{float(value):.4g}"


def arguments(words: Sequence[str]) -> list[str]:
    """The words in the grammar of all verbs: a first word that is no setting is the black box."""
    rest = list(words)
    if rest and not rest[0].startswith("-") and ("=" not in rest[0] or Path(rest[0]).exists()):
        rest[0] = f"box={rest[0]}"
    return rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    words = arguments(sys.argv[1:] if argv is None else argv)
    return run("replay", ReplaySettings, work, description=DESCRIPTION, expected=(BlackBoxError, DeviceError), argv=words)


if __name__ == "__main__":
    sys.exit(main())
