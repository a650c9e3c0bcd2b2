"""Probes are scikit-learn's and the naive loops', see each group on one side only, and are blind to what has no value."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mae_core import probes
from mae_core.augment import Normaliser, RawBatch
from mae_core.loader import read_rows
from mae_core.nd import patchify, token_grid
from mae_core.parallel import Parallel
from mae_core.probes import (
    PIXELS,
    Level,
    LinearSettings,
    Pool,
    Samples,
    choose_l2,
    classification_measures,
    collect,
    drawn,
    encoded,
    groups_aside,
    knn,
    linear_probe,
    logistic_regression,
    standardise,
    token_classes,
    unencoded,
)
from mae_core.segmentation import IGNORE, Segmentation, confusion
from mae_core.store import TileStore
from mae_core.vit import Encoder, EncoderSettings, all_tokens
from tests.synthetic_batches import CHANNELS, generator, grids, names, one_thread, store_of, with_index

__all__ = ["one_thread"]

CASES = [((24,), (4,)), ((8, 12), (4, 3)), ((4, 8, 6), (2, 4, 2))]


def blobs(num: int = 120, dim: int = 5, classes: int = 3, seed: int = 0, noise: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Features, classes and groups of overlapping clouds; the features differ in scale and centre."""
    truth = torch.randint(0, classes, (num,), generator=generator(seed))
    centres = 2 * torch.randn(classes, dim, generator=generator(100))
    features = centres[truth] + noise * torch.randn(num, dim, generator=generator(seed + 1))
    return features * torch.logspace(-2, 2, dim) + 7, truth, torch.arange(num) % 8


def encoder_of(patch: tuple[int, ...]) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Encoder(EncoderSettings(preset="nano", patch=patch, mlp_ratio=1), CHANNELS).eval()


def test_features_are_standardised_like_batch_norm_without_affine() -> None:
    (train, _, _), (test, _, _) = blobs(), blobs(seed=5)
    train[:, 2] = 0.3
    norm = torch.nn.BatchNorm1d(5, eps=1e-6, affine=False, dtype=torch.float64)
    found = standardise(train, test)
    torch.testing.assert_close(found[0], norm(train.double()))
    norm.running_mean, norm.running_var = train.double().mean(dim=0), train.double().var(dim=0, correction=0)
    torch.testing.assert_close(found[1], norm.eval()(test.double()))
    assert float(found[0][:, 2].abs().max()) < 1e-6


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
@pytest.mark.parametrize("classes", [3, 5])
def test_the_minimum_is_scikit_learns(l2: float, classes: int) -> None:
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    features, truth, _ = blobs(classes=classes)
    features = standardise(features, features)[0]
    ours = logistic_regression(features, truth, classes, l2)
    theirs = LogisticRegression(C=1 / (len(features) * l2), tol=1e-9, max_iter=10_000).fit(features, truth)
    np.testing.assert_allclose(ours.weight.T, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.bias - ours.bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)
    assert ours.classes(features).tolist() == theirs.predict(features).tolist()
    assert ours.gradient < 1e-5


def test_a_fit_that_was_cut_off_says_so() -> None:
    features, truth, groups = blobs()
    whole, cut = (linear_probe(features, truth, groups, features, 3, LinearSettings(l2=(1e-5,), max_iterations=n), 0) for n in (1000, 2))
    assert whole.converged
    assert not cut.converged


def test_the_probe_does_not_care_for_scale_and_centre_of_a_feature() -> None:
    (train, truth, groups), (test, _, _) = blobs(), blobs(seed=5)
    factors, shifts = torch.tensor([3.0, -2.0, 0.5, 40.0, 1.0]), torch.tensor([0.0, 5.0, -1.0, 100.0, 2.0])
    plain = linear_probe(train, truth, groups, test, 3, LinearSettings(), 0)
    moved = linear_probe(train.double() * factors + shifts, truth, groups, test.double() * factors + shifts, 3, LinearSettings(), 0)
    assert torch.equal(plain.classes, moved.classes)
    assert plain.l2 == moved.l2


def test_the_probe_does_not_look_at_the_other_test_samples() -> None:
    (train, truth, groups), (test, _, _) = blobs(), blobs(seed=5)
    whole = linear_probe(train, truth, groups, test, 3, LinearSettings(), 0)
    other = torch.cat([test[:10], 1e3 * test[10:]])
    part = linear_probe(train, truth, groups, other, 3, LinearSettings(), 0)
    assert torch.equal(whole.classes[:10], part.classes[:10])
    assert whole.l2 == part.l2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.floats(0.01, 0.99), st.integers(0, 9))
def test_groups_are_set_aside_whole_and_never_all(numbers: list[int], fraction: float, seed: int) -> None:
    groups = torch.tensor(numbers)
    aside = groups_aside(groups, fraction, seed)
    inside, outside = set(groups[aside].tolist()), set(groups[~aside].tolist())
    assert not inside & outside
    assert len(outside) >= 1
    count = len(inside | outside)
    assert len(inside) == min(max(1, round(fraction * count)), count - 1)
    order = torch.randperm(len(groups), generator=generator(seed))
    assert torch.equal(groups_aside(groups[order], fraction, seed), aside[order])


def test_which_groups_are_set_aside_depends_on_the_seed() -> None:
    groups = torch.arange(20)
    assert len({tuple(groups_aside(groups, 0.2, seed).tolist()) for seed in range(5)}) == 5


@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_is_the_one_that_is_best_on_groups_set_aside(seed: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    choices = (1e-4, 1e-2, 1.0, 10.0)
    features, truth, groups = blobs(num=60, dim=20, noise=5.0)
    aside = groups_aside(groups, 0.3, seed).numpy()
    scaler = StandardScaler().fit(features[~aside].double())
    scores = {}
    for l2 in choices:
        model = LogisticRegression(C=1 / ((~aside).sum() * l2), tol=1e-9, max_iter=10_000)
        model.fit(scaler.transform(features[~aside].double()), truth[~aside])
        scores[l2] = balanced_accuracy_score(truth[aside], model.predict(scaler.transform(features[aside].double())))
    wanted = max(choices, key=lambda l2: (scores[l2], l2))
    assert choose_l2(features, truth, groups, 3, LinearSettings(l2=choices, validation_fraction=0.3), seed) == wanted


def test_one_group_leaves_nothing_to_choose_on() -> None:
    features, truth, groups = blobs()
    assert choose_l2(features, truth, groups * 0, 3, LinearSettings(l2=(1.0, 1e-3, 1e-5)), 0) == 1e-3


def naive_knn(train: Tensor, truth: Tensor, test: Tensor, classes: int, k: int, temperature: float) -> list[int]:
    found = []
    for sample in test.double():
        near = [
            (float(sample @ other / (sample.norm() * other.norm())), int(name)) for other, name in zip(train.double(), truth, strict=True)
        ]
        votes = [0.0] * classes
        for similarity, name in sorted(near, reverse=True)[:k]:
            votes[name] += math.exp(similarity / temperature)
        found.append(votes.index(max(votes)))
    return found


@given(st.integers(0, 2**16), st.integers(1, 40), st.sampled_from([0.07, 1.0]), st.integers(1, 20))
def test_neighbours_vote_as_in_the_naive_loop(seed: int, k: int, temperature: float, block: int) -> None:
    train, test = torch.randn(30, 4, generator=generator(seed)), torch.randn(9, 4, generator=generator(seed + 1))
    truth = torch.randint(0, 3, (30,), generator=generator(seed + 2))
    found = knn(train, truth, test, 3, k, temperature, block)
    assert found.tolist() == naive_knn(train, truth, test, 3, k, temperature)
    lengths = torch.rand(30, 1, generator=generator(seed + 3)) + 0.5
    assert torch.equal(knn(train * lengths, truth, test * 7, 3, k, temperature), found)


def test_neighbours_vote_as_scikit_learns() -> None:
    from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]

    (train, truth, _), (test, _, _) = blobs(), blobs(seed=5)
    theirs = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07))
    assert knn(train, truth, test, 3).tolist() == theirs.fit(train, truth).predict(test).tolist()


@pytest.mark.parametrize("side", ["train", "test"])
def test_features_that_are_not_finite_are_refused(side: str) -> None:
    features, truth, groups = blobs()
    broken = features.clone()
    broken[3, 1] = broken[7, 0] = torch.nan
    train, test = (broken, features) if side == "train" else (features, broken)
    with pytest.raises(ValueError, match="features of 2 of 120 samples are not finite; check the encoder's weights"):
        knn(train, truth, test, 3)
    with pytest.raises(ValueError, match="features of 2 of 120 samples are not finite"):
        linear_probe(train, truth, groups, test, 3, LinearSettings(), 0)


@given(st.integers(0, 2**16), st.integers(2, 4))
def test_measures_are_scikit_learns(seed: int, classes: int) -> None:
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    truth = torch.randint(0, classes, (12,), generator=generator(seed))
    guess = torch.randint(0, classes, (12,), generator=generator(seed + 1))
    found = classification_measures(confusion(guess, truth, classes))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    there = sorted(set(truth.tolist()))
    assert found["balanced_accuracy"] == pytest.approx(recall_score(truth, guess, labels=there, average="macro"))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro"))


def test_measures_by_hand_and_a_class_that_is_nowhere() -> None:
    found = classification_measures(torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert found == pytest.approx({"accuracy": 11 / 14, "balanced_accuracy": (0.8 + 0.75) / 2, "macro_f1": (16 / 19 + 6 / 9) / 2})


@given(grids(), st.integers(0, 2**16))
def test_a_tokens_class_is_its_most_frequent_one(case: tuple[tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    grid, patch = case
    space = tuple(size * part for size, part in zip(grid, patch, strict=True))
    classes = torch.randint(-1, 3, (2, *space), generator=generator(seed))
    wanted = []
    for sample in classes:
        for place in np.ndindex(grid):
            cell = sample[tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, patch, strict=True))].flatten().tolist()
            counts = [cell.count(number) for number in range(3)]
            wanted.append(counts.index(max(counts)) if 2 * sum(counts) >= len(cell) else IGNORE)
    assert token_classes(classes, patch, 3).flatten().tolist() == wanted


@given(st.integers(0, 2**16), st.integers(0, 7))
def test_samples_are_drawn_by_name(seed: int, quota: int) -> None:
    candidate = torch.rand(3, 10, generator=generator(seed)) < 0.5
    tile, quotas = torch.tensor([4, 9, 2]), torch.full((3,), quota)
    chosen = drawn(candidate, quotas, tile, seed)
    assert not (chosen & ~candidate).any()
    assert chosen.sum(dim=1).tolist() == candidate.sum(dim=1).clamp(max=quota).tolist()
    assert torch.equal(drawn(candidate[[2, 0]], quotas[:2], tile[[2, 0]], seed), chosen[[2, 0]])
    assert not (chosen & ~drawn(candidate, quotas + 1, tile, seed)).any(), "more of them keep those that were drawn"


def test_each_tile_draws_its_own() -> None:
    chosen = drawn(torch.ones(2, 50, dtype=torch.bool), torch.tensor([5, 5]), torch.tensor([1, 2]), 0)
    assert not torch.equal(chosen[0], chosen[1])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{len(case[0])} axes")
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Segmentation, Encoder]:
    """A task over a store of six tiles, and an encoder."""
    space, patch = request.param
    return task_of(store_of(tmp_path_factory.mktemp("probes") / "store", space)), encoder_of(patch)


def task_of(store: TileStore) -> Segmentation:
    normaliser = Normaliser(store.space, (0.5,) * 3, (2.0,) * 3, 1, 0, None)
    return Segmentation((0, 1), ("low", "high"), (0, 1, 2), normaliser, store, np.arange(6), 4, Parallel(0, 1, torch.device("cpu")))


def gathered(setting: tuple[Segmentation, Encoder], level: Level = "token", pool: Pool = "mean", limit: int = 10_000) -> Samples:
    return collect(setting[0], {"net": setting[1]}, np.arange(6), level, pool, limit, 0)


@torch.no_grad()
def test_features_and_classes_of_tokens_are_those_of_each_tile(setting: tuple[Segmentation, Encoder]) -> None:
    task, encoder = setting
    patch, space = encoder.settings.patch, task.store.space
    found, at = gathered(setting), 0
    for row in range(6):
        tile = task.store.read(row)
        patches = patchify((torch.from_numpy(tile.pixels)[None] - 0.5) / 2, patch)
        classes = token_classes(torch.from_numpy(np.asarray(tile.labels)).long()[None], patch, 2)[0]
        kept = (classes != IGNORE).nonzero()[:, 0]
        out = encoder(patches, torch.arange(patches.shape[1])[None], token_grid(space, patch))[0, 1:]
        part = slice(at, at + len(kept))
        torch.testing.assert_close(found.features["net"][part], out[kept], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.features[PIXELS][part], patches[0].flatten(1)[kept])
        assert found.classes[part].tolist() == classes[kept].tolist()
        at += len(kept)
    assert at == len(found.classes) == len(found.groups)


@torch.no_grad()
def test_a_tile_is_the_mean_of_its_tokens_or_its_class_token(setting: tuple[Segmentation, Encoder]) -> None:
    task, encoder = setting
    patch = encoder.settings.patch
    pixels = torch.stack([torch.from_numpy(task.store.read(row).pixels) for row in range(6)]) / 2 - 0.25
    patches = patchify(pixels, patch)
    out = encoder(patches, torch.arange(patches.shape[1]).expand(6, -1), token_grid(task.store.space, patch))
    labels = torch.from_numpy(np.stack([np.asarray(task.store.read(row).labels) for row in range(6)])).flatten(1)
    mean, token = gathered(setting, "tile"), gathered(setting, "tile", "class")
    torch.testing.assert_close(mean.features["net"], out[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(token.features["net"], out[:, 0], rtol=1e-4, atol=1e-5)
    flat = pixels.flatten(2)
    torch.testing.assert_close(mean.features[PIXELS], torch.cat([flat.mean(dim=2), flat.std(dim=2, correction=0)], dim=1))
    assert mean.classes.tolist() == ((labels == 1).sum(dim=1) > (labels == 0).sum(dim=1)).long().tolist()


def test_samples_know_their_group_and_their_tile_has_the_quota_of_its_row(setting: tuple[Segmentation, Encoder]) -> None:
    task, encoder = setting
    other = replace(task, store=with_index(task.store, group=np.array(["c", "a", "b", "a", "b", "b"])))
    rows = np.array([4, 0, 3])
    found = collect(other, {"net": encoder}, rows, "token", "mean", 5, 0)
    assert found.groups.tolist() == [1, 2, 2, 0, 0], "quotas 1, 2, 2 of the tiles of b, c, a"


@pytest.mark.parametrize("limit", [1, 4, 6, 8, 13])
def test_samples_are_limited_and_evenly_drawn(setting: tuple[Segmentation, Encoder], limit: int) -> None:
    whole, part = gathered(setting), gathered(setting, limit=limit)
    assert len(part.classes) == limit
    same = (part.features[PIXELS][:, None] == whole.features[PIXELS][None]).all(dim=2).float().argmax(dim=1)
    assert torch.equal(same, same.unique()), "different ones, in the order of the tiles"
    assert torch.equal(whole.classes[same], part.classes)
    torch.testing.assert_close(whole.features["net"][same], part.features["net"], rtol=1e-4, atol=1e-5)
    assert len(gathered(setting, "tile", limit=limit).classes) == min(limit, 6)
    smaller = replace(setting[0], batch_size=1), setting[1]
    assert torch.equal(gathered(smaller, limit=limit).features[PIXELS], part.features[PIXELS])


@pytest.mark.parametrize("level", ["token", "tile"])
def test_what_has_no_value_changes_nothing(setting: tuple[Segmentation, Encoder], level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = read_rows(setting[0].store, np.arange(6), replace(names(6), tile=torch.arange(6)))
    assert raw.labels is not None
    empty = torch.rand(raw.quality.shape, generator=generator(0)) < 0.3
    empty[0] = True
    found = []
    for rubbish, label in ((torch.nan, 0), (1e30, 1)):
        pixels = torch.where(empty[:, None], rubbish, raw.pixels)
        spoilt = replace(raw, pixels=pixels, quality=empty.to(torch.uint8), labels=torch.where(empty, label, raw.labels))

        def batches(*_: object, spoilt: RawBatch = spoilt) -> list[RawBatch]:
            return [spoilt]

        monkeypatch.setattr(probes, "fixed_batches", batches)
        found.append(gathered(setting, level))
    assert len(found[0].classes)
    assert IGNORE not in found[0].classes, "the first tile is empty and gives no sample"
    assert torch.equal(found[0].classes, found[1].classes)
    for arm in ("net", PIXELS):
        assert torch.equal(found[0].features[arm], found[1].features[arm])
        assert found[0].features[arm].isfinite().all()


@torch.no_grad()
def test_a_tiles_features_are_of_what_holds_a_value() -> None:
    encoder = encoder_of((4, 4))
    pixels, has_value = torch.randn(1, 3, 8, 12, generator=generator(0)), torch.ones(1, 8, 12, dtype=torch.bool)
    has_value[:, :, 8:] = False
    pixels[:, :, :, 8:] = 0
    ids = torch.tensor([[0, 1, 3, 4]])
    seen = encoder(patchify(pixels, (4, 4))[:, ids[0]], ids, (2, 3))
    every = all_tokens(encoder.layout((8, 12)), pixels, has_value)
    torch.testing.assert_close(encoded(encoder, every, None, "tile", "mean")[:, 0], seen[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)
    known = pixels[:, :, :, :8].flatten(2)
    wanted = torch.cat([known.mean(dim=2), known.std(dim=2, correction=0)], dim=1)
    torch.testing.assert_close(unencoded(pixels, has_value, (4, 4), "tile")[:, 0], wanted)
