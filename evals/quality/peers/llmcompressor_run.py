"""Quantize a model with llm-compressor. Runs in that program's own environment; knows nothing of quantkit.

    python llmcompressor_run.py --model DIR --tokens FILE --scheme w4_sym --recipe gptq --output DIR

Recipes: ``rtn``; ``gptq`` with act-order on static groups (its default); ``gptq-mse`` with the scales of its mse
observer besides; ``gptq-plain`` without act-order; ``awq``; ``awq-gptq`` both; ``smoothquant`` and ``smoothquant-gptq``
for W8A8; ``spinquant-gptq`` with its rotations R1 and R2, which it folds into the weights.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GROUP_SIZE = 64
_GROUPED = {"type": "int", "strategy": "group", "group_size": GROUP_SIZE, "dynamic": False}
SCHEMES: dict[str, dict[str, Any]] = {
    "w4_sym": {"weights": {**_GROUPED, "num_bits": 4, "symmetric": True}},
    "w4_asym": {"weights": {**_GROUPED, "num_bits": 4, "symmetric": False}},
    "w3_asym": {"weights": {**_GROUPED, "num_bits": 3, "symmetric": False}},
    "w8a8": {
        "weights": {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True},
    },
}
RECIPES = (
    "rtn",
    "gptq",
    "gptq-mse",
    "gptq-plain",
    "awq",
    "awq-gptq",
    "smoothquant",
    "smoothquant-gptq",
    "spinquant-gptq",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with int64 tokens [samples, length]")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from products import multiply_in_float32_where_faster
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    multiply_in_float32_where_faster()
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = _unpinned  # type: ignore[assignment,method-assign]  # AWQ pins memory: needs an accelerator
    tokens = load_file(args.tokens)["tokens"]
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=modifiers(args.recipe, SCHEMES[args.scheme]),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(args.output, save_compressed=True)
    tokenizer.save_pretrained(args.output)


def _unpinned(tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor


def modifiers(recipe: str, scheme: dict[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    if recipe == "gptq-mse":
        scheme = {**scheme, "weights": {**scheme["weights"], "observer": "mse"}}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], **scheme}}, "ignore": ["lm_head"]}
    found: list[Any] = []
    if "spinquant" in recipe:
        from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

        found.append(SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard"))
    if "smoothquant" in recipe:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        found.append(SmoothQuantModifier(smoothing_strength=0.8))
    if "awq" in recipe:
        from llmcompressor.modifiers.transform.awq import AWQModifier

        found.append(AWQModifier())
    if "gptq" in recipe:
        order = {"actorder": None} if recipe == "gptq-plain" else {"actorder": "static"}
        found.append(GPTQModifier(**groups, **order))
    else:
        found.append(QuantizationModifier(**groups))
    return found


if __name__ == "__main__":
    main()
