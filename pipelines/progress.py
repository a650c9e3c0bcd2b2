"""What a user sees while a verb works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, stdev
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mae_core.train import Report

console = Console(highlight=False, soft_wrap=True)

PLAIN_INTERVAL_S = 15
"""Seconds between two lines where there is no terminal."""


class TrainDisplay:
    """Steps, loss, samples/s, share of the matrix product's rate, waiting, memory and time left of a training loop."""

    def __init__(self, title: str, first: int, last: int, *, quiet: bool) -> None:
        self.title, self.first, self.last = title, first, last
        self.quiet = quiet
        self.numbers: dict[str, float] = {}
        self.began = self.printed = monotonic()
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=last, completed=first, text="")

    def show(self, report: Report) -> None:
        """Take in a report of the loop."""
        self.numbers |= report.metrics
        text = self.text
        self.bar.update(self.task, completed=report.step, text=text)
        is_evaluation = any(name.startswith("val") for name in report.metrics)
        due = monotonic() - self.printed >= PLAIN_INTERVAL_S or report.step == self.last
        if self.quiet or console.is_terminal or not (is_evaluation or due):
            return
        self.printed = monotonic()
        done = max(1, report.step - self.first)
        left = (self.printed - self.began) / done * (self.last - report.step)
        console.print(f"{self.title}  step {report.step}/{self.last}  {text}  {left:.0f} s left")

    @property
    def text(self) -> str:
        """What the line says behind the step."""
        known = {
            "train/loss": "loss {:.4f}",
            "train/skipped_steps": "{:.0f} steps skipped",
            "speed/samples_per_second": "{:.0f} samples/s",
            "speed/mfu": "MFU {:.1%}",
            "speed/data_wait_fraction": "waiting {:.0%}",
            self._memory(): "memory {:.1f} GiB",
            "val/skill": "skill {:+.3f}",
            "val_crops/mean_dice": "held-out Dice {:.3f}",
        }
        told = {name: value for name, value in self.numbers.items() if value or name != "train/skipped_steps"}
        return "  ".join(text.format(told[name]) for name, text in known.items() if name in told)

    def _memory(self) -> str:
        """The largest memory that is short: of the GPU where there is one."""
        return "memory/gpu_peak_gib" if "memory/gpu_peak_gib" in self.numbers else "memory/process_peak_gib"


@contextmanager
def training(title: str, first: int, last: int, *, quiet: bool) -> Iterator[TrainDisplay]:
    """The display of a training loop from step `first` to `last`."""
    display = TrainDisplay(title, first, last, quiet=quiet)
    with display.bar:
        yield display


class CountDisplay:
    """Things done of so many, the time left and, where they have a unit, how many a second and how many bytes that is."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self.unit_bytes = 0
        """Bytes of one thing; may be set at any time."""
        self.first: int | None = None
        self.began = self.printed = monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=None, text="")

    def __call__(self, done: int, total: int) -> None:
        """Take in how far it is; what was done before the first call is in no rate."""
        now = monotonic()
        if self.first is None:
            self.first, self.began, self.printed = done, now, now
        rate = (done - self.first) / max(now - self.began, 1e-6)
        megabytes = f"  {rate * self.unit_bytes / 1e6:.0f} MB/s" if self.unit_bytes else ""
        text = f"{rate:.0f} {self.unit}/s{megabytes}" if self.unit and done > self.first else ""
        self.bar.update(self.task, completed=done, total=total, text=text)
        if self.unit and not console.is_terminal and now - self.printed >= PLAIN_INTERVAL_S:
            self.printed = now
            left = f"  {(total - done) / rate:.0f} s left" if rate else ""
            console.print(f"{self.title}  {done}/{total} {self.unit}  {text}{left}")


@contextmanager
def counting(title: str, unit: str = "") -> Iterator[CountDisplay]:
    """A function `(done, total)` that moves a bar; with a unit it tells the rate too, by plain lines where there is no terminal."""
    display = CountDisplay(title, unit)
    with display.bar:
        yield display


def show_thousands(progress: Callable[[int, int], None], before: int, total: int, voxels: int) -> None:
    """Move the bar of `counting` to where it is by voxels, a thousand of which it counts as one thing."""
    progress((before + voxels) // 1000, total // 1000)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns after the first are right-aligned."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(head):
        grid.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """Mean and, where there are several values, their standard deviation; a dash where there is none."""
    if not values:
        return "–"
    return f"{mean(values):{sign}.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
