"""Whole checkpoints in GPTQ's and AWQ's layouts: written, loaded, and loaded with the configs of older programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES, VOCAB, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.report import Event, LayerDone

TOKENS = torch.arange(5, 45)[None] % VOCAB
FORMATS = ("gptq", "gptq_v2", "awq")


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = quantkit.load(path)(TOKENS).logits
    return found


def quantized(model: Path, output: Path, fmt: str, **recipe: Any) -> Path:
    values = {"scheme": "w4a16_g16_asym", "method": "rtn", "format": fmt, **recipe}
    return quantkit.quantize(model, output, recipe=values).path


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_families(family: str, tmp_path: Path) -> None:
    """The same codes in every format give the same logits, bit for bit."""
    model = save_tiny(family, tmp_path / "m", torch.bfloat16)
    expected = logits(quantized(model, tmp_path / "ct", "compressed-tensors"))
    for fmt in FORMATS:
        assert torch.equal(logits(quantized(model, tmp_path / fmt, fmt)), expected), fmt


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "m", torch.bfloat16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqs_widths_with_the_head(llama: Path, tmp_path: Path, bits: int) -> None:
    recipe = {"scheme": f"w{bits}a16_g32_sym", "rules": [{"match": "lm_head", "scheme": f"w{bits}a16_g32_sym"}]}
    path = quantized(llama, tmp_path / "q", "gptq", **recipe)
    assert "lm_head.qweight" in Checkpoint(path).tensors
    assert torch.equal(logits(path), logits(quantized(llama, tmp_path / "ct", "compressed-tensors", **recipe)))
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert json.loads((path / "quantize_config.json").read_text()) == config


def test_one_scale_a_channel(llama: Path, tmp_path: Path) -> None:
    """``group_size: -1``, which would be no size of a model."""
    recipe = {"scheme": "w4a16_channel_asym"}
    expected = logits(quantized(llama, tmp_path / "ct", "compressed-tensors", **recipe))
    for fmt in FORMATS:
        assert torch.equal(logits(quantized(llama, tmp_path / fmt, fmt, **recipe)), expected)


def test_reordered_groups(llama: Path, tmp_path: Path) -> None:
    calibration = {"num_samples": 4, "sequence_length": 32}
    tokens = [torch.randint(VOCAB, (32,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    recipe = {"scheme": "w4a16_g16", "method": {"name": "gptq", "act_order": "group"}, "calibration": calibration}
    path = quantkit.quantize(llama, tmp_path / "q", recipe={**recipe, "format": "gptq"}, tokens=tokens).path
    g_idx = load_file(path / "model-00001-of-00004.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
    assert sorted(g_idx.tolist()) == sorted(list(range(6)) * 16)
    assert g_idx.tolist() != sorted(g_idx.tolist())
    assert json.loads((path / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert bool(torch.isfinite(logits(path)).all())
    with pytest.raises(quantkit.RecipeError, match=r"format awq does not hold the reordered groups.*or format gptq"):
        quantkit.quantize(
            llama, tmp_path / "no", recipe={**recipe, "scheme": "w4a16_g16_asym", "format": "awq"}, tokens=tokens
        )


@pytest.mark.parametrize("fmt", FORMATS)
def test_projected_size_is_the_size(llama: Path, tmp_path: Path, fmt: str) -> None:
    recipe = {"scheme": "w4a16_g32_asym", "method": "rtn", "format": fmt}
    result = quantkit.quantize(llama, tmp_path / "q", recipe=recipe)
    assert result.report["size_after"] == Checkpoint(result.path).nbytes


@pytest.mark.parametrize(("fmt", "order"), [("gptq", "group"), ("awq", "static")])
def test_an_interrupted_run_goes_on_from_what_is_packed(llama: Path, tmp_path: Path, fmt: str, order: str) -> None:
    """The blocks that are done are decoded from their shards to measure the next one."""
    tokens = [torch.randint(VOCAB, (32,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    recipe = {"scheme": "w4a16_g16_asym", "method": {"name": "gptq", "act_order": order}, "format": fmt}
    whole = quantkit.quantize(llama, tmp_path / "whole", recipe=recipe, tokens=tokens).path

    def interrupt(event: Event) -> None:
        if isinstance(event, LayerDone) and event.done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(llama, tmp_path / "q", recipe=recipe, tokens=tokens, observer=interrupt)
    resumed = quantkit.quantize(llama, tmp_path / "q", recipe=recipe, tokens=tokens, resume=True)
    assert resumed.report["shards_found_done"] == 1
    for file in whole.glob("*.safetensors"):
        assert (resumed.path / file.name).read_bytes() == file.read_bytes()


def test_rules(llama: Path, tmp_path: Path) -> None:
    """Several schemes and layers left out, in GPTQ's rules by name."""
    rules = [
        {"match": "*.down_proj", "scheme": "w8a16_g32"},
        {"match": "*.1.self_attn.*", "skip": True},
        {"match": "*.2.mlp.up_proj", "scheme": "w2a16_g32_asym"},
    ]
    recipe = {"scheme": "w4a16_g32", "rules": rules}
    path = quantized(llama, tmp_path / "q", "gptq", **recipe)
    assert torch.equal(logits(path), logits(quantized(llama, tmp_path / "ct", "compressed-tensors", **recipe)))
    with pytest.raises(quantkit.SchemeError, match="have zero points"):
        quantized(llama, tmp_path / "no", "awq", **recipe)
    assert not (tmp_path / "no").exists()
    asymmetric = {"scheme": "w4a16_g32_asym", "rules": [{"match": "*.down_proj", "scheme": "w4a16_g16_asym"}]}
    with pytest.raises(quantkit.SchemeError, match="2 schemes"):
        quantized(llama, tmp_path / "no", "awq", **asymmetric)


@pytest.mark.parametrize(
    ("fmt", "recipe", "reason"),
    [
        ("gptq", {"scheme": "w5a16_g16"}, "model.layers.0.self_attn.q_proj: format gptq cannot hold w5a16"),
        ("gptq", {"scheme": "w8a8"}, "format gptq cannot hold w8a8"),
        ("awq", {"scheme": "w4a16_g16_sym"}, "format awq cannot hold w4a16_g16_sym: its weights have zero points"),
        ("awq", {"scheme": "w3a16_g16_asym"}, "format awq cannot hold w3a16"),
    ],
)
def test_schemes_that_a_format_cannot_hold(
    llama: Path, tmp_path: Path, fmt: str, recipe: dict[str, Any], reason: str
) -> None:
    with pytest.raises(quantkit.SchemeError) as caught:
        quantized(llama, tmp_path / "q", fmt, **recipe)
    assert reason.partition(":")[0] in str(caught.value)
    assert not list(tmp_path.iterdir())


# As strangers write them


def as_single_file(path: Path, name: str) -> dict[str, Tensor]:
    """Join the shards in one file of this name."""
    tensors = {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}
    for file in (*path.glob("*.safetensors"), path / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, path / name)
    return tensors


def move_config(path: Path, name: str, value: dict[str, Any]) -> None:
    """Take the quantization_config out of config.json, and write another file in its place."""
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize_config.json").unlink(missing_ok=True)
    (path / name).write_text(json.dumps(value))


def test_old_autogptq(llama: Path, tmp_path: Path) -> None:
    """No quantization_config, a file of its own name, and a bias of zeros at every layer."""
    path = quantized(llama, tmp_path / "q", "gptq", scheme="w4a16_g32")
    expected = logits(path)
    tensors = as_single_file(path, "gptq_model-4bit-32g.safetensors")
    rows = {n.removesuffix(".scales"): t.shape[1] for n, t in tensors.items() if n.endswith(".scales")}
    biases = {f"{stem}.bias": torch.zeros(size, dtype=torch.float16) for stem, size in rows.items()}
    save_file({**tensors, **biases}, path / "gptq_model-4bit-32g.safetensors")
    move_config(path, "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True})
    assert torch.equal(logits(path), expected)
    with pytest.raises(quantkit.CheckpointError, match="is already quantized"):
        quantkit.quantize(path, tmp_path / "again")


def test_old_autoawq(llama: Path, tmp_path: Path) -> None:
    path = quantized(llama, tmp_path / "q", "awq", scheme="w4a16_g32_asym")
    expected = logits(path)
    config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    move_config(path, "quant_config.json", config)
    assert torch.equal(logits(path), expected)
    (path / "quant_config.json").write_text(json.dumps({**config, "version": "gemv"}))
    with pytest.raises(quantkit.CheckpointError, match="version: 'gemv' is not read; quantkit reads gemm"):
        quantkit.load(path)
    (path / "quant_config.json").unlink()
    with pytest.raises(quantkit.CheckpointError, match="no quantization_config, and quantized weights"):
        quantkit.load(path)


def test_autoround(llama: Path, tmp_path: Path) -> None:
    """Its own config, without g_idx; a layer that stays as it was."""
    rules = [{"match": "*.1.mlp.up_proj", "skip": True}]
    path = quantized(llama, tmp_path / "q", "gptq_v2", scheme="w3a16_g32_asym", rules=rules)
    expected = logits(path)
    tensors = as_single_file(path, "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.endswith(".g_idx")}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "bits": 3,
        "group_size": 32,
        "sym": False,
        "data_type": "int",
        "extra_config": {"model.layers.1.mlp.up_proj": {"bits": 16, "data_type": "fp"}},
    }
    (path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(path), expected)


def test_a_layer_that_is_not_there_is_named(llama: Path, tmp_path: Path) -> None:
    path = quantized(llama, tmp_path / "q", "gptq")
    tensors = as_single_file(path, "model.safetensors")
    gone = "model.layers.1.mlp.up_proj"
    save_file({n: t for n, t in tensors.items() if not n.startswith(gone)}, path / "model.safetensors")
    with pytest.raises(quantkit.CheckpointError, match=rf"missing, such as {gone}\.weight"):
        quantkit.load(path)
    save_file({n: t for n, t in tensors.items() if n != f"{gone}.qzeros"}, path / "model.safetensors")
    with pytest.raises(quantkit.CheckpointError, match=rf"{gone}\.qzeros: is missing"):
        quantkit.load(path)


def test_fused_names_in_compressed_tensors(llama: Path, tmp_path: Path) -> None:
    """Targets and ignore as vLLM names what it fuses."""
    rules = [{"match": "*.0.mlp.*_proj", "skip": True}, {"match": "re:.*[qkv]_proj", "scheme": "w8a16_g32"}]
    path = quantized(llama, tmp_path / "q", "compressed-tensors", scheme="w4a16_g32", rules=rules)
    expected = logits(path)
    config = json.loads((path / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["ignore"] = ["lm_head", "model.layers.0.mlp.gate_up_proj", "re:.*\\.0\\.mlp\\.down_proj"]
    for group in quantization["config_groups"].values():
        if "Linear" not in group["targets"]:
            group["targets"] = ["re:.*self_attn.qkv_proj"]
    (path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(path), expected)
