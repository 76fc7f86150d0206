"""Where the solver's time goes: CPU seconds of quantkit's GPTQ in its parts, the inner loop over columns among them."""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from typing import Any

import torch
from table import markdown
from torch import Tensor

from quantkit import GPTQ, QuantScheme
from solver.workers.quantkit_solve import Given

HEADING = (
    *("out x in", "whole solve", "factorisation", "scales", "products between blocks and panels"),
    *("inner loop over columns", "its share", "a weight in it"),
)


def measure_parts(weight: Tensor, hessian: Tensor, scheme: dict[str, Any], repeats: int) -> dict[str, float]:
    """CPU seconds of the parts of one solve, on one thread, medians; one solve more, the first, does not count.

    Args:
        weight: float32 [out, in].
        hessian: float32 [in, in].
        scheme: bits, symmetry and group size.
        repeats: that count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [_one_solve(weight, hessian, scheme) for _ in range(1 + repeats)][1:]
    finally:
        torch.set_num_threads(threads)
    return {part: statistics.median(one[part] for one in found) for part in found[0]}


def _one_solve(weight: Tensor, hessian: Tensor, scheme: dict[str, Any]) -> dict[str, float]:
    solver = GPTQ(scale_search="none")  # as in the table: act-order on static groups
    quantized = QuantScheme(scheme["bits"], scheme["group_size"], scheme["symmetric"], None)
    profile = cProfile.Profile(time.process_time, builtins=False)
    profile.runcall(solver.solve, weight, quantized, Given(hessian), torch.float32)
    profiled: Any = pstats.Stats(profile)
    taken: dict[str, float] = {}  # a function's calls, with what they call
    for (file, _, function), (_, _, _, cumulative, _) in profiled.stats.items():
        if "quantkit/solvers/" in file:
            taken[function] = cumulative
    loop = taken["round"]
    whole, factor, scales, products = taken["solve"], taken["factorize"], taken["static"], taken["run"] - loop
    return {"whole": whole, "factor": factor, "scales": scales, "products": products, "loop": loop}


def render_parts(shapes: dict[str, dict[str, float]]) -> str:
    """A line for each shape."""
    body = []
    for shape, parts in shapes.items():
        rows, columns = map(int, shape.split("x"))
        seconds = [f"{parts[part]:.3f} s" for part in ("whole", "factor", "scales", "products", "loop")]
        share, each = parts["loop"] / parts["whole"], parts["loop"] / (rows * columns) * 1e9
        body.append([shape, *seconds, f"{share:.0%}", f"{each:.1f} ns"])
    return markdown(HEADING, body)
