"""Writes the models of the decoding study: one dense model, quantized by quantkit and as GGUF, by rounding to nearest.

    cd evals && python -m speed.models --model DIR --output MODELS
    cd evals && python -m speed.models --random --output MODELS

The values of a random model do not matter, its shapes do: those of Llama-3.2-1B with a vocabulary of 32768. What is
there already is kept. Needs the package `gguf`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memory.random_model import Shape, write_model

import quantkit
from speed.gguf_file import TYPES, write_gguf

DENSE = "dense"
RANDOM = Shape(blocks=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocab=32768)
HEAD = "w8a16_g64"
SCHEMES = {  # name -> scheme of the blocks, and of the head
    "w4_g64": ("w4a16_g64", None),
    "w4_g64-head_w8": ("w4a16_g64", HEAD),
    "w4_g32-head_w8": ("w4a16_g32", HEAD),
    "w4_g32_asym-head_w8": ("w4a16_g32_asym", HEAD),
    "w8_g64-head_w8": ("w8a16_g64", HEAD),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Models for the study of decoding.")
    dense = parser.add_mutually_exclusive_group(required=True)
    dense.add_argument("--model", type=Path, help="a dense Llama-architecture directory")
    dense.add_argument("--random", action="store_true", help="a random model with a billion parameters")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / DENSE).exists():
        if args.random:
            write_model(args.output / DENSE, RANDOM, seed=0)
        else:
            (args.output / DENSE).symlink_to(args.model.resolve())
    write_all(args.output)


def write_all(models: Path) -> None:
    """Every quantized form of MODELS/dense that is not there yet."""
    for name, (scheme, head) in SCHEMES.items():
        if not (models / name).exists():
            rules = [] if head is None else [{"match": "lm_head", "scheme": head}]
            recipe = {"scheme": scheme, "method": "rtn", "rules": rules}
            quantkit.quantize(models / DENSE, models / name, recipe=recipe)
            print(models / name, flush=True)
    for name in TYPES:
        path = models / f"{name}.gguf"
        if not path.exists():
            write_gguf(models / DENSE, path, name)
            print(path, flush=True)


if __name__ == "__main__":
    main()
