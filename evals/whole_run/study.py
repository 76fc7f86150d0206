"""CPU time and peak memory of whole GPTQ runs, quantkit's and the peers', in turn, at equal options and tokens.

    cd evals && OMP_NUM_THREADS=1 python -m whole_run.study --model DIR --text wikitext2/valid.txt --peers PEERS

W4 symmetric in groups of 64, act-order on static groups, all linear layers but lm_head, each program's own damping;
GPTQModel also with its defaults. quality/README.md says how PEERS is made. Nothing is scored here. Medians over
--repeats rounds, in each of which everybody runs once. Writes results.json and the results in README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measure import about, measure_success, surroundings
from quality import study as quality
from table import markdown, replace_results

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
MB = 1e6
OPTIONS = ("--recipe", str(quality.PLAIN), "--scheme", quality.NAMES["w4_sym"])
RUNS = (
    quality.Run("quantkit", "w4_sym", "gptq", OPTIONS),
    quality.Run("llmcompressor", "w4_sym", "gptq"),
    quality.Run("gptqmodel", "w4_sym", "gptq-static"),
    quality.Run("gptqmodel", "w4_sym", "gptq"),
)


def main() -> None:
    args = parse_arguments()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    for samples in args.num_samples:
        entry = one_setting(args, samples)
        results["models"].setdefault(args.name, {})[str(samples)] = entry
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    replace_results(README, render(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU time and peak memory of whole GPTQ runs.")
    parser.add_argument("--model", required=True, help="a dense model's directory, or builtin")
    parser.add_argument("--name", help="of the model in results.json  [default: its directory's name]")
    parser.add_argument("--text", required=True, help="its first half calibrates; or builtin")
    parser.add_argument("--peers", type=Path, required=True, help="directory with the peers' environments")
    parser.add_argument(
        "--num-samples", type=int, nargs="*", default=[32, 128], help="calibration samples of 512 tokens"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where the checkpoints go for a while (0.2 GB)")
    args = parser.parse_args()
    args.name = args.name or Path(args.model).name
    args.limit = 1  # windows that are scored: none here
    return args


def one_setting(args: argparse.Namespace, samples: int) -> dict[str, Any]:
    """All runs on the same tokens."""
    found: dict[str, list[dict[str, Any]]] = {}
    commands = {}
    given = argparse.Namespace(**{**vars(args), "num_samples": samples})
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        setting = quality.prepare(given, Path(directory))
        for _ in range(args.repeats):
            for run in (run for run in RUNS if quality.available(run, args.peers)):
                with quality.emptied(setting.work / "quantized") as output:
                    usage = measure_success(quality.command(run, setting, output))
                    if run.program == "quantkit":
                        quality.check_tokens(output, setting)
                costs = {name: getattr(usage, name) for name in ("cpu_seconds", "wall_seconds", "peak_bytes")}
                found.setdefault(run.key, []).append(costs)
                commands[run.key] = {
                    "command": quality.hidden(quality.command(run, setting, Path("OUT")), setting),
                    "versions": quality.versions(run, setting),
                }
                print(f"{run.key}: {costs}", flush=True)
    runs = {key: {**commands[key], **_medians(all_costs), "all": all_costs} for key, all_costs in found.items()}
    return {"surroundings": surroundings(), "calibration_sha256": setting.tokens_sha256, "runs": runs}


def _medians(costs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(cost[name] for cost in costs) for name in costs[0]}


def render(results: dict[str, Any]) -> str:
    """What README.md says of the results, in Markdown."""
    heading = [
        "model, calibration, program, recipe",
        "CPU time",
        "by quantkit's",
        "peak memory",
        "by quantkit's",
    ]
    body, where = [], None
    for model, settings in results["models"].items():
        for samples, entry in settings.items():
            where = entry["surroundings"]
            own = next(run for key, run in entry["runs"].items() if "/quantkit/" in key)
            for key, run in entry["runs"].items():
                _, program, recipe = key.split("/")
                row = [f"{model}, {samples} x {quality.LENGTH}, {quality.PEERS.get(program, program)} {recipe}"]
                row += [f"{run['cpu_seconds']:.0f} s", f"{run['cpu_seconds'] / own['cpu_seconds']:.2f}"]
                row += [f"{run['peak_bytes'] / MB:.0f} MB", f"{run['peak_bytes'] / own['peak_bytes']:.2f}"]
                body.append(row)
    return f"{markdown(heading, body)}\n{about(where)}\n" if where else "No finished run.\n"


if __name__ == "__main__":
    main()
