"""What is left of a step that was not finite is enough to run it again, bit for bit, and nobody else can read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mae_core.augment import LabelledAugmentSettings, Normaliser, RawBatch
from mae_core.black_box import BlackBox, BlackBoxError, channel_figures, load_weights, open_parts, optimiser_of, weights_of
from mae_core.checkpoint import TrainState
from mae_core.context import Context
from mae_core.divergence import TrainingError
from mae_core.foreground import Foreground
from mae_core.heads import HeadSettings, Segmenter
from mae_core.optim import learning_rate, make_optimiser
from mae_core.parallel import ParallelSettings, processes
from mae_core.replay import model_of, replay, task_of
from mae_core.segmentation import Segmentation
from mae_core.settings import to_plain
from mae_core.sharding import shard, whole
from mae_core.store import TileStore
from mae_core.vit import Encoder, EncoderSettings
from tests.core.test_divergence import everything, poisoned
from tests.forked import together
from tests.synthetic_batches import names, with_index
from tests.tiny_runs import ALONE, TinyRun, quick, shared_store, tiny_recipe, tiny_run

__all__ = ["quick"]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


def box(folder: Path, run: TinyRun, said: list[str] | None = None) -> BlackBox:
    told = [] if said is None else said
    return BlackBox(folder, to_plain(run.recipe), "fp32", ALONE, told.append)


def spoilt(store: TileStore, run: TinyRun, step: int) -> tuple[TinyRun, int]:
    """The run with a store whose index gives the first sample of a step an infinite scale; and its tile."""
    tile = int(next(run.stream.steps(step - 1, step))[0][0].sample.tile[0])
    scale = store.index.scale.copy()
    scale[np.flatnonzero(store.index.tile == tile), 0] = np.inf
    return replace(run, stream=replace(run.stream, store=with_index(store, scale=scale))), tile


def same_batch(one: RawBatch, other: RawBatch) -> bool:
    def tensors(raw: RawBatch) -> Iterator[Tensor | None]:
        yield from (getattr(raw, part.name) for part in fields(RawBatch) if part.name not in ("sample", "context", "complete"))
        yield from (getattr(raw.sample, part.name) for part in fields(raw.sample))
        assert raw.context is not None
        yield from (getattr(raw.context, part.name).nan_to_num(-1) for part in fields(Context))

    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return one.complete == other.complete and all(left is right or (left is not None and torch.equal(left, right)) for left, right in pairs)


def test_a_bad_tile_is_kept_with_the_weights_before_it_and_replayed(tmp_path: Path, store: TileStore) -> None:
    recipe = tiny_recipe(train__steps=4, train__log_steps=4, train__eval_steps=4, loader__micro_batch_size=2)
    run, tile = spoilt(store, tiny_run(store, recipe), 3)
    batches, _ = next(run.stream.steps(2, 3))
    said: list[str] = []
    run.train(black_box=box(tmp_path / "black_box", run, said))
    folder = tmp_path / "black_box" / "step-00000003"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "the first of a run, and no second"
    assert str(folder) in said[0]
    assert "leave it where they may be" in said[0]
    assert {path.stat().st_mode & 0o777 for path in (folder.parent, folder, folder / "rank-0")} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in (folder / "rank-0").iterdir()} == {0o600}

    (part,) = open_parts(folder)
    assert len(part.batches) == 1, "the other micro-batch is sound"
    assert same_batch(part.batches[0], batches[0])
    assert part.record["samples"][0] == [tile, "nan"]
    assert [step for step, _, _ in part.record["recent"]] == [1, 2, 3]
    assert part.record["batches"][0]["figures"][0]["scale_offset"][0] == "inf"
    until = tiny_run(store, recipe.model_copy(update={"train": recipe.train.model_copy(update={"log_steps": 2})}))
    until.train(last=2)
    known = until.state.model.state_dict()
    weights = load_weights(folder)
    assert weights.keys() == known.keys()
    assert all(torch.equal(weights[name], known[name]) for name in known)

    done = replay(part, weights, CPU, "fp32")
    assert not done.is_finite
    assert [sample[1] for sample in done.samples if not np.isfinite(sample[3])] == [tile]
    assert done.found.output == "the input"


def test_a_sound_step_is_replayed_to_its_own_loss(tmp_path: Path, store: TileStore) -> None:
    """Only the gradient was spoilt, from outside of model and data: all micro-batches are kept, and the loss is the same number."""
    recipe = tiny_recipe(train__steps=4, train__max_skipped_in_row=1, loader__micro_batch_size=1)
    run, _ = poisoned(tiny_run(store, recipe), 3, part="gradient")
    with pytest.raises(TrainingError, match=r"look into it with: terravox replay RUN/black_box/step-00000003"):
        run.train(black_box=box(tmp_path, run))
    (part,) = open_parts(tmp_path / "step-00000003")
    assert len(part.batches) == 4
    done = replay(part, load_weights(tmp_path / "step-00000003"), CPU, "fp32")
    assert done.is_finite
    assert done.loss == pytest.approx(part.record["loss"], rel=1e-6)
    assert (done.found.output, done.found.gradient, done.found.weights) == ("", "", [])
    assert json.loads((tmp_path / "step-00000003" / "rank-0" / "record.json").read_text())["grad_norm"] == "nan"


def test_the_first_module_that_is_not_finite_is_named(tmp_path: Path, store: TileStore) -> None:
    recipe = tiny_recipe(train__steps=3, train__max_skipped_in_row=1)
    run, _ = poisoned(tiny_run(store, recipe), 2)
    with pytest.raises(TrainingError):
        run.train(black_box=box(tmp_path, run))
    (part,) = open_parts(tmp_path / "step-00000002")
    weights = load_weights(tmp_path / "step-00000002")
    broken = {**weights, "encoder.blocks.1.mlp.0.bias": torch.full_like(weights["encoder.blocks.1.mlp.0.bias"], torch.nan)}
    assert replay(part, broken, CPU, "fp32").found.output == "encoder.blocks.1.mlp.0"
    loud = {**weights, "encoder.norm.weight": weights["encoder.norm.weight"] * 1e30}
    done = replay(part, loud, CPU, "fp32")
    assert done.found.output.startswith("decoder.")


def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path: Path, store: TileStore) -> None:
    (tmp_path / "file").write_text("")
    run, _ = poisoned(tiny_run(store, tiny_recipe(train__max_skipped_in_row=1)), 2)
    said: list[str] = []
    with pytest.raises(TrainingError, match="step 2: loss nan"):
        run.train(black_box=box(tmp_path / "file", run, said))
    assert "no black box could be written" in said[0]


def test_what_is_no_black_box_or_damaged_is_told(tmp_path: Path, store: TileStore) -> None:
    with pytest.raises(BlackBoxError, match=r"is no black box \(rank-0 is missing\); give a folder such as"):
        open_parts(tmp_path)
    run, _ = poisoned(tiny_run(store, tiny_recipe(train__max_skipped_in_row=1)), 1)
    with pytest.raises(TrainingError):
        run.train(black_box=box(tmp_path, run))
    batches = tmp_path / "step-00000001" / "rank-0" / "batches.safetensors"
    batches.write_bytes(batches.read_bytes()[:-1])
    with pytest.raises(BlackBoxError, match=r"rank-0 is damaged: batches\.safetensors has \d+ bytes"):
        open_parts(tmp_path / "step-00000001")


def test_running_statistics_are_kept_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    state = TrainState(model, torch.optim.SGD(model.parameters(), 0.1))
    before = torch.tensor([3.0, 4.0])
    kept = weights_of(state, {id(model[0].running_mean): before})
    assert torch.equal(kept["0.running_mean"], before)
    assert torch.equal(kept["0.running_var"], torch.ones(2))
    assert len(everything(TinyRun(None, state, None, None))) == len(kept)  # type: ignore[arg-type]


def stopped(path: Path, folder: Path, divided: bool) -> tuple[str, int, dict[str, Any]]:
    """What a process says whose second rank has a spoilt sample in step 2, its tile, and its weights."""
    with processes("cpu", ParallelSettings(shard=divided, timeout_s=60)) as parallel:
        recipe = tiny_recipe(train__steps=4, train__max_skipped_in_row=1)
        run = tiny_run(TileStore.open(path), recipe, parallel)
        shard(run.state.model, parallel)
        run.state.optimiser = make_optimiser(run.state.model, recipe.optim, learning_rate(recipe.optim, 4))
        tile = int(next(run.stream.steps(1, 2))[0][0].sample.tile[0])
        if parallel.rank:
            run, _ = poisoned(run, 2)
        kept = BlackBox(folder, to_plain(run.recipe), "fp32", parallel, str)
        with pytest.raises(TrainingError) as caught:
            run.train(black_box=kept)
        state = {name: whole(tensor).numpy().copy() for name, tensor in run.state.model.state_dict().items()}
        moments = optimiser_of(run.state)
    assert moments.keys() > {"0/exp_avg", "0/step"}
    assert all(tensor.isfinite().all() for tensor in moments.values())
    return str(caught.value), tile, state


@pytest.mark.parametrize("divided", [False, True])
def test_two_processes_decide_alike_and_each_keeps_its_part(tmp_path: Path, store: TileStore, divided: bool) -> None:
    """Only one has the spoilt sample; both make no update, both stop, both name it; the weights are kept whole where they lie in shards."""
    (first, _, weights), (second, tile, others) = together(2, stopped, store.path, tmp_path, divided)
    assert first == second
    assert f"step 2: loss nan, gradient norm nan: not finite, in tiles [{tile}]. 1 step made no update" in first
    parts = open_parts(tmp_path / "step-00000002")
    assert [len(part.batches) for part in parts] == [0, 1]
    kept = load_weights(tmp_path / "step-00000002")
    alone = tiny_run(store, tiny_recipe(train__steps=4))
    alone.train(last=1)
    for name, tensor in alone.state.model.state_dict().items():
        assert np.array_equal(kept[name].numpy(), weights[name]), name
        assert np.array_equal(weights[name], others[name]), name
        if tensor.ndim > 1:  # AdamW moves the biases of keys, which have no gradient, by the sign of what is rounded
            assert float((kept[name] - tensor).norm()) < 1e-3 * float(tensor.norm()), name
    assert replay(parts[1], kept, CPU, "fp32").is_finite, "it was not spoilt in the data"


def labelled() -> RawBatch:
    shape = (3, 2, 10, 12)
    drawn = np.random.default_rng(0)
    pixels = torch.from_numpy(drawn.integers(0, 900, shape).astype(np.uint16))
    labels, one = torch.from_numpy(drawn.integers(-1, 3, (3, 10, 12)).astype(np.int16)), torch.ones(3, 2)
    extent = torch.tensor([[10, 12]] * 3)
    quality = torch.zeros(3, 10, 12, dtype=torch.uint8)
    return RawBatch(pixels, quality, labels, one.bool(), one, 0 * one, extent, names(3), None, True)


def test_a_segmentation_is_made_again_from_its_facts(store: TileStore) -> None:
    augment = LabelledAugmentSettings(foreground_fraction=0.5, intensity=0.1)
    normaliser = Normaliser((8, 8), (400.0, 420.0), (200.0, 210.0), 1, 7, augment, foreground=Foreground(0.5, (1, 2)))
    task = Segmentation((0, 1, 2), ("a", "b", "c"), (1, 0), normaliser, store, np.empty(0, np.int64), 2, ALONE)
    model = Segmenter(Encoder(EncoderSettings(preset="nano", patch=(4, 4)), ("X", "Y")), HeadSettings(features=4), 3)
    model.encoder.blocks[1].drop_path = 0.25
    facts: dict[str, Any] = json.loads(json.dumps(task.facts(model)))
    other, again = model_of(facts), task_of(facts, ALONE)
    other.load_state_dict(model.state_dict())
    assert other.encoder.blocks[1].drop_path == 0.25
    losses = []
    for made, given in ((task, model), (again, other)):
        torch.manual_seed(0)
        losses.append(made.loss(given.train(), labelled(), 0.5))
    assert torch.equal(losses[0].per_sample, losses[1].per_sample)
    assert losses[0].nominal == losses[1].nominal


def test_figures_of_a_channel_by_hand() -> None:
    raw = labelled()
    raw.quality[1, :5] = 1
    scaled = replace(raw, scale=raw.scale * 2, offset=raw.offset + 1, pixels=raw.pixels.float())
    scaled.pixels[1, 0, 6, 0] = torch.inf
    row = channel_figures(scaled)[2]
    assert (row["tile"], row["channel"], row["num_not_finite"], row["counted_fraction"]) == (int(raw.sample.tile[1]), 0, 1, 0.5)
    assert row["min_mean_max"] == [float(scaled.pixels[1, 0, 5:].min()) * 2 + 1, "inf", "inf"]
    other = channel_figures(scaled)[1]
    values = raw.pixels[0, 1].double() * 2 + 1
    assert other["min_mean_max"] == [float(values.min()), pytest.approx(float(values.mean())), float(values.max())]
