"""What the machine code of the Triton kernels says, without a GPU: ``python -m quantkit.kernels.inspect``.

Compiles the shipped variants ahead of time, disassembles them and counts the main loop: instructions per weight and
pipe, widths of copies, registers, spills, shared memory, bytes in flight, and the time to expect over the time that
reading the weight once takes, with what bounds it. The counting (:mod:`quantkit.kernels.sass`) reads the disassembly
alone; ``--dump`` writes the binaries, so that anyone can count for himself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import InputError, KernelError, QuantkitError, message
from quantkit.kernels.machines import MACHINES, predict
from quantkit.kernels.sass import PIPES, Loop, main_loop
from quantkit.kernels.shipped import Variant, shipped
from quantkit.kernels.tiles import SMS

if TYPE_CHECKING:
    from quantkit.kernels.triton_compile import Machinecode


@dataclass(frozen=True, slots=True)
class Finding:
    """One variant's machine code in numbers.

    Attributes:
        name: of the variant.
        instructions_per_weight: of the main loop, in thread-instructions: its length times threads, over its weights.
        pipes: the same by pipe.
        copies: asynchronous copies to shared memory in the loop: bytes a thread -> instructions.
        exposed_loads: loads into registers from global or local memory in the loop.
        conversions: I2F and I2FP instructions in the loop.
        registers: of a thread.
        spilled: bytes of a thread in local memory.
        shared: bytes of a program.
        in_flight: bytes of words on their way to one SM, for a weight of 4096 x 4096.
        over_floor: predicted time over the time to read codes, scales and zero points once.
        bound: what takes that time.
    """

    name: str
    instructions_per_weight: float
    pipes: dict[str, float]
    copies: dict[int, int]
    exposed_loads: int
    conversions: int
    registers: int
    spilled: int
    shared: int
    in_flight: int
    over_floor: float
    bound: str


def examine(variant: Variant, code: Machinecode) -> Finding:
    """Count one variant's machine code.

    Raises:
        KernelError: no loop in it.
    """
    loop = main_loop(code.disassembly)
    if loop is None:
        raise KernelError(message(variant.name, "its machine code has no loop", "report this"))
    machine = next(machine for machine in MACHINES if machine.cc == variant.cc)
    threads, weights = 32 * variant.tile.warps, variant.weights_per_trip
    programs = variant.grid[0] * variant.grid[1] * variant.grid[2]
    resident = min(machine.resident(code.registers, code.shared, variant.tile.warps), -(-programs // machine.sms))
    in_flight = resident * (variant.tile.stages - 1) * variant.tile.weight_bytes
    prediction = predict(
        machine,
        loop,
        threads=threads,
        weights=weights,
        bytes_per_weight=variant.bytes_per_weight,
        floor_bytes_per_weight=variant.floor_bytes_per_weight,
        in_flight=in_flight,
    )
    return Finding(
        name=variant.name,
        instructions_per_weight=len(loop.body) * threads / weights,
        pipes={pipe: count * threads / weights for pipe, count in loop.pipes().items()},
        copies=dict(loop.copies()),
        exposed_loads=len(loop.exposed_loads()),
        conversions=_conversions(loop),
        registers=code.registers,
        spilled=code.stack,
        shared=code.shared,
        in_flight=in_flight,
        over_floor=prediction.over_floor,
        bound=prediction.bound,
    )


def _conversions(loop: Loop) -> int:
    return len(loop.named("I2F", "I2FP", "I2I"))


def description(variant: Variant) -> dict[str, Any]:
    """What ``--dump`` writes beside a binary."""
    return {
        "kernel": variant.kernel,
        "max_m": variant.max_m,
        "dtype": variant.dtype,
        "symmetric": variant.symmetric,
        "group_size": variant.group_size,
        "cc": variant.cc,
        "num_warps": variant.tile.warps,
        "num_stages": variant.tile.stages,
        "weights_per_trip": variant.weights_per_trip,
        "grid": list(variant.grid),
    }


_COLUMNS = (
    ("variant", 44), ("instr/w", 8), ("alu", 6), ("fma", 6), ("tensor", 7), ("shared", 7), ("global", 7),
    ("I2F", 4), ("copies (B x n)", 18), ("LDG", 4), ("regs", 5), ("spill", 6), ("smem KB", 8),
    ("flight KB", 10), ("time/floor", 11), ("bound", 8),
)  # fmt: skip


def heading() -> str:
    """The table's first line."""
    return " ".join(title.ljust(width) if i == 0 else title.rjust(width) for i, (title, width) in enumerate(_COLUMNS))


def row(finding: Finding) -> str:
    """One line of the table."""
    pipes = finding.pipes
    copies = " ".join(f"{width}x{count}" for width, count in sorted(finding.copies.items(), reverse=True))
    cells = (
        finding.name,
        f"{finding.instructions_per_weight:.2f}",
        *(f"{pipes[pipe]:.2f}" for pipe in ("alu", "fma", "tensor", "shared", "global")),
        str(finding.conversions),
        copies,
        str(finding.exposed_loads),
        str(finding.registers),
        str(finding.spilled),
        f"{finding.shared / 1024:.1f}",
        f"{finding.in_flight / 1024:.0f}",
        f"{finding.over_floor:.2f}",
        finding.bound,
    )
    pairs = zip(cells, _COLUMNS, strict=True)
    return " ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, (_, width)) in enumerate(pairs))


def chosen(capabilities: Sequence[int], patterns: Sequence[str], safe: bool) -> tuple[Variant, ...]:
    """The shipped variants for these compute capabilities that a pattern names: parts of a name, joined by ``_``.

    Args:
        capabilities: such as 80 and 90.
        patterns: such as ``w4a16_m8``; none is every variant.
        safe: the safe form of the float16 ones instead of the fast.

    Raises:
        InputError: a pattern that names none, with what names look like.
    """
    every = shipped(tuple(capabilities))
    if safe:
        every = tuple(replace(variant, safe=True) for variant in every if variant.dtype == "float16")
    wanted = [set(pattern.split("_")) for pattern in patterns]
    names = [(variant, set(variant.name.split("_"))) for variant in every]
    for pattern, parts in zip(patterns, wanted, strict=True):
        if not any(parts <= name for _, name in names):
            what = f"no variant is named by {pattern!r}"
            raise InputError(message("inspect", what, f"give parts of a name, joined by _: {every[0].name}"))
    return tuple(variant for variant, name in names if not wanted or any(parts <= name for parts in wanted))


def inspect(variants: Iterable[Variant], dump: Path | None = None) -> Iterable[Finding]:
    """Compile and count one variant after the other.

    Args:
        variants: what to compile.
        dump: a directory for NAME.cubin and NAME.json; made when it is not there.

    Raises:
        KernelError: triton is not installed, or runs as an interpreter.
    """
    try:
        from quantkit.kernels.triton_compile import compile_variant
    except ModuleNotFoundError as error:
        raise KernelError(message("inspect", "triton is not installed", "pip install triton")) from error
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        code = compile_variant(variant)
        if dump is not None:
            (dump / f"{variant.name}.cubin").write_bytes(code.cubin)
            text = json.dumps(description(variant), indent=2)
            (dump / f"{variant.name}.json").write_text(text + "\n", encoding="utf-8")
        yield examine(variant, code)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 with one line on what was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m quantkit.kernels.inspect", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("patterns", nargs="*", help="parts of names, such as w4a16_g128_m8; none: all variants")
    parser.add_argument("--cc", type=int, action="append", choices=sorted(SMS), help="compute capabilities; none: all")
    parser.add_argument("--safe", action="store_true", help="the form for GPUs that lose float16 subnormals")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write NAME.cubin and NAME.json for each variant")
    options = parser.parse_args(arguments)
    out = sys.stdout
    try:
        variants = chosen(options.cc or sorted(SMS), options.patterns, options.safe)
        if not options.json:
            out.write(heading() + "\n")
        findings = []
        for finding in inspect(variants, options.dump):
            findings.append(finding)
            if not options.json:
                out.write(row(finding) + "\n")
                out.flush()
        if options.json:
            out.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    except OSError as error:
        sys.stderr.write(
            f"{message('inspect', f'{options.dump}: {error.strerror}', 'give --dump another directory')}\n"
        )
        return 2
    except QuantkitError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


__all__ = ["PIPES", "Finding", "chosen", "description", "examine", "inspect", "main"]

if __name__ == "__main__":
    sys.exit(main())
