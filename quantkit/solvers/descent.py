"""Coordinate descent over codes: each column's codes are chosen again, all others as they are.

QuantEase, arXiv:2309.01885, equation 9 and Algorithm 2; CDQuant, arXiv:2406.17542. With e = w - ŵ and H the damped
Hessian, the loss of a row is a parabola in ŵ_i alone, with its minimum at

    t_i  =  ŵ_i + (H e)_i / H_ii,

so that the grid's nearest point to t_i is the best there is. A column may stay as it is, so a sweep never raises the
loss. The order and the blocks are GPTQ's: (H e) of a block is one product, what a panel changes in the rest of its
block another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.solvers.rounded import Rounded, hessian_lines

_PANEL = 32


def sweep(state: Rounded, hessian: Tensor, damping: float, block_size: int) -> int:
    """Choose all codes again, column by column, in place.

    Args:
        state: the rounded weight; its codes, errors and losses change.
        hessian: float [in, in], as the statistics hold it.
        damping: what is added to its diagonal.
        block_size: columns whose (H e) is computed at once; it changes the speed, not the result.

    Returns:
        how many codes changed.
    """
    groups = state.group.tolist()
    changed = 0
    for last in range(len(groups), 0, -block_size):
        first = max(last - block_size, 0)
        lines = hessian_lines(hessian, damping, state.positions[first:last], state.positions, first)
        changed += _Block(state, lines, first, last).run(groups)
    return changed


class _Block:
    """The columns at positions ``first`` to ``last``, [n, out]."""

    def __init__(self, state: Rounded, lines: Tensor, first: int, last: int) -> None:
        self.state, self.first, self.last = state, first, last
        self.old = state.weight[first:last] - state.error[first:last]
        diagonal = lines[:, first:last].diagonal()
        self.diagonal = diagonal.clone()[:, None]
        self.slopes = lines[:, first:last] / self.diagonal
        self.targets = torch.addcdiv(self.old, lines @ state.error, self.diagonal)
        self.changes = torch.zeros_like(self.old)  # ŵ afterwards less ŵ before

    def run(self, groups: list[int]) -> int:
        """Choose this block's codes again; returns how many changed."""
        size, state, rows = self.last - self.first, self.state, slice(self.first, self.last)
        levels = torch.empty_like(self.old)
        for stop in range(size, 0, -_PANEL):
            start = max(stop - _PANEL, 0)
            self.panel(start, stop, levels, groups[self.first + start : self.first + stop])
            self.targets[:start].addmm_(self.slopes[:start, start:stop], self.changes[start:stop], alpha=-1)
        codes = levels.add_(state.grids.zero_points(state.group[rows])).to(torch.uint8)
        changed = int((codes != state.codes[rows]).sum())
        state.codes[rows] = codes
        state.error[rows] -= self.changes
        # H_ii ((t - ŵ afterwards)² - (t - ŵ before)²), with each column's own t.
        gains = (self.changes - 2 * (self.targets - self.old)).mul_(self.changes).mul_(self.diagonal)
        state.loss += gains.sum(0, dtype=torch.float64)
        return changed

    def panel(self, start: int, stop: int, levels: Tensor, groups: list[int]) -> None:
        """Choose the codes of these columns again, one column after the other.

        Changes are 0 until they are made, so that one product with all of the panel's changes serves every column.
        """
        part = slice(start, stop)
        changes, minus = self.changes[part], self.old[part].neg()
        matrices = (self.targets[part], minus, levels[part], changes, self.slopes[part, part])
        lines = zip(*(matrix.unbind() for matrix in matrices), groups, strict=True)
        for target, before, level, change, slope, group in reversed(list(lines)):
            target.addmv_(changes.T, slope, alpha=-1)
            scale = self.state.grids.nearest(target, group, out=level)
            torch.addcmul(before, level, scale, out=change)
