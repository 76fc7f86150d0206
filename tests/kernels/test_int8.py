"""The int8 backends: exact integer sums on ragged shapes, and errors that rounding to 8 bits explains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import assert_same, exact_weight, quantized_activations, random_weight, weights
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels import CpuInt8Backend, CudaInt8Backend, LinearSpec, TritonInt8Backend
from quantkit.kernels.byte_product import onednn_is_exact
from quantkit.kernels.jit_targets import available
from quantkit.kernels.triton_int8_backend import int8_linear
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

CPU, CUDA, TRITON = CpuInt8Backend(), CudaInt8Backend(), TritonInt8Backend()
Backend = CpuInt8Backend | CudaInt8Backend | TritonInt8Backend
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of TRITON: its interpreter, without a GPU
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
W8A8 = QuantScheme(8, None, act_bits=8)
STATIC = QuantScheme(8, None, act_bits=8, act_static=True)
ASYM = QuantScheme(8, None, symmetric=False, act_bits=8)

SCHEMES = st.builds(
    lambda bits, symmetric, static: QuantScheme(bits, None, symmetric, act_bits=8, act_static=static),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
)
LAYERS = weights(SCHEMES, out_features=st.integers(1, 70), channel_columns=st.integers(1, 150))
OF_EIGHT = weights(
    SCHEMES,
    out_features=st.integers(1, 9).map(lambda n: 8 * n),
    channel_columns=st.integers(1, 20).map(lambda k: 8 * k),
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(backend: Backend, q: QuantizedTensor, x: Tensor) -> Tensor:
    if backend is TRITON:
        x = x.to(DEVICE)
        q = replace(q, codes=q.codes.to(DEVICE), scale=q.scale.to(DEVICE), zero_point=q.zero_point.to(DEVICE))
        return TRITON.matmul(x, TRITON.prepack(q, LinearSpec.of(q, x.dtype)), LinearSpec.of(q, x.dtype)).cpu()
    spec = LinearSpec.of(q, x.dtype)
    return backend.matmul(x, backend.prepack(q, spec), spec)


def check_product(y: Tensor, x: Tensor, q: QuantizedTensor) -> None:
    """Equal to the integer product in int64 to the rounding of scales in float32, and of y; close to x Wᵀ."""
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], q.out_features)
    codes, scale = quantized_activations(x, q.act_scale)
    middle = codes.long() @ (q.codes.long() - q.scheme.mid).T
    shift = (q.scheme.mid - q.zero_point.long()).T * codes.long().sum(-1, keepdim=True)
    both = scale.double() * q.scale.double().T
    exact = (middle + shift).double() * both
    rounding = 6 * torch.finfo(torch.float32).eps * (middle.abs() + shift.abs()).double() * both.abs()
    own = torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).tiny
    error = (y.double() - exact).abs()
    assert bool((error <= rounding + own + _subnormal(y.dtype)).all())
    if q.act_scale is None:
        dense = x.double() @ exact_weight(q).T
        half_steps = 0.5001 * scale.double() * exact_weight(q).abs().sum(-1)
        assert bool(((y.double() - dense).abs() <= half_steps + rounding + own + _subnormal(y.dtype)).all())


def _subnormal(dtype: torch.dtype) -> float:
    return 2.0**-24 if dtype == torch.float16 else 0.0


@pytest.mark.parametrize("onednn", [None, False], ids=["as_here", "without_onednn"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_compiled_product(tokens: int, onednn: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, the same numbers: traced, oneDNN's layout must not be taken for plain bytes."""
    if onednn is not None:
        monkeypatch.setattr("quantkit.kernels.byte_product.onednn_is_exact", lambda: onednn)
    q = random_weight(W8A8, 64, 64, dtype=torch.bfloat16)
    spec, x = LinearSpec.of(q, torch.bfloat16), normal(3, tokens, 64).bfloat16()
    packed = CPU.prepack(q, spec)
    compiled = torch.compile(lambda x: CPU.matmul(x, packed, spec), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), CPU.matmul(x, packed, spec))


@settings(max_examples=80, deadline=None)
@given(LAYERS)
def test_unpack_undoes_prepack(q: QuantizedTensor) -> None:
    spec = LinearSpec.of(q, torch.float32)
    assert CPU.why_not(spec) is None
    for backend in (CPU, CUDA, TRITON):
        assert_same(backend.unpack(backend.prepack(q, spec), spec), q)


@settings(max_examples=120, deadline=None)
@given(LAYERS, st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 2**20))
def test_ragged_products(q: QuantizedTensor, tokens: int, dtype: torch.dtype, seed: int) -> None:
    """1 to 40 rows; columns and outputs that no vector width divides."""
    assert CPU.why_not(LinearSpec.of(q, dtype)) is None
    x = (normal(seed, tokens, q.in_features) + 0.3).to(dtype)
    check_product(product(CPU, q, x), x, q)


@settings(max_examples=60, deadline=None)
@given(OF_EIGHT, st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 2**20))
def test_the_cuda_backends_arithmetic_on_the_cpu(
    q: QuantizedTensor, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    """torch._int_mm is the same function there; rows below 17 are padded as the GPU asks."""
    assert CUDA.why_not(replace(LinearSpec.of(q, dtype), device_type="cuda")) is None
    x = (normal(seed, tokens, q.in_features) + 0.3).to(dtype)
    check_product(product(CUDA, q, x), x, q)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LAYERS, st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 2**20))
def test_the_triton_kernels(q: QuantizedTensor, tokens: int, dtype: torch.dtype, seed: int) -> None:
    assert TRITON.why_not(LinearSpec.of(q, dtype)) == "the device cpu; it runs on cuda"
    x = (normal(seed, tokens, q.in_features) + 0.3).to(dtype)
    check_product(product(TRITON, q, x), x, q)


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("scheme", [W8A8, STATIC, ASYM], ids=str)
def test_the_triton_kernels_on_a_larger_layer(scheme: QuantScheme, tokens: int) -> None:
    """Several blocks of rows and of tokens, and splits of 2 and 3 trips."""
    q = random_weight(scheme, 150, 5 * 128 - 3)
    x = normal(tokens, tokens, q.in_features).bfloat16()
    check_product(product(TRITON, q, x), x, q)


@pytest.mark.parametrize("scheme", [W8A8, STATIC, ASYM], ids=str)
def test_the_triton_kernels_add_the_bias_in_float32(scheme: QuantScheme) -> None:
    """Over splits of K too: added once."""
    q = random_weight(scheme, 70, 3 * 128)
    x, bias = normal(0, 3, q.in_features), normal(1, 70)
    spec = LinearSpec.of(q, torch.float32)
    packed = TRITON.prepack(q, spec)
    moved = {name: tensor.to(DEVICE) for name, tensor in packed.items()}
    plain, with_bias = (TRITON.matmul(x.to(DEVICE), moved, spec, b).cpu() for b in (None, bias.to(DEVICE)))
    assert torch.equal(with_bias, plain + bias)


def test_the_triton_kernels_round_half_to_even_and_clamp() -> None:
    from quantkit.kernels.triton_int8_launch import round_activations

    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 200.0, -128.5, -200.0, float("inf"), -float("inf")]])
    codes, scales, sums = round_activations(x.to(DEVICE), torch.ones(1, device=DEVICE), 128)
    assert codes[0, :12].tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, 127, -128]
    assert not codes[0, 12:].any()
    assert (scales.tolist(), sums.tolist()) == ([1.0], [int(codes.sum())])


def test_the_triton_operator_keeps_torchs_contract() -> None:
    q = random_weight(ASYM, 40, 100, dtype=torch.float16)
    q = replace(q, codes=q.codes.to(DEVICE), scale=q.scale.to(DEVICE), zero_point=q.zero_point.to(DEVICE))
    packed = TRITON.prepack(q, LinearSpec.of(q, torch.float16))
    x = normal(0, 3, 100).half().to(DEVICE)
    names = ("weight_packed", "row_scale", "row_offset")
    torch.library.opcheck(int8_linear, (x, *(packed[name] for name in names), None, x.new_ones(40), packed["counters"]))


@pytest.mark.parametrize("tokens", [1, 2, 17, 128])
@pytest.mark.parametrize("scheme", [W8A8, STATIC, ASYM], ids=str)
def test_a_real_layer(scheme: QuantScheme, tokens: int) -> None:
    q = random_weight(scheme, 1537, 577)
    x = normal(tokens, 3, tokens, 577).bfloat16()
    check_product(product(CPU, q, x), x, q)


@pytest.mark.parametrize("columns", [64, 4096, 40000, CPU_COLUMNS := (1 << 17) - 1])
@pytest.mark.parametrize(("code", "sign"), [(0, 1.0), (0, -1.0), (255, 1.0), (255, -1.0)])
def test_the_largest_sums_do_not_overflow(columns: int, code: int, sign: float) -> None:
    """All codes at their extremes: 128 * 128 * 131071 is the last that an int32 holds."""
    codes = torch.full((17, columns), code, dtype=torch.uint8)
    q = QuantizedTensor(codes, torch.ones(17, 1), torch.full((17, 1), 128, dtype=torch.uint8), STATIC, act_scale=1.0)
    x = torch.full((2, columns), 200.0 * sign)
    exact = float((code - 128) * (127 if sign > 0 else -128) * columns)
    found = product(CPU, q, x)
    assert found.tolist() == torch.full((2, 17), exact).tolist()  # rounded once to float32
    assert bool((product(CUDA, q, x) == found).all())


@pytest.mark.parametrize("backend", [CPU, CUDA, TRITON], ids=lambda b: b.name)
@pytest.mark.parametrize("scheme", [W8A8, STATIC, ASYM], ids=str)
def test_what_is_not_finite_reaches_the_output_of_its_token(backend: Backend, scheme: QuantScheme) -> None:
    q = random_weight(scheme, 16, 24)
    x = normal(0, 3, 24)
    x[1, 5] = float("nan")
    y = product(backend, q, x)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())
    assert bool(torch.equal(y[[0, 2]], product(backend, q, x[[0, 2]])))


@pytest.mark.parametrize("backend", [CPU, CUDA, TRITON], ids=lambda b: b.name)
def test_no_tokens_and_any_strides(backend: Backend) -> None:
    q = random_weight(ASYM, 16, 24)
    assert product(backend, q, torch.zeros(2, 0, 24)).shape == (2, 0, 16)
    x = normal(1, 24, 5, 2).permute(2, 1, 0)
    torch.testing.assert_close(product(backend, q, x), product(backend, q, x.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_type": "cuda"}, "the device cuda"),
        ({"scheme": QuantScheme(8, None)}, "activations in floating point"),
        ({"scheme": QuantScheme(8, 32, act_bits=8)}, "groups of 32 columns"),
        ({"dtype": torch.float64}, "activations of torch.float64"),
        ({"has_g_idx": True}, "a g_idx"),
        ({"in_features": 1 << 17}, "1 to 131071 columns"),
        ({"out_features": 0}, "at least one row"),
    ],
)
def test_why_not_on_the_cpu(change: dict[str, object], reason: str) -> None:
    spec = LinearSpec(96, 40, W8A8, torch.bfloat16, "cpu")
    assert CPU.why_not(spec) is None
    assert reason in str(CPU.why_not(replace(spec, **change)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_type": "cpu"}, "the device cpu"),
        ({"in_features": 100}, "in_features=100; torch._int_mm takes multiples of 8"),
        ({"out_features": 41}, "out_features=41"),
        ({"scheme": QuantScheme(8, 32, act_bits=8)}, "groups of 32 columns"),
    ],
)
def test_why_not_on_cuda(change: dict[str, object], reason: str) -> None:
    spec = LinearSpec(96, 40, W8A8, torch.bfloat16, "cuda")
    assert CUDA.why_not(spec) is None
    assert reason in str(CUDA.why_not(replace(spec, **change)))  # type: ignore[arg-type]


def test_one_group_as_wide_as_the_row_is_a_channel() -> None:
    q = random_weight(QuantScheme(8, 96, act_bits=8), 7, 96)
    assert CPU.why_not(LinearSpec.of(q, torch.float32)) is None
    x = normal(3, 5, 96)
    check_product(product(CPU, q, x), x, q)


def test_prepack_refuses_another_layers_weight() -> None:
    q = random_weight(W8A8, 8, 16)
    for backend in (CPU, CUDA, TRITON):
        with pytest.raises(KernelError, match="give the weight of"):
            backend.prepack(q, LinearSpec.of(random_weight(STATIC, 8, 16), torch.float32))


def test_packed_bytes() -> None:
    """Triton's rows are as long as its tiles, its scales are in float32 too, and it counts the parts of a sum."""
    q = random_weight(STATIC, 64, 96)
    plain = {"weight_packed": 64 * 96, "scale": 2 * 64, "act_scale": 4}
    tiled = {**plain, "weight_packed": 64 * 128, "row_scale": 4 * 64, "counters": 2 * 4}
    panels = {"words": 64 * 96, "panel_scale": 4 * 64, "scale": 2 * 64, "act_scale": 4}
    on_cpu = plain if onednn_is_exact() or not available() else panels
    for backend, expected in ((CPU, on_cpu), (CUDA, plain), (TRITON, tiled)):
        packed = backend.prepack(q, LinearSpec.of(q, torch.bfloat16))
        packed.pop("call", None)
        size = {n.replace("onednn", "packed"): t.numel() * t.element_size() for n, t in packed.items()}
        assert size == expected
