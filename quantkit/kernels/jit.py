"""Products by the just-in-time kernels, which are compiled when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache

import torch
from torch import Tensor

from quantkit.heap import HUGE_PAGE, ask_for_huge_pages
from quantkit.kernels.jit_bytes_ir import ACTIVATIONS, MOST_COLUMNS, bytes_ir, scratch_of_bytes
from quantkit.kernels.jit_compile import addresses, function
from quantkit.kernels.jit_ir import matvec_ir
from quantkit.kernels.jit_targets import Target, chosen_target
from quantkit.kernels.jit_text import NAME, Kind, center
from quantkit.kernels.jit_threads import parts, run
from quantkit.kernels.jit_tile_ir import NUMBERS, POINTERS, scratch_numbers, tile_ir
from quantkit.kernels.panels import PANEL

TYPES = {torch.bfloat16: "bfloat", torch.float16: "half", torch.float32: "float"}
"""LLVM's names of dtypes."""

MOST_TOKENS = 16  # rows of x in one call of the kernel that multiplies bfloat16
_MOST_TILES = 16  # in one call of the other: the x of more would not stay in the cache
_ALIGNMENT = 64


def aligned(tensor: Tensor) -> Tensor:
    """A copy that starts at a multiple of 64 bytes, as the kernels' loads require; a large one lies in huge pages."""
    size = tensor.numel() * tensor.element_size()
    alignment = HUGE_PAGE if size >= HUGE_PAGE else _ALIGNMENT
    raw = torch.empty(size + alignment, dtype=torch.uint8)
    start = -raw.data_ptr() % alignment
    place = raw[start : start + size]
    ask_for_huge_pages(place)
    return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def weight_in_line(words: Tensor, scale: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As they are, or copies where somebody (torch.compile, a copy of a module) moved them to another address."""
    return _in_line(words), _in_line(scale), None if zeros is None else _in_line(zeros)


def _in_line(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else aligned(tensor)


def weight_pointers(words: Tensor, scale: Tensor, zeros: Tensor | None) -> tuple[int, int, int]:
    """What kernels take first: addresses, 0 where there are no zero points."""
    return words.data_ptr(), scale.data_ptr(), 0 if zeros is None else zeros.data_ptr()


def multiplies_bfloat16(dtype: torch.dtype) -> bool:
    """Whether activations of this dtype are multiplied as they are, in pairs, and not in float32."""
    return target_here().bfloat16 and dtype == torch.bfloat16


def multiplies_bytes(rows: int, dtype: torch.dtype, bits: int, group: int) -> bool:
    """Whether so many rows of this dtype are multiplied in bytes by such codes, with groups of so many columns."""
    dots = target_here().dots
    if dots is None or rows > dots.tokens or bits > dots.bits:
        return False
    return TYPES[dtype] in ACTIVATIONS and group <= MOST_COLUMNS


def product(x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, out_features: int) -> Tensor:
    """``x @ Wᵀ`` for a weight in panels.

    Args:
        x: bfloat16, float16 or float32 [tokens, in], contiguous.
        words: int16 [panels, units, 16, 2], aligned, see :mod:`quantkit.kernels.panels`.
        scale: bfloat16, float16 or float32 [panels, groups, 16], aligned.
        zeros: uint8 [panels, groups, 16], aligned; None: symmetric.
        bits: of a code.
        out_features: rows of the weight.

    Returns:
        x's dtype [tokens, out].
    """
    words, scale, zeros = weight_in_line(words, scale, zeros)
    y = torch.empty(x.shape[0], scale.shape[0] * PANEL, dtype=x.dtype)
    if y.numel():
        _fill_of(x, bits, scale.shape[1])(x, words, scale, zeros, bits, y)
    return y if y.shape[1] == out_features else y[:, :out_features].contiguous()


def tiles_of(tokens: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Rows of x as tiles of at most ``most``, as equal as can be: first row, rows of a tile, number of such tiles."""
    for start in range(0, tokens, most * _MOST_TILES):
        rows = min(tokens - start, most * _MOST_TILES)
        tiles = -(-rows // most)
        size, larger = divmod(rows, tiles)
        if larger:
            yield start, size + 1, larger
        yield start + larger * (size + 1), size, tiles - larger


def tile_kernel(
    target: Target, bits: int, group: int, symmetric: bool, scale: torch.dtype, dtype: torch.dtype, tokens: int
) -> Callable[..., None]:
    """The compiled function of :func:`quantkit.kernels.jit_tile_ir.tile_ir`.

    Args:
        target: one that this CPU has.
        bits, group, symmetric: the weight, ``group`` the columns that share a scale.
        scale: dtype of the scales.
        dtype: of x and y.
        tokens: rows of x in a tile.
    """
    return _tile_kernel(target, Kind(bits, group, symmetric, TYPES[scale]), TYPES[dtype], tokens)


def kernel_of_one_row(
    bits: int, in_features: int, groups: int, symmetric: bool, scale: torch.dtype, dtype: torch.dtype
) -> tuple[int, int]:
    """What :func:`product` calls for one row of x, where that is not the kernel for pairs of bfloat16.

    Args:
        bits, in_features, groups, symmetric: the weight.
        scale: dtype of the scales.
        dtype: of x and y.

    Returns:
        The kernel's address (its arguments are those of :func:`quantkit.kernels.jit_tile_ir.tile_ir`) and the float32
        numbers of its scratch.
    """
    kind = Kind(bits, in_features // groups, symmetric, TYPES[scale])
    if multiplies_bytes(1, dtype, bits, kind.group):
        return _address_of_bytes(target_here(), kind, TYPES[dtype]), scratch_of_bytes(1, in_features, groups)
    return _address_of_tile(target_here(), kind, TYPES[dtype]), scratch_numbers(1, in_features, groups, bits)


_Fill = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, Tensor], None]


def _fill_of(x: Tensor, bits: int, groups: int) -> _Fill:
    """How the product with x is written."""
    if multiplies_bytes(x.shape[0], x.dtype, bits, x.shape[1] // groups):
        return _fill_by_bytes
    return _fill_by_pairs if multiplies_bfloat16(x.dtype) else _fill_by_tiles


def _fill_by_bytes(x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, y: Tensor) -> None:
    """The product by the kernel that multiplies bytes."""
    groups, (tokens, in_features) = scale.shape[1], x.shape
    kind = Kind(bits, in_features // groups, zeros is None, TYPES[scale.dtype])
    kernel = _bytes_kernel(target_here(), kind, TYPES[x.dtype], tokens)
    _run_tiles(kernel, scratch_of_bytes(tokens, in_features, groups), 1, x, words, scale, zeros, y)


def _fill_by_tiles(x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, y: Tensor) -> None:
    """The product by the kernel that multiplies float32."""
    groups, in_features, target = scale.shape[1], x.shape[1], target_here()
    for start, tokens, tiles in tiles_of(x.shape[0], target.tile):
        kernel = tile_kernel(target, bits, in_features // groups, zeros is None, scale.dtype, x.dtype, tokens)
        size = scratch_numbers(tokens * tiles, in_features, groups, bits)
        _run_tiles(kernel, size, tiles, x[start], words, scale, zeros, y[start:])


def _run_tiles(
    kernel: Callable[..., None],
    size: int,
    tiles: int,
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    y: Tensor,
) -> None:
    """A kernel's calls for all panels; each has a scratch of its own, of so many float32 numbers."""
    (panels, groups), cuts = scale.shape[:2], parts(scale.shape[0], words.nbytes)
    scratch = torch.empty(len(cuts), size, dtype=torch.float32)
    weight, source, to = weight_pointers(words, scale, zeros), x.data_ptr(), y.data_ptr()
    own = scratch.data_ptr()
    calls = [
        (*weight, source, own + 4 * size * i, to, tiles, *cut, groups, panels * PANEL) for i, cut in enumerate(cuts)
    ]
    run(kernel, calls)


def _fill_by_pairs(x: Tensor, words: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, y: Tensor) -> None:
    """The product by the kernel that multiplies bfloat16."""
    panels, groups = scale.shape[:2]
    tokens, in_features = x.shape
    sums = x if zeros is None else x.view(tokens, groups, in_features // groups).sum(-1, dtype=torch.float32)
    weight = weight_pointers(words, scale, zeros)
    for start in range(0, tokens, MOST_TOKENS):
        kernel = _pairs_kernel(
            bits, in_features // groups, min(tokens - start, MOST_TOKENS), zeros is None, scale.dtype
        )
        rows = (x[start].data_ptr(), sums[start].data_ptr(), tables(bits).data_ptr(), y[start].data_ptr())
        run(kernel, [(*weight, *rows, *cut, groups, y.shape[1]) for cut in parts(panels, words.nbytes)])


def target_here() -> Target:
    """What the kernels of this process are compiled for."""
    target = chosen_target()
    assert target is not None  # or why_not would have refused the layer
    return target


@lru_cache
def tables(bits: int) -> Tensor:
    """bfloat16 [2, 32], aligned: what a code's low (or only) nibble stands for, and its high one, each twice.

    For the kernels that multiply bfloat16.
    """
    nibble = torch.arange(32) % 16
    low = nibble - center(bits) if bits <= 4 else nibble
    high = 16 * nibble - center(bits)
    return aligned(torch.stack([low, high]).to(torch.bfloat16))


@cache
def _tile_kernel(target: Target, kind: Kind, dtype: str, tokens: int) -> Callable[..., None]:
    return function(tile_ir(kind, dtype, tokens, target.chains), target, len(POINTERS), len(NUMBERS))


def _bytes_source(target: Target, kind: Kind, dtype: str, tokens: int) -> str:
    assert target.dots is not None  # see multiplies_bytes
    return bytes_ir(kind, dtype, tokens, target.dots)


@cache
def _bytes_kernel(target: Target, kind: Kind, dtype: str, tokens: int) -> Callable[..., None]:
    return function(_bytes_source(target, kind, dtype, tokens), target, len(POINTERS), len(NUMBERS))


@cache
def _address_of_bytes(target: Target, kind: Kind, dtype: str) -> int:
    return addresses(_bytes_source(target, kind, dtype, 1), target, [NAME])[0]


@cache
def _address_of_tile(target: Target, kind: Kind, dtype: str) -> int:
    return addresses(tile_ir(kind, dtype, 1, target.chains), target, [NAME])[0]


@cache
def _pairs_kernel(bits: int, group: int, tokens: int, symmetric: bool, scale: torch.dtype) -> Callable[..., None]:
    source = matvec_ir(Kind(bits, group, symmetric, TYPES[scale]), tokens)
    return function(source, target_here(), pointers=7, numbers=4)
