"""Which precision a processor multiplies in: float32 by bfloat16 instructions where that is exact, and the reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


@contextmanager
def products_in_bfloat16(factors: Tensor) -> Iterator[None]:
    """Inside, float32 products of matrices whose numbers all come from ``factors`` may use bfloat16 instructions.

    Only where that changes nothing but the order of summation: bfloat16 factors are not rounded again, and the product
    of two is exact in float32, in which they are summed. Where ``factors`` have another dtype or lie elsewhere than on
    the CPU, or where such instructions gain nothing, nothing changes. Measured on one core (AMD Zen 5): the outer
    product of 512 x 1536 takes 6.1 ms in place of 12.5.

    torch's switch is one for the whole process; it stands as before afterwards.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if factors.dtype == torch.bfloat16 and factors.device.type == "cpu" and bfloat16_is_faster():
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


PRODUCTS_IN_FLOAT32 = "linear layers in float32, each result rounded once to bfloat16: faster than bfloat16 on this CPU"
"""What :func:`products_note` says."""


def forward_products(*devices: torch.device) -> AbstractContextManager[object]:
    """Inside, what a bfloat16 model multiplies is multiplied in float32 on a CPU where that is faster.

    Args:
        devices: that models run on inside; nothing changes where none is a CPU.

    512 x 576 by 1536 on one core, in bfloat16 as torch does it and in float32 with the conversions: 68 and 5.5 ms with
    AVX2, where torch has loops of its own; 28 and 9 with AVX-512 alone, where oneDNN widens; 9.0 and 5.2 with Intel's
    AVX512_BF16 without AMX (a Xeon, the first two by ``ONEDNN_MAX_CPU_ISA``). With both gradients 950 and 47 ms on
    AMD's Zen 3. All sum in float32 and round once, so that only the order of summation differs. A weight is in float32
    only while it is multiplied. Where gradients are recorded, attention is in float32 too: its gradients in bfloat16
    took 200 ms on the Zen 3 (9 heads of 64, 512 tokens), and 37.

    Nothing changes where bfloat16 is faster. Every function of torch that is called inside passes through Python: enter
    it around forward passes alone.
    """
    on_cpu = any(device.type == "cpu" for device in devices)
    return _ProductsInFloat32() if on_cpu and not bfloat16_is_faster() else nullcontext()


def products_note(dtype: torch.dtype, device: torch.device) -> str | None:
    """What :func:`forward_products` does to a model of this dtype there, for users; None: nothing."""
    return PRODUCTS_IN_FLOAT32 if float32_is_faster(dtype, device) else None


def float32_is_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices of this dtype, there, are bfloat16 that is multiplied faster in float32."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not bfloat16_is_faster()


def linear_in_float32(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, summed in float32 and rounded once to the weight's dtype; see :class:`_Linear` for gradients."""
    return linear(input.float(), weight.float(), None if bias is None else bias.float()).to(weight.dtype)


@cache
def bfloat16_is_faster() -> bool:
    """Whether matrices are multiplied faster in bfloat16 than in float32 on this CPU, by what it is, not by a clock.

    A clock would choose otherwise on a busy machine, and a resumed run would sum in another order. On x86 AMX is what
    makes bfloat16 faster, and AMD's AVX512_BF16, twice as fast as its float32; Intel's without AMX is not.
    """
    found = torch.cpu.get_capabilities()
    if found.get("architecture") != "x86_64":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    of_intel = str(found.get("cpu_name", "")).startswith("Intel")
    return bool(found.get("amx_bf16") or (found.get("avx512_bf16") and not of_intel))


class _ProductsInFloat32(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called for every function of torch."""
        named = kwargs or {}
        if func is linear:
            return _linear(*args, **named)
        if func is scaled_dot_product_attention:
            return _attention(*args, **named)
        return func(*args, **named)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_concerned(weight):
        return linear(input, weight, bias)
    found: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return found


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any
) -> Any:
    if not (_is_concerned(query) and torch.is_grad_enabled()):
        return scaled_dot_product_attention(query, key, value, attn_mask, *rest, **named)
    mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    found = scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, *rest, **named)
    return found.to(query.dtype)


def _is_concerned(factor: Tensor) -> bool:
    return factor.dtype == torch.bfloat16 and factor.device.type == "cpu"


class _Linear(torch.autograd.Function):
    """A linear layer and its gradients, summed in float32 and rounded once; its arguments are kept as they are."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return linear_in_float32(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        upstream = gradients[0].float()
        rows = upstream.reshape(-1, weight.shape[0])
        wanted_input, wanted_weight, wanted_bias = ctx.needs_input_grad
        return (
            (upstream @ weight.float()).to(input.dtype) if wanted_input else None,
            (rows.T @ input.float().reshape(-1, weight.shape[1])).to(weight.dtype) if wanted_weight else None,
            rows.sum(0).to(weight.dtype) if wanted_bias else None,
        )
