"""What the solvers' tests draw and measure: weights, statistics of correlated inputs, losses by their definition."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.stats import LayerStats, Stat

F64 = torch.float64


def randn(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stats_of(x: Tensor) -> LayerStats:
    stats = LayerStats(x.shape[-1], frozenset({Stat.HESSIAN}), torch.device("cpu"))
    stats.update(x)
    return stats


def stats_with(hessian: Tensor) -> LayerStats:
    """Statistics whose Hessian is this one (rounded to float32): they are given it, not tokens."""
    stats = stats_of(torch.zeros(2, len(hessian)))
    stats.hessian.copy_(hessian)
    return stats


def correlated(seed: int, width: int, tokens: int = 300, rank: int = 8, noise: float = 0.3) -> LayerStats:
    """Statistics of inputs that mostly lie in a subspace of ``rank`` dimensions, as activations do.

    The inputs are multiples of 1/16, so that the float32 sums are exact and the Hessian is exactly symmetric: else
    a solver that reads its upper triangle and one that reads all of it would differ in the seventh digit.
    """
    x = randn(seed, tokens, rank) @ randn(seed + 1, rank, width) + noise * randn(seed + 2, tokens, width)
    return stats_of(torch.round(x * 16) / 16)


def diagonal(seed: int, width: int) -> LayerStats:
    """Statistics with an exactly diagonal Hessian of very different entries."""
    return stats_of(torch.diag(randn(seed, width).exp()))


def damped(stats: LayerStats, damp_percent: float = 0.01) -> Tensor:
    hessian = stats.hessian.double()
    return hessian + damp_percent * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=F64)


def real(q: QuantizedTensor) -> Tensor:
    """float64 scale * (code - zero point), with the scale that ships."""
    group = torch.arange(q.in_features) // q.scheme.columns_per_group(q.in_features)
    group = group if q.g_idx is None else q.g_idx.long()
    return (q.codes.double() - q.zero_point.double()[:, group]) * q.scale.double()[:, group]


def losses(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """float64 [out]: dw H dwᵀ of each row."""
    error = approximation - weight
    return ((error @ hessian) * error).sum(1)
