"""One linear layer on the CPU: quantized weights against dense products and a read of memory, as ratios of one run.

    cd evals && OMP_NUM_THREADS=1 python -m cpu_linear.study

Every contestant has copies of its layer of more than 64 MB together, so that weights come from memory as in a model,
and runs through them once a round; contestants take turns, in another order each round. Times are process CPU time;
medians over rounds. Before anything is timed, each product is compared with the dense one in float64.
Writes results.json and the results in README.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import about, surroundings
from table import markdown, replace_results
from torch import Tensor, nn

from quantkit import QuantLinear

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
SHAPES = ((1536, 576), (576, 1536), (4096, 4096), (4096, 14336))  # out x in
TOKENS = (1, 4, 16, 128)
POOL_BYTES = 64 * 2**20
BASE = "F.linear, bfloat16"
SHARES = "Bytes of the layer by its time at one token, as a share of the speed of a plain read in the same run:"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"where": surroundings(), "rounds": args.rounds, "cases": []}
    for rows, columns in SHAPES:
        layers = contestants(rows, columns)
        for tokens in TOKENS:
            seconds = measure(layers, columns, tokens, args.rounds)
            case = {
                "shape": [rows, columns],
                "tokens": tokens,
                "seconds": seconds,
                "read_bytes_per_second": read_speed(),
            }
            results["cases"].append({**case, "nbytes": {name: nbytes(own[0]) for name, own in layers.items()}})
            ratios = ", ".join(f"{name} {seconds[BASE] / value:.2f}" for name, value in seconds.items())
            print(f"{rows}x{columns}, {tokens} tokens: {ratios}", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    replace_results(README, render(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantized linear layers against dense ones on the CPU.")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def contestants(rows: int, columns: int) -> dict[str, list[nn.Module]]:
    """Name -> copies of the layer, each with a weight of its own."""
    generator = torch.Generator().manual_seed(rows + columns)
    found: dict[str, list[nn.Module]] = {}
    for _ in range(max(2, -(-POOL_BYTES // (rows * columns // 2)))):
        dense = nn.Linear(columns, rows, bias=False).requires_grad_(False)
        dense.weight.copy_(torch.randn(rows, columns, generator=generator) / columns**0.5)
        half = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        half.weight.copy_(dense.weight)
        for name, layer in (
            (BASE, half),
            ("F.linear, float32", dense),
            ("w4a16 g64, cpu_jit", QuantLinear.from_linear(half, "w4a16_g64", backend="cpu_jit")),
            ("w4a16 g64 asym, cpu_jit", QuantLinear.from_linear(half, "w4a16_g64_asym", backend="cpu_jit")),
            ("w4a16 g64, torch", QuantLinear.from_linear(half, "w4a16_g64", backend="cpu")),
            ("w8a16, cpu_jit", QuantLinear.from_linear(half, "w8a16", backend="cpu_jit")),
            ("w8a16, torch", QuantLinear.from_linear(half, "w8a16", backend="cpu")),
            ("w8a8, cpu_int8", QuantLinear.from_linear(half, "w8a8", backend="cpu_int8")),
        ):
            if len(found.get(name, ())) < copies(layer):
                found.setdefault(name, []).append(layer)
    return found


def copies(layer: nn.Module) -> int:
    """So many of a layer are more than the caches hold."""
    return max(2, -(-POOL_BYTES // nbytes(layer)))


def nbytes(layer: nn.Module) -> int:
    tensors = (*layer.parameters(), *layer.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def read_speed() -> float:
    """Bytes a second of CPU time at which torch sums 256 MB: the median of nine."""
    buffer = torch.ones(2**26)
    times = []
    for _ in range(9):
        started = time.process_time()
        buffer.sum()
        times.append(time.process_time() - started)
    return buffer.nbytes / statistics.median(times)


def measure(layers: dict[str, list[nn.Module]], columns: int, tokens: int, rounds: int) -> dict[str, float]:
    """Name -> CPU seconds of one product, the median over the rounds."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    wide, narrow = x, x.bfloat16()
    exact = narrow.double() @ layers[BASE][0].weight.double().T  # type: ignore[operator]
    inputs = {name: wide if "float32" in name else narrow for name in layers}
    for name, own in layers.items():
        check(name, own[0](inputs[name]), exact)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    order = list(layers)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(timed(layers[name], inputs[name]))
    return {name: statistics.median(times) for name, times in seconds.items()}


def check(name: str, y: Tensor, exact: Tensor) -> None:
    """The error is that of bfloat16 inputs, of rounding the weight, and of 8-bit inputs where they take part."""
    error = float((y.double() - exact).norm() / exact.norm())
    allowed = {"F": 0.006, "w4": 0.15, "w8": 0.025}[name[: 1 if name.startswith("F") else 2]]
    assert error < allowed, f"{name}: relative error {error}"


def timed(layers: list[nn.Module], x: Tensor) -> float:
    run: list[Callable[[Tensor], Tensor]] = list(layers)
    with torch.inference_mode():
        started = time.process_time()
        for layer in run:
            layer(x)
        return (time.process_time() - started) / len(run)


def render(results: dict[str, Any]) -> str:
    names = list(results["cases"][0]["seconds"])
    rows = []
    for case in results["cases"]:
        seconds = case["seconds"]
        shape = "x".join(map(str, case["shape"]))
        ratios = [f"{seconds[BASE] / seconds[name]:.2f}" for name in names]
        rows.append([f"{shape}, {case['tokens']}", f"{1e3 * seconds[BASE]:.3f} ms", *ratios[1:]])
    heading = ["out x in, tokens", BASE, *(f"{name}" for name in names[1:])]
    text = f"Times as fast as {BASE}, whose CPU time is given; medians of {results['rounds']} rounds.\n\n"
    shares = f"\n{SHARES}\n\n{markdown(['out x in', *names], read_shares(results['cases'], names))}"
    return f"{text}{markdown(heading, rows)}{shares}\n{about(results['where'])}\n"


def read_shares(cases: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    """At one token, bytes of the layer by its time, as a share of the speed of a plain read."""
    found = []
    for case in cases:
        if case["tokens"] == 1:
            speeds = (case["nbytes"][name] / case["seconds"][name] / case["read_bytes_per_second"] for name in names)
            found.append(["x".join(map(str, case["shape"])), *(f"{speed:.0%}" for speed in speeds)])
    return found


if __name__ == "__main__":
    main()
