"""Models and recipes whose checkpoints real clients are asked to load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import quantkit
from quantkit.builtin_text import builtin_documents
from quantkit.formats import FORMATS

# Sizes that every client takes: vLLM wants heads of 32 or more, and its kernels columns in whole groups of 128.
_VOCAB = 512
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 64,
}
_GEMMA = {"query_pre_attn_scalar": 64, "initializer_range": 0.02}  # its norms have gains of 1 + weight
# Weights large enough that a wrong scale shows, small enough that bfloat16 does not: see the tests of spoilt ones.
_RANGE = 0.04
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "mixtral": {},
    "qwen3_moe": {"moe_intermediate_size": 128},
}
SMOLLM2 = "smollm2"

_CALIBRATION = {"num_samples": 4, "sequence_length": 128}
_MIXED = [{"match": "*.down_proj", "scheme": "w4a16_g32"}, {"match": "*.0.self_attn.o_proj", "skip": True}]
_MIXED_BITS = [{"match": "*.down_proj", "scheme": "w8a16_g64"}]
_SKIPPED = [{"match": "*.o_proj", "skip": True}]
_REORDERED = {"method": {"name": "gptq", "act_order": "group"}, "calibration": _CALIBRATION}
RECIPES: dict[str, dict[str, Any]] = {
    "ct-w4-g64": {"scheme": "w4a16_g64"},
    "ct-w4-g128": {"scheme": "w4a16_g128"},
    "ct-w4-channel": {"scheme": "w4a16_channel"},
    "ct-w4-g64-asym": {"scheme": "w4a16_g64_asym"},
    "ct-w8": {"scheme": "w8a16_g64"},
    "ct-w8a8": {"scheme": "w8a8"},
    "ct-w8a8-static": {"scheme": "w8a8_static", "calibration": _CALIBRATION},
    "ct-mixed": {"scheme": "w4a16_g64", "rules": _MIXED},
    "ct-mixed-bits": {"scheme": "w4a16_g64", "rules": _MIXED_BITS},
    "gptq-w4": {"scheme": "w4a16_g64_sym", "format": "gptq"},
    "gptq-w4-asym": {"scheme": "w4a16_g64_asym", "format": "gptq"},
    "gptq_v2-w4-asym": {"scheme": "w4a16_g64_asym", "format": "gptq_v2"},
    "gptq-w4-g_idx": {"scheme": "w4a16_g64_sym", "format": "gptq", **_REORDERED},
    "gptq-w8": {"scheme": "w8a16_g64_sym", "format": "gptq"},
    "gptq-w4-channel": {"scheme": "w4a16_channel_sym", "format": "gptq"},
    "gptq-skipped": {"scheme": "w4a16_g64_sym", "format": "gptq", "rules": _SKIPPED},
    "awq-w4": {"scheme": "w4a16_g64_asym", "format": "awq"},
    "awq-skipped": {"scheme": "w4a16_g64_asym", "format": "awq", "rules": _SKIPPED},
}
ALL_RECIPES = "llama"
CORE = ("ct-w4-g64", "ct-w4-g64-asym", "ct-w8a8", "ct-mixed", "gptq-w4", "gptq-w4-asym", "gptq-w4-g_idx", "awq-w4")
# Every second scale of one layer doubled, in these: what a client that reads one wrong would give.
SPOILT = {"spoilt-ct": "ct-w4-g64", "spoilt-gptq": "gptq-w4", "spoilt-awq": "awq-w4"}


def format_of_recipe(recipe: str) -> str:
    """The format that a recipe writes."""
    found: str = RECIPES[SPOILT.get(recipe, recipe)].get("format", "compressed-tensors")
    assert found in {fmt.name for fmt in FORMATS}
    return found


def is_asked(model: str, recipe: str) -> bool:
    """Every recipe of the first model, some of the others."""
    if model == ALL_RECIPES:
        return True
    if recipe in SPOILT:
        return model == SMOLLM2
    return recipe in CORE


@dataclass
class Checkpoints:
    """Sources and what was written of them, each made once.

    Attributes:
        root: holds MODEL/RECIPE for each.
    """

    root: Path

    def ids(self, model: str) -> list[int]:
        """Token ids: 64 random ones for a random model; 512 of a text for a trained one, whose tokens differ more."""
        if model == SMOLLM2:
            text = "\n".join(builtin_documents("evaluation")[:20])
            found: list[int] = AutoTokenizer.from_pretrained(self.source(model))(text)["input_ids"][:512]
            assert len(found) == 512
            return found
        return _random_ids(64, seed=1).tolist()

    def source(self, model: str) -> Path:
        """The dense model."""
        if model == SMOLLM2:
            stated = os.environ.get("QUANTKIT_SMOLLM2")
            if stated is None:
                pytest.skip("QUANTKIT_SMOLLM2 does not name the directory that evals/smollm2/prepare.py writes")
            return Path(stated)
        path = self.root / model / "dense"
        if not path.exists():
            overrides = {**_SIZES, "initializer_range": _RANGE, **MODELS[model]}
            save_tiny(model, path, torch.bfloat16, **overrides)
        return path

    def written(self, model: str, recipe: str) -> Path:
        """What quantkit writes of a model by a recipe."""
        path = self.root / model / recipe
        if path.exists():
            return path
        if recipe in SPOILT:
            return _spoilt(self.written(model, SPOILT[recipe]), path)
        tokens: Sequence[torch.Tensor] | None = None
        if "calibration" in RECIPES[recipe] and model != SMOLLM2:
            tokens = [_random_ids(128, seed) for seed in range(2, 6)]
        quantkit.quantize(self.source(model), path, recipe={"method": "rtn", **RECIPES[recipe]}, tokens=tokens)
        return path


def _random_ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, _VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def _spoilt(written: Path, path: Path) -> Path:
    """A copy of which one layer's scales are wrong; not all by one factor, which a norm behind it could undo."""
    shutil.copytree(written, path)
    file = next(iter(sorted(path.glob("*.safetensors"))))
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if n.endswith(("o_proj.weight_scale", "o_proj.scales")))
    rows = tensors[name] if name.endswith("weight_scale") else tensors[name].T  # [out, groups], either way
    rows[::2] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    assert json.loads((path / "config.json").read_text())["quantization_config"]
    return path
