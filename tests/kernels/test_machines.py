from __future__ import annotations

import pytest

from quantkit.kernels.machines import MACHINES, predict
from quantkit.kernels.sass import Loop, main_loop
from quantkit.kernels.tiles import SMS

A100, H100 = (next(m for m in MACHINES if m.cc == cc) for cc in (80, 90))


def loop_of(**counts: int) -> Loop:
    lines = [f"        /*0010*/ {opcode} R0, R1 ;\n" for opcode, count in counts.items() for _ in range(count)]
    loop = main_loop(".L_x_1:\n" + "".join(lines) + "        /*0020*/ @P0 BRA `(.L_x_1) ;\n")
    assert loop is not None
    return loop


def over_floor(loop: Loop, weights: int, in_flight: float = 1 << 20) -> tuple[float, str]:
    floor = (4 + 16 / 128) / 8
    found = predict(
        H100,
        loop,
        threads=64,
        weights=weights,
        bytes_per_weight=floor,
        floor_bytes_per_weight=floor,
        in_flight=in_flight,
    )
    return found.over_floor, found.bound


def test_the_machines_are_those_that_splits_are_chosen_for() -> None:
    assert {machine.cc: machine.sms for machine in MACHINES} == SMS


def test_a_short_loop_is_bound_by_memory() -> None:
    assert over_floor(loop_of(LOP3=99), 64 * 100) == (1.0, "memory")


def test_the_bounds_of_the_shared_notes() -> None:
    """KERNELS.md: W4 stays on the floor up to 4.56 instructions a weight on an H100, 2.28 of them on the ALU pipe."""
    at, bound = over_floor(loop_of(FFMA=455), 6400)
    assert (at, bound) == (1.0, "memory")
    at, bound = over_floor(loop_of(FFMA=500), 6400)
    assert bound == "issue"
    assert at == pytest.approx(5.01 / 4.56, rel=0.01)
    at, bound = over_floor(loop_of(LOP3=299), 6400)
    assert bound == "alu"
    assert at == pytest.approx(2.99 / 2.28, rel=0.01)


def test_too_few_bytes_in_flight_are_bound_by_latency() -> None:
    """700 ns of 3.35 TB/s over 132 SMs are 17.3 KiB."""
    at, bound = over_floor(loop_of(LOP3=9), 6400, in_flight=10_000)
    assert bound == "latency"
    assert at == pytest.approx(17_765 / 10_000, rel=0.01)


def test_filling_up_counts_as_memory() -> None:
    found = predict(
        A100, loop_of(LOP3=9), threads=64, weights=6400, bytes_per_weight=0.6, floor_bytes_per_weight=0.5, in_flight=1e6
    )
    assert found.bound == "memory"
    assert found.over_floor == pytest.approx(1.2)


def test_programs_on_an_sm() -> None:
    assert A100.resident(registers=120, shared=31 << 10, warps=2) == 5  # 164 KB of shared memory
    assert A100.resident(registers=255, shared=1 << 10, warps=4) == 2  # 65536 registers
