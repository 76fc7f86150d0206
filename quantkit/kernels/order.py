"""A g_idx as an order of columns: groups become contiguous, and activations are permuted once a product."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor

UNEVEN = "a g_idx that gives some groups more columns than others; it takes groups of one size"
"""Why a backend that makes groups contiguous refuses a layer."""


def column_order(g_idx: Tensor) -> Tensor:
    """int32 [in]: the column behind each place, by group; those of one group in their order."""
    return torch.argsort(g_idx, stable=True).to(torch.int32)


def has_uneven_groups(q: QuantizedTensor) -> bool:
    """Whether a g_idx gives some groups more columns than others, so that no order makes them contiguous blocks."""
    if q.g_idx is None or not q.in_features:
        return False
    counts = torch.bincount(q.g_idx.long(), minlength=q.scale.shape[1])
    return bool((counts != counts[0]).any())


def in_order(q: QuantizedTensor) -> tuple[Tensor, Tensor | None]:
    """Codes with contiguous groups, uint8 [out, in], and the order that makes them so; None: they were."""
    if q.g_idx is None:
        return q.codes, None
    order = column_order(q.g_idx)
    return q.codes.index_select(1, order), order


def reordered(x: Tensor, order: Tensor | None) -> Tensor:
    """Activations [tokens, in] with the columns that codes in this order multiply; None: as they are."""
    return x if order is None else x.index_select(1, order)


def out_of_order(codes: Tensor, order: Tensor, columns_per_group: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`in_order`: codes and g_idx."""
    places = order.long()
    group = torch.arange(len(places), dtype=torch.int32, device=order.device) // columns_per_group
    g_idx = torch.empty_like(group).index_copy_(0, places, group)
    return torch.empty_like(codes).index_copy_(1, places, codes), g_idx
