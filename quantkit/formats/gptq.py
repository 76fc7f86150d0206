"""GPTQ's layout, as AutoGPTQ, GPTQModel and AutoRound write it and vLLM, SGLang and transformers read it.

Version 1 stores each zero point minus one, version 2 as it is; ``checkpoint_format`` in the config tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, SchemeError, message
from quantkit.formats.checks import FLOATS, check_scale, check_tensor
from quantkit.formats.dynamic import layer_rules
from quantkit.formats.packed_config import IN_BLOCK, layout_of, read_packed_config
from quantkit.packing import pack, packed_words, unpack
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

WIDTHS = (2, 3, 4, 8)
_WORD = 32
_FILE = "quantize_config.json"


class GPTQCheckpoint:
    """The tensors of a layer of N rows and K columns in G groups: version 1.

    ``qweight`` int32 [K·b/32, N], codes packed along K; ``qzeros`` int32 [G, N·b/32], zero points minus one (modulo
    2^b) packed along N; ``scales`` [G, N]; ``g_idx`` int32 [K], the group of each column. All packed low bits first.
    """

    name: ClassVar[str] = "gptq"
    holds_g_idx: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    holds_embeddings: ClassVar[bool] = False
    config_names_layers: ClassVar[bool] = False
    offset: ClassVar[int] = 1
    """What is taken from a zero point before it is stored."""

    def why_not(self, scheme: QuantScheme, shape: tuple[int, int] | None = None) -> str | None:
        """See :class:`quantkit.formats.base.CheckpointFormat`; weight-only, 2, 3, 4 or 8 bits, whole words."""
        if scheme.act_bits is not None:
            return "it keeps activations in floating point: choose a weight-only scheme, or compressed-tensors"
        if scheme.bits not in WIDTHS:
            return f"it holds {', '.join(map(str, WIDTHS))} bits: choose one of them, or compressed-tensors"
        for what, size in zip(("out_features", "in_features"), shape or (), strict=False):
            if size * scheme.bits % _WORD:
                return f"{what}={size} codes of {scheme.bits} bits do not fill words of 32: choose compressed-tensors"
        return None

    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.CheckpointFormat`.

        Raises:
            SchemeError: a scheme or shape that it does not hold.
        """
        reason = self.why_not(q.scheme, (q.out_features, q.in_features))
        if reason is not None:
            raise SchemeError(message(self.name, f"{q.scheme} is not written", reason))
        bits, device = q.scheme.bits, q.codes.device
        # Bytes wrap around below zero, and the mask keeps the field: never across fields.
        stored = (q.zero_point - self.offset) & (q.scheme.levels - 1)
        columns = torch.arange(q.in_features, dtype=torch.int32, device=device)
        # A copy: layers that were solved together share one g_idx, and safetensors writes no tensor twice.
        return {
            "qweight": pack(q.codes, bits).T.contiguous(),
            "qzeros": pack(stored.T.contiguous(), bits),
            "scales": q.scale.T.contiguous(),
            "g_idx": columns // q.scheme.columns_per_group(q.in_features) if q.g_idx is None else q.g_idx.clone(),
        }

    def decode(
        self, where: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """See :class:`quantkit.formats.base.CheckpointFormat`; without ``g_idx`` the groups are contiguous."""
        rows, columns = shape
        reason = scheme.why_not(columns) or self.why_not(scheme, shape)
        if reason is not None:
            raise CheckpointError(f"{where}: {reason}")
        bits, groups = scheme.bits, scheme.num_groups(columns)
        check_tensor(f"{where}.qweight", tensors.get("qweight"), [packed_words(columns, bits), rows], (torch.int32,))
        check_tensor(f"{where}.qzeros", tensors.get("qzeros"), [groups, packed_words(rows, bits)], (torch.int32,))
        check_tensor(f"{where}.scales", tensors.get("scales"), [groups, rows], FLOATS)
        check_scale(f"{where}.scales", tensors["scales"])
        stored = unpack(tensors["qzeros"], bits, rows)
        zero_point = ((stored + self.offset) & (scheme.levels - 1)).T.contiguous()
        if scheme.symmetric:
            self._check_symmetric(f"{where}.qzeros", zero_point, scheme)
        g_idx = _g_idx(f"{where}.g_idx", tensors.get("g_idx"), scheme, columns)
        codes = unpack(tensors["qweight"].T.contiguous(), bits, columns)
        return QuantizedTensor(codes, tensors["scales"].T.contiguous(), zero_point, scheme, g_idx)

    def _check_symmetric(self, where: str, zero_point: Tensor, scheme: QuantScheme) -> None:
        other = zero_point[zero_point != scheme.mid]
        if not other.numel():
            return
        shift = int(other[0]) - scheme.mid
        versions = abs(shift) == 1 and bool((zero_point == other[0]).all())
        fix = "checkpoint_format is of the other version: correct it" if versions else 'config.json: write "sym": false'
        what = f"{other.numel()} zero points such as {int(other[0])}, where sym asks for {scheme.mid}"
        raise CheckpointError(message(where, f"holds {what} ({self.name})", fix))

    def write_config(
        self, schemes: Mapping[str, QuantScheme], skipped: tuple[str, ...], *, reordered: bool = False
    ) -> dict[str, Any]:
        """See :class:`quantkit.formats.base.CheckpointFormat`.

        The commonest scheme is that of the config, the others are rules by name (``dynamic``), and so are the layers
        left out; those outside of the decoder blocks are out unless ``lm_head`` says otherwise.
        """
        base = max(schemes.values(), key=lambda scheme: sum(other == scheme for other in schemes.values()))
        head = any(not IN_BLOCK.search(name) and not name.startswith("re:") for name in schemes)
        rules = layer_rules(schemes, base, tuple(n for n in skipped if head or IN_BLOCK.search(n)), _override)
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            **_override(base),
            "desc_act": reordered,
            "lm_head": head,
            "pack_dtype": "int32",
            "true_sequential": False,
            "damp_percent": 0.01,  # read by AutoGPTQ and vLLM's config, and of no effect on a finished checkpoint
        }
        if rules:
            config["dynamic"] = rules
        left_out = [name for name in skipped if IN_BLOCK.search(name)]
        if left_out and not any(name.startswith("re:") for name in schemes):
            # transformers reads no rules by name; it asks for the layers of the blocks that are quantized.
            config["modules_in_block_to_quantize"] = [_in_block_names(schemes, left_out)]
        return config

    def config_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """See :class:`quantkit.formats.base.CheckpointFormat`; what AutoGPTQ and GPTQModel read first."""
        return {_FILE: config}

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


class GPTQv2Checkpoint(GPTQCheckpoint):
    """Version 2: ``qzeros`` holds the zero points as they are; otherwise as version 1."""

    name: ClassVar[str] = "gptq_v2"
    offset: ClassVar[int] = 0


def _override(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "sym": scheme.symmetric,
    }


def _in_block_names(schemes: Mapping[str, QuantScheme], left_out: list[str]) -> list[str]:
    """The quantized layers: by their names within a block where those mean no layer that is left out."""
    full = [name for name in schemes if IN_BLOCK.search(name)]
    local = list(dict.fromkeys(IN_BLOCK.split(name, maxsplit=1)[1] for name in full))
    return full if any(name.endswith(tuple(local)) for name in left_out) else local


def _g_idx(where: str, g_idx: Tensor | None, scheme: QuantScheme, columns: int) -> Tensor | None:
    """The group of each column; None where the groups are contiguous, or not stored."""
    if g_idx is None:
        return None
    check_tensor(where, g_idx, [columns], (torch.int32,))
    size, groups = scheme.columns_per_group(columns), scheme.num_groups(columns)
    if bool((g_idx < 0).any()) or bool((g_idx >= groups).any()):
        what = f"names groups {int(g_idx.min())} to {int(g_idx.max())}"
        raise CheckpointError(message(where, what, f"the layer has groups 0 to {groups - 1}"))
    sequential = torch.arange(columns, dtype=torch.int32, device=g_idx.device) // size
    return None if torch.equal(g_idx, sequential) else g_idx
