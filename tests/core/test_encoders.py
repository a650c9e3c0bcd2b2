"""Whatever the encoder, decoder and their options: what is hidden stays hidden, everything learns, and a model can be kept."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_core.context import ContextSettings, only_spacing
from mae_core.decoders import CrossDecoderSettings, DecoderSettings
from mae_core.encoders import AnyEncoderSettings, build_encoder
from mae_core.export import Description, load_encoder, load_segmenter, save_model
from mae_core.heads import HeadSettings, Segmenter
from mae_core.mae import MaskedAutoencoder, ModelSettings, tokens_valid
from mae_core.masking import HidingPlan, RandomHiding, hide
from mae_core.positions import PositionSettings
from mae_core.segmentation import layer_number
from mae_core.sparse_conv import SparseConvSettings
from mae_core.vit import EncoderSettings, channel_groups, pooled
from tests.synthetic_batches import CHANNELS, generator, model_of, names, one_thread

__all__ = ["one_thread"]

SPACE, PATCH = (16, 12), (4, 4)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no class token": {"class_token": False},
    "registers": {"num_registers": 2},
    "groups": {"groups": (("red", "blue"), ("green",))},
    "a group each": {"groups": "each"},
    "overlap": {"stride": (2, 2)},
    "overlap and groups": {"stride": (2, 4), "groups": "each"},
    "physical": {"positions": PositionSettings(unit="physical")},
    "learned": {"positions": PositionSettings(kind="learned", grid=(3, 3))},
    "context": {"context": ContextSettings(kinds=("resolution", "year"))},
    "recompute": {"recompute": True},
}
ENCODERS: dict[str, AnyEncoderSettings] = {
    name: EncoderSettings(preset="nano", patch=PATCH, mlp_ratio=2, **options) for name, options in OPTIONS.items()
} | {"sparse convolution": SparseConvSettings(preset="nano", patch=PATCH, mlp_ratio=2)}
DECODERS = [DecoderSettings(width=32, depth=1, heads=2), CrossDecoderSettings(width=32, depth=1, heads=2, predicted_fraction=0.5)]
each_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=list(ENCODERS))


def some(encoder: AnyEncoderSettings, decoder: Any = DECODERS[0]) -> tuple[MaskedAutoencoder, dict[str, Any], HidingPlan]:
    """A model, what it is fed and what is hidden; the second sample has a band without values."""
    model = model_of(ModelSettings(encoder=encoder, decoder=decoder))
    pixels = torch.randn(2, 3, *SPACE, generator=generator(0))
    counted, present = torch.ones(2, *SPACE, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    counted[1, :5] = False
    layout = model.encoder.layout(SPACE)
    valid = tokens_valid(layout, counted, present, 0.5)
    plan = hide(valid, layout.full_grid, RandomHiding(mask_ratio=0.6), 0, names(2))
    fed = {"pixels": torch.where(counted[:, None], pixels, 0.0), "counted": counted, "present": present}
    return model, fed | {"context": only_spacing(torch.tensor([[10.0, 10.0], [20.0, 10.0]]))}, plan


def both(encoder: AnyEncoderSettings) -> list[tuple[MaskedAutoencoder, dict[str, Any], HidingPlan]]:
    return [some(encoder, decoder) for decoder in DECODERS]


@each_encoder
@torch.no_grad()
def test_what_no_shown_token_holds_changes_no_prediction(encoder: AnyEncoderSettings) -> None:
    for model, fed, plan in both(encoder):
        seen = model.encoder.layout(SPACE).seen(plan.visible, torch.ones_like(plan.visible_used))
        assert not seen.all()
        before = model(**fed, plan=plan)
        after = model(**fed | {"pixels": torch.where(seen, fed["pixels"], torch.nan)}, plan=plan)
        assert torch.equal(before.predicted, after.predicted), "bit for bit"


@each_encoder
@torch.no_grad()
def test_no_element_is_judged_that_was_shown_or_has_no_value(encoder: AnyEncoderSettings) -> None:
    """Marked pixels: targets of counted elements, joined, may only come from unseen voxels that count."""
    settings = ModelSettings(encoder=encoder, decoder=DECODERS[0]).model_dump() | {"target": {"kind": "pixels"}}
    model, fed, plan = some(encoder)
    model.settings = ModelSettings.model_validate(settings)
    layout = model.encoder.layout(SPACE)
    output = model(**fed, plan=plan)
    share, _ = layout.join(output.target.counted.float(), plan.hidden, torch.ones_like(plan.hidden_used))
    judged = share > 0
    seen = layout.seen(plan.visible, plan.visible_used)
    assert judged.any()
    assert not (judged & seen).any()
    assert not (judged & ~fed["counted"][:, None]).any()


@each_encoder
def test_every_parameter_learns(encoder: AnyEncoderSettings) -> None:
    """Without that, processes that reduce gradients together would wait for ever."""
    for model, fed, plan in both(encoder):
        output = model(**fed, plan=plan)
        (output.error_sum.sum() / output.count.sum()).backward()
        assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
        assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@each_encoder
def test_the_loss_falls(encoder: AnyEncoderSettings) -> None:
    model, fed, plan = some(encoder)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        output = model(**fed, plan=plan)
        loss = output.error_sum.sum() / output.count.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@each_encoder
def test_a_segmenter_of_it_scores_every_voxel_and_can_be_kept(encoder: AnyEncoderSettings, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Segmenter(build_encoder(encoder, CHANNELS), HeadSettings(features=4), 2).eval()
    pixels, known = torch.randn(2, 3, *SPACE, generator=generator(1)), torch.ones(2, *SPACE, dtype=torch.bool)
    known[0, :4, :4] = False
    context = only_spacing(torch.full((2, 2), 10.0))
    about: dict[str, Any] = {
        "modality": "raster",
        "channels": CHANNELS,
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "no_value": 1,
        "crop": SPACE,
    }
    about |= {"spacing": (10.0, 10.0), "spacing_unit": "m", "encoder": encoder, "reader": {}, "lineage": {}}
    with torch.no_grad():
        scores = model(pixels, known, context)
        assert scores.shape == (2, 2, *SPACE)
        assert scores.isfinite().all()
        save_model(
            tmp_path / "s", model, Description(kind="segmenter", head=HeadSettings(features=4), classes=((0, "a"), (1, "b")), **about)
        )
        assert torch.equal(load_segmenter(tmp_path / "s")[0](pixels, known, context), scores)
    save_model(tmp_path / "e", model.encoder, Description(kind="encoder", **about))
    back, description = load_encoder(tmp_path / "e")
    assert description.encoder == encoder
    assert all(torch.equal(one, back.state_dict()[name]) for name, one in model.encoder.state_dict().items())


@pytest.mark.parametrize(
    ("encoder", "decoder"), [(ENCODERS["plain"], DECODERS[0]), (ENCODERS["groups"], DECODERS[1])], ids=("plain", "groups")
)
def test_one_graph_and_no_second_compilation(encoder: AnyEncoderSettings, decoder: Any) -> None:
    """In a process of its own, because the tests' shape checks cannot be compiled."""
    code = f"""
import torch, torch._dynamo
from mae_core.mae import ModelSettings, MaskedAutoencoder
from mae_core.masking import RandomHiding, Sample, hide
for space, patch in (((16, 24), (8, 8)), ((8, 16, 8), (4, 8, 4))):
    made = ModelSettings.model_validate({ModelSettings(encoder=encoder, decoder=decoder).model_dump()!r} )
    made = made.model_copy(update={{"encoder": made.encoder.model_copy(update={{"patch": patch}})}})
    model = MaskedAutoencoder(made, {CHANNELS!r})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for step in range(3):
        number = torch.arange(2)
        layout = model.encoder.layout(space)
        length = len(layout.groups) * layout.num_places
        plan = hide(torch.ones(2, length, dtype=torch.bool), layout.full_grid, RandomHiding(), step, Sample(number, number, number), True)
        fed = torch.randn(2, 3, *space), torch.ones(2, *space, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool), plan
        output = compiled(*fed)
        output.error_sum.sum().backward()
        if made.decoder.kind == "self_attention":
            torch.testing.assert_close(output.error_sum, model(*fed).error_sum)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, torch._dynamo.utils.counters
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_mean_over_no_token_is_zero_and_a_class_token_must_be_there() -> None:
    features = torch.randn(2, 4, 8, generator=generator(0))
    used = torch.tensor([[True, False, True], [False] * 3])
    mean = pooled(features, 1, used, "mean")
    torch.testing.assert_close(mean[0], (features[0, 1] + features[0, 3]) / 2)
    assert not mean[1].any()
    assert torch.equal(pooled(features, 1, None, "class"), features[:, 0])
    torch.testing.assert_close(pooled(features, 2, None, "mean"), features[:, 2:].mean(dim=1))
    with pytest.raises(ValueError, match="this encoder has no class token; pool=mean takes the mean of its tokens"):
        pooled(features, 0, None, "class")


@pytest.mark.parametrize(
    "groups", [(("red",), ("green",)), (("red", "green", "blue"), ("red",)), (("red", "green", "blue"), ()), (("x",),)]
)
def test_groups_that_do_not_divide_the_channels_are_refused(groups: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"must name each channel of the data once: \['red', 'green', 'blue'\]"):
        channel_groups(groups, CHANNELS)


def test_dropped_paths_are_drawn_anew_and_only_in_training() -> None:
    model = model_of(ModelSettings(encoder=EncoderSettings(preset="nano", patch=PATCH, drop_path=0.5), decoder=DECODERS[0]))
    patches, ids = torch.randn(8, 3, 3, 16, generator=generator(0)), torch.arange(3).expand(8, -1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        found: list[Tensor] = [model.encoder(patches, ids, (2, 2)) for _ in range(2)]
        torch.manual_seed(0)
        again = model.encoder(patches, ids, (2, 2))
        silent = [model.eval().encoder(patches, ids, (2, 2)) for _ in range(2)]
    assert torch.equal(found[0], again)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(silent[0], silent[1])
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    assert math.isfinite(float(found[0].sum()))


@each_encoder
def test_whatever_comes_before_the_blocks_is_layer_zero(encoder: AnyEncoderSettings) -> None:
    """Without that, layer-wise decay would leave tokens, places and context at the full rate."""
    model = Segmenter(build_encoder(encoder, CHANNELS), HeadSettings(features=4), 2)
    for name, _ in model.named_parameters():
        late = name.startswith(("head.", "encoder.norm."))
        block = name.startswith("encoder.blocks.")
        wanted = encoder.depth + 1 if late else int(name.split(".")[2]) + 1 if block else 0
        assert layer_number(name, encoder.depth) == wanted, name


def test_model_and_loop_train_where_nothing_but_torch_is_installed() -> None:
    """On a bare machine: no zarr, MLflow, MONAI or matplotlib can be imported, and a step is made."""
    code = """
import sys
heavy = "zarr numcodecs mlflow monai matplotlib pyarrow dask rasterio nibabel scipy safetensors rich omegaconf"
for name in heavy.split():
    sys.modules[name] = None
import torch
import mae_core.train
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.masking import RandomHiding, Sample, hide
from mae_core.optim import OptimSettings, make_optimiser
model = MaskedAutoencoder(ModelSettings.model_validate({"encoder": {"preset": "nano", "patch": [4, 4]}}), ["a"])
number = torch.arange(2)
plan = hide(torch.ones(2, 9, dtype=torch.bool), (1, 3, 3), RandomHiding(), 0, Sample(number, number, number))
output = model(torch.randn(2, 1, 12, 12), torch.ones(2, 12, 12, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool), plan)
output.error_sum.sum().backward()
make_optimiser(model, OptimSettings(), 1e-3).step()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
