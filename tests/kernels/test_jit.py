"""The just-in-time CPU kernels: exact packing, products against float64 for any shape, one node for torch.compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import normal
from strategies import assert_same, random_weight
from torch import Tensor
from torch.nn.functional import linear

from quantkit.errors import KernelError
from quantkit.grid import dequantize, quantize_groups
from quantkit.kernels import JitBackend, LinearSpec, jit_amx, jit_dense, jit_op
from quantkit.kernels import jit_backend as module
from quantkit.kernels.jit_targets import VARIABLE, Target, available
from quantkit.kernels.panels import pack_codes, pack_groups, unpack_codes, unpack_groups
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme, parse_scheme

BF16 = torch.bfloat16
BACKEND = JitBackend()
REASON = BACKEND.why_not(LinearSpec(64, 64, parse_scheme("w4a16_g64"), BF16, "cpu"))
runs_here = pytest.mark.skipif(REASON is not None, reason=f"cpu_jit refuses {REASON}")


def weight_of(
    scheme: QuantScheme, out_features: int, in_features: int, dtype: torch.dtype, seed: int
) -> QuantizedTensor:
    return quantize_groups(normal(out_features, in_features, seed=seed), scheme, dtype)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_panels_are_undone_exactly(bits: int, out_features: int, units: int, seed: int) -> None:
    columns = units * (8 if bits <= 4 else 4)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (out_features, columns), generator=generator).to(torch.uint8)
    words = pack_codes(codes, bits)
    assert words.shape == (-(-out_features // 16), units, 16, 2)
    assert torch.equal(unpack_codes(words, bits, out_features), codes)
    values = torch.rand(out_features, units, generator=generator)
    assert torch.equal(unpack_groups(pack_groups(values), out_features), values)


def test_where_a_code_lies() -> None:
    """By hand: row 3's columns 0 to 7 lie in the pair of words of row 3, even ones in the first; row 17 in panel 1."""
    codes = torch.zeros(18, 16, dtype=torch.uint8)
    codes[3, :8] = torch.arange(1, 9)
    codes[17, 9] = 15
    words = pack_codes(codes, 4)
    assert [int(word) & 0xFFFF for word in words[0, 0, 3]] == [0x7531, 0x8642]
    assert [int(word) & 0xFFFF for word in words[1, 1, 1]] == [0, 0x000F]
    assert int(words.ne(0).sum()) == 3
    wide = torch.zeros(1, 4, dtype=torch.uint8)
    wide[0] = torch.tensor([0x12, 0x34, 0xAB, 0xCD])
    assert [int(word) & 0xFFFF for word in pack_codes(wide, 8)[0, 0, 0]] == [0xAB12, 0xCD34]


schemes = st.builds(
    QuantScheme, st.integers(2, 8), st.sampled_from([8, 24, 32, 64, 128, None]), symmetric=st.booleans()
)


@runs_here
@settings(deadline=None, max_examples=80)
@given(
    schemes,
    st.integers(1, 70),
    st.integers(1, 5),
    st.integers(0, 40),
    st.sampled_from([BF16, torch.float16, torch.float32]),
    st.sampled_from([BF16, torch.float16, torch.float32]),
    st.booleans(),
    st.integers(0, 9999),
)
def test_products_are_as_exact_as_torchs(
    scheme: QuantScheme,
    out_features: int,
    groups: int,
    tokens: int,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    act_order: bool,
    seed: int,
) -> None:
    """Any rows of weight and x; x has a mean, which zero points magnify. And unpack is exact."""
    in_features = groups * (scheme.group_size or 40)
    q = weight_of(scheme, out_features, in_features, scale_dtype, seed)
    if act_order:
        q = random_weight(scheme, out_features, in_features, seed=seed, dtype=scale_dtype, act_order=True)
    spec = LinearSpec.of(q, dtype)
    packed = BACKEND.prepack(q, spec)
    back = BACKEND.unpack(packed, spec)
    assert_same(back, q)
    x = (normal(tokens, in_features, seed=seed + 1) + 0.3).to(dtype)
    y = BACKEND.matmul(x, packed, spec)
    assert (y.shape, y.dtype) == ((tokens, out_features), dtype)
    if tokens == 0:
        return
    exact = x.double() @ dequantize(q, torch.float64).T
    theirs = linear(x, dequantize(q, dtype)).double()
    lost = 6e-8 if dtype == torch.float32 else 1e-6
    scale = x.double().abs() @ summed_sizes(q).T  # what float32 sums may lose a share of
    assert float((y.double() - exact).norm()) <= 2 * float((theirs - exact).norm()) + lost * float(scale.norm())


def summed_sizes(q: QuantizedTensor) -> Tensor:
    """float64 [out, in]: for each weight the sizes of what is summed, codes and zero points apart, from the middle."""
    group_of = (
        torch.arange(q.codes.shape[1]) // q.scheme.columns_per_group(q.codes.shape[1]) if q.g_idx is None else q.g_idx
    )
    codes, zeros = ((values.double() - q.scheme.mid).abs() for values in (q.codes, q.zero_point[:, group_of.long()]))
    return (codes + zeros) * q.scale.double()[:, group_of.long()]


@pytest.mark.parametrize("target", available(), ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@runs_here
@settings(deadline=None, max_examples=40)
@given(schemes, st.integers(1, 70), st.integers(1, 4), st.sampled_from([BF16, torch.float32]), st.integers(0, 9999))
def test_the_dense_weight_is_what_dequantize_gives(
    target: Target,
    dtype: torch.dtype,
    scheme: QuantScheme,
    out_features: int,
    groups: int,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    """To the last bit, whatever the group; the panels that were asked for, and nothing behind them."""
    if dtype == BF16 and not target.bfloat16:
        return
    q = weight_of(scheme, out_features, groups * (scheme.group_size or 40), scale_dtype, seed)
    packed = BACKEND.prepack(q, LinearSpec.of(q, BF16))
    weight = torch.full((-(-out_features // 16) * 16 + 1, q.in_features), 7.0, dtype=dtype)
    given_to = (packed["words"], packed["panel_scale"], packed.get("panel_zero"), scheme.bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, target.name)
        jit_dense.dense(*given_to, 0, weight[:-1])
        assert torch.equal(weight[:out_features], dequantize(q, dtype))
        assert bool((weight[-1] == 7).all())
        if out_features > 16:
            jit_dense.dense(*given_to, 1, weight[:16])
            later = dequantize(q, dtype)[16:32]
            assert torch.equal(weight[: len(later)], later)


@pytest.mark.parametrize("target", available(), ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["w4a16_g64_asym", "w8a16_channel_sym"])
@pytest.mark.parametrize("faster", [True, False], ids=["bfloat16", "float32"])
@runs_here
def test_many_rows_go_through_dense_blocks(
    target: Target, dtype: torch.dtype, name: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few panels at a time, of which the last is short; one thread or two give the same bits."""
    monkeypatch.setenv(VARIABLE, target.name)
    monkeypatch.setattr(jit_dense, "bfloat16_is_faster", lambda: faster)
    monkeypatch.setattr(jit_dense, "_DENSE_WEIGHTS", 2 * 16 * 128)
    monkeypatch.setattr("quantkit.kernels.jit_threads.THREAD_BYTES", 1)
    q = weight_of(parse_scheme(name), 75, 128, BF16, 5)
    packed = BACKEND.prepack(q, LinearSpec.of(q, dtype))
    arguments = (packed["words"], packed["panel_scale"], packed.get("panel_zero"), q.scheme.bits, 75)
    x = normal(33, 128, seed=2).to(dtype)
    y = jit_dense.product_of_many(x, *arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.equal(jit_dense.product_of_many(x, *arguments), y)
    torch.set_num_threads(before)
    exact = x.double() @ dequantize(q, torch.float64).T
    limit = (linear(x, dequantize(q, dtype)).double() - exact).norm()
    assert float((y.double() - exact).norm()) <= 2 * float(limit)


@pytest.mark.parametrize("faster", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("target", available(), ids=lambda target: target.name)
@runs_here
def test_where_many_rows_begin(target: Target, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the target's number of rows for nibbles, at half of it for bytes; never where it has none.

    Pairs of bfloat16 have fewer where torch is faster in float32.
    """
    monkeypatch.setenv(VARIABLE, target.name)
    monkeypatch.setattr(jit_dense, "bfloat16_is_faster", lambda: faster)
    calls: list[int] = []
    right = jit_dense.product_of_many

    def spy(x: Tensor, *others: object) -> Tensor:
        calls.append(len(x))
        return right(x, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(jit_op, "product_of_many", spy)
    pairs = target.many_pairs if target.bfloat16 else target.many_rows
    if target.bfloat16 and not faster:
        pairs = 48
    cases = [(BF16, "w4a16_g8", pairs), (BF16, "w8a16_g8", pairs and pairs // 2)]
    cases += [(torch.float32, "w4a16_g64", target.many_rows), (BF16, "w4a16_g64", 320 if target.amx else pairs)]
    for dtype, name, first in cases:
        q = weight_of(parse_scheme(name), 16, 64, BF16, 1)
        spec = LinearSpec.of(q, dtype)
        packed = BACKEND.prepack(q, spec)
        calls.clear()
        for rows in (1, 400) if first is None else (1, first - 1, first):
            BACKEND.matmul(normal(rows, 64).to(dtype), packed, spec)
        assert calls == ([] if first is None else [first])


@pytest.mark.skipif(not any(target.amx for target in available()), reason="this CPU has no AMX")
@runs_here
@settings(deadline=None, max_examples=25)
@given(
    st.integers(2, 8),
    st.sampled_from([32, 64, 96, 160, None]),
    st.booleans(),
    st.integers(1, 70),
    st.integers(1, 3),
    st.integers(1, 130),
    st.sampled_from([BF16, torch.float32]),
    st.integers(0, 9999),
)
def test_the_processors_matrices_give_the_numbers_of_its_vectors(
    bits: int,
    group: int | None,
    symmetric: bool,
    out_features: int,
    groups: int,
    tokens: int,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    """Up to the order of float32 sums, for any rows of x and of the weight; threads change nothing."""
    q = weight_of(QuantScheme(bits, group, symmetric), out_features, groups * (group or 64), scale_dtype, seed)
    packed = BACKEND.prepack(q, LinearSpec.of(q, BF16))
    x = (normal(tokens, q.in_features, seed=seed) + 0.3).to(BF16)
    arguments = (packed["words"], packed["panel_scale"], packed.get("panel_zero"), bits, out_features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "amx")
        assert jit_amx.fits(BF16, q.scheme.columns_per_group(q.in_features))
        patch.setattr("quantkit.kernels.jit_threads.THREAD_BYTES", 1)
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(jit_amx.product_by_amx(x, *arguments))
        torch.set_num_threads(1)
    assert torch.equal(*found)
    exact = x.double() @ dequantize(q, torch.float64).T
    limit = (linear(x, dequantize(q, BF16)).double() - exact).norm()
    sizes = x.double().abs() @ dequantize(q, torch.float64).abs().T
    assert float((found[0].double() - exact).norm()) <= 2 * float(limit) + 1e-6 * float(sizes.norm())


@runs_here
def test_threads_share_the_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, however the panels are divided."""
    monkeypatch.setattr("quantkit.kernels.jit_threads.THREAD_BYTES", 1)
    q = weight_of(parse_scheme("w4a16_g64_asym"), 100, 256, BF16, 7)
    spec = LinearSpec.of(q, BF16)
    packed = BACKEND.prepack(q, spec)
    x = normal(3, 256, seed=1).to(BF16)
    before = torch.get_num_threads()
    found: list[Tensor] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(BACKEND.matmul(x, packed, spec))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@runs_here
def test_one_node_for_torch_compile() -> None:
    q = random_weight(parse_scheme("w4a16_g64_asym"), 48, 128, act_order=True)
    spec = LinearSpec.of(q, BF16)
    packed = BACKEND.prepack(q, spec)
    arguments = (packed["words"], packed["panel_scale"], packed["panel_zero"], packed["order"], 4, 48)
    x = normal(2, 128).to(BF16)
    torch.library.opcheck(torch.ops.quantkit.panels_linear.default, (x, *arguments))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: BACKEND.matmul(x, packed, spec) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), BACKEND.matmul(x, packed, spec) + 1)
    torch._dynamo.reset()


@runs_here
def test_tensors_that_were_moved_are_copied_into_line() -> None:
    q = weight_of(parse_scheme("w4a16_g64_asym"), 48, 128, BF16, 7)
    spec = LinearSpec.of(q, BF16)
    packed = BACKEND.prepack(q, spec)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in packed.values())
    moved = {}
    for name, tensor in packed.items():
        raw = torch.empty(tensor.nbytes + 72, dtype=torch.uint8)
        start = -raw.data_ptr() % 64 + 8
        moved[name] = raw[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    x = normal(2, 128).to(BF16)
    assert torch.equal(BACKEND.matmul(x, moved, spec), BACKEND.matmul(x, packed, spec))


@runs_here
def test_nan_and_infinity_come_through() -> None:
    q = weight_of(parse_scheme("w4a16_g64"), 32, 64, BF16, 1)
    spec = LinearSpec.of(q, BF16)
    x = normal(2, 64).to(BF16)
    x[1, 5] = torch.nan
    y = BACKEND.matmul(x, BACKEND.prepack(q, spec), spec)
    assert bool(y[0].isfinite().all())
    assert bool(y[1].isnan().all())


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (LinearSpec(64, 64, parse_scheme("w4a16_g64"), BF16, "cuda"), "device cuda"),
        (LinearSpec(64, 64, parse_scheme("w4a16_g64"), torch.float64, "cpu"), "float64"),
        (LinearSpec(64, 64, parse_scheme("w8a8"), BF16, "cpu"), "quantized activations"),
        (LinearSpec(64, 64, parse_scheme("w4a16_g64"), BF16, "cpu", True, True), "more columns than others"),
        (LinearSpec(100, 64, parse_scheme("w4a16_channel"), BF16, "cpu"), "multiples of 8"),
        (LinearSpec(66, 64, parse_scheme("w8a16_channel"), BF16, "cpu"), "multiples of 4"),
    ],
)
@runs_here
def test_refusals(spec: LinearSpec, why: str) -> None:
    assert why in (BACKEND.why_not(spec) or "")


def test_refusals_without_llvmlite_and_on_other_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LinearSpec(64, 64, parse_scheme("w4a16_g64"), BF16, "cpu")
    monkeypatch.setattr(module, "chosen_target", lambda: None)
    monkeypatch.setattr(module, "find_spec", lambda _: object())
    assert "avx512_bf16" in (BACKEND.why_not(spec) or "")
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert "quantkit[cpu]" in (BACKEND.why_not(spec) or "")


@runs_here
def test_a_weight_that_breaks_its_scheme_is_not_packed() -> None:
    q = weight_of(parse_scheme("w4a16_g64"), 32, 64, BF16, 1)
    q.codes[0, 0] = 16
    with pytest.raises(KernelError, match="does not fit in 4 bits"):
        BACKEND.prepack(q, LinearSpec.of(q, BF16))
