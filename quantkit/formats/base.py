"""What every on-disk format is: QuantizedTensor <-> named tensors, schemes <-> config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme


class CheckpointFormat(Protocol):
    """One on-disk format; tensor names are relative to the layer (``weight_packed``), shapes are the format's."""

    name: ClassVar[str]
    holds_g_idx: ClassVar[bool]
    """Whether it stores reordered groups (``QuantizedTensor.g_idx``)."""

    def why_not(self, scheme: QuantScheme) -> str | None:
        """Why the format cannot hold this scheme; None when it can."""
        ...

    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors to write for one layer."""
        ...

    def decode(
        self, where: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The inverse of :meth:`encode`.

        Args:
            where: the layer, for error messages.
            tensors: as read from disk; not trusted.
            scheme: from the config.
            shape: (out_features, in_features) of the model's layer.

        Raises:
            CheckpointError: missing tensors, or shapes, dtypes or values that contradict scheme and shape.
        """
        ...

    def write_config(self, schemes: Mapping[str, QuantScheme], skipped: tuple[str, ...]) -> dict[str, Any]:
        """The ``quantization_config`` for quantized modules (name -> scheme) and linear modules left as they are."""
        ...

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` is of this format."""
        ...

    def read_config(self, config: Mapping[str, Any], linears: tuple[str, ...]) -> dict[str, QuantScheme]:
        """The scheme of each quantized one of the model's linear modules.

        Raises:
            CheckpointError: malformed, or something that quantkit does not run.
        """
        ...
