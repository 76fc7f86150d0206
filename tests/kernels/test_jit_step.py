"""The operator without Python: the numbers of the kernels that Python calls, whatever the layer, threads and caller."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Container, Mapping

import pytest
import torch
from layers import BF16, dense, fastest_cpu, normal
from torch import Tensor

import quantkit
from quantkit.kernels import JitBackend
from quantkit.kernels.jit_step import layer_call, step
from quantkit.kernels.jit_step_ir import CALL
from quantkit.kernels.native_op import c_functions

pytestmark = pytest.mark.skipif(fastest_cpu() != "cpu_jit", reason="cpu_jit does not run on this CPU")

SCHEMES = ["w4a16_g64", "w4a16_g64_asym", "w8a16_channel", "w8a16_g64_asym", "w3a16_g32", "w2a16_g8_asym"]


def layer(scheme: str, columns: int = 192, rows: int = 160, bias: bool = False) -> quantkit.QuantLinear:
    return quantkit.QuantLinear.from_linear(dense(columns, rows, bias=bias), scheme, backend="cpu_jit")


def by_python(x: Tensor, packed: Mapping[str, Tensor], owner: quantkit.QuantLinear) -> Tensor:
    """The product by the kernels that Python calls: what a layer without ``call`` does."""
    return JitBackend().matmul(x, {name: tensor for name, tensor in packed.items() if name != "call"}, owner.spec)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [160, 40, 3])
def test_the_numbers_are_the_kernels(scheme: str, rows: int) -> None:
    """To the last bit, for rows that fill panels and rows that do not, and inputs that start anywhere."""
    own = layer(scheme, rows=rows)
    packed = own._packed()
    assert packed["call"].tolist()[CALL.index("words")] == packed["words"].data_ptr()
    x = normal(5, 192).to(BF16)
    shifted = torch.empty(193, dtype=BF16)[1:].copy_(x[0])[None]
    for row in (*x.split(1), shifted):
        found = own(row)
        assert found.shape == (1, rows)
        assert found.is_contiguous()
        assert torch.equal(found, by_python(row, packed, own))
    assert own(x[:1, None]).shape == (1, 1, rows)


@pytest.mark.parametrize("scheme", ["w4a16_g64", "w8a16_channel"])
def test_threads_do_not_change_them(scheme: str) -> None:
    own, x, before = layer(scheme, 1024, 2048), normal(1, 1024).to(BF16), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(own(x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_torch_takes_it_as_an_operator() -> None:
    own = layer("w4a16_g64")
    x, packed = normal(1, 192).to(BF16), own._packed()
    torch.library.opcheck(torch.ops.quantkit.panels_step.default, (x, packed["call"], 160))


def test_what_compiled_code_calls() -> None:
    """Known by torch's operator and pickled by its name, for Inductor's cache; the text has no address in it."""
    layer("w4a16_g64")
    found = c_functions()
    operator = torch.ops.quantkit.panels_step.default
    asked: Container[object] = found  # as Inductor does
    assert operator in asked
    assert torch.ops.aten.add.Tensor not in asked
    assert pickle.loads(pickle.dumps(found)) == found
    (text,) = found[str(operator)]
    start = "inline AOTITorchError aoti_torch_cpu_panels_step(AtenTensorHandle x, AtenTensorHandle call, int64_t rows, "
    assert text.startswith(start)
    assert not re.search(r"\d{6}", text)


def test_addresses_stay_in_the_process() -> None:
    """A state_dict has none; a copy has its own; what torch.export writes calls the other operator."""
    own = layer("w4a16_g64", bias=True)
    assert "call" not in own.state_dict()
    twin = copy.deepcopy(own)
    assert twin._packed()["call"].tolist() != own._packed()["call"].tolist()
    x = normal(1, 192).to(BF16)
    assert torch.equal(twin(x), own(x))
    exported = torch.export.export(own, (x,))
    names = {str(node.target) for node in exported.graph.nodes}
    assert any("panels_linear" in name for name in names)
    assert not any("panels_step" in name for name in names)


def test_what_it_is_not_made_for() -> None:
    """Activations of so many columns would not fit on a thread's stack: such a layer is multiplied as before."""
    own = layer("w4a16_g64", 192)
    packed = own._packed()
    wide = packed["words"].new_zeros(1, 2**17 // 8, 16, 2)
    assert layer_call(wide, torch.ones(1, 2**17 // 64, 16, dtype=BF16), None, 4, BF16) is None
    with torch.inference_mode():
        found = step(normal(1, 192).to(BF16), packed["panel_scale"].shape[0], packed["call"])
    assert found.shape == (1, 160)
