"""Quantize a model with AutoRound. Runs in that program's own environment; knows nothing of quantkit.

    python autoround_run.py --model DIR --tokens FILE --scheme w4_sym --recipe tuned --iters 200 --output DIR

Recipes: ``default`` is what it does when nothing is asked, sign-gradient tuning with 200 steps a block; ``light`` its
own preset with 50 steps and a smaller rate; ``tuned`` the default with ``--iters`` steps; ``search`` what it does with
none: round-to-nearest and a search of the scales; ``rtn`` is plain round-to-nearest.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GROUP_SIZE = 64
SCHEMES: dict[str, dict[str, Any]] = {
    "w4_sym": {"bits": 4, "sym": True, "group_size": GROUP_SIZE},
    "w4_asym": {"bits": 4, "sym": False, "group_size": GROUP_SIZE},
    "w3_asym": {"bits": 3, "sym": False, "group_size": GROUP_SIZE},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with int64 tokens [samples, length]")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--recipe", choices=("default", "light", "tuned", "search", "rtn"), required=True)
    parser.add_argument("--iters", type=int, default=200, help="of tuned")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step, of tuned")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    from auto_round import AutoRound
    from products import multiply_in_float32_where_faster
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    multiply_in_float32_where_faster()
    tokens = load_file(args.tokens)["tokens"]
    options: dict[str, Any] = {
        "default": {},
        "light": {"iters": 50, "lr": 5e-3},
        "tuned": {"iters": args.iters, "batch_size": args.batch_size},
        "search": {"iters": 0},
        "rtn": {"iters": 0, "disable_opt_rtn": True},
    }[args.recipe]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="bfloat16")
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        dataset=[row[None] for row in tokens],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        **SCHEMES[args.scheme],
        **options,
    )
    rounding.quantize_and_save(str(args.output), format="auto_round")


if __name__ == "__main__":
    main()
