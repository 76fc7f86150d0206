"""Scales fitted again once the codes are fixed.

With q_g the codes of group g less their zero point, zero elsewhere, a row is ŵ = Σ_g s_g q_g, and its loss
(w - ŵ) H (w - ŵ)ᵀ a quadratic form in the scales s. It is least where the changes δ of the scales solve

    N δ = b,     N_gh = q_g H q_hᵀ,     b_g = q_g H eᵀ,     e = w - ŵ.

The change of the loss for any δ, so also for scales that are rounded to the dtype that ships, is δ N δᵀ - 2 b δᵀ; a
row's scales change where that is negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.solvers.rounded import Rounded

_ROWS = 2**19  # numbers of one matrix of a chunk of rows
_RIDGE = 1e-9  # of N's own diagonal: groups whose weights are all 0 leave it singular


def refit(state: Rounded, hessian: Tensor, damping: float) -> int:
    """Fit the scales of every row to its codes, in place, where that lowers its loss.

    Args:
        state: the rounded weight; its scales, errors and losses change.
        hessian: float [in, in], as the statistics hold it.
        damping: what is added to its diagonal.

    Returns:
        how many rows changed.
    """
    in_features, out_features = state.weight.shape
    by_group = torch.argsort(state.group, stable=True)
    columns = state.positions[by_group]
    rows = max(_ROWS // in_features, 16)
    changed = 0
    for first in range(0, out_features, rows):
        changed += _Rows(state, by_group, slice(first, first + rows)).run(hessian, damping, columns)
    return changed


class _Rows:
    """Some rows of the weight, transposed [in, rows], their columns sorted by group."""

    def __init__(self, state: Rounded, by_group: Tensor, rows: slice) -> None:
        self.state, self.by_group, self.rows = state, by_group, rows
        self.groups = len(state.grids.scale)
        codes = state.codes[by_group, rows].to(state.weight.dtype).unflatten(0, (self.groups, -1))
        zero_point = state.grids.zero_point[:, None, rows].to(codes.dtype)
        self.levels = (codes - zero_point).flatten(0, 1)
        self.error = state.error[by_group, rows]

    def run(self, hessian: Tensor, damping: float, columns: Tensor) -> int:
        """Fit these rows; returns how many changed."""
        state, scale = self.state, self.state.grids.scale[:, self.rows]
        normal, right = self.system(hessian, damping, columns)
        found = torch.linalg.solve_ex(_regular(normal), right)[0].T + scale.double()
        limits = torch.finfo(scale.dtype)
        usable = (found.isfinite() & (found.abs() <= limits.max) & (found.abs() >= limits.tiny)).all(0)
        rounded = torch.where(usable, found, scale.double()).to(scale.dtype)
        change = (rounded.double() - scale.double()).T
        gain = ((normal @ change[..., None]).squeeze(-1) - 2 * right).mul_(change).sum(1)
        better = gain < 0
        change = torch.where(better[:, None], change, 0.0).T.to(self.error.dtype)
        self.error -= (self.levels.unflatten(0, (self.groups, -1)) * change[:, None]).flatten(0, 1)
        state.error[self.by_group, self.rows] = self.error
        grid = torch.where(better, rounded, scale), state.grids.zero_point[:, self.rows]
        state.grids.set_rows(self.rows, grid)
        state.loss[self.rows] += torch.where(better, gain, 0.0)
        return int(better.sum())

    def system(self, hessian: Tensor, damping: float, columns: Tensor) -> tuple[Tensor, Tensor]:
        """N, float64 [rows, groups, groups], and b, float64 [rows, groups]."""
        size = len(self.levels) // self.groups
        rows = self.levels.shape[1]
        normal = torch.empty(rows, self.groups, self.groups, dtype=torch.float64, device=hessian.device)
        right = torch.empty(rows, self.groups, dtype=torch.float64, device=hessian.device)
        for group in range(self.groups):
            own = slice(group * size, (group + 1) * size)
            lines = hessian[columns[own]].index_select(1, columns)
            lines[:, own].diagonal().add_(damping)
            levels = self.levels[own]
            right[:, group] = (lines @ self.error).mul_(levels).sum(0)
            # One triangle of N: the groups up to this one.
            products = (lines[:, : own.stop].T @ levels).mul_(self.levels[: own.stop])
            sums = products.unflatten(0, (group + 1, size)).sum(1).T
            normal[:, group, : group + 1] = sums
            normal[:, : group + 1, group] = sums
        return normal, right


def _regular(normal: Tensor) -> Tensor:
    """N with a little more on its diagonal, so that a group of zeros keeps its scale."""
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = torch.where(diagonal > 0, _RIDGE * diagonal, 1.0)
    return normal + torch.diag_embed(ridge)
