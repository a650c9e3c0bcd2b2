"""No training begins on a kernel that does not compute attention, and the run says which it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_core.attention import AttentionError, AttentionShape
from mae_core.parallel import Parallel
from pipelines import kernels
from pipelines.kernels import checked_attention
from pipelines.pretrain import main
from tests.tiny_runs import arguments, quick, shared_store, shared_tracking

__all__ = ["quick"]

ALONE = Parallel(0, 1, torch.device("cpu"))
SHAPES = [AttentionShape("encoder", 2, 8, 5, 5)]


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nn.functional.scaled_dot_product_attention

    def doubled(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return 2 * right(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", doubled)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
@pytest.mark.usefixtures("wrong")
def test_it_is_checked_in_what_is_trained_in(precision: str, dtype: str) -> None:
    with (
        pytest.raises(AttentionError, match=f"attention is wrong on cpu in {dtype} "),
        checked_attention(SHAPES, precision, 2, ALONE, print),
    ):
        pytest.fail("nothing is trained")


def test_the_choice_is_told_pinned_and_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(kernels, "choose_kernels", lambda *_: {"plain": 0.0012, "flash": 0.0034})
    with checked_attention(SHAPES, "fp32", 2, ALONE, said.append) as taken:
        assert not torch._C._get_mem_efficient_sdp_enabled()
    assert taken == ["plain", "flash"]
    assert said == ["attention by the first of these kernels that can do what is asked: plain 1.20 ms, flash 3.40 ms"]
    assert torch._C._get_mem_efficient_sdp_enabled()


def test_the_result_holds_the_choice(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    words = arguments(shared_store(tmp_path_factory), tmp_path / "run", shared_tracking(tmp_path_factory), train__steps=1)
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["attention"] == []


@pytest.mark.usefixtures("wrong")
def test_a_wrong_kernel_ends_the_verb_before_the_first_step(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(shared_store(tmp_path_factory), tmp_path / "run", shared_tracking(tmp_path_factory), train__checkpoint_steps=1)
    assert main(words) == 1
    errors = capsys.readouterr().err
    assert "attention is wrong on cpu in float32 with no keys left out (encoder, 4 heads of 32, 2 queries on 2 keys, 2 samples)" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "run").glob("checkpoints/*"))
