"""llm-compressor's ``quantize_weight``, in its own environment. Its scales come from an observer: from the weights."""

from __future__ import annotations

from typing import Any

from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from torch import Tensor

from solver.workers.protocol import serve


def solve(weight: Tensor, hessian: Tensor, request: dict[str, Any]) -> Tensor:
    order = {"static": "static", "natural": None}[request["options"]]
    args = QuantizationArgs(
        num_bits=request["bits"],
        type="int",
        symmetric=request["symmetric"],
        strategy="group",
        group_size=request["group_size"],
        actorder=order,
    )
    groups = weight.unflatten(1, (-1, request["group_size"]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    found, _, fallback = quantize_weight(weight[None], hessian[None], scale[None], zero[None], None, args)
    if fallback.any():
        raise SystemExit("llm-compressor fell back to round-to-nearest")
    solved: Tensor = found[0]
    return solved


if __name__ == "__main__":
    serve(solve)
