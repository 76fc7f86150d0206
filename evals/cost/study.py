"""CPU time of whole GPTQ runs against the number of blocks, and against the number of calibration tokens.

    cd evals && OMP_NUM_THREADS=1 python -m cost.study
    python -m cost.plot                                     (needs matplotlib: pip install -r cost/requirements.txt)

Models of equal blocks with random weights (memory/random_model.py); what a run costs does not depend on the values.
Each point is one run of `quantkit quantize`, W4 in groups of 128. Writes results.json and the results in README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import QUANTKIT, about, measure_success, shown, surroundings
from memory.random_model import Shape, write_model
from table import markdown, replace_results

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
MB = 1e6
BLOCKS = (4, 8, 16, 32)
SAMPLES = (16, 32, 64, 128)
LENGTH = 256
USUAL_BLOCKS, USUAL_SAMPLES = 8, 32
SIZES = {"hidden": 384, "intermediate": 1024, "heads": 6, "kv_heads": 2, "vocab": 2048}


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of GPTQ against blocks and calibration tokens.")
    parser.add_argument("--directory", type=Path, help="where models and checkpoints go for a while (0.5 GB)")
    args = parser.parse_args()
    points = [(blocks, USUAL_SAMPLES) for blocks in BLOCKS]
    points += [(USUAL_BLOCKS, samples) for samples in SAMPLES if samples != USUAL_SAMPLES]
    results: dict[str, Any] = {"surroundings": surroundings(), "sizes": SIZES, "points": []}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        for blocks, samples in points:
            results["points"].append(one_point(Path(directory), blocks, samples))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    replace_results(README, render(results))


def one_point(directory: Path, blocks: int, samples: int) -> dict[str, Any]:
    """One run."""
    model = directory / f"random-{blocks}"
    if not model.exists():
        write_model(model, Shape(blocks=blocks, **SIZES), seed=0)
    output = directory / f"quantized-{blocks}-{samples}"
    command = [*QUANTKIT, "quantize", str(model), "--output", str(output), "--method", "gptq"]
    command += ["--num-samples", str(samples), "--sequence-length", str(LENGTH)]
    usage = measure_success(command)
    print(f"{blocks} blocks, {samples} samples: {usage.cpu_seconds:.1f} s", flush=True)
    return {
        "blocks": blocks,
        "tokens": samples * LENGTH,
        "command": shown(command).replace(str(directory), "WORK"),
        "cpu_seconds": usage.cpu_seconds,
        "wall_seconds": usage.wall_seconds,
        "peak_bytes": usage.peak_bytes,
    }


def series(results: dict[str, Any], along: str) -> list[tuple[int, float]]:
    """(number of blocks or tokens, CPU seconds), of the runs that differ in nothing else."""
    usual = {"blocks": USUAL_BLOCKS, "tokens": USUAL_SAMPLES * LENGTH}
    other = "tokens" if along == "blocks" else "blocks"
    points = (point for point in results["points"] if point[other] == usual[other])
    return sorted((point[along], point["cpu_seconds"]) for point in points)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Intercept and slope of the least-squares line, and the largest distance from it by the largest value."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    intercept = mean_y - slope * mean_x
    distance = max(abs(y - intercept - slope * x) for x, y in points)
    return intercept, slope, distance / max(y for _, y in points)


def render(results: dict[str, Any]) -> str:
    """What README.md says of the results, in Markdown."""
    heading = ["blocks", "calibration tokens", "CPU time", "peak memory"]
    body = [
        [str(p["blocks"]), f"{p['tokens']:,}", f"{p['cpu_seconds']:.1f} s", f"{p['peak_bytes'] / MB:.0f} MB"]
        for p in results["points"]
    ]
    text = markdown(heading, body) + "\n"
    for along, unit, per in (("blocks", "block", 1), ("tokens", "1,000 tokens", 1000)):
        intercept, slope, distance = line(series(results, along))
        text += (
            f"Against {along}: {intercept:.1f} s and {slope * per:.2f} s for each {unit}; no run is further from that "
            f"line than {distance:.1%} of the longest.\n"
        )
    return f"{text}\n{about(results['surroundings'])}\n"


if __name__ == "__main__":
    main()
