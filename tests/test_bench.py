"""The benchmark: what a token reads, by hand; and the command, on the shipped model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layers import fastest_cpu
from torch import Tensor

import quantkit
from quantkit.bench import BenchResult, BenchSpec, bench, measure, weight_bytes
from quantkit.cli import main


def embedding_of(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def test_a_token_reads_every_weight_but_the_embedding(tiny: Callable[[str], Path]) -> None:
    """llama's head is its own: of the embedding one row is read; qwen2's is tied: it is read as the head."""
    model = quantkit.load(tiny("llama"))
    embedding = embedding_of(model)
    everything = sum(t.numel() * 4 for t in (*model.parameters(), *model.buffers()))
    assert weight_bytes(model) == everything - embedding.numel() * 4 + embedding.shape[1] * 4
    tied = quantkit.load(tiny("qwen2"))
    assert weight_bytes(tied) == sum(t.numel() * 4 for t in (*tied.parameters(), *tied.buffers()))


def test_quantized_weights_count_as_they_are_packed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = {"scheme": "w4a16_g32", "method": "rtn", "dtype": "bfloat16"}
    quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=recipe)
    dense, quantized = (quantkit.load(path, dtype="bfloat16") for path in (tiny("llama"), tmp_path / "out"))
    layer = quantized.get_submodule("model.layers.0.mlp.up_proj")
    packed = sum(t.numel() * t.element_size() for name, t in layer.named_buffers() if name != "call")
    # Nibbles, and in bfloat16 a scale for each group of 32; torch's operator has a zero beside each scale.
    assert packed == 96 * 64 // 2 + 96 * 2 * 2 * (1 if fastest_cpu() == "cpu_jit" else 2)
    assert weight_bytes(quantized) < weight_bytes(dense)


def test_of_experts_a_token_reads_its_share(tiny: Callable[[str], Path]) -> None:
    model = quantkit.load(tiny("mixtral"))
    experts = sum(p.numel() * 4 for name, p in model.named_parameters() if ".experts." in name)
    others = sum(t.numel() * 4 for n, t in (*model.named_parameters(), *model.named_buffers()) if ".experts." not in n)
    embedding = embedding_of(model)
    assert experts > 0
    assert weight_bytes(model) == others + experts // 2 - embedding.numel() * 4 + embedding.shape[1] * 4


def test_figures_hang_together() -> None:
    spec = BenchSpec(prompt_tokens=16, new_tokens=4, rounds=1, device="cpu")
    found = measure("builtin", spec)
    assert found.prefill_tokens_per_second == pytest.approx(16 / found.first_token_seconds)
    assert found.mbu > 0
    assert found.mbu == pytest.approx(found.bytes_per_token * found.decode_tokens_per_second / found.bandwidth)
    assert found.peak_bytes > 50e6


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two models, each in a process of its own."""
    arguments = ("builtin", "builtin", "--rounds", "1", "--prompt-tokens", "8", "--new-tokens", "2", "--json")
    monkeypatch.setattr("sys.argv", ["quantkit", "bench", *arguments, str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "decode tok/s" in captured.out
    stored = json.loads((tmp_path / "out.json").read_text())
    assert [result["model"] for result in stored["results"]] == ["builtin", "builtin"]
    assert stored["spec"]["new_tokens"] == 2
    assert BenchResult(**{k: v for k, v in stored["results"][0].items() if k != "mbu"}).mbu > 0


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(quantkit.InputError, match="--new-tokens"):
        BenchSpec(new_tokens=0)
    with pytest.raises(quantkit.InputError, match="positions"):
        bench(["builtin"], BenchSpec(prompt_tokens=100_000, rounds=1))
    with pytest.raises(quantkit.InputError, match="no such directory"):
        bench([str(tmp_path / "nothing")], BenchSpec(rounds=1))
