"""Measuring tiles on the GPU at hand: what `quantkit tune` does for each product of a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from quantkit.errors import KernelError, message
from quantkit.kernels import triton_check, triton_launch
from quantkit.kernels.base import LinearSpec
from quantkit.kernels.tiles import Tile, choose_splits, choose_tile, kernel_group, trips_of
from quantkit.kernels.tuned import Choice, Product

_TOKENS = (8, 16, 32)
_MEASURED = {8: 1, 16: 16, 32: 32}  # rows of x that a block of tokens is timed with
_ROUNDS = 20
Measure = Callable[[Tile, int], float | None]


def products(spec: LinearSpec) -> tuple[Product, ...]:
    """What there is to tune for one layer: one product for each size of a block of tokens."""
    group = kernel_group(spec.scheme.group_size)
    dtype = str(spec.dtype).removeprefix("torch.")
    every = (
        Product(spec.out_features, spec.in_features, spec.scheme.bits, group, spec.scheme.symmetric, dtype, tokens)
        for tokens in _TOKENS
    )
    return tuple(product for product in every if _tile(product).tokens == product.tokens)


def candidates(product: Product, sms: int) -> tuple[tuple[Tile, int], ...]:
    """The static choice first, then its neighbours: other rows, stages and splits of K."""
    static = _tile(product)
    at = _MEASURED[product.tokens]
    found: list[tuple[Tile, int]] = []
    for rows in (static.rows, 96 - static.rows):
        for stages in (static.stages, *(stages for stages in (2, 3, 4, 6) if stages != static.stages)):
            tile = replace(static, rows=rows, stages=stages)
            splits = choose_splits(tile, at, product.out_features, product.in_features, product.bits, sms)
            trips, _ = trips_of(tile, product.in_features, splits)
            for wanted in (splits, splits // 2, splits * 2):
                if 1 <= wanted <= trips and (tile, wanted) not in found:
                    found.append((tile, wanted))
    return tuple(found)


def best(product: Product, sms: int, measure: Measure) -> Choice:
    """The fastest candidate.

    Args:
        product: see :class:`Product`.
        sms: multiprocessors of the GPU.
        measure: seconds of a candidate, or None where it does not run or its product is wrong.

    Raises:
        KernelError: the static choice itself does not run.
    """
    (static, splits), *others = candidates(product, sms)
    static_seconds = measure(static, splits)
    if static_seconds is None:
        raise KernelError(message(str(product), "the static choice does not run here", "report this"))
    chosen = Choice(product, static, splits, static_seconds, static_seconds)
    for tile, wanted in others:
        seconds = measure(tile, wanted)
        if seconds is not None and seconds < chosen.seconds:
            chosen = Choice(product, tile, wanted, seconds, static_seconds)
    return chosen


def measurer(product: Product, packed: Mapping[str, Tensor]) -> Measure:
    """A measure on the packed weight's own GPU: weights come from memory, because copies of them are taken in turn."""
    words = packed["words"]
    device, dtype = words.device, getattr(torch, product.dtype)
    properties = torch.cuda.get_device_properties(device)
    count = max(2, -(-4 * properties.L2_cache_size // max(words.nbytes, 1)))
    copies = [{name: tensor.clone() for name, tensor in packed.items()} for _ in range(count)]
    tokens = _MEASURED[product.tokens]
    x = torch.randn(tokens, product.in_features, device=device, dtype=dtype)
    magic = triton_check.magic_for(device, dtype, product.bits, product.group, product.in_features, product.symmetric)

    def run(weight: Mapping[str, Tensor], tile: Tile, splits: int) -> Tensor:
        return triton_launch.matvec(
            x, weight["words"], weight["scale"], weight.get("zeros"), None, weight["counters"],
            bits=product.bits, group=product.group, out_features=product.out_features,
            tile=tile, splits=splits, magic=magic,
        )  # fmt: skip

    static, static_splits = candidates(product, properties.multi_processor_count)[0]
    expected = run(copies[0], static, static_splits).float()

    def seconds(tile: Tile, splits: int) -> float | None:
        try:
            y = run(copies[0], tile, splits).float()
        except OutOfResources:
            return None
        if (y - expected).norm() > 0.01 * expected.norm():
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in copies:
                run(weight, tile, splits)
        return statistics.median(_timed(graph) for _ in range(_ROUNDS)) / count

    return seconds


def _timed(graph: torch.cuda.CUDAGraph) -> float:
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1000


def _tile(product: Product) -> Tile:
    return choose_tile(product.tokens, product.in_features, product.bits, product.group)
