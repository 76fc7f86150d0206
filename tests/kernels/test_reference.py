from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_same, error_ratio, exact_weight, random_weight, schemes, weights
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit import precision
from quantkit.errors import KernelError
from quantkit.kernels import LinearSpec, ReferenceBackend, base
from quantkit.linear import QuantLinear
from quantkit.packing import packed_words
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

BACKEND = ReferenceBackend()


class LargestResult(TorchDispatchMode):
    """The size of the largest tensor that an operator returned."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@settings(max_examples=60, deadline=None)
@given(weights(act_order=st.booleans()))
def test_unpack_undoes_prepack(q: QuantizedTensor) -> None:
    spec = LinearSpec.of(q, torch.float32)
    packed = BACKEND.prepack(q, spec)
    assert tuple(packed) == BACKEND.names(spec)
    assert_same(BACKEND.unpack(packed, spec), q)


@settings(max_examples=60, deadline=None)
@given(
    weights(act_order=st.booleans()),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.lists(st.integers(0, 5), max_size=3),
)
def test_product(q: QuantizedTensor, dtype: torch.dtype, batch: list[int]) -> None:
    spec = LinearSpec.of(q, dtype)
    x = torch.randn(*batch, q.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = BACKEND.matmul(x, BACKEND.prepack(q, spec), spec)
    assert y.dtype == dtype
    assert y.shape == (*batch, q.out_features)
    exact = x.double() @ exact_weight(q).T
    # Weights in float32 are rounded to it, hence its eps for float64 too; every sum has in_features terms.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    bound = 4 * eps * (x.double().abs() @ exact_weight(q).abs().T) + torch.finfo(dtype).tiny
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_torchs_own(dtype: torch.dtype, symmetric: bool) -> None:
    q = random_weight(QuantScheme(3, 72, symmetric), 101, 360, dtype=torch.float16)
    x = (1 + torch.randn(37, 360, generator=torch.Generator().manual_seed(2))).to(dtype)
    spec = LinearSpec.of(q, dtype)
    assert error_ratio(BACKEND.matmul(x, BACKEND.prepack(q, spec), spec), x, q) <= 2


@pytest.mark.parametrize("faster", [True, False], ids=["bfloat16", "float32"])
def test_many_rows_are_multiplied_in_the_faster_precision(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: faster)
    multiplied: list[torch.dtype] = []

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        multiplied.append(weight.dtype)
        return linear(x, weight, bias)

    for module in (base, precision):
        monkeypatch.setattr(module, "linear", spy)
    q = random_weight(QuantScheme(4, 64), 96, 256)
    for rows, dtype, expected in (
        (64, torch.bfloat16, torch.bfloat16 if faster else torch.float32),
        (4, torch.bfloat16, torch.bfloat16),
        (64, torch.float16, torch.float16),
    ):
        spec = LinearSpec.of(q, dtype)
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).to(dtype)
        y = BACKEND.matmul(x, BACKEND.prepack(q, spec), spec)
        assert (multiplied.pop(), y.dtype) == (expected, dtype)
        assert error_ratio(y, x, q) <= 2


def test_many_rows_are_one_compiled_graph() -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(128, 48).bfloat16(), "w4a16_g64", backend="reference")
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        wanted, found = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=2**-7)


def test_a_layer_of_several_blocks_is_never_dense_as_a_whole() -> None:
    q = random_weight(QuantScheme(4, 64, symmetric=False), 2500, 2048)
    spec = LinearSpec.of(q, torch.bfloat16)
    packed = BACKEND.prepack(q, spec)
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(3)).bfloat16()
    with LargestResult() as results:  # type: ignore[no-untyped-call]
        y = BACKEND.matmul(x, packed, spec)
    assert results.numel <= 1 << 21 < q.codes.numel()
    assert error_ratio(y, x, q) <= 2


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_size(bits: int) -> None:
    q = random_weight(QuantScheme(bits, 128), 64, 1024)
    packed = BACKEND.prepack(q, LinearSpec.of(q, torch.bfloat16))
    assert packed["weight_packed"].nbytes == 64 * packed_words(1024, bits) * 4 == 64 * 1024 * bits / 8
    assert sum(t.nbytes for t in packed.values()) == 64 * 1024 * (bits + 16 / 128) / 8


@given(schemes())
def test_why_not(scheme: QuantScheme) -> None:
    columns = scheme.columns_per_group(30)
    assert BACKEND.why_not(LinearSpec(columns, 5, scheme, torch.float64, "cuda", True)) is None
    assert "activations" in str(BACKEND.why_not(LinearSpec(columns, 5, scheme, torch.int8, "cpu")))
    assert "meta" in str(BACKEND.why_not(LinearSpec(columns, 5, scheme, torch.float32, "meta")))


def test_why_not_a_group_that_does_not_divide() -> None:
    reason = BACKEND.why_not(LinearSpec(100, 5, QuantScheme(4, 64), torch.float32, "cpu"))
    assert reason is not None
    assert "in_features=100 is not a multiple of group_size=64" in reason


def test_prepack_refuses_what_it_could_not_give_back() -> None:
    scheme = QuantScheme(3, 8)
    q = random_weight(scheme, 4, 16)
    spec = LinearSpec.of(q, torch.float32)
    wide = QuantizedTensor(q.codes + 5, q.scale, q.zero_point, scheme)
    with pytest.raises(KernelError, match=r"code \d+ does not fit in 3 bits"):
        BACKEND.prepack(wide, spec)
    crooked = QuantizedTensor(q.codes, q.scale, q.zero_point + 1, scheme)
    with pytest.raises(KernelError, match="zero points are not all 4"):
        BACKEND.prepack(crooked, spec)
    with pytest.raises(KernelError, match="give the weight of"):
        BACKEND.prepack(q.rows(0, 2), spec)
