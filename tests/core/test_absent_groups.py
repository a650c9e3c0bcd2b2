"""A channel group of which a sample has no channel has no tokens in it: in the encoder, the segmenter, probes and whole scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_core.augment import Normaliser
from mae_core.band_transfer import transfer_bands
from mae_core.bands import Band
from mae_core.heads import HeadSettings, Segmenter
from mae_core.labelling import Labeller
from mae_core.loader import read_rows
from mae_core.parallel import Parallel
from mae_core.probes import collect, encoded
from mae_core.segmentation import Segmentation, confusion_by_scene
from mae_core.store import TileStore
from mae_core.vit import Encoder, EncoderSettings, all_tokens
from tests.core.test_labelling import description, source
from tests.synthetic_batches import CASES, by_axes, generator, names, one_thread, store_of

__all__ = ["one_thread"]

CHANNELS = ("red", "green", "nir", "blue", "swir")
GROUPS = (("red", "green", "blue"), ("nir",), ("swir",))
WITHOUT_NIR = torch.tensor([True, True, False, True, True])
each_case = pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)


def encoder_of(patch: tuple[int, ...], channels: tuple[str, ...] = CHANNELS, groups: tuple[tuple[str, ...], ...] = GROUPS) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(EncoderSettings(preset="nano", patch=patch, mlp_ratio=2, groups=groups), channels).eval()


def batch_of(space: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, voxels with a value and channels that are there; the first of two samples has all, the second lacks nir."""
    pixels = torch.randn(2, 5, *space, generator=generator(1))
    pixels[1, 2] = 0
    return pixels, torch.ones(2, *space, dtype=torch.bool), torch.stack([torch.ones(5, dtype=torch.bool), WITHOUT_NIR])


@torch.no_grad()
def by_place(encoder: Encoder, pixels: Tensor, has_value: Tensor | None, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features over the grid and the class token."""
    every = all_tokens(encoder.layout(pixels.shape[2:]), pixels, has_value, present)
    out = encoder(every.patches, every.ids, every.layout.grid, every.used)
    return every.by_place(out[:, 1:]), out[:, 0]


@each_case
@torch.no_grad()
def test_features_are_those_of_the_tokens_that_are_left(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    encoder = encoder_of(patch)
    pixels, _, present = batch_of(space)
    found, token = by_place(encoder, pixels, None, present)
    layout = encoder.layout(space)
    ids = torch.arange(3 * layout.num_places)
    left = ids[ids // layout.num_places != 1][None]
    out = encoder(layout.pick(layout.split(pixels[1:]), left), left, layout.grid)
    torch.testing.assert_close(token[1], out[0, 0], rtol=1e-4, atol=1e-5)
    wanted = out[0, 1:].reshape(2, layout.num_places, -1).mean(dim=0).T.reshape(-1, *layout.grid)
    torch.testing.assert_close(found[1], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:1], by_place(encoder, pixels[:1], None, None)[0], rtol=1e-4, atol=1e-5)


@each_case
def test_they_are_those_of_a_model_that_never_had_the_group(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    four = tuple(name for name in CHANNELS if name != "nir")
    encoder, fewer = encoder_of(patch), encoder_of(patch, four, (GROUPS[0], GROUPS[2]))
    same = {name: name for name in four}
    transfer_bands(encoder, fewer, same, (tuple(map(Band, CHANNELS)), tuple(map(Band, four))), "random")
    pixels, has_value, present = batch_of(space)
    has_value[1].flatten()[: has_value[1].numel() // 2] = False
    found = by_place(encoder, pixels, has_value, present)
    wanted = by_place(fewer, pixels[:, WITHOUT_NIR], has_value, None)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-5)


@each_case
def test_where_all_is_there_nothing_changes_to_the_last_bit(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    encoder = encoder_of(patch)
    pixels, has_value, _ = batch_of(space)
    has_value[1].flatten()[: has_value[1].numel() // 2] = False
    for known in (None, has_value):
        for one, other in zip(by_place(encoder, pixels, known, None), by_place(encoder, pixels, known, present_all()), strict=True):
            assert torch.equal(one, other)


def present_all() -> Tensor:
    return torch.ones(2, 5, dtype=torch.bool)


def test_a_sample_without_any_channel_has_no_tokens_and_finite_features() -> None:
    encoder = encoder_of((4, 4))
    pixels, has_value, present = batch_of((8, 12))
    present[1] = False
    found, token = by_place(encoder, pixels, has_value, present)
    assert not found[1].any()
    assert token.isfinite().all()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return store_of(tmp_path_factory.mktemp("absent") / "store", (12, 16), channels=("red", "green", "blue"))


def segmenter() -> Segmenter:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Segmenter(encoder_of((4, 4)), HeadSettings(features=4), 2).eval()


def task_of(store: TileStore, columns: tuple[int, ...] = (0, 1, -1, 2, -1)) -> Segmentation:
    """A store that has neither nir nor swir."""
    normaliser = Normaliser((12, 16), (0.0,) * 3, (1.0,) * 3, 1, 0, None)
    return Segmentation((0, 1), ("low", "high"), columns, normaliser, store, np.arange(2), 2, Parallel(0, 1, torch.device("cpu")))


def of_loss(store: TileStore, model: Segmenter) -> object:
    return task_of(store).loss(model, read_rows(store, np.arange(2), names(2)), 0.0).per_sample.tolist()


def of_evaluation(store: TileStore, model: Segmenter) -> object:
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda _module, _given, scores: seen.append(scores))
    list(task_of(store).evaluate(model, 0))
    handle.remove()
    return torch.cat(seen).tolist()


def of_whole_scenes(store: TileStore, model: Segmenter) -> object:
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda _module, _given, scores: seen.append(scores))
    confusion_by_scene(task_of(store), model, 0.5)
    handle.remove()
    return torch.cat(seen).tolist()


def of_probes(store: TileStore, model: Segmenter) -> object:
    return collect(task_of(store), {"net": model.encoder}, np.arange(2), "token", "mean", 1000, 0).features["net"].tolist()


def of_pools(store: TileStore, model: Segmenter) -> object:
    return collect(task_of(store), {"net": model.encoder}, np.arange(2), "tile", "mean", 1000, 0).features["net"].tolist()


def of_a_scene(store: TileStore, model: Segmenter) -> object:
    del store
    pixels = np.random.default_rng(0).normal(size=(3, 20, 23)).astype(np.float32)
    more = {"encoder": model.encoder.settings, "channels": CHANNELS, "mean": (0.0,) * 5, "std": (1.0,) * 5}
    scene = source(pixels, np.zeros((20, 23), np.uint8), ("red", "green", "blue"))
    labeller = Labeller(model, description().model_copy(update=more), 0.5, 255)
    return [band.probabilities.tolist() for band in labeller.bands(scene, slice(0, 23))]


@pytest.mark.parametrize("found_by", [of_loss, of_evaluation, of_whole_scenes, of_probes, of_pools, of_a_scene])
@torch.no_grad()
def test_what_a_model_knows_of_an_absent_group_changes_nothing(
    store: TileStore, found_by: Callable[[TileStore, Segmenter], object]
) -> None:
    """The code of a group is in each of its tokens: changing that of an absent group shows whether such tokens are seen."""
    model = segmenter()
    codes = model.encoder.get_parameter("places.group_token")
    before = found_by(store, model)
    codes[1:] += 1.0
    assert found_by(store, model) == before
    codes[0] += torch.linspace(-2, 2, codes.shape[1])
    assert found_by(store, model) != before


@torch.no_grad()
def test_a_pool_is_over_the_tokens_that_are_there() -> None:
    encoder = encoder_of((4, 4))
    pixels, has_value, present = batch_of((8, 12))
    every = all_tokens(encoder.layout((8, 12)), pixels, has_value, present)
    out = encoder(every.patches, every.ids, every.layout.grid, every.used)
    token = encoded(encoder, every, None, "tile", "mean")[1, 0]
    torch.testing.assert_close(token, torch.cat([out[1, 1:7], out[1, 13:]]).mean(dim=0))


def test_which_channels_each_sample_of_a_mixed_store_has_is_told_to_the_model(store: TileStore) -> None:
    task = task_of(store, (2, 0, 1, -1, -1))
    seen: list[Tensor] = []
    model = segmenter()
    model.register_forward_pre_hook(lambda _module, given: seen.append(given[3]))
    raw = read_rows(store, np.arange(2), names(2))
    task.loss(model, replace(raw, present=torch.tensor([[True, True, True], [True, False, True]])), 0.0)
    assert seen[0].tolist() == [[True, True, True, False, False], [True, True, False, False, False]]
