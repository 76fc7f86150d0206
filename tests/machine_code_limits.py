"""What the machine code of the shipped Triton kernels may cost, the exceptions, and what published kernels cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.kernels.machines import MACHINES
from quantkit.kernels.shipped import Variant

_W4 = {8: 2.0, 16: 2.3}  # by the most rows of x of a program
_W8 = 3.0
_OVER_FLOOR = 1.05  # predicted time over the time to read codes, scales and zero points once
_OVER_FLOOR_W3 = 1.11  # five codes in 16 bits are 1.067 of 3 bits; slots of scales and filled up rows are the rest

# Above those, thread-instructions a weight by compute capability: as measured with Triton 3.7.1, in full thousandths.
#
# A group costs each of its rows a scale, and a zero point where asymmetric, and for each row of x a multiply-add with
# either; groups of 32 are four times as many as groups of 128, and 16 rows of x take twice the multiply-adds of 8.
# bfloat16 codes take 7 logical operations for 8 weights, because its mantissa holds one code, where float16 takes 5.
# 64 rows of words with 16 rows of x would spread the addresses over more weights, and spill.
EXCEPTIONS: dict[str, dict[int, float]] = {
    "w4a16_g32_asym_bfloat16_m8": {80: 2.344, 86: 2.344, 89: 2.344, 90: 2.297, 100: 2.045},
    "w4a16_g32_sym_float16_m16": {80: 2.352},
    "w4a16_g32_sym_bfloat16_m16": {80: 2.422, 86: 2.415, 89: 2.415, 90: 2.399, 100: 2.313},
    "w4a16_g32_asym_float16_m16": {80: 2.942, 86: 3.000, 89: 3.000, 90: 3.012, 100: 2.594},
    "w4a16_g32_asym_bfloat16_m16": {80: 3.262, 86: 3.356, 89: 3.356, 90: 3.356, 100: 2.950},
    "w4a16_g64_asym_bfloat16_m16": {80: 2.469, 86: 2.493, 89: 2.493, 90: 2.528},
}

# Bytes spilled, and loads of them in the main loop: with all 255 registers in use. No W4 variant is here.
SPILLS: dict[str, dict[int, tuple[int, int]]] = {"w8a16_g128_asym_bfloat16_m16": {86: (8, 1), 89: (8, 1)}}

Published = dict[str, Any]
_PUBLISHED = Path(__file__).with_name("published_kernels.json")
PUBLISHED: list[Published] = json.loads(_PUBLISHED.read_text(encoding="utf-8"))["kernels"]


def stem(variant: Variant) -> str:
    """Its name without the compute capability."""
    return variant.name.rpartition("_sm")[0]


def most_instructions(variant: Variant) -> float:
    """Thread-instructions a weight."""
    limit = _W8 if variant.bits == 8 else _W4[variant.max_m]
    return EXCEPTIONS.get(stem(variant), {}).get(variant.cc, limit)


def most_over_floor(variant: Variant) -> float:
    """Predicted time over the time to read the weight once."""
    return _OVER_FLOOR_W3 if variant.bits == 3 else _OVER_FLOOR


def budget(variant: Variant) -> float:
    """Thread-instructions a weight that its GPU issues while it reads that weight: below, they cost no time."""
    machine = next(machine for machine in MACHINES if machine.cc == variant.cc)
    return variant.floor_bytes_per_weight / machine.bandwidth * machine.rates["issue"]
