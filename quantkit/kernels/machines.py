"""GPUs by their data sheets, and the time that a loop of machine code needs on them at least.

Estimates, not measurements. Rates of a multiprocessor (SM) are those of NVIDIA's CUDA C++ Programming Guide,
"Throughput of Native Arithmetic Instructions"; of tensor cores those of the architecture's white paper, for products of
a warp (mma.sync), float16 or bfloat16 with float32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.kernels.sass import Loop

_MMA = 16 * 8 * 16  # multiply-adds of one m16n8k16 product of a warp
_LANES = 32
LATENCY = 700e-9
"""Seconds between a copy's start and its end, about, on a loaded memory."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One GPU.

    Attributes:
        name: of the product.
        cc: compute capability, 80 is 8.0.
        sms: multiprocessors.
        clock: hertz.
        bandwidth: bytes a second of its memory.
        fma: float32 multiply-adds an SM and clock.
        conversions: I2F and F2F an SM and clock.
        tensor: multiply-adds of tensor cores an SM and clock.
        shared_memory: bytes that programs on one SM share.
        warps: most warps on one SM.
    """

    name: str
    cc: int
    sms: int
    clock: float
    bandwidth: float
    fma: int
    conversions: int
    tensor: int
    shared_memory: int
    warps: int

    @property
    def rates(self) -> dict[str, float]:
        """Thread-instructions a second of the whole GPU, by pipe; ``issue`` is all together."""
        clocks = self.sms * self.clock
        return {
            "issue": 128 * clocks,
            "alu": 64 * clocks,
            "fma": self.fma * clocks,
            "conversion": self.conversions * clocks,
            "tensor": self.tensor / _MMA * _LANES * clocks,
        }

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs that one SM holds at one time."""
        allocated = -(-registers // 8) * 8 * _LANES * warps
        return min(65536 // max(allocated, 1), self.shared_memory // (shared + 1024), self.warps // warps, 32)


MACHINES = (
    Machine("A100 80GB", 80, 108, 1.41e9, 2.04e12, 64, 16, 1024, 164 << 10, 64),
    Machine("RTX 3090", 86, 82, 1.70e9, 0.94e12, 128, 16, 256, 100 << 10, 48),
    Machine("RTX 4090", 89, 128, 2.52e9, 1.01e12, 128, 16, 256, 100 << 10, 48),
    Machine("H100 SXM", 90, 132, 1.755e9, 3.35e12, 128, 16, 1024, 228 << 10, 64),
    Machine("B200", 100, 148, 1.85e9, 8.0e12, 128, 16, 1024, 228 << 10, 64),
)
"""The GPUs that are inspected for, one for each compute capability."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The least time of a kernel, over the time that reading its weight once takes.

    Attributes:
        over_floor: at least 1, where ``bytes_read`` is at least the floor.
        bound: what takes that time: memory, latency, or a pipe.
    """

    over_floor: float
    bound: str


def predict(
    machine: Machine,
    loop: Loop,
    *,
    threads: int,
    weights: int,
    bytes_per_weight: float,
    floor_bytes_per_weight: float,
    in_flight: float,
) -> Prediction:
    """From the main loop alone: prologue, epilogue and launch are not in it.

    Args:
        machine: the GPU.
        loop: the main loop.
        threads: of a program.
        weights: that a program handles in one trip of the loop.
        bytes_per_weight: that are read from memory: the packed form, filled up.
        floor_bytes_per_weight: codes, scales and zero points at their widths.
        in_flight: bytes on their way to one SM.
    """
    floor = floor_bytes_per_weight / machine.bandwidth
    seconds = {"memory": bytes_per_weight / machine.bandwidth}
    needed = machine.bandwidth / machine.sms * LATENCY
    seconds["latency"] = seconds["memory"] * needed / in_flight
    per_weight = threads / weights
    pipes = loop.pipes()
    counts = {"issue": len(loop.body), **{pipe: pipes[pipe] for pipe in ("alu", "fma", "conversion", "tensor")}}
    for pipe, rate in machine.rates.items():
        seconds[pipe] = counts[pipe] * per_weight / rate
    copied = sum(width * count for width, count in loop.copies().items())
    shared = (loop.shared_bytes() + copied) * per_weight
    seconds["shared"] = shared / (128 * machine.sms * machine.clock)
    bound = max(seconds, key=lambda name: seconds[name])
    return Prediction(seconds[bound] / floor, bound)
