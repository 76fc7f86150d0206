"""What the studies of speed share: contestants take turns, and what counts is the middle of many rounds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Quartiles = list[float]
"""Lower quartile, median, upper quartile."""

_READ_BYTES = 2**28


def in_turn(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Quartiles]:
    """Name -> quartiles of the seconds that a contestant says it took; in every round all run, in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(contestants[name]())
    return {name: statistics.quantiles(times, n=4, method="inclusive") for name, times in seconds.items()}


def cpu_time(products: Sequence[Callable[[Tensor], object]], x: Tensor) -> float:
    """Process CPU seconds of one product, from running each once."""
    with torch.inference_mode():
        started = time.process_time()
        for product in products:
            product(x)
        return (time.process_time() - started) / len(products)


class PlainRead:
    """A read of memory and nothing else: torch's sum of 256 MB of float32."""

    nbytes = _READ_BYTES

    def __init__(self) -> None:
        self._buffer = torch.ones(_READ_BYTES // 4)

    def __call__(self) -> float:
        """CPU seconds of one read."""
        started = time.process_time()
        self._buffer.sum()
        return time.process_time() - started


def copies(nbytes: float, pool: float) -> int:
    """So many of a layer fill a pool that is larger than the caches."""
    return max(2, int(-(-pool // nbytes)))


def random_linear(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> nn.Linear:
    """A layer without a bias, whose outputs are about as large as its inputs; the same for the same size."""
    generator = torch.Generator().manual_seed(rows + columns)
    linear = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device).requires_grad_(False)
    linear.weight.copy_(torch.randn(rows, columns, generator=generator) / columns**0.5)
    return linear


def twin(linear: nn.Linear, dtype: torch.dtype | None = None) -> nn.Linear:
    """The same layer with a weight of its own."""
    weight = linear.weight
    copy = nn.Linear(
        linear.in_features, linear.out_features, bias=False, dtype=dtype or weight.dtype, device=weight.device
    )
    copy.requires_grad_(False).weight.copy_(weight)
    return copy


def relative_error(y: Tensor, exact: Tensor) -> float:
    """Of all elements together."""
    return float((y.double() - exact.double()).norm() / exact.double().norm())


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors, and of those that tensor subclasses hold (torchao's)."""
    total = 0
    for tensor in tensors:
        inner = getattr(tensor, "__tensor_flatten__", None)
        if inner is None:
            total += tensor.numel() * tensor.element_size()
        else:
            total += stored_bytes(getattr(tensor, name) for name in inner()[0])
    return total


def shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
