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

from quantkit.kernels.jit import kernel_of_one_row
from quantkit.kernels.jit_step_ir import CALL, OPERATOR, step_ir
from quantkit.kernels.jit_threads import THREAD_BYTES
from quantkit.kernels.native_ir import SYMBOLS
from quantkit.kernels.native_op import define, torch_has
from quantkit.kernels.panels import PANEL, unit_columns

_MOST_COLUMNS = 1 << 16  # whose activations lie on a thread's stack: 256 kB


def layer_call(words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor | None:
    """What :func:`step` is given of a layer, int64 [9]; None where torch or the layer is not made for it.

    Args:
        words, scale, zeros: as for :func:`quantkit.kernels.jit.product`; they must live, and stay where they are, for
            as long as the result is used.
        bits: of a code.
        dtype: of the activations.
    """
    (panels, groups), in_features = scale.shape[:2], words.shape[1] * unit_columns(bits)
    if in_features > _MOST_COLUMNS or not torch_has(SYMBOLS):
        return None
    _defined()
    kernel, scratch = kernel_of_one_row(bits, in_features, groups, zeros is None, scale.dtype, dtype)
    fields = {
        "kernel": kernel,
        "words": words.data_ptr(),
        "scales": scale.data_ptr(),
        "zeros": 0 if zeros is None else zeros.data_ptr(),
        "panels": panels,
        "groups": groups,
        "rows": panels * PANEL,
        "scratch": scratch,
        "grain": max(1, panels * THREAD_BYTES // max(1, words.nbytes)),
    }
    return torch.tensor([fields[name] for name in CALL], dtype=torch.int64)


def step(x: Tensor, panels: int, call: Tensor) -> Tensor:
    """``x @ Wᵀ`` for one row of x.

    Args:
        x: [1, in], the last dimension contiguous, in the dtype of ``call``.
        panels: of the weight.
        call: of :func:`layer_call`, for this very layer.

    Returns:
        x's dtype [1, 16 * panels].
    """
    return cast(Tensor, torch.ops.quantkit.panels_step(x, call, panels * PANEL))


@cache
def _defined() -> None:
    """Compiles the operator and gives it to torch, once in a process."""
    define("panels_step(Tensor x, Tensor call, int rows) -> Tensor", step_ir(), OPERATOR, SYMBOLS, _shape)


def _shape(x: Tensor, call: Tensor, rows: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(1, rows)
