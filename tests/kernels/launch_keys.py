"""What the launch of the Triton kernels would compile, without a GPU: a program that test_launch_keys.py starts.

It runs where TRITON_INTERPRET is unset: Triton's own binder makes the key of each launch (types, alignments, constants,
options), and the kernel is not run. Prints JSON: [TOKENS, SPLIT_K, number of keys] and the number of launches.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from quantkit.kernels import triton_launch
from quantkit.kernels.planes import COLUMNS, ROWS, num_atoms, num_planes, num_units
from quantkit.kernels.tiles import MOST_TOKENS, SMS, choose_splits, choose_tile, num_counters
from quantkit.kernels.triton_matvec import matvec_kernel

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (32000, 4096), (2048, 2048), (8192, 2048))
GROUP, BITS = 128, 4


class Recorder:
    """Stands in for a kernel."""

    def __init__(self, kernel: JITFunction) -> None:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.keys: dict[tuple[int, bool], set[str]] = defaultdict(set)
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *arguments: object, **constants: Any) -> None:
        _, specialization, options = self.bind(*arguments, **constants)
        self.keys[constants["TOKENS"], constants["SPLIT_K"]].add(f"{specialization} {sorted(options.items())}")
        self.launches += 1


def launch(shape: tuple[int, int], x: torch.Tensor) -> None:
    rows, columns = shape
    tile = choose_tile(len(x), columns, BITS, GROUP)
    units, atoms = num_units(rows, BITS), num_atoms(columns)
    scale = torch.empty(atoms * COLUMNS // GROUP, units * ROWS, num_planes(BITS), dtype=x.dtype)
    triton_launch.matvec(
        x,
        torch.empty(units, atoms, ROWS, COLUMNS, dtype=torch.int16),
        scale,
        None,
        None,
        torch.empty(num_counters(units), dtype=torch.int32),
        bits=BITS,
        group=GROUP,
        out_features=rows,
        tile=tile,
        splits=choose_splits(tile, len(x), rows, columns, BITS, SMS[90]),
        magic=triton_launch.SUBNORMAL,
    )


def main() -> int:
    recorder = Recorder(matvec_kernel)
    triton_launch.matvec_kernel = recorder  # type: ignore[attr-defined]
    for shape in SHAPES:
        for tokens in range(1, MOST_TOKENS + 1):
            launch(shape, torch.empty(tokens, shape[1], dtype=torch.float16))
        # One row of a matrix whose rows lie an odd number apart: contiguous to torch, and its stride is odd.
        launch(shape, torch.empty(3, shape[1] + 8 + 1, dtype=torch.float16)[:1, : shape[1]])
    found = [[tokens, split, len(keys)] for (tokens, split), keys in sorted(recorder.keys.items())]
    sys.stdout.write(json.dumps({"keys": found, "launches": recorder.launches}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
