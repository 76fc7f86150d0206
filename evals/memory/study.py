"""Peak memory against the number of decoder blocks, on random weights, all under one hard limit.

    cd evals && python -m memory.study [--directory DIR] [--blocks 4 8 16 32 64] [--limit-mb 900]

For each number of blocks a model of otherwise equal shape is written (evals/memory/random_model.py), quantized by GPTQ
and by RTN with the `quantkit` command, each in a process of its own, and removed. Every run, the smallest and the
largest, is under the same RLIMIT_DATA: the kernel refuses it more private writable memory than that, so a run that
held the model would fail. That the limit bites is shown by opening the largest model in transformers under it.
Writes results.json and the results in README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import QUANTKIT, about, baseline, measure, measure_success, shown, surroundings
from table import markdown, replace_results

HERE = Path(__file__).resolve().parent
MB = 1e6
SAMPLES, LENGTH, GROUP = 8, 128, 128
METHODS = ("gptq", "rtn")


def main() -> None:
    args = parse_arguments()
    limit = int(args.limit_mb * MB)
    results: dict[str, Any] = {"surroundings": surroundings(), "baseline_bytes": baseline().peak_own_bytes}
    results["data_limit_bytes"] = limit
    results["runs"] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        for blocks in sorted(args.blocks):
            model = Path(directory) / f"random-{blocks}"
            make_model(model, blocks)
            for method in METHODS:
                results["runs"].append({"blocks": blocks, **quantize(model, method, limit)})
            if blocks == max(args.blocks):
                results["control"] = open_whole(model, limit)
            shutil.rmtree(model)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    replace_results(HERE / "README.md", render(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory of quantkit against the number of decoder blocks.")
    parser.add_argument("--directory", type=Path, help="where the models go for a while (a few GB)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--limit-mb", type=float, default=900, help="RLIMIT_DATA of every run, in MB")
    return parser.parse_args()


def make_model(path: Path, blocks: int) -> None:
    """A random model of this many blocks, in the script's default shape."""
    script = str(HERE / "random_model.py")
    measure_success((sys.executable, script, "--output", str(path), "--blocks", str(blocks)))


def quantize(model: Path, method: str, limit: int) -> dict[str, Any]:
    """One run under the limit: what it says before, what it took, and what it wrote."""
    output = model.with_name("quantized")
    command = [*QUANTKIT, "quantize", str(model), "--output", str(output), "--method", method]
    command += ["--group-size", str(GROUP), "--num-samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
    dry = measure_success((*command, "--dry-run"), limit)
    run = measure_success(command, limit)
    report = json.loads((output / "report.json").read_text())
    shutil.rmtree(output)
    return {
        "method": method,
        "command": shown(command),
        "checkpoint_bytes": report["size_before"],
        "output_bytes": report["size_after"],
        "dry_run_peak_own_bytes": dry.peak_own_bytes,
        "projected_peak_bytes": report["projected_peak_memory"],
        "peak_own_bytes": run.peak_own_bytes,
        "peak_bytes": run.peak_bytes,
        "cpu_seconds": run.cpu_seconds,
        "wall_seconds": run.wall_seconds,
    }


def open_whole(model: Path, limit: int) -> dict[str, Any]:
    """The control: transformers' own way to open the model and run one token, under the same limit and without one."""
    code = (
        f"import torch; from transformers import AutoModelForCausalLM; "
        f"AutoModelForCausalLM.from_pretrained({str(model)!r})(torch.tensor([[1]]))"
    )
    command = (sys.executable, "-c", code)
    limited, free = measure(command, limit), measure_success(command)
    if limited.exit_code == 0:
        sys.exit("the whole model was opened under the limit: it shows nothing; lower --limit-mb or add --blocks")
    return {
        "command": shown(command),
        "exit_code_under_limit": limited.exit_code,
        "last_line_under_limit": limited.output.strip().splitlines()[-1] if limited.output.strip() else "",
        "peak_bytes_without_limit": free.peak_bytes,
    }


def render(results: dict[str, Any]) -> str:
    """What README.md says of the results, in Markdown."""
    heading = [
        "method",
        "blocks",
        "checkpoint",
        "own memory, peak",
        "above a dry run",
        "projected",
        "with mapped files",
        "CPU",
    ]
    runs = sorted(results["runs"], key=lambda run: METHODS.index(run["method"]))
    body = [
        [
            run["method"],
            str(run["blocks"]),
            f"{run['checkpoint_bytes'] / MB:.0f} MB",
            f"{run['peak_own_bytes'] / MB:.0f} MB",
            f"{(run['peak_own_bytes'] - run['dry_run_peak_own_bytes']) / MB:.0f} MB",
            f"{run['projected_peak_bytes'] / MB:.0f} MB",
            f"{run['peak_bytes'] / MB:.0f} MB",
            f"{run['cpu_seconds']:.0f} s",
        ]
        for run in runs
    ]
    control = results["control"]
    return markdown(heading, body) + (
        f"\nEvery run was under RLIMIT_DATA = {results['data_limit_bytes'] / MB:.0f} MB. Under it, the largest "
        f"model's `from_pretrained` in transformers ended with exit code {control['exit_code_under_limit']} "
        f"(`{control['last_line_under_limit']}`); without a limit it took "
        f"{control['peak_bytes_without_limit'] / MB:.0f} MB. An interpreter that has imported torch and transformers "
        f"has {results['baseline_bytes'] / MB:.0f} MB of its own. {about(results['surroundings'])}\n"
    )


if __name__ == "__main__":
    main()
