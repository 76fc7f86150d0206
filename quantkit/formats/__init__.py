"""On-disk formats: each converts QuantizedTensor to and from named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import CheckpointError, message
from quantkit.formats.base import CheckpointFormat
from quantkit.formats.compressed_tensors import CompressedTensors

FORMATS: tuple[CheckpointFormat, ...] = (CompressedTensors(),)


def format_named(name: str) -> CheckpointFormat:
    """The format of this name; a name that is not one of ``FORMATS`` is a KeyError."""
    return {f.name: f for f in FORMATS}[name]


def format_of(config: Mapping[str, Any]) -> CheckpointFormat:
    """The format of a ``quantization_config``.

    Raises:
        CheckpointError: none that quantkit reads.
    """
    for candidate in FORMATS:
        if candidate.reads(config):
            return candidate
    method = config.get("quant_method")
    raise CheckpointError(
        message(
            "config.json: quantization_config",
            f"quant_method {method!r} is not read",
            f"quantkit reads {', '.join(f.name for f in FORMATS)}",
        )
    )


__all__ = ["FORMATS", "CheckpointFormat", "CompressedTensors", "format_named", "format_of"]
