"""The Triton kernels: on the GPU where there is one, else in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import assert_same, error_ratio, exact_weight, random_weight, weights
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels import LinearSpec, TritonBackend, choose_backend
from quantkit.linear import QuantLinear
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

pytest.importorskip("triton")
from quantkit.kernels import triton_check, triton_launch
from quantkit.kernels.planes import pack_scale, pack_words, pack_zeros
from quantkit.kernels.tiles import MOST_TOKENS, choose_tile, kernel_group, num_counters
from quantkit.kernels.triton_op import planes_linear

BACKEND = TritonBackend()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F16, BF16 = torch.float16, torch.bfloat16


def normal(*shape: int, dtype: torch.dtype, mean: float = 0.0, seed: int = 1) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


def moved(q: QuantizedTensor) -> QuantizedTensor:
    g_idx = None if q.g_idx is None else q.g_idx.to(DEVICE)
    return QuantizedTensor(q.codes.to(DEVICE), q.scale.to(DEVICE), q.zero_point.to(DEVICE), q.scheme, g_idx)


def product(q: QuantizedTensor, x: Tensor) -> Tensor:
    there = moved(q)
    spec = LinearSpec.of(there, x.dtype)
    return BACKEND.matmul(x.to(DEVICE), BACKEND.prepack(there, spec), spec).cpu()


def direct(q: QuantizedTensor, x: Tensor, *, splits: int, magic: int, bias: Tensor | None = None) -> Tensor:
    """The kernel with a choice of splits and form, which the operator makes itself."""
    there, bits, group = moved(q), q.scheme.bits, kernel_group(q.scheme.group_size)
    groups = there.scale.shape[1]
    words = pack_words(there.codes, bits)
    counters = torch.zeros(num_counters(len(words)), dtype=torch.int32, device=DEVICE)
    y = triton_launch.matvec(
        x.to(DEVICE),
        words,
        pack_scale(there.scale, bits, 1, groups),
        None if q.scheme.symmetric else pack_zeros(there.zero_point, bits, 1, groups),
        None if bias is None else bias.to(DEVICE),
        counters,
        bits=bits,
        group=group,
        out_features=q.out_features,
        tile=choose_tile(len(x), q.in_features, bits, group),
        splits=splits,
        magic=magic,
    )
    assert not counters.any()
    return y.cpu()


ANY = weights(
    st.builds(QuantScheme, st.integers(2, 8), st.sampled_from((None, 32, 64, 96, 128, 256)), symmetric=st.booleans()),
    out_features=st.integers(1, 150),
    groups=st.integers(1, 3),
    channel_columns=st.integers(1, 200),
    act_order=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(ANY, st.sampled_from((F16, BF16)))
def test_unpack_undoes_prepack(q: QuantizedTensor, dtype: torch.dtype) -> None:
    there = moved(q)
    spec = LinearSpec.of(there, dtype)
    back = BACKEND.unpack(BACKEND.prepack(there, spec), spec)
    assert_same(back, there)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ANY, st.sampled_from((F16, BF16)), st.integers(1, 20), st.sampled_from((0.0, 1.0)))
def test_any_shape_and_scheme(q: QuantizedTensor, dtype: torch.dtype, tokens: int, mean: float) -> None:
    """Few elements, so the bound is on each: a rounding of the result, and one of float32 of all that is summed.

    With bfloat16 that includes the codes' offset, 128 or 256, which goes out by subtraction. A wrong code is 0.01.
    """
    x = normal(tokens, q.in_features, dtype=dtype, mean=mean)
    exact = x.double() @ exact_weight(q).T
    index = torch.arange(q.in_features) // q.scheme.columns_per_group(q.in_features) if q.g_idx is None else q.g_idx
    largest = (256 if dtype == BF16 else 0) + q.scheme.levels
    summed = x.double().abs() @ (q.scale.double().abs()[:, index.long()] * largest).T
    bound = exact.abs() * torch.finfo(dtype).eps + summed * 2.0**-24 + 2.0**-24
    assert bool(((product(q, x).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(4, 128),
        QuantScheme(4, 64, symmetric=False),
        QuantScheme(8, None),
        QuantScheme(8, 128, symmetric=False),
        QuantScheme(3, 32),
        QuantScheme(3, 64, symmetric=False),
        QuantScheme(2, 128, symmetric=False),
    ],
    ids=str,
)
def test_error_is_at_most_twice_torchs_own(scheme: QuantScheme, tokens: int, dtype: torch.dtype) -> None:
    q = random_weight(scheme, 150, 384, dtype=dtype)
    x = normal(tokens, 384, dtype=dtype, mean=0.5)
    assert error_ratio(product(q, x), x, q) <= 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, 128), QuantScheme(8, None), QuantScheme(3, 128), QuantScheme(2, 64)], ids=str
)
def test_the_safe_form_of_float16(scheme: QuantScheme, symmetric: bool) -> None:
    q = random_weight(QuantScheme(scheme.bits, scheme.group_size, symmetric=symmetric), 150, 256, dtype=F16)
    x = normal(3, 256, dtype=F16)
    y = direct(q, x, splits=1, magic=triton_launch.MAGIC_FLOAT16)
    assert error_ratio(y, x, q) <= 2


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_splits_of_k_and_bias(splits: int) -> None:
    """Also with a number of trips that the splits do not divide; and twice, for the same bits."""
    q = random_weight(QuantScheme(4, 128, symmetric=False), 70, 5 * 128, dtype=F16)
    x, bias = normal(3, 640, dtype=F16), normal(70, dtype=F16, seed=2)
    y = direct(q, x, splits=splits, magic=triton_launch.SUBNORMAL, bias=bias)
    exact = x.double() @ exact_weight(q).T + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)
    assert torch.equal(y, direct(q, x, splits=splits, magic=triton_launch.SUBNORMAL, bias=bias))


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("tokens", [1, 16, 33, 65])
def test_the_bias_is_added_before_the_result_is_rounded(tokens: int, dtype: torch.dtype) -> None:
    """In each kernel, and above them: closer than a sum of two rounded numbers is, with a bias that counts."""
    q = random_weight(QuantScheme(4, 64, symmetric=False), 150, 192, dtype=dtype)
    x, bias = normal(tokens, 192, dtype=dtype), normal(150, dtype=dtype, seed=2)
    there = moved(q)
    spec = LinearSpec.of(there, dtype)
    y = BACKEND.matmul(x.to(DEVICE), BACKEND.prepack(there, spec), spec, bias.to(DEVICE)).cpu()
    exact = x.double() @ exact_weight(q).T + bias.double()
    torchs = torch.nn.functional.linear(x, exact_weight(q).to(dtype), bias).double()
    assert float((y.double() - exact).norm()) <= 2 * float((torchs - exact).norm())
    if tokens <= MOST_TOKENS:
        twice = (product(q, x) + bias).double()
        assert float((y.double() - exact).norm()) < 0.9 * float((twice - exact).norm())


@pytest.mark.parametrize("scheme", [QuantScheme(4, 64, symmetric=False), QuantScheme(8, None)], ids=str)
def test_many_tokens_go_through_a_dense_tile(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.kernels.triton_op._DENSE_WEIGHTS", 1 << 13)  # several tiles
    q = random_weight(scheme, 150, 128, dtype=BF16)
    x = normal(65, 128, dtype=BF16)
    assert error_ratio(product(q, x), x, q) <= 2


@pytest.mark.parametrize("tokens", [MOST_TOKENS, MOST_TOKENS + 1])
def test_the_weight_is_dense_from_65_rows_on_and_never_all_of_a_large_one(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    dense = triton_launch.dense

    def recorded(*packed: Tensor, **options: Any) -> Tensor:
        made.append((options["rows"][1] - options["rows"][0]) * options["in_features"])
        return dense(*packed, **options)

    limit = 1 << 13
    monkeypatch.setattr("quantkit.kernels.triton_op._DENSE_WEIGHTS", limit)
    monkeypatch.setattr(triton_launch, "dense", recorded)
    q = random_weight(QuantScheme(4, 64), 200, 128, dtype=F16)
    assert error_ratio(product(q, x := normal(tokens, 128, dtype=F16)), x, q) <= 2
    assert MOST_TOKENS == 64
    assert made == ([] if tokens == 64 else [64 * 128] * 3 + [8 * 128])
    assert all(weights <= limit for weights in made)


class TestActivations:
    q = random_weight(QuantScheme(4, 64, symmetric=False), 48, 128, dtype=F16)

    def test_no_tokens(self) -> None:
        assert product(self.q, normal(2, 0, 128, dtype=F16)).shape == (2, 0, 48)

    def test_any_number_of_dimensions(self) -> None:
        x = normal(2, 3, 128, dtype=F16)
        assert torch.equal(product(self.q, x), product(self.q, x.view(6, 128)).view(2, 3, 48))

    def test_any_strides_and_addresses(self) -> None:
        wide = normal(6, 300, dtype=F16)
        for x in (
            wide[:, 3:131],
            wide[:, 0:256:2],
            normal(128, 6, dtype=F16).T,
            normal(2000, dtype=F16)[3:771].view(6, 128),
        ):
            assert torch.equal(product(self.q, x), product(self.q, x.contiguous().clone()))


def test_the_operator_keeps_torchs_contract() -> None:
    """Schema, fake implementation, tracing with free shapes: what torch.compile and CUDA graphs rely on."""
    q = moved(random_weight(QuantScheme(4, 64, symmetric=False), 48, 128, dtype=F16, act_order=True))
    packed = BACKEND.prepack(q, LinearSpec.of(q, F16))
    x = normal(3, 128, dtype=F16).to(DEVICE)
    args = (x, packed["words"], packed["scale"], packed["zeros"], packed["order"], x.new_ones(48), packed["counters"])
    torch.library.opcheck(planes_linear, (*args, 4, 64, 48))


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_block_has_a_counter(bits: int) -> None:
    for tokens in range(1, MOST_TOKENS + 1):
        for in_features in (64, 128):
            tile = choose_tile(tokens, in_features, bits, 0)
            for units in (1, 2, 3, 7):
                blocks = -(-units * 16 // tile.rows) * -(-tokens // tile.tokens)
                assert blocks <= num_counters(units)


def test_groups_of_unequal_sizes_are_left_to_the_reference() -> None:
    q = random_weight(QuantScheme(4, 64), 16, 128, dtype=F16)
    g_idx = torch.zeros(128, dtype=torch.int32)
    uneven = QuantizedTensor(q.codes, q.scale, q.zero_point, q.scheme, g_idx)
    spec = LinearSpec.of(uneven, F16)
    assert "some groups more columns than others" in (BACKEND._why_not_layer(spec) or "")
    assert choose_backend(spec).name == "reference"
    with pytest.raises(KernelError, match="triton refuses a g_idx that gives some groups more columns than others"):
        choose_backend(replace(spec, device_type="cuda"), "triton")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LinearSpec(128, 64, QuantScheme(4, 64), F16, "cpu"), "runs on cuda"),
        (LinearSpec(128, 64, QuantScheme(4, 64), torch.float32, "cuda"), "float16 and bfloat16"),
        (LinearSpec(80, 64, QuantScheme(4, 80), F16, "cuda"), "groups of 80 columns; it takes multiples of 32"),
        (LinearSpec(100, 64, QuantScheme(4, 64), F16, "cuda"), "not a multiple of group_size=64"),
        (LinearSpec(128, 64, QuantScheme(8, None, act_bits=8), F16, "cuda"), "quantized activations"),
        (LinearSpec(0, 64, QuantScheme(8, None), F16, "cuda"), "at least one row"),
        (LinearSpec(1 << 17, 1 << 16, QuantScheme(4, 64), F16, "cuda"), "32-bit integers"),
    ],
)
def test_why_not(spec: LinearSpec, reason: str) -> None:
    assert reason in str(BACKEND.why_not(spec))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_why_not_without_a_gpu() -> None:
    spec = LinearSpec(128, 64, QuantScheme(4, 64), F16, "cuda")
    assert BACKEND.why_not(spec) == "this machine, where torch finds no CUDA device"


class TestSelfCheck:
    """On this device, through the functions behind magic_for, which asks no CPU."""

    @pytest.mark.parametrize("dtype", [F16, BF16])
    def test_right_kernels_pass(self, dtype: torch.dtype) -> None:
        assert triton_check._tested.__wrapped__(DEVICE, dtype, 4, 64, 256, False) == triton_check._FORMS[dtype][0]

    def test_a_lost_subnormal_is_found_and_the_safe_form_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        matvec = triton_launch.matvec

        def losing(x: Tensor, words: Tensor, *rest: Tensor, magic: int, **options: int) -> Tensor:
            words = torch.zeros_like(words) if magic == triton_launch.SUBNORMAL else words
            return matvec(x, words, *rest, magic=magic, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(triton_launch, "matvec", losing)
        with pytest.warns(UserWarning, match="lose float16 subnormals; a slower form"):
            form = triton_check._tested.__wrapped__(DEVICE, F16, 4, 64, 256, True)
        assert form == triton_launch.MAGIC_FLOAT16

    def test_wrong_kernels_stop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_check, "_is_right", lambda *_: False)
        with pytest.raises(KernelError, match=r"4-bit weights with \[1, 16, 20\] rows.*backend='reference'"):
            triton_check._tested.__wrapped__(DEVICE, F16, 4, 64, 256, True)


@pytest.mark.gpu
class TestOnAGpu:
    def test_a_layer_goes_there_and_back(self) -> None:
        q = random_weight(QuantScheme(4, 128), 256, 512, dtype=F16)
        layer = QuantLinear(q, dtype=F16).to("cuda")
        assert layer.backend == "triton"
        x = normal(3, 512, dtype=F16)
        assert error_ratio(layer(x.cuda()).cpu(), x, q) <= 2
        assert_same(layer.cpu().quantized(), q)

    def test_compiled_without_a_break_and_for_any_number_of_rows(self) -> None:
        layer = QuantLinear(random_weight(QuantScheme(4, 128), 256, 512, dtype=F16), dtype=F16).to("cuda")
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for tokens in (2, 16, 33, 70):
            x = normal(tokens, 512, dtype=F16).cuda()
            assert torch.equal(compiled(x), layer(x))

    def test_in_a_cuda_graph(self) -> None:
        layer = QuantLinear(random_weight(QuantScheme(4, 128), 256, 4096, dtype=F16), dtype=F16).to("cuda")
        x = normal(1, 4096, dtype=F16).cuda()
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)
