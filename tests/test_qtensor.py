"""QuantizedTensor: its invariants, its rows and its digest."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.grid import dequantize, quantize_groups
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme


def make(dtype: torch.dtype = torch.float32, symmetric: bool = False) -> QuantizedTensor:
    """6 x 64 in groups of 16."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    return quantize_groups(weight, QuantScheme(4, 16, symmetric=symmetric), dtype)


def g_idx() -> Tensor:
    return (torch.arange(64) // 16).flip(0).to(torch.int32)


def test_sizes() -> None:
    q = make()
    assert (q.out_features, q.in_features) == (6, 64)
    assert q.g_idx is None


@pytest.mark.parametrize(
    "change",
    [
        {"codes": torch.zeros(6, 64, dtype=torch.int8)},
        {"codes": torch.zeros(6, 64)},
        {"codes": torch.zeros(6 * 64, dtype=torch.uint8)},
        {"codes": torch.zeros(5, 64, dtype=torch.uint8)},
        {"codes": torch.zeros(6, 48, dtype=torch.uint8)},
        {"scale": torch.ones(6, 3)},
        {"scale": torch.ones(4, 6)},
        {"scale": torch.ones(6)},
        {"scale": torch.ones(6, 4, dtype=torch.int32)},
        {"zero_point": torch.zeros(6, 4, dtype=torch.int32)},
        {"zero_point": torch.zeros(6, 1, dtype=torch.uint8)},
        {"zero_point": torch.zeros(6, 4)},
        {"g_idx": torch.zeros(64, dtype=torch.int64)},
        {"g_idx": torch.zeros(6, dtype=torch.int32)},
        {"g_idx": torch.zeros(1, 64, dtype=torch.int32)},
        {"scheme": QuantScheme(4, 32)},
        {"scheme": QuantScheme(4, None)},
    ],
)
def test_contradictions_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(make(), **change)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SchemeError, match="group_size=48"):
        replace(make(), scheme=QuantScheme(4, 48))


def test_frozen_and_compared_by_identity() -> None:
    q = make()
    with pytest.raises(FrozenInstanceError):
        q.codes = q.codes  # type: ignore[misc]
    assert q != make()


@pytest.mark.parametrize("reordered", [False, True])
def test_rows(reordered: bool) -> None:
    q = replace(make(), g_idx=g_idx() if reordered else None)
    part = q.rows(2, 5)
    assert (part.out_features, part.in_features) == (3, 64)
    assert torch.equal(dequantize(part), dequantize(q)[2:5])
    assert part.g_idx is q.g_idx


def test_equal_contents_have_equal_digests() -> None:
    q = make()
    strided = replace(
        q,
        codes=q.codes.T.contiguous().T,
        scale=q.scale.T.contiguous().T,
        zero_point=q.zero_point.T.contiguous().T,
    )
    assert not strided.codes.is_contiguous()
    assert q.digest() == make().digest() == strided.digest()
    assert len(q.digest()) == 64


def test_the_digest_of_one_group_a_row_in_any_stride() -> None:
    """GPTQ per channel makes such a scale, and its run stops here."""
    q = quantize_groups(
        torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), QuantScheme(4, None), torch.float32
    )
    scale = q.scale.reshape(1, 6).T
    assert scale.stride(-1) == 6
    assert replace(q, scale=scale).digest() == q.digest()


def test_the_digest_of_rows_is_that_of_a_copy() -> None:
    part = make().rows(1, 4)
    assert part.digest() == replace(part, codes=part.codes.clone(), scale=part.scale.clone()).digest()


def changed(tensor: Tensor) -> Tensor:
    """A copy with the smallest change in its last element."""
    copy = tensor.clone()
    raw = copy.view(torch.uint8)
    raw[-1, -raw.shape[1] // copy.shape[1]] ^= 1
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_change_changes_the_digest(dtype: torch.dtype) -> None:
    q = make(dtype)
    others = [
        replace(q, codes=changed(q.codes)),
        replace(q, scale=changed(q.scale)),
        replace(q, zero_point=changed(q.zero_point)),
        replace(q, scheme=QuantScheme(4, 16, symmetric=True)),
        replace(q, scheme=QuantScheme(5, 16, symmetric=False)),
        replace(q, g_idx=g_idx()),
        replace(q, g_idx=g_idx().flip(0)),
        q.rows(0, 5),
        QuantizedTensor(q.codes.reshape(12, 32), q.scale.reshape(12, 2), q.zero_point.reshape(12, 2), q.scheme),
    ]
    digests = {q.digest(), *(other.digest() for other in others)}
    assert len(digests) == 1 + len(others)


def test_the_scale_dtype_is_part_of_the_digest() -> None:
    q = make()
    scale = torch.ones_like(q.scale)
    assert replace(q, scale=scale).digest() != replace(q, scale=scale.bfloat16()).digest()


def static(act_scale: float | None = 0.5, *, act_static: bool = True) -> QuantizedTensor:
    """6 x 8, one scale a row, with 8-bit activations."""
    codes = torch.arange(48, dtype=torch.uint8).view(6, 8)
    scheme = QuantScheme(8, None, act_bits=8, act_static=act_static)
    zero_point = torch.full((6, 1), 128, dtype=torch.uint8)
    return QuantizedTensor(codes, torch.ones(6, 1), zero_point, scheme, act_scale=act_scale)


def test_static_activations_have_a_scale_and_no_others() -> None:
    assert static().rows(2, 4).act_scale == 0.5
    for act_scale, act_static in ((None, True), (0.5, False)):
        with pytest.raises(ValueError, match="static activations have one"):
            static(act_scale, act_static=act_static)
    with pytest.raises(ValueError, match="static activations have one"):
        replace(make(), act_scale=0.5)


@pytest.mark.parametrize("act_scale", [0.0, -1.0, float("inf"), float("nan"), 0.1, 1e-60])
def test_an_activation_scale_is_a_positive_float32(act_scale: float) -> None:
    """0.1 is no float32 number: it would come back from a tensor as 0.10000000149."""
    with pytest.raises(ValueError, match="act_scale must be positive, finite and a float32 number"):
        static(act_scale)


def test_the_digest_covers_the_activations() -> None:
    digests = {static(0.5).digest(), static(0.25).digest(), static(None, act_static=False).digest()}
    weight_only = replace(static(None, act_static=False), scheme=QuantScheme(8, None))
    assert len(digests | {weight_only.digest()}) == 4
    assert static().digest() == static().digest()
