"""What each method makes of experts: errors fall, and an expert that overflows is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit

AUTOROUND = {"name": "autoround", "iterations": 60, "batch": 4, "learning_rate": 0.01}


def last_hidden(path: Path, tokens: list[Tensor]) -> Tensor:
    model: Any = quantkit.load(path, dtype="float32")
    with torch.no_grad():
        return torch.cat([model.model(input_ids=sample[None], use_cache=False).last_hidden_state for sample in tokens])


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_errors_fall_from_rounding_to_learning(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Of the last hidden states on the calibration tokens, with every layer of every expert at 3 bits."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, VOCAB, (64,), generator=generator) for _ in range(16)]
    exact = last_hidden(tiny(family), tokens)
    errors = {}
    for name, method in (("rtn", "rtn"), ("gptq", "gptq"), ("autoround", AUTOROUND)):
        recipe = {"scheme": "w3a16_g32_asym", "method": method}
        quantkit.quantize(tiny(family), tmp_path / name, recipe=recipe, tokens=tokens)
        errors[name] = float((last_hidden(tmp_path / name, tokens) - exact).norm() / exact.norm())
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["autoround"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "gptq"},
        {"method": "rtn", "transforms": ["awq"]},
        {"method": "rtn", "transforms": [{"name": "smoothquant", "sources": "all"}]},
    ],
)
def test_an_expert_that_overflows_is_named(recipe: dict[str, Any], tokens: list[Tensor], tmp_path: Path) -> None:
    path = save_tiny("qwen3_moe", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for leaf in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.experts.2.{leaf}.weight"] *= 1e21
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    whole = {"scheme": "w4a16_g32", "expert_tokens_per_column": 0, **recipe}
    with pytest.raises(quantkit.QuantkitError, match=r"model\.layers\.1\.mlp\.experts\.2\.down_proj.* not finite"):
        quantkit.quantize(path, tmp_path / "out", recipe=whole, tokens=tokens)
    assert not (tmp_path / "out").exists()
