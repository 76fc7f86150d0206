"""One linear layer on a GPU: quantkit's Triton kernels against dense layers, and gemlite when it is installed.

Every contestant has copies of its layer of more than four L2 caches together and runs through them in one CUDA graph,
so that weights come from memory as in a model and no launch is timed. Times are from CUDA events. Before anything is
timed, each product is compared with the dense one in float64. The floor is the time to read codes, scales and zero
points once at the bandwidth that a copy of 1 GB reaches in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from measure import about, surroundings
from table import markdown
from torch import Tensor, nn

from quantkit import QuantLinear, parse_scheme
from speed.frame import Quartiles, copies, in_turn, random_linear, relative_error, shape_name, twin

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))  # out x in
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
SCHEMES = ("w4a16_g128", "w4a16_g128_asym", "w4a16_g32", "w8a16_channel", "w3a16_g128", "w2a16_g128")
DTYPES = (torch.float16, torch.bfloat16)
_COPY_BYTES = 1 << 30
Products = list[Callable[[Tensor], Tensor]]


def study(rounds: int) -> dict[str, Any]:
    """The results of all shapes and dtypes."""
    if not torch.cuda.is_available():
        raise SystemExit("speed.study gpu: torch finds no CUDA device; run this on a machine with one")
    bandwidth = copy_bandwidth()
    where = {**surroundings(), "gpu": torch.cuda.get_device_name()}
    results: dict[str, Any] = {"where": where, "rounds": rounds, "bandwidth": bandwidth, "cases": []}
    for dtype in DTYPES:
        for rows, columns in SHAPES:
            entered = contestants(rows, columns, dtype)
            products = {name: own for name, (own, _) in entered.items()}
            for tokens in TOKENS:
                for name, quartiles in measure(products, columns, tokens, dtype, rounds).items():
                    nbytes = entered[name][1]
                    results["cases"].append(
                        {
                            "name": name, "dtype": str(dtype).removeprefix("torch."), "shape": [rows, columns],
                            "tokens": tokens, "seconds": quartiles, "over_floor": quartiles[1] * bandwidth / nbytes,
                            "bytes_per_second": nbytes / quartiles[1],
                        }
                    )  # fmt: skip
            print(f"{rows}x{columns} {dtype}: done", flush=True)
    return results


def contestants(rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[Products, float]]:
    """Name -> products of layers with weights of their own, and the bytes that one must read."""
    found: dict[str, tuple[Products, float]] = {}
    source = random_linear(rows, columns, dtype, "cuda")
    dense_bytes = rows * columns * dtype.itemsize
    found["F.linear"] = ([source, *(twin(source) for _ in range(gpu_copies(dense_bytes) - 1))], dense_bytes)
    for name in SCHEMES:
        nbytes = rows * columns * parse_scheme(name).bits_per_weight(columns) / 8
        layers = [QuantLinear.from_linear(source, name, backend="triton") for _ in range(gpu_copies(nbytes))]
        found[name] = (list(layers), nbytes)
    if find_spec("gemlite") is not None:
        nbytes = rows * columns * parse_scheme("w4a16_g128_asym").bits_per_weight(columns) / 8
        found["gemlite, w4a16_g128_asym"] = (gemlite_layers(source, gpu_copies(nbytes)), nbytes)
    return found


def gpu_copies(nbytes: float) -> int:
    """So many of a layer fill four L2 caches."""
    return copies(nbytes, 4 * torch.cuda.get_device_properties(0).L2_cache_size)


def gemlite_layers(source: nn.Linear, count: int) -> Products:
    """The codes, scales and zero points that quantkit's layer has, in gemlite's kernels."""
    from gemlite.core import DType, GemLiteLinearTriton  # type: ignore[import-not-found]

    q = QuantLinear.from_linear(source, "w4a16_g128_asym").quantized()
    kind = DType.FP16 if source.weight.dtype == torch.float16 else DType.BF16
    layers = []
    for _ in range(count):
        layer = GemLiteLinearTriton(4, 128, q.in_features, q.out_features, input_dtype=kind, output_dtype=kind)
        layer.pack(q.codes, q.scale, q.zero_point.to(q.scale.dtype), None)
        layers.append(layer)
    return list(layers)


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 1 GB reads and writes: what this GPU's memory gives."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * _COPY_BYTES / statistics.median(seconds)


def timed(run: Callable[[], object]) -> float:
    """Seconds between two events around a call."""
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started.record()
    run()
    ended.record()
    ended.synchronize()
    milliseconds: float = started.elapsed_time(ended)
    return milliseconds / 1000


def measure(
    contestants: dict[str, Products], columns: int, tokens: int, dtype: torch.dtype, rounds: int
) -> dict[str, Quartiles]:
    """Name -> seconds of one product."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to("cuda", dtype)
    runs = {}
    for name, products in contestants.items():
        check(name, products[0], x)
        runs[name] = partial(timed_graph, captured(products, x), len(products))
    return in_turn(runs, rounds)


def check(name: str, product: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The error of a product is that of its dtype, against float64 with the layer's own dense weight."""
    weight = getattr(product, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape[-1] != x.shape[1]:
        return  # gemlite's layers do not give theirs back
    error = relative_error(product(x), x.double() @ weight.double().T)
    assert error < 4 * torch.finfo(x.dtype).eps, f"{name}: relative error {error}"


def captured(products: Products, x: Tensor) -> torch.cuda.CUDAGraph:
    """A graph of one product after the other, each with its own weight."""
    for product in products[:2]:
        product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    return graph


def timed_graph(graph: torch.cuda.CUDAGraph, products: int) -> float:
    """Seconds of one of its products."""
    return timed(graph.replay) / products


def render(results: dict[str, Any]) -> str:
    """A table of times and times over the floor: a row for each contestant and shape, a column for the rows of x."""
    cells: dict[tuple[str, str, str], dict[int, str]] = {}
    for case in results["cases"]:
        key = (case["name"], case["dtype"], shape_name(case["shape"]))
        low, middle, high = (1e6 * second for second in case["seconds"])
        cells.setdefault(key, {})[case["tokens"]] = f"{middle:.1f} ({high - low:.1f}), {case['over_floor']:.2f}"
    rows = [[*key, *(found.get(tokens, "") for tokens in TOKENS)] for key, found in cells.items()]
    heads = ["layer", "dtype", "out x in", *(f"{tokens} rows" for tokens in TOKENS)]
    return (
        f"Median microseconds (middle half), time over the floor at {results['bandwidth'] / 1e12:.2f} TB/s of a copy "
        f"on {results['where']['gpu']}; {results['rounds']} rounds.\n\n"
        f"{markdown(heads, rows)}\n{about(results['where'])}\n"
    )
