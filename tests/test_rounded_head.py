"""The output head rounded at load: its numbers, the embedding beside it, what is kept, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.bench import BenchSpec, measure, weight_bytes
from quantkit.cli import main
from quantkit.grid import dequantize, quantize_groups
from quantkit.rounded_head import round_head
from quantkit.scheme import parse_scheme

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "opt"]  # untied, and tied to the embedding
IDS = torch.tensor([[1, 17, 30, 4, 99, 8, 51]])


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS).logits
        return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_product_is_that_of_the_rounded_weight(family: str, bits: int, tiny: Callable[[str], Path]) -> None:
    """The logits are those of a dense model whose head, and only its head, was rounded by hand."""
    path = tiny(family)
    dense: Any = quantkit.load(path)
    weight = dense.get_output_embeddings().weight.detach()
    embedding = dense.get_input_embeddings().weight.detach()
    q = quantize_groups(weight, parse_scheme(f"w{bits}a16_channel"), weight.dtype)
    rounded = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    rounded.weight.copy_(dequantize(q))
    dense.set_output_embeddings(rounded)
    model: Any = quantkit.load(path, head_bits=bits)
    head = model.get_output_embeddings()
    assert isinstance(head, quantkit.QuantLinear)
    assert torch.equal(head.quantized().codes, q.codes)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(model), logits(quantkit.load(path)))


def test_what_a_token_reads_shrinks(tiny: Callable[[str], Path]) -> None:
    """qwen2's head is tied: the embedding is then read for one row only, and the copy is the head's bytes."""
    path = tiny("qwen2")
    opened: list[Any] = [quantkit.load(path, dtype="bfloat16", head_bits=bits) for bits in (None, 8)]
    whole, model = opened
    embedding = model.get_input_embeddings().weight
    copy = sum(t.numel() * t.element_size() for t in model.get_output_embeddings().buffers())
    assert weight_bytes(model) == weight_bytes(whole) - (embedding.numel() - embedding.shape[1]) * 2 + copy
    assert copy < embedding.numel() * 1.1


def test_a_head_of_the_checkpoint_stays(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = {"scheme": "w4a16_g32", "method": "rtn", "rules": [{"match": "lm_head", "scheme": "w8a16_g32"}]}
    quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=recipe)
    model = quantkit.load(tmp_path / "out")
    head = model.get_output_embeddings()
    said = round_head(model, 4)
    assert model.get_output_embeddings() is head
    assert "lm_head" in said
    assert "w8a16_g32" in said
    assert "stays" in said


def test_bad_input(tiny: Callable[[str], Path]) -> None:
    for bits in (1, 9):
        with pytest.raises(quantkit.InputError, match=f"head_bits: {bits} is not a width"):
            quantkit.load(tiny("llama"), head_bits=bits)
        with pytest.raises(quantkit.InputError, match="head_bits"):
            BenchSpec(head_bits=bits)
    with pytest.raises(quantkit.KernelError, match=r"lm_head: .*no backend 'nonsense'"):
        quantkit.load(tiny("llama"), head_bits=8, backend="nonsense")
    model = quantkit.load(tiny("llama"))
    with pytest.raises(quantkit.InputError, match="no output head"):
        round_head(model.model, 8)


def test_it_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", "builtin", "--prompt", "Return", "--max-new-tokens", "2", "--head-bits", "8")
    monkeypatch.setattr("sys.argv", ["quantkit", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert capsys.readouterr().err.startswith("lm_head: rounded to w8a16")
    found = measure("builtin", BenchSpec(prompt_tokens=8, new_tokens=2, rounds=1, head_bits=8, device="cpu"))
    assert "rounded to w8a16" in found.notes[0]
