"""QuantEmbedding against torch's own lookup in the dequantized weight, bit for bit."""

from __future__ import annotations

import copy
import pickle
from shutil import which
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quantkit
from quantkit.embedding import QuantEmbedding, why_not_embedding
from quantkit.grid import quantize_groups
from quantkit.packing import pack, unpack, unpack_rows
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import parse_scheme

SCHEMES = ["w2a16_g16", "w3a16_g32_asym", "w4a16_g32", "w5a16_channel", "w6a16_g96", "w7a16_g48_asym", "w8a16"]
ROWS, COLUMNS = 37, 96
IDS = torch.tensor([[0, 36, 5], [5, 5, 17]])


def weight(scheme: str, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    return quantize_groups(values, parse_scheme(scheme), dtype)


@given(bits=st.integers(1, 8), length=st.integers(1, 70), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_rows_unpack_as_whole_weights_do(bits: int, length: int, rows: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, length), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack(codes, bits)
    assert torch.equal(unpack_rows(words, bits, length), codes)
    assert torch.equal(unpack_rows(words, bits, length), unpack(words, bits, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_lookup_is_that_of_the_dense_weight(scheme: str, dtype: torch.dtype) -> None:
    q = weight(scheme)
    layer = QuantEmbedding(q, dtype=dtype)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, quantkit.QuantLinear(q, dtype=dtype).weight)
    for ids in (IDS, IDS.int(), IDS[0], IDS[0, 1], IDS[:, :0]):
        found = layer(ids)
        assert found.dtype == dtype
        assert torch.equal(found, nn.functional.embedding(ids, layer.weight))


def test_a_padding_row_is_looked_up_like_the_others() -> None:
    dense = nn.Embedding(ROWS, COLUMNS, padding_idx=5)
    with torch.no_grad():
        dense.weight.normal_()
    q = quantize_groups(dense.weight.detach(), parse_scheme("w8a16_g32"), torch.float32)
    layer = QuantEmbedding.in_place_of(dense, q, dtype=torch.float32)
    assert layer.padding_idx == 5
    assert torch.equal(layer(IDS)[0, 2], layer.weight[5])
    assert float(layer(IDS)[0, 2].abs().max()) > 0


def test_only_the_rows_that_are_asked_for_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counting(words: Tensor, bits: int, length: int) -> Tensor:
        seen.append(words.shape[0])
        return unpack_rows(words, bits, length)

    monkeypatch.setattr("quantkit.embedding.unpack_rows", counting)
    layer = QuantEmbedding(weight("w4a16_g32"), dtype=torch.bfloat16)
    layer(IDS)
    assert seen == [6]
    monkeypatch.setattr("quantkit.embedding._CODES_AT_ONCE", 4 * COLUMNS)  # a long prompt, in pieces
    assert torch.equal(layer(IDS), layer.weight[IDS])
    assert seen == [6, 4, 2]


@pytest.mark.parametrize("bad", [ROWS, -1])
def test_an_id_that_is_no_row(bad: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        QuantEmbedding(weight("w4a16_g32"), dtype=torch.float32)(torch.tensor([bad]))


def test_dtype_never_rounds_a_scale() -> None:
    layer = QuantEmbedding(weight("w4a16_g32", torch.float32), dtype=torch.float32, embed_scale=9.797958971)
    before = layer.quantized().digest()
    layer.bfloat16()
    assert layer.dtype == layer(IDS).dtype == layer.weight.dtype == torch.bfloat16
    assert layer.quantized().digest() == before
    factor = torch.tensor(9.797958971).bfloat16()
    assert torch.equal(layer(IDS), layer.weight[IDS] * factor)
    assert layer.to("cpu", torch.float16)(IDS).dtype == torch.float16
    assert layer.quantized().digest() == before


def test_state_dict_pickle_and_copy() -> None:
    layer, other = (QuantEmbedding(weight(scheme), dtype=torch.float16) for scheme in ("w3a16_g32_asym",) * 2)
    other.scale.zero_()
    state = layer.state_dict()
    assert set(state) == {"weight_packed", "scale", "zero_point"}
    assert state.keys() == quantkit.QuantLinear(weight("w3a16_g32_asym"), dtype=torch.float16).state_dict().keys()
    other.load_state_dict(state)
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(IDS), layer(IDS))
    assert list(layer.parameters()) == []
    assert "scheme=w3a16_g32_asym, dtype=float16" in repr(layer)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("scheme", ["w8a16_g32", "w3a16_g32_asym"])
def test_it_compiles_to_one_graph(scheme: str, backend: str) -> None:
    if backend == "inductor" and which("c++") is None and which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    layer = QuantEmbedding(weight(scheme), dtype=torch.bfloat16, embed_scale=8.0)
    torch._dynamo.reset()
    options: Any = {"cpp_wrapper": True, "emulate_precision_casts": True} if backend == "inductor" else None
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend, options=options)
    with torch.inference_mode():
        for token in (0, 7, ROWS - 1):
            ids = torch.tensor([[token]])
            assert torch.equal(compiled(ids), layer(ids))
    torch._dynamo.reset()


class Positions(nn.Embedding):
    """An embedding with an offset, as OPT's of positions."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


def test_what_it_cannot_stand_for() -> None:
    q = weight("w4a16_g32")
    assert why_not_embedding(nn.Embedding(4, 8)) is None
    for module, reason in (
        (Positions(ROWS, COLUMNS), "Positions does not look rows up"),
        (nn.Linear(4, 8), "Linear is no embedding"),
        (nn.Embedding(ROWS, COLUMNS, max_norm=1.0), "max_norm"),
    ):
        with pytest.raises(quantkit.InputError, match=reason):
            QuantEmbedding.in_place_of(module, q, dtype=torch.float32)
    rounds = quantize_groups(torch.randn(8, 16), parse_scheme("w8a8"), torch.float32)
    ordered = QuantizedTensor(q.codes, q.scale, q.zero_point, q.scheme, torch.zeros(COLUMNS, dtype=torch.int32))
    for other, reason in ((rounds, "quantized activations"), (ordered, "g_idx")):
        with pytest.raises(quantkit.KernelError, match=reason):
            QuantEmbedding(other, dtype=torch.float32)
