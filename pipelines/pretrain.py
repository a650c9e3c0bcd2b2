"""A tile store becomes an encoder: pretrain a masked autoencoder, watch it on held-out tiles, register what comes out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from mae_core.attention import AttentionError
from mae_core.augment import AugmentSettings, Normaliser
from mae_core.bands import bands_of
from mae_core.checkpoint import CheckpointError, TrainState, peek, restore
from mae_core.divergence import TrainingError
from mae_core.errors import channel_weights
from mae_core.evaluate import Panel, Pretraining, fit_basis
from mae_core.export import Description, ModelError, save_model
from mae_core.flops import pretraining_work
from mae_core.launch import LaunchError
from mae_core.loader import LoaderError, LoaderSettings, Stream
from mae_core.mae import MaskedAutoencoder, ModelSettings, attention_shapes
from mae_core.masking import HidingSettings, RandomHiding, check_hiding
from mae_core.native import channel_footprints, common_footprint
from mae_core.nd import margins, per_axis, token_grid
from mae_core.optim import OptimSettings, learning_rate, make_optimiser
from mae_core.parallel import DeviceError, ParallelSettings, RankError, processes
from mae_core.settings import Settings, to_plain
from mae_core.sharding import gathered, shard
from mae_core.store import StoreError, TileStore
from mae_core.tracking import Tracker, TrackingError, TrackingSettings
from mae_core.train import TrainSettings, train
from mae_core.vit import channel_groups
from modalities.patients import PSEUDONYM_KEY, RESEARCH_USE, of_patients
from pipelines.attempt import attempt
from pipelines.bands import described
from pipelines.before_training import checkpoint_bytes, training_problems
from pipelines.command_line import run as run_verb
from pipelines.compute_time import compute_of, compute_words
from pipelines.contamination import files_of, trained_on
from pipelines.frozen_split import split_digest
from pipelines.kernels import checked_attention
from pipelines.launch_words import tell_launch, voice
from pipelines.lease import TAKEN, confirm
from pipelines.pretrain_start import (
    Begun,
    InitSettings,
    PerceptualSettings,
    begun_from,
    footprints_of,
    make_normaliser,
    perceptual_loss,
    spacing,
    store_in_time,
    tell_transfer,
)
from pipelines.progress import console
from pipelines.run_folder import RUN, Claim, RunError, claimed, finish, recall, without_paths, write_json
from pipelines.statements import Licence, card_lines, statements_of
from pipelines.tracked import tell_tracked

DESCRIPTION = "a tile store becomes a pretrained, registered encoder; an unfinished run is resumed"
UNFIT = (LoaderError, DeviceError, LaunchError, RankError, AttentionError)
EXPECTED = (StoreError, CheckpointError, TrainingError, TrackingError, ModelError, RunError, *UNFIT, *TAKEN)
MAY_DIFFER = (
    "tracking",
    "take_over",
    "weights_licence",
    "split_digest",
    "loader.num_threads",
    "loader.prefetch",
    "loader.micro_batch_size",
    "loader.max_damaged_tiles",
    "train.device",
    "train.compile",
    "train.log_steps",
    "train.checkpoint_steps",
    "train.keep_checkpoints",
    "train.keep_every_steps",
    "train.watchdog",
    "train.max_skipped_in_row",
    "parallel",
)


class PretrainRecipe(Settings):
    """All that shapes a pretraining, whatever the tiles come from."""

    crop: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), max_length=3, description="Voxels per axis that the model sees; empty: three quarters of the tile, and all dates of a series"
    )
    model: ModelSettings = ModelSettings()
    hiding: HidingSettings = RandomHiding()
    init: InitSettings = InitSettings()
    perceptual: PerceptualSettings = PerceptualSettings()
    augment: AugmentSettings = AugmentSettings()
    loader: LoaderSettings = LoaderSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    parallel: ParallelSettings = ParallelSettings()
    tracking: TrackingSettings = TrackingSettings()
    weights_licence: Licence = Field("", description="Licence that the weights are given on under, as an SPDX name; empty: not stated")
    take_over: bool = Field(False, description="Go on with a run although another job seems to work on it; that one will stop")


class PretrainSettings(PretrainRecipe):
    """Settings of `pretrain`."""

    store: str = Field(description="Folder of a tile store made by prepare, of a view of several (store merge), or a URL such as s3://…")
    out: Path = Field(description="Folder of the run")
    verify: Literal["checksums", "sizes"] = Field("checksums", description="How the store is checked before it is used")


def resolved(recipe: PretrainRecipe, store: TileStore) -> PretrainRecipe:
    """The recipe with patch and crop spelled out for a store's axes.

    Raises:
        RunError: They do not fit the store's tiles.
    """
    if recipe.parallel.shard and recipe.train.compile == "whole":
        raise RunError("train.compile=whole cannot hold what parallel.shard=true does between the blocks; take parts or off")
    axes = len(store.space)
    try:
        in_time = store_in_time(store)
        patch = per_axis(recipe.model.encoder.patch, axes, "model.encoder.patch")
        patch = (1, *patch[1:]) if in_time and len(recipe.model.encoder.patch) == 1 else patch
        stride = per_axis(recipe.model.encoder.stride, axes, "model.encoder.stride") if recipe.model.encoder.stride else ()
        step = stride or patch
        margins(patch, step)
        usual = tuple(max(part, size * 3 // 4 // part * part) for size, part in zip(store.space, step, strict=True))
        usual = (store.space[0] // step[0] * step[0], *usual[1:]) if in_time else usual
        crop = per_axis(recipe.crop, axes, "crop") if recipe.crop else usual
        grid = token_grid(crop, step)
        sizes = footprints_for(recipe, store)
        per_channel = channel_footprints(sizes, store.channels, patch, step)
        groups = channel_groups(recipe.model.encoder.groups, store.channels, per_channel)
        Normaliser(crop, (), (), 0, 0, recipe.augment, common_footprint(per_channel))
        check_hiding(recipe.hiding, (len(groups), *grid))
        channel_weights(recipe.model.error, store.channels)
    except ValueError as error:
        raise RunError(str(error)) from error
    if any(size > room for size, room in zip(crop, store.space, strict=True)):
        raise RunError(f"crop={list(crop)} does not fit into the store's tiles of {list(store.space)}; lower crop, or prepare larger tiles")
    if np.prod(grid) < 4:
        raise RunError(f"crop={list(crop)} holds only {np.prod(grid)} tokens of {list(step)}; raise crop or lower model.encoder.patch")
    changes = {"patch": patch} | ({"stride": stride} if stride else {}) | ({"footprints": sizes} if sizes else {})
    encoder = recipe.model.encoder.model_copy(update=changes)
    model = recipe.model.model_copy(update={"encoder": encoder})
    try:
        with torch.device("meta"):
            num_target_channels = MaskedAutoencoder(model, store.channels).decoder.shape[0]
    except ValueError as error:
        raise RunError(str(error)) from error
    if model.error.channel_weights and num_target_channels != len(store.channels):
        raise RunError(
            f"model.error.channel_weights cannot weigh target.kind={model.target.kind}, which joins all channels; leave them out"
        )
    if recipe.perceptual.encoder and model.target.kind == "hog":
        raise RunError("perceptual.encoder needs a target that can be brought back to pixels; with target.kind=hog leave it out")
    return recipe.model_copy(update={"crop": crop, "model": model})


def footprints_for(recipe: PretrainRecipe, store: TileStore) -> dict[str, int]:
    """Channels of a store that hold one measurement in several voxels, and in how many along an axis.

    Raises:
        ValueError: The recipe says otherwise, or its encoder cannot be fed them.
    """
    found = footprints_of(store)
    given = recipe.model.encoder.footprints
    if given and given != found:
        raise ValueError(
            f"model.encoder.footprints={given} and the channels of {store.label} have {found}; leave the setting out, it is the store's"
        )
    if found and recipe.model.encoder.kind != "vit":
        raise ValueError(
            f"model.encoder.kind={recipe.model.encoder.kind} wants a value of its own in every voxel and channels {sorted(found)} of "
            f"{store.label} are at their native resolution; take kind=vit, or prepare all channels at one resolution"
        )
    return found


def pretrain(store: TileStore, out: Path, recipe: PretrainRecipe, verb: str = "pretrain") -> dict[str, Any]:
    """Pretrain on a store into a run folder and register the encoder; what `result.json` holds.

    A finished run of the same settings is told again, an unfinished one goes on from its newest sound checkpoint.

    Raises:
        RunError, LoaderError, DeviceError, StoreError, TrainingError, TrackingError, CheckpointError, LeaseError, TakenOverError: See
            their messages.
    """
    recipe = resolved(recipe, store)
    config = to_plain(recipe) | {"store_digest": store.digest, "split_digest": split_digest(store.index)}
    with processes(recipe.train.device, recipe.parallel) as parallel:
        stream = Stream(store, store.rows("train"), recipe.loader, recipe.train.seed, parallel)
        with claimed(out, Claim(verb, config, MAY_DIFFER, recipe.take_over), parallel) as done:
            if done is None:
                return _pretrain(stream, out, recipe, config, verb)
            if parallel.is_first:
                console.print(f"run {out} is finished; its result is told again")
            return done


def _pretrain(stream: Stream, out: Path, recipe: PretrainRecipe, config: dict[str, Any], verb: str) -> dict[str, Any]:
    store, parallel = stream.store, stream.parallel
    torch.manual_seed(recipe.train.seed)
    model = MaskedAutoencoder(recipe.model, store.channels).to(parallel.device)
    lr = learning_rate(recipe.optim, recipe.loader.global_batch_size)
    say = voice(parallel)
    begun = begun_from(recipe.init, store, recipe.tracking, out)
    transfer = None if begun is None else begun.fill(model.encoder, store, recipe.init.new_bands)
    shard(model, parallel)
    state = TrainState(model, make_optimiser(model, recipe.optim, lr))
    restore(state, out / "checkpoints", say)
    normaliser = make_normaliser(store, recipe.crop, recipe.train.seed, recipe.augment, begun)
    held_out = spread(store.rows("val"), recipe.train.eval_tiles)
    tell_start(store, recipe, state, len(stream.rows), held_out, say)
    tell_launch(stream, recipe.optim, say)
    if transfer is not None and parallel.is_first and not state.step:
        tell_transfer(transfer, recipe.init.encoder)
    with ExitStack() as stack:
        tracker = None
        if parallel.is_first:
            known = state.run_id or recall(out, RUN).get("run_id")
            tracker = Tracker(recipe.tracking, out, of_patients=of_patients(store.kind), say=console.print)
            stack.enter_context(tracker.run(out.name, known, without_paths(config), {"source": f"pipelines/{verb}.py"}, step=state.step))
            state.run_id = tracker.run_id
            write_json(out / RUN, {"run_id": tracker.run_id})
            facts = {"tiles": str(len(store)), "channels": ",".join(store.channels), "split_digest": config["split_digest"]}
            tracker.dataset(store.kind, store.digest, "pretraining", facts)
        batch = recipe.loader.micro_batch_size or recipe.loader.global_batch_size // parallel.world
        panels = partial(_log_panels, tracker, out)
        task = Pretraining(recipe.model, recipe.hiding, normaliser, recipe.train.seed, store, held_out, batch, parallel, panels)
        task = replace(task, perceptual=perceptual_loss(recipe.perceptual, store, normaliser, recipe.tracking, out, parallel.device))
        if not state.step:
            fit_basis(task, model, stream.rows)
        todo = pretraining_work("pretraining", model, recipe.crop, recipe.hiding.mask_ratio)
        todo = todo if task.perceptual is None else replace(todo, flops=None)  # the frozen encoder's are not counted
        run = stack.enter_context(attempt(todo, out, state, stream, recipe.train, config, tracker))
        shapes = attention_shapes(model, recipe.crop, recipe.hiding.mask_ratio)
        with checked_attention(shapes, recipe.train.precision, batch, parallel, say) as kernels, run.loop():
            train(task, state, stream, recipe.train, recipe.optim, run.surroundings, run.report)
        model = gathered(model, lambda: MaskedAutoencoder(recipe.model, store.channels).to(parallel.device))
        if tracker is None:
            return {}
        confirm(out)
        facts = {
            "figures": run.last or tracker.told_metrics(),
            "attention": kernels,
            **_finish(store, out, recipe, model, tracker, normaliser, begun),
        }
        facts |= {} if transfer is None else {"transfer": [list(row) for row in transfer.table()]}
        facts |= {"damaged_tiles": {str(tile): why for tile, why in stream.damaged.items()}} if stream.damaged else {}
    facts |= {"mlflow": tracker.facts()}
    facts |= {"intended_use": RESEARCH_USE} if of_patients(store.kind) else {}
    result = finish(out, verb, config, facts)
    tell_end(result, out)
    return result


def _finish(
    store: TileStore,
    out: Path,
    recipe: PretrainRecipe,
    model: MaskedAutoencoder,
    tracker: Tracker,
    normaliser: Normaliser,
    begun: Begun | None,
) -> dict[str, Any]:
    """Export and register the encoder; what `result.json` is to hold."""
    lineage = {"store_digest": store.digest, "pretraining_run": tracker.run_id}
    lineage |= {} if begun is None else {"begun_with_weights": begun.digest}
    lineage |= {PSEUDONYM_KEY: store.attributes[PSEUDONYM_KEY]} if PSEUDONYM_KEY in store.attributes else {}
    compute = compute_of(out)
    description = Description(
        kind="encoder",
        modality=store.kind,
        channels=store.channels,
        mean=normaliser.mean,
        std=normaliser.std,
        no_value=store.no_value,
        crop=recipe.crop,
        spacing=tuple(float(value) for value in spacing(store)),
        spacing_unit="m" if store.index.unit[0] == "degree" else str(store.index.unit[0]),
        encoder=recipe.model.encoder,
        reader=store.attributes["reader"],
        lineage=lineage,
        intended_use=RESEARCH_USE if of_patients(store.kind) else "",
        facts=card_lines(statements_of(store), recipe.weights_licence, compute_words(compute), is_patients=of_patients(store.kind)),
        percentiles=tuple(tuple(None if np.isnan(value) else float(value) for value in row) for row in store.statistics.percentiles),
        **described(bands_of(store.attributes["channels"])),
    )
    begun_data = None if begun is None else begun.training_data
    data = trained_on(begun_data, store, "pretraining", "" if begun is None else "the encoder that it began with")
    weights = save_model(out / "model", model.encoder, description, files_of(data))
    tracker.register(out / "model", description, None)
    return {"digests": {"store": store.digest, "split": split_digest(store.index), "weights": weights}, "compute": compute}


def spread(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of the rows, evenly spread."""
    if len(rows) <= most:
        return rows
    chosen: NDArray[np.int64] = rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]
    return chosen


def tell_start(
    store: TileStore,
    recipe: PretrainRecipe,
    state: TrainState,
    tiles: int,
    held_out: NDArray[np.int64],
    say: Callable[[str], None],
) -> None:
    """Say what is about to be trained."""
    weights = sum(weight.numel() for weight in state.model.parameters()) / 1e6
    encoder = recipe.model.encoder
    grid = token_grid(recipe.crop, encoder.step)
    groups = len(channel_groups(encoder.groups, store.channels, tuple(encoder.footprints.get(name, 1) for name in store.channels)))
    each = f"{groups} groups of " if groups > 1 else ""
    say(
        f"[bold]{encoder.preset}[/] encoder, {weights:.2f} M weights with decoder; channels {', '.join(store.channels)}; "
        f"crop {'×'.join(map(str, recipe.crop))} in {each}{int(np.prod(grid))} tokens of {'×'.join(map(str, encoder.patch))}, "
        f"{recipe.hiding.mask_ratio:.0%} hidden; {tiles} training and {len(held_out)} held-out tiles"
    )
    if not len(held_out):
        say("[yellow]no held-out tiles[/]: skill cannot be told; prepare with prepare.split.val_fraction above 0")
    if state.step:
        say(f"resuming at step {state.step} of {recipe.train.steps}")


def tell_end(result: dict[str, Any], out: Path) -> None:
    """Say what was made and what the figures mean."""
    figures = result["figures"]
    console.print(f"[bold]pretraining done[/]: {out}")
    if "train/loss" in figures:
        console.print(f"  training loss {figures['train/loss']:.4f}: mean squared error on hidden voxels, in the space of the target")
    if "val/skill" in figures:
        console.print(
            f"  held-out error {figures['val/error']:.4f}; trivial predictors: visible mean {figures['val/error_of_visible_mean']:.4f}, "
            f"interpolation {figures['val/error_of_interpolation']:.4f}, zero {figures['val/error_of_zero']:.4f}"
        )
        console.print(f"  {learned(figures)}")
    pictures = sorted((out / "panels").glob("*.png"))
    if pictures:
        console.print(f"  reconstructions: {pictures[-1]}")
    tell_tracked(result["mlflow"], out)


def learned(figures: Mapping[str, float]) -> str:
    """One line on whether the model learned: held-out skill, overall and by channel."""
    by_channel = {key.removeprefix("val/skill/"): value for key, value in figures.items() if key.startswith("val/skill/")}
    above = [name for name, value in by_channel.items() if value > 0]
    overall = figures["val/skill"]
    if overall <= 0:
        verdict = "[yellow]it has not learned yet[/]"
    elif len(above) < len(by_channel):
        verdict = f"[bold]it learned in part[/], {len(above)} of {len(by_channel)} channels"
    else:
        verdict = "[bold]it learned[/]"
    each = ", ".join(f"{name} {value:+.3f}" for name, value in by_channel.items())
    return f"{verdict}: skill {overall:+.3f} over the best trivial predictor (0: none, 1: perfect){': ' * bool(each)}{each}"


def _log_panels(tracker: Tracker | None, out: Path, step: int, panels: Sequence[Panel]) -> None:
    from mae_core.figures import reconstruction, save_picture

    if tracker is None or not panels or not tracker.images:
        return
    note = "normalised targets are brought back with each hidden patch's true mean and deviation"
    picture = reconstruction(panels, f"held-out tiles, step {step}: {note}")
    save_picture(picture, out / "panels" / f"step-{step:08d}.png")
    tracker.image("val/reconstruction", picture, step)


def work(settings: PretrainSettings) -> int:
    """Do it."""
    store = TileStore.open(settings.store, settings.verify)
    pretrain(store, settings.out, PretrainRecipe.model_validate({name: getattr(settings, name) for name in PretrainRecipe.model_fields}))
    return 0


def check(settings: PretrainSettings) -> list[str]:
    """Problems that only disk, machine and tracker can tell."""
    problems, state_bytes = [], 0
    try:
        store = TileStore.open(settings.store, "sizes")
        recipe = resolved(settings, store)
        model = MaskedAutoencoder(recipe.model, store.channels)
        state_bytes = checkpoint_bytes(model)
        begun = begun_from(settings.init, store, settings.tracking, settings.out)
        if begun is not None:
            begun.fill(model.encoder, store, settings.init.new_bands)
    except (StoreError, RunError, ModelError, TrackingError) as error:
        problems.append(str(error))
    problems += training_problems(settings, state_bytes, console.print)
    if not problems and (found := peek(settings.out / "checkpoints")) is not None:
        console.print(f"would resume at step {found['step']}")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run_verb("pretrain", PretrainSettings, work, check=check, description=DESCRIPTION, expected=EXPECTED, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
