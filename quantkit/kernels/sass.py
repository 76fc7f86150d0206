"""Reading NVIDIA machine code: instructions and loops of a disassembly, counted by the pipe that runs them.

It knows nothing of the kernels: `nvdisasm -c FILE.cubin` goes in. The main loop is the innermost loop with the most
products on tensor cores, or with the most instructions where there are none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_GUARD = re.compile(r"^@!?(?P<name>U?P(?:\d+|T))\s+")
_REGISTER = re.compile(r"\bU?R\d+\b")
_WIDTH = re.compile(r"\.(32|64|128)\b")

PIPES = ("alu", "fma", "tensor", "shared", "global", "conversion", "uniform", "control", "other")
"""Where instructions run: integer logic, float and integer multiply, tensor cores, shared memory (and barriers'
asynchronous groups), global memory, I2F and F2F conversions, one for all lanes, branches and barriers."""

_PIPE_OF = {
    "alu": "LOP3 SHF PRMT IADD3 ISETP SEL PLOP3 LEA IABS IMNMX VIADD VIMNMX LOP SGXT BMSK FSETP FSEL FMNMX FLO POPC "
    "VOTE R2P P2R IADD SHL SHR VIADDMNMX HSETP2 HMNMX2 FSET",
    "fma": "FFMA FMUL FADD IMAD HFMA2 HADD2 HMUL2 FFMA2 FMUL2 FADD2 IDP",
    "tensor": "HMMA IMMA QGMMA HGMMA IGMMA DMMA UTCHMMA OMMA QMMA",
    "shared": "LDS STS LDSM STSM ATOMS MOVM",
    "global": "LDG STG LDGSTS LDL STL LD ST RED ATOM ATOMG LDC ULDC LDCU UBLKCP UTMALDG CCTL",
    "conversion": "I2F F2F F2I I2FP F2FP I2I FRND MUFU F2IP",
    "control": "BRA BAR BSSY BSYNC EXIT NOP WARPSYNC CALL RET DEPBAR LDGDEPBAR ARRIVES SYNCS NANOSLEEP BREAK YIELD "
    "ERRBAR MEMBAR BMOV JMP ELECT FENCE",
    "other": "MOV S2R CS2R S2UR SHFL REDUX R2UR UMOV",
}
_PIPES = {name: pipe for pipe, names in _PIPE_OF.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its guard (a predicate, or empty), opcode with its modifiers, operands."""

    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        """One of PIPES. What is not known and starts with U is uniform, the rest other."""
        known = _PIPES.get(self.name)
        if known is not None and not (known == "other" and self.name.startswith("U")):
            return known
        return "uniform" if self.name.startswith("U") else "other"

    @property
    def width(self) -> int:
        """Bytes that a thread moves: 4, 8 or 16 by the modifier, 4 without one."""
        found = _WIDTH.search(self.opcode)
        if ".U8" in self.opcode or ".S8" in self.opcode:
            return 1
        if ".U16" in self.opcode or ".S16" in self.opcode:
            return 2
        return int(found[1]) // 8 if found else 4

    @property
    def never_runs(self) -> bool:
        """Guarded by the predicate that is always false."""
        return self.guard == "!PT"


@dataclass(frozen=True, slots=True)
class Loop:
    """The instructions of a loop, its branch back included, and where it starts and ends in the kernel."""

    body: tuple[Instruction, ...]
    start: int
    stop: int

    def counts(self) -> Counter[str]:
        """Instructions by name of the opcode with all modifiers."""
        return Counter(instruction.opcode for instruction in self.body)

    def pipes(self) -> dict[str, int]:
        """Instructions by pipe, every pipe named."""
        found = Counter(instruction.pipe for instruction in self.body)
        return {pipe: found[pipe] for pipe in PIPES}

    def named(self, *names: str) -> tuple[Instruction, ...]:
        """Those with one of these opcodes, whatever their modifiers."""
        return tuple(instruction for instruction in self.body if instruction.name in names)

    def copies(self) -> Counter[int]:
        """Asynchronous copies from global to shared memory, by bytes a thread."""
        return Counter(instruction.width for instruction in self.named("LDGSTS"))

    def exposed_loads(self) -> tuple[Instruction, ...]:
        """Loads from global or local memory into registers: what waits for the memory in every trip."""
        return self.named("LDG", "LDL", "LD")

    def shared_bytes(self) -> int:
        """Bytes that a thread reads from and writes to shared memory by its own instructions."""
        total = 0
        for instruction in self.named("LDS", "STS", "LDSM", "STSM"):
            if instruction.never_runs:
                continue
            matrices = re.search(r"\.M88(?:\.(\d))?", instruction.opcode)
            total += 4 * int(matrices[1] or 1) if matrices else instruction.width
        return total


def instructions(disassembly: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """All instructions of a disassembly, and for each label the index of the instruction that follows it."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = len(found)
        text = _INSTRUCTION.match(line)
        if text is not None:
            found.append(_parsed(text["text"]))
    return tuple(found), labels


def _parsed(text: str) -> Instruction:
    guard = ""
    match = _GUARD.match(text)
    if match is not None:
        guard, text = text[: match.end()].strip("@ "), text[match.end() :]
    opcode, _, operands = text.partition(" ")
    return Instruction(guard, opcode, operands.strip())


def loops(disassembly: str) -> tuple[Loop, ...]:
    """Every loop: from the target of a branch back to that branch, in the order of their ends."""
    found, labels = instructions(disassembly)
    return tuple(_loops(found, labels))


def _loops(found: tuple[Instruction, ...], labels: dict[str, int]) -> Iterator[Loop]:
    for index, instruction in enumerate(found):
        if instruction.name != "BRA":
            continue
        target = _TARGET.search(instruction.operands)
        start = labels.get(target[1], index + 1) if target else index + 1
        if start < index or (start == index and len(found) > index + 1 and instruction.guard):
            yield Loop(found[start : index + 1], start, index + 1)


def main_loop(disassembly: str) -> Loop | None:
    """The innermost loop that does the work; None for a kernel without loops."""
    every = loops(disassembly)
    inner = [
        loop
        for loop in every
        if not any(other is not loop and loop.start <= other.start and other.stop <= loop.stop for other in every)
    ]
    return max(inner, key=lambda loop: (len(loop.named(*_PIPE_OF["tensor"].split())), len(loop.body)), default=None)
