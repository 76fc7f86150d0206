"""A quantized layer in the form that it has on disk: what ``from_pretrained`` loads tensors into."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantkit.embedding import QuantEmbedding
from quantkit.formats import CheckpointFormat
from quantkit.linear import QuantLinear
from quantkit.qtensor import QuantizedTensor
from quantkit.safetensors_header import TensorInfo
from quantkit.scheme import QuantScheme


class PackedLayer(nn.Module):
    """A layer whose parameters are the tensors of a format, under their names on disk.

    It stands in a model while transformers reads, places and offloads parameters. What is in memory afterwards becomes
    a :class:`QuantLinear` or :class:`QuantEmbedding` (:meth:`unpacked`). What accelerate has offloaded stays as it is:
    its tensors come for each call and go after it, and so each call decodes them.

    Attributes:
        dtype: of the activations, or of an embedding's rows, and of the bias.

    Args:
        name: the layer's, for error messages.
        shape: (out_features, in_features).
        scheme: from config.json.
        fmt: the format.
        tensors: name on disk, without the layer's -> what the header says; parameters on the meta device are made.
        dtype: see above.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        scheme: QuantScheme,
        fmt: CheckpointFormat,
        tensors: Mapping[str, TensorInfo],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self._name, self._scheme, self._format = name, scheme, fmt
        for leaf, info in tensors.items():
            kept = dtype if leaf == "bias" else info.dtype  # scales and zero points keep theirs: a cast would round
            empty = torch.empty(info.shape, dtype=kept, device="meta")
            self.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))

    @property
    def is_here(self) -> bool:
        """Whether its tensors are in memory, and not offloaded."""
        return not any(parameter.is_meta for parameter in self.parameters())

    def quantized(self) -> QuantizedTensor:
        """The weight.

        Raises:
            CheckpointError: tensors that contradict the config.
        """
        tensors = {name: p.detach() for name, p in self.named_parameters()}
        return self._format.decode(self._name, tensors, self._scheme, (self.out_features, self.in_features))

    def unpacked(self) -> nn.Module:
        """The layer that runs, on the device where the tensors are."""
        raise NotImplementedError


class PackedLinear(PackedLayer):
    """A linear layer as it is on disk."""

    def unpacked(self, backend: str | None = None) -> QuantLinear:
        """The same layer on a kernel backend, on the device where the tensors are."""
        bias = self._parameters.get("bias")
        return QuantLinear(self.quantized(), bias, dtype=self.dtype, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ Wᵀ + bias``, decoded anew; see :meth:`QuantLinear.forward`."""
        y: Tensor = self.unpacked("reference")(x)
        return y


class PackedEmbedding(PackedLayer):
    """An embedding as it is on disk.

    Args:
        dense: the embedding that it stands for.
        others: see :class:`PackedLayer`.
    """

    def __init__(
        self,
        dense: nn.Module,
        name: str,
        shape: tuple[int, int],
        scheme: QuantScheme,
        fmt: CheckpointFormat,
        tensors: Mapping[str, TensorInfo],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(name, shape, scheme, fmt, tensors, dtype)
        self._dense = (dense,)  # not as a submodule: its weight is nothing to load

    def unpacked(self) -> QuantEmbedding:
        """The same embedding, on the device where the tensors are."""
        return QuantEmbedding.in_place_of(self._dense[0], self.quantized(), dtype=self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of ``ids``, decoded anew, all of the weight with them."""
        rows: Tensor = self.unpacked()(ids)
        return rows
