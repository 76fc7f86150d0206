"""torch's operator ``quantkit::attend_step``: attention of one token, over the part of a static cache that is filled.

torch's own, in a compiled step, copies keys and values for each head that shares them, and goes over the whole cache.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import cast

import torch
from torch import Tensor

from quantkit.kernels.attend_ir import LANES, OPERATOR, SYMBOLS, attend_ir
from quantkit.kernels.jit_targets import chosen_target
from quantkit.kernels.native_op import define, torch_has

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_NUMBERS = 1024  # of a head: they lie on a thread's stack
_SCHEMA = "attend_step(Tensor q, Tensor keys, Tensor values, Tensor mask, float scale) -> Tensor"
_ALLOWED = 1e-5  # of float32 sums; what the result's rounding may add is the dtype's own


def attends_here() -> bool:
    """Whether :func:`attend_step` is there: on a CPU that the just-in-time kernels run on; tested once a process."""
    from importlib.util import find_spec

    if find_spec("llvmlite") is None or chosen_target() is None or not torch_has(SYMBOLS):
        return False
    return _tested()


def why_not_attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> str | None:
    """Why these are not :func:`attend_step`'s; None when they are.

    Args:
        q, keys, values, mask: as there, of any shapes.
    """
    if q.device.type != "cpu" or q.dtype not in _DTYPES or not q.dtype == keys.dtype == values.dtype:
        return "they are not numbers of one floating-point type on a CPU"
    if q.shape[0] != 1 or q.shape[2] != 1 or q.shape[1] % keys.shape[1]:
        return "it is not one token"
    if mask is None or mask.dtype != torch.bool or mask.numel() != keys.shape[2]:
        return "there is no mask that is the same for all heads"
    sizes = (keys.shape[2], keys.shape[3], values.shape[3])
    if any(size % LANES for size in sizes) or max(sizes[1:]) > _MOST_NUMBERS:
        return f"sizes are no multiples of {LANES}, or above {_MOST_NUMBERS}"
    return None


def attend_step(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``softmax(scale * q @ keysᵀ) @ values`` over the positions that the mask leaves, in float32, rounded once.

    Args:
        q: bfloat16, float16 or float32 [1, heads, 1, size].
        keys: [1, kv_heads, length, size]; heads that share keys are neighbours.
        values: [1, kv_heads, length, value_size].
        mask: bool, length elements, at least one of them true.
        scale: of the scores.

    Returns:
        q's dtype [1, 1, heads, value_size].
    """
    given = (q.contiguous(), keys.contiguous(), values.contiguous(), mask.contiguous(), scale)
    return cast(Tensor, torch.ops.quantkit.attend_step(*given))


@cache
def _defined() -> None:
    define(_SCHEMA, attend_ir(), OPERATOR, SYMBOLS, _shape)


def _shape(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:  # noqa: ARG001
    return q.new_empty(1, 1, q.shape[1], values.shape[3])


@cache
def _tested() -> bool:
    """Here, against float64; warns where it is wrong."""
    _defined()
    for dtype in _DTYPES:
        error = _error(dtype)
        if not error <= torch.finfo(dtype).eps + _ALLOWED:
            warnings.warn(
                f"attend_step is wrong by {error:.1e} on this CPU; torch's attention runs instead. Please report it",
                stacklevel=2,
            )
            return False
    return True


def _error(dtype: torch.dtype) -> float:
    """The largest error of a small case, as a share of the largest value."""
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (
        torch.randn(1, heads, length, 32, generator=generator).to(dtype) for heads, length in ((4, 1), (2, 48), (2, 48))
    )
    mask = torch.arange(48) < 37
    found = attend_step(q, keys, values, mask, 0.3)[0, 0].double()
    wide = [tensor.double()[0].repeat_interleave(2, 0)[:, mask] for tensor in (keys, values)]
    exact = ((0.3 * q[0].double() @ wide[0].mT).softmax(-1) @ wide[1])[:, 0]
    return float(((found - exact).abs().max() / values.double().abs().max()).nan_to_num(torch.inf))
