"""Quantize a model with GPTQModel. Runs in that program's own environment; knows nothing of quantkit.

    python gptqmodel_run.py --model DIR --tokens FILE --scheme w4_sym --recipe gptq --output DIR

Recipes: ``gptq`` is its defaults (group-aware act-order); ``gptq-mse`` adds its search of the scales (mse=2.0);
``gptq-act-order`` is act-order in groups that the activations order (desc_act, g_idx on disk) with that search;
``gptq-static`` act-order on static groups; ``gptaq`` its asymmetric calibration, else the defaults; ``gptq-plain``
columns in their own order.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without a GPU it finds no workers of its own and stops
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SCHEMES: dict[str, dict[str, Any]] = {
    "w4_sym": {"bits": 4, "sym": True},
    "w4_asym": {"bits": 4, "sym": False},
    "w3_asym": {"bits": 3, "sym": False},
}
GROUP_SIZE = 64
RECIPES = ("gptq", "gptq-mse", "gptq-act-order", "gptq-static", "gptaq", "gptq-plain")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with int64 tokens [samples, length]")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model_path, args.tokens, args.output = Path(args.model).resolve(), args.tokens.resolve(), args.output.resolve()
    os.chdir(args.output.parent)  # it writes logs/ to where it runs

    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig
    from products import multiply_in_float32_where_faster
    from safetensors.torch import load_file

    multiply_in_float32_where_faster()
    choices: dict[str, dict[str, Any]] = {
        "gptq": {},
        "gptq-mse": {"mse": 2.0},
        "gptq-act-order": {"desc_act": True, "act_group_aware": False, "mse": 2.0},
        "gptq-static": {"desc_act": True, "static_groups": True, "act_group_aware": False},
        "gptaq": {"gptaq": GPTAQConfig()},
        "gptq-plain": {"desc_act": False, "act_group_aware": False},
    }
    options = choices[args.recipe]
    tokens = load_file(args.tokens)["tokens"]
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    config = QuantizeConfig(group_size=GROUP_SIZE, offload_to_disk=False, **SCHEMES[args.scheme], **options)
    model = GPTQModel.load(str(model_path), config, device="cpu", dtype=torch.bfloat16)
    model.quantize(samples, batch_size=1, calibration_sort=None)
    model.save(str(args.output))


if __name__ == "__main__":
    main()
