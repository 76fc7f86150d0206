"""quantkit against llm-compressor, GPTQModel and AutoRound: perplexity, KL, size, CPU time and peak memory.

    cd evals && python -m quality.study --model DIR --text wikitext2/valid.txt --peers PEERS [--only PATTERN] [--again]

PEERS holds a virtual environment for each peer (README.md says how they are made). Everybody gets the same model, the
same calibration tokens and the same scored windows, and everybody's checkpoint is decoded to dense float32 weights by
dense.py before it is scored, W8A8 excepted (its activations are quantized as it runs).
Each finished run goes to results.json at once, and is not run again unless its command changed or --again says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from measure import QUANTKIT, measure, measure_success, processor, shown, surroundings
from safetensors.torch import save_file
from smollm2.study import halves
from table import markdown, replace_results

from quality.dense import checkpoint_bytes, write_dense
from quantkit import CalibrationSpec
from quantkit.calibration import calibration_samples
from quantkit.source import open_tokenizer, resolve_model

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent.parent / "recipes"
TUNED = HERE / "recipes" / "gptq-tuned.yaml"
PLAIN = HERE / "recipes" / "gptq-plain.yaml"  # the options that all programs have
RESULTS, README = HERE / "results.json", HERE / "README.md"
MB = 1e6
LENGTH = 512
SCHEMES = {
    "w4_sym": "W4 symmetric",
    "w4_asym": "W4 asymmetric",
    "w3_asym": "W3 asymmetric",
    "w8a8": "W8A8",
}
PEERS = {"llmcompressor": "llm-compressor", "gptqmodel": "GPTQModel", "autoround": "AutoRound"}
SHIPPED = {"w4_sym": "w4a16-gptq", "w4_asym": "w4a16-gptq-asym", "w3_asym": "w3a16-gptq"}  # in recipes/
NAMES = {"w4_sym": "w4a16_g64_sym", "w4_asym": "w4a16_g64_asym", "w3_asym": "w3a16_g64_asym"}  # quantkit's
W8A8_RECIPES = ("rtn", "gptq", "smoothquant-gptq")
_PLAIN = {**NAMES, "w8a8": "w8a8"}
_WEIGHT_ONLY = tuple(NAMES)


@dataclass(frozen=True)
class Run:
    """One line of the table: a program, a scheme and what it was asked for.

    Attributes:
        program: quantkit, or a key of PEERS.
        scheme: a key of SCHEMES.
        recipe: of a peer, what its driver calls it; of quantkit, the name of the line.
        options: of a peer's driver, or of `quantkit quantize`.
    """

    program: str
    scheme: str
    recipe: str
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return "/".join((self.scheme, self.program, self.recipe, *self.options[1:2] * (self.program != "quantkit")))


def recipe_options(scheme: str) -> tuple[str, ...]:
    """The recipe that quantkit ships for a scheme, with the study's group size."""
    return ("--recipe", str(RECIPES / f"{SHIPPED[scheme]}.yaml"), "--scheme", NAMES[scheme])


_PEER_RECIPES = {
    "llmcompressor": ("gptq", "gptq-mse", "awq", "awq-gptq"),
    "gptqmodel": ("gptq", "gptq-mse", "gptq-act-order", "gptq-static", "gptaq"),
    "autoround": ("default", "light", "search"),
}
RUNS = (
    *(Run(p, s, r) for s in _WEIGHT_ONLY for p, recipes in _PEER_RECIPES.items() for r in recipes),
    *(Run("llmcompressor", s, "gptq-plain") for s in _WEIGHT_ONLY),
    *(Run("gptqmodel", s, "gptq-plain") for s in _WEIGHT_ONLY),
    *(Run("llmcompressor", "w8a8", r) for r in ("rtn", "gptq", "smoothquant", "smoothquant-gptq")),
    *(Run("quantkit", s, "gptq", recipe_options(s)) for s in NAMES),
    *(Run("quantkit", s, "gptq-one-pass", ("--scheme", name)) for s, name in NAMES.items()),  # without a recipe
    *(Run("quantkit", "w8a8", r, ("--recipe", str(RECIPES / f"w8a8-{r}.yaml"))) for r in W8A8_RECIPES),
    *(Run("quantkit", s, "gptq-tuned", ("--recipe", str(TUNED), "--scheme", name)) for s, name in NAMES.items()),
    *(Run("quantkit", s, "gptq-plain", ("--recipe", str(PLAIN), "--scheme", name)) for s, name in _PLAIN.items()),
)


@dataclass(frozen=True)
class Setting:
    """What all runs of one invocation share.

    Attributes:
        model: directory of the dense model; the reference of KL.
        calibration, evaluation: what quantkit is told to read for them.
        tokens: file of the calibration tokens, int64 [samples, LENGTH].
        tokens_sha256: as quantkit reports them: of each sample's length and ids, int64 little-endian.
        limit: scored windows of LENGTH tokens.
        peers: where the peers' environments are.
        work: where checkpoints go.
    """

    model: Path
    calibration: str
    evaluation: str
    tokens: Path
    num_samples: int
    tokens_sha256: str
    limit: int
    peers: Path | None
    work: Path


def main() -> None:
    args = parse_arguments()
    chosen = [run for run in RUNS if fnmatch.fnmatch(run.key, args.only) and available(run, args.peers)]
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        setting = prepare(args, Path(directory))
        for run in chosen:
            known = runs_of(read_results(), args.name, about_setting(setting)).get(run.key)
            if known and not args.again and known["command"] == hidden(command(run, setting, Path("OUT")), setting):
                continue
            print(f"== {args.name}  {run.key}", flush=True)
            found = one_run(run, setting)
            publish(args.name, about_setting(setting), run.key, found)
            print(json.dumps(found, indent=1), flush=True)
    replace_results(README, render(read_results()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="quantkit against its peers at the same number of bits.")
    parser.add_argument("--model", required=True, help="a dense model's directory, or builtin")
    parser.add_argument("--name", help="of the model in results.json  [default: its directory's name]")
    parser.add_argument("--text", required=True, help="first half to calibrate, second half to score; or builtin")
    parser.add_argument("--peers", type=Path, help="directory with the peers' environments; without: quantkit alone")
    parser.add_argument("--only", default="*", help="pattern of SCHEME/PROGRAM/RECIPE")
    parser.add_argument("--again", action="store_true", help="run also what results.json has")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration samples of 512 tokens")
    parser.add_argument("--limit", type=int, default=32, help="scored windows of 512 tokens")
    parser.add_argument("--directory", type=Path, help="where the checkpoints go for a while (1 GB)")
    args = parser.parse_args()
    args.name = args.name or Path(args.model).name
    return args


def available(run: Run, peers: Path | None) -> bool:
    """Whether the run's program is there."""
    return run.program == "quantkit" or (peers is not None and (peers / run.program / "bin" / "python").exists())


def prepare(args: argparse.Namespace, work: Path) -> Setting:
    """Cut the text, and write the calibration tokens that everybody gets: those that quantkit draws for itself."""
    model = resolve_model(args.model)
    calibration = evaluation = args.text
    if args.text != "builtin":
        calibration, evaluation = map(str, halves(Path(args.text), work))
    spec = CalibrationSpec(calibration, num_samples=args.num_samples, sequence_length=LENGTH)
    drawn = calibration_samples(spec, open_tokenizer(model), vocab_size=None)
    tokens = work / "tokens.safetensors"
    save_file({"tokens": torch.stack(drawn.samples)}, tokens)
    return Setting(model, calibration, evaluation, tokens, args.num_samples, drawn.sha256, args.limit, args.peers, work)


def about_setting(setting: Setting) -> dict[str, Any]:
    """What results.json says of the model and the tokens."""
    return {
        "model_sha256": _sha256(setting.model / "model.safetensors"),
        "calibration_sha256": setting.tokens_sha256,
        "num_samples": setting.num_samples,
        "sequence_length": LENGTH,
        "windows": setting.limit,
    }


def command(run: Run, setting: Setting, output: Path) -> list[str]:
    """What is run, and measured."""
    if run.program == "quantkit":
        source = ["--calibration", setting.calibration, "--num-samples", str(setting.num_samples)]
        given = [*run.options, *source, "--sequence-length", str(LENGTH)]
        return [*QUANTKIT, "quantize", str(setting.model), "--output", str(output), *given]
    assert setting.peers is not None  # main() leaves out what is not available
    python = setting.peers / run.program / "bin" / "python"
    given = ["--model", str(setting.model), "--tokens", str(setting.tokens), "--output", str(output)]
    return [str(python), str(driver(run)), "--scheme", run.scheme, "--recipe", run.recipe, *run.options, *given]


def driver(run: Run) -> Path:
    return HERE / "peers" / f"{run.program}_run.py"


def hidden(parts: Sequence[str], setting: Setting) -> str:
    """A command with this machine's directories left out."""
    text = shown(parts)
    for path, name in (
        (str(setting.work), "WORK"),
        (str(setting.model), "MODEL"),
        (str(setting.peers), "PEERS"),
        (str(HERE), "quality"),
        (str(RECIPES), "recipes"),
    ):
        text = text.replace(path, name)
    return text


def one_run(run: Run, setting: Setting) -> dict[str, Any]:
    """Quantize, weigh, decode and score. A program that fails gets a line that says so."""
    with emptied(setting.work / "quantized") as output, emptied(setting.work / "dense") as dense:
        parts = command(run, setting, output)
        print(f"$ {shown(parts)}", flush=True)
        usage = measure(parts)
        found: dict[str, Any] = {
            "command": hidden(command(run, setting, Path("OUT")), setting),
            "driver_sha256": _sha256(driver(run)) if run.program in PEERS else None,
            "recipe_sha256": _sha256(Path(run.options[1])) if run.options[:1] == ("--recipe",) else None,
            "cpu_seconds": usage.cpu_seconds,
            "wall_seconds": usage.wall_seconds,
            "peak_bytes": usage.peak_bytes,
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "versions": versions(run, setting),
            "surroundings": surroundings(),
        }
        if usage.exit_code != 0:
            print(usage.output[-4000:], flush=True)
            return {**found, "failed": usage.output.strip().splitlines()[-1][:300] if usage.output else "no output"}
        if run.program == "quantkit":
            check_tokens(output, setting)
        weights = _only_directory(output)
        found["size_bytes"] = checkpoint_bytes(weights)
        scored = weights
        if run.scheme != "w8a8":
            found["layers"] = write_dense(weights, setting.model, dense)
            scored = dense
        return {**found, **score(scored, setting)}


def check_tokens(output: Path, setting: Setting) -> None:
    """quantkit drew the tokens itself; they must be those of the file."""
    drawn = json.loads((output / "report.json").read_text())["calibration"]
    if drawn is not None and drawn["sha256"] != setting.tokens_sha256:  # None: round-to-nearest reads no tokens
        sys.exit(f"quantkit calibrated on tokens {drawn['sha256'][:12]}, the peers on {setting.tokens_sha256[:12]}")


def score(candidate: Path, setting: Setting) -> dict[str, Any]:
    """Perplexity and KL from the dense model, both in float32."""
    path = setting.work / "score.json"
    parts = [*QUANTKIT, "perplexity", str(setting.model), str(candidate), "--data", setting.evaluation]
    parts += ["--sequence-length", str(LENGTH), "--limit", str(setting.limit), "--dtype", "float32"]
    measure_success((*parts, "--json", str(path)))
    found = json.loads(path.read_text())
    dense, scored = found["results"]
    kept = ("perplexity", "stderr", "kl", "top1_changed")
    return {
        **{name: scored[name] for name in kept},
        "dense": {name: dense[name] for name in ("perplexity", "stderr", "size_bytes")},
        "protocol": {name: found["protocol"][name] for name in ("text_sha256", "windows", "tokens_scored", "dtype")},
    }


def versions(run: Run, setting: Setting) -> dict[str, str]:
    """Versions of the program and what it stands on, in its own environment."""
    wanted = ("quantkit", "llmcompressor", "GPTQModel", "auto-round", "torch", "transformers", "compressed-tensors")
    site = None
    if run.program != "quantkit":
        assert setting.peers is not None
        site = [str(next((setting.peers / run.program / "lib").glob("python*/site-packages")))]
    found = {d.metadata["Name"]: d.version for d in (distributions(path=site) if site else distributions())}
    lower = {name.lower(): (name, version) for name, version in found.items()}
    return {name: lower[name.lower()][1] for name in wanted if name.lower() in lower}


@contextmanager
def emptied(directory: Path) -> Iterator[Path]:
    """A path where nothing is, before and after."""
    shutil.rmtree(directory, ignore_errors=True)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def _only_directory(output: Path) -> Path:
    """Where the config is: AutoRound puts a directory of its own into the one that it is given."""
    return next(path.parent for path in (output / "config.json", *output.glob("*/config.json")) if path.exists())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    return found


def runs_of(results: dict[str, Any], name: str, about: dict[str, Any]) -> dict[str, Any]:
    """The runs that were made with this very model and these tokens; those of another model by that name are void."""
    entry = results["models"].get(name, {})
    runs: dict[str, Any] = entry.get("runs", {})
    return runs if all(entry.get(key) == value for key, value in about.items()) else {}


def publish(name: str, about: dict[str, Any], key: str, found: dict[str, Any]) -> None:
    """Put one run into results.json, at once and whole: a study that is stopped keeps what it has."""
    results = read_results()
    results["models"][name] = {**about, "runs": {**runs_of(results, name, about), key: found}}
    partial = RESULTS.with_suffix(".tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(RESULTS)


def render(results: dict[str, Any]) -> str:
    """What README.md says of the results, in Markdown: one table a model, sorted by scheme and perplexity."""
    return "\n".join(_render_model(name, entry) for name, entry in results["models"].items())


def _render_model(name: str, entry: dict[str, Any]) -> str:
    runs = entry["runs"]
    scored = [run for run in runs.values() if "perplexity" in run]
    if not scored:
        return f"### {name}\n\nNo finished run.\n"
    dense = scored[0]["dense"]
    heading = ["scheme, program, recipe", "perplexity", "KL, nats", "top-1 changed", "size", "CPU time", "peak memory"]
    size = f"{dense['size_bytes'] / MB:.1f} MB"
    body = [["dense, float32", _perplexity(dense), "", "", size, "", ""]]
    marks = machine_marks(runs.values())
    for key in sorted(runs, key=lambda key: _order(key, runs[key])):
        body.append(_row(key, runs[key], marks))
    machines = ", and with ".join(f"{mark} {machine}".strip() for machine, mark in marks.items())
    return f"### {name}\n\n{markdown(heading, body)}\nCPU time compares on one processor only: {machines}.\n"


def machine_marks(runs: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Of each processor, the mark that its CPU times get: none for the one of most runs, then one star, two, ..."""
    counts = Counter(processor(run["surroundings"]) for run in runs)
    return {machine: "\\*" * index for index, (machine, _) in enumerate(counts.most_common())}


def _order(key: str, run: dict[str, Any]) -> tuple[int, float]:
    return list(SCHEMES).index(key.split("/")[0]), run.get("perplexity", float("inf"))


def _row(key: str, run: dict[str, Any], marks: dict[str, str]) -> list[str]:
    scheme, program, *recipe = key.split("/")
    label = f"{SCHEMES[scheme]}, {PEERS.get(program, program)} {' '.join(recipe)}"
    mark = marks[processor(run["surroundings"])]
    cost = [f"{run['cpu_seconds']:.0f} s{mark}", f"{run['peak_bytes'] / MB:.0f} MB"]
    if "failed" in run:
        return [label, "failed", "", "", "", *cost]
    scores = [_perplexity(run), f"{run['kl']:.4f}", f"{run['top1_changed']:.1%}", f"{run['size_bytes'] / MB:.1f} MB"]
    return [label, *scores, *cost]


def _perplexity(score: dict[str, Any]) -> str:
    return f"{score['perplexity']:.2f} ± {score['stderr']:.2f}"


if __name__ == "__main__":
    main()
