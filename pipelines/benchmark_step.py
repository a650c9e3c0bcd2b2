"""A real training step of ours and of other libraries, in turns, against the matrix product of the same machine in the same run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch

from mae_core.flops import Product, largest_linears, products, unfused_bytes
from mae_core.mae import MaskedAutoencoder
from mae_core.settings import to_plain
from mae_core.speed import process_peak_bytes, product_rates, synchronise, timed
from mae_core.train import computes_bf16
from pipelines.benchmark_contestants import COMPILED, Bench, Contestant, StepSettings, make_bench, make_ours, make_peers
from pipelines.benchmark_machine import (
    copy_rate,
    description,
    kept_bytes,
    operator_shares,
    squares,
    state_bytes,
)
from pipelines.benchmark_report import floor_of, ratios, tell
from pipelines.command_line import run
from pipelines.progress import console
from pipelines.run_folder import RunError, write_json

DESCRIPTION = (
    "step: a real training step (hidden sets, forward, backward, clipping, AdamW) of ours and of other libraries in turns, against the "
    "matrix product of the same run; ratios, not absolute times, are to be compared"
)
LARGEST_LINEARS = 4


def work(settings: StepSettings) -> int:
    """Do it."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    bench = make_bench(settings)
    ours = make_ours(bench)
    peers, left_out = make_peers(bench)
    contestants = [*ours, *peers]
    machine = description(bench.device) | precision_of(bench)
    rates = {"before": machine_rates(bench, ours[0])}
    race(bench, contestants)
    rates["after"] = machine_rates(bench, ours[0])
    check_losses(contestants)
    ceiling, drift = ceiling_of(rates, bench.dtype, settings.max_drift_fraction)
    figures = {each.name: figures_of(each, bench, ceiling) for each in contestants}
    found = {
        "verb": "benchmark",
        "subject": "step",
        "machine": machine,
        "matrix_product_flops_per_second": rates | {"ceiling": ceiling, "drift_fraction": drift},
        "models": figures,
        "left_out": left_out,
        "speed_over": ratios({each.name: each.seconds for each in contestants}, [each.name for each in ours]),
        "process_peak_bytes": process_peak_bytes(),
        "floors": {each.name: floor(each, bench, ceiling) for each in ours},
        "config": to_plain(bench.settings),
    }
    if settings.profile:
        found["operator_shares"] = {each.name: operator_shares(each.step, max(2, settings.steps), bench.device) for each in contestants}
    tell(found)
    if settings.out is not None:
        write_json(settings.out, found)
        console.print(f"written to {settings.out}")
    return 0


def machine_rates(bench: Bench, ours: Contestant) -> dict[str, dict[str, float]]:
    """Operations per second of matrix products by precision and shape: squares, and the largest linear layers of our model.

    bf16 that the hardware does not compute is measured on the smallest square only, unless it is what is trained in.
    """
    settings, device = bench.settings, bench.device
    all_squares = squares(settings.square_sizes, device)
    shapes = all_squares | largest_linears(products_of(ours, bench), settings.batch_size, LARGEST_LINEARS)
    wide = computes_bf16(device) or bench.dtype == torch.bfloat16
    smallest = dict(sorted(all_squares.items(), key=lambda item: item[1])[:1])
    return {
        "fp32": product_rates(shapes, torch.float32, device),
        "bf16": product_rates(shapes if wide else smallest, torch.bfloat16, device),
    }


def race(bench: Bench, contestants: Sequence[Contestant]) -> None:
    """Warm up, then let the models do their steps in turns, so that a change of the machine's speed meets them all.

    Raises:
        RunError: A model was compiled again after the warm-up.
    """
    for each in contestants:
        for _ in range(bench.settings.warmup_steps):
            each.step()
        if each.name != COMPILED:  # hooks on kept tensors would have it compiled again
            each.kept_bytes = kept_bytes(each.model, lambda each=each: each.loss(0))  # type: ignore[misc]
    graphs = num_graphs()
    for _ in range(bench.settings.rounds):
        for each in contestants:
            before = begin_memory(bench.device)
            each.seconds.append(timed(each.step, bench.settings.steps, bench.device))
            if bench.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(bench.device) - before + state_bytes(each.model, each.optimiser)
                each.peak_bytes = max(peak, each.peak_bytes or 0)
    if num_graphs() != graphs:
        raise RunError(
            f"no rate is reported: the model was compiled {num_graphs() - graphs} times more after {bench.settings.warmup_steps} "
            "warm-up steps; run with TORCH_LOGS=recompiles to see why"
        )


def begin_memory(device: torch.device) -> int:
    """Bytes in use on a GPU, whose peak is counted from here on; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def num_graphs() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def check_losses(contestants: Sequence[Contestant]) -> None:
    """Refuse to report a rate of something that does not train.

    Raises:
        RunError: A loss is not finite, or the last quarter of the steps is no lower than the first.
    """
    for each in contestants:
        values = [float(loss) for loss in each.losses]
        quarter = max(1, len(values) // 4)
        first, last = fmean(values[:quarter]), fmean(values[-quarter:])
        if not all(math.isfinite(value) for value in values) or not last < first:
            raise RunError(
                f"no rate is reported: the loss of {each.name} is not finite or does not fall: {first:.4f} in the first {quarter} of "
                f"{len(values)} steps, {last:.4f} in the last; lower lr, or set more rounds"
            )


def ceiling_of(rates: Mapping[str, Mapping[str, Mapping[str, float]]], dtype: torch.dtype, max_drift: float) -> tuple[float, float]:
    """The best rate of a matrix product in what is trained in, and by what share before and after differ.

    Raises:
        RunError: They differ too much for any ratio to mean something.
    """
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    before, after = (max(rates[when][name].values()) for when in ("before", "after"))
    drift = max(before, after) / min(before, after) - 1
    if drift > max_drift:
        raise RunError(
            f"no rate is reported: the matrix product gave {before / 1e9:.1f} GFLOP/s before the steps and {after / 1e9:.1f} after, "
            f"{drift:.0%} apart (allowed {max_drift:.0%}); the machine is busy or changes its clock, run again when it is quiet"
        )
    return max(before, after), drift


def figures_of(each: Contestant, bench: Bench, ceiling: float) -> dict[str, Any]:
    """What was measured of a model."""
    size, middle = bench.settings.batch_size, median(each.seconds)
    rate = each.flops * size / middle
    return {
        "version": each.version,
        "step_seconds": middle,
        "step_seconds_of_rounds": each.seconds,
        "slowest_to_fastest_round": max(each.seconds) / min(each.seconds),
        "samples_per_second": size / middle,
        "gflops_per_sample": each.flops / 1e9,
        "tflops_per_second": rate / 1e12,
        "fraction_of_matrix_product": rate / ceiling,
        "parameters": sum(weight.numel() for weight in each.model.parameters()),
        "peak_bytes": each.peak_bytes,
        "kept_bytes": each.kept_bytes,
        "first_loss": float(each.losses[0]),
        "last_loss": float(each.losses[-1]),
    }


def floor(each: Contestant, bench: Bench, ceiling: float) -> dict[str, Any]:
    """The least time that arithmetic and memory leave to our step, as shares of the measured one."""
    traffic = unfused_bytes(products_of(each, bench), bench.dtype.itemsize) * bench.settings.batch_size
    weights = sum(weight.numel() for weight in each.model.parameters() if weight.requires_grad)
    work_done = each.flops * bench.settings.batch_size
    return floor_of(median(each.seconds), work_done / ceiling, traffic, weights, copy_rate(bench.device))


def products_of(ours: Contestant, bench: Bench) -> tuple[Product, ...]:
    """Matrix products of a sample in our model."""
    assert isinstance(ours.model, MaskedAutoencoder)
    return products(ours.model, bench.settings.space, bench.settings.hiding.mask_ratio)


def precision_of(bench: Bench) -> dict[str, Any]:
    """What was multiplied in, and whether the hardware has units for bf16."""
    return {"precision": str(bench.dtype).removeprefix("torch."), "computes_bf16": computes_bf16(bench.device)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subject; its exit code."""
    return run("benchmark", StepSettings, work, description=DESCRIPTION, expected=(RunError,), argv=argv)
