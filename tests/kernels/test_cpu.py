from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SCALE_DTYPES, assert_same, error_ratio, random_weight, schemes, weights
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels import CpuBackend, LinearSpec, cpu
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

BACKEND = CpuBackend()
BF16 = torch.bfloat16

INT4 = weights(
    schemes(bits=st.integers(2, 4), group_sizes=st.sampled_from((None, 32, 64, 96, 128, 256, 384))),
    out_features=st.integers(1, 14).map(lambda n: 16 * n),
    groups=st.integers(1, 3),
    channel_columns=st.integers(1, 9).map(lambda n: 32 * n),
)
INT8 = weights(
    schemes(bits=st.integers(5, 8), group_sizes=st.none(), symmetric=st.just(True)),
    out_features=st.integers(1, 200),
    channel_columns=st.integers(1, 20).map(lambda n: 16 * n),
)


def normal(*shape: int, mean: float = 0, seed: int = 1) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(BF16)


def product(q: QuantizedTensor, x: Tensor) -> Tensor:
    spec = LinearSpec.of(q, BF16)
    assert BACKEND.why_not(spec) is None
    return BACKEND.matmul(x, BACKEND.prepack(q, spec), spec)


@settings(max_examples=60, deadline=None)
@given(st.one_of(INT4, INT8))
def test_unpack_undoes_prepack(q: QuantizedTensor) -> None:
    spec = LinearSpec.of(q, BF16)
    assert BACKEND.why_not(spec) is None
    assert_same(BACKEND.unpack(BACKEND.prepack(q, spec), spec), q)


@settings(max_examples=40, deadline=None)
@given(st.one_of(INT4, INT8), st.integers(1, 9), st.sampled_from([0.0, 1.0, 10.0]))
def test_error_is_at_most_twice_torchs_own(q: QuantizedTensor, tokens: int, mean: float) -> None:
    """Of the weight that the operator reads: for 8 bits with bfloat16 scales (more in test_error_of_a_real_layer)."""
    spec = LinearSpec.of(q, BF16)
    packed = BACKEND.prepack(q, spec)
    # One product has too few elements for a ratio of errors to mean something, so there are many of them.
    x = normal(2 + 1024 // (tokens * q.out_features), tokens, q.in_features, mean=mean)
    y = torch.stack([BACKEND.matmul(one, packed, spec) for one in x])
    read = q if q.scheme.bits <= 4 else replace(q, scale=q.scale.bfloat16())
    assert error_ratio(y, x, read) <= 2


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(4, 128),
        QuantScheme(4, 256, symmetric=False),
        QuantScheme(4, None, symmetric=False),
        QuantScheme(8, None),
    ],
    ids=str,
)
def test_error_of_a_real_layer(scheme: QuantScheme, dtype: torch.dtype, mean: float) -> None:
    q = random_weight(scheme, 272, 2048, dtype=dtype)
    x = normal(16, 2048, mean=mean)
    assert error_ratio(product(q, x), x, q) <= 2


def test_zero_points_that_bfloat16_does_not_hold() -> None:
    """(8 - 13) * scale has up to 11 significant bits: bfloat16 loses three, and a mean of x adds them up."""
    q = random_weight(QuantScheme(4, 256, symmetric=False), 64, 1024)
    # Weights of -2 and +2 scales, so that the product is small and torch's dense weight exact.
    codes = torch.where(torch.arange(1024) % 2 == 0, 11, 15).to(torch.uint8).repeat(64, 1)
    q = QuantizedTensor(codes, q.scale, torch.full_like(q.zero_point, 13), q.scheme)
    x = normal(8, 1024, mean=10)
    assert error_ratio(product(q, x), x, q) <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_that_bfloat16_does_not_hold(dtype: torch.dtype) -> None:
    """What a scale loses must not add up over its group where the weights of the group and x have a mean."""
    scheme, random = QuantScheme(4, 256), torch.Generator().manual_seed(0)
    # Four groups of opposite means and about one scale: the groups cancel in the product, the losses would not.
    up = torch.randint(12, 16, (64, 1024), generator=random)
    codes = torch.where(torch.arange(1024) // 256 % 2 == 0, up, 16 - up).to(torch.uint8)
    scale = 0.015 * (1 + torch.rand(64, 4, generator=random) / 100)
    q = QuantizedTensor(codes, scale.to(dtype), torch.full((64, 4), 8, dtype=torch.uint8), scheme)
    x = normal(8, 1024, mean=100)
    assert error_ratio(product(q, x), x, q) <= 1


@pytest.mark.parametrize("scheme", [QuantScheme(3, 64, symmetric=False), QuantScheme(8, None)], ids=str)
@pytest.mark.parametrize("tokens", [63, 64, 191, 192, 193])
def test_many_tokens_go_through_a_dense_product(scheme: QuantScheme, tokens: int) -> None:
    q = random_weight(scheme, 80, 128)
    x = normal(tokens, 128, mean=1)
    assert error_ratio(product(q, x), x, q) <= 2


def test_blocks_of_rows() -> None:
    q = random_weight(QuantScheme(4, 128, symmetric=False), 1104, 4096)
    spec = LinearSpec.of(q, BF16)
    packed = BACKEND.prepack(q, spec)
    assert_same(BACKEND.unpack(packed, spec), q)
    for tokens in (2, 200):
        x = normal(tokens, 4096)
        assert error_ratio(BACKEND.matmul(x, packed, spec), x, q) <= 2


@pytest.mark.parametrize("scheme", [QuantScheme(4, 64, symmetric=False), QuantScheme(8, None)], ids=str)
class TestActivations:
    def test_no_tokens(self, scheme: QuantScheme) -> None:
        q = random_weight(scheme, 48, 128)
        assert product(q, normal(0, 128)).shape == (0, 48)
        assert product(q, normal(2, 0, 128)).shape == (2, 0, 48)

    def test_any_number_of_dimensions(self, scheme: QuantScheme) -> None:
        q = random_weight(scheme, 48, 128)
        x = normal(2, 3, 128)
        flat = product(q, x.view(6, 128))
        assert torch.equal(product(q, x), flat.view(2, 3, 48))
        assert torch.equal(product(q, x[0, 0]), product(q, x[0, :1])[0])

    def test_any_strides_and_addresses(self, scheme: QuantScheme) -> None:
        """_weight_int8pack_mm ignores strides, and with an x that is not aligned to 32 bytes the process dies."""
        q = random_weight(scheme, 48, 128)
        wide = normal(6, 300)
        views = [wide[:, :128], wide[:, 3:131], wide[:, 0:256:2], wide[::2, 5:133], normal(128, 6).T]
        views += [normal(2000)[start : start + 768].view(6, 128) for start in (0, 1, 3, 8)]
        for x in views:
            assert torch.equal(product(q, x), product(q, x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LinearSpec(128, 64, QuantScheme(4, 64), BF16, "cuda"), "runs on cpu"),
        (LinearSpec(128, 64, QuantScheme(4, 64), torch.float16, "cpu"), "slow in all but bfloat16"),
        (LinearSpec(128, 64, QuantScheme(4, 64), BF16, "cpu", has_g_idx=True), "g_idx"),
        (LinearSpec(96, 64, QuantScheme(4, 48), BF16, "cpu"), "groups of 48 columns"),
        (LinearSpec(40, 64, QuantScheme(4, None), BF16, "cpu"), "groups of 40 columns"),
        (LinearSpec(128, 40, QuantScheme(4, 64), BF16, "cpu"), "out_features=40"),
        (LinearSpec(100, 64, QuantScheme(4, 64), BF16, "cpu"), "not a multiple of group_size=64"),
        (LinearSpec(1 << 16, 1 << 15, QuantScheme(4, 64), BF16, "cpu"), "weights"),
        (LinearSpec(0, 16, QuantScheme(8, None), BF16, "cpu"), "0 weights"),
        (LinearSpec(40, 64, QuantScheme(8, None), BF16, "cpu"), "in_features=40"),
        (LinearSpec(128, 64, QuantScheme(8, 64), BF16, "cpu"), "one scale per channel"),
        (LinearSpec(128, 64, QuantScheme(8, None, symmetric=False), BF16, "cpu"), "symmetric"),
    ],
)
def test_why_not(spec: LinearSpec, reason: str) -> None:
    assert reason in str(BACKEND.why_not(spec))


def test_prepack_proves_that_it_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_weight(QuantScheme(4, 64), 64, 128)
    order = cpu._int4_row_order
    monkeypatch.setattr(cpu, "_int4_row_order", lambda block: order(block).flip(0))
    with pytest.raises(KernelError, match="layout is not understood"):
        BACKEND.prepack(q, LinearSpec.of(q, BF16))


@pytest.mark.parametrize(
    ("scheme", "dtype", "bits"),
    [
        (QuantScheme(4, 128), BF16, 4 + 32 / 128),
        (QuantScheme(2, 128), BF16, 4 + 32 / 128),
        (QuantScheme(4, 128), torch.float16, 4 + 48 / 128),
        (QuantScheme(4, 128, symmetric=False), BF16, 4 + 56 / 128),
        (QuantScheme(4, None), BF16, 4 + 32 / 256),
        (QuantScheme(8, None), BF16, 8 + 16 / 1024),
    ],
    ids=str,
)
def test_packed_size(scheme: QuantScheme, dtype: torch.dtype, bits: float) -> None:
    q = random_weight(scheme, 64, 1024, dtype=dtype)
    packed = BACKEND.prepack(q, LinearSpec.of(q, BF16))
    assert sum(t.nbytes for t in packed.values()) * 8 / (64 * 1024) == bits
