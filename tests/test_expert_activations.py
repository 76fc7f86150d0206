"""W8A8 of experts: each expert's layers round their own tokens, in the pipeline as in the checkpoint that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MOE_FAMILIES
from test_run import _Interrupt, files
from test_static_activations import IDS, quantized
from torch import Tensor

import quantkit
from quantkit.grid import quantize_activations
from quantkit.linear import QuantLinear
from quantkit.run import execute, prepare
from quantkit.scheme import QuantScheme

RECIPE = {"scheme": "w8a8", "method": "gptq"}
UNIT = 2.0**-24  # half a step of float32


@torch.no_grad()
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_layer_of_every_expert_runs_on_its_codes(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Against float64 on the same codes. The int8 product is exact in int32; what is rounded is the product of the
    sums with the two scales (3 roundings). The simulation rounds every weight and input when it is dequantized and
    sums in float32, so it may be off by (in + 4) roundings of Σ|x||w|, which is many times |y| where terms cancel:
    that, not the kernel, is what a comparison of the two in relative error sees.
    """
    quantkit.quantize(tiny(family), tmp_path / "q", recipe=RECIPE, tokens=tokens)
    model = quantkit.load(tmp_path / "q")
    simulated = quantized(quantkit.load(tmp_path / "q", backend="simulated"))
    layers = {name: layer for name, layer in quantized(model).items() if ".experts." in name}
    assert layers
    assert all(layer.scheme == QuantScheme(8, None, act_bits=8) for layer in layers.values())
    chosen = QuantLinear.from_linear(torch.nn.Linear(64, 64), "w8a8").backend  # int8 where this CPU's product is exact
    assert {layer.backend for layer in layers.values()} == {chosen}
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        x = torch.randn(7, layer.in_features, generator=generator)
        codes, scale = quantize_activations(x)
        q = layer.quantized()
        weight = (q.codes.double() - q.zero_point.double()) * q.scale.double()
        exact, magnitudes = (
            (f(codes.double()) * scale.double()) @ f(weight).T for f in (lambda t: t, torch.Tensor.abs)
        )
        bound = (layer.in_features + 4) * UNIT * magnitudes
        assert bool(((simulated[name](x) - exact).abs() <= bound).all()), name
        bound = bound if chosen == "simulated" else 3 * UNIT * exact.abs()
        assert bool(((layer(x) - exact).abs() <= bound).all()), name
    logits, dense = model(IDS).logits, quantkit.load(tiny(family))(IDS).logits
    assert 0 < float((logits - dense).norm() / dense.norm()) < 0.05
    generate: Any = model.generate
    assert generate(IDS[:, :5], max_new_tokens=4, do_sample=False).shape[1] > 5


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_later_blocks_see_what_the_loaded_model_gives_them(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """The last block is measured behind experts whose inputs are rounded; without that rounding it sees others."""
    seen: dict[str, Tensor] = {}

    def first_input(name: str) -> Callable[[torch.nn.Module, Any], None]:
        def hook(_: torch.nn.Module, args: Any) -> None:
            seen.setdefault(name, args[0].clone())

        return hook

    for name, experts in (("with", "w8a8"), ("without", "w8a16_channel")):
        recipe = {**RECIPE, "rules": [{"match": "*.experts.*", "scheme": experts}]}
        prepared = prepare(tiny(family), tmp_path / name, recipe=recipe, tokens=tokens)
        prepared.plan.skeleton.blocks[-1].register_forward_pre_hook(first_input(name))
        execute(prepared)
    model: Any = quantkit.load(tmp_path / "with", backend="simulated")
    model.model.layers[-1].register_forward_pre_hook(first_input("loaded"))
    model(input_ids=tokens[0][None], use_cache=False)
    distance = {
        name: float((seen[name] - seen["loaded"]).norm() / seen["loaded"].norm()) for name in ("with", "without")
    }
    assert distance["with"] < 1e-5
    assert distance["without"] > 20 * max(distance["with"], 1e-6)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_resumed_run_gives_the_same_bytes(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    recipe = {**RECIPE, "true_sequential": family == "deepseek_v3"}
    whole = _Interrupt(None)
    quantkit.quantize(tiny(family), tmp_path / "whole", recipe=recipe, tokens=tokens, observer=whole)
    for at in (whole.events // 2, whole.events - 2):
        out = tmp_path / f"stopped-{at}"
        with pytest.raises(KeyboardInterrupt):
            quantkit.quantize(tiny(family), out, recipe=recipe, tokens=tokens, observer=_Interrupt(at))
        quantkit.quantize(tiny(family), out, recipe=recipe, tokens=tokens, resume=True)
        assert files(out) == files(tmp_path / "whole")


def test_what_was_not_run_is_said(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from quantkit.verify import verify

    quantkit.quantize(tiny("qwen3_moe"), tmp_path / "q", recipe={**RECIPE, "method": "rtn"})
    found = {finding.code: finding for finding in verify(tmp_path / "q", target="vllm").findings}
    assert found["expert-activations"].severity == "note"
    assert "not run with these checkpoints" in found["expert-activations"].what
