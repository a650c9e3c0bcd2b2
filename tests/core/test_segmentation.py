"""Loss and measures are MONAI's where nothing is ignored, and what is ignored is in neither."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mae_core.augment import AugmentSettings, Normaliser
from mae_core.context import Context
from mae_core.export import ModelError
from mae_core.heads import HeadSettings, Segmenter
from mae_core.loader import read_rows
from mae_core.parallel import Parallel
from mae_core.segmentation import (
    IGNORE,
    Segmentation,
    arrange,
    class_indices,
    columns_of,
    confusion,
    confusion_by_scene,
    dice_cross_entropy,
    layer_number,
    measures,
    probabilities,
)
from mae_core.store import TileStore
from mae_core.vit import Encoder, EncoderSettings
from tests.synthetic_batches import CHANNELS, generator, names, one_thread, store_of

__all__ = ["one_thread"]

SPACES = [(30,), (8, 9), (4, 5, 6)]


def segmenter(patch: tuple[int, ...] = (4, 4), classes: int = 2) -> Segmenter:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = Encoder(EncoderSettings(preset="nano", patch=patch, mlp_ratio=1), CHANNELS)
        return Segmenter(encoder, HeadSettings(features=4), classes)


def scores_and_classes(space: tuple[int, ...], classes: int = 3, size: int = 2) -> tuple[Tensor, Tensor]:
    scores = torch.randn(size, classes, *space, generator=generator(0))
    return scores, torch.randint(0, classes, (size, *space), generator=generator(1))


def test_class_numbers_become_indices_and_the_rest_is_ignored() -> None:
    labels = torch.tensor([[4, 0, 1, -1], [2, 1, 0, 255]])
    assert class_indices(labels, (1, 0, 4)).tolist() == [[2, 1, 0, IGNORE], [IGNORE, 0, 1, IGNORE]]


@pytest.mark.parametrize("space", SPACES)
def test_the_loss_is_monais_where_nothing_is_ignored(space: tuple[int, ...]) -> None:
    from monai.losses import DiceCELoss

    scores, classes = scores_and_classes(space)
    classes[1][classes[1] == 2] = 0
    scores.requires_grad_()
    ours, counted = dice_cross_entropy(scores, classes)
    (gradient,) = torch.autograd.grad(ours.mean(), scores)
    theirs = DiceCELoss(to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5)(scores, classes[:, None])
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, scores)[0], rtol=1e-4, atol=1e-7)
    assert counted.tolist() == [1, 1]


def test_what_is_ignored_changes_neither_loss_nor_gradient() -> None:
    scores, classes = scores_and_classes((8, 9))
    classes[:, :, 5:] = IGNORE
    other = scores.clone()
    other[:, :, :, 5:] = 50 * torch.randn(2, 3, 8, 4, generator=generator(2))
    found = []
    for part in (scores, other):
        part.requires_grad_()
        loss = dice_cross_entropy(part, classes)[0]
        found.append((loss, torch.autograd.grad(loss.sum(), part)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1][..., :5], found[1][1][..., :5])
    assert not found[1][1][..., 5:].any()
    cut = dice_cross_entropy(scores[:, :, :, :5].contiguous(), classes[:, :, :5].contiguous())[0]
    torch.testing.assert_close(found[0][0], cut, rtol=1e-5, atol=1e-6)


def test_a_sample_without_labels_counts_nothing() -> None:
    scores, classes = scores_and_classes((8, 9))
    classes[1] = IGNORE
    scores.requires_grad_()
    loss, counted = dice_cross_entropy(scores, classes)
    assert counted.tolist() == [1, 0]
    assert float(loss[1].detach()) == 0
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert gradient.isfinite().all()
    assert not gradient[1].any()


def test_a_class_that_is_absent_and_not_predicted_costs_nothing() -> None:
    classes = torch.zeros(1, 16, dtype=torch.int64)
    classes[0, 8:] = 1
    scores = 200 * torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()
    assert float(dice_cross_entropy(scores, classes)[0]) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 2**16), st.integers(1, 4))
def test_confusion_is_the_naive_loop(seed: int, size: int) -> None:
    classes = torch.randint(-1, size, (3, 7), generator=generator(seed))
    guess = torch.randint(0, size, (3, 7), generator=generator(seed + 1))
    wanted = np.zeros((size, size), int)
    for true, guessed in zip(classes.flatten().tolist(), guess.flatten().tolist(), strict=True):
        if true != IGNORE:
            wanted[true, guessed] += 1
    assert confusion(guess, classes, size).tolist() == wanted.tolist()


def test_dice_and_iou_are_monais() -> None:
    from monai.metrics import compute_dice, compute_iou

    _, classes = scores_and_classes((8, 9), size=1)
    guess = torch.randint(0, 3, classes.shape, generator=generator(4))
    found = dict(measures(confusion(guess, classes, 3), ("a", "b", "c")))
    pair = [torch.nn.functional.one_hot(part, 3).movedim(-1, 1) for part in (guess, classes)]
    for key, values in (("dice", compute_dice(*pair)[0]), ("iou", compute_iou(*pair)[0])):
        assert [found[f"{key}/{name}"] for name in "abc"] == pytest.approx(values.tolist(), rel=1e-6)
        assert found[f"mean_{key}"] == pytest.approx(float(values.mean()), rel=1e-6)


def test_measures_by_hand_and_a_class_that_is_nowhere() -> None:
    found = dict(measures(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]]), ("water", "land", "ice")))
    assert found["dice/water"] == pytest.approx(12 / 15)
    assert found["iou/land"] == pytest.approx(3 / 6)
    assert "dice/ice" not in found
    assert "iou/ice" not in found
    assert found["mean_dice"] == pytest.approx((12 / 15 + 6 / 9) / 2)
    assert found["mean_iou"] == pytest.approx((6 / 9 + 3 / 6) / 2)


def test_a_class_that_is_only_predicted_or_only_there_has_zero() -> None:
    found = dict(measures(torch.tensor([[4, 1], [0, 0]]), ("a", "b")))
    assert found["dice/b"] == found["iou/b"] == 0
    assert dict(measures(torch.tensor([[4, 0], [2, 0]]), ("a", "b")))["dice/b"] == 0


@pytest.mark.parametrize("patch", [(4,), (4, 4), (2, 4, 4)])
def test_every_parameter_has_a_layer(patch: tuple[int, ...]) -> None:
    model = segmenter(patch)
    depth = model.encoder.settings.depth
    layers = {name: layer_number(name, depth) for name, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(depth + 2))
    assert {name for name, layer in layers.items() if layer == 0} == {"encoder.embed.weight", "encoder.embed.bias", "encoder.class_token"}
    for number in range(depth):
        assert {name for name in layers if name.startswith(f"encoder.blocks.{number}.")} == {
            name for name, layer in layers.items() if layer == number + 1
        }
    last = {name for name, layer in layers.items() if layer == depth + 1}
    assert last == {name for name in layers if name.startswith(("head.", "encoder.norm."))}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrapped_model_has_no_layers(prefix: str) -> None:
    with pytest.raises(
        ValueError, match=rf"parameter {prefix}encoder\.norm\.weight belongs to neither encoder nor head; is the model wrapped"
    ):
        layer_number(f"{prefix}encoder.norm.weight", 4)


class Oracle(Segmenter):
    """Knows that the label is 1 where the first channel is positive."""

    def forward(self, pixels: Tensor, has_value: Tensor, context: Context | None = None, present: Tensor | None = None) -> Tensor:
        return torch.stack([-pixels[:, 0], pixels[:, 0]], dim=1) * 1e4


def oracle() -> Oracle:
    encoder = Encoder(EncoderSettings(preset="nano", patch=(4, 4), mlp_ratio=1), CHANNELS)
    return Oracle(encoder, HeadSettings(features=4), 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return store_of(tmp_path_factory.mktemp("segmentation") / "store", (12, 16))


def task(store: TileStore, augment: AugmentSettings | None = None) -> Segmentation:
    normaliser = Normaliser((12, 16), (0.0,) * 3, (1.0,) * 3, 1, 0, augment)
    return Segmentation((1, 0), ("high", "low"), (0, 1, 2), normaliser, store, np.arange(6), 4, Parallel(0, 1, torch.device("cpu")))


@torch.inference_mode()
def test_an_oracle_is_right_in_the_order_of_the_values(store: TileStore) -> None:
    wrong = dict(task(store).evaluate(oracle(), 0))
    assert wrong["val_crops/mean_dice"] == 0, "the oracle's second score is class 1, the task's first"

    right = dict(replace(task(store), values=(0, 1), names=("low", "high")).evaluate(oracle(), 0))
    assert set(right) == {f"val_crops/{name}" for name in ("dice/high", "dice/low", "iou/high", "iou/low", "mean_dice", "mean_iou")}
    assert set(right.values()) == {1.0}


def test_the_loss_counts_samples_and_moves_labels_with_pixels(store: TileStore) -> None:
    raw = read_rows(store, np.arange(4), names(4))
    assert raw.labels is not None
    raw.labels[2] = -1
    wrong = task(store, AugmentSettings())
    loss = replace(wrong, values=(0, 1)).loss(oracle(), raw, 0.0)
    assert int(loss.count) == 3
    assert float(loss.total.detach()) == pytest.approx(0, abs=0.3), "labels lie on their pixels"
    assert loss.per_sample.tolist()[2] == 0
    assert loss.tile.tolist() == [100, 101, 102, 103]
    assert float(wrong.loss(oracle(), raw, 0.0).total) > 100


@pytest.mark.parametrize("space", [(8, 12), (5, 12), (3, 7)])
@torch.inference_mode()
def test_a_scene_smaller_than_a_crop_is_padded_without_value(space: tuple[int, int]) -> None:
    model = segmenter().eval()
    pixels, has_value = torch.randn(3, *space, generator=generator(0)), torch.rand(space, generator=generator(1)) < 0.9
    chance = probabilities(model, (8, 12), 0.5, pixels, has_value)
    assert chance.shape == (2, *space)
    torch.testing.assert_close(chance.sum(dim=0), torch.ones(space))
    whole, known = torch.zeros(1, 3, 8, 12), torch.zeros(1, 8, 12, dtype=torch.bool)
    whole[0, :, : space[0], : space[1]], known[0, : space[0], : space[1]] = pixels, has_value
    torch.testing.assert_close(chance, model(whole, known)[0].softmax(dim=0)[:, : space[0], : space[1]])


@torch.inference_mode()
def test_a_large_scene_is_labelled_where_it_lies() -> None:
    pixels = torch.randn(3, 30, 41, generator=generator(0))
    chance = probabilities(oracle(), (8, 12), 0.5, pixels, torch.ones(30, 41, dtype=torch.bool))
    assert torch.equal(chance.argmax(dim=0), (pixels[0] > 0).long())


def test_channels_are_put_in_the_models_order_and_missing_ones_are_zero() -> None:
    columns = columns_of(("blue", "red", "nir"), ("red", "green", "blue"))
    assert columns == (2, 0, -1)
    pixels = torch.randn(2, 3, 4, 5, generator=generator(0))
    arranged = arrange(pixels, columns)
    assert torch.equal(arranged[:, 0], pixels[:, 2])
    assert torch.equal(arranged[:, 1], pixels[:, 0])
    assert not arranged[:, 2].any()
    assert torch.equal(arrange(pixels, (0, 1, 2)), pixels)


def test_data_without_any_of_the_channels_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"channels \['T1w'\] and the model knows \['red', 'nir'\]: none in common"):
        columns_of(("red", "nir"), ("T1w",))


def test_whole_scenes_are_judged_and_every_owned_voxel_once(store: TileStore) -> None:
    run = replace(task(store), normaliser=replace(task(store).normaliser, crop=(8, 8)), values=(0, 1))
    found = confusion_by_scene(run, oracle(), 0.5)
    assert set(found) == {"scene"}
    labels = np.concatenate([np.asarray(store.read(row).labels)[:10].ravel() for row in range(6)])
    assert found["scene"].tolist() == [[(labels == 0).sum(), 0], [0, (labels == 1).sum()]]
