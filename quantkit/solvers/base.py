"""What every solver is: weight + statistics -> quantized weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.stats import LayerStats, Stat


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A solved weight.

    Attributes:
        weight: the quantized weight.
        loss: float64 [out], for each output row ``dw H dwᵀ`` with dw the weight error and H the solver's (damped)
            Hessian, or the identity for a solver that needs none.
        notes: what the solver had to do that the recipe did not state as such, one sentence each.
    """

    weight: QuantizedTensor
    loss: Tensor
    notes: tuple[str, ...] = ()


class Solver(Protocol):
    """A frozen dataclass whose fields are its recipe options; ``name`` says which one a recipe means."""

    @property
    def name(self) -> str:
        """The recipe's word for this solver."""
        ...

    @property
    def needs(self) -> frozenset[Stat]:
        """The statistics that it reads with these options."""
        ...

    @property
    def writes_g_idx(self) -> bool:
        """Whether its weights may have reordered groups (``QuantizedTensor.g_idx``), which few formats hold."""
        ...

    def solve(self, weight: Tensor, scheme: QuantScheme, stats: LayerStats | None, dtype: torch.dtype) -> Solution:
        """Quantize a weight.

        Args:
            weight: float32 or float64 [out, in]. Not modified.
            scheme: the grid.
            stats: what was seen at the input; may be None where ``needs`` is empty.
            dtype: floating-point dtype of the scales on disk.
        """
        ...
