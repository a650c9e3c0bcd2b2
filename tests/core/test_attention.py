"""A kernel that does not compute attention is found before training; of those that do, the fastest comes first."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae_core import attention
from mae_core.attention import (
    KERNELS,
    AttentionError,
    AttentionShape,
    attend,
    attended,
    candidates,
    check_attention,
    choose_kernels,
    fastest_first,
    kernel_seconds,
    pinned,
    product_dtype,
    written_out,
)
from mae_core.decoders import CrossDecoderSettings, DecoderSettings
from mae_core.encoders import AnyEncoderSettings
from mae_core.mae import ModelSettings, attention_shapes, tokens_valid
from mae_core.masking import RandomHiding, hide
from mae_core.sparse_conv import SparseConvSettings
from mae_core.vit import EncoderSettings
from tests.synthetic_batches import batch_of, model_of, names, one_thread

__all__ = ["one_thread"]

CPU = torch.device("cpu")
SHAPES = (
    AttentionShape("encoder", 12, 64, 50, 50),
    AttentionShape("encoder", 3, 64, 64, 64),
    AttentionShape("decoder", 16, 32, 217, 217),
    AttentionShape("decoder", 4, 8, 40, 13),
    AttentionShape("decoder", 1, 16, 5, 1),
)
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def unscaled(query: Tensor, key: Tensor, value: Tensor, heads: int, used: Tensor | None) -> Tensor:
    return attend(query * 1.1, key, value, heads, used)


def seeing_all(query: Tensor, key: Tensor, value: Tensor, heads: int, used: Tensor | None) -> Tensor:
    return attend(query, key, value, heads, None)


def seeing_what_the_first_sees(query: Tensor, key: Tensor, value: Tensor, heads: int, used: Tensor | None) -> Tensor:
    return attend(query, key, value, heads, None if used is None else used[:1].expand_as(used))


def without_a_gradient(query: Tensor, key: Tensor, value: Tensor, heads: int, used: Tensor | None) -> Tensor:
    return attend(query, key.detach(), value, heads, used)


def wrong_in_the_last_query(query: Tensor, key: Tensor, value: Tensor, heads: int, used: Tensor | None) -> Tensor:
    out = attend(query, key, value, heads, used)
    return torch.cat([out[:, :-1], out[:, -1:] * 0.5], dim=1)


def not_a_number_backward(query: Tensor, key: Tensor, value: Tensor, heads: int, used: Tensor | None) -> Tensor:
    out = attend(query, key, value, heads, used)
    out.register_hook(lambda slope: slope.index_fill(1, torch.tensor([0]), math.nan))
    return out


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("call", [attend, written_out])
def test_right_kernels_pass(shape: AttentionShape, dtype: torch.dtype, excluding: bool, call: Any) -> None:
    check_attention(shape, CPU, dtype, excluding=excluding, call=call)


@each_dtype
@pytest.mark.parametrize(
    ("call", "excluding", "what"),
    [
        (unscaled, False, "result"),
        (seeing_all, True, "result"),
        (seeing_what_the_first_sees, True, "result"),
        (wrong_in_the_last_query, False, "result"),
        (without_a_gradient, False, "gradient of keys"),
        (not_a_number_backward, True, "gradient of queries"),
    ],
)
def test_a_wrong_kernel_is_found(call: Any, excluding: bool, what: str, dtype: torch.dtype) -> None:
    with pytest.raises(AttentionError, match=f"{what} is off by"):
        check_attention(SHAPES[0], CPU, dtype, excluding=excluding, call=call)


def test_the_error_names_device_dtype_shapes_and_both_errors() -> None:
    wanted = (
        "attention is wrong on cpu in bfloat16 with some keys left out (decoder, 4 heads of 8, 40 queries on 13 keys, 2 samples): "
        "result is off by "
    )
    with pytest.raises(AttentionError, match=re.escape(wanted) + r"\S+ of the largest element, allowed 0.062; take another version"):
        check_attention(SHAPES[3], CPU, torch.bfloat16, excluding=True, call=seeing_all)


def test_a_check_leaves_random_numbers_and_autocast_alone() -> None:
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        check_attention(SHAPES[3], CPU, torch.float32, excluding=False)
        assert product_dtype(CPU) is torch.bfloat16
    assert product_dtype(CPU) is torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_many_scores_are_checked_in_fewer_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(query: Tensor, key: Tensor, value: Tensor, heads: int, used: Tensor | None) -> Tensor:
        seen.append((heads, query.shape))
        return attend(query, key, value, heads, used)

    monkeypatch.setitem(attention.CHECKED_SCORES, "cpu", 2 * 40 * 13)
    check_attention(SHAPES[3], CPU, torch.float32, excluding=False, call=noting)
    assert seen == [(2, (2, 40, 16))]


def test_a_prefix_is_always_looked_at_and_without_one_all_are_where_none_is() -> None:
    used = torch.tensor([[True, False, True], [False, False, False]])
    assert attended(used, 2).tolist() == [[True, True, True, False, True], [True, True, False, False, False]]
    assert attended(used, 0).tolist() == [[True, False, True], [True, True, True]]


class Names(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_what_is_pinned_is_what_torch_takes() -> None:
    tokens = torch.randn(1, 5, 8, requires_grad=True)
    taken = {}
    for kernels in ((), ("plain",), ("flash", "plain")):
        with Names() as called, pinned(kernels):
            attend(tokens, tokens, tokens, 2, None)
        taken[kernels] = any("flash_attention" in name for name in called.found)
    assert taken == {(): True, ("plain",): False, ("flash", "plain"): True}


def test_kernels_are_pinned_in_their_order_and_let_go_again() -> None:
    """Processors ignore the order, so torch is asked for it."""
    before = torch._C._get_sdp_priority_order()
    with pinned(("plain", "cudnn", "flash")):
        assert torch._C._get_sdp_priority_order()[:3] == [int(KERNELS[name]) for name in ("plain", "cudnn", "flash")]
        assert not torch._C._get_mem_efficient_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == before
    assert torch._C._get_mem_efficient_sdp_enabled()


def noted_clock(work: Callable[[], None], device: torch.device) -> float:
    work()
    return 2.0


@each_dtype
def test_a_kernel_that_is_not_there_has_no_time_and_others_have_that_of_all_shapes(dtype: torch.dtype) -> None:
    found = {name: kernel_seconds(name, SHAPES[2:4], CPU, dtype, 3, noted_clock) for name in KERNELS}
    assert found == {"flash": 4.0, "cudnn": math.inf, "efficient": math.inf, "plain": 4.0}


def test_a_wrong_kernel_has_no_time_and_one_that_leaves_nothing_out_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nn.functional.scaled_dot_product_attention

    def forgetful(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return right(query, key, value)

    def limited(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None:
            raise RuntimeError("No available kernel")
        return right(query, key, value)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", forgetful)
    assert kernel_seconds("plain", SHAPES[3:], CPU, torch.float32, 3, noted_clock) == math.inf
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", limited)
    assert kernel_seconds("plain", SHAPES[3:], CPU, torch.float32, 3, noted_clock) == 4.0


def test_the_fastest_comes_first_and_where_there_is_none_that_is_said() -> None:
    assert list(fastest_first({"flash": 3.0, "cudnn": math.inf, "plain": 1.0}, CPU, torch.float32)) == ["plain", "flash"]
    with pytest.raises(AttentionError, match="no kernel of flash, plain computes attention on cpu in bfloat16; take another version"):
        fastest_first({"flash": math.inf, "plain": math.nan}, CPU, torch.bfloat16)


def test_who_asks_for_determinism_gets_the_plain_kernel() -> None:
    assert candidates() == tuple(KERNELS)
    torch.use_deterministic_algorithms(True)
    try:
        assert candidates() == ("plain",)
    finally:
        torch.use_deterministic_algorithms(False)


def test_on_a_processor_nothing_is_timed_and_everything_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "best_seconds", None)
    assert choose_kernels(SHAPES, CPU, torch.float32, 4) == {}
    right = nn.functional.scaled_dot_product_attention

    def wrong(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        out = right(query, key, value, attn_mask=attn_mask)
        return out if attn_mask is None or query.shape[2] != 5 else out * 1.1

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", wrong)
    assert choose_kernels(SHAPES[:4], CPU, torch.float32, 4) == {}
    with pytest.raises(AttentionError, match=r"some keys left out \(decoder, 1 heads of 16, 5 queries on 1 keys"):
        choose_kernels(SHAPES, CPU, torch.float32, 4)


ENCODERS: list[AnyEncoderSettings] = [
    EncoderSettings(preset="nano", patch=(4, 4), num_registers=2),
    EncoderSettings(preset="nano", patch=(4, 4), groups="each", class_token=False),
    SparseConvSettings(preset="nano", patch=(4, 4)),
]


@pytest.mark.parametrize("encoder", ENCODERS, ids=["registers", "groups", "convolutions"])
@pytest.mark.parametrize("decoder", [DecoderSettings(), CrossDecoderSettings(predicted_fraction=0.4)], ids=["self", "cross"])
def test_the_shapes_are_those_of_a_training_step(encoder: Any, decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(ModelSettings(encoder=encoder, decoder=decoder)).train()
    batch = batch_of((16, 12))
    layout = model.encoder.layout((16, 12))
    valid = tokens_valid(layout, batch.counted, batch.present, 0.5)
    plan = hide(valid, layout.full_grid, RandomHiding(mask_ratio=0.6), 0, names(2))
    seen = set()
    right = nn.functional.scaled_dot_product_attention

    def noting(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        seen.add((query.shape[1], query.shape[3], query.shape[2], key.shape[2]))
        return right(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noting)
    model(batch.pixels, batch.counted, batch.present, plan)
    told = attention_shapes(model, (16, 12), 0.6)
    assert {(shape.heads, shape.head_width, shape.queries, shape.keys) for shape in told} == seen
