"""torch's operator ``quantkit::panels_step``: a product with one row of x, without Python between torch and the kernel.

What it takes of a layer is one small tensor of addresses, so that code of torch.compile's, in C++, calls it in about a
microsecond. Such a tensor means nothing in another process: it is in no state_dict, and torch.export gets the other
operator (:mod:`quantkit.kernels.jit_op`).
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor

from quantkit.kernels.jit import kernel_of_one_row, multiplies_bfloat16, tables
from quantkit.kernels.jit_step_ir import CALL, OPERATOR, PARTS, step_ir
from quantkit.kernels.jit_threads import THREAD_BYTES
from quantkit.kernels.jit_tile_ir import scratch_numbers
from quantkit.kernels.native_ir import SYMBOLS
from quantkit.kernels.native_op import define, torch_has
from quantkit.kernels.panels import PANEL, unit_columns

_MOST_COLUMNS = 1 << 16  # whose activations lie on a thread's stack: 256 kB


def layer_call(words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor | None:
    """What :func:`step` is given of a layer, int64 [11]; None where torch or the layer is not made for it.

    Args:
        words, scale, zeros: as for :func:`quantkit.kernels.jit.product`; they must live, and stay where they are, for
            as long as the result is used.
        bits: of a code.
        dtype: of the activations.
    """
    (panels, groups), in_features = scale.shape[:2], words.shape[1] * unit_columns(bits)
    if in_features > _MOST_COLUMNS or not torch_has(SYMBOLS):
        return None
    parts = _operator_parts()
    pairs = multiplies_bfloat16(dtype)
    fields = {
        "part": parts["pairs" if pairs else "tiles"],
        "kernel": kernel_of_one_row(bits, in_features // groups, zeros is None, scale.dtype, dtype),
        "words": words.data_ptr(),
        "scales": scale.data_ptr(),
        "zeros": 0 if zeros is None else zeros.data_ptr(),
        "tables": tables(bits).data_ptr() if pairs else 0,
        "panels": panels,
        "groups": groups,
        "rows": panels * PANEL,
        "scratch": scratch_numbers(1, in_features, groups, bits),
        "grain": max(1, panels * THREAD_BYTES // max(1, words.nbytes)),
    }
    return torch.tensor([fields[name] for name in CALL], dtype=torch.int64)


def step(x: Tensor, scale: Tensor, zeros: Tensor | None, call: Tensor) -> Tensor:
    """``x @ Wᵀ`` for one row of x.

    Args:
        x: [1, in], the last dimension contiguous, in the dtype of ``call``.
        scale: [panels, groups, 16].
        zeros: None where symmetric.
        call: of :func:`layer_call`, for this very layer.

    Returns:
        x's dtype [1, 16 * panels].
    """
    sums = x
    if zeros is not None and multiplies_bfloat16(x.dtype):
        sums = x.view(scale.shape[1], -1).sum(-1, dtype=torch.float32)
    return cast(Tensor, torch.ops.quantkit.panels_step(x, sums, call, scale.shape[0] * PANEL))


@cache
def _operator_parts() -> dict[str, int]:
    """Compiles the operator and gives it to torch, once in a process; the addresses of its parts."""
    schema = "panels_step(Tensor x, Tensor sums, Tensor call, int rows) -> Tensor"
    _, *parts = define(schema, step_ir(), (OPERATOR, *PARTS.values()), SYMBOLS, _shape)
    return dict(zip(PARTS, parts, strict=True))


def _shape(x: Tensor, sums: Tensor, call: Tensor, rows: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(1, rows)
