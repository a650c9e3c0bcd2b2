"""Rates by a clock that the test moves, operations against torch's counter, memory against another reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import mae_core.speed
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.encoders import build_encoder
from mae_core.flops import Work, counted_flops, pretraining_work, products, segmentation_work, training_flops
from mae_core.heads import HeadSettings, Segmenter
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.parallel import Parallel
from mae_core.sparse_conv import SparseConvSettings
from mae_core.speed import GIB, Speedometer, memory_gib, product_rate, product_rates, speedometer
from mae_core.store import TileStore
from mae_core.train import Loss, Report, Surroundings, train
from mae_core.vit import EncoderSettings
from pipelines.progress import TrainDisplay
from tests.tiny_runs import ALONE, quick, shared_store, tiny_recipe, tiny_run

__all__ = ["quick"]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(mae_core.speed, "perf_counter", clock)
    return clock


def speeds(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.startswith("speed/")}


def test_rates_are_of_the_time_since_the_last_look_without_pauses(clock: Clock) -> None:
    speed = Speedometer(Work("", tokens=7, flops=50), flops_per_second=1000.0)
    clock.now += 3
    speed.start()
    speed.add(8, 0.5)
    with speed.paused():
        clock.now += 60
    speed.add(8, 0.5)
    clock.now += 4
    known = {"speed/samples_per_second": 4.0, "speed/tokens_per_second": 28.0, "speed/data_wait_fraction": 0.25, "speed/mfu": 0.2}
    assert speeds(speed.close(ALONE)) == known
    speed.add(2, 0.0)
    clock.now += 1
    assert speed.close(ALONE)["speed/samples_per_second"] == 2.0


def test_a_product_that_other_work_disturbed_makes_no_share_above_one(clock: Clock) -> None:
    speed = Speedometer(Work("", tokens=7, flops=50), flops_per_second=100.0)
    shares = []
    for samples in (1, 4, 2):
        speed.add(samples, 0.0)
        clock.now += 1
        shares.append(speed.close(ALONE)["speed/mfu"])
    assert shares == [0.5, 1.0, 0.5]


def test_what_nobody_counted_has_no_share(clock: Clock) -> None:
    speed = speedometer(Work("", tokens=0, flops=None), torch.float32, ALONE)
    clock.now += 1
    assert speeds(speed.close(ALONE)).keys() == {"speed/samples_per_second", "speed/data_wait_fraction"}


class Two(Parallel):
    """The second of two processes; the first has a tenth of what it has, but `first` of the first value."""

    first = 0.0

    def sum(self, values: Tensor) -> Tensor:
        other = values.roll(-1, dims=0) / 10
        other[0, 0] = self.first
        return values + other


@pytest.mark.parametrize(("first", "told"), [(0.125, 0.25), (0.75, 0.75)])
def test_waiting_and_memory_are_of_the_process_that_has_most(clock: Clock, first: float, told: float) -> None:
    two = Two(1, 2, CPU)
    object.__setattr__(two, "first", first)
    speed = Speedometer()
    speed.add(1, 1.0)
    clock.now += 4
    found = speed.close(two)
    assert found["speed/data_wait_fraction"] == told
    assert found["memory/process_peak_gib"] == pytest.approx(memory_gib(CPU)["process_peak_gib"], rel=0.05)


def test_memory_is_what_others_read() -> None:
    held = torch.ones(2**22)
    found, rss = memory_gib(CPU), psutil.Process().memory_info().rss
    assert found["process_gib"] * GIB == pytest.approx(rss, rel=0.05)
    assert found["process_peak_gib"] > 0.99 * found["process_gib"] > held.nbytes / GIB  # the kernel counts the two at different times
    assert found.keys() == {"process_peak_gib", "process_gib"}


def test_the_product_is_measured_once_and_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mae_core.speed, "PROBED_SIZE", {"cpu": 8})
    calls: list[int] = []

    def best_time(work: Any, device: torch.device) -> float:
        calls.append(1)
        work()
        return 0.5

    monkeypatch.setattr(mae_core.speed, "best_time", best_time)
    product_rate.cache_clear()
    before = torch.get_rng_state()
    try:
        for _ in range(2):
            assert speedometer(Work("", 1, 1), torch.float32, ALONE).flops_per_second == 2 * 8**3 / 0.5
    finally:
        product_rate.cache_clear()
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert product_rates({"a": (2, 3, 5)}, torch.bfloat16, CPU) == {"a": 2 * 2 * 3 * 5 / 0.5}


@pytest.mark.parametrize("space", [(16, 8), (8, 8, 8)])
def test_operations_of_a_segmenter_are_those_that_torch_counts(space: tuple[int, ...]) -> None:
    settings = EncoderSettings(preset="nano", patch=(4,) * len(space))
    model = Segmenter(build_encoder(settings, ["a", "b"]), HeadSettings(features=4), 3)
    pixels, has_value = torch.zeros(1, 2, *space), torch.ones(1, *space, dtype=torch.bool)
    work = segmentation_work("arm", model, space)
    tokens = torch.Size(size // 4 for size in space).numel()
    assert work == Work("arm", tokens, counted_flops(lambda: model(pixels, has_value).sum()))
    assert next(model.head.parameters()).device == CPU


def test_operations_of_pretraining_are_of_what_the_encoder_sees() -> None:
    with torch.device("meta"):
        vit = MaskedAutoencoder(ModelSettings(encoder=EncoderSettings(preset="nano", patch=(4, 4))), ["a", "b"])
        sparse = MaskedAutoencoder(ModelSettings(encoder=SparseConvSettings(patch=(16, 16))), ["a", "b"])
    work = pretraining_work("run", vit, (32, 32), 0.75)
    assert work == Work("run", 16, training_flops(products(vit, (32, 32), 0.75)))
    assert pretraining_work("run", vit, (32, 32), 0.5).flops > work.flops  # type: ignore[operator]
    assert pretraining_work("run", sparse, (64, 64), 0.75) == Work("run", 4, None)


def test_evaluation_and_saving_are_in_no_rate(tmp_path: Path, store: TileStore, clock: Clock) -> None:
    """Every update takes a second, every evaluation and every save a minute; every report has rates and memory."""
    run = tiny_run(store, tiny_recipe(train__steps=6, train__eval_steps=2, train__checkpoint_steps=3, train__log_steps=2))

    @dataclasses.dataclass(frozen=True)
    class Slow:
        def loss(self, *words: Any) -> Loss:
            clock.now += 1
            return run.task.loss(*words)

        def evaluate(self, *words: Any) -> Iterator[tuple[str, float]]:
            clock.now += 60
            yield from run.task.evaluate(*words)

    class SlowWriter(CheckpointWriter):
        def save(self, *words: Any) -> None:
            clock.now += 60
            super().save(*words)

    reports: list[Report] = []
    around = Surroundings(SlowWriter(tmp_path, {}, 2, ALONE), speed=Speedometer(Work("", 2, 10), 1000.0))
    train(Slow(), run.state, run.stream, run.recipe.train, run.recipe.optim, around, reports.append)
    logged = [report.metrics for report in reports if "train/loss" in report.metrics]
    assert [metrics["speed/samples_per_second"] for metrics in logged] == [4.0, 4.0, 4.0]
    assert [metrics["speed/mfu"] for metrics in logged] == [0.04, 0.04, 0.04]
    assert all({"speed/tokens_per_second", "speed/data_wait_fraction", "memory/process_peak_gib"} <= metrics.keys() for metrics in logged)


def test_the_line_shows_speed_share_waiting_and_the_memory_that_is_short() -> None:
    display = TrainDisplay("pretraining", 0, 10, quiet=True)
    numbers = {"speed/samples_per_second": 31.6, "speed/mfu": 0.1234, "speed/data_wait_fraction": 0.051, "memory/process_peak_gib": 1.26}
    display.show(Report(2, numbers))
    assert display.text == "32 samples/s  MFU 12.3%  waiting 5%  memory 1.3 GiB"
    display.show(Report(4, {"memory/gpu_peak_gib": 40.0}))
    assert display.text.endswith("waiting 5%  memory 40.0 GiB")
