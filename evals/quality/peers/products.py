"""Linear layers of bfloat16 on a CPU without instructions for it: multiplied in float32 and rounded once.

torch's own loops for that are ten to thirty times slower there, and a peer's run would take hours. What is summed is
the same, in float32 as well; only the order differs. quantkit does so by itself; here each peer gets it too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def multiply_in_float32_where_needed() -> None:
    """Replace ``torch.nn.functional.linear`` in this process where the CPU has no products of bfloat16."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    print("linear layers in float32, each result rounded once to bfloat16: this CPU has no products of bfloat16")
    narrow = functional.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
            return narrow(input, weight, bias)
        wide = narrow(input.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(torch.bfloat16)

    functional.linear = linear
