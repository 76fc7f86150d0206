"""On-disk formats: each converts QuantizedTensor to and from named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import UnreadFormatError, message
from quantkit.formats.awq import AWQCheckpoint
from quantkit.formats.base import CheckpointFormat
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.gptq import GPTQCheckpoint, GPTQv2Checkpoint

FORMATS: tuple[CheckpointFormat, ...] = (CompressedTensors(), GPTQCheckpoint(), GPTQv2Checkpoint(), AWQCheckpoint())


def format_named(name: str) -> CheckpointFormat:
    """The format of this name; a name that is not one of ``FORMATS`` is a KeyError."""
    return {f.name: f for f in FORMATS}[name]


def format_of(config: Mapping[str, Any]) -> CheckpointFormat:
    """The format of a ``quantization_config``.

    Raises:
        UnreadFormatError: none that quantkit reads.
    """
    for candidate in FORMATS:
        if candidate.reads(config):
            return candidate
    method = config.get("quant_method")
    if method is None and any(key in config for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"  # its older configs have no name
    raise UnreadFormatError(
        message(
            "config.json: quantization_config",
            f"quant_method {method!r} is not read",
            f"quantkit reads {', '.join(f.name for f in FORMATS)}",
        )
    )


def codes_of(tensor: str) -> tuple[str, ...]:
    """The names under which the codes may lie of a layer that has this tensor; none for names of no format.

    ``a.qzeros`` belongs to ``a.qweight``, ``a.weight_scale`` to ``a.weight_packed`` or ``a.weight``.
    """
    stem, _, leaf = tensor.rpartition(".")
    return tuple(f"{stem}.{name}" for f in FORMATS if leaf in f.tensors for name in (f.tensors[0], "weight"))


__all__ = [
    "FORMATS",
    "AWQCheckpoint",
    "CheckpointFormat",
    "CompressedTensors",
    "GPTQCheckpoint",
    "GPTQv2Checkpoint",
    "codes_of",
    "format_named",
    "format_of",
]
