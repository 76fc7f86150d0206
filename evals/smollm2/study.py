"""SmolLM2-135M in 4 bits by RTN and GPTQ: perplexity, CPU time and peak memory of the real commands.

    python evals/smollm2/prepare.py --output MODEL                            (see there: needs the package gguf)
    cd evals && python -m smollm2.study --model MODEL --text valid.txt

The text (WikiText-2 validation in the published results) is cut at a line end near its middle: the first half
calibrates, the second half is scored. Nothing is tuned; results.json records the commands.
Writes results.json and the results in README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import QUANTKIT, about, baseline, measure_success, shown, surroundings
from table import markdown, replace_results

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
    results: dict[str, Any] = {"surroundings": surroundings(), "baseline_bytes": baseline().peak_bytes, "runs": {}}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        calibration, evaluation = halves(args.text, Path(directory))
        outputs = {name: Path(directory) / name for name in RUNS}
        for name, options in RUNS.items():
            results["runs"][name] = quantize(args, outputs[name], options, calibration)
        models = [str(args.model), *map(str, outputs.values())]
        results["perplexity"] = perplexity(models, evaluation, args.limit, Path(directory) / "perplexity.json")
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    replace_results(HERE / "README.md", render(results))


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


def render(results: dict[str, Any]) -> str:
    """What README.md says of the results, in Markdown."""
    heading = ["weights", "perplexity", "KL, nats", "top-1 changed", "size", "CPU time", "peak memory"]
    scores = results["perplexity"]["results"]
    dense = results["perplexity"]["protocol"]["dtype"]
    body = [[f"dense, {dense}", _perplexity(scores[0]), "", "", f"{scores[0]['size_bytes'] / MB:.0f} MB", "", ""]]
    for (name, run), score in zip(results["runs"].items(), scores[1:], strict=True):
        row = [name, _perplexity(score), f"{score['kl']:.3f}", f"{score['top1_changed']:.1%}"]
        row += [f"{score['size_bytes'] / MB:.0f} MB", f"{run['cpu_seconds']:.0f} s", f"{run['peak_bytes'] / MB:.0f} MB"]
        body.append(row)
    return markdown(heading, body) + (
        f"\nOf the peak memory, {results['baseline_bytes'] / MB:.0f} MB are an interpreter that has imported torch and "
        f"transformers. {about(results['surroundings'])}\n"
    )


def _perplexity(score: dict[str, Any]) -> str:
    return f"{score['perplexity']:.2f} ± {score['stderr']:.2f}"


if __name__ == "__main__":
    main()
