"""AWQ's layout for its GEMM kernels (4 bits), as AutoAWQ writes it and vLLM, SGLang and transformers read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, SchemeError, message
from quantkit.formats.checks import FLOATS, check_scale, check_tensor
from quantkit.formats.packed_config import IN_BLOCK, layout_of, read_packed_config
from quantkit.packing import pack, unpack
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

_BITS = 4
_PER_WORD = 8
_MIDDLE = 0x88888888 - (1 << 32)  # eight zero points of 8, as int32
# Nibble i of a word, low first, holds the column of this place among its eight; and the way back.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(_ORDER.index(place) for place in range(_PER_WORD))


class AWQCheckpoint:
    """The tensors of a layer of N rows and K columns in G groups.

    ``qweight`` int32 [K, N/8] and ``qzeros`` int32 [G, N/8], packed along N with the nibbles of a word interleaved;
    ``scales`` [G, N]. Zero points are stored as they are.
    """

    name: ClassVar[str] = "awq"
    holds_g_idx: ClassVar[bool] = False
    tensors: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    holds_embeddings: ClassVar[bool] = False
    config_names_layers: ClassVar[bool] = False

    def why_not(self, scheme: QuantScheme, shape: tuple[int, int] | None = None) -> str | None:
        """See :class:`quantkit.formats.base.CheckpointFormat`; 4 bits, asymmetric, weight-only."""
        if scheme.act_bits is not None:
            return "it keeps activations in floating point: choose a weight-only scheme, or compressed-tensors"
        if scheme.bits != _BITS:
            return "it holds 4 bits: choose w4a16, or compressed-tensors"
        if scheme.symmetric:
            return "its weights have zero points: choose an asymmetric scheme (_asym), or gptq or compressed-tensors"
        if shape is not None and shape[0] % _PER_WORD:
            return f"out_features={shape[0]} is not a multiple of 8: choose compressed-tensors"
        return None

    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.CheckpointFormat`.

        Raises:
            SchemeError: a scheme or shape that it does not hold, or reordered groups.
        """
        if q.g_idx is not None:
            raise SchemeError(message(self.name, "reordered groups (g_idx) are not held", "choose gptq"))
        reason = self.why_not(q.scheme, (q.out_features, q.in_features))
        if reason is not None:
            raise SchemeError(message(self.name, f"{q.scheme} is not written", reason))
        return {
            "qweight": pack(_permuted(q.codes.T, _ORDER), _BITS),
            "qzeros": pack(_permuted(q.zero_point.T, _ORDER), _BITS),
            "scales": q.scale.T.contiguous(),
        }

    def decode(
        self, where: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """See :class:`quantkit.formats.base.CheckpointFormat`; of symmetric weights the zero points may be missing."""
        rows, columns = shape
        reason = scheme.why_not(columns)
        if reason is None and (scheme.bits != _BITS or scheme.act_bits is not None or rows % _PER_WORD):
            reason = f"{scheme} with {rows} rows is nothing that {self.name} holds"
        if reason is not None:
            raise CheckpointError(f"{where}: {reason}")
        groups, words = scheme.num_groups(columns), rows // _PER_WORD
        check_tensor(f"{where}.qweight", tensors.get("qweight"), [columns, words], (torch.int32,))
        check_tensor(f"{where}.scales", tensors.get("scales"), [groups, rows], FLOATS)
        check_scale(f"{where}.scales", tensors["scales"])
        if scheme.symmetric and "qzeros" not in tensors:
            zero_point = torch.full((groups, rows), scheme.mid, dtype=torch.uint8, device=tensors["scales"].device)
        else:
            check_tensor(f"{where}.qzeros", tensors.get("qzeros"), [groups, words], (torch.int32,))
            zero_point = _permuted(unpack(tensors["qzeros"], _BITS, rows), _PLACES)
        if scheme.symmetric and bool((zero_point != scheme.mid).any()):
            what = f"has zero points other than {scheme.mid}, and zero_point is false"
            raise CheckpointError(message(f"{where}.qzeros", what, 'config.json: write "zero_point": true'))
        codes = _permuted(unpack(tensors["qweight"], _BITS, rows), _PLACES).T.contiguous()
        return QuantizedTensor(codes, tensors["scales"].T.contiguous(), zero_point.T.contiguous(), scheme)

    @staticmethod
    def in_the_middle(qzeros: Tensor) -> bool:
        """Whether all zero points that these words hold are those of symmetric weights."""
        return bool((qzeros == _MIDDLE).all())

    def write_config(
        self,
        schemes: Mapping[str, QuantScheme],
        skipped: tuple[str, ...],
        *,
        reordered: bool = False,  # noqa: ARG002 - encode refuses it
    ) -> dict[str, Any]:
        """See :class:`quantkit.formats.base.CheckpointFormat`; one scheme for all layers."""
        used = list(dict.fromkeys(schemes.values()))
        if len(used) > 1:
            what = f"{len(used)} schemes ({', '.join(map(str, used))}), and the config states one"
            raise SchemeError(message(self.name, what, "give all layers one scheme, or choose gptq"))
        (scheme,) = used
        kept = [name for name in skipped if IN_BLOCK.search(name)]
        return {
            "quant_method": self.name,
            "bits": scheme.bits,
            "group_size": -1 if scheme.group_size is None else scheme.group_size,
            "zero_point": not scheme.symmetric,
            "version": "gemm",
            "lm_head": any(not IN_BLOCK.search(name) and not name.startswith("re:") for name in schemes),
            "modules_to_not_convert": kept or None,
        }

    def config_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:  # noqa: ARG002
        """See :class:`quantkit.formats.base.CheckpointFormat`; none."""
        return {}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See :class:`quantkit.formats.base.CheckpointFormat`."""
        return layout_of(config) == self.name

    def read_config(
        self,
        config: Mapping[str, Any],
        linears: tuple[str, ...],
        embeddings: tuple[str, ...] = (),  # noqa: ARG002 - it has none
    ) -> dict[str, QuantScheme]:
        """See :class:`quantkit.formats.base.CheckpointFormat`."""
        return read_packed_config(config, linears)


def _permuted(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """uint8 [rows, N] with the columns of each eight in this order."""
    return codes.reshape(codes.shape[0], -1, _PER_WORD)[:, :, list(order)].reshape(codes.shape)
