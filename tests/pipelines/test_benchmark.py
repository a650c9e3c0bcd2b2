"""The benchmark of the step: real steps in turns, ratios and floors by hand, and refusal where a rate would mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_core.flops import products, training_flops
from mae_core.mae import MaskedAutoencoder
from mae_core.nd import patchify
from mae_core.speed import product_rates, timed
from pipelines import benchmark_contestants, benchmark_peers, benchmark_step
from pipelines.benchmark import SUBJECTS, main
from pipelines.benchmark_contestants import Contestant, StepSettings, make_bench, make_ours, make_peers
from pipelines.benchmark_machine import group_of, kept_bytes, shares_of
from pipelines.benchmark_peers import PeerError, PeerShape, hidden_loss, make_peer
from pipelines.benchmark_report import busy_note, floor_of, ratios
from pipelines.benchmark_step import ceiling_of, check_losses, race
from pipelines.run_folder import RunError
from pipelines.terravox import main as terravox
from tests.tiny_runs import ROOT, one_thread

CPU = torch.device("cpu")
TINY = ["model.encoder.preset=nano", "model.encoder.patch=[4]", "channels=2", "batch_size=2", "device=cpu", "precision=fp32", "lr=1e-3"]
QUICK = [*TINY, "square_sizes=[32,64]", "max_drift_fraction=99", "rounds=4"]
SHAPE = PeerShape("nano", (32, 1, 2), 4.0, 2, (16, 16), (4, 4), 0.75)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr("mae_core.speed.SHORTEST_S", 1e-4)
    monkeypatch.setattr("pipelines.benchmark_machine.COPIED_BYTES", 2**20)
    with one_thread():
        yield


def settings(**more: Any) -> StepSettings:
    model = {"encoder": {"preset": "nano", "patch": [4]}, "decoder": {"width": 32, "depth": 1, "heads": 2}}
    return StepSettings.model_validate({"space": [16, 16], "channels": 2, "batch_size": 2, "device": "cpu", "model": model} | more)


def contestant(losses: list[float], name: str = "one") -> Contestant:
    model = nn.Linear(1, 1)
    made = Contestant(name, model, lambda _: torch.zeros(()), torch.optim.SGD(model.parameters()), 1, "0")
    made.losses = [torch.tensor(loss) for loss in losses]
    return made


@pytest.mark.parametrize(
    ("space", "peers", "out_of_peers", "more"),
    [
        ("[32]", ["transformers"], ["transformers"], []),
        ("[16,16]", ["transformers", "monai"], [], []),
        ("[8,8,8]", ["transformers", "monai"], ["transformers"], ["profile=true", "datasheet_tflops=1"]),
    ],
)
def test_the_verb_on_one_to_three_axes(
    space: str, peers: list[str], out_of_peers: list[str], more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "figures.json"
    assert main(["step", *QUICK, f"space={space}", f"peers=[{','.join(peers)}]", f"out={out}", *more]) == 0
    found = json.loads(out.read_text())
    printed = " ".join(capsys.readouterr().out.split())
    assert list(found["left_out"]) == out_of_peers
    assert len(found["models"]) == 1 + len(peers) - len(out_of_peers)
    for name, figures in found["models"].items():
        assert len(figures["step_seconds_of_rounds"]) == 4
        assert figures["last_loss"] < figures["first_loss"]
        ceiling = found["matrix_product_flops_per_second"]["ceiling"]
        work = figures["samples_per_second"] * figures["gflops_per_sample"] * 1e9
        assert figures["fraction_of_matrix_product"] == pytest.approx(work / ceiling)
        assert figures["kept_bytes"] > 0
        if more:
            assert sum(found["operator_shares"][name].values()) == pytest.approx(1)
            assert found["operator_shares"][name]["matmul"] > 0.02
    rates = found["matrix_product_flops_per_second"]["before"]
    assert {"square 32", "square 64", "encoder.mlp_in"} <= set(rates["fp32"])
    assert "square 32" in rates["bf16"]
    assert "samples/s |" in printed
    assert "binding:" in printed
    assert {"torch", "threads", "device", "precision", "computes_bf16", "python"} <= set(found["machine"])
    assert found["config"]["hiding"]["mask_ratio"] == 0.75
    for name in out_of_peers:
        assert f"left out: {name}" in printed


def test_no_subject_is_the_step_and_another_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["step"]):
        assert main([*words, "--print-config", "channels=5"]) == 0
        assert "channels: 5  # command line" in capsys.readouterr().out
    assert terravox(["benchmark", "step", "--help"]) == 0
    assert "usage: python pipelines/benchmark.py" in capsys.readouterr().out
    assert main(["stepp"]) == 2
    assert "unknown subject stepp; did you mean step?" in capsys.readouterr().err
    assert SUBJECTS[0] == "step"


def test_a_crop_that_is_no_multiple_of_the_patch_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", *QUICK, "space=[18,16]", "peers=[]"]) == 1
    assert "not a multiple of patch" in capsys.readouterr().err


def test_our_step_is_the_same_bits_whoever_else_takes_part() -> None:
    alone, beside = (
        {each.name: each for each in contestants} for contestants in (raced(settings(peers=[])), raced(settings(peers=["monai"])))
    )
    assert len(beside) == 2
    assert [float(loss) for loss in alone["terravox"].losses] == [float(loss) for loss in beside["terravox"].losses]


def raced(own: StepSettings) -> list[Contestant]:
    """Contestants after all their steps."""
    bench = make_bench(own)
    contestants = [*make_ours(bench), *make_peers(bench)[0]]
    race(bench, contestants)
    return contestants


def test_the_models_take_turns_and_do_as_many_steps_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    one, two = contestant([], "one"), contestant([], "two")
    for each in (one, two):
        monkeypatch.setattr(each, "step", lambda each=each: order.append(each.name))
        monkeypatch.setattr(each, "loss", lambda _: torch.ones((), requires_grad=True) * 1)
    race(make_bench(settings(rounds=3, steps=2, warmup_steps=2)), [one, two])
    assert order == ["one"] * 2 + ["two"] * 2 + (["one"] * 2 + ["two"] * 2) * 3
    assert [len(each.seconds) for each in (one, two)] == [3, 3]


def compiled_run() -> None:
    """Fails if the model is no single graph, is compiled again, or learns something else than the plain one."""
    torch.set_num_threads(1)
    plain, compiled = raced(settings(peers=[], compile=True, compile_backend="aot_eager", rounds=3))
    assert compiled.name == "terravox compiled"
    torch.testing.assert_close(torch.stack(compiled.losses), torch.stack(plain.losses))


def test_compiled_as_one_graph_it_learns_the_same_and_is_not_compiled_again() -> None:
    """In a process of its own: the checks of shape types that pytest puts around every function cannot be traced."""
    code = "from tests.pipelines.test_benchmark import compiled_run; compiled_run()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_that_is_compiled_again_after_the_warm_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter([1, 2, 2, 2])
    monkeypatch.setattr(benchmark_step, "num_graphs", lambda: next(numbers))
    with pytest.raises(RunError, match="compiled 1 times more after 3 warm-up steps"):
        raced(settings(peers=[], rounds=3))


@pytest.mark.parametrize("losses", [[1.0, float("nan"), 0.5], [1.0, 1.0, 1.0], [1.0, 0.5, 2.0], [float("inf"), 1.0, 0.5]])
def test_a_loss_that_is_not_finite_or_does_not_fall_is_refused(losses: list[float]) -> None:
    with pytest.raises(RunError, match="the loss of bad is not finite or does not fall"):
        check_losses([contestant([2.0, 1.0, 0.5]), contestant(losses, "bad")])


def test_a_loss_is_judged_by_its_quarters() -> None:
    check_losses([contestant([1.0, 3.0, 2.2, 1.5, 1.4, 1.6, 1.9, 1.2])])


def test_a_machine_that_changes_its_speed_is_refused() -> None:
    def rates(fp32: float) -> dict[str, dict[str, float]]:
        return {"fp32": {"a": fp32, "b": 1.0}, "bf16": {"a": 7.0}}

    assert ceiling_of({"before": rates(10), "after": rates(12)}, torch.float32, 0.3) == pytest.approx((12, 0.2))
    assert ceiling_of({"before": rates(10), "after": rates(20)}, torch.bfloat16, 0.3) == (7, 0)
    for before, after in ((10, 14), (14, 10)):
        with pytest.raises(RunError, match=r"40% apart \(allowed 30%\)"):
            ceiling_of({"before": rates(before), "after": rates(after)}, torch.float32, 0.3)


def test_ratios_are_of_the_same_round() -> None:
    found = ratios({"ours": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 4.0]}, ["ours"])
    assert found == {"ours": {"peer": {"median": 2.0, "least": 1.0, "most": 3.0}}}


def test_floors_by_hand() -> None:
    """Of ten seconds: six of products; 100 bytes and 28 for each of 25 weights at 400 a second are two more."""
    found = floor_of(10.0, 6.0, 100.0, 25, 400.0)
    assert found["compute"] == pytest.approx(0.6)
    assert found["memory"] == pytest.approx(0.2)
    assert found["optimiser"] == pytest.approx(0.175)
    assert found["rest"] == pytest.approx(0.2)
    assert found["binding"] == "compute"
    assert floor_of(10.0, 1.0, 2400.0, 0, 400.0)["binding"] == "memory"
    assert floor_of(10.0, 1.0, 0.0, 0, 400.0)["binding"] == "launch and what is not fused"


@pytest.mark.parametrize(("load", "busy"), [(0.9, False), (3.5, True), (None, False)])
def test_a_busy_machine_is_told(load: float | None, busy: bool) -> None:
    assert ("3.5 processes at once" in busy_note({"load_average": load, "cores": 2})) == busy


def test_rates_are_operations_by_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_core.speed.best_time", lambda work, device: work() or 0.5)
    assert product_rates({"a": (2, 3, 5)}, torch.bfloat16, CPU) == {"a": 2 * 2 * 3 * 5 / 0.5}


def test_a_time_is_of_one_call() -> None:
    calls: list[int] = []
    assert timed(lambda: calls.append(1), 5, CPU) > 0
    assert len(calls) == 5


def test_what_is_kept_for_the_backward_pass() -> None:
    """A linear layer keeps its input, relu its output; weights are not counted and a shared storage only once."""
    model = nn.Linear(4, 8, bias=False)
    given = torch.randn(3, 4, requires_grad=True)
    assert kept_bytes(model, lambda: model(given).relu().sum()) == 4 * (3 * 4 + 3 * 8)
    assert kept_bytes(model, lambda: sum((model(given) for _ in range(2)), torch.zeros(8)).sum()) == 4 * 3 * 4


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::addmm", "matmul"),
        ("aten::bmm", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("mkl::_mkl_linear", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("aten::native_layer_norm_backward", "norm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norm"),
        ("aten::_fused_adamw_", "optimiser"),
        ("aten::_foreach_norm", "optimiser"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("triton_poi_fused_gelu_3", "elementwise"),
        ("aten::gelu_backward", "elementwise"),
        ("void at::native::elementwise_kernel<128, 2, direct_copy_kernel_cuda>", "copy"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("aten::cat", "copy"),
        ("aten::view", "other"),
    ],
)
def test_groups_of_operators(name: str, group: str) -> None:
    assert group_of(name) == group


def test_shares_of_groups() -> None:
    found = shares_of([("aten::mm", 6.0), ("aten::addmm", 2.0), ("aten::gelu", 1.0), ("strange", 1.0)])
    assert found["matmul"] == pytest.approx(0.8)
    assert found["elementwise"] == found["other"] == pytest.approx(0.1)
    assert next(iter(found)) == "matmul"
    assert set(shares_of([]).values()) == {0.0}


def test_the_loss_around_a_peer_equals_a_loop() -> None:
    torch.manual_seed(0)
    pixels, patch = torch.randn(2, 3, 4, 6), (2, 3)
    predicted = torch.randn(2, 4, 18)
    hidden = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]])
    errors = []
    for sample in range(2):
        for token in range(4):
            values = patchify(pixels, patch)[sample, token].flatten()
            wanted = (values - values.mean()) / (values.var() + 1e-6).sqrt()
            if hidden[sample, token]:
                errors.append((predicted[sample, token] - wanted).square().mean())
    torch.testing.assert_close(hidden_loss(predicted, hidden, pixels, patch), torch.stack(errors).mean())


@pytest.mark.parametrize("name", ["transformers", "monai"])
def test_a_peer_has_the_work_of_ours(name: Any) -> None:
    """The same but for the embedding of hidden patches and the head on all of them."""
    pytest.importorskip(name)
    bench = make_bench(settings(peers=[name]))
    ours, (peer,) = make_ours(bench)[0], make_peers(bench)[0]
    assert isinstance(ours.model, MaskedAutoencoder)
    tokens, voxels, kept = 16, 2 * 16, 4
    more = 2 * 2 * (tokens - kept) * voxels * 128 + 3 * 2 * (kept + 1) * voxels * 32
    bound = more + 3 * 2 * (tokens + 1) * 128 * 3
    ours_flops = training_flops(products(ours.model, (16, 16), 0.75))
    assert ours.flops == ours_flops
    assert 0 < peer.flops - ours_flops <= bound


def test_a_peer_that_is_not_installed_or_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PeerError, match=r"not installed .*pip install transformers"):
        make_peer("transformers", SHAPE)
    monkeypatch.setattr(benchmark_peers, "_monai", refusing(ValueError("widths of this kind only")))
    with pytest.raises(PeerError, match=r"cannot be built to space \(16, 16\), patch \(4, 4\): widths of this kind only"):
        make_peer("monai", SHAPE)


def test_a_peer_that_fails_in_a_step_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor], str]:
        return nn.Linear(1, 1), refusing(RuntimeError("Index put requires one dtype\nand more")), "9"

    monkeypatch.setattr(benchmark_contestants, "make_peer", failing)
    taking_part, left_out = make_peers(make_bench(settings(peers=["monai"])))
    assert not taking_part
    assert left_out == {"monai": "monai 9 fails in a step in torch.float32: Index put requires one dtype"}


def test_monai_fails_in_bf16_and_says_so() -> None:
    """Once it does not, this test is to go, and so is the remark in the README."""
    _, left_out = make_peers(make_bench(settings(peers=["monai"], precision="bf16")))
    assert "fails in a step in torch.bfloat16" in left_out["monai"]


def refusing(error: Exception) -> Callable[..., Any]:
    """A function that raises."""

    def refuse(*_: Any) -> Any:
        raise error

    return refuse
