"""Tiny randomly initialised models of the families that quantkit is shown on, saved in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 320
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": dict(_SLIDING),
    "gemma3_text": {**_SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 96},
    "gpt_neox": {},
    "olmo2": {},
}
# Families with experts; in each, some blocks or some of a block are dense as well.
MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
    },
}
_RENAMED = {
    "opt": ("intermediate_size", "num_key_value_heads"),
    "gpt2": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ),
    "gpt_neox": ("num_key_value_heads",),
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The configuration of a tiny model of this family."""
    fields = {k: v for k, v in _COMMON.items() if k not in _RENAMED.get(family, ())}
    return AutoConfig.for_model(family, **{**fields, **{**FAMILIES, **MOE_FAMILIES}[family], **overrides})


def save_tiny(
    family: str,
    path: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    stacked: bool = False,
    **overrides: Any,
) -> Path:
    """Write a randomly initialised model (no tokenizer) to ``path``; ``stacked``: with its experts as it holds them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        for name, parameter in model.named_parameters():  # so that norms and biases are not all ones and zeros
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_" in name else 0.0, std=0.1)
            if name.endswith("gate.weight"):  # routers that send every token another way
                torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(path, save_original_format=not stacked)
    return path
