"""The product of bytes without oneDNN's: exact on every processor, whichever this one would choose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.kernels.byte_product import MOST_COLUMNS, byte_product, pack_bytes, unpack_bytes


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def plain(signed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight_packed": signed}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 2100))
def test_sums_are_exact(tokens: int, out_features: int, in_features: int) -> None:
    """Up to 4 rows by one route and more by the other; one block of columns, or three."""
    codes, signed = random_bytes(tokens, in_features), random_bytes(out_features, in_features)
    scale = torch.rand(out_features)
    exact = (codes.long() @ signed.long().T).float() * scale
    assert torch.equal(byte_product(codes.float(), plain(signed), scale), exact)
    assert torch.equal(unpack_bytes(pack_bytes(signed)), signed)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("columns", [1023, 1024, 40000, MOST_COLUMNS])
@pytest.mark.parametrize(("code", "weight"), [(-128, -128), (127, -128), (-128, 127)])
def test_the_largest_sums(tokens: int, columns: int, code: int, weight: int) -> None:
    signed = torch.full((3, columns), weight, dtype=torch.int8)
    found = byte_product(torch.full((tokens, columns), code), plain(signed), torch.ones(3))
    assert found.tolist() == torch.full((tokens, 3), float(code * weight * columns)).tolist()


def test_rows_in_several_blocks() -> None:
    codes, signed = random_bytes(6, 3000), random_bytes(2000, 3000)
    exact = (codes.double() @ signed.double().T).float()
    assert torch.equal(byte_product(codes, plain(signed), torch.ones(2000)), exact)
