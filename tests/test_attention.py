"""Attention of decoding steps in models: where it is put, what it computes, and what stays with torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit import attention
from quantkit.attention import NAME, attend_by_steps
from quantkit.generation import Decoder
from quantkit.kernels.attend import attend_step, attends_here

pytestmark = pytest.mark.skipif(not attends_here(), reason="the just-in-time kernels do not run on this CPU")

TEXT = torch.arange(3, 27)  # past sliding windows of 16


def logits(model: Any, given: int = 5) -> Tensor:
    decoder = Decoder(model, len(TEXT))
    first = decoder.prefill(TEXT[:given])
    return torch.stack([first, *(decoder.step(int(token)) for token in TEXT[given:])])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma3_text", "mixtral"])
def test_steps_give_the_logits_of_torchs_attention(
    family: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, to what the order of sums changes; and the operator has run in every block."""
    model = quantkit.load(tiny(family))
    with monkeypatch.context() as without:
        without.setattr(attention, "attends_here", lambda: False)
        wanted = logits(model)
    assert model.config._attn_implementation == "sdpa"
    calls: list[float] = []

    def recorded(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        calls.append(scale)
        return attend_step(q, keys, values, mask, scale)

    monkeypatch.setattr(attention, "attend_step", recorded)
    found = logits(model)
    assert model.config._attn_implementation == NAME
    assert len(calls) == (len(TEXT) - 5) * model.config.num_hidden_layers
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


def test_models_with_other_attention_keep_it(tiny: Callable[[str], Path]) -> None:
    """gemma2 caps its scores, which torch's attention does not do either."""
    model = quantkit.load(tiny("gemma2"))
    before = model.config._attn_implementation
    assert before != "sdpa"
    assert not attend_by_steps(model)
    assert model.config._attn_implementation == before


def test_gradients_go_through_torchs(tiny: Callable[[str], Path]) -> None:
    """One token and a mask, but queries that want a gradient."""
    model = quantkit.load(tiny("llama"))
    assert attend_by_steps(model)
    mask = torch.arange(32)[None, None, None] < 6
    q = torch.randn(1, 4, 1, 16, requires_grad=True)
    keys, values = torch.randn(1, 4, 32, 16), torch.randn(1, 4, 32, 16)
    found, _ = attention._attention(model.model.layers[0].self_attn, q, keys[:, :2], values[:, :2], mask)
    found.sum().backward()
    assert q.grad is not None
