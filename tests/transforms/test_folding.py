"""The whole model in float64, before and after each transform: the same function, on every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantkit.arch import find_blocks, find_linears, is_transposed
from quantkit.errors import CheckpointError
from quantkit.experts import ExpertsInfo, SplitExperts, experts_info, is_experts
from quantkit.structure import (
    Norm,
    ScaleGroup,
    Source,
    Structure,
    find_heads,
    find_structure,
    misfit,
    structure_of_block,
)
from quantkit.transforms import BlockTensors
from quantkit.transforms.folding import (
    fold_scale,
    reader_channels,
    rotate_final_norm,
    rotate_rows,
    rotate_stream,
    rotate_values,
    to_channels,
)
from quantkit.transforms.orthogonal import rotation_of

ALL = (*FAMILIES, *MOE_FAMILIES)
ROTATABLE = sorted(set(ALL) - {"gemma2", "gemma3_text", "olmo2"})


class WideRMSNorm(nn.Module):
    """RMSNorm in float64: transformers' own goes through float32, which would hide errors behind its rounding."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


def wide_model(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double().eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            owner, _, leaf = name.rpartition(".")
            offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            setattr(model.get_submodule(owner), leaf, WideRMSNorm(module.weight, eps, offset))
        elif is_experts(module):
            model.set_submodule(name, WideExperts(module, experts_info(name, module), torch.float64))
        elif type(module).__name__ == "DeepseekV3TopkRouter":
            module.forward = partial(wide_router, module)
    return model


class WideExperts(SplitExperts):
    """Split experts whose outputs are summed in float64, not float32; with the weights of the stacked ones."""

    def __init__(self, stacked: Any, info: ExpertsInfo, dtype: torch.dtype) -> None:
        weights = {slot: getattr(stacked, slot.parameter)[slot.index, slot.rows].clone() for slot in info.slots()}
        super().__init__(stacked, info, dtype)
        for slot, weight in weights.items():
            layer: Any = self.get_submodule(f"{slot.index}.{slot.leaf}")
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            token, place = torch.where(top_k_index == index)
            y = self._layer(index, "down_proj")(self.inner(index, hidden_states[token]))
            total.index_add_(0, token, y * top_k_weights[token, place, None].to(y.dtype))
        return total


def wide_router(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek's router without groups and in float64: transformers' own computes in float32."""
    scores = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
    weights, chosen = scores.sigmoid().topk(router.top_k)
    return scores, weights / weights.sum(-1, keepdim=True), chosen


def structure_of(model: Any) -> Structure:
    structure = find_structure(model.config)
    assert isinstance(structure, Structure)
    return structure


def structures_of(model: Any) -> list[tuple[nn.Module, Structure]]:
    """Every block, and its structure."""
    return [(block, structure_of_block(structure_of(model), block)) for block in blocks_of(model)]


def block_tensors(block: nn.Module) -> BlockTensors:
    transposed = {name for name, linear in find_linears(block).items() if is_transposed(linear)}
    return BlockTensors(block.state_dict(), frozenset(transposed))


def blocks_of(model: Any) -> tuple[nn.Module, ...]:
    found = find_blocks(model)
    assert found is not None
    return found.blocks


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens[None], use_cache=False).logits  # type: ignore[no-any-return]


def assert_same(model: Any, tokens: Tensor, before: Tensor) -> None:
    after = logits(model, tokens)
    assert after.dtype == torch.float64
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9 * float(before.abs().max()))


def random_scale(size: int, seed: int) -> Tensor:
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def channels_of(model: Any, block: nn.Module, group: ScaleGroup) -> int:
    columns = block_tensors(block).weight(group.readers[0]).shape[1]
    return int(reader_channels(group, columns, find_heads(model.config)).max()) + 1


@pytest.mark.parametrize("family", ALL)
def test_scales(family: str, tiny: Callable[[str], Path], tokens: list[Tensor]) -> None:
    """Every group of every block with a scale of its own, one after the other."""
    model = wide_model(tiny(family))
    before = logits(model, tokens[0])
    for index, (block, structure) in enumerate(structures_of(model)):
        tensors = block_tensors(block)
        for place, group in enumerate(structure.groups):
            original = tensors.weight(group.readers[0]).clone()
            scale = random_scale(channels_of(model, block, group), 10 * index + place)
            columns = fold_scale(tensors, group, scale, structure.norm, find_heads(model.config))
            torch.testing.assert_close(tensors.weight(group.readers[0]), original * columns)
            assert float((columns - 1).abs().min()) > 0
        block.load_state_dict(tensors.tensors())
    assert_same(model, tokens[0], before)


@pytest.mark.parametrize("family", ALL)
def test_heads(family: str, tiny: Callable[[str], Path], tokens: list[Tensor]) -> None:
    model = wide_model(tiny(family))
    before = logits(model, tokens[0])
    heads = find_heads(model.config)
    rotation = rotation_of(heads.dim, 5)
    for block, structure in structures_of(model):
        tensors = block_tensors(block)
        (group,) = (g for g in structure.groups if g.kind in (Source.VALUES, Source.VALUES_BY_HEAD))
        original = tensors.weight(group.source).clone()
        rotate_values(tensors, group, rotation, heads)
        assert float((tensors.weight(group.source) - original).abs().max()) > 1e-3
        block.load_state_dict(tensors.tensors())
    assert_same(model, tokens[0], before)


def rotate_whole(model: Any, seed: int) -> None:
    """The residual stream of a model in memory."""
    structure = structure_of(model)
    stream = structure.residual
    assert stream is not None
    final = model.get_submodule(stream.final_norm)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)  # untied
    rotation = rotation_of(final.weight.numel(), seed, keep_ones=structure.norm is Norm.LAYER)
    for block, of_block in structures_of(model):
        tensors = block_tensors(block)
        assert of_block.residual is not None
        rotate_stream(tensors, of_block.residual, rotation, structure.norm, "block")
        block.load_state_dict(tensors.tensors())
    rotate_rows(head.weight, rotation, final.weight.double())
    for name in stream.embeddings:
        rotate_rows(model.get_submodule(name).weight, rotation)
    gain, bias = rotate_final_norm(final.weight, getattr(final, "bias", None), rotation, stream.final_norm)
    final.weight.copy_(gain)
    if bias is not None:
        final.bias.copy_(bias)


@pytest.mark.parametrize("family", ROTATABLE)
def test_residual_stream(family: str, tiny: Callable[[str], Path], tokens: list[Tensor]) -> None:
    model = wide_model(tiny(family))
    before = logits(model, tokens[0])
    embedding = model.get_input_embeddings().weight.clone()
    rotate_whole(model, seed=3)
    assert float((model.get_input_embeddings().weight - embedding).abs().max()) > 1e-3
    assert_same(model, tokens[0], before)


def test_a_layer_norm_without_reader_biases_keeps_its_own(tiny: Callable[[str], Path], tokens: list[Tensor]) -> None:
    """OPT without biases in its linears: the norms' biases are rotated in the place where they are."""
    config = AutoModelForCausalLM.from_pretrained(tiny("opt")).config
    config.enable_bias = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    before = logits(model, tokens[0])
    rotate_whole(model, seed=3)
    assert_same(model, tokens[0], before)
    norm: Any = blocks_of(model)[0].final_layer_norm
    norm.weight[3] = 0.0
    with pytest.raises(CheckpointError, match=r"block\.final_layer_norm: has a bias where its gain is zero"):
        rotate_whole(model, seed=3)


@pytest.mark.parametrize("family", ROTATABLE)
def test_everything_at_once(family: str, tiny: Callable[[str], Path], tokens: list[Tensor]) -> None:
    model = wide_model(tiny(family))
    before = logits(model, tokens[1])
    heads = find_heads(model.config)
    rotate_whole(model, seed=3)
    for block, structure in structures_of(model):
        tensors = block_tensors(block)
        for group in structure.groups:
            if group.kind in (Source.VALUES, Source.VALUES_BY_HEAD):
                rotate_values(tensors, group, rotation_of(heads.dim, 1), heads)
            fold_scale(tensors, group, random_scale(channels_of(model, block, group), 1), structure.norm, heads)
        block.load_state_dict(tensors.tensors())
    assert_same(model, tokens[1], before)


@pytest.mark.parametrize("norm", [Norm.RMS, Norm.RMS_PLUS_ONE, Norm.LAYER])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_readers_follow_the_rounded_gain(norm: Norm, dtype: torch.dtype) -> None:
    """gain · column stays the same to float32's rounding, though the gain is rounded to 8 or 11 bits."""
    generator = torch.Generator().manual_seed(0)
    gain = (torch.randn(32, generator=generator) * 0.2 + (0.0 if norm is Norm.RMS_PLUS_ONE else 1.0)).to(dtype)
    weight = torch.randn(8, 32, generator=generator).to(dtype)
    tensors = BlockTensors({"norm.weight": gain, "a.weight": weight})
    group = ScaleGroup(Source.NORM, "norm", ("a",), "a")
    fold_scale(tensors, group, random_scale(32, 1), norm, find_heads_of_nothing())
    offset = 1.0 if norm is Norm.RMS_PLUS_ONE else 0.0
    shipped = tensors["norm.weight"].to(dtype)
    assert torch.equal(shipped.float(), tensors["norm.weight"])  # nothing is lost when it is written
    assert not torch.equal(shipped, gain)
    torch.testing.assert_close(
        tensors.weight("a").double() * (shipped.double() + offset),
        weight.double() * (gain.double() + offset),
        rtol=2e-7,
        atol=0,
    )


def find_heads_of_nothing() -> Any:
    return None


def test_gains_of_zero_and_scales_out_of_range_stay() -> None:
    """Nothing is divided by zero, and no gain overflows: such a channel keeps its scale of one."""
    gain = torch.tensor([0.0, 1.0, 1.0, -2.0], dtype=torch.float16)
    tensors = BlockTensors(
        {
            "norm.weight": gain,
            "norm.bias": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16),
            "a.weight": torch.ones(1, 4, dtype=torch.float16),
        }
    )
    group = ScaleGroup(Source.NORM, "norm", ("a",), "a")
    scale = torch.tensor([2.0, 1e-9, 1e9, 4.0])
    columns = fold_scale(tensors, group, scale, Norm.LAYER, find_heads_of_nothing())
    assert columns.tolist() == [1.0, 1.0, 1.0, 4.0]
    assert tensors["norm.weight"].tolist() == [0.0, 1.0, 1.0, -0.5]
    assert tensors["norm.bias"].tolist() == [1.0, 2.0, 3.0, 1.0]


def test_query_heads_that_share_a_value_head_share_its_scale(tiny: Callable[[str], Path]) -> None:
    model = wide_model(tiny("qwen3"))
    heads = find_heads(model.config)
    assert (heads.query, heads.value, heads.dim) == (4, 2, 16)
    (group,) = (g for g in structure_of(model).groups if g.kind is Source.VALUES)
    channels = reader_channels(group, 64, heads)
    assert channels.reshape(4, 16)[:, 0].tolist() == [0, 0, 16, 16]
    per_column = torch.arange(64.0)
    assert to_channels(per_column, channels, "amax")[:2].tolist() == [16.0, 17.0]
    assert to_channels(per_column, channels, "mean")[:2].tolist() == [8.0, 9.0]


@pytest.mark.parametrize("family", ALL)
def test_every_family_is_what_its_structure_says(family: str, tiny: Callable[[str], Path]) -> None:
    model = wide_model(tiny(family))
    for block, structure in structures_of(model):
        assert misfit(structure, block, find_heads(model.config)) is None
        read = [reader for group in structure.groups for reader in group.readers]
        inside = set(find_linears(block))
        assert len(read) == len(set(read))
        # q and k behind norms of their own, up behind an activation, fc2 behind gelu: the rest is a family's own.
        assert set(read) <= inside | {"mlp.gate"}
        if family in MOE_FAMILIES:
            assert inside <= set(read)
