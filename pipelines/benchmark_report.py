"""What is told of a benchmark of the step: ratios with their spread, floors, tables and one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from pipelines.progress import console, table

OPTIMISER_BYTES = 28
"""Bytes per weight of a fused AdamW in fp32: weight, gradient and two moments are read, weight and moments written."""

FIGURES = (
    "ms per step, middle of the rounds",
    "slowest to fastest round",
    "samples/s",
    "GFLOP per sample, forward and backward",
    "TFLOP/s",
    "share of the matrix product",
    "peak memory, MiB",
    "kept for backward, MiB per sample",
    "ours is faster by (least–most)",
)
"""Rows of the table of models."""


def ratios(seconds: Mapping[str, Sequence[float]], ours: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times as fast each of ours is as every other model: the middle of the rounds, the least and the most.

    Args:
        seconds: Seconds per step by model, one a round; the same rounds for all.
        ours: Names of ours.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ours:
        others = {}
        for other, times in seconds.items():
            if other != name:
                each = [theirs / own for theirs, own in zip(times, seconds[name], strict=True)]
                others[other] = middle(each)
        found[name] = others
    return found


def middle(values: Sequence[float]) -> dict[str, float]:
    """The middle of some rounds, the least and the most."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def floor_of(measured: float, compute: float, traffic_bytes: float, num_weights: int, copy_rate: float) -> dict[str, Any]:
    """Shares of the measured step that its arithmetic and its memory traffic need at least, and which floor binds.

    Args:
        measured: Seconds of the step.
        compute: Seconds of its matrix products at the measured ceiling.
        traffic_bytes: Bytes moved outside the products, as estimated.
        num_weights: Weights that the optimiser updates.
        copy_rate: Bytes per second of a large copy, read and written.

    Returns:
        Shares `compute`, `memory` (of which `optimiser`) and `rest`, and `binding`: what is largest of compute, memory and
        `launch and what is not fused`.
    """
    optimiser = OPTIMISER_BYTES * num_weights / copy_rate / measured
    shares = {"compute": compute / measured, "memory": traffic_bytes / copy_rate / measured + optimiser}
    rest = max(0.0, 1 - sum(shares.values()))
    binding = max({**shares, "launch and what is not fused": rest}.items(), key=lambda item: item[1])[0]
    return {**shares, "optimiser": optimiser, "rest": rest, "binding": binding, "copy_bytes_per_second": copy_rate}


def tell(found: Mapping[str, Any]) -> None:
    """Print all of it."""
    machine, config = found["machine"], found["config"]
    setup = (
        f"{config['model']['encoder']['preset']}, {config['channels']} channels, {'×'.join(map(str, config['space']))}, "
        f"batch {config['batch_size']}, {machine['precision']}, {machine['name']}, {machine['threads']} threads"
    )
    _tell_products(found)
    columns = {name: [*_column(figures, config), _over(found["speed_over"], name)] for name, figures in found["models"].items()}
    rows = [[what, *(column[number] for column in columns.values())] for number, what in enumerate(FIGURES)]
    table(f"training step: {setup}", ["figure", *columns], rows)
    if note := busy_note(machine):
        console.print(note)
    for name, why in found["left_out"].items():
        console.print(f"left out: {name}: {why}")
    for name, shares in found.get("operator_shares", {}).items():
        text = ", ".join(f"{group} {share:.0%}" for group, share in shares.items() if share >= 0.005)
        console.print(f"{name}: {text}")
    for name, floor in found["floors"].items():
        console.print(floor_line(name, found["models"][name], floor, config["datasheet_tflops"], found["process_peak_bytes"]))


def floor_line(name: str, figures: Mapping[str, Any], floor: Mapping[str, Any], datasheet: float | None, process_bytes: int | None) -> str:
    """One line with the rate and what bounds it."""
    peak = figures["peak_bytes"]
    memory = f"{_mib(peak)} MiB" if peak else f"{_mib(process_bytes)} MiB (whole process)"
    mfu = f"{figures['tflops_per_second'] / datasheet:.1%}" if datasheet else "not known (datasheet_tflops)"
    parts = [
        f"{figures['samples_per_second']:.4g} samples/s",
        f"{figures['tflops_per_second']:.4g} TFLOP/s analytic",
        f"MFU datasheet {mfu}",
        f"{figures['fraction_of_matrix_product']:.1%} of the measured matrix product",
        "loader, copies and waiting: none, data lie on the device",
        f"peak memory {memory}",
        f"floors: compute {floor['compute']:.0%}, memory {floor['memory']:.0%}, rest {floor['rest']:.0%}",
        f"binding: {floor['binding']}",
    ]
    return f"{name}: {' | '.join(parts)}"


def busy_note(machine: Mapping[str, Any]) -> str:
    """A warning where more processes want to run than there are cores; empty otherwise."""
    load, cores = machine["load_average"], machine["cores"]
    if load is None or load <= cores + 0.5:
        return ""
    return f"take no figure from this run: {load:.1f} processes at once wanted the {cores} cores of this machine"


def _tell_products(found: Mapping[str, Any]) -> None:
    rates = found["matrix_product_flops_per_second"]
    rows = [
        [name, precision, *(f"{rates[when][precision][name] / 1e9:.4g}" for when in ("before", "after"))]
        for precision in ("fp32", "bf16")
        for name in rates["before"][precision]
    ]
    note = "" if found["machine"]["computes_bf16"] else "; no bf16 units here, bf16 is emulated"
    title = f"matrix products, GFLOP/s; ceiling {rates['ceiling'] / 1e9:.4g}, drift {rates['drift_fraction']:.0%}{note}"
    table(title, ["shape", "precision", "before", "after"], rows)


def _column(figures: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    kept = figures["kept_bytes"]
    return [
        f"{1000 * figures['step_seconds']:.4g}",
        f"{figures['slowest_to_fastest_round']:.2f}",
        f"{figures['samples_per_second']:.4g}",
        f"{figures['gflops_per_sample']:.4g}",
        f"{figures['tflops_per_second']:.3g}",
        f"{figures['fraction_of_matrix_product']:.1%}",
        _mib(figures["peak_bytes"]),
        f"{kept / config['batch_size'] / 2**20:.3g}" if kept else "not measured",
    ]


def _over(speed_over: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> str:
    """How many times as fast ours are as this one."""
    texts = [
        f"{found[name]['median']:.2f} ({found[name]['least']:.2f}–{found[name]['most']:.2f})"
        for found in speed_over.values()
        if name in found
    ]
    return ", ".join(texts) or "–"


def _mib(number: int | None) -> str:
    return f"{number / 2**20:.0f}" if number else "–"
