"""A CUDA device that is not there: what code for a GPU calls of torch, on the CPU, with Triton's interpreter below."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from quantkit.kernels import TritonBackend


class OnTheCpu(TorchFunctionMode):
    """Every ``"cuda"`` that torch is given is ``"cpu"``."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_cpu, args), **given)


def _cpu(value: object) -> object:
    return "cpu" if value == "cuda" and isinstance(value, str) else value


class Graph:
    """Captures nothing and replays nothing."""

    def replay(self) -> None:
        time.sleep(1e-6)


class Event:
    """The clock of the process."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at > 0

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, torch has such a device and quantkit's Triton backend takes layers of the CPU."""
    properties = SimpleNamespace(L2_cache_size=1 << 10, multi_processor_count=8)
    stand_ins = {
        "is_available": lambda: True,
        "get_device_name": lambda *_: "Pretended",
        "get_device_properties": lambda _: properties,
        "synchronize": lambda: None,
        "CUDAGraph": Graph,
        "graph": lambda _: nullcontext(),
        "Event": Event,
    }
    with pytest.MonkeyPatch.context() as patch, OnTheCpu():
        for name, value in stand_ins.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(TritonBackend, "why_not", TritonBackend._why_not_layer)
        yield
