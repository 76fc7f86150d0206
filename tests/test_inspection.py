"""What is in a model: figures against the tensors themselves, and the command as a user runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import quantkit
from quantkit.calibration import CalibrationSpec, calibration_samples
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.inspection import code_stats, entropy_bits, inspect
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.source import BUILTIN_PATH, open_tokenizer


def test_code_statistics() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 2]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, -2.0], [1.0, 0.25]])
    zero = torch.tensor([[1, 2], [0, 3]], dtype=torch.uint8)
    found = code_stats(QuantizedTensor(codes, scale, zero, QuantScheme(2, 2, symmetric=False)))
    shares = (1 / 8, 2 / 8, 2 / 8, 3 / 8)
    assert found.entropy == pytest.approx(-sum(p * math.log2(p) for p in shares))
    assert (found.clipped, found.negative_scales) == (0.5, 0.25)
    assert (found.scale_min, found.scale_max) == (0.25, 2.0)
    assert (found.zero_point_min, found.zero_point_max) == (0, 3)
    assert entropy_bits(torch.tensor([5, 5, 5, 5])) == pytest.approx(2.0)


def test_a_quantized_directory(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    rules = [{"match": "*.1.*", "skip": True}]
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe={"scheme": "w4a16_g32", "method": "rtn", "rules": rules})
    found = inspect(tmp_path / "q")
    tensors = {k: v for file in (tmp_path / "q").glob("*.safetensors") for k, v in load_file(file).items()}
    assert found.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    dense = load_file(tiny("llama") / "model.safetensors")
    assert found.num_parameters == sum(t.numel() for t in dense.values())
    quantized = [layer for layer in found.layers if layer.scheme is not None]
    assert {layer.block for layer in quantized} == {0, 2}
    assert found.num_quantized == sum(dense[f"{layer.name}.weight"].numel() for layer in quantized)
    assert len(found.layers) == 22
    layer = next(one for one in found.layers if one.name == "model.layers.0.mlp.up_proj")
    assert (layer.shape, layer.scheme, layer.codes is not None, layer.weights) == (
        (96, 64),
        "w4a16_g32_sym",
        True,
        None,
    )
    assert layer.nbytes == 96 * 64 // 2 + 96 * 2 * 4 + 16
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen2"])
def test_dense_families(family: str, tiny: Callable[[str], Path]) -> None:
    found = inspect(tiny(family))
    dense = load_file(tiny(family) / "model.safetensors")
    assert found.num_parameters == sum(t.numel() for t in dense.values())
    assert (found.num_quantized, found.bits_per_quantized_weight, found.bits_per_weight) == (0, None, 32.0)
    name = {"gpt2": "transformer.h.1.mlp.c_fc", "mixtral": "model.layers.1.mlp.experts.3.up_proj"}.get(family)
    layer = next(one for one in found.layers if name in (None, one.name))
    assert layer.weights is not None
    assert layer.weights.sigmas > 2


def test_inputs_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """The blocks one by one see what transformers' own model gives its layers."""
    spec = CalibrationSpec("builtin", num_samples=3, sequence_length=48)
    found = {layer.name: layer.inputs for layer in inspect(BUILTIN_PATH, calibration=spec).layers}
    samples = calibration_samples(spec, open_tokenizer(BUILTIN_PATH), vocab_size=None).samples
    model = AutoModelForCausalLM.from_pretrained(BUILTIN_PATH, dtype=torch.bfloat16)
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda _, args: seen.setdefault(name, []).append(args[0])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for tokens in samples:
            model(input_ids=tokens[None])
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.7.mlp.down_proj"):
        values, inputs = torch.cat(seen[name], dim=1).double(), found[name]
        assert inputs is not None
        assert inputs.numel == values.numel()
        assert inputs.abs_max == pytest.approx(float(values.abs().max()), rel=0.02)
        assert inputs.std == pytest.approx(float(values.std()), rel=0.02)


def test_inputs_of_experts(tmp_path: Path) -> None:
    path = save_tiny("mixtral", tmp_path / "m", vocab_size=2048, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((BUILTIN_PATH / name).read_bytes())
    layers = inspect(path, calibration=CalibrationSpec(num_samples=2, sequence_length=32)).layers
    inputs = {layer.name: layer.inputs for layer in layers}
    gate = inputs["model.layers.0.mlp.experts.2.gate_proj"]
    assert gate is not None
    assert gate == inputs["model.layers.0.mlp.experts.0.up_proj"]
    assert gate.numel == 2 * 32 * 64
    assert inputs["model.layers.0.mlp.experts.2.down_proj"] is None


def test_calibration_of_a_quantized_model(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe={"scheme": "w8a16", "method": "rtn"})
    with pytest.raises(InputError, match="is quantized"):
        inspect(tmp_path / "q", calibration=CalibrationSpec())


def test_the_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", "builtin"])
    assert result.exit_code == 0, result.output
    assert "*.mlp.down_proj" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120
    asked = CliRunner().invoke(app, ["inspect", "builtin", "--json"])
    figures = json.loads(asked.stdout)
    assert figures["format"] == "dense"
    assert len(figures["layers"]) == 56
    assert set(figures["layers"][0]["weights"]) == {"numel", "std", "abs_max", "beyond", "sigmas"}
