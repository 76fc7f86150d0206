"""Joined layers: the same numbers as one by one, in models and alone; what is left apart, saved and refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from layers import BF16, dense, normal
from torch import Tensor, nn

import quantkit
from quantkit.bench import _share, weight_bytes
from quantkit.checkpoint import Checkpoint
from quantkit.generation import Decoder
from quantkit.joining import JoinedLinear, join_linears

IDS = torch.tensor([1, 17, 30, 4, 99, 8, 51])


class Attention(nn.Module):
    """Reads one input three times, and counts nothing else."""

    def __init__(self, schemes: tuple[str, str, str] = ("w4a16_g32",) * 3, bias: bool = False) -> None:
        super().__init__()
        for name, rows, scheme in zip(("q_proj", "k_proj", "v_proj"), (64, 32, 48), schemes, strict=True):
            self.add_module(name, quantkit.QuantLinear.from_linear(dense(96, rows, bias=bias), scheme))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(cast(nn.Module, module)(x) for module in (self.q_proj, self.k_proj, self.v_proj))


def step_logits(model: Any) -> Tensor:
    """After a prompt, and after each of its tokens again as steps."""
    decoder = Decoder(model, 2 * len(IDS))
    return torch.stack([decoder.prefill(IDS), *(decoder.step(int(token)) for token in IDS)])


def bytes_without_addresses(model: Any) -> int:
    """What a token reads of the weights; each product of cpu_jit has a few addresses besides."""
    calls = [(name, module._buffers.get("call")) for name, module in model.named_modules()]
    addresses: float = sum(call.nbytes * _share(model, name) for name, call in calls if call is not None)
    return weight_bytes(model) - round(addresses)


def tensors(path: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(path)
    return checkpoint.read(list(checkpoint.tensors))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "qwen2_moe"])
def test_the_logits_are_the_same(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """To the last bit; qwen2 has biases, qwen2_moe experts."""
    quantkit.quantize(tiny(family), tmp_path / "out", recipe={"scheme": "w4a16_g32", "method": "rtn"})
    model = quantkit.load(tmp_path / "out", dtype="bfloat16")
    expected, size = step_logits(model), bytes_without_addresses(model)
    done = join_linears(model)
    assert not done.apart
    assert (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    ) in (done.joined)
    assert torch.equal(step_logits(model), expected)
    assert bytes_without_addresses(model) == size
    assert join_linears(model).joined == ()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_one_product_for_three(tokens: int, bias: bool) -> None:
    """It runs once for the same tensor; every other order and input gives each layer's own product too."""
    apart = Attention(bias=bias)
    joined = copy.deepcopy(apart)
    join_linears(joined)
    x, other = normal(tokens, 96).to(BF16), normal(tokens, 96, seed=3).to(BF16)
    calls: list[int] = []
    cast(Any, joined.q_proj).product.register_forward_hook(lambda *_: calls.append(1))
    for found, expected in zip(joined(x), apart(x), strict=True):
        assert torch.equal(found, expected)
    assert len(calls) == 1
    for name, given in (("v_proj", x), ("q_proj", other), ("k_proj", x), ("k_proj", x), ("v_proj", other)):
        assert torch.equal(joined.get_submodule(name)(given), apart.get_submodule(name)(given))
    # Nothing is kept once each has taken its rows.
    joined(x)
    assert cast(Any, joined.q_proj).shared._kept is None


def test_a_copy_and_a_move_stay_joined() -> None:
    apart = Attention()
    joined = copy.deepcopy(apart)
    join_linears(joined)
    moved = copy.deepcopy(joined).float()
    x = normal(2, 96)
    for found, expected in zip(moved(x), apart.float()(x), strict=True):
        torch.testing.assert_close(found, expected)
    assert cast(Any, moved.k_proj).shared is cast(Any, moved.q_proj).shared
    assert cast(Any, moved.k_proj).shared is not cast(Any, joined.q_proj).shared


def test_the_state_dict_has_them_one_by_one(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    quantkit.quantize(tiny("qwen2"), tmp_path / "out", recipe={"scheme": "w4a16_g32_asym", "method": "rtn"})
    model, joined = quantkit.load(tmp_path / "out"), quantkit.load(tmp_path / "out")
    join_linears(joined)
    expected, found = model.state_dict(), joined.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(quantkit.InputError, match=r"model\.layers\.0\.\S+: the layer is joined"):
        joined.load_state_dict(expected)


def test_save_pretrained_writes_the_checkpoint(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """What transformers opened, joined and saved is the checkpoint, tensor by tensor."""
    from transformers import AutoModelForCausalLM

    quantkit.quantize(tiny("llama"), tmp_path / "out", recipe={"scheme": "w4a16_g32", "method": "rtn"})
    quantkit.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert join_linears(model).joined
    model.save_pretrained(tmp_path / "again")
    first, second = (tensors(tmp_path / name) for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        expected = model(IDS[None]).logits
    dense = model.dequantize(dtype=torch.float32)
    assert not any(isinstance(module, quantkit.QuantLinear | JoinedLinear) for module in dense.modules())
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS[None]).logits, expected)


def test_what_is_left_apart() -> None:
    other = Attention(("w4a16_g32", "w8a16_g32", "w4a16_g32"))
    assert "q_proj, k_proj, v_proj: schemes differ (w4a16_g32" in join_linears(other).apart[0]
    assert type(other.q_proj) is quantkit.QuantLinear
    hooked = Attention()
    cast(nn.Module, hooked.k_proj).register_forward_hook(lambda *_: None)
    assert "hooks" in join_linears(hooked).apart[0]
    mixed = Attention()
    mixed.v_proj = dense(96, 48)
    assert "not all are QuantLinear" in join_linears(mixed).apart[0]
    biased = Attention()
    biased.v_proj = quantkit.QuantLinear.from_linear(dense(96, 48), "w4a16_g32")
    assert "bias" in join_linears(biased).apart[0]
    plain = nn.Module()
    plain.q_proj, plain.k_proj = dense(32, 32), dense(32, 32)
    assert join_linears(plain) == quantkit.Joining((), ())
    done = Attention()
    join_linears(done)
    assert isinstance(done.v_proj, JoinedLinear)
    assert (done.v_proj.in_features, done.v_proj.out_features) == (96, 48)
    assert torch.equal(done.v_proj.weight, cast(Tensor, cast(Any, Attention()).v_proj.weight))
