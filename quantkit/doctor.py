"""What this machine can run, and why not the rest."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from quantkit.kernels import BACKENDS, LinearSpec
from quantkit.kernels.jit_targets import TARGETS, VARIABLE, available, chosen_target
from quantkit.scheme import parse_scheme

# Layers that stand for the others: each is asked of every backend.
SCHEMES = ("w4a16_g128_sym", "w4a16_g128_asym", "w3a16_g128_asym", "w2a16_g128_asym", "w8a16_channel_sym", "w8a8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEATURES = 4096
# What a package that may be missing is for.
EXTRAS = {
    "llvmlite": "CPU kernels of our own",
    "triton": "kernels on a GPU",
    "lm_eval": "quantkit eval",
    "matplotlib": "plots",
    "peft": "LoRA adapters on quantized models",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A backend that cannot run a layer.

    Attributes:
        backend: its name.
        why: its words.
    """

    backend: str
    why: str


@dataclass(frozen=True, slots=True)
class Capability:
    """What runs one kind of layer.

    Attributes:
        scheme, dtype, device: the layer.
        backend: the one that is chosen, the fastest that can; None: nothing can.
        refusals: of the backends that would come before it.
    """

    scheme: str
    dtype: str
    device: str
    backend: str | None
    refusals: tuple[Refusal, ...]


def capabilities() -> list[Capability]:
    """For each device that is here, each dtype and scheme: the backend that runs it."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [_capability(scheme, dtype, device) for device in devices for dtype in DTYPES for scheme in SCHEMES]


def _capability(scheme: str, dtype: torch.dtype, device: str) -> Capability:
    spec = LinearSpec(_FEATURES, _FEATURES, parse_scheme(scheme), dtype, device)
    refusals: list[Refusal] = []
    chosen: str | None = None
    for backend in BACKENDS:
        why = backend.why_not(spec)
        if why is None:
            chosen = backend.name
            break
        refusals.append(Refusal(backend.name, why))
    return Capability(scheme, str(dtype).removeprefix("torch."), device, chosen, tuple(refusals))


def machine() -> dict[str, str]:
    """The facts that decide it, a line each."""
    cpu = torch.backends.cpu.get_cpu_capability()
    facts = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "CPU": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "CPU kernels": _cpu_kernels(),
        "CUDA": _cuda(),
    }
    for name in ("transformers", "safetensors"):
        facts[name] = version(name)
    for name, purpose in EXTRAS.items():
        facts[name] = _version(name) if find_spec(name) is not None else f"not installed: no {purpose}"
    return facts


def _cpu_kernels() -> str:
    target = chosen_target()
    if target is None:
        return f"torch's only: ours are for {', '.join(target.name for target in TARGETS)}"
    return f"compiled for {target.name} (of {', '.join(each.name for each in available())}; {VARIABLE} chooses)"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "installed"


def _cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "none: this torch is a CPU build"
    if not torch.cuda.is_available():
        return "none: no device, or no driver for it"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        names.append(f"{properties.name}, capability {capability}, {properties.total_memory / 2**30:.0f} GiB")
    return "; ".join(names)
