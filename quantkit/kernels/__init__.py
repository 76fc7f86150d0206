"""Kernel backends: ways to multiply by a quantized weight, and the choice between them."""

from __future__ import annotations

from quantkit.errors import KernelError, message
from quantkit.kernels.base import KernelBackend, LinearSpec
from quantkit.kernels.cpu import CpuBackend
from quantkit.kernels.int8 import CpuInt8Backend, CudaInt8Backend
from quantkit.kernels.jit_backend import JitBackend
from quantkit.kernels.reference import ReferenceBackend
from quantkit.kernels.simulated import SimulatedBackend
from quantkit.kernels.triton_backend import TritonBackend
from quantkit.kernels.triton_int8_backend import TritonInt8Backend

__all__ = [
    "BACKENDS",
    "CpuBackend",
    "CpuInt8Backend",
    "CudaInt8Backend",
    "JitBackend",
    "KernelBackend",
    "LinearSpec",
    "ReferenceBackend",
    "SimulatedBackend",
    "TritonBackend",
    "TritonInt8Backend",
    "choose_backend",
]

BACKENDS: tuple[KernelBackend, ...] = (
    JitBackend(),
    CpuBackend(),
    CpuInt8Backend(),
    TritonBackend(),
    TritonInt8Backend(),
    CudaInt8Backend(),
    ReferenceBackend(),
    SimulatedBackend(),
)
"""Every backend, the fastest first."""


def choose_backend(spec: LinearSpec, name: str | None = None) -> KernelBackend:
    """The first backend that can run a layer, or the one of that name.

    Args:
        spec: the layer.
        name: one of the backends' names; None takes the first that fits.

    Raises:
        KernelError: an unknown name, or nothing fits; the message holds every refusal.
    """
    candidates = [backend for backend in BACKENDS if name in (None, backend.name)]
    if not candidates:
        known = ", ".join(backend.name for backend in BACKENDS)
        what = f"there is no backend {name!r}"
        raise KernelError(message(str(spec), what, f"choose one of {known}, or None for the first that fits"))
    refusals = []
    for backend in candidates:
        reason = backend.why_not(spec)
        if reason is None:
            return backend
        refusals.append(f"{backend.name} refuses {reason}")
    fix = "change the scheme, dtype or device" if name is None else "choose another, or None for any that fits"
    raise KernelError(message(str(spec), f"no backend can run it ({'. '.join(refusals)})", fix))
