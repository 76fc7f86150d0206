"""The golden layer of FORMATS.md and its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

WORDS: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "words.json").read_text())


def golden(bits: int) -> QuantizedTensor:
    """K=64, N=32, groups of 32: code[k, n] = (3k + 5n) mod 2^bits, zero[g, n] = (7g + n) mod 2^bits."""
    k, n, g = torch.arange(64), torch.arange(32), torch.arange(2)
    codes = (3 * k[None, :] + 5 * n[:, None]) % 2**bits
    zeros = (7 * g[None, :] + n[:, None]) % 2**bits
    scheme = QuantScheme(bits, 32, symmetric=False)
    return QuantizedTensor(codes.to(torch.uint8), torch.ones(32, 2), zeros.to(torch.uint8), scheme)


def hexadecimal(words: Tensor) -> list[str]:
    """As FORMATS.md prints words."""
    return [f"{int(word) & 0xFFFFFFFF:08x}" for word in words]
