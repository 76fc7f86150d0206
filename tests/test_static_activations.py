"""Static activation scales, and whole runs with quantized activations: measured, handed on, written, loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.errors import CalibrationError, RecipeError
from quantkit.linear import QuantLinear
from quantkit.report import Event, LayerDone
from quantkit.run import prepare
from quantkit.scheme import QuantScheme
from quantkit.static_activations import static_scale
from quantkit.stats import LayerStats, Stat

STATIC = QuantScheme(8, None, act_bits=8, act_static=True)
IDS = torch.arange(3, 43)[None] % VOCAB


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@torch.no_grad()
def largest_inputs(model: nn.Module, layers: dict[str, nn.Module], tokens: list[Tensor]) -> dict[str, float]:
    """The largest magnitude of each layer's input, by hooks on the whole model."""
    found = dict.fromkeys(layers, 0.0)

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        def seen(_: nn.Module, args: Any) -> None:
            found[name] = max(found[name], float(args[0].abs().max()))

        return seen

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    for sample in tokens:
        model(input_ids=sample[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def measured(*rows: list[float]) -> LayerStats:
    stats = LayerStats(2, frozenset({Stat.ABS_MAX}), torch.device("cpu"))
    for row in rows:
        stats.update(torch.tensor([row]))
    return stats


def test_the_scale_is_of_the_largest_magnitude() -> None:
    assert static_scale(["a"], STATIC, measured([1.0, -255.0], [2.0, 3.0]), torch.float32) == 2.0
    assert static_scale(["a"], QuantScheme(8, None, act_bits=8), None, torch.float32) is None
    assert static_scale(["a"], QuantScheme(4, 32), None, torch.float32) is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [([0.0, 0.0], "never activates"), ([1.0, float("nan")], "NaN"), ([float("inf"), 0.0], "NaN or inf")],
)
def test_inputs_that_have_no_scale(row: list[float], reason: str) -> None:
    with pytest.raises(CalibrationError, match=f"a, b: .*{reason}.*w8a8"):
        static_scale(["a", "b"], STATIC, measured(row), torch.float32)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scales_are_of_the_inputs_behind_quantized_blocks(
    family: str, method: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """In each block the scale is the input's largest magnitude when the blocks before it run as they will be loaded,
    activations rounded; within a block, as it was before quantization.
    """
    recipe = {"scheme": "w8a8_static", "method": method}
    result = quantkit.quantize(tiny(family), tmp_path / "q", recipe=recipe, tokens=tokens)
    assert result.report["forward_passes_per_block"] == 2
    loaded = quantkit.load(tmp_path / "q", backend="simulated")
    layers = quantized(loaded)
    assert layers
    assert {str(layer.scheme) for layer in layers.values()} == {"w8a8_static_channel_sym"}
    first = {n: m for n, m in layers.items() if n.endswith(("q_proj", "c_attn"))}  # read what blocks hand on
    assert len(first) == 3
    dense = AutoModelForCausalLM.from_pretrained(tiny(family)).eval()
    behind_dense = largest_inputs(dense, {n: dense.get_submodule(n) for n in first}, tokens)
    for name, largest in largest_inputs(loaded, dict(first), tokens).items():
        scale = first[name].quantized().act_scale
        assert scale is not None
        assert 127.5 * scale == pytest.approx(largest, rel=1e-5)
    last = max(first)
    assert abs(127.5 * float(first[last].quantized().act_scale or 0) / behind_dense[last] - 1) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_asym", "w8a8_static"])
def test_a_checkpoint_runs_on_the_int8_backend(
    scheme: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    quantkit.quantize(tiny("qwen2"), tmp_path / "q", recipe={"scheme": scheme, "method": "gptq"}, tokens=tokens)
    model = quantkit.load(tmp_path / "q")
    layers = quantized(model)
    assert {layer.backend for layer in layers.values()} == {"cpu_int8"}
    simulated = quantkit.load(tmp_path / "q", backend="simulated")
    logits = model(IDS).logits
    # A value that lies between two codes may go either way after a sum in another order.
    torch.testing.assert_close(logits, simulated(IDS).logits, rtol=0.02, atol=0.02)
    dense = quantkit.load(tiny("qwen2"))(IDS).logits
    assert 0 < float((logits - dense).norm() / dense.norm()) < 0.05
    generate: Any = model.generate
    assert generate(IDS[:, :5], max_new_tokens=4, do_sample=False).shape[1] > 5


@torch.no_grad()
def test_mixed_precision_and_the_head(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    rules = [
        {"match": "*.down_proj", "scheme": "w8a8"},
        {"match": "*.0.*", "scheme": "w8a8_static", "method": "rtn"},
        {"match": "lm_head", "scheme": "w8a8_static", "method": "rtn"},
    ]
    recipe = {"scheme": "w4a16_g32", "rules": rules}
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=recipe, tokens=tokens)
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    model = quantkit.load(tmp_path / "q")
    schemes = {name: str(layer.scheme) for name, layer in quantized(model).items()}
    assert schemes["model.layers.1.mlp.up_proj"] == "w4a16_g32_sym"
    assert schemes["model.layers.1.mlp.down_proj"] == "w8a8_channel_sym"
    assert schemes["model.layers.0.mlp.up_proj"] == schemes["lm_head"] == "w8a8_static_channel_sym"
    head = quantized(model)["lm_head"]
    scale = head.quantized().act_scale
    assert scale is not None
    assert 127.5 * scale == pytest.approx(largest_inputs(model, {"lm_head": head}, tokens)["lm_head"], rel=0.05)
    dense = quantkit.load(tiny("llama"))(IDS).logits
    assert float((model(IDS).logits - dense).norm() / dense.norm()) < 0.2


def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """The finished blocks' activations are rounded when they are run again; int8 codes are not taken for weights."""

    def stop(event: Event) -> None:
        if isinstance(event, LayerDone) and ".layers.2." in event.record.name:
            raise KeyboardInterrupt

    recipe = {"scheme": "w8a8_static", "method": "gptq"}
    quantkit.quantize(tiny("llama"), tmp_path / "whole", recipe=recipe, tokens=tokens)
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=recipe, tokens=tokens, observer=stop)
    quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=recipe, tokens=tokens, resume=True)
    for shard in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_sizes_are_projected(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    recipe = {"scheme": "w8a8_static", "method": "rtn"}
    report = quantkit.quantize(tiny("qwen2"), tmp_path / "q", recipe=recipe, tokens=tokens).report
    assert report["size_after"] == Checkpoint(tmp_path / "q").nbytes


def test_dynamic_rtn_needs_no_data(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    plan = prepare(tiny("llama"), tmp_path / "q", recipe={"scheme": "w8a8", "method": "rtn"}).plan
    assert plan.forward_passes == 0


def test_no_hook_stays_on_the_blocks(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    prepared = prepare(tiny("llama"), tmp_path / "q", recipe={"scheme": "w8a8", "method": "gptq"}, tokens=tokens)
    from quantkit.run import execute

    execute(prepared)
    assert not any(m._forward_pre_hooks for block in prepared.plan.skeleton.blocks for m in block.modules())


def test_a_layer_that_calibration_never_activates_is_named(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in tiny("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn\.q_proj.*never activates its input"):
        quantkit.quantize(source, tmp_path / "q", recipe={"scheme": "w8a8_static", "method": "rtn"}, tokens=tokens)
    assert not list(tmp_path.glob("q*"))


@pytest.mark.parametrize("scheme", ["w8a8_g32", "w4a8_channel", "w4a8_g32"])
def test_schemes_that_the_format_cannot_hold_are_refused_before_any_work(
    scheme: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(quantkit.SchemeError, match="write w8a8_channel"):
        prepare(tiny("llama"), tmp_path / "q", recipe={"scheme": scheme})


def test_static_activations_outside_of_blocks_and_head_are_refused(tmp_path: Path) -> None:
    """OPT may have projections between its embedding and its blocks."""
    source = save_tiny("opt", tmp_path / "model", word_embed_proj_dim=32)
    rules = [{"match": "*.project_in", "scheme": "w8a8_static", "method": "rtn"}]
    with pytest.raises(RecipeError, match=r"project_in: the static activations of .* inside of the blocks and at the"):
        prepare(source, tmp_path / "q", recipe={"scheme": "w8a8", "rules": rules})
    rules[0]["scheme"] = "w8a8"
    assert "project_in" in str(prepare(source, tmp_path / "q", recipe={"scheme": "w8a8", "rules": rules}).plan.layers)


def test_experts_have_no_static_activations(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Refused before any work, with the rule that helps."""
    with pytest.raises(RecipeError, match=r"experts.*too few tokens for one range.*scheme: w8a8\} for dynamic"):
        prepare(tiny("mixtral"), tmp_path / "q", recipe={"scheme": "w8a8_static", "method": "rtn"})
    rules = [{"match": "*.experts.*", "scheme": "w8a8"}]
    plan = prepare(tiny("mixtral"), tmp_path / "q", recipe={"scheme": "w8a8_static", "method": "rtn", "rules": rules})
    assert {layer.scheme.act_static for layer in plan.plan.layers} == {True, False}
