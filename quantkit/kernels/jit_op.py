"""torch's operator ``quantkit::panels_linear``: the product with a weight in panels, one node for torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.jit import multiplies_bytes, product
from quantkit.kernels.jit_amx import fits, product_by_amx
from quantkit.kernels.jit_dense import pays, product_of_many
from quantkit.kernels.order import reordered

_SCHEMA = "(Tensor x, Tensor words, Tensor scale, Tensor? zeros, Tensor? order, int bits, int out_features) -> Tensor"


def panels_linear(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, order: Tensor | None, bits: int, out_features: int
) -> Tensor:
    """``x @ Wᵀ``; by way of torch's dispatcher only where torch.compile looks on, for that costs microseconds.

    Args:
        x: bfloat16, float16 or float32 [tokens, in].
        words: int16 [panels, units, 16, 2], see :mod:`quantkit.kernels.panels`.
        scale: [panels, groups, 16].
        zeros: uint8 [panels, groups, 16]; None: symmetric.
        order: int32 [in], the column of x that each packed column belongs to; None: all are in place.
        bits: of a code.
        out_features: rows of the weight.

    Returns:
        x's dtype [tokens, out].
    """
    chosen = _operator if torch.compiler.is_compiling() else _product
    return chosen(x, words, scale, zeros, order, bits, out_features)


def _product(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, order: Tensor | None, bits: int, out_features: int
) -> Tensor:
    x = reordered(x, order).contiguous()
    rows, group = x.shape[0], x.shape[1] // scale.shape[1]
    if pays(rows, bits, group, x.dtype):
        return product_of_many(x, words, scale, zeros, bits, out_features)
    by_amx = fits(x.dtype, group) and not multiplies_bytes(rows, x.dtype, bits, group)
    chosen = product_by_amx if by_amx else product
    return chosen(x, words, scale, zeros, bits, out_features)


@torch.library.custom_op("quantkit::panels_linear", mutates_args=(), schema=_SCHEMA)
def _operator(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, order: Tensor | None, bits: int, out_features: int
) -> Tensor:
    return _product(x, words, scale, zeros, order, bits, out_features)


@_operator.register_fake
def _shape(
    x: Tensor,
    words: Tensor,  # noqa: ARG001
    scale: Tensor,  # noqa: ARG001
    zeros: Tensor | None,  # noqa: ARG001
    order: Tensor | None,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    out_features: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)
