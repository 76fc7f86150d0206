"""One linear layer on the CPU: quantized weights against dense products and a read of memory, as ratios of one run.

Every contestant has copies of its layer of more than 64 MB together, so that weights come from memory as in a model,
and runs through them once a round. Times are process CPU time of the whole layer, Python's share included. Before
anything is timed, each product is compared with the dense one in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from measure import about, surroundings
from table import markdown
from torch import Tensor, nn

from quantkit import QuantLinear, parse_scheme
from quantkit.kernels import BACKENDS, LinearSpec
from speed.frame import (
    PlainRead,
    copies,
    cpu_time,
    in_turn,
    random_linear,
    relative_error,
    shape_name,
    stored_bytes,
    twin,
)

SHAPES = ((1536, 576), (576, 1536), (4096, 4096), (4096, 14336))  # out x in
TOKENS = (1, 4, 16, 128)
POOL_BYTES = 64 * 2**20
BASE, READ = "F.linear, bfloat16", "plain read"
SCHEMES = ("w4a16_g64", "w4a16_g64_asym", "w8a16", "w8a8")
FALLBACKS = ("reference", "simulated")  # they run everything and gain no speed
# Errors of bfloat16 inputs, of rounding the weight, and of 8-bit inputs where they take part.
_BF16_ERROR, _W4_ERROR, _W8_ERROR = 0.006, 0.15, 0.025


@dataclass(frozen=True)
class Contestant:
    """A way to multiply.

    Attributes:
        make: a layer of its kind from a dense one.
        allowed: the largest relative error of its product.
        run: how a layer is called.
        dtype: of its input.
    """

    make: Callable[[nn.Linear], nn.Module]
    allowed: float
    run: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
    dtype: torch.dtype = torch.bfloat16


def study(rounds: int, shapes: Sequence[tuple[int, int]] = SHAPES) -> dict[str, Any]:
    """The results of these shapes, out x in."""
    torch.set_num_threads(1)
    where = surroundings()
    if find_spec("torchao") is not None:
        where["torchao"] = version("torchao")
    results: dict[str, Any] = {"where": where, "rounds": rounds, "cases": []}
    for shape in shapes:
        results["cases"] += one_shape(*shape, rounds)
    return results


def one_shape(rows: int, columns: int, rounds: int) -> list[dict[str, Any]]:
    """A case for each number of tokens."""
    source = random_linear(rows, columns, torch.bfloat16)
    entered = contestants(rows, columns)
    layers = {name: made(contestant, source) for name, contestant in entered.items()}
    nbytes = {name: stored_bytes([*own[0].parameters(), *own[0].buffers()]) for name, own in layers.items()}
    cases = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        exact = x.double() @ source.weight.double().T
        torch._dynamo.reset()  # or what was compiled for other sizes would be looked through at every call
        runs: dict[str, Callable[[], float]] = {READ: PlainRead()}
        for name, contestant in entered.items():
            given = x.to(contestant.dtype)
            with torch.inference_mode():
                check(name, contestant.run(layers[name][0], given), exact, contestant.allowed)
            runs[name] = partial(cpu_time, [partial(contestant.run, layer) for layer in layers[name]], given)
        seconds = in_turn(runs, rounds)
        read = PlainRead.nbytes / seconds.pop(READ)[1]
        case = {"shape": [rows, columns], "tokens": tokens, "seconds": seconds, "read_bytes_per_second": read}
        cases.append({**case, "nbytes": nbytes})
        ratios = ", ".join(f"{name} {seconds[BASE][1] / value[1]:.2f}" for name, value in seconds.items())
        print(f"{rows}x{columns}, {tokens} tokens: {ratios}", flush=True)
    return cases


def contestants(rows: int, columns: int) -> dict[str, Contestant]:
    """Dense layers, every backend of quantkit that takes the layer, and torchao where it is installed."""
    found = {
        BASE: Contestant(twin, _BF16_ERROR),
        "F.linear, float32": Contestant(partial(twin, dtype=torch.float32), _BF16_ERROR, dtype=torch.float32),
    }
    for name in SCHEMES:
        spec = LinearSpec(columns, rows, parse_scheme(name), torch.bfloat16, "cpu")
        for backend in BACKENDS:
            if backend.name not in FALLBACKS and backend.why_not(spec) is None:
                make = partial(QuantLinear.from_linear, scheme=name, backend=backend.name)
                allowed = _W4_ERROR if spec.scheme.bits == 4 else _W8_ERROR
                found[f"{name}, {backend.name}"] = Contestant(make, allowed)
                if name == SCHEMES[0] and backend.why_not(replace(spec, dtype=torch.float32)) is None:
                    found[f"{name}, {backend.name}, float32"] = Contestant(
                        of_float32(make), allowed, dtype=torch.float32
                    )
    return found if find_spec("torchao") is None else {**found, **torchao_contestants()}


def of_float32(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Linear], nn.Module]:
    """The same for a float32 layer."""
    return lambda linear: make(twin(linear, dtype=torch.float32))


def torchao_contestants() -> dict[str, Contestant]:
    """Its int4 layer is one operator; its int8 layer is fast when torch.compile takes the product into one."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def make(config: Any, linear: nn.Linear) -> nn.Module:
        holder = nn.Sequential(twin(linear))
        quantize_(holder, config)
        return holder[0]

    compiled = torch.compile(lambda layer, x: layer(x), dynamic=False)
    int4 = partial(make, PrototypeInt4WeightOnlyConfig(group_size=64))
    return {
        "torchao int4 g64": Contestant(int4, _W4_ERROR),
        "torchao int4 g64, compiled": Contestant(int4, _W4_ERROR, compiled),
        "torchao int8, compiled": Contestant(partial(make, Int8WeightOnlyConfig()), _W8_ERROR, compiled),
    }


def made(contestant: Contestant, source: nn.Linear) -> list[nn.Module]:
    """Copies of the layer, each with a weight of its own."""
    first = contestant.make(source)
    nbytes = stored_bytes([*first.parameters(), *first.buffers()])
    return [first, *(contestant.make(source) for _ in range(copies(nbytes, POOL_BYTES) - 1))]


def check(name: str, y: Tensor, exact: Tensor, allowed: float) -> None:
    error = relative_error(y, exact)
    assert error < allowed, f"{name}: relative error {error}"


def render(results: dict[str, Any]) -> str:
    """Times and ratios, and how near to a plain read of memory the layers come at one token."""
    text = ""
    for tokens in sorted({case["tokens"] for case in results["cases"]}):
        cases = [case for case in results["cases"] if case["tokens"] == tokens]
        heading = [f"{tokens} token{'s' * (tokens > 1)}", *(shape_name(case["shape"]) for case in cases)]
        rows = [[name, *(_cell(case, name) for case in cases)] for name in cases[0]["seconds"]]
        text += markdown(heading, rows) + "\n"
    return (
        f"Times as fast as {BASE}, whose CPU time is given; the median of {results['rounds']} rounds (its middle "
        "half); at one token also the layer's bytes by its time, as a share of the speed of a plain read in the same "
        "rounds.\n\n"
        f"{text}{about(results['where'])}{_peer(results['where'])}\n"
    )


def _cell(case: dict[str, Any], name: str) -> str:
    low, middle, high = case["seconds"][name]
    base = case["seconds"][BASE][1]
    speed = (
        f"{1e3 * middle:.3f} ms ({1e3 * low:.3f}-{1e3 * high:.3f})" if name == BASE else _ratio(base, low, middle, high)
    )
    if case["tokens"] > 1:
        return speed
    return f"{speed}; {case['nbytes'][name] / middle / case['read_bytes_per_second']:.0%}"


def _ratio(base: float, low: float, middle: float, high: float) -> str:
    return f"{base / middle:.2f} ({base / high:.2f}-{base / low:.2f})"


def _peer(where: dict[str, Any]) -> str:
    return f" torchao {where['torchao']}." if "torchao" in where else ""
