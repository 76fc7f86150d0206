"""A layer to solve: weights and a Hessian like a language model's, drawn from a seed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENS = 4096


def write_problem(path: Path, out_features: int, in_features: int, seed: int = 0) -> None:
    """Write ``weight`` float32 [out, in] and ``hessian`` float32 [in, in], 2/n XXᵀ over TOKENS inputs.

    The inputs are correlated and of uneven size, as activations are: a quarter as many directions as channels carry
    most of them, a few channels are ten times larger than the others. Where there are more channels than tokens, the
    Hessian is singular until it is damped.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    directions = max(in_features // 4, 1)
    rows = normal(TOKENS, directions) @ normal(directions, in_features) / directions**0.5
    rows += 0.3 * normal(TOKENS, in_features)
    size = torch.exp(0.5 * normal(in_features))
    size[torch.randperm(in_features, generator=generator)[: max(in_features // 128, 1)]] *= 10
    rows *= size
    weight = normal(out_features, in_features) * 0.02 * torch.exp(0.3 * normal(out_features, 1))
    hessian = torch.zeros(in_features, in_features).addmm_(rows.T, rows, alpha=2 / TOKENS)
    save_file({"weight": weight, "hessian": (hessian + hessian.T) / 2}, path)
