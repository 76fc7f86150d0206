"""A test of the just-in-time kernels where they are going to run, where nobody has run them yet."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from quantkit.grid import dequantize
from quantkit.kernels.jit import aligned, product
from quantkit.kernels.jit_targets import Target, chosen_target
from quantkit.kernels.panels import PANEL, pack_codes, pack_groups
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

_SUMS = 1e-5  # what float32 sums of 128 products may lose, as a share of the sum of their sizes


def why_not_here(dtype: torch.dtype) -> str | None:
    """Why the kernels for activations of this dtype are not used here; None when they are.

    Warns, once a process, where they are wrong.
    """
    target = chosen_target()
    if target is None or dtype in target.tried:
        return None
    return _tested(target, dtype)


@cache
def _tested(target: Target, dtype: torch.dtype) -> str | None:
    for bits in (4, 8):
        for symmetric in (True, False):
            error = _error(QuantScheme(bits, 64, symmetric=symmetric), dtype, target.tile + 1)
            if not error <= torch.finfo(dtype).eps + _SUMS:
                why = (
                    f"this CPU, where its kernels for {target.name} failed their test: W{bits} is wrong by {error:.1e}"
                )
                warnings.warn(f"cpu_jit refuses {why}; torch's operators run instead. Please report it", stacklevel=2)
                return why
    return None


def _error(scheme: QuantScheme, dtype: torch.dtype, tokens: int) -> float:
    """The largest error of a product's elements, as a share of the sum of the sizes of what was summed."""
    generator = torch.Generator().manual_seed(scheme.bits)
    rows, columns = 2 * PANEL, 128
    codes = torch.randint(scheme.levels, (rows, columns), generator=generator).to(torch.uint8)
    zeros = torch.full((rows, 2), scheme.mid, dtype=torch.uint8)
    if not scheme.symmetric:
        zeros = torch.randint(scheme.levels, (rows, 2), generator=generator).to(torch.uint8)
    q = QuantizedTensor(codes, torch.rand(rows, 2, generator=generator) + 0.5, zeros, scheme)
    x = (torch.randn(tokens, columns, generator=generator) + 0.3).to(dtype)
    packed = aligned(pack_codes(codes, scheme.bits)), aligned(pack_groups(q.scale))
    y = product(x, *packed, None if scheme.symmetric else aligned(pack_groups(zeros)), scheme.bits, rows)
    weight = dequantize(q, torch.float64)
    wrong = (y.double() - x.double() @ weight.T).abs() / (x.double().abs() @ weight.abs().T)
    return float(wrong.nan_to_num(torch.inf).max())
