"""Few rows by products of bytes: near the exact product whatever the activations are, and the machine code of it."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.grid import dequantize
from quantkit.kernels.jit import aligned, multiplies_bytes, product
from quantkit.kernels.jit_bytes_ir import MOST_COLUMNS, bytes_ir
from quantkit.kernels.jit_compile import assembly
from quantkit.kernels.jit_dots_ir import PairedDots
from quantkit.kernels.jit_targets import TARGETS, VARIABLE, Target, available
from quantkit.kernels.jit_text import Kind
from quantkit.kernels.panels import pack_codes, pack_groups
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

HERE = [target for target in available() if target.dots is not None]
needs_bytes = pytest.mark.skipif(
    not HERE or not multiplies_bytes(1, torch.bfloat16, 8, 64), reason="this CPU does not multiply bytes of 8 bits"
)
LOST = 2**-21  # of a group's largest activation, for each of the others; twice what the integers round


def weight(bits: int, group: int, groups: int, symmetric: bool, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    scheme = QuantScheme(bits, group, symmetric=symmetric)
    codes = torch.randint(scheme.levels, (40, group * groups), generator=generator).to(torch.uint8)
    zeros = torch.full((40, groups), scheme.mid, dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(scheme.levels, (40, groups), generator=generator).to(torch.uint8)
    return QuantizedTensor(codes, torch.rand(40, groups, generator=generator) + 0.5, zeros, scheme)


def multiplied(q: QuantizedTensor, x: Tensor) -> Tensor:
    zeros = None if q.scheme.symmetric else aligned(pack_groups(q.zero_point))
    words = aligned(pack_codes(q.codes, q.scheme.bits))
    return product(x, words, aligned(pack_groups(q.scale)), zeros, q.scheme.bits, len(q.codes))


def bound(q: QuantizedTensor, x: Tensor) -> Tensor:
    """Of each element: half a unit in the last place of the result, and what integers and sums in float32 lose."""
    exact = x.double() @ dequantize(q, torch.float64).T
    sizes = x.double().abs().view(len(x), q.scale.shape[1], -1)
    largest = sizes.amax(2) * sizes.shape[2] * LOST  # of a group: all of its activations, times steps of the grid
    return exact.abs() * torch.finfo(x.dtype).eps / 2 + q.scheme.levels * (largest @ q.scale.double().T)


@needs_bytes
@settings(deadline=None, max_examples=120)
@example(8, 24, 3, False, torch.float16, 1, 2.0, 3)  # beyond float16
@given(
    st.integers(2, 8),
    st.sampled_from([8, 24, 32, 64, 128]),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(1, 4),
    st.floats(0, 3),
    st.integers(0, 999),
)
def test_it_is_near_the_exact_product(
    bits: int, group: int, groups: int, symmetric: bool, dtype: torch.dtype, tokens: int, spread: float, seed: int
) -> None:
    """Also where the activations of a group differ by many orders of magnitude."""
    q = weight(bits, group, groups, symmetric, seed)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, tokens, group * groups, generator=generator)
    x = (normal[0] * (spread * normal[1]).exp()).clamp(-100, 100).to(dtype)
    assert_near(q, x)


def assert_near(q: QuantizedTensor, x: Tensor) -> None:
    """Where the dtype holds the exact product; float16 ends at 65504."""
    found, exact = multiplied(q, x).double(), x.double() @ dequantize(q, torch.float64).T
    limits = torch.finfo(x.dtype)
    assert bool((((found - exact).abs() <= bound(q, x) + limits.smallest_normal) | (exact.abs() > limits.max)).all())


@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
def test_every_target_of_this_cpu(target: Target, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest codes and digits too: AVX2's sums of 16 bits must hold them."""
    monkeypatch.setenv(VARIABLE, target.name)
    assert target.dots is not None
    for tokens in range(1, target.dots.tokens + 1):
        for group, symmetric in ((64, True), (24, False), (128, False), (8, True)):
            q = weight(bits, group, 3, symmetric)
            generator = torch.Generator().manual_seed(tokens)
            assert multiplies_bytes(tokens, torch.bfloat16, bits, group) == (bits <= target.dots.bits)
            assert_near(q, torch.randn(tokens, 3 * group, generator=generator).to(torch.bfloat16))
            q.codes.fill_(q.scheme.levels - 1)
            for value in (1.9921875, -1.9921875, 1.0 + 2**-7, -1.0 - 2**-7):
                assert_near(q, torch.full((tokens, 3 * group), value, dtype=torch.bfloat16))


@needs_bytes
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_that_does_not_see_the_outlier(bits: int) -> None:
    """An activation 8192 times as large as the others: rows whose weight for it is zero have the others' exact sum."""
    q = weight(bits, 64, 1, True)
    q.codes[:, 7] = q.scheme.mid
    x = (torch.randint(1, 3, (1, 64), generator=torch.Generator().manual_seed(0)) / 128.0).to(torch.bfloat16)
    x[0, 7] = 128.0
    exact = x.double() @ (q.codes.double() - q.scheme.mid).T * q.scale[:, 0].double()
    assert torch.equal(multiplied(q, x), exact.float().to(torch.bfloat16))


@needs_bytes
@pytest.mark.parametrize("value", [0.0, 2**-126, 3e38, -3e38])
def test_the_ends_of_the_range(value: float) -> None:
    q = weight(4, 64, 2, True)
    q.scale.fill_(2**-7)
    x = torch.full((1, 128), value, dtype=torch.bfloat16)
    x[0, 1::2] = 0
    exact = x.double() @ dequantize(q, torch.float64).T
    wrong = (multiplied(q, x).double() - exact).abs()
    assert bool((wrong <= exact.abs() * 2**-8 + 2**-126).all())


@needs_bytes
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x = torch.ones(1, 128, dtype=torch.bfloat16)
    x[0, 100] = value
    assert not bool(multiplied(weight(4, 64, 2, False), x).isfinite().any())


@needs_bytes
def test_the_longest_group() -> None:
    """The largest sums that 32 bits hold."""
    scheme = QuantScheme(8, None, symmetric=True)
    codes = torch.full((16, MOST_COLUMNS), 255, dtype=torch.uint8)
    q = QuantizedTensor(codes, torch.ones(16, 1), torch.full((16, 1), 128, dtype=torch.uint8), scheme)
    x = torch.full((1, MOST_COLUMNS), -1.0 - 2**-7, dtype=torch.bfloat16)
    x[0, 0] = 1.9921875  # the lower digits of the others are -128
    found = multiplied(q, x)
    assert float(found[0, 0]) == pytest.approx(127 * float(x.double().sum()), rel=2**-8)
    assert not multiplies_bytes(1, torch.bfloat16, 8, MOST_COLUMNS + 8)
    assert not multiplies_bytes(1, torch.float32, 8, 64)


@pytest.mark.skipif(not available(), reason="no llvmlite, or no kernels for this CPU")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", [target for target in TARGETS if target.dots], ids=lambda target: target.name)
def test_machine_code(target: Target, bits: int) -> None:
    """The main loop: three products for each four codes of a row, masks for nibbles, sums that stay in registers.

    But for AVX2, whose 16 registers do not hold two kinds of sums for both halves of a panel: those of 32 bits wait on
    the stack while those of 16 are made, once for each 48 products. Two loops that need no stack are 11 % slower.
    """
    assert target.dots is not None
    if bits > target.dots.bits:
        pytest.skip("its sums of 16 bits do not hold such codes")
    name = "vpmaddubsw" if isinstance(target.dots, PairedDots) else "vpdpbusd"
    for tokens in (1, target.dots.tokens):
        text = assembly(bytes_ir(Kind(bits, 64, True, "bfloat"), "bfloat", tokens, target.dots), target)
        body = text[text.index("kernel:") :]
        chunks = target.dots.columns // 16
        registers = chunks * (2 if bits == 4 else 4) * 16 // target.dots.rows  # of a chunk's units
        assert len(re.findall(rf"\b{name}\b", body)) == tokens * registers * (6 if bits == 4 else 3)
        assert len(re.findall(r"vpsrl[wd]\s+\$4,", body)) == (registers if bits == 4 else 0)
        loops = [block for block in re.split(r"^\.LBB\w+:", body, flags=re.MULTILINE) if name in block]
        assert len(loops) == 1
        stores = re.findall(r"vmov\w+\s+%[xyz]mm\d+, -?\d*\(%rsp", re.split(r"\tj\w+\t", loops[0])[0])
        assert len(stores) <= (8 if isinstance(target.dots, PairedDots) else 0)
