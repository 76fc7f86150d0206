"""GPTQModel's class ``GPTQ``, in its own environment."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from torch import Tensor, nn

from solver.workers.protocol import serve

_SAMPLES = 2  # it multiplies the sum of XXᵀ by 2 / samples: with 2, the Hessian stays as it is given


def solve(weight: Tensor, hessian: Tensor, request: dict[str, Any]) -> Tensor:
    options = {
        "static": {"desc_act": True, "static_groups": True, "act_group_aware": False},
        "natural": {"desc_act": False, "static_groups": False, "act_group_aware": False},
        "group-aware": {},
    }[request["options"]]
    config = QuantizeConfig(
        bits=request["bits"],
        sym=request["symmetric"],
        group_size=request["group_size"],
        damp_percent=0.01,
        fallback=None,
        **options,
    )
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    solver = GPTQ(layer, config)
    solver.quantizer.configure(perchannel=True)
    solver._device_hessian_partials = {torch.device("cpu"): hessian}
    solver._device_sample_counts = {torch.device("cpu"): _SAMPLES}
    solver._hessian_dirty = True
    solved: Tensor = solver.quantize(blocksize=128)[0]
    return solved


if __name__ == "__main__":
    serve(solve)
