"""Linear layers of bfloat16 on a processor that is faster in float32: the same numbers, summed in another order."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny
from layers import normal
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention

from quantkit import precision
from quantkit.mixed import plan_mixed
from quantkit.precision import PRODUCTS_IN_FLOAT32, bfloat16_is_faster, forward_products
from quantkit.report import Event, Note
from quantkit.run import quantize
from quantkit.solvers.factor import Factor, factorize

BF16, CPU = torch.bfloat16, torch.device("cpu")
OF_PEERS = Path(__file__).parent.parent / "evals" / "quality" / "peers" / "products.py"
ONEDNN = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # else torch's own loops, which sum in bfloat16

X86 = {"architecture": "x86_64"}
AVX512 = {**X86, "cpu_name": "Intel Xeon", "avx512_f": True}


@pytest.mark.parametrize(
    ("capabilities", "faster"),
    [
        ({**X86, "cpu_name": "AMD EPYC 7R13", "avx2": True}, False),
        (AVX512, False),
        ({**AVX512, "avx512_bf16": True}, False),
        ({**AVX512, "avx512_bf16": True, "amx_bf16": True}, True),
        ({**X86, "cpu_name": "AMD EPYC 9R14", "avx512_bf16": True}, True),
        ({"architecture": "aarch64"}, ONEDNN),
    ],
)
def test_the_faster_precision_follows_from_what_the_cpu_has(
    capabilities: dict[str, object], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert bfloat16_is_faster.__wrapped__() == faster
    assert runpy.run_path(str(OF_PEERS))["_bfloat16_is_faster"]() == faster


@pytest.mark.usefixtures("faster_in_float32")
def test_peers_of_the_quality_study_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX512)
    given = normal(12, 16).view(1, 3, 4, 16).to(BF16), normal(40, 16, seed=1).to(BF16)
    found: list[list[Tensor]] = []
    for ours in (True, False):
        x, weight = (tensor.clone().requires_grad_() for tensor in given)
        with monkeypatch.context() as patch:
            if not ours:
                for name in ("linear", "scaled_dot_product_attention"):
                    patch.setattr(functional, name, getattr(functional, name))  # what is put there goes with the patch
                runpy.run_path(str(OF_PEERS))["multiply_in_float32_where_faster"]()
            with forward_products(*[CPU] * ours):
                attended = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
                y = functional.linear(attended, weight)
            y.sum().backward()
        assert x.grad is not None
        assert weight.grad is not None
        found.append([attended, y, x.grad, weight.grad])
    for mine, of_peers in zip(*found, strict=True):
        assert torch.allclose(mine.float(), of_peers.float(), rtol=2**-7, atol=1e-3)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.fixture
def faster_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: True)


@pytest.fixture
def faster_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: False)


@pytest.mark.usefixtures("faster_in_float32")
def test_models_on_other_devices_do_not_pass_through_python() -> None:
    gpu = torch.device("cuda")
    for devices, entered in (((CPU,), True), ((gpu, CPU), True), ((gpu,), False), ((), False)):
        with forward_products(*devices):
            assert torch._C._is_torch_function_mode_enabled() == entered


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("faster_in_float32")
def test_sums_are_in_float32_and_rounded_once(bias: bool) -> None:
    x, weight, added = normal(33, 96).to(BF16), normal(40, 96, seed=1).to(BF16), normal(1, 40, seed=2)[0].to(BF16)
    given = added if bias else None
    exact = x.double() @ weight.double().T + (added.double() if bias else 0)
    with torch.no_grad(), forward_products(CPU):
        found = linear(x, weight, given)
        wide = linear(x.float(), weight.float())
        by_name = linear(input=x, weight=weight, bias=given)
    assert (found.dtype, wide.dtype) == (BF16, torch.float32)
    assert torch.equal(by_name, found)
    assert float((found != exact.to(BF16)).float().mean()) < 0.01  # sums next to the middle of two numbers
    outside = linear(x, weight, given)
    assert float((outside != found).float().mean()) < (0.02 if ONEDNN else 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("faster_in_float32")
def test_gradients_are_summed_in_float32_and_rounded_once(bias: bool) -> None:
    x, weight, added = normal(66, 96), normal(40, 96, seed=1), normal(1, 40, seed=2)[0]
    upstream = normal(66, 40, seed=3).to(BF16)
    arguments = [tensor.to(BF16) for tensor in (x.view(2, 33, 96), weight, added)[: 2 + bias]]
    narrow = [tensor.clone().requires_grad_() for tensor in arguments]
    exact = [tensor.double().requires_grad_() for tensor in arguments]
    with forward_products(CPU):
        linear(*narrow).backward(upstream.view(2, 33, 40))
    linear(*exact).backward(upstream.view(2, 33, 40).double())
    for found, wide in zip(narrow, exact, strict=True):
        assert found.grad is not None
        assert wide.grad is not None
        assert (found.grad.dtype, found.grad.shape) == (BF16, found.shape)
        assert float((found.grad != wide.grad.to(BF16)).float().mean()) < 0.01


@pytest.mark.usefixtures("faster_in_float32")
def test_only_the_gradients_that_are_asked_for() -> None:
    weight = normal(8, 16).to(BF16).requires_grad_()
    with forward_products(CPU):
        linear(normal(2, 16).to(BF16), weight).sum().backward()
    assert weight.grad is not None
    for x in (normal(2, 16).to(BF16).requires_grad_(), normal(1, 16)[0].to(BF16).requires_grad_()):
        with forward_products(CPU):
            linear(x, weight).sum().backward()
            linear(x, weight.detach()).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("mask", ["causal", "added", "chosen"])
@pytest.mark.usefixtures("faster_in_float32")
def test_attention_with_gradients_is_in_float32(mask: str) -> None:
    shape = (1, 4, 24, 16)
    narrow = [normal(4 * 24, 16, seed=i).view(shape).to(BF16).requires_grad_() for i in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    seen = torch.ones(24, 24, dtype=torch.bool).tril()
    added = torch.zeros(24, 24, dtype=BF16).masked_fill(~seen, -torch.inf)
    given = {"causal": None, "added": added, "chosen": seen}[mask]
    q, k, v = narrow
    with forward_products(CPU):
        found = scaled_dot_product_attention(q, k, v, given, is_causal=given is None)
    q, k, v = exact
    wide = scaled_dot_product_attention(q, k, v, seen)
    assert found.dtype == BF16
    assert float((found != wide.to(BF16)).float().mean()) < 0.02
    found.sum().backward()
    wide.sum().backward()
    for small, large in zip(narrow, exact, strict=True):
        assert small.grad is not None
        assert large.grad is not None
        assert torch.allclose(small.grad.double(), large.grad, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("method", ["autoround", "tuning"])
@pytest.mark.usefixtures("faster_in_float32")
def test_tuning_learns_by_them(method: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", dtype=BF16)
    tokens = torch.randint(100, (8, 32), generator=torch.Generator().manual_seed(0))
    recipe: dict[str, object] = {"scheme": "w3a16_g32"}
    recipe |= (
        {"method": {"name": "autoround", "iterations": 12}}
        if method == "autoround"
        else {
            "method": "rtn",
            "tuning": {"name": "block"},
        }
    )
    result = quantize(model, tmp_path / "out", recipe=recipe, tokens=list(tokens), device="cpu")
    tuned = result.report["tuned"]
    assert tuned
    assert all(block["error_after"] < block["error_before"] for block in tuned)


@pytest.mark.skipif(not ONEDNN, reason="this CPU has no products of bfloat16 to compare with")
def test_a_run_is_told_and_gives_nearly_the_same_codes(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """GPTQ on bfloat16: sums in another order move a code here and there."""
    model = save_tiny("llama", tmp_path / "model", dtype=BF16)
    recipe = {"scheme": "w4a16_g32", "method": "gptq"}
    tokens = torch.randint(100, (8, 64), generator=torch.Generator().manual_seed(0))
    runs: list[list[Event]] = [[], []]
    for index, events in enumerate(runs):
        request.getfixturevalue(("faster_in_bfloat16", "faster_in_float32")[index])
        quantize(model, tmp_path / str(index), recipe=recipe, tokens=list(tokens), observer=events.append, device="cpu")
    assert [sum(event == Note(PRODUCTS_IN_FLOAT32) for event in events) for events in runs] == [0, 1]
    first, second = (_tensors(tmp_path / str(i)) for i in (0, 1))
    words = [name for name in first if name.endswith("weight_packed")]
    assert words
    changed = sum(int((_nibbles(first[name]) != _nibbles(second[name])).sum()) for name in words)
    assert changed < 0.02 * sum(8 * first[name].numel() for name in words)


@pytest.mark.parametrize("metric", ["hessian", "kl"])
@pytest.mark.usefixtures("faster_in_float32")
def test_a_plan_measures_with_them_and_says_so(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    widened = _count_widened(monkeypatch)
    events: list[Event] = []
    found = plan_mixed(
        "builtin",
        bits=4.5,
        schemes=["w3a16_g64", "w8a16_g64"],
        metric=metric,
        recipe={"method": "rtn"},
        num_samples=1,
        sequence_length=32,
        device="cpu",
        observer=events.append,
    )
    assert found.allocation.loss > 0
    assert events.count(Note(PRODUCTS_IN_FLOAT32)) == 1
    assert widened


@pytest.mark.usefixtures("faster_in_float32")
def test_the_solver_runs_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of them every function of torch passes through Python, and a solver calls many."""
    inside: list[bool] = []

    def watched(*args: Any) -> Factor:
        inside.append(torch._C._is_torch_function_mode_enabled())
        return factorize(*args)

    monkeypatch.setattr("quantkit.solvers.gptq.factorize", watched)
    model = save_tiny("llama", tmp_path / "model", dtype=BF16)
    tokens = [torch.arange(32)]
    widened = _count_widened(monkeypatch)
    quantize(model, tmp_path / "out", recipe={"scheme": "w4a16_g32", "method": "gptq"}, tokens=tokens, device="cpu")
    assert widened
    assert inside
    assert not any(inside)


def _count_widened(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Filled with the shape of each weight that is multiplied in float32 from now on."""
    found: list[torch.Size] = []
    before = precision._Linear.forward

    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found.append(weight.shape)
        return before(ctx, input, weight, bias)

    monkeypatch.setattr(precision._Linear, "forward", staticmethod(forward))
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _nibbles(words: Tensor) -> Tensor:
    return (words[..., None] >> torch.arange(0, 32, 4)) & 15
