"""Products of 2 to some hundred rows of x by the processor's matrix instructions (AMX)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from quantkit.kernels.jit import TYPES, multiplies_bfloat16, tables, target_here, weight_in_line, weight_pointers
from quantkit.kernels.jit_amx_ir import MOST_TILES, TILE_COLUMNS, TILE_ROWS, amx_ir, takes
from quantkit.kernels.jit_compile import function
from quantkit.kernels.jit_targets import Target
from quantkit.kernels.jit_text import Kind
from quantkit.kernels.jit_threads import parts, run
from quantkit.kernels.panels import PANEL

_MOST_ROWS = TILE_ROWS * MOST_TILES  # of x in one call


def fits(dtype: torch.dtype, group: int) -> bool:
    """Whether there are kernels for activations of this dtype and groups of so many columns."""
    return target_here().amx and multiplies_bfloat16(dtype) and takes(group)


def product_by_amx(
    x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, out_features: int
) -> Tensor:
    """``x @ Wᵀ``, as :func:`quantkit.kernels.jit.product` has it, where :func:`fits`; at least one row of x."""
    words, scale, zeros = weight_in_line(words, scale, zeros)
    return torch.cat([_product(part, words, scale, zeros, bits)[:, :out_features] for part in x.split(_MOST_ROWS)])


def _product(x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """The product with at most :data:`_MOST_ROWS` rows: bfloat16 [rows, 16 * panels]."""
    (panels, groups), (rows, in_features) = scale.shape[:2], x.shape
    tiles = -(-rows // TILE_ROWS)
    full = x.new_zeros(tiles * TILE_ROWS, in_features)
    full[:rows] = x
    tiled = full.view(tiles, TILE_ROWS, -1, TILE_COLUMNS).permute(2, 0, 1, 3).contiguous()
    sums = full if zeros is None else full.view(len(full), groups, -1).sum(-1, dtype=torch.float32)
    y = x.new_empty(len(full), panels * PANEL)
    kernel = _kernel(target_here(), Kind(bits, in_features // groups, zeros is None, TYPES[scale.dtype]), tiles)
    weight = weight_pointers(words, scale, zeros)
    others = (tiled.data_ptr(), sums.data_ptr(), tables(bits).data_ptr(), y.data_ptr())
    run(kernel, [(*weight, *others, *cut, groups, y.shape[1]) for cut in parts(panels, words.nbytes)])
    return y[:rows]


@cache
def _kernel(target: Target, kind: Kind, tiles: int) -> Callable[..., None]:
    return function(amx_ir(kind, tiles), target, pointers=7, numbers=4)
