"""Dense layers that tests quantize: values from a seed, without torch's global one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantkit.kernels import JitBackend, LinearSpec
from quantkit.scheme import parse_scheme

BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(in_features: int, out_features: int, *, bias: bool = True, dtype: torch.dtype = BF16) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    linear.load_state_dict({name: normal(*p.shape) / 8 for name, p in linear.state_dict().items()})
    return linear


class Conv1D(nn.Module):
    """As in transformers.pytorch_utils: the weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(normal(nx, nf))
        self.bias = nn.Parameter(normal(nf, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def fastest_cpu(scheme: str = "w4a16_g64", dtype: torch.dtype = BF16) -> str:
    """The backend that runs layers with weights of this scheme here: it depends on the CPU."""
    refused = JitBackend().why_not(LinearSpec(128, 64, parse_scheme(scheme), dtype, "cpu"))
    return ("cpu" if dtype == BF16 else "reference") if refused else "cpu_jit"
