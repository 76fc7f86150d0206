"""Stacked experts as single layers: layouts, names on disk, routers, and the module that runs single experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MOE_FAMILIES, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

import quantkit
from quantkit.disk_names import conversions
from quantkit.experts import (
    ExpertsInfo,
    ExpertSlot,
    SplitExperts,
    disk_leaves,
    experts_info,
    find_routers,
    is_experts,
    slot_on_disk,
    why_not_experts,
)

INFO = ExpertsInfo("model.layers.3.mlp.experts", 4, 64, 32)


def meta_model(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def random_experts(num_experts: int, hidden: int, inner: int, dtype: torch.dtype = torch.float64) -> Any:
    config = tiny_config(
        "qwen2_moe", num_experts=num_experts, hidden_size=hidden, moe_intermediate_size=inner, num_attention_heads=1
    )
    config._experts_implementation = "eager"
    experts = Qwen2MoeExperts(config).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts.requires_grad_(False)


def get_expert(stacked: Any, slot: ExpertSlot) -> Any:
    """A view [out, in] of one expert's layer in a module of stacked experts."""
    return getattr(stacked, slot.parameter)[slot.index, slot.rows]


def split_experts(stacked: Any, info: ExpertsInfo) -> SplitExperts:
    """The same experts one by one; ``stacked`` has no weights afterwards."""
    weights = {slot: get_expert(stacked, slot).clone() for slot in info.slots()}
    split = SplitExperts(stacked, info, next(stacked.parameters()).dtype)
    for slot, weight in weights.items():
        layer: Any = split.get_submodule(f"{slot.index}.{slot.leaf}")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return split


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_family_is_read(family: str) -> None:
    model = meta_model(tiny_config(family))
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    dense = {"qwen2_moe": {1}, "deepseek_v3": {0}}.get(family, set())
    assert list(found) == [f"model.layers.{i}.mlp.experts" for i in range(3) if i not in dense]
    for name, module in found.items():
        assert why_not_experts(module) is None
        info = experts_info(name, module)
        assert sum(slot.out_features * slot.in_features for slot in info.slots()) == sum(
            p.numel() for p in module.parameters()
        )
        owner = name.removesuffix(".experts")
        shared = [f"{owner}.shared_expert_gate"] if family == "qwen2_moe" else []
        assert find_routers(model, info) == [f"{owner}.gate", *shared]


@pytest.mark.parametrize(
    ("family", "leaves"),
    [
        ("mixtral", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
        ("deepseek_v3", {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}),
    ],
)
def test_names_on_disk(family: str, leaves: dict[str, str]) -> None:
    model = meta_model(tiny_config(family))
    info = next(experts_info(name, module) for name, module in model.named_modules() if is_experts(module))
    assert disk_leaves(info, conversions(model)[1]) == leaves
    assert slot_on_disk(info, leaves, f"a.experts.3.{leaves['up_proj']}.weight") == (3, "up_proj")
    assert slot_on_disk(info, leaves, "a.experts.3.other.weight") is None
    with pytest.raises(quantkit.CheckpointError, match=f"is of expert 99; .* has {info.num_experts}"):
        slot_on_disk(info, leaves, f"a.experts.99.{leaves['up_proj']}.weight")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ({"model_type": "gpt_oss", "num_local_experts": 4}, "gate and up are interleaved"),
        ({"model_type": "granitemoe", "num_local_experts": 4}, None),
        ({"model_type": "llama4_text", "num_local_experts": 4}, "it is not called as other experts are"),
    ],
)
def test_other_layouts_are_refused(family: dict[str, Any], reason: str | None) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model_type = family.pop("model_type")
    model = meta_model(AutoConfig.for_model(model_type, **sizes, vocab_size=64, num_key_value_heads=2, **family))
    name, module = next((n, m) for n, m in model.named_modules() if is_experts(m))
    assert why_not_experts(module) == reason
    if reason is None:  # its checkpoints are stacked, and transformers has no names for single experts
        assert disk_leaves(experts_info(name, module), conversions(model)[1]) is None


def test_experts_of_transformers_that_does_not_say_everything() -> None:
    """Before 5.23 no class of experts states has_post_expert_norm."""
    module: Any = MixtralExperts(tiny_config("mixtral"))
    del module.has_post_expert_norm
    assert why_not_experts(module) is None
    del module.has_bias
    assert why_not_experts(module) == "it is not called as other experts are"


def test_experts_one_by_one_that_cannot_be_read_are_refused_with_the_reason(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.skeleton.why_not_experts", lambda _: "it has biases")
    what = r"holds model.layers.0.mlp.experts one by one, and its MixtralExperts cannot be quantized: it has biases"
    with pytest.raises(quantkit.CheckpointError, match=what):
        quantkit.quantize(tiny("mixtral"), tmp_path / "q", recipe={"method": "rtn"})
    assert not (tmp_path / "q").exists()


def test_slots_are_the_rows_of_the_stack() -> None:
    experts = random_experts(4, 64, 32)
    module: Any = MixtralExperts(tiny_config("mixtral", num_local_experts=4, intermediate_size=32)).requires_grad_(
        False
    )
    for slot in INFO.slots():
        get_expert(module, slot).copy_(get_expert(experts, slot))
    assert torch.equal(module.gate_up_proj.double(), experts.gate_up_proj.float().double())
    assert torch.equal(module.down_proj.double(), experts.down_proj.float().double())
    names = [slot.name for slot in INFO.slots()]
    assert names[3:6] == [f"model.layers.3.mlp.experts.1.{leaf}_proj" for leaf in ("gate", "up", "down")]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
@torch.no_grad()
def test_split_experts_equal_stacked_ones(data: st.DataObject, seed: int) -> None:
    """The same outputs for any routing, also with experts that nobody chose, and in transformers' own order of sums."""
    num_experts, hidden, inner = (
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 9)),
    )
    tokens, k = data.draw(st.integers(1, 7)), data.draw(st.integers(1, num_experts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stacked = random_experts(num_experts, hidden, inner)
        x = torch.randn(tokens, hidden, dtype=torch.float64)
        chosen = torch.stack([torch.randperm(num_experts)[:k] for _ in range(tokens)])
        weights = torch.rand(tokens, k, dtype=torch.float64)
    expected = stacked(x, chosen, weights)
    info = experts_info("mlp.experts", stacked)
    split = split_experts(stacked, info)
    assert list(stacked.parameters()) == []
    torch.testing.assert_close(split(x, chosen, weights), expected, rtol=1e-5, atol=1e-5)


def test_a_marked_expert_is_left_out() -> None:
    """transformers marks an expert that another process holds by the number of experts."""
    stacked = random_experts(2, 4, 4, torch.float32)
    info = experts_info("mlp.experts", stacked)
    split = SplitExperts(stacked, info, torch.float32)
    out = split(torch.ones(3, 4), torch.full((3, 1), 2), torch.ones(3, 1))
    assert torch.equal(out, torch.zeros(3, 4))


def test_experts_of_several_schemes_are_noted_also_where_those_of_a_block_have_one(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers decodes the experts of all blocks by one scheme: what it fails on is said before."""
    for name, rules in (("even", []), ("uneven", [{"match": "*.2.mlp.experts.*", "scheme": "w8a16_g32"}])):
        recipe = {"scheme": "w4a16_g32", "method": "rtn", "rules": rules}
        report = quantkit.quantize(tiny("mixtral"), tmp_path / name, recipe=recipe).report
        noted = any("takes all experts as quantized by one symmetric scheme" in note for note in report["notes"])
        assert noted == (name == "uneven")
