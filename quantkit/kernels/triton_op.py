"""torch's operator ``quantkit::planes_linear``: the product with a weight in planes, for any number of rows of x.

Which kernel and tile a call gets is decided inside, from the number of rows, so torch.compile takes it as one node with
a free number of rows. It never waits for the device, so CUDA graphs take it too. triton is imported at the first call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.kernels.base import row_blocks
from quantkit.kernels.order import reordered
from quantkit.kernels.planes import ROWS, num_planes
from quantkit.kernels.tiles import MOST_TOKENS

_DENSE_WEIGHTS = 1 << 24  # of a dense tile: 32 MB, which stays in the L2 cache of large GPUs

_SCHEMA = (
    "(Tensor x, Tensor words, Tensor scale, Tensor? zeros, Tensor? order, Tensor? bias, Tensor counters, "
    "int bits, int group, int out_features) -> Tensor"
)


@torch.library.custom_op("quantkit::planes_linear", mutates_args=(), schema=_SCHEMA)
def planes_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    bits: int,
    group: int,
    out_features: int,
) -> Tensor:
    """``x @ Wᵀ + bias``.

    Args:
        x: float16 or bfloat16 [tokens, in].
        words, scale, zeros: see :mod:`quantkit.kernels.planes`; no zeros is a symmetric weight.
        order: int32 [in], the column of x that each packed column belongs to; None is all in place.
        bias: [out] or None.
        counters: int32 [:func:`~quantkit.kernels.tiles.num_counters`], 0 before and after; one product at a time may
            use them.
        bits: of the codes.
        group: columns that share a packed scale; 0 is all.
        out_features: rows of the weight.

    Returns:
        [tokens, out], x's dtype.
    """
    from quantkit.kernels import triton_check, triton_launch

    tokens, in_features = x.shape
    if tokens == 0:
        return x.new_empty(0, out_features)
    x = reordered(x, order)
    if tokens <= MOST_TOKENS:
        shape = (out_features, in_features)
        tile, splits = triton_launch.choice_on(x.device, x.dtype, tokens, shape, bits, group, zeros is None)
        magic = triton_check.magic_for(x.device, x.dtype, bits, group, in_features, zeros is None)
        return triton_launch.matvec(
            x, words, scale, zeros, bias, counters,
            bits=bits, group=group, out_features=out_features, tile=tile, splits=splits, magic=magic,
        )  # fmt: skip
    y = x.new_empty(tokens, out_features)
    unit_rows = ROWS * num_planes(bits)
    for rows in row_blocks(out_features, in_features, unit_rows, _DENSE_WEIGHTS):
        weight = triton_launch.dense(
            words, scale, zeros, bits=bits, group=group, rows=rows, in_features=in_features, dtype=x.dtype
        )
        y[:, slice(*rows)] = linear(x, weight, None if bias is None else bias[slice(*rows)])
    return y


@planes_linear.register_fake
def _shape(
    x: Tensor,
    words: Tensor,  # noqa: ARG001
    scale: Tensor,  # noqa: ARG001
    zeros: Tensor | None,  # noqa: ARG001
    order: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    counters: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    group: int,  # noqa: ARG001
    out_features: int,
) -> Tensor:
    """What torch.compile needs to know: the result's shape and dtype."""
    return x.new_empty(x.shape[0], out_features)
