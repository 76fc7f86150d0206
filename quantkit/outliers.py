"""Outliers: how far the largest values of a tensor lie from the rest, in units of the standard deviation.

Integer grids are as wide as the largest magnitude that they hold, so one value of 60 standard deviations leaves few
codes for all others (LLM.int8, arXiv:2208.07339; SmoothQuant, arXiv:2211.10438).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMAS = 6.0
_AT_ONCE = 2**22  # values
_PER_OCTAVE = 64  # classes of magnitude: a limit is met to 1 %
_OCTAVES = 40  # on either side of 1


@dataclass(frozen=True, slots=True)
class Outliers:
    """Of one tensor, or of one input over all tokens.

    Attributes:
        numel: number of values.
        std: standard deviation.
        abs_max: the largest magnitude.
        beyond: share of the values with a magnitude of more than 6 standard deviations.
    """

    numel: int
    std: float
    abs_max: float
    beyond: float

    @property
    def sigmas(self) -> float:
        """The largest magnitude in standard deviations; 0 of a constant tensor."""
        return self.abs_max / self.std if self.std > 0 else 0.0


def outliers_of(tensor: Tensor) -> Outliers:
    """Of a tensor in memory, exactly; its values in float32, their sums in float64."""
    flat, numel = tensor.detach().reshape(-1), tensor.numel()
    total = squares = largest = 0.0
    for piece in flat.split(_AT_ONCE):
        values = piece.float()
        total += float(values.sum(dtype=torch.float64))
        squares += float(values.double().square().sum())
        largest = max(largest, float(values.abs().max()))
    std = _std(numel, total, squares)
    beyond = sum(int((piece.float().abs() > SIGMAS * std).sum()) for piece in flat.split(_AT_ONCE))
    return Outliers(numel, std, largest, beyond / max(numel, 1))


class StreamedOutliers:
    """Of values that come in batches and are not kept: magnitudes are counted in classes 1 % wide."""

    def __init__(self) -> None:
        self._numel = 0
        self._total = self._squares = self._largest = 0.0
        self._counts = torch.zeros(2 * _OCTAVES * _PER_OCTAVE, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Add one batch of any shape."""
        for piece in x.detach().reshape(-1).split(_AT_ONCE):
            values = piece.float()
            self._numel += values.numel()
            self._total += float(values.sum(dtype=torch.float64))
            self._squares += float(values.double().square().sum())
            magnitudes = values.abs()
            self._largest = max(self._largest, float(magnitudes.max()))
            classes = ((magnitudes.clamp_min(2.0**-_OCTAVES).log2() + _OCTAVES) * _PER_OCTAVE).long()
            self._counts += torch.bincount(
                classes.clamp_(0, self._counts.numel() - 1), minlength=self._counts.numel()
            ).cpu()

    def result(self) -> Outliers:
        """Of everything so far."""
        std = _std(self._numel, self._total, self._squares)
        if std == 0:
            return Outliers(self._numel, 0.0, self._largest, 0.0)
        limit = math.ceil((math.log2(SIGMAS * std) + _OCTAVES) * _PER_OCTAVE)
        beyond = int(self._counts[max(limit, 0) :].sum())
        return Outliers(self._numel, std, self._largest, beyond / self._numel)


def _std(numel: int, total: float, squares: float) -> float:
    mean = total / max(numel, 1)
    return math.sqrt(max(squares / max(numel, 1) - mean * mean, 0.0))
