"""Whether a quantized layer can be cut into the shards of tensor parallelism, as vLLM and SGLang cut it.

Attention's and the MLP's last layers are cut along their inputs (row parallel: each shard has K/n columns), all others
along their outputs (column parallel: N/n rows). A cut must fall between groups, and between words of what is packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantkit.findings import Finding
from quantkit.scheme import QuantScheme
from quantkit.skeleton import LinearInfo
from quantkit.structure import find_heads

ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "dense", "dense_4h_to_h", "wo", "w2")
_WORD = 32
_AWQ_COLUMNS = 8


def check_heads(config: Any, shards: int) -> Iterator[Finding]:
    """Whole heads in every shard; key and value heads may also be held by several."""
    heads = find_heads(config)
    where = f"--tensor-parallel {shards}"
    if heads.query % shards:
        yield Finding("shards", "error", where, f"{heads.query} attention heads do not divide", "choose a divisor")
    if heads.value % shards and shards % heads.value:
        yield Finding("shards", "error", where, f"{heads.value} key and value heads do not divide", "choose a divisor")


def why_not_cut(info: LinearInfo, scheme: QuantScheme, layout: str, reordered: bool, shards: int) -> str | None:
    """Why a layer cannot be cut into so many shards; None when it can.

    Args:
        info: the layer.
        scheme: its grid.
        layout: ``pack-quantized``, ``int-quantized``, ``gptq``, ``gptq_v2`` or ``awq``.
        reordered: whether its groups are not in the order of its columns.
        shards: how many.
    """
    if shards == 1:
        return None
    if info.local.rpartition(".")[2] in ROW_PARALLEL:
        return _why_not_rows(info.in_features, scheme, layout, reordered, shards)
    return _why_not_columns(info.out_features, scheme, layout, shards)


def _why_not_rows(size: int, scheme: QuantScheme, layout: str, reordered: bool, shards: int) -> str | None:
    part, rest = divmod(size, shards)
    if rest:
        return f"in_features={size} in {shards} shards do not divide"
    if scheme.group_size is not None and part % scheme.group_size:
        return f"a shard has {part} of in_features={size}, which is no multiple of group_size={scheme.group_size}"
    if layout not in ("awq", "int-quantized") and part * scheme.bits % _WORD:
        return f"a shard has {part} of in_features={size}, and its {scheme.bits}-bit codes do not end with a word"
    if reordered:
        return "its groups are not in the order of its columns (g_idx), so that a shard needs scales of all groups"
    return None


def _why_not_columns(size: int, scheme: QuantScheme, layout: str, shards: int) -> str | None:
    part, rest = divmod(size, shards)
    if rest:
        return f"out_features={size} in {shards} shards do not divide"
    if layout == "awq" and part % _AWQ_COLUMNS:
        return f"a shard has {part} of out_features={size}, and AWQ packs {_AWQ_COLUMNS} in a word"
    packed_zeros = layout in ("gptq", "gptq_v2") or (layout == "pack-quantized" and not scheme.symmetric)
    if packed_zeros and part * scheme.bits % _WORD:
        return (
            f"a shard has {part} of out_features={size}, and its {scheme.bits}-bit zero points do not end with a word"
        )
    return None
