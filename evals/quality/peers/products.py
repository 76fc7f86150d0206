"""Layers of bfloat16 on a CPU that is faster in float32: multiplied in it, and rounded once.

What is summed is the same, in float32 as well; only the order differs. quantkit does so by itself
(quantkit/precision.py says where and why); here each peer gets it too, or its run would take hours on some CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def multiply_in_float32_where_faster() -> None:
    """Replace torch's linear layer and attention (where gradients are recorded) in this process on such a CPU."""
    if _bfloat16_is_faster():
        return
    print("linear layers in float32, each result rounded once to bfloat16: faster than bfloat16 on this CPU")
    narrow, attention = functional.linear, functional.scaled_dot_product_attention

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not _is_concerned(weight):
            return narrow(input, weight, bias)
        wide = narrow(input.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(torch.bfloat16)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any
    ) -> Tensor:
        if not (_is_concerned(query) and torch.is_grad_enabled()):
            return attention(query, key, value, attn_mask, *rest, **named)
        mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        return attention(query.float(), key.float(), value.float(), mask, *rest, **named).to(torch.bfloat16)

    functional.linear = linear
    functional.scaled_dot_product_attention = attend


def _is_concerned(factor: object) -> bool:
    return isinstance(factor, Tensor) and factor.dtype == torch.bfloat16 and factor.device.type == "cpu"


def _bfloat16_is_faster() -> bool:
    """As quantkit.precision.bfloat16_is_faster; a test holds them together."""
    found = torch.cpu.get_capabilities()
    if found.get("architecture") != "x86_64":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    of_intel = str(found.get("cpu_name", "")).startswith("Intel")
    return bool(found.get("amx_bf16") or (found.get("avx512_bf16") and not of_intel))
