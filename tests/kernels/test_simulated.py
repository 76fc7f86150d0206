"""The simulated backend: the same numbers as the integer product, to the rounding of the activations' dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_same, exact_weight, quantized_activations, random_weight, weights

from quantkit.kernels import LinearSpec, ReferenceBackend, SimulatedBackend, choose_backend
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

BACKEND = SimulatedBackend()
SCHEMES = st.builds(
    lambda bits, group, symmetric, static: QuantScheme(bits, group, symmetric, act_bits=8, act_static=static),
    st.integers(2, 8),
    st.sampled_from((None, 8, 32)),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    weights(SCHEMES, act_order=st.booleans()),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.lists(st.integers(0, 5), max_size=3),
)
def test_product(q: QuantizedTensor, dtype: torch.dtype, batch: list[int]) -> None:
    spec = LinearSpec.of(q, dtype)
    assert BACKEND.why_not(spec) is None
    packed = BACKEND.prepack(q, spec)
    assert_same(BACKEND.unpack(packed, spec), q)
    x = torch.randn(*batch, q.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = BACKEND.matmul(x, packed, spec)
    assert (y.dtype, y.shape) == (dtype, (*batch, q.out_features))
    codes, scale = quantized_activations(x, q.act_scale)
    rounded = codes.double() * scale.double()
    exact = rounded @ exact_weight(q).T
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    bound = 5 * eps * (rounded.abs() @ exact_weight(q).abs().T) + torch.finfo(dtype).tiny
    assert bool(((y.double() - exact).abs() <= bound).all())


def test_it_is_chosen_by_no_layer_that_an_int8_backend_takes() -> None:
    w8a8 = QuantScheme(8, None, act_bits=8)
    assert choose_backend(LinearSpec(100, 7, w8a8, torch.float32, "cpu")).name == "cpu_int8"
    assert choose_backend(LinearSpec(100, 7, w8a8, torch.float64, "cpu")).name == "simulated"
    assert choose_backend(LinearSpec(96, 7, QuantScheme(8, 32, act_bits=8), torch.float32, "cpu")).name == "simulated"
    assert choose_backend(LinearSpec(96, 8, w8a8, torch.float16, "cuda")).name == "cuda_int8"
    assert choose_backend(LinearSpec(100, 7, w8a8, torch.float16, "cuda")).name == "simulated"


def test_why_not() -> None:
    q = random_weight(QuantScheme(8, None, act_bits=8), 4, 16)
    spec = LinearSpec.of(q, torch.float32)
    assert "quantized activations" in str(ReferenceBackend().why_not(spec))
    weight_only = LinearSpec(16, 4, QuantScheme(8, None), torch.float32, "cpu")
    assert "activations in floating point" in str(BACKEND.why_not(weight_only))
    assert "meta" in str(BACKEND.why_not(LinearSpec(16, 4, q.scheme, torch.float32, "meta")))
    assert "in_features=20 is not a multiple" in str(
        BACKEND.why_not(LinearSpec(20, 4, QuantScheme(8, 16, act_bits=8), torch.float32, "cpu"))
    )


def test_a_malformed_static_scale_is_refused() -> None:
    q = random_weight(QuantScheme(8, None, act_bits=8, act_static=True), 4, 16)
    spec = LinearSpec.of(q, torch.float32)
    packed = BACKEND.prepack(q, spec)
    for wrong in (torch.ones(2), torch.ones(1).bfloat16(), torch.zeros(1), torch.full((1,), float("nan"))):
        with pytest.raises(ValueError, match="act_scale must be"):
            BACKEND.unpack({**packed, "act_scale": wrong}, spec)
