"""GPTQ's solver alone: quantkit, llm-compressor and GPTQModel on the same weights and Hessians, on one thread.

    cd evals && python -m solver.study --peers PEERS [--shape 576x576 ...] [--repeats 3]

Each program is a process of its own that stays, in its own environment, and is asked in turn, so that what else the
machine does meets all of them alike. The loss tr(dW H dWᵀ) is computed here, in float64, from what each returns, and
stands beside the time: a fast solver that does not solve is no solver. Times are CPU seconds, medians over the repeats,
after one that does not count. Writes results.json and the results in README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import about, surroundings
from safetensors.torch import load_file
from table import markdown, replace_results
from torch import Tensor
from worker import Worker, running

from solver.parts import measure_parts, render_parts
from solver.problem import write_problem

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
MB = 1e6
SHAPES = ("576x576", "1536x576", "576x1536", "4096x4096", "11008x4096", "4096x11008")  # out x in
PEERS = {"llmcompressor": "llm-compressor", "gptqmodel": "GPTQModel"}
OPTIONS = {
    "static": "act-order, static groups",
    "natural": "columns in their order",
    "group-aware": "group-aware order, its default",
}
ASKED = (  # who is asked for what; llm-compressor has static groups in either order
    ("quantkit", "static"),
    ("llmcompressor", "static"),
    ("gptqmodel", "static"),
    ("gptqmodel", "group-aware"),
    ("quantkit", "natural"),
    ("llmcompressor", "natural"),
    ("gptqmodel", "natural"),
)
_LARGE = 4096 * 4096  # weights from which on one repeat, and one that does not count, must do
SCHEME = {"bits": 4, "symmetric": True, "group_size": 64}


def start(program: str, peers: Path) -> Worker:
    """A program that solves what it is asked, in its own environment."""
    python = sys.executable if program == "quantkit" else str(peers / program / "bin" / "python")
    return Worker(program, python, HERE / "workers" / f"{program}_solve.py", environment={"OMP_NUM_THREADS": "1"})


def ask(worker: Worker, problem: Path, options: str, output: Path) -> dict[str, Any]:
    """What a solve took."""
    return worker.ask({"problem": str(problem), "options": options, "output": str(output), **SCHEME})


def main() -> None:
    args = parse_arguments()
    programs = ["quantkit", *(p for p in PEERS if (args.peers / p / "bin" / "python").exists())]
    asked = [(p, o) for p, o in ASKED if p in programs and o in args.options]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"shapes": {}}
    results["parts_surroundings"] = surroundings()
    if asked:
        results["surroundings"] = results["parts_surroundings"]
    starts = {program: partial(start, program, args.peers) for program, _ in asked}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory, running(starts) as workers:
        for shape in args.shape:
            found, parts = one_shape(shape, asked, workers, args.repeats, Path(directory))
            results["shapes"].setdefault(shape, {}).update(found)
            results.setdefault("parts", {})[shape] = parts
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    replace_results(README, render(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GPTQ's solver alone, against the peers'.")
    parser.add_argument("--peers", type=Path, required=True, help="directory with the peers' environments")
    parser.add_argument("--shape", nargs="*", default=SHAPES, help="out x in")
    parser.add_argument(
        "--options", nargs="*", choices=OPTIONS, default=list(OPTIONS), help="none: the parts of quantkit's solve only"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where problems and solutions go for a while (1 GB)")
    return parser.parse_args()


def one_shape(
    shape: str, asked: list[tuple[str, str]], workers: dict[str, Worker], repeats: int, directory: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """Losses and times of all programs on one problem, asked in turn; and those of the parts of quantkit's solve."""
    rows, columns = map(int, shape.split("x"))
    problem, output = directory / "problem.safetensors", directory / "solved.safetensors"
    write_problem(problem, rows, columns)
    tensors = load_file(problem)
    answers: dict[str, list[dict[str, Any]]] = {}
    losses: dict[str, float] = {}
    repeats = repeats if rows * columns < _LARGE else 1
    for _ in range(1 + repeats):
        for program, options in asked:
            key = f"{program}/{options}"
            answers.setdefault(key, []).append(ask(workers[program], problem, options, output))
            if key not in losses:
                losses[key] = loss(tensors["weight"], load_file(output)["weight"], tensors["hessian"])
            print(f"{shape} {key}: {answers[key][-1]['cpu_seconds']:.3f} s, loss {losses[key]:.6g}", flush=True)
    problem.unlink()
    found = {key: {"loss": losses[key], **_medians(answer[1:])} for key, answer in answers.items()}
    return found, measure_parts(tensors["weight"], tensors["hessian"], SCHEME, repeats)


def loss(weight: Tensor, solved: Tensor, hessian: Tensor, at_a_time: int = 512) -> float:
    """tr(dW H dWᵀ), summed over ``at_a_time`` rows in float64, H in float32 where it is large."""
    total = 0.0
    for start in range(0, len(weight), at_a_time):
        error = (weight[start : start + at_a_time].double() - solved[start : start + at_a_time].double()).float()
        total += float((error @ hessian * error).double().sum())
    return total


def _medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "cpu_seconds": statistics.median(answer["cpu_seconds"] for answer in found),
        "all_cpu_seconds": [answer["cpu_seconds"] for answer in found],
        "peak_bytes": max(answer["peak_bytes"] for answer in found),
    }


def render(results: dict[str, Any]) -> str:
    """What README.md says of the results, in Markdown."""
    heading = ["out x in, order", "program", "loss, quantkit's = 1", "CPU time", "against quantkit's"]
    body = []
    for shape, found in results["shapes"].items():
        for key, value in found.items():
            program, options = key.split("/")
            own = found.get(f"quantkit/{options}", found.get("quantkit/static"))
            row = [f"{shape}, {OPTIONS[options]}", PEERS.get(program, program)]
            row += [f"{value['loss'] / own['loss']:.4f}", f"{value['cpu_seconds']:.3f} s"]
            body.append([*row, f"{value['cpu_seconds'] / own['cpu_seconds']:.2f}"])
    parts = f"{render_parts(results['parts'])}\n{about(results['parts_surroundings'])}\n" if "parts" in results else ""
    return f"{markdown(heading, body)}\n{about(results['surroundings'])}\n\n{parts}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
