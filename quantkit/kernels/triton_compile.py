"""Machine code of the Triton kernels without a GPU: compiled ahead of time, disassembled by triton's own tools."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantkit.errors import KernelError, message
from quantkit.kernels.shipped import Variant
from quantkit.kernels.triton_launch import MAGIC_BFLOAT16, MAGIC_FLOAT16, SUBNORMAL, variant
from quantkit.kernels.triton_matvec import matvec_kernel

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_NAMES = {"float16": "fp16", "bfloat16": "bf16"}
_INTEGERS = ("M", "N", "stride_x", "units", "k_atoms", "trips_per_split", "num_trips")
_RESOURCES = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


@dataclass(frozen=True, slots=True)
class Machinecode:
    """One compiled kernel.

    Attributes:
        cubin: the binary.
        disassembly: of nvdisasm.
        registers: of a thread.
        stack: bytes of a thread in local memory: what registers spilled.
        shared: bytes of shared memory of a program.
    """

    cubin: bytes
    disassembly: str
    registers: int
    stack: int
    shared: int


def compile_variant(wanted: Variant) -> Machinecode:
    """Compile one variant, as the launch would on its GPU; triton keeps the result in its cache.

    Raises:
        KernelError: this process runs Triton's interpreter, which compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise KernelError(message("inspect", "TRITON_INTERPRET is set", "unset it: the interpreter compiles nothing"))
    compiled = triton.compile(
        _source(wanted),
        target=GPUTarget("cuda", wanted.cc, 32),
        options={"num_warps": wanted.tile.warps, "maxnreg": wanted.tile.most_registers},
    )
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _source(wanted: Variant) -> ASTSource:
    """The kernel with the types and alignments of the launch: tensors of torch start at multiples of 16 bytes."""
    magic = MAGIC_BFLOAT16 if wanted.dtype == "bfloat16" else MAGIC_FLOAT16 if wanted.safe else SUBNORMAL
    constants = variant(
        wanted.tile,
        bits=wanted.bits,
        grouped=wanted.group_size is not None,
        symmetric=wanted.symmetric,
        bias=False,
        split=wanted.splits > 1,
        magic=magic,
        interpret=False,
    )
    real = f"*{_NAMES[wanted.dtype]}"
    tensors = {"x": real, "words": "*i16", "scale": real, "zeros": "*i32", "bias": real, "y": real}
    types = {**tensors, "partial": "*fp32", "counters": "*i32", **dict.fromkeys(_INTEGERS, "i32")}
    absent = ["bias", *(["zeros"] if wanted.symmetric else [])]
    constants.update(dict.fromkeys(absent))
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = {*types, "stride_x"} - {*_INTEGERS, *absent} | {"stride_x"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    return ASTSource(fn=matvec_kernel, signature=signature, constexprs=constants, attrs=attributes)


def _read(cubin: bytes, shared: int) -> Machinecode:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        disassembly = _run("nvdisasm", "-c", str(path))
        resources = dict(_RESOURCES.findall(_run("cuobjdump", "-res-usage", str(path))))
    return Machinecode(
        cubin, disassembly, int(resources["REG"]), int(resources["STACK"]) + int(resources["LOCAL"]), shared
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
