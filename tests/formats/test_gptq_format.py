"""GPTQ, both versions: golden words, exact round trips, and what malformed tensors are told."""

from __future__ import annotations

import pytest
import torch
from golden_layer import WORDS, golden, hexadecimal
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_same, random_weight, schemes, weights
from torch import Tensor

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import CompressedTensors, GPTQCheckpoint, GPTQv2Checkpoint
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import QuantScheme

V1, V2 = GPTQCheckpoint(), GPTQv2Checkpoint()
WIDTHS = (2, 3, 4, 8)
PACKABLE = schemes(bits=st.sampled_from(WIDTHS), group_sizes=st.sampled_from((None, 16, 32)))


def test_golden_words() -> None:
    words, v2, v1 = WORDS["gptq"]["4"], V2.encode(golden(4)), V1.encode(golden(4))
    assert hexadecimal(v2["qweight"][0, :4]) == words["qweight[0, :4]"]
    assert hexadecimal(v2["qweight"][1, :1]) == words["qweight[1, :1]"]
    assert hexadecimal(v2["qzeros"][0]) == words["v2 qzeros[0]"]
    assert torch.equal(v1["qweight"], v2["qweight"])
    # Field by field: 0 becomes f and borrows nothing from its neighbour.
    assert hexadecimal(v1["qzeros"][0, :2]) == ["6543210f", "edcba987"]


@pytest.mark.parametrize(("bits", "word"), [(2, "55555555"), (4, "77777777"), (8, "7f7f7f7f")])
def test_golden_words_of_symmetric_zero_points(bits: int, word: str) -> None:
    q = random_weight(QuantScheme(bits, 32), 32, 64)
    assert set(hexadecimal(V1.encode(q)["qzeros"].flatten())) == {word}


@pytest.mark.parametrize("bits", [3, 8])
def test_other_widths_are_the_bit_stream_of_compressed_tensors(bits: int) -> None:
    """3-bit codes cross words: 32 in 3."""
    column = V1.encode(golden(bits))["qweight"][:, 0]
    assert hexadecimal(column[:3]) == WORDS["compressed_tensors"][str(bits)]["weight_packed[0, :3]"]


@pytest.mark.parametrize("bits", WIDTHS)
def test_version_2_is_compressed_tensors_transposed(bits: int) -> None:
    q = random_weight(QuantScheme(bits, 32, symmetric=False), 64, 96)
    ours, theirs = V2.encode(q), CompressedTensors().encode(q)
    assert torch.equal(ours["qweight"], theirs["weight_packed"].T)
    assert torch.equal(ours["qzeros"], theirs["weight_zero_point"].T)
    assert torch.equal(ours["scales"], theirs["weight_scale"].T)


@pytest.mark.parametrize("bits", WIDTHS)
def test_names_shapes_and_dtypes(bits: int) -> None:
    tensors = V1.encode(random_weight(QuantScheme(bits, 32, symmetric=False), 64, 96))
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, [3 * bits, 64]),
        "qzeros": (torch.int32, [3, 2 * bits]),
        "scales": (torch.bfloat16, [3, 64]),
        "g_idx": (torch.int32, [96]),
    }
    assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32 + [2] * 32
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@settings(deadline=None)
@given(
    q=weights(
        PACKABLE,
        out_features=st.sampled_from((32, 64)),
        groups=st.sampled_from((2, 4)),
        channel_columns=st.sampled_from((32, 96)),
        act_order=st.booleans(),
    ),
    version=st.sampled_from((V1, V2)),
)
def test_decode_inverts_encode(q: QuantizedTensor, version: GPTQCheckpoint) -> None:
    """Zero points of 0 and of the last code included, reordered groups too."""
    back = version.decode("layer", version.encode(q), q.scheme, (q.out_features, q.in_features))
    trivial = q.g_idx is not None and torch.equal(
        q.g_idx.long(), torch.arange(q.in_features) // q.scheme.columns_per_group(q.in_features)
    )
    assert_same(back, QuantizedTensor(q.codes, q.scale, q.zero_point, q.scheme) if trivial else q)


def test_without_g_idx_groups_are_contiguous() -> None:
    """As AutoRound writes them."""
    q = random_weight(QuantScheme(4, 32), 32, 64)
    tensors = V1.encode(q)
    del tensors["g_idx"]
    assert_same(V1.decode("a", tensors, q.scheme, (32, 64)), q)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (QuantScheme(5, 32), None, "2, 3, 4, 8 bits"),
        (QuantScheme(8, None, act_bits=8), None, "weight-only"),
        (QuantScheme(4, 32), (36, 64), "out_features=36"),
        (QuantScheme(3, 8), (32, 72), "in_features=72"),
        (QuantScheme(3, 32), (48, 64), "out_features=48"),
    ],
)
def test_what_it_does_not_hold(scheme: QuantScheme, shape: tuple[int, int] | None, reason: str) -> None:
    assert reason in str(V1.why_not(scheme, shape))
    if shape is not None:
        assert V1.why_not(scheme) is None
        with pytest.raises(SchemeError, match=reason):
            V1.encode(random_weight(scheme, *shape))


SCHEME = QuantScheme(4, 16, symmetric=False)


def refused(change: dict[str, Tensor | None], scheme: QuantScheme = SCHEME) -> str:
    tensors = {**V1.encode(random_weight(scheme, 32, 64)), **change}
    with pytest.raises(CheckpointError) as caught:
        V1.decode("model.layers.0.q", {n: t for n, t in tensors.items() if t is not None}, scheme, (32, 64))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.layers.0.q.")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qweight": None}, "qweight: is missing"),
        ({"qzeros": None}, "qzeros: is missing"),
        ({"scales": None}, "scales: is missing"),
        ({"qweight": torch.zeros(8, 32)}, "qweight: is float32 [8, 32]"),
        ({"qweight": torch.zeros(4, 32, dtype=torch.int32)}, "config.json asks for int32 [8, 32]"),
        ({"qzeros": torch.zeros(4, 32, dtype=torch.int32)}, "config.json asks for int32 [4, 4]"),
        ({"scales": torch.ones(32, 4)}, "scales: is float32 [32, 4]"),
        ({"scales": torch.zeros(4, 32)}, "scales: holds NaN, inf or 0"),
        ({"g_idx": torch.arange(64) // 16}, "g_idx: is int64"),
        ({"g_idx": torch.full((64,), 4, dtype=torch.int32)}, "g_idx: names groups 4 to 4"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "g_idx: names groups -1 to -1"),
    ],
)
def test_malformed_layers(change: dict[str, Tensor | None], reason: str) -> None:
    assert reason in refused(change)


def test_versions_that_are_mistaken_for_each_other() -> None:
    """Symmetric zero points tell; the message says which key to correct."""
    symmetric = QuantScheme(4, 16)
    zeros = V2.encode(random_weight(symmetric, 32, 64))["qzeros"]
    assert "checkpoint_format is of the other version" in refused({"qzeros": zeros}, symmetric)
    zeros[0, 0] = 0x77777776
    assert 'write "sym": false' in refused({"qzeros": zeros}, symmetric)
