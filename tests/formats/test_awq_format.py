"""AWQ for GEMM kernels: golden words, exact round trips, and what malformed tensors are told."""

from __future__ import annotations

import pytest
import torch
from golden_layer import WORDS, golden, hexadecimal
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_same, random_weight, schemes, weights
from torch import Tensor

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import AWQCheckpoint
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

FORMAT = AWQCheckpoint()
SCHEME = QuantScheme(4, 16, symmetric=False)


def test_golden_words() -> None:
    tensors = FORMAT.encode(golden(4))
    assert hexadecimal(tensors["qweight"][0, :2]) == WORDS["awq"]["4"]["qweight[0, :2]"]
    assert hexadecimal(tensors["qzeros"][0, :2]) == WORDS["awq"]["4"]["qzeros[0, :2]"]


def test_names_shapes_and_dtypes() -> None:
    tensors = FORMAT.encode(random_weight(SCHEME, 24, 64))
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, [64, 3]),
        "qzeros": (torch.int32, [4, 3]),
        "scales": (torch.bfloat16, [4, 24]),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@settings(deadline=None)
@given(
    weights(schemes(bits=st.just(4), symmetric=st.just(False)), out_features=st.integers(1, 12).map(lambda n: 8 * n))
)
def test_decode_inverts_encode(q: QuantizedTensor) -> None:
    assert_same(FORMAT.decode("layer", FORMAT.encode(q), q.scheme, (q.out_features, q.in_features)), q)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (QuantScheme(4, 32), None, "have zero points"),
        (QuantScheme(3, 32, symmetric=False), None, "it holds 4 bits"),
        (QuantScheme(8, None, act_bits=8), None, "weight-only"),
        (QuantScheme(4, 32, symmetric=False), (12, 64), "out_features=12"),
    ],
)
def test_what_it_does_not_hold(scheme: QuantScheme, shape: tuple[int, int] | None, reason: str) -> None:
    assert reason in str(FORMAT.why_not(scheme, shape))
    with pytest.raises(SchemeError, match="is not written"):
        FORMAT.encode(random_weight(scheme, *(shape or (32, 64))))


def test_reordered_groups_are_not_written() -> None:
    with pytest.raises(SchemeError, match="g_idx"):
        FORMAT.encode(random_weight(SCHEME, 32, 64, act_order=True))


def test_symmetric_weights_of_others() -> None:
    """``zero_point: false``: with zero points in the middle, or none at all."""
    q = random_weight(SCHEME, 32, 64)
    tensors = FORMAT.encode(QuantizedTensor(q.codes, q.scale, torch.full_like(q.zero_point, 8), SCHEME))
    symmetric = QuantScheme(4, 16)
    expected = QuantizedTensor(q.codes, q.scale, torch.full_like(q.zero_point, 8), symmetric)
    assert_same(FORMAT.decode("a", tensors, symmetric, (32, 64)), expected)
    del tensors["qzeros"]
    assert_same(FORMAT.decode("a", tensors, symmetric, (32, 64)), expected)
    with pytest.raises(CheckpointError, match="zero points other than 8"):
        FORMAT.decode("a", FORMAT.encode(q), symmetric, (32, 64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qweight": None}, "qweight: is missing"),
        ({"qzeros": None}, "qzeros: is missing"),
        ({"qweight": torch.zeros(8, 32, dtype=torch.int32)}, "config.json asks for int32 [64, 4]"),
        ({"qzeros": torch.zeros(4, 4)}, "qzeros: is float32"),
        ({"scales": torch.full((4, 32), torch.nan)}, "scales: holds NaN, inf or 0"),
    ],
)
def test_malformed_layers(change: dict[str, Tensor | None], reason: str) -> None:
    tensors = {**FORMAT.encode(random_weight(SCHEME, 32, 64)), **change}
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("a.b", {n: t for n, t in tensors.items() if t is not None}, SCHEME, (32, 64))
    assert str(caught.value).startswith("a.b.")
    assert reason in str(caught.value)
