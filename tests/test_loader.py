"""load(): quantized and dense directories of every family, against the dequantized model in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantkit
from quantkit.arch import is_transposed
from quantkit.checkpoint import Checkpoint
from quantkit.linear import QuantLinear
from quantkit.run import prepare

IDS = torch.arange(3, 43)[None] % VOCAB


def dequantized_reference(dense: Path, quantized: PreTrainedModel) -> PreTrainedModel:
    """transformers' own model with the quantized layers' weights written in as dense ones."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantLinear):
            module: Any = model.get_submodule(name)
            weight = layer.dequantize().float()
            with torch.no_grad():
                module.weight.copy_(weight.T if is_transposed(module) else weight)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family(family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    quantkit.quantize(tiny(family), tmp_path / "q", recipe={"scheme": "w4a16_g32_asym"}, tokens=tokens)
    model = quantkit.load(tmp_path / "q")
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    plan = prepare(tiny(family), tmp_path / "p", recipe={"scheme": "w4a16_g32", "method": "rtn"}).plan
    assert len(layers) == len(plan.layers)
    assert not any(p.is_meta for p in model.parameters())
    expected = dequantized_reference(tiny(family), model)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == bool(model.all_tied_weights_keys)
    generate: Any = model.generate
    generated = generate(IDS[:, :5], max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > 5


@torch.no_grad()
def test_dense(tiny: Callable[[str], Path]) -> None:
    model = quantkit.load(tiny("qwen3"), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    torch.testing.assert_close(quantkit.load(tiny("qwen3"))(IDS).logits, model(IDS).logits.float(), rtol=0.1, atol=0.1)


@torch.no_grad()
def test_quantized_head_and_mixed_schemes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    rules = [
        {"match": "lm_head", "scheme": "w8a16_g32"},
        {"match": "*.0.*", "skip": True},
        {"match": "*.down_proj", "scheme": "w8a16"},
    ]
    recipe = {"scheme": "w4a16_g32", "method": "rtn", "rules": rules}
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=recipe)
    model = quantkit.load(tmp_path / "q")
    schemes = {n: str(m.scheme) for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert schemes["lm_head"] == "w8a16_g32_sym"
    assert schemes["model.layers.1.mlp.down_proj"] == "w8a16_channel_sym"
    assert schemes["model.layers.2.mlp.up_proj"] == "w4a16_g32_sym"
    assert not any(".layers.0." in name for name in schemes)
    expected = dequantized_reference(tiny("llama"), model)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_names_without_prefix(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-2 as the hub has it: tensors without ``transformer.``; the output keeps the source's names."""
    source = Path(shutil.copytree(tiny("gpt2"), tmp_path / "m"))
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    quantkit.quantize(source, tmp_path / "q", recipe={"scheme": "w4a16_g32", "method": "rtn"})
    names = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "h.0.attn.c_attn.weight_packed" in names
    quantkit.quantize(tiny("gpt2"), tmp_path / "q2", recipe={"scheme": "w4a16_g32", "method": "rtn"})
    with torch.no_grad():
        assert torch.equal(quantkit.load(tmp_path / "q")(IDS).logits, quantkit.load(tmp_path / "q2")(IDS).logits)


@pytest.fixture
def quantized(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    quantkit.quantize(tiny("qwen2"), tmp_path / "q", recipe={"scheme": "w4a16_g32_asym", "method": "rtn"})
    return tmp_path / "q"


def change_config(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def test_refusals(quantized: Path) -> None:
    """What is malformed is refused with its name, before it is run."""
    weights = quantized / "model-00002-of-00004.safetensors"
    good = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    for bad, text in (
        (good[name] * float("nan"), "NaN or inf"),
        (good[name] * 0, "NaN, inf or 0"),
        (good[name][:, :1].contiguous(), "config.json asks for"),
        (good[name].to(torch.int32), "config.json asks for"),
    ):
        save_file({**good, name: bad}, weights)
        with pytest.raises(quantkit.CheckpointError, match=text):
            quantkit.load(quantized)
    save_file({n: t for n, t in good.items() if n != "model.layers.1.input_layernorm.weight"}, weights)
    with pytest.raises(quantkit.CheckpointError, match="not where it says"):
        quantkit.load(quantized)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(quantization_config="x"), "is not an object"),
        (lambda c: c["quantization_config"].update(quant_method="quark"), "quant_method 'quark' is not read"),
        (lambda c: c["quantization_config"].pop("config_groups"), "config_groups"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=7),
            "group_size=7",
        ),
        (lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=3), "weight_packed"),
    ],
)
def test_bad_quantization_config(quantized: Path, change: Callable[[dict[str, object]], object], text: str) -> None:
    change_config(quantized, change)
    with pytest.raises(quantkit.CheckpointError, match=text):
        quantkit.load(quantized)


def test_missing_quantized_layer(quantized: Path) -> None:
    """A layer that the config says is quantized but that is not there is named."""
    weights = quantized / "model-00002-of-00004.safetensors"
    kept = {n: t for n, t in load_file(weights).items() if ".mlp.up_proj." not in n}
    save_file(kept, weights)
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != weights.name or n in kept}
    (quantized / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(quantkit.CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_packed: is missing"):
        quantkit.load(quantized)


def test_a_dense_model_without_a_tensor_is_not_filled_with_noise(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(quantkit.QuantkitError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        quantkit.load(path)


def by_transformers(path: Path, output: Path) -> object:
    return AutoModelForCausalLM.from_pretrained(path)


def by_load(path: Path, output: Path) -> object:
    return quantkit.load(path)


def by_convert(path: Path, output: Path) -> object:
    return quantkit.convert(path, output, "awq")


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_zero_point", "weight_g_idx", "bias"])
@pytest.mark.parametrize("way", [by_load, by_transformers, by_convert])
def test_a_layer_larger_than_the_model_allows_is_not_read(
    way: Callable[[Path, Path], object], leaf: str, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 GB of zeros that take no disk; refused by the header, and nothing of the layer is asked for."""
    name = f"model.layers.1.mlp.up_proj.{leaf}"
    weights = quantized / "model-00002-of-00004.safetensors"
    tensors = load_file(weights)
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    if leaf in ("weight_g_idx", "bias"):
        index["weight_map"][name] = weights.name
        (quantized / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({**tensors, name: torch.zeros(1, dtype=torch.int32)}, weights)
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = max(one["data_offsets"][1] for key, one in header.items() if key != "__metadata__")
    gap_start, gap_stop = header[name]["data_offsets"]
    rest = bytearray(data[8 + length :])
    del rest[gap_start:gap_stop]
    for key, one in header.items():
        if key != "__metadata__" and one["data_offsets"][0] >= gap_stop:
            one["data_offsets"] = [offset - (gap_stop - gap_start) for offset in one["data_offsets"]]
    end -= gap_stop - gap_start
    header[name] = {"dtype": "I32", "shape": [2**20, 2**10], "data_offsets": [end, end + 2**32]}
    text = json.dumps(header).encode()
    with weights.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + rest)
        file.truncate(8 + len(text) + end + 2**32)
    asked: list[str] = []
    read = Checkpoint.read

    def noted(self: Checkpoint, names: Any, *args: Any) -> Any:
        asked.extend(names := list(names))
        return read(self, names, *args)

    monkeypatch.setattr(Checkpoint, "read", noted)
    with pytest.raises(
        quantkit.CheckpointError, match=r"layers\.1\.mlp\.up_proj: its tensors have 42949\d+ bytes, and"
    ):
        way(quantized, tmp_path / "out")
    assert name not in asked
    assert not (tmp_path / "out").exists()
