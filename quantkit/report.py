"""What a run did: one record a layer, totals, versions; events while it runs and report.json at the end."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from quantkit.transforms import TransformRecord

_PACKAGES = ("quantkit", "torch", "transformers", "safetensors", "tokenizers", "datasets", "accelerate")


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What was done to one layer.

    Attributes:
        name: module name.
        method: the solver.
        scheme: such as ``w4a16_g128_sym``.
        shape: (out_features, in_features).
        loss: tr(dW H dWᵀ), dW the weight error; H the solver's damped Hessian 2/n·XXᵀ, or I where nothing was measured.
        relative_error: √(loss / tr(W H Wᵀ)): the share of the output's (or, where nothing was measured, of the
            weight's) root mean square that the error is; without the bias.
        sqnr_db: 10·log₁₀(‖W‖² / ‖dW‖²), of the weights.
        num_tokens: calibration tokens that the layer saw.
        seconds: time spent solving.
        digest: sha256 of the quantized weight.
        notes: what the solver had to do that the recipe did not state as such, one sentence each.
    """

    name: str
    method: str
    scheme: str
    shape: tuple[int, int]
    loss: float
    relative_error: float | None
    sqnr_db: float | None
    num_tokens: int
    seconds: float
    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What tuning did to one block.

    Attributes:
        name: module name of the block.
        method: ``autoround``, or ``tuning`` after the solvers.
        layers: quantized layers that took part.
        held_out: samples that the errors are measured on; none of them was trained on, unless it is the only one.
        error_before: √(Σ‖y - ŷ‖² / Σ‖y‖²), y the full-precision model's hidden states behind the block.
        error_after: of what was kept; never larger.
        steps: updates that were made.
        kept_step: the update whose state was kept; 0: the start, nothing was better.
        seconds: time spent.
        changed: norm gains and biases that are not the source's any more: tensor name -> sha256.
    """

    name: str
    method: str
    layers: int
    held_out: int
    error_before: float
    error_after: float
    steps: int
    kept_step: int
    seconds: float
    changed: dict[str, str]


@dataclass(frozen=True, slots=True)
class BlockTuned:
    """A block was tuned (or found tuned, on resuming)."""

    record: BlockRecord
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class LayerDone:
    """A layer was solved (or found solved, on resuming)."""

    record: LayerRecord
    done: int
    total: int
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the run begins; ``steps`` of equal cost follow, each announced by :class:`Step`."""

    title: str
    steps: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the current stage is done; ``title`` says what comes next."""

    title: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something that the user should know."""

    text: str


Event = LayerDone | BlockTuned | Stage | Step | Note
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer that tells nobody."""


def decibels(signal: float, noise: float) -> float | None:
    """10·log₁₀(signal / noise); None when either is zero or not finite."""
    return 10 * math.log10(signal / noise) if 0 < signal < math.inf and 0 < noise < math.inf else None


def versions() -> dict[str, str]:
    """Versions of the packages that decide the result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor and threads: what may change the last bit of a floating-point sum."""
    return {
        "versions": versions(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def totals(records: Sequence[LayerRecord]) -> dict[str, Any]:
    """Sums over all layers, and the layers that lost most."""
    worst = sorted((r for r in records if r.relative_error is not None), key=lambda r: -(r.relative_error or 0.0))
    return {
        "layers": len(records),
        "loss": sum(r.loss for r in records),
        "solve_seconds": sum(r.seconds for r in records),
        "largest_relative_errors": [{"name": r.name, "relative_error": r.relative_error} for r in worst[:5]],
    }


def layer_to_dict(record: LayerRecord) -> dict[str, Any]:
    """A record as plain values."""
    return asdict(record)


def layer_from_dict(value: dict[str, Any]) -> LayerRecord:
    """The inverse of :func:`layer_to_dict`."""
    return LayerRecord(**{**value, "shape": tuple(value["shape"]), "notes": tuple(value.get("notes", ()))})


def transform_to_dict(record: TransformRecord) -> dict[str, Any]:
    """A record as plain values."""
    return asdict(record)


def transform_from_dict(value: dict[str, Any]) -> TransformRecord:
    """The inverse of :func:`transform_to_dict`."""
    return TransformRecord(**{**value, "readers": tuple(value["readers"])})


def block_from_dict(value: dict[str, Any]) -> BlockRecord:
    """The inverse of dataclasses.asdict."""
    return BlockRecord(**value)
