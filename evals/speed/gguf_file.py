"""A dense Llama-architecture directory as GGUF for llama.cpp: every matrix in one type, the embedding and head in Q8_0.

Without a tokenizer: the study gives tokens. The rounding is that of the package `gguf`, llama.cpp's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

TYPES = ("Q4_0", "Q4_1", "Q8_0")
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Path, output: Path, kind: str) -> None:
    """Write the file; it appears when it is whole."""
    import gguf

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    partial = output.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    describe(writer, config)
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict: it cannot be iterated
                weight = arranged(name, tensors.get_tensor(name).float(), config).numpy()
                own = gguf_name(name)
                if weight.ndim == 1:
                    writer.add_tensor(own, weight)
                    continue
                inside = own.startswith("blk.")
                qtype = getattr(gguf.GGMLQuantizationType, kind if inside else "Q8_0")
                writer.add_tensor(own, gguf.quants.quantize(weight, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(output)


def describe(writer: Any, config: dict[str, Any]) -> None:
    """The sizes."""
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(config.get("rope_parameters", {}).get("rope_theta", 10000.0))


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, weight = name.rsplit(".", 1)
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{weight}"
    _, _, block, inside = stem.split(".", 3)
    return f"blk.{block}.{_INSIDE[inside]}.{weight}"


def arranged(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """Rows of q and k in llama.cpp's order: each head's halves, which rotate together, in pairs side by side."""
    heads = _rotating_heads(name, config)
    return weight if heads is None else _swapped(weight.view(heads, 2, -1, weight.shape[1]), weight)


def in_order(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """The inverse of :func:`arranged`."""
    heads = _rotating_heads(name, config)
    return weight if heads is None else _swapped(weight.view(heads, -1, 2, weight.shape[1]), weight)


def _rotating_heads(name: str, config: dict[str, Any]) -> int | None:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    return next((count for part, count in heads.items() if part in name), None)


def _swapped(parts: Tensor, weight: Tensor) -> Tensor:
    return parts.transpose(1, 2).reshape(weight.shape).contiguous()
