"""Quantized embeddings in compressed-tensors' own package and in transformers: what `verify --target` says of them.

Run where both are installed: ``python -m pytest -m peer tests/peers``. Seen with compressed-tensors 0.20 and
transformers 5.23. What these readers cannot do with a correct file is asserted too, so that the day they can shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.verify import verify

pytestmark = pytest.mark.peer

IDS = torch.arange(3, 43)[None] % VOCAB


def written(path: Path, family: str, scheme: str, head: bool) -> Path:
    """A model whose embedding (and head) has a scheme, its blocks 4 bits in groups of 32."""
    names = ["model.embed_tokens", *(["lm_head"] if head else [])]
    rules = [{"match": name, "scheme": scheme, "method": "rtn"} for name in names]
    source = save_tiny(family, path / "m", torch.bfloat16)
    quantkit.quantize(source, path / "q", recipe={"scheme": "w4a16_g32", "method": "rtn", "rules": rules})
    return path / "q"


def opened(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.mark.parametrize("scheme", ["w2a16_g16", "w4a16_channel", "w8a16_g32", "w3a16_g32_asym", "w8a16_g32_asym"])
def test_the_package_matches_and_decodes_an_embedding(scheme: str, tmp_path: Path) -> None:
    """By the config as it is written, and to quantkit's rows to the last bit."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    path = written(tmp_path, "llama", scheme, head=False)
    config = QuantizationConfig.model_validate(Checkpoint(path).config["quantization_config"])
    model = opened(tmp_path / "m")
    apply_quantization_config(model, config)
    attached: Any = model.model.embed_tokens.quantization_scheme
    assert attached.weights.num_bits == quantkit.parse_scheme(scheme).bits
    assert not hasattr(model.lm_head, "quantization_scheme")
    stored = {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
    prefix = "model.embed_tokens."
    own = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    decoded = BaseCompressor.get_value_from_registry("pack-quantized").decompress(own, attached)["weight"]
    rows = quantkit.load(path).get_input_embeddings()(IDS)
    assert torch.equal(decoded.to(rows.dtype)[IDS], rows)


def test_transformers_reads_it_dequantized_where_all_have_one_scheme(tmp_path: Path) -> None:
    path = written(tmp_path, "llama", "w4a16_g32", head=True)
    assert "embedding-transformers" in [finding.code for finding in verify(path, target="transformers").findings]
    rows = quantkit.load(path).get_input_embeddings()(IDS)
    dense = opened(path, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(dense.get_input_embeddings()(IDS), rows)
    with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'weight'"):
        opened(path, dtype=torch.bfloat16)(IDS)


def test_transformers_finds_no_codes_of_a_tied_head(tmp_path: Path) -> None:
    path = written(tmp_path, "qwen2", "w8a16_g32", head=True)
    assert "embedding-transformers-tied" in [finding.code for finding in verify(path, target="transformers").findings]
    for options in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
        with pytest.raises((AttributeError, RuntimeError)):
            opened(path, dtype=torch.bfloat16, **options)(IDS)


def test_quantkit_in_its_place_reads_all_of_them(tmp_path: Path) -> None:
    path = written(tmp_path, "qwen2", "w8a16_g32", head=True)
    quantkit.transformers.register()
    try:
        model = opened(path, dtype=torch.bfloat16)
    finally:
        quantkit.transformers.unregister()
    assert isinstance(model.get_input_embeddings(), quantkit.QuantEmbedding)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, quantkit.load(path)(IDS).logits)
