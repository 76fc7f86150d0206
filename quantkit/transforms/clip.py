"""Clipping: a group's largest weights give way where the finer steps of the others lower the output's error more."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.grid import choose_qparams, quantize
from quantkit.scheme import QuantScheme

_STEPS = 20
_SHRINK = tuple(1 - step / (2 * _STEPS) for step in range(_STEPS))  # 1, 0.975, … down to a little above one half
_ROWS = 2**22  # weights that are tried at once


def clip_weight(
    weight: Tensor, scheme: QuantScheme, hessian: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float, float]:
    """A weight whose groups are clamped to the ranges of the smallest output error after rounding to nearest.

    AWQ's weight clipping (arXiv:2306.00978, section 3.2): for each row and quantization group g, the factor c with the
    smallest ``‖X_g (w_g - ŵ_g)‖²`` = ``(w_g - ŵ_g) H_gg (w_g - ŵ_g)ᵀ`` (up to a constant), ŵ_g rounded on the min-max
    grid of w_g clamped to c times its extremes. Errors of other groups are not looked at.

    Args:
        weight: float32 [out, in]. Not modified.
        scheme: the grid.
        hessian: float32 [in, in] of the layer's input.
        dtype: of the scales on disk.

    Returns:
        The clamped weight, and ``Σ e H_gg eᵀ / Σ w H_gg wᵀ`` after and before.
    """
    out_features, in_features = weight.shape
    groups = weight.reshape(out_features, scheme.num_groups(in_features), -1)
    clamped, after, before, signal = torch.empty_like(groups), 0.0, 0.0, 0.0
    columns = groups.shape[2]
    rows = max(_ROWS // columns, 1)
    for group in range(groups.shape[1]):
        part = slice(group * columns, (group + 1) * columns)
        block = hessian[part, part].to(weight)
        for start in range(0, out_features, rows):
            piece = groups[start : start + rows, group]
            found, best, unclipped = _clip_group(piece, scheme, block, dtype)
            clamped[start : start + rows, group] = found
            after, before = after + best, before + unclipped
            signal += float(_energy(piece, block).sum(dtype=torch.float64))
    divisor = signal if signal > 0 else 1.0
    return clamped.reshape(weight.shape), after / divisor, before / divisor


def _clip_group(group: Tensor, scheme: QuantScheme, block: Tensor, dtype: torch.dtype) -> tuple[Tensor, float, float]:
    """One group's weights [out, columns] clamped, and the sums of their errors with and without clamping."""
    low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best, clamped, unclipped = None, group, 0.0
    for factor in _SHRINK:
        tried = torch.minimum(torch.maximum(group, low * factor), high * factor)
        try:
            scale, zero_point = choose_qparams(tried, scheme, dtype)
        except SchemeError:  # the range does not fit the scale's dtype; a smaller one may
            continue
        wide = scale.to(group.dtype)[:, None]
        rounded = (quantize(tried, wide, zero_point[:, None], scheme) - zero_point[:, None]) * wide
        error = _energy(rounded - group, block)
        if best is None:
            best, clamped, unclipped = error, tried, float(error.sum(dtype=torch.float64))
            continue
        better = error < best
        best, clamped = torch.where(better, error, best), torch.where(better[:, None], tried, clamped)
    if best is None:
        raise SchemeError(f"no clipped range of the weights fits in {dtype}; use a wider --dtype (bfloat16 or float32)")
    return clamped, float(best.sum(dtype=torch.float64)), unclipped


def _energy(rows: Tensor, block: Tensor) -> Tensor:
    """``e H eᵀ`` of each row e: [out]."""
    return ((rows @ block) * rows).sum(-1)
