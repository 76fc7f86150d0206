"""Speed: one linear layer on a CPU, whole models that decode on a CPU, one linear layer on a GPU.

    cd evals
    OMP_NUM_THREADS=1 python -m speed.study linear
    OMP_NUM_THREADS=1 python -m speed.study decode --name SmolLM2-135M --models DIR --llama-cpp PYTHON
    python -m speed.study gpu

Contestants take turns, in another order each round, so that what else the machine does meets all of them alike, and are
compared by medians of one run. Writes results.json and the results in README.md; on CPUs there are results for each
kind of instructions, of which a run replaces its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measure import processor
from table import replace_results

from speed import decode, gpu, linear
from speed.frame import shape_name

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results.json", HERE / "README.md"


def main() -> None:
    args = parse_arguments()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if args.study == "linear":
        found = linear.study(args.rounds, [shape_of(name) for name in args.shapes])
        results["linear"][found["where"]["instructions"]] = found
    elif args.study == "gpu":
        results["gpu"] = gpu.study(args.rounds)
    else:
        found = decode.study(decode.Setting(args.models, args.llama_cpp, tuple(args.only)), args.rounds)
        results["decode"].setdefault(args.name, {})[found["where"]["instructions"]] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    replace_results(README, render(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast quantized weights are.")
    studies = parser.add_subparsers(dest="study", required=True)
    layer = studies.add_parser("linear")
    layer.add_argument("--rounds", type=int, default=15)
    layer.add_argument("--shapes", nargs="+", default=[shape_name(shape) for shape in linear.SHAPES], help="out x in")
    studies.add_parser("gpu").add_argument("--rounds", type=int, default=30)
    whole = studies.add_parser("decode")
    whole.add_argument("--name", required=True, help="of the model, in the results")
    whole.add_argument("--models", type=Path, required=True, help="what speed/models.py wrote")
    whole.add_argument("--llama-cpp", help="an interpreter with llama_cpp; without it llama.cpp takes no part")
    whole.add_argument("--only", nargs="*", default=["*"], help="patterns of lines; bfloat16 must be one")
    whole.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def shape_of(name: str) -> tuple[int, int]:
    """What 1536x576 says."""
    rows, columns = name.split("x")
    return int(rows), int(columns)


def render(results: dict[str, Any]) -> str:
    """What README.md says of the results, in Markdown."""
    text = "## One linear layer on the CPU\n"
    for found in results["linear"].values():
        text += f"\n### {processor(found['where'])}\n\n" + linear.render(found)
    for name, of_model in results["decode"].items():
        text += f"\n## {name} decodes on the CPU\n"
        for found in of_model.values():
            text += f"\n### {processor(found['where'])}\n\n" + decode.render(found)
    gpus = results.get("gpu")
    told = (
        "Not run yet: the machines that this repository was made on have no GPU.\n"
        if gpus is None
        else gpu.render(gpus)
    )
    return f"{text}\n## One linear layer on a GPU\n\n{told}"


if __name__ == "__main__":
    main()
