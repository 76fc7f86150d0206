"""Quantizations that quantkit does not read: each verb says so in one line, with exit code 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.cli import main

GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}
CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
# What other programs write, as their configs have it, and the word that the refusal must hold.
UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "'fp8'"),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, "'mxfp4'"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
    "old bitsandbytes": ({"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0}, "'bitsandbytes'"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "'quanto'"),
    "awq gemv": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "'gemv'"),
    "gptq marlin": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "is_marlin_format": True},
        "is_marlin_format",
    ),
    "gptq marlin by name": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
        "'marlin'",
    ),
    **{
        layout: ({**CT, "format": layout, "config_groups": {"group_0": GROUP}}, repr(layout))
        for layout in (
            "float-quantized",
            "naive-quantized",
            "nvfp4-pack-quantized",
            "mxfp4-pack-quantized",
            "marlin-24",
        )
    },
    "a group's float-quantized": (
        {**CT, "format": "mixed-precision", "config_groups": {"group_0": {**GROUP, "format": "float-quantized"}}},
        "'float-quantized'",
    ),
    "8-bit cache": (
        {
            **CT,
            "format": "pack-quantized",
            "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}},
        },
        "kv_cache_scheme",
    ),
}


def refused_everywhere(path: Path, word: str, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """By each command in one line on stderr with exit code 2, nothing written."""
    convert = ["--to", "gptq", "--output", str(output)]
    capsys.readouterr()  # what the fixtures said
    for command in (["verify"], ["inspect"], ["convert", *convert]):
        monkeypatch.setattr("sys.argv", ["quantkit", command[0], str(path), *command[1:]])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().err.strip().splitlines()
        assert (command[0], stopped.value.code, len(said)) == (command[0], 2, 1)
        assert said[0].startswith("error: ")
        assert word in said[0]
        assert "quantkit r" in said[0]  # reads, or runs
    assert not output.exists()


@pytest.mark.parametrize("name", UNREAD)
def test_quantizations_that_are_not_read(
    name: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    stated, word = UNREAD[name]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    refused_everywhere(path, word, tmp_path / "out", monkeypatch, capsys)
    with pytest.raises(quantkit.UnreadFormatError, match=re.escape(word)):
        quantkit.load(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_weights_in_8_bit_floating_point(
    dtype: torch.dtype, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Whatever the config says, or does not."""
    path = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, path / "model.safetensors")
    refused_everywhere(path, "dtype 'F8_E", tmp_path / "out", monkeypatch, capsys)


def test_modelopts_own_file(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    refused_everywhere(path, "ModelOpt", tmp_path / "out", monkeypatch, capsys)
