"""Which option each unit takes so that the sum of losses is smallest within a size budget: solved exactly.

This is the multiple-choice knapsack problem: from each class (unit) exactly one item (scheme) of a weight (bytes) and a
cost (loss). Its linear relaxation, which is also its Lagrangian bound, is the lower convex hulls of the units merged
by slope (Zemel 1980, "The linear multiple choice knapsack problem"; Pisinger 1995, "A minimal algorithm for the
multiple-choice knapsack problem"). The exact optimum is found by dynamic programming over the states (bytes, loss)
that no other state dominates, unit by unit; a state whose loss and relaxed remainder are together above the best
solution at hand cannot lead to a better one and is dropped, which keeps the states few. Sizes are never rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-11  # of the largest sum there is: the same losses, summed in another order, are not better or worse

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a unit.

    Attributes:
        nbytes: its size, at least 0.
        loss: what it costs, at least 0 and finite.
    """

    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The best choice of one option for each unit.

    Attributes:
        chosen: index of each unit's option.
        nbytes: the chosen options' sizes, summed.
        loss: their losses, summed: no choice within the budget has a smaller sum.
        bound: the Lagrangian bound: no choice within the budget can be below it, by a proof that does not need the
            dynamic programme.
    """

    chosen: tuple[int, ...]
    nbytes: int
    loss: float
    bound: float


def smallest(units: Sequence[Sequence[Option]]) -> int:
    """Bytes of the smallest choice there is."""
    return sum(min(option.nbytes for option in options) for options in units)


def allocate(units: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """Choose one option for each unit: the smallest sum of losses with at most ``budget`` bytes.

    Args:
        units: each unit's options, at least one.
        budget: bytes, at least :func:`smallest` of the units.

    Raises:
        ValueError: no choice fits the budget.
    """
    if smallest(units) > budget:
        raise ValueError(f"no choice fits {budget} bytes: the smallest has {smallest(units)}")
    classes = [_Class.of(options) for options in units]
    # Relaxed remainders behind each unit; the first is the bound of the whole problem.
    rest = [_Relaxed.of(classes[index:]) for index in range(len(classes) + 1)]
    enough = rest[0].rounded(budget) + _ROUNDING * float(rest[0].loss[0])
    states = _States(np.zeros(1, np.int64), np.zeros(1))
    trail: list[tuple[_Ints, _Ints]] = []  # for each unit: every state's parent and option
    for index, unit in enumerate(classes):
        states, parents, options = states.extended(unit, rest[index + 1], budget, enough)
        trail.append((parents, options))
    at = int(np.argmin(states.loss))
    chosen = []
    for (parents, options), unit in zip(reversed(trail), reversed(classes), strict=True):
        chosen.append(int(unit.index[options[at]]))
        at = int(parents[at])
    chosen.reverse()
    taken = [options[choice] for options, choice in zip(units, chosen, strict=True)]
    loss = sum(option.loss for option in taken)
    return Allocation(tuple(chosen), sum(option.nbytes for option in taken), loss, min(rest[0].at(budget), loss))


@dataclass(frozen=True, slots=True, eq=False)
class _Class:
    """A unit's options that no other dominates: sizes ascend, losses descend; ``index`` says which they were."""

    nbytes: _Ints
    loss: _Floats
    index: _Ints

    @staticmethod
    def of(options: Sequence[Option]) -> _Class:
        order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].loss))
        kept: list[int] = []
        for i in order:
            if not kept or options[i].loss < options[kept[-1]].loss:
                kept.append(i)
        return _Class(
            np.array([options[i].nbytes for i in kept], np.int64),
            np.array([options[i].loss for i in kept], np.float64),
            np.array(kept, np.int64),
        )

    def hull(self) -> list[tuple[int, float]]:
        """Steps (more bytes, less loss) along the lower convex hull, the steepest first."""
        corners: list[int] = [0]
        for i in range(1, len(self.nbytes)):
            while len(corners) > 1 and self._slope(corners[-2], corners[-1]) >= self._slope(corners[-2], i):
                corners.pop()
            corners.append(i)
        return [
            (int(self.nbytes[b] - self.nbytes[a]), float(self.loss[b] - self.loss[a])) for a, b in pairwise(corners)
        ]

    def _slope(self, a: int, b: int) -> float:
        return float((self.loss[b] - self.loss[a]) / (self.nbytes[b] - self.nbytes[a]))


@dataclass(frozen=True, slots=True, eq=False)
class _Relaxed:
    """The smallest sum of losses of some units as a function of the bytes they may take, fractions of steps allowed:
    piecewise linear, convex and decreasing.

    Attributes:
        nbytes: corners, ascending; the first is the smallest size that is possible.
        loss: at the corners.
    """

    nbytes: _Ints
    loss: _Floats

    @staticmethod
    def of(classes: Sequence[_Class]) -> _Relaxed:
        steps = sorted((step for unit in classes for step in unit.hull()), key=lambda step: step[1] / step[0])
        nbytes = [sum(int(unit.nbytes[0]) for unit in classes)]
        loss = [sum(float(unit.loss[0]) for unit in classes)]
        for more, less in steps:
            nbytes.append(nbytes[-1] + more)
            loss.append(loss[-1] + less)
        return _Relaxed(np.array(nbytes, np.int64), np.array(loss, np.float64))

    def at(self, budget: int) -> float:
        """The bound for one budget; infinite where nothing fits."""
        return float(self.below(np.array([budget], np.int64))[0])

    def below(self, budgets: _Ints) -> _Floats:
        """The bound for each budget [n]."""
        return np.interp(budgets, self.nbytes, self.loss, left=np.inf)

    def rounded(self, budget: int) -> float:
        """The loss of a choice that fits: whole steps, steepest first, until one does not fit."""
        return float(self.loss[np.searchsorted(self.nbytes, budget, side="right") - 1])


@dataclass(frozen=True, slots=True, eq=False)
class _States:
    """Partial choices that no other dominates: bytes ascend, losses descend."""

    nbytes: _Ints
    loss: _Floats

    def extended(self, unit: _Class, rest: _Relaxed, budget: int, enough: float) -> tuple[_States, _Ints, _Ints]:
        """All states with one more unit, without those that cannot become a best choice; parents and options."""
        nbytes = (self.nbytes[:, None] + unit.nbytes[None, :]).ravel()
        loss = (self.loss[:, None] + unit.loss[None, :]).ravel()
        alive = np.flatnonzero(loss + rest.below(budget - nbytes) <= enough)
        order = alive[np.lexsort((loss[alive], nbytes[alive]))]
        ahead = np.concatenate(([np.inf], np.minimum.accumulate(loss[order])[:-1])) if order.size else loss[order]
        kept = order[loss[order] < ahead]
        options = unit.nbytes.size
        return _States(nbytes[kept], loss[kept]), kept // options, kept % options
