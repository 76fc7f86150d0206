"""The self-test of the Triton kernels on the GPU at hand, and the choice that follows from it.

Codes that are read as float16 subnormals cost one logical operation for two weights. Tensor cores keep subnormal
inputs (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330, 2021); whether
this one does is tried before it is relied on. The safe form adds 1024 to the codes and takes it out by algebra.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from quantkit.errors import KernelError, message
from quantkit.kernels import triton_launch
from quantkit.kernels.planes import num_planes, pack_scale, pack_words, pack_zeros
from quantkit.kernels.tiles import choose_tile, num_counters

_FORMS = {
    torch.float16: (triton_launch.SUBNORMAL, triton_launch.MAGIC_FLOAT16),
    torch.bfloat16: (triton_launch.MAGIC_BFLOAT16,),
}
_TOKENS = (1, 16, 20)  # one for each kernel that choose_tile chooses
_TOLERANCE = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}  # of the largest result; a wrong code is 100 times that


def magic_for(
    device: torch.device, dtype: torch.dtype, bits: int, group: int, in_features: int, symmetric: bool
) -> int:
    """How the kernels for such a layer make numbers of codes; the first answer on a GPU waits for a self-test.

    Args:
        device: a GPU, or the CPU where the interpreter runs the kernels, which is not tested.
        dtype: of x.
        bits, group, in_features, symmetric: the layer; see :mod:`quantkit.kernels.tiles`.

    Raises:
        KernelError: no form gives right products on this GPU.
    """
    if device.type != "cuda":
        return _FORMS[dtype][0]
    index = torch.cuda.current_device() if device.index is None else device.index
    # Layers that share kernels share the test: what counts of the columns is the width of a trip.
    columns = 256 if choose_tile(1, in_features, bits, group).columns == 128 else 192
    return _tested(torch.device("cuda", index), dtype, bits, min(group, 128), columns, symmetric)


@cache
def _tested(device: torch.device, dtype: torch.dtype, bits: int, group: int, columns: int, symmetric: bool) -> int:
    """The first form whose products are right, with a warning when it is not the fastest."""
    for form in _FORMS[dtype]:
        wrong = [
            tokens for tokens in _TOKENS if not _is_right(device, dtype, bits, group, columns, symmetric, tokens, form)
        ]
        if not wrong:
            if form != _FORMS[dtype][0]:
                what = "the tensor cores lose float16 subnormals"
                warnings.warn(message(str(device), what, "a slower form of the kernels is used"), stacklevel=2)
            return form
    what = f"Triton's products of {bits}-bit weights with {wrong} rows of {dtype} are wrong"
    raise KernelError(message(str(device), what, "choose backend='reference' and report this"))


def _is_right(
    device: torch.device,
    dtype: torch.dtype,
    bits: int,
    group: int,
    columns: int,
    symmetric: bool,
    tokens: int,
    form: int,
) -> bool:
    """Whether one small product is that of float64, computed on the CPU."""
    random = torch.Generator().manual_seed(0)
    rows, groups = 16 * num_planes(bits) + 5, columns // group if group else 1
    codes = torch.randint(1 << bits, (rows, columns), generator=random, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=random).to(dtype)
    zero_point = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zero_point = torch.randint(1 << bits, (rows, groups), generator=random, dtype=torch.uint8)
    x = torch.randn(tokens, columns, generator=random).to(dtype)
    expected = x.double() @ _dense(codes, scale, zero_point).T
    tile = choose_tile(tokens, columns, bits, group)
    words = pack_words(codes, bits).to(device)
    y = triton_launch.matvec(
        x.to(device),
        words,
        pack_scale(scale, bits, 1, groups).to(device),
        None if symmetric else pack_zeros(zero_point, bits, 1, groups).to(device),
        None,
        torch.zeros(num_counters(words.shape[0]), dtype=torch.int32, device=device),
        bits=bits,
        group=group,
        out_features=rows,
        tile=tile,
        splits=2,
        magic=form,
    )
    return bool((y.cpu().double() - expected).abs().max() <= _TOLERANCE[dtype] * expected.abs().max())


def _dense(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """float64 [out, in]."""
    repeats = codes.shape[1] // scale.shape[1]
    wide = [t.double().repeat_interleave(repeats, 1) for t in (scale, zero_point)]
    return wide[0] * (codes.double() - wide[1])
