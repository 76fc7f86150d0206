"""The product of bytes without oneDNN's: exact on every processor, whichever this one would choose."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.kernels.byte_product import MOST_COLUMNS, byte_product, pack_bytes, unpack_bytes
from quantkit.kernels.jit_targets import available


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def plain(signed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight_packed": signed}


def without_onednn(signed: torch.Tensor) -> dict[str, torch.Tensor]:
    """In panels where the kernels run here and 4 divides the columns, else plain."""
    with patch("quantkit.kernels.byte_product.onednn_is_exact", lambda: False):
        return pack_bytes(signed)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 2100))
def test_sums_are_exact(tokens: int, out_features: int, in_features: int) -> None:
    """Up to 4 rows by one route and more by the other; one block of columns, or three; and in panels."""
    codes, signed = random_bytes(tokens, in_features), random_bytes(out_features, in_features)
    scale = torch.rand(out_features)
    exact = (codes.long() @ signed.long().T).float() * scale
    for pack in (plain, without_onednn, pack_bytes):
        packed = pack(signed)
        assert torch.equal(byte_product(codes.float(), packed, scale), exact)
        assert torch.equal(unpack_bytes(packed, out_features), signed)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("columns", [1023, 1024, 40000, MOST_COLUMNS])
@pytest.mark.parametrize(("code", "weight"), [(-128, -128), (127, -128), (-128, 127)])
def test_the_largest_sums(tokens: int, columns: int, code: int, weight: int) -> None:
    signed = torch.full((3, columns), weight, dtype=torch.int8)
    for pack in (plain, without_onednn):
        found = byte_product(torch.full((tokens, columns), code), pack(signed), torch.ones(3))
        assert found.tolist() == torch.full((tokens, 3), float(code * weight * columns)).tolist()


@pytest.mark.skipif(not available(), reason="no llvmlite, or no kernels for this CPU")
@pytest.mark.parametrize(
    ("columns", "parts"),
    [(4, 1), (576, 1), (1024, 1), (1536, 2), (4096, 4), (11008, 16), (14336, 14), (7, 0), (1028, 0)],
)
def test_panels_fall_into_parts_whose_sums_float32_holds(columns: int, parts: int) -> None:
    packed = without_onednn(random_bytes(20, columns))
    assert ("words" in packed) == bool(parts)
    assert len(packed.get("words", ())) == parts


def test_rows_in_several_blocks() -> None:
    codes, signed = random_bytes(6, 3000), random_bytes(2000, 3000)
    exact = (codes.double() @ signed.double().T).float()
    assert torch.equal(byte_product(codes, plain(signed), torch.ones(2000)), exact)
