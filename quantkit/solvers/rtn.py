"""Round to nearest: every weight to the nearest point of its group's min-max grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.grid import dequantize, quantize_groups
from quantkit.scheme import QuantScheme
from quantkit.solvers.base import Solution
from quantkit.stats import LayerStats, Stat


@dataclass(frozen=True)
class RTN:
    """Round to nearest. Needs no calibration data; the loss is the squared weight error of each row."""

    name: Literal["rtn"] = "rtn"
    needs: ClassVar[frozenset[Stat]] = frozenset()
    writes_g_idx: ClassVar[bool] = False
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def solve(self, weight: Tensor, scheme: QuantScheme, stats: LayerStats | None, dtype: torch.dtype) -> Solution:  # noqa: ARG002
        """See :class:`quantkit.solvers.base.Solver`; ``stats`` is not read."""
        q = quantize_groups(weight, scheme, dtype)
        error = dequantize(q, torch.float32).sub_(weight)
        return Solution(q, error.square_().sum(-1, dtype=torch.float64))
