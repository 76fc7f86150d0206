"""Configs that would make transformers fetch code, or build what no machine holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.model_config import open_config
from quantkit.skeleton import open_skeleton


def changed(path: Path, **values: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))
    return path


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel@main:flash"}])
def test_code_on_a_hub_is_refused(model_copy: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{key}.*is code on a hub, which is not run"):
        open_config(changed(model_copy, **{key: value}))
    assert open_config(changed(model_copy, **{key: None})).model_type == "llama"


def test_code_on_a_hub_in_a_part_of_the_config(model_copy: Path) -> None:
    with pytest.raises(CheckpointError, match="code on a hub"):
        open_config(changed(model_copy, text_config={"attn_implementation": "a/b"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("hidden_size", 10**12),
        ("vocab_size", 10**15),
        ("intermediate_size", -4),
        ("num_attention_heads", 10**18),
        ("max_position_embeddings", 10**12),
        ("head_dim", 10**10),
    ],
)
def test_absurd_numbers(model_copy: Path, key: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=f"{key}={value} with .*check config.json against the weights"):
        open_skeleton(Checkpoint(changed(model_copy, **{key: value})), torch.float32)


@pytest.mark.parametrize(("family", "key"), [("mixtral", "num_local_experts"), ("deepseek_v3", "n_routed_experts")])
def test_absurd_numbers_of_experts(tmp_path: Path, family: str, key: str) -> None:
    path = changed(save_tiny(family, tmp_path), **{key: 10**8})
    with pytest.raises(CheckpointError, match=f"{key}=100000000 with"):
        open_skeleton(Checkpoint(path), torch.float32)


def test_masks_of_positions_by_positions(tmp_path: Path) -> None:
    values = {"model_type": "gpt_neo", "max_position_embeddings": 10**6}
    path = changed(save_tiny("gpt2", tmp_path), **values)
    with pytest.raises(CheckpointError, match="max_position_embeddings=1000000 with at most 8192"):
        open_skeleton(Checkpoint(path), torch.float32)


@pytest.mark.parametrize("value", ["x", [], {}, 1.5, None, True, 0])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "rope_theta", "layer_types", "model_type"])
def test_values_of_other_types(model_copy: Path, key: str, value: object) -> None:
    try:
        open_skeleton(Checkpoint(changed(model_copy, **{key: value})), torch.float32)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 - some values mean a default


def test_families_are_within_the_limits(tiny: Callable[[str], Path]) -> None:
    for family in ("mixtral", "gpt2", "deepseek_v3", "opt"):
        open_skeleton(Checkpoint(tiny(family)), torch.float32)
