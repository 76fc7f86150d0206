"""Cuts of tensor parallelism."""

from __future__ import annotations

import pytest

from quantkit.scheme import parse_scheme
from quantkit.sharding import why_not_cut
from quantkit.skeleton import LinearInfo


def layer(local: str, rows: int, columns: int) -> LinearInfo:
    return LinearInfo(f"m.0.{local}", local, f"m.0.{local}", rows, columns, False, 0, False)


CASES = [
    ("mlp.down_proj", 4096, 11008, "w4a16_g128", "pack-quantized", 2, None),
    ("mlp.down_proj", 4096, 11008, "w4a16_g128", "pack-quantized", 4, "no multiple of group_size=128"),
    ("mlp.down_proj", 4096, 11008, "w4a16_g128", "pack-quantized", 3, "do not divide"),
    ("mlp.down_proj", 4096, 11008, "w4a16_channel", "pack-quantized", 4, None),
    ("mlp.down_proj", 4096, 100, "w4a16_channel", "pack-quantized", 4, "do not end with a word"),
    ("mlp.down_proj", 4096, 100, "w8a8", "int-quantized", 4, None),
    ("mlp.up_proj", 11008, 4096, "w4a16_g128", "awq", 8, None),
    ("mlp.up_proj", 11008 + 4, 4096, "w4a16_g128_asym", "awq", 1, None),
    ("mlp.up_proj", 24, 4096, "w4a16_g128_asym", "awq", 2, "AWQ packs 8 in a word"),
    ("mlp.up_proj", 24, 4096, "w4a16_g128_asym", "pack-quantized", 2, "zero points do not end with a word"),
    ("mlp.up_proj", 24, 4096, "w4a16_g128", "pack-quantized", 2, None),
    ("mlp.up_proj", 24, 4096, "w4a16_g128", "gptq", 2, "zero points do not end with a word"),
]


@pytest.mark.parametrize(("local", "rows", "columns", "scheme", "layout", "shards", "said"), CASES)
def test_cuts(local: str, rows: int, columns: int, scheme: str, layout: str, shards: int, said: str | None) -> None:
    reason = why_not_cut(layer(local, rows, columns), parse_scheme(scheme), layout, False, shards)
    assert reason is None if said is None else said in (reason or "")


def test_reordered_groups() -> None:
    scheme = parse_scheme("w4a16_g128")
    assert "g_idx" in (why_not_cut(layer("mlp.down_proj", 64, 512), scheme, "gptq", True, 2) or "")
    assert why_not_cut(layer("mlp.up_proj", 512, 512), scheme, "gptq", True, 2) is None
