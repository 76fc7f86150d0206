"""QuantEmbedding, a quantized table of rows that are looked up, not multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from quantkit.errors import InputError, KernelError, message
from quantkit.grid import dequantize, dequantize_groups
from quantkit.kernels import LinearSpec, ReferenceBackend
from quantkit.packing import unpack_rows
from quantkit.qtensor import QuantizedTensor

_PORTABLE = ReferenceBackend()  # of QuantLinear's state_dict too: packed bits row by row, so that rows can be gathered
_CODES_AT_ONCE = 2**22  # of a long prompt's rows; bounds the 32-bit working copies
_SCALED = "TextScaledWordEmbedding"  # Gemma's classes: the rows times scalar_embed_scale, rounded to the rows' dtype


class QuantEmbedding(nn.Module):
    """``weight[ids]`` with a quantized weight: the packed rows that are asked for are gathered, then decoded.

    The weight is never dense as a whole, and a compiled step takes the lookup into its graph. Packed tensors are
    those of the backend "reference"; ``.to(dtype)`` (or ``.half()``, ...) changes the dtype of the rows, and never
    rounds a scale. It has no parameters and no gradient.

    Attributes:
        scheme: bits, group size, symmetry.
        dtype: of the rows that come out.
        padding_idx: as of nn.Embedding: it concerns training only, and its row is looked up like the others.
        embed_scale: what every row is multiplied by (Gemma); None: nothing.

    Args:
        q: the weight [rows, columns]; the module lies where it does.
        dtype: see above.
        padding_idx: see above.
        embed_scale: see above.

    Raises:
        KernelError: reordered groups or quantized activations, which a lookup has none of.
    """

    weight_packed: Tensor
    scale: Tensor

    def __init__(
        self,
        q: QuantizedTensor,
        *,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
    ) -> None:
        super().__init__()
        if q.g_idx is not None or q.scheme.act_bits is not None:
            what = "reordered groups (g_idx)" if q.g_idx is not None else f"the quantized activations of {q.scheme}"
            raise KernelError(message("QuantEmbedding", what, "give contiguous groups and a weight-only scheme"))
        self.num_embeddings, self.embedding_dim = q.out_features, q.in_features
        self.scheme, self.dtype, self.padding_idx, self.embed_scale = q.scheme, dtype, padding_idx, embed_scale
        self._factor = _rounded(embed_scale, dtype)
        self._names = _PORTABLE.names(self._spec(q.codes.device))
        for name, tensor in _PORTABLE.prepack(q, self._spec(q.codes.device)).items():
            self.register_buffer(name, tensor)

    @classmethod
    def in_place_of(cls, module: nn.Module, q: QuantizedTensor, *, dtype: torch.dtype) -> QuantEmbedding:
        """What looks up the rows of ``q`` as an embedding looks up its own.

        Args:
            module: an nn.Embedding, or Gemma's, which scales; its weight is not read.
            q: its weight; the result lies where it does.
            dtype: of the rows that come out.

        Raises:
            InputError: another module, or one that does more than look rows up.
        """
        reason = why_not_embedding(module)
        if reason is not None:
            raise InputError(message("QuantEmbedding", reason, "leave it as it is"))
        scale: float | None = getattr(module, "scalar_embed_scale", None)
        padding_idx = cast("int | None", module.padding_idx)
        return cls(q, dtype=dtype, padding_idx=padding_idx, embed_scale=scale).train(module.training)

    @property
    def device(self) -> torch.device:
        """Where the packed weight lies."""
        return self.weight_packed.device

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads ``Embedding.weight`` itself. Every read dequantizes all of it."""
        return self.dequantize()

    def quantized(self) -> QuantizedTensor:
        """The weight: exact codes, scales and zero points."""
        packed = {name: cast(Tensor, self._buffers[name]) for name in self._names}
        return _PORTABLE.unpack(packed, self._spec(self.device))

    def dequantize(self) -> Tensor:
        """The dense weight ``dtype`` [rows, columns], not scaled."""
        return dequantize(self.quantized(), self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up.

        Args:
            ids: int32 or int64 [...], on the module's device.

        Returns:
            ``dtype`` [..., columns].

        Raises:
            IndexError: an id that is no row (torch's; on a GPU its assertion).
        """
        flat = ids.reshape(-1)
        parts = [self._rows(part) for part in flat.split(max(_CODES_AT_ONCE // self.embedding_dim, 1))]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._factor is not None:
            rows = rows * self._factor
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        dtype = str(self.dtype).removeprefix("torch.")
        names = [name for name in ("padding_idx", "embed_scale") if getattr(self, name) is not None]
        rest = "".join(f", {name}={getattr(self, name)}" for name in names)
        return f"{self.num_embeddings}, {self.embedding_dim}{rest}, scheme={self.scheme}, dtype={dtype}"

    def _rows(self, ids: Tensor) -> Tensor:
        codes = unpack_rows(self.weight_packed.index_select(0, ids), self.scheme.bits, self.embedding_dim)
        stored = self._buffers.get("zero_point")
        zero_point = self.scheme.mid if stored is None else stored.index_select(0, ids)
        return dequantize_groups(codes, self.scale.index_select(0, ids), zero_point, self.dtype)

    def _spec(self, device: torch.device) -> LinearSpec:
        return LinearSpec(self.embedding_dim, self.num_embeddings, self.scheme, self.dtype, device.type)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:  # noqa: ARG002
        """What nn.Module calls for .to(), .half(), .cuda(), ...: packed tensors move, and are never cast."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        for name in self._names:
            self._buffers[name] = cast(Tensor, self._buffers[name]).to(probe.device)
        self.dtype, self._factor = probe.dtype, _rounded(self.embed_scale, probe.dtype)
        return self


def why_not_embedding(module: nn.Module) -> str | None:
    """Why a module cannot be a :class:`QuantEmbedding`; None: it looks rows up and at most scales them."""
    kind = type(module)
    if not isinstance(module, nn.Embedding):
        return f"{kind.__name__} is no embedding"
    scaled = kind.__name__.endswith(_SCALED) and isinstance(getattr(module, "scalar_embed_scale", None), float)
    if kind.forward is not nn.Embedding.forward and not scaled:
        return f"{kind.__name__} does not look rows up as nn.Embedding does"
    return None if module.max_norm is None else "max_norm changes its rows as they are looked up"


def _rounded(value: float | None, dtype: torch.dtype) -> float | None:
    return None if value is None else torch.tensor(value).to(dtype).item()
