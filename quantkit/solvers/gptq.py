"""GPTQ: columns are rounded one by one, and each column's error is made up for by the columns that follow.

The algorithm is GPTQ's (arXiv:2210.17323, Algorithm 1). It is computed from one triangular factor of the Hessian
itself, never from its inverse: with H = A Aᵀ, A upper triangular, the loss of a row's errors e = w - ŵ is ‖Aᵀ e‖², and
line i of Aᵀ e holds e_0 … e_i only. Once the columns p before a span b are fixed, the rest is free to cancel their
part of the lines of b exactly, by

    w_b  ←  w_b + A_bb⁻ᵀ A_pbᵀ e_p,

which is where GPTQ's updates leave w_b (the equivalence is shown as "GPTQ is Babai's nearest plane algorithm",
arXiv:2507.18553). One Cholesky factorisation replaces the factorisation, inversion and second factorisation of the
textbook form, and the lazy update between blocks is one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.errors import HessianError, RecipeError, message
from quantkit.grid import choose_qparams, quantize
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme
from quantkit.solvers.base import Solution
from quantkit.stats import LayerStats, Stat


@dataclass(frozen=True)
class GPTQ:
    """GPTQ with lazy block updates; scales are chosen at the start of each group from the updated weights.

    Attributes:
        damp_percent: this fraction of the mean diagonal is added to the Hessian's diagonal (0.01 is 1 %).
        block_size: columns between two lazy updates. It changes the speed, not the result.
    """

    name: Literal["gptq"] = "gptq"
    damp_percent: float = 0.01
    block_size: int = 128
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})
    writes_g_idx: ClassVar[bool] = False
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        for name, kind in (("damp_percent", (int, float)), ("block_size", int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise RecipeError(
                    message("gptq", f"{name}={value!r} is not a number of its kind", "see recipes/w4a16-gptq.yaml")
                )
        if not 0 < self.damp_percent < 1:
            raise RecipeError(
                message(
                    "gptq", f"damp_percent={self.damp_percent} is out of range", "choose between 0 and 1, usually 0.01"
                )
            )
        if self.block_size < 1:
            raise RecipeError(
                message("gptq", f"block_size={self.block_size} is out of range", "choose at least 1, usually 128")
            )

    def solve(self, weight: Tensor, scheme: QuantScheme, stats: LayerStats | None, dtype: torch.dtype) -> Solution:
        """See :class:`quantkit.solvers.base.Solver`.

        Raises:
            HessianError: no statistics, activations that are not finite or all zero, or not positive definite.
        """
        if stats is None:
            raise HessianError("GPTQ needs calibration statistics, and there are none")
        factor = reversed_factor(stats.hessian.to(weight.dtype), self.damp_percent)
        return _Columns(weight, factor, scheme, dtype).run(self.block_size)


def reversed_factor(hessian: Tensor, damp_percent: float) -> Tensor:
    """Lower-triangular L such that A = L read backwards (rows and columns) is upper-triangular and
    A Aᵀ = H + damp_percent·mean(diag H)·I; ``A⁻¹`` is GPTQ's Cholesky factor of H⁻¹.

    Args:
        hessian: float [in, in], ``2/n Σ x xᵀ`` over n tokens. Not modified; one matrix of its size is allocated.
        damp_percent: fraction of the mean diagonal.

    Raises:
        HessianError: not finite, zero, or not positive definite after damping.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise HessianError(
            "the calibration activations are not finite (NaN or inf); "
            "check the model in this dtype, or use --dtype float32"
        )
    damping = damp_percent * diagonal.mean()
    if float(damping) == 0.0:
        raise HessianError(
            "the calibration data never activates this layer (its Hessian is zero); "
            "use other data, or method rtn for it"
        )
    lower = hessian.flip(0, 1).mT  # symmetric; columns first, as LAPACK wants it, or it would work on a copy
    lower.diagonal().add_(damping)
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info) != 0:
        raise HessianError(
            f"the Hessian is not positive definite with damp_percent={damp_percent}; "
            "use more calibration tokens or a larger damp_percent (0.05, 0.1)"
        )
    return lower


class _Columns:
    """The state of one solve. Matrices are held transposed, [in, out], so that a column of W is contiguous."""

    def __init__(self, weight: Tensor, factor: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> None:
        out_features, in_features = weight.shape
        groups = scheme.num_groups(in_features)
        self.weight, self.factor, self.scheme, self.dtype = weight.T.contiguous(), factor, scheme, dtype
        self.group = scheme.columns_per_group(in_features)
        self.error = torch.zeros_like(self.weight)  # w - ŵ of the columns that are fixed
        self.codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=weight.device)
        self.scale = torch.empty(groups, out_features, dtype=dtype, device=weight.device)
        self.zero_point = torch.empty(groups, out_features, dtype=torch.uint8, device=weight.device)
        self.loss = torch.zeros(out_features, dtype=torch.float64, device=weight.device)

    def run(self, block_size: int) -> Solution:
        in_features = self.weight.shape[0]
        # A span holds whole groups, or is one group wider than a block: its scale is then chosen before its blocks.
        span = max(block_size // self.group, 1) * self.group
        for start in range(0, in_features, span):
            stop = min(start + span, in_features)
            if self.group > block_size:
                self.choose(start, self.updated(start, stop))
            for first in range(start, stop, block_size):
                last = min(first + block_size, stop)
                self.fix(first, self.updated(first, last))
        q = QuantizedTensor(
            self.codes.T.contiguous(), self.scale.T.contiguous(), self.zero_point.T.contiguous(), self.scheme
        )
        return Solution(q, self.loss)

    def updated(self, start: int, stop: int) -> Tensor:
        """Columns start:stop after the updates of all columns before ``start``: w_b + A_bb⁻ᵀ A_pbᵀ e_p."""
        own = self.weight[start:stop]
        if start == 0:
            return own.clone()
        before = self.part(0, start, start, stop).T @ self.error[:start]
        own_factor = self.part(start, stop, start, stop)
        made_up: Tensor = torch.linalg.solve_triangular(own_factor.T, before, upper=False)
        return own + made_up

    def part(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """A[top:bottom, left:right], from the factor that is held backwards."""
        size = self.factor.shape[0]
        return self.factor[size - bottom : size - top, size - right : size - left].flip(0, 1)

    def choose(self, start: int, columns: Tensor) -> None:
        """Fix scale and zero point of the group whose updated columns [group, out] these are."""
        group = start // self.group
        self.scale[group], self.zero_point[group] = choose_qparams(columns.T, self.scheme, self.dtype)

    def fix(self, start: int, columns: Tensor) -> None:
        """Round these updated columns [b, out] one after the other (Algorithm 1, the inner loop)."""
        size = columns.shape[0]
        block = self.part(start, start + size, start, start + size)
        eye = torch.eye(size, dtype=block.dtype, device=block.device)
        inverse = torch.linalg.solve_triangular(block, eye, upper=True)  # rows of GPTQ's U within the block
        steps = inverse / inverse.diagonal()[:, None]
        residuals = torch.empty_like(columns)
        for i in range(size):
            group, inside = divmod(start + i, self.group)
            if inside == 0 and self.group <= size:
                self.choose(start + i, columns[i : i + self.group])
            scale, zero_point = self.scale[group].to(columns.dtype), self.zero_point[group]
            codes = quantize(columns[i], scale, zero_point, self.scheme)
            fixed = (codes - zero_point) * scale
            self.codes[start + i] = codes.to(torch.uint8)
            self.error[start + i] = self.weight[start + i] - fixed
            torch.sub(columns[i], fixed, out=residuals[i])
            columns[i + 1 :].addr_(steps[i, i + 1 :], residuals[i], alpha=-1)
        self.loss += (residuals * block.diagonal()[:, None]).double().square_().sum(0)
