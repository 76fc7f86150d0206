"""Writes a Llama-architecture model with random weights, of any size, one block at a time.

    python evals/memory/random_model.py --output DIR [--blocks 32] [--hidden 1536] [--intermediate 4096] ...

For studies of memory and speed, where the values do not matter but the shapes do. Every block is a safetensors file of
its own in bfloat16, drawn from a seed of its own, so the first blocks are the same however many follow, and the model
is never whole in memory. The tokenizer is the one of quantkit's built-in model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SMALLEST_VOCAB = 2048  # the tokenizer's
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. ``heads`` divides ``hidden``, and ``kv_heads`` divides ``heads``."""

    blocks: int = 32
    hidden: int = 1536
    intermediate: int = 4096
    heads: int = 12
    kv_heads: int = 4
    vocab: int = 8192
    positions: int = 2048

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads or self.vocab < SMALLEST_VOCAB:
            raise SystemExit(
                f"random_model.py: {self}: heads must divide hidden, kv_heads must divide heads, "
                f"and vocab must be at least {SMALLEST_VOCAB}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="A Llama-architecture model with random weights.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    values = vars(parser.parse_args())
    output, seed = values.pop("output"), values.pop("seed")
    size = write_model(output, Shape(**values), seed)
    print(f"{output}: {size / 1e6:.1f} MB")


def write_model(output: Path, shape: Shape, seed: int) -> int:
    """Write the whole directory; returns the bytes of its tensors."""
    output.mkdir(parents=True)
    (output / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n")
    for name in TOKENIZER:
        with as_file(files("quantkit") / "builtin" / name) as source:
            shutil.copyfile(source, output / name)
    weight_map: dict[str, str] = {}
    total = 0
    for part in range(shape.blocks + 1):
        shapes = block_shapes(shape, part) if part < shape.blocks else outside_shapes(shape)
        tensors = draw(shapes, torch.Generator().manual_seed(seed * 1_000_003 + part))
        file = f"model-{part + 1:05d}-of-{shape.blocks + 1:05d}.safetensors"
        save_file(tensors, output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    return total


def config(shape: Shape) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }


def block_shapes(shape: Shape, index: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a block's tensors."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    inside = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
    }
    return {f"model.layers.{index}.{name}.weight": size for name, size in inside.items()}


def outside_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors outside of the blocks; the head is tied to the embedding."""
    return {"model.embed_tokens.weight": (shape.vocab, shape.hidden), "model.norm.weight": (shape.hidden,)}


def draw(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Bfloat16 matrices that keep a vector's size (normal, variance 1/columns), and gains of one."""
    return {
        name: torch.ones(size, dtype=torch.bfloat16)
        if len(size) == 1
        else torch.empty(size, dtype=torch.bfloat16).normal_(std=size[-1] ** -0.5, generator=generator)
        for name, size in shapes.items()
    }


if __name__ == "__main__":
    main()
