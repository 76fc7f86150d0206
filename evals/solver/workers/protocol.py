"""What a worker of the solver study is asked and answers; how it talks is evals/worker.py.

In:  {"problem": FILE, "bits": 4, "symmetric": true, "group_size": 64, "options": NAME, "output": FILE}
Out: {"cpu_seconds": ..., "wall_seconds": ..., "peak_bytes": ...}

The problem has float32 tensors ``weight`` [out, in] and ``hessian`` [in, in] (2/n XXᵀ); the output gets ``weight``, the
decoded result, float32 [out, in]. Only the solve is timed, with tensors in memory before and after it. Standard library
and torch only: each worker runs in its program's own environment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import worker
from safetensors.torch import load_file, save_file
from torch import Tensor

Solve = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
"""Weight and Hessian, which it may overwrite, and the request; returns the decoded weight."""


def serve(solve: Solve) -> None:
    """Answer requests until the input ends."""

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        tensors = load_file(request["problem"])
        weight, hessian = tensors.pop("weight"), tensors.pop("hessian")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.no_grad():
            found = solve(weight, hessian, request)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = _peak_bytes()
        save_file({"weight": found.float().contiguous()}, request["output"])
        return {"cpu_seconds": cpu, "wall_seconds": wall, "peak_bytes": peak}

    torch.set_num_threads(1)
    worker.serve(answer)


def _peak_bytes() -> int:
    """Most resident bytes since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
