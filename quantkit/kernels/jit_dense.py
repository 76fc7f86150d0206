"""Products of many rows by the just-in-time kernels: dense blocks of the weight, multiplied by torch's own product.

A block is written where the last one was, and a layer is never dense as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.kernels.base import BLOCK_WEIGHTS, row_blocks
from quantkit.kernels.jit import TYPES, aligned, multiplies_bfloat16, target_here, weight_in_line, weight_pointers
from quantkit.kernels.jit_amx import fits
from quantkit.kernels.jit_compile import function
from quantkit.kernels.jit_dense_ir import dense_ir
from quantkit.kernels.jit_targets import Target
from quantkit.kernels.jit_text import Kind
from quantkit.kernels.jit_threads import parts, run
from quantkit.kernels.panels import PANEL
from quantkit.precision import bfloat16_is_faster

_DENSE_WEIGHTS = BLOCK_WEIGHTS
# Ratios to F.linear in bfloat16 on a busy Xeon, W4 g64 of 4096 x 4096: the kernels 1.19 at 128 rows and 0.58 at 512.
_MANY_FOR_AMX = 320
# For pairs of bfloat16 where torch multiplies the blocks in float32. 4096 x 4096, g64, on one core of a Xeon without
# AMX, ms of CPU time, kernels / blocks in bfloat16 / in float32: W4 19/21/18 at 48 rows, 34/39/26 at 96, 94/93/56 at
# 256; W8 24/17/15 at 32 rows.
_MANY_FOR_FLOAT32 = 48


def pays(rows: int, bits: int, group: int, dtype: torch.dtype) -> bool:
    """Whether :func:`product_of_many` is faster than the kernels that decode codes as they multiply.

    Args:
        rows: of x.
        bits: of a code; those kernels take about twice as long for bytes as for nibbles.
        group: columns that share a scale.
        dtype: of x.
    """
    many: int | None
    if fits(dtype, group):
        many = _MANY_FOR_AMX
    elif not multiplies_bfloat16(dtype):
        many = target_here().many_rows
    else:
        many = target_here().many_pairs if bfloat16_is_faster() else _MANY_FOR_FLOAT32
    return many is not None and rows * (1 if bits <= 4 else 2) >= many


def product_of_many(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, out_features: int
) -> Tensor:
    """``x @ Wᵀ``, as :func:`quantkit.kernels.jit.product` has it.

    bfloat16 is multiplied with weights that are rounded to bfloat16 where the processor is faster in it; all else in
    float32.
    """
    dtype = _dtype_of_blocks(x.dtype)
    own = x.to(dtype)
    y = x.new_empty(x.shape[0], out_features)
    for start, stop in row_blocks(out_features, x.shape[1], PANEL, _DENSE_WEIGHTS):
        panels = -(-(stop - start) // PANEL)
        weight = _TILE.of(panels * PANEL, x.shape[1], dtype)
        dense(words, scale, zeros, bits, start // PANEL, weight)
        y[:, start:stop] = linear(own, weight[: stop - start])
    return y


def _dtype_of_blocks(dtype: torch.dtype) -> torch.dtype:
    """What x of this dtype and blocks of the weight are multiplied in."""
    return dtype if multiplies_bfloat16(dtype) and bfloat16_is_faster() else torch.float32


def dense(words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, first: int, weight: Tensor) -> None:
    """Writes the dense weight of some panels, rounded once; arguments as for :func:`quantkit.kernels.jit.product`.

    Args:
        first: panel.
        weight: gets it: [16 * panels, in], at least one panel; float32, or bfloat16 where the target multiplies it.
    """
    words, scale, zeros = weight_in_line(words, scale, zeros)
    panels, groups = weight.shape[0] // PANEL, scale.shape[1]
    kernel = _kernel(
        target_here(), Kind(bits, weight.shape[1] // groups, zeros is None, TYPES[scale.dtype]), TYPES[weight.dtype]
    )
    read = weight_pointers(words, scale, zeros)
    cuts = parts(panels, words[first : first + panels].nbytes)
    run(kernel, [(*read, weight[PANEL * a].data_ptr(), first + a, first + b, groups) for a, b in cuts])


class _Tile(threading.local):
    """The memory of a thread's blocks, which stays: fresh memory costs as much as what is written there."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def of(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A matrix with the numbers of the last one, or any."""
        nbytes = rows * columns * dtype.itemsize
        if self.memory.numel() < nbytes:
            self.memory = aligned(torch.empty(nbytes, dtype=torch.uint8))
        return self.memory[:nbytes].view(dtype).view(rows, columns)


_TILE = _Tile()


@cache
def _kernel(target: Target, kind: Kind, dtype: str) -> Callable[..., None]:
    return function(dense_ir(kind, dtype), target, pointers=4, numbers=3)
