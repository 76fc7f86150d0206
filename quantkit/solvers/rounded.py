"""A weight that is rounded and may still be improved: what GPTQ hands to coordinate descent and to the refit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.grid import Grids
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.solvers.base import Solution


@dataclass(slots=True, eq=False)
class Rounded:
    """Matrices are held transposed, [in, out], a line for each position.

    Attributes:
        weight: float, w.
        error: float, w - ŵ.
        codes: uint8.
        grids: scales and zero points, [groups, out].
        group: int64 [in], of each position.
        positions: int64 [in], the column of the weight at each position.
        loss: float64 [out], (w - ŵ) H (w - ŵ)ᵀ of each row with the damped Hessian.
    """

    weight: Tensor
    error: Tensor
    codes: Tensor
    grids: Grids
    group: Tensor
    positions: Tensor
    loss: Tensor

    def solution(self, scheme: QuantScheme, notes: tuple[str, ...], reordered: bool) -> Solution:
        """The quantized weight in the order on disk; with the group of each column where groups are reordered."""
        codes = torch.empty_like(self.codes)
        codes[self.positions] = self.codes
        g_idx = None
        if reordered and len(self.grids.scale) > 1:
            g_idx = torch.empty(len(codes), dtype=torch.int32, device=codes.device)
            g_idx[self.positions] = self.group.to(torch.int32)
        scale, zero_point = self.grids.scale.T.contiguous(), self.grids.zero_point.T.contiguous()
        return Solution(QuantizedTensor(codes.T.contiguous(), scale, zero_point, scheme, g_idx), self.loss, notes)


def hessian_lines(hessian: Tensor, damping: float, lines: Tensor, positions: Tensor, first: int) -> Tensor:
    """Lines of the damped Hessian, in the order of ``positions``.

    Args:
        hessian: float [in, in].
        damping: what is added to its diagonal.
        lines: int64 [n], the columns of the weight at the positions from ``first`` on.
        positions: int64 [in].
        first: the position of the first line.

    Returns:
        float [n, in].
    """
    found = hessian[lines].index_select(1, positions)
    found[:, first : first + len(lines)].diagonal().add_(damping)
    return found
