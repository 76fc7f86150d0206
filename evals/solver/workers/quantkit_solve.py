"""quantkit's GPTQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit import GPTQ, QuantScheme
from quantkit.grid import dequantize
from quantkit.stats import LayerStats
from solver.workers.protocol import serve

_ORDERS: dict[str, Any] = {"static": "static", "natural": "none"}


class Given(LayerStats):
    """A Hessian that is there already."""

    def __init__(self, hessian: Tensor) -> None:
        super().__init__(len(hessian), frozenset(), hessian.device)
        self.num_tokens = 1
        self._given = hessian

    @property
    def hessian(self) -> Tensor:
        return self._given


def solve(weight: Tensor, hessian: Tensor, request: dict[str, Any]) -> Tensor:
    scheme = QuantScheme(request["bits"], request["group_size"], request["symmetric"], None)
    stats = Given(hessian)
    solver = GPTQ(act_order=_ORDERS[request["options"]], scale_search="none")  # what the others do not do either
    found = solver.solve(weight, scheme, stats, torch.float32)
    return dequantize(found.weight, torch.float32)


if __name__ == "__main__":
    serve(solve)
