"""What is found in the modules of a model: linear layers, decoder blocks, layers that engines fuse."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantkit.arch import collapsed_name, find_blocks, find_linears, is_linear, is_transposed, unequal_fused
from quantkit.scheme import QuantScheme

BLOCK_PATHS = {
    **dict.fromkeys(FAMILIES, "model.layers"),
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}
LINEARS = {  # of one block
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma2": 7,
    "gemma3_text": 7,
    "phi3": 4,
    "opt": 6,
    "gpt2": 4,
    "gpt_neox": 4,
    "olmo2": 7,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norms = nn.ModuleList([nn.LayerNorm(4)])
        self.empty = nn.ModuleList()
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(4, 10)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_blocks_of_every_family_are_found(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    found = find_blocks(model)
    assert found is not None
    assert found.path == BLOCK_PATHS[family]
    assert len(found.blocks) == 3
    for index, block in enumerate(found.blocks):
        assert block is model.get_submodule(f"{found.path}.{index}")
        linears = find_linears(block)
        assert len(linears) == LINEARS[family]
        assert all(is_transposed(linear) == (family == "gpt2") for linear in linears.values())


def test_lists_inside_of_blocks_are_not_blocks() -> None:
    model = Model()
    found = find_blocks(model)
    assert found is not None
    assert found.path == "layers"
    assert found.blocks == tuple(model.layers)


def test_two_lists_are_ambiguous_and_none_is_none() -> None:
    model = Model()
    model.decoder = nn.ModuleList([Block()])
    assert find_blocks(model) is None
    assert find_blocks(nn.Sequential(nn.Linear(2, 2))) is None


def test_find_linears_names_them_in_order() -> None:
    names = list(find_linears(Model()))
    block = ["up", "experts.0", "experts.1"]
    assert names == [f"layers.{index}.{name}" for index in range(3) for name in block] + ["head"]


def test_what_is_linear() -> None:
    assert is_linear(nn.Linear(2, 3))
    assert not is_transposed(nn.Linear(2, 3))
    assert is_linear(Conv1D(3, 2))
    assert is_transposed(Conv1D(3, 2))
    for other in (nn.Conv1d(2, 3, 1), nn.Embedding(2, 3), nn.LayerNorm(2), nn.Bilinear(2, 2, 2), nn.Identity()):
        assert not is_linear(other)
        assert not is_transposed(other)


W4, W8 = QuantScheme(4, 128), QuantScheme(8, None)


def attention(q: object, k: object, v: object, layer: int = 0) -> dict[str, object]:
    stem = f"model.layers.{layer}.self_attn"
    return {f"{stem}.q_proj": q, f"{stem}.k_proj": k, f"{stem}.v_proj": v, f"{stem}.o_proj": W8}


def test_equal_fused_layers_are_no_problem() -> None:
    gate_up: dict[str, object] = {"model.layers.0.mlp.gate_proj": W8, "model.layers.0.mlp.up_proj": W8}
    assert (
        unequal_fused({**attention(W4, QuantScheme(4, 128), W4), **gate_up, "model.layers.0.mlp.down_proj": W4}) == []
    )
    assert unequal_fused(attention(None, None, None)) == []
    assert unequal_fused({}) == []


@pytest.mark.parametrize("odd", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("other", [W8, QuantScheme(4, 64), QuantScheme(4, 128, symmetric=False), None])
def test_one_odd_fused_layer_is_named(odd: str, other: QuantScheme | None) -> None:
    schemes = {name: other if name.endswith(odd) else scheme for name, scheme in attention(W4, W4, W4).items()}
    (problem,) = unequal_fused({**schemes, **attention(W8, W8, W8, layer=1)})
    assert f"model.layers.0.self_attn.{odd}: {other or 'not quantized'}" in problem
    assert "layers.1" not in problem
    assert "o_proj" not in problem


def test_every_block_and_every_group_is_looked_at() -> None:
    schemes = {**attention(W4, W8, W4), **attention(W4, W4, W8, layer=1)}
    schemes |= {"model.layers.1.mlp.up_proj": W4, "model.layers.1.mlp.gate_proj": None}
    problems = unequal_fused(schemes)
    assert len(problems) == 3
    assert sum("gate_proj: not quantized" in problem for problem in problems) == 1


@pytest.mark.parametrize(
    ("name", "collapsed"),
    [
        ("model.layers.0.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("model.layers.12.mlp.experts.34.w1", "model.layers.*.mlp.experts.*.w1"),
        ("h.0.1.x", "h.*.*.x"),
        ("lm_head", "lm_head"),
        ("model.layer2.fc1", "model.layer2.fc1"),
        ("model.layers.3.mlp.2", "model.layers.*.mlp.*"),
    ],
)
def test_collapsed_names(name: str, collapsed: str) -> None:
    assert collapsed_name(name) == collapsed
