"""The triangular factor of a layer's Hessian: damping, the order of the columns, what cannot be factored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import HessianError

_TILE = 512  # rows of a Hessian that are reordered at once
_ESCALATION = 10


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """``H + λI = C D² Cᵀ`` with rows and columns of H in the order of ``positions``.

    Attributes:
        unit: float [in, in], C, lower-triangular with ones on its diagonal.
        diagonal: float [in], D.
        positions: int64 [in], the column of the weight at each position.
        damping: λ.
        notes: the damping that had to be raised, one sentence a step.
    """

    unit: Tensor
    diagonal: Tensor
    positions: Tensor
    damping: float
    notes: tuple[str, ...] = ()

    def solve(self, right: Tensor) -> Tensor:
        """``(H + λI)⁻¹ right``, in the order of ``positions``, by two triangular solves.

        Args:
            right: float [in, columns].
        """
        half = torch.linalg.solve_triangular(self.unit, right, upper=False, unitriangular=True)
        half.div_(self.diagonal.square()[:, None])
        solution: Tensor = torch.linalg.solve_triangular(self.unit.mT, half, upper=True, unitriangular=True)
        return solution


def check_finite(hessian: Tensor) -> None:
    """Refuse what no damping helps.

    Raises:
        HessianError: the activations held NaN or infinities.
    """
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise HessianError(
            "the calibration activations are not finite (NaN or inf); "
            "check the model in this dtype, or use --dtype float32"
        )


def factorize(hessian: Tensor, positions: Tensor, damp_percent: float, damp_limit: float) -> Factor:
    """Factor the damped Hessian; while it is not positive definite, damp ten times more, up to the limit.

    Args:
        hessian: float [in, in], ``2/n Σ x xᵀ`` over n tokens. Not modified; one matrix of its size is allocated.
        positions: int64 [in], the column at each position.
        damp_percent: fraction of the mean diagonal that is added to the diagonal.
        damp_limit: the largest fraction to try.

    Raises:
        HessianError: zero, or not positive definite at the limit.
    """
    mean = float(hessian.diagonal().mean())
    if mean == 0.0:
        raise HessianError(
            "the calibration data never activates this layer (its Hessian is zero); "
            "use other data, or method rtn for it"
        )
    notes: tuple[str, ...] = ()
    percent = damp_percent
    while True:
        lower = _reordered(hessian, positions)
        lower.diagonal().add_(percent * mean)
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0:
            break
        del lower  # before the next one is allocated
        if percent >= damp_limit:
            raise HessianError(
                f"the Hessian is not positive definite with damp_percent={percent:g}; "
                "use more calibration tokens, a larger damp_percent (0.05, 0.1) or a larger damp_limit"
            )
        raised = min(percent * _ESCALATION, damp_limit)
        notes += (f"not positive definite with damp_percent {percent:g}: damped by {raised:g}",)
        percent = raised
    roots = lower.diagonal().clone()
    lower.div_(roots)
    return Factor(lower, roots, positions, percent * mean, notes)


def _reordered(hessian: Tensor, positions: Tensor) -> Tensor:
    """A copy with rows and columns in this order; its columns are contiguous, as LAPACK wants them."""
    size = len(positions)
    if torch.equal(positions, torch.arange(size - 1, -1, -1, device=positions.device)):
        return hessian.flip(0, 1).mT
    copy = torch.empty_like(hessian)
    for start in range(0, size, _TILE):
        copy[start : start + _TILE] = hessian[positions[start : start + _TILE]].index_select(1, positions)
    return copy.mT
