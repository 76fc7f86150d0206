"""SmolLM2-135M in 4 bits by RTN and GPTQ: perplexity, CPU time and peak memory of the real commands.

    python evals/smollm2/prepare.py --output MODEL                            (see there: needs the package gguf)
    cd evals && python -m smollm2.study --model MODEL --text valid.txt

The text (WikiText-2 validation in the published results) is cut at a line end near its middle: the first half
calibrates, the second half is scored. Nothing is tuned; results.json records the commands.
Writes results.json and the table of README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import QUANTKIT, baseline, measure_success, shown, surroundings
from table import markdown, replace_table

HERE = Path(__file__).resolve().parent
MB = 1e6
RUNS = {
    "rtn-symmetric": ("--method", "rtn", "--symmetric"),
    "rtn-asymmetric": ("--method", "rtn", "--asymmetric"),
    "gptq-symmetric": ("--method", "gptq", "--symmetric"),
    "gptq-asymmetric": ("--method", "gptq", "--asymmetric"),
}


def main() -> None:
    args = parse_arguments()
    results: dict[str, Any] = {"surroundings": surroundings(), "baseline_bytes": baseline(), "runs": {}}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        calibration, evaluation = halves(args.text, Path(directory))
        outputs = {name: Path(directory) / name for name in RUNS}
        for name, options in RUNS.items():
            results["runs"][name] = quantize(args, outputs[name], options, calibration)
        models = [str(args.model), *map(str, outputs.values())]
        results["perplexity"] = perplexity(models, evaluation, args.limit, Path(directory) / "perplexity.json")
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = markdown(*rows(results))
    replace_table(HERE / "README.md", table)
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="SmolLM2-135M in 4 bits: perplexity, CPU time and peak memory.")
    parser.add_argument("--model", type=Path, required=True, help="the directory that prepare.py wrote")
    parser.add_argument("--text", type=Path, required=True, help="first half to calibrate, second half to score")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration samples of 512 tokens")
    parser.add_argument("--limit", type=int, default=32, help="scored windows of 512 tokens")
    parser.add_argument("--directory", type=Path, help="where the checkpoints go for a while (half a GB)")
    return parser.parse_args()


def halves(text: Path, directory: Path) -> tuple[Path, Path]:
    """Two files: the lines up to the middle of the text, and the rest."""
    whole = text.read_text(encoding="utf-8")
    middle = whole.index("\n", len(whole) // 2) + 1
    paths = (directory / "first_half.txt", directory / "second_half.txt")
    for path, half in zip(paths, (whole[:middle], whole[middle:]), strict=True):
        path.write_text(half, encoding="utf-8")
    return paths


def quantize(args: argparse.Namespace, output: Path, options: tuple[str, ...], calibration: Path) -> dict[str, Any]:
    """One run of `quantkit quantize`, W4 in groups of 64."""
    command = [*QUANTKIT, "quantize", str(args.model), "--output", str(output), "--group-size", "64", *options]
    if "gptq" in options:
        command += ["--calibration", str(calibration), "--sequence-length", "512"]
        command += ["--num-samples", str(args.num_samples)]
    dry = measure_success((*command, "--dry-run"))
    run = measure_success(command)
    report = json.loads((output / "report.json").read_text())
    return {
        "command": shown(command),
        "peak_bytes": run.peak_bytes,
        "dry_run_peak_bytes": dry.peak_bytes,
        "projected_peak_bytes": report["projected_peak_memory"],
        "cpu_seconds": run.cpu_seconds,
        "wall_seconds": run.wall_seconds,
        "last_line": run.output.strip().splitlines()[-1],
        "totals": report["totals"],
        "calibration": report["calibration"],
    }


def perplexity(models: list[str], text: Path, limit: int, output: Path) -> dict[str, Any]:
    """All models in one run of `quantkit perplexity`, compared with the first, which is the dense one."""
    command = [*QUANTKIT, "perplexity", *models, "--data", str(text), "--sequence-length", "512", "--limit", str(limit)]
    usage = measure_success((*command, "--json", str(output)))
    print(usage.output)
    return {"command": shown(command), **json.loads(output.read_text())}


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The README's table."""
    heading = ["weights", "perplexity", "KL, nats", "top-1 changed", "size", "CPU time", "peak memory", "of it imports"]
    scores = results["perplexity"]["results"]
    costs = [None, *results["runs"].values()]
    names = [str(results["perplexity"]["protocol"]["dtype"]).split(",")[0], *results["runs"]]
    body = []
    for name, score, cost in zip(names, scores, costs, strict=True):
        row = [name, f"{score['perplexity']:.2f} ± {score['stderr']:.2f}"]
        row += [f"{score['kl']:.3f}", f"{score['top1_changed']:.1%}"] if cost else ["", ""]
        row += [f"{score['size_bytes'] / MB:.0f} MB"]
        row += [f"{cost['cpu_seconds']:.0f} s", f"{cost['peak_bytes'] / MB:.0f} MB"] if cost else ["", ""]
        row += [f"{results['baseline_bytes'] / MB:.0f} MB"] if cost else [""]
        body.append(row)
    return heading, body


if __name__ == "__main__":
    main()
