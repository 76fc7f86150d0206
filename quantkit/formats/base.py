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
    tensors: ClassVar[tuple[str, ...]]
    """What it stores for a layer besides the bias; codes are under the first, or under ``weight``."""
    holds_embeddings: ClassVar[bool]
    """Whether its config can say that an embedding is quantized."""
    config_names_layers: ClassVar[bool]
    """Whether the config alone says which layers are quantized; otherwise it is those whose codes are there."""

    def why_not(self, scheme: QuantScheme, shape: tuple[int, int] | None = None) -> str | None:
        """Why the format cannot hold this scheme, or not for a layer of (out_features, in_features); None: it can."""
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

    def write_config(
        self, schemes: Mapping[str, QuantScheme], skipped: tuple[str, ...], *, reordered: bool = False
    ) -> dict[str, Any]:
        """The ``quantization_config``.

        Args:
            schemes: of every quantized module by its names, by ``re:`` patterns, or by the class ``Embedding``.
            skipped: linear modules left as they are.
            reordered: whether some layer may have a g_idx.

        Raises:
            SchemeError: schemes that cannot stand in one checkpoint.
        """
        ...

    def config_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """JSON files to write beside config.json, for readers that look for the ``quantization_config`` there."""
        ...

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` is of this format."""
        ...

    def read_config(
        self, config: Mapping[str, Any], linears: tuple[str, ...], embeddings: tuple[str, ...] = ()
    ) -> dict[str, QuantScheme]:
        """The scheme of each quantized one of the model's linear modules and embeddings.

        Raises:
            CheckpointError: malformed, or something that quantkit does not run.
        """
        ...
