"""Checkpoints with experts in transformers with compressed-tensors: the same logits, and what it cannot do.

Seen with transformers 5.23 and compressed-tensors 0.20: experts are decoded while loading, all of a model's by one
scheme without zero points, which is taken from the first group that has a pattern with "experts" in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import MOE_FAMILIES, VOCAB, save_tiny
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.verify import verify

pytestmark = pytest.mark.peer

IDS = torch.arange(3, 43)[None] % VOCAB


@torch.no_grad()
def logits_of(path: Path, **config: Any) -> torch.Tensor:
    """In float32, by transformers' own loader."""
    if config:
        from transformers import CompressedTensorsConfig

        config = {"quantization_config": CompressedTensorsConfig(**config)}
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config)
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", MOE_FAMILIES)
@torch.no_grad()
def test_same_logits(family: str, stacked: bool, dequantize: bool, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", stacked=stacked)
    quantkit.quantize(model, tmp_path / "q", recipe={"scheme": "w4a16_g32", "method": "rtn"})
    expected = quantkit.load(tmp_path / "q")(IDS).logits
    found = logits_of(tmp_path / "q", **({"dequantize": True} if dequantize else {}))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    dense: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert float((dense(IDS).logits - expected).abs().max()) > 1e-3  # quantized, and seen to be


@pytest.mark.parametrize("match", ["*.self_attn.*", "*.mlp.experts.*"])
@torch.no_grad()
def test_experts_and_other_layers_with_schemes_of_their_own(match: str, tmp_path: Path) -> None:
    """Without the pattern for experts in the config they were decoded by the attention's scheme, without an error."""
    model = save_tiny("mixtral", tmp_path / "model")
    rules = [{"match": match, "scheme": "w8a16_g32"}]
    quantkit.quantize(model, tmp_path / "q", recipe={"scheme": "w4a16_g32", "method": "rtn", "rules": rules})
    expected = quantkit.load(tmp_path / "q")(IDS).logits
    torch.testing.assert_close(logits_of(tmp_path / "q"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        {"scheme": "w4a16_g32_asym"},
        {"scheme": "w4a16_g32", "rules": [{"match": "*.mlp.experts.*", "skip": True}]},
        {"scheme": "w4a16_g32", "rules": [{"match": "*.2.mlp.experts.*", "scheme": "w8a16_g32"}]},
    ],
)
def test_what_it_cannot_load_is_said_before(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "model")
    report = quantkit.quantize(model, tmp_path / "q", recipe={**recipe, "method": "rtn"}).report
    assert any("transformers 5.23.0: takes all experts as quantized" in note for note in report["notes"])
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        logits_of(tmp_path / "q")


def test_experts_with_8_bit_activations_are_refused_and_it_is_said_before(tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "model")
    quantkit.quantize(model, tmp_path / "q", recipe={"scheme": "w8a8", "method": "rtn"})
    found = {finding.code for finding in verify(tmp_path / "q", target="transformers").findings}
    assert "transformers-int8-experts" in found
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        logits_of(tmp_path / "q")
