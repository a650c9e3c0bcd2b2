"""What a fine-tuning found is told: both arms side by side, class by class and case by case, and where to look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.case_report import tell_cases
from pipelines.progress import console, mean_and_deviation, table
from pipelines.tracked import tell_tracked


def tell(result: dict[str, Any], out: Path) -> None:
    """Print the table of both arms and what it means."""
    figures = result["figures"]
    arms, seeds, scores = figures["arms"], figures["seeds"], figures["held_out"]
    rows = []
    for name in (*figures["classes"], None):
        cells = [name or "mean"]
        for arm in arms:
            for kind in ("dice", "iou"):
                key = f"{kind}/{name}" if name else f"mean_{kind}"
                cells.append(mean_and_deviation([scores[f"{arm}-seed{seed}"][key] for seed in seeds if key in scores[f"{arm}-seed{seed}"]]))
        rows.append(cells)
    where = "named regions" if figures.get("side") == "test" else "held-out groups"
    table(f"{where}, {len(seeds)} seeds", ["class", *(f"{arm} {kind}" for arm in arms for kind in ("Dice", "IoU"))], rows)
    if figures.get("confusion"):
        tell_confusion(figures)
    if figures.get("cases"):
        tell_cases(figures["cases"])
    console.print(
        f"Dice and IoU: overlap of predicted and labelled voxels, 0 to 1, over all voxels of {where}, on which no arm was trained."
    )
    if len(arms) == 2:
        gains = [scores[f"pretrained-seed{seed}"]["mean_dice"] - scores[f"scratch-seed{seed}"]["mean_dice"] for seed in seeds]
        console.print(
            f"pretrained − scratch, mean Dice: {mean_and_deviation(gains, sign='+')}; with {len(seeds)} seeds this is a hint, not a proof."
        )
    tell_tracked(result["mlflow"], out)


def tell_confusion(figures: dict[str, Any]) -> None:
    """Print where the voxels of each class went, for the first arm and seed."""
    name, counts = next(iter(figures["confusion"].items()))
    rows = []
    for labelled, row in zip(figures["classes"], counts, strict=True):
        total = sum(row)
        rows.append([labelled, str(total), *(f"{count / total:.1%}" if total else "none" for count in row)])
    table(f"{name}: share of each class's held-out voxels by what was predicted", ["labelled", "voxels", *figures["classes"]], rows)
