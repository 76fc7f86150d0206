"""What a layer saw during calibration, gathered batch by batch."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class Stat(Enum):
    """A statistic that a solver or transform may need; what nobody needs is not gathered."""

    HESSIAN = "hessian"


class LayerStats:
    """Statistics of one input, shared by all layers that read it.

    Attributes:
        num_tokens: input rows seen.
    """

    def __init__(self, in_features: int, needs: frozenset[Stat], device: torch.device) -> None:
        self.num_tokens = 0
        self._divided_by = 1.0
        self._outer: Tensor | None = None
        if Stat.HESSIAN in needs:
            self._outer = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        """Add one batch.

        Args:
            x: [..., in], any floating-point dtype.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        self.num_tokens += rows.shape[0]
        if self._outer is not None:
            self._divide_by(1.0)
            rows = rows.float()
            self._outer.addmm_(rows.T, rows)

    @property
    def hessian(self) -> Tensor:
        """float32 [in, in]: ``2/n Σ x xᵀ`` over the n tokens seen (GPTQ, arXiv:2210.17323, section 3.1).

        Not a copy, which could be large: it is not to be modified, and the next :meth:`update` changes it.

        Raises:
            ValueError: it was not asked for, or no token was seen.
        """
        if self._outer is None or self.num_tokens == 0:
            raise ValueError("no Hessian was gathered: ask for Stat.HESSIAN and update() with at least one token")
        self._divide_by(self.num_tokens / 2)
        return self._outer

    def _divide_by(self, divisor: float) -> None:
        if self._outer is not None and divisor != self._divided_by:
            self._outer.mul_(self._divided_by / divisor)
            self._divided_by = divisor
