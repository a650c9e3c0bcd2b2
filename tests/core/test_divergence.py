"""A step that is not finite makes no update, is counted and named; many in a row end the run, and no weight is ever lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_core.augment import RawBatch
from mae_core.checkpoint import restore, steps
from mae_core.divergence import Guard, RunningStatistics, Taken, TrainingError
from mae_core.evaluate import Pretraining
from mae_core.optim import make_optimiser, step_unless
from mae_core.store import TileStore
from mae_core.train import Loss
from tests.tiny_runs import TinyRun, curve, quick, shared_store, tiny_recipe, tiny_run

__all__ = ["quick"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


@dataclass(frozen=True)
class Poisoned(Pretraining):
    """A task whose loss, or whose gradient alone, is no number where a sample is one of those that are named."""

    samples: tuple[tuple[int, int], ...] = ()
    part: str = "loss"

    def loss(self, model: nn.Module, raw: RawBatch, progress: float) -> Loss:
        loss = super().loss(model, raw, progress)
        bad = [pair in self.samples for pair in zip(raw.sample.epoch.tolist(), raw.sample.tile.tolist(), strict=True)]
        if not any(bad):
            return loss
        if self.part == "gradient":
            loss.total.register_hook(lambda gradient: gradient * math.nan)
            return loss
        return replace(loss, total=loss.total * math.nan, per_sample=torch.where(torch.tensor(bad), math.nan, loss.per_sample))


def poisoned(run: TinyRun, *at: int, part: str = "loss") -> tuple[TinyRun, list[int]]:
    """The run with the first sample of some steps spoilt, and the tiles of those samples."""
    samples = [next(run.stream.steps(step - 1, step))[0][0].sample for step in at]
    pairs = tuple((int(sample.epoch[0]), int(sample.tile[0])) for sample in samples)
    own = {name: getattr(run.task, name) for name in Pretraining.__dataclass_fields__}
    return replace(run, task=Poisoned(**own, samples=pairs, part=part)), [tile for _, tile in pairs]


def everything(run: TinyRun) -> list[Tensor]:
    """Weights and what the optimiser keeps."""
    entries = sorted(run.state.optimiser.state_dict()["state"].items())
    kept = [torch.as_tensor(value) for _, entry in entries for _, value in sorted(entry.items())]
    return [tensor.clone() for tensor in (*run.state.model.state_dict().values(), *kept)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(("part", "micro"), [("loss", None), ("gradient", 1)])
def test_a_skipped_step_is_as_if_it_had_had_no_update(store: TileStore, monkeypatch: pytest.MonkeyPatch, part: str, micro: int) -> None:
    """Against the sound run in which the optimiser is not called at that step: weights, momenta, decay and the counts of updates."""
    recipe = tiny_recipe(train__steps=5, train__eval_steps=5, loader__micro_batch_size=micro)
    run, _ = poisoned(tiny_run(store, recipe), 3, part=part)
    reports = run.train()
    known = tiny_run(store, recipe)
    calls: list[int] = []
    plain = known.state.optimiser.step
    monkeypatch.setattr(known.state.optimiser, "step", lambda: calls.append(1) or (plain() if len(calls) != 3 else None))
    expected = known.train()
    assert same(everything(run), everything(known))
    assert {int(entry["step"]) for entry in run.state.optimiser.state.values()} == {4}
    assert curve(reports, "train/skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    assert curve(reports) == {step: loss for step, loss in curve(expected).items() if step != 3}, "no mean of nothing"
    assert (run.state.skipped, run.state.skipped_in_row) == (1, 0)


def test_the_first_step_can_be_skipped_too(store: TileStore) -> None:
    run, _ = poisoned(tiny_run(store, tiny_recipe(train__steps=3)), 1)
    before = [weight.clone() for weight in run.state.model.parameters()]
    run.train(last=0)
    assert all(weight.isfinite().all() for weight in everything(run))
    assert {int(entry["step"]) for entry in run.state.optimiser.state.values()} == {2}
    assert not same(before, list(run.state.model.parameters()))


def test_the_mean_of_a_window_leaves_skipped_steps_out(store: TileStore) -> None:
    recipe = tiny_recipe(train__steps=4, train__eval_steps=4)
    every, _ = poisoned(tiny_run(store, recipe), 2)
    losses = curve(every.train())
    rows, _ = poisoned(tiny_run(store, recipe.model_copy(update={"train": recipe.train.model_copy(update={"log_steps": 4})})), 2)
    assert curve(rows.train()) == {4: pytest.approx(sum(losses[step] for step in (1, 3, 4)) / 3)}


@pytest.mark.parametrize("log_steps", [1, 100])
def test_so_many_in_a_row_stop_the_run_and_are_named(tmp_path: Path, store: TileStore, log_steps: int) -> None:
    """Skips that are not in a row do not."""
    recipe = tiny_recipe(train__steps=50, train__max_skipped_in_row=2, train__log_steps=log_steps, train__checkpoint_steps=6)
    run, tiles = poisoned(tiny_run(store, recipe), 2, 4, 6, 7, 9)
    names = rf"tiles \[{tiles[2]}, {tiles[3]}\]"
    with pytest.raises(TrainingError, match=rf"step 7: loss nan, .*not finite, in {names}\. 2 steps in a row .*those of step 5\. Look"):
        run.train(checkpoints=tmp_path)
    assert (run.state.skipped, run.state.skipped_in_row) == (4, 2)
    assert all(weight.isfinite().all() for weight in everything(run))
    again, _ = poisoned(tiny_run(store, recipe), 2, 4, 6, 7, 9)
    restore(again.state, tmp_path, pytest.fail)
    assert (again.state.step, again.state.skipped, again.state.skipped_in_row) == (6, 3, 1)
    with pytest.raises(TrainingError, match=rf"step 7: .* in tiles \[{tiles[3]}\]\. 2 steps in a row .*those of step 5"):
        again.train()
    assert same(everything(again), everything(run))


def test_a_gradient_alone_names_the_tiles_of_the_batch(store: TileStore) -> None:
    run, (tile,) = poisoned(tiny_run(store, tiny_recipe(train__max_skipped_in_row=1)), 2, part="gradient")
    with pytest.raises(TrainingError, match=rf"step 2: loss \d\S*, gradient norm nan: .*none of its samples by itself.* tiles \[{tile},"):
        run.train()


def test_resumed_within_a_row_it_ends_in_the_same_bits(tmp_path: Path, store: TileStore) -> None:
    recipe = tiny_recipe(train__steps=8, train__log_steps=4, train__checkpoint_steps=3)
    whole, _ = poisoned(tiny_run(store, recipe), 2, 3, 4)
    reports = whole.train()
    cut, _ = poisoned(tiny_run(store, recipe), 2, 3, 4)
    cut.train(last=4, checkpoints=tmp_path)
    later, _ = poisoned(tiny_run(store, recipe), 2, 3, 4)
    restore(later.state, tmp_path, pytest.fail)
    assert (later.state.step, later.state.skipped_in_row, len(later.state.window)) == (3, 2, 1)
    after = later.train()
    assert same(everything(later), everything(whole))
    for key in ("train/loss", "train/grad_norm", "train/skipped_steps", "val/error"):
        assert curve(after, key) == curve(reports, key), key


def test_a_rate_that_explodes_leaves_finite_weights(store: TileStore) -> None:
    run = tiny_run(store, tiny_recipe(train__steps=50, optim__base_lr=1e20, train__log_steps=50, train__eval_steps=50))
    with pytest.raises(
        TrainingError, match=r"step \d+: loss .*not finite, in .* 5 steps in a row .*weights are finite.*lower optim\.base_lr"
    ):
        run.train()
    assert all(weight.isfinite().all() for weight in everything(run))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, store: TileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(store, tiny_recipe(train__steps=4, train__checkpoint_steps=2))
    plain = run.state.optimiser.step
    weight = run.state.model.decoder.mask_token

    def step() -> None:
        plain()
        if run.state.step == 3:
            weight.data[..., 0] = math.inf

    monkeypatch.setattr(run.state.optimiser, "step", step)
    with pytest.raises(TrainingError, match=r"step 4: weights that are not finite .*decoder\.mask_token\).*not saved"):
        run.train(checkpoints=tmp_path)
    assert [path.name for path in steps(tmp_path)] == ["step-00000002"]


def test_running_statistics_do_not_see_a_skipped_step() -> None:
    layer = nn.BatchNorm1d(2)
    statistics = RunningStatistics(nn.Sequential(nn.Linear(2, 2), layer))
    layer(torch.randn(4, 2))
    before = [buffer.clone() for buffer in layer.buffers()]
    statistics.remember()
    layer(torch.full((4, 2), math.nan))
    statistics.put_back(torch.tensor(1.0))
    assert same(before, list(layer.buffers()))
    statistics.remember()
    layer(torch.randn(4, 2))
    after = [buffer.clone() for buffer in layer.buffers()]
    statistics.put_back(torch.tensor(0.0))
    assert same(after, list(layer.buffers()))
    assert not any(map(torch.equal, before, after))


def test_the_loop_puts_running_statistics_back(store: TileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = poisoned(tiny_run(store, tiny_recipe(train__steps=3)), 2)
    norm = run.state.model.decoder.extra = nn.BatchNorm1d(1)
    seen: list[float] = []
    plain = Poisoned.loss

    def loss(task: Poisoned, model: nn.Module, raw: RawBatch, progress: float) -> Loss:
        seen.append(float(norm.running_mean))
        found = plain(task, model, raw, progress)
        norm(found.total.detach().expand(2, 1))
        return found

    monkeypatch.setattr(Poisoned, "loss", loss)
    run.train()
    assert seen[1] == seen[2] != 0
    assert norm.num_batches_tracked == 2
    assert norm.running_mean.isfinite()


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_an_optimiser_is_told_to_skip(kind: str) -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    fused = kind == "fused"
    optimiser = make_optimiser(nn.ParameterDict({"a": weight}), tiny_recipe().optim, 0.1) if fused else torch.optim.SGD([weight], 0.1)
    for skipped in (0.0, 1.0, 0.0):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, math.nan if skipped else 1.0)
        step_unless(torch.tensor(skipped), optimiser)
        assert torch.equal(before, weight) == bool(skipped)
        assert not hasattr(optimiser, "found_inf")
    assert weight.isfinite().all()


@pytest.mark.parametrize("most", [1, 5])
def test_told_one_step_later_as_by_a_gpu_it_is_the_same_run(store: TileStore, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The host learns of a step after the next one's backward pass, and before that one's update."""
    recipe = tiny_recipe(train__steps=6, train__log_steps=6, train__eval_steps=6, train__max_skipped_in_row=most)
    known, found, told, plain = [], [], [], Guard._judge
    for late in (False, True):
        run, _ = poisoned(tiny_run(store, recipe), 3, 4)
        monkeypatch.setattr(Guard, "is_late", late)
        monkeypatch.setattr(Guard, "_judge", watched(plain, run, seen := []))
        if most == 1:
            with pytest.raises(TrainingError, match=r"^step 3: .*those of step 2\."):
                run.train()
        else:
            run.train()
        (found if late else known).extend(everything(run))
        told.append(seen)
    assert same(known, found)
    before, later = told
    assert [step for step, _, _ in before] == [step for step, _, _ in later] == ([1, 2, 3] if most == 1 else [1, 2, 3, 4, 5, 6])
    assert [done for _, done, _ in before[:3]] == [0, 1, 2]
    assert [done for _, done, _ in later[:3]] == [1, 2, 3], "one step later"
    assert same([before[2][2]], [later[2][2]]), "what was skipped is judged on the weights of before it"


def watched(plain: Callable[..., None], run: TinyRun, seen: list[tuple[int, int, Tensor]]) -> Callable[..., None]:
    """The judgement, which notes the step, how many are done, and a weight."""

    def judge(guard: Guard, taken: Taken, *rest: Any) -> None:
        seen.append((taken.step, run.state.step, run.state.model.encoder.embed.weight.detach().clone()))
        plain(guard, taken, *rest)

    return judge
