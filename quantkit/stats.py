"""What a layer saw during calibration, gathered batch by batch."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from quantkit.precision import products_in_bfloat16

_TILE = 128  # columns whose outer products are summed at once; the tiles below the diagonal are mirrored, not summed


class Stat(Enum):
    """A statistic that a solver or transform may need; what nobody needs is not gathered."""

    HESSIAN = "hessian"
    DRIFT = "drift"
    ABS_MAX = "abs_max"
    ABS_MEAN = "abs_mean"


class LayerStats:
    """Statistics of one input, shared by all layers that read it.

    Attributes:
        num_tokens: input rows seen.
    """

    def __init__(self, in_features: int, needs: frozenset[Stat], device: torch.device) -> None:
        self.num_tokens = 0
        self._device = device
        self._divided_by = 1.0
        self._mirrored = True
        self._outer = _square(in_features, device) if Stat.HESSIAN in needs else None
        self._cross = _square(in_features, device) if Stat.DRIFT in needs else None
        self._abs_max = torch.zeros(in_features, dtype=torch.float32, device=device) if Stat.ABS_MAX in needs else None
        # float64, for the tokens may be many; on the CPU, for not every device has it, and the sums are short.
        self._abs_sum = torch.zeros(in_features, dtype=torch.float64) if Stat.ABS_MEAN in needs else None

    def update(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            x: [..., in], any floating-point dtype.
            reference: what the full-precision model has there, of the same shape; read for ``Stat.DRIFT`` only.

        Raises:
            ValueError: the drift was asked for, and there is no reference.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        self.num_tokens += rows.shape[0]
        self._add_products(rows, reference)
        self._add_magnitudes(rows)

    @property
    def hessian(self) -> Tensor:
        """float32 [in, in]: ``2/n Σ x xᵀ`` over the n tokens seen (GPTQ, arXiv:2210.17323, section 3.1).

        Exactly symmetric: only its upper triangle is summed.

        Not a copy, which could be large: it is not to be modified, and the next :meth:`update` changes it.

        Raises:
            ValueError: it was not asked for, or no token was seen.
        """
        if self._outer is None or self.num_tokens == 0:
            raise ValueError("no Hessian was gathered: ask for Stat.HESSIAN and update() with at least one token")
        self._divide_by(self.num_tokens / 2)
        if not self._mirrored:
            mirror(self._outer)
            self._mirrored = True
        return self._outer

    @property
    def drift(self) -> Tensor:
        """float32 [in, in]: ``2/n Σ (x̃ - x) xᵀ``, x̃ the full-precision model's input (GPTAQ, arXiv:2504.02692:
        its ΔX Xᵀ).

        Not a copy, like :attr:`hessian`.

        Raises:
            ValueError: it was not asked for, or no token was seen.
        """
        if self._cross is None or self.num_tokens == 0:
            raise ValueError("no drift was gathered: ask for Stat.DRIFT and update() with at least one token")
        self._divide_by(self.num_tokens / 2)
        return self._cross

    @property
    def abs_max(self) -> Tensor:
        """float32 [in]: the largest magnitude of each input channel; NaN where one was seen.

        Not a copy, like :attr:`hessian`.

        Raises:
            ValueError: it was not asked for, or no token was seen.
        """
        if self._abs_max is None or self.num_tokens == 0:
            raise ValueError("no maxima were gathered: ask for Stat.ABS_MAX and update() with at least one token")
        return self._abs_max

    @property
    def abs_mean(self) -> Tensor:
        """float32 [in]: the mean magnitude of each input channel over the tokens seen.

        Raises:
            ValueError: it was not asked for, or no token was seen.
        """
        if self._abs_sum is None or self.num_tokens == 0:
            raise ValueError("no means were gathered: ask for Stat.ABS_MEAN and update() with at least one token")
        return (self._abs_sum / self.num_tokens).to(self._device, torch.float32)

    @property
    def is_finite(self) -> bool:
        """Whether the magnitudes seen are all finite; True where none were gathered."""
        gathered = [one for one in (self._abs_max, self._abs_sum) if one is not None]
        return all(bool(torch.isfinite(one).all()) for one in gathered)

    def rescale(self, factors: Tensor) -> None:
        """What would have been seen had every input channel been multiplied by its factor: exact algebra, no pass.

        ``H' = diag(f) H diag(f)``, and the drift likewise, its reference inputs multiplied too.

        Args:
            factors: float [in], positive.
        """
        for total in (self._outer, self._cross):
            if total is not None:
                total.mul_(factors.to(total)).mul_(factors.to(total)[:, None])
        for extent in (self._abs_max, self._abs_sum):
            if extent is not None:
                extent.mul_(factors.to(extent))
        self._mirrored = self._outer is None  # for rows before columns rounds differently than columns before rows

    def _add_products(self, rows: Tensor, reference: Tensor | None) -> None:
        if self._outer is None and self._cross is None:
            return
        self._divide_by(1.0)
        exact, rows = products_in_bfloat16(rows), rows.float()
        if self._outer is not None:
            with exact:
                add_outer(self._outer, rows)
            self._mirrored = False
        if self._cross is not None:
            if reference is None:
                raise ValueError("Stat.DRIFT needs the full-precision model's input beside each batch")
            self._cross.addmm_((reference.detach().reshape(rows.shape).float() - rows).T, rows)

    def _add_magnitudes(self, rows: Tensor) -> None:
        if (self._abs_max is None and self._abs_sum is None) or rows.shape[0] == 0:
            return
        magnitudes = rows.abs().float()
        if self._abs_max is not None:
            torch.maximum(self._abs_max, magnitudes.amax(0), out=self._abs_max)
        if self._abs_sum is not None:
            self._abs_sum += magnitudes.sum(0).cpu()

    def _divide_by(self, divisor: float) -> None:
        if divisor == self._divided_by:
            return
        for total in (self._outer, self._cross):
            if total is not None:
                total.mul_(self._divided_by / divisor)
        self._divided_by = divisor


def _square(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, size, dtype=torch.float32, device=device)


def add_outer(outer: Tensor, rows: Tensor) -> None:
    """Add ``Σ x xᵀ`` to the upper triangle of ``outer``: half the work of the whole product.

    Args:
        outer: float32 [in, in]; of the triangle below the diagonal only the tiles on the diagonal are written.
        rows: float32 [n, in].
    """
    for start in range(0, outer.shape[0], _TILE):
        outer[start : start + _TILE, start:].addmm_(rows[:, start : start + _TILE].T, rows[:, start:])


def output_energy(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H Wᵀ): with H = 2/n Σ x xᵀ that is 2/n Σ ‖W x‖², summed from the triangle above H's diagonal.

    Args:
        weight: float [out, in].
        hessian: float [in, in], symmetric.
    """
    total = 0.0
    for start in range(0, hessian.shape[0], _TILE):
        stop = min(start + _TILE, hessian.shape[0])
        own, following = weight[:, start:stop], weight[:, stop:]
        half = (own @ hessian[start:stop, start:stop]).mul_(0.5)
        half.addmm_(following, hessian[start:stop, stop:].T)
        total += 2 * float(half.mul_(own).sum(dtype=torch.float64))
    return total


def mirror(outer: Tensor) -> None:
    """Copy the triangle above the diagonal of ``outer`` [in, in] to below it, tile by tile."""
    size = outer.shape[0]
    for start in range(0, size, _TILE):
        stop = min(start + _TILE, size)
        corner = outer[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        outer[stop:, start:stop] = outer[start:stop, stop:].T
