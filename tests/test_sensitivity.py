"""The two measures against whole-model computations, their units, and what they hold in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MOE_FAMILIES
from test_experts import split_experts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.arch import is_transposed
from quantkit.checkpoint import Checkpoint
from quantkit.experts import experts_info, is_experts
from quantkit.grid import dequantize
from quantkit.measuring_room import Metric, check_room
from quantkit.plan import Plan
from quantkit.planning import make_plan
from quantkit.recipe import Rule, make_recipe
from quantkit.report import ignore
from quantkit.scheme import QuantScheme, parse_scheme
from quantkit.sensitivity import Sensitivity
from quantkit.solvers import GPTQ, RTN
from quantkit.stats import LayerStats, Stat
from quantkit.units import find_units

SCHEMES = (parse_scheme("w3a16_g32_asym"), parse_scheme("w8a16_g32"))
CPU = torch.device("cpu")


def planned(path: Path, **recipe: Any) -> Plan:
    return make_plan(Checkpoint(path), make_recipe({"scheme": "w4a16_g32", **recipe}))


def measured(plan: Plan, samples: list[Tensor], metric: Metric, directory: Path) -> list[list[float]]:
    return Sensitivity(plan, find_units(plan), SCHEMES, samples, CPU, directory, ignore).measure(metric, seed=5)


def rows_first(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def whole_model(path: Path) -> Any:
    """In memory, its experts one by one."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, module in [*model.named_modules()]:
        if is_experts(module):
            model.set_submodule(name, split_experts(module, experts_info(name, module)))
    return model


def error_of(rows: Tensor, scheme: QuantScheme, stats: LayerStats | None) -> Tensor:
    solver = RTN() if stats is None else GPTQ()
    return dequantize(solver.solve(rows, scheme, stats, torch.float32).weight, torch.float32) - rows


def whole_model_estimate(path: Path, plan: Plan, samples: list[Tensor]) -> list[list[float]]:
    """½ Σ_r E[g_r²] (dW E[xxᵀ] dWᵀ)_rr with the whole model and its whole graph in memory, from the formula."""
    model = whole_model(path).requires_grad_(False)
    num_tokens = sum(map(len, samples))
    inputs: dict[str, list[Tensor]] = {}
    gradients: dict[str, list[Tensor]] = {}
    for layer in plan.layers:
        name = layer.info.name

        def hook(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            inputs.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))
            output.register_hook(lambda g: gradients.setdefault(name, []).append(g.reshape(-1, g.shape[-1])))

        model.get_submodule(name).register_forward_hook(hook)
    generator = torch.Generator().manual_seed(5)
    for sample in samples:
        embedded = model.get_input_embeddings()(sample[None]).detach().requires_grad_(True)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator)[:, 0]
        (-torch.log_softmax(logits, -1)[torch.arange(len(sample)), drawn].sum()).backward()
    found: list[list[float]] = []
    for unit in find_units(plan):
        found.append([0.0] * len(SCHEMES))
        for column, scheme in enumerate(SCHEMES):
            for layer in unit.layers:
                x = torch.cat(inputs[layer.info.name])
                rows = rows_first(model.get_submodule(layer.info.name))
                error = error_of(rows, scheme, None)
                outputs = (x @ error.T).square().mean(0)
                weights = torch.cat(gradients[layer.info.name]).square().sum(0) / num_tokens
                found[-1][column] += 0.5 * float((weights * outputs).sum())
    return found


@torch.no_grad()
def whole_model_divergence(path: Path, plan: Plan, samples: list[Tensor], gptq: bool) -> list[list[float]]:
    """The divergence itself: one unit's weights replaced in the whole model."""
    model = whole_model(path)
    stats = {
        layer.info.name: LayerStats(layer.info.in_features, frozenset({Stat.HESSIAN}), CPU) for layer in plan.layers
    }
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, own=own: own.update(args[0]))
        for name, own in stats.items()
    ]
    dense = [torch.log_softmax(model(input_ids=s[None], use_cache=False).logits[0], -1) for s in samples]
    for handle in handles:
        handle.remove()
    found: list[list[float]] = []
    for unit in find_units(plan):
        found.append([])
        for scheme in SCHEMES:
            before = {}
            for layer in unit.layers:
                module = model.get_submodule(layer.info.name)
                rows = rows_first(module)
                error = error_of(rows, scheme, stats[layer.info.name] if gptq else None)
                before[module] = module.weight
                new = rows + error
                module.weight = nn.Parameter(new.T if is_transposed(module) else new)
            total = 0.0
            for sample, log_p in zip(samples, dense, strict=True):
                log_q = torch.log_softmax(model(input_ids=sample[None], use_cache=False).logits[0], -1)
                total += float((log_p.exp() * (log_p - log_q)).sum())
            for module, weight in before.items():
                module.weight = weight
            found[-1].append(total / sum(map(len, samples)))
    return found


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma2", "gpt2", "opt", "gemma3_text", "qwen2_moe", "deepseek_v3"]
)
def test_streamed_estimate_is_the_whole_models(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = planned(tiny(family), method="rtn")
    found = measured(plan, tokens, "hessian", tmp_path)
    expected = whole_model_estimate(tiny(family), plan, tokens)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-3, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "gptq"), ("gpt2", "rtn"), ("gemma2", "gptq"), ("qwen2", "rtn"), ("mixtral", "gptq")],
)
def test_streamed_divergence_is_the_whole_models(
    family: str, method: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = planned(tiny(family), method=method, expert_tokens_per_column=0)
    found = torch.tensor(measured(plan, tokens, "kl", tmp_path))
    expected = torch.tensor(whole_model_divergence(tiny(family), plan, tokens, method == "gptq"))
    # 8 bits are lost in float32's rounding of these logits: compared by the largest divergences alone.
    torch.testing.assert_close(found, expected, rtol=0.1, atol=2e-2 * float(expected.max()))
    assert float(expected.max()) > 0


@pytest.mark.parametrize("metric", ["hessian", "kl"])
def test_states_in_files_give_the_same_and_leave_nothing(
    metric: Metric, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    held = measured(planned(tiny("llama")), tokens, metric, tmp_path)
    filed = measured(planned(tiny("llama"), activation_memory=0), tokens, metric, tmp_path)
    assert held == filed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metric", ["hessian", "kl"])
def test_at_most_one_block_holds_weights(
    metric: Metric, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = planned(tiny("qwen3"))
    blocks = plan.skeleton.blocks
    held: set[int] = set()
    for block in blocks:
        block.register_forward_hook(
            lambda *_: held.add(sum(not all(p.is_meta for p in other.parameters()) for other in blocks))
        )
    measured(plan, tokens, metric, tmp_path)
    assert held == {1}
    assert all(p.is_meta for p in plan.skeleton.model.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_units_are_what_engines_fuse_and_rules_mean_them(family: str, tiny: Callable[[str], Path]) -> None:
    plan = planned(tiny(family))
    units = find_units(plan)
    inside = [layer.info.name for layer in plan.layers]
    assert sorted(layer.info.name for unit in units for layer in unit.layers) == sorted(inside)
    everything = [info.name for info in plan.skeleton.linears]
    for unit in units:
        rule = Rule(match=unit.match, skip=True)
        assert [n for n in everything if rule.matches(n)] == [layer.info.name for layer in unit.layers]
    leaves = {frozenset(layer.info.name.rpartition(".")[2] for layer in unit.layers) for unit in units}
    if family in ("llama", "qwen2", "gemma2"):
        assert {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})} <= leaves
        assert len(units) == 4 * 3


def test_bytes_are_those_on_disk(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    scheme = parse_scheme("w3a16_g32_asym")
    plan = planned(tiny("llama"))
    recipe = {"scheme": str(scheme), "method": "rtn"}
    quantkit.quantize(tiny("llama"), tmp_path / "q", recipe=recipe)
    tensors = Checkpoint(tmp_path / "q").tensors
    for unit in find_units(plan):
        stems = {layer.info.stem for layer in unit.layers}
        assert unit.nbytes(plan, scheme) == sum(t.nbytes for n, t in tensors.items() if n.rpartition(".")[0] in stems)


def test_a_layer_without_effect_costs_nothing(tmp_path: Path, tokens: list[Tensor]) -> None:
    """A block whose output projection is zero passes no gradient on to what is in front of it."""
    from families import save_tiny
    from safetensors.torch import load_file, save_file

    path = save_tiny("llama", tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    plan = planned(path, method="rtn")
    found = dict(zip((u.name for u in find_units(plan)), measured(plan, tokens, "hessian", tmp_path), strict=True))
    assert found["model.layers.1.self_attn.q_proj+k_proj+v_proj"] == [0.0, 0.0]
    assert found["model.layers.1.self_attn.o_proj"] == [0.0, 0.0]
    assert all(loss > 0 for loss in found["model.layers.1.mlp.down_proj"])


def test_logits_that_are_not_finite_are_refused(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    plan = planned(tiny("llama"))
    norm = plan.skeleton.model.get_submodule("model.norm")
    norm.register_forward_hook(lambda _, __, output: output * math.inf)
    with pytest.raises(quantkit.CheckpointError, match="logits are NaN or infinite"):
        measured(plan, tokens, "hessian", tmp_path)


def test_no_room(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    plan = planned(tiny("llama"), activation_memory=0)
    units = find_units(plan)
    check_room(plan, units, 3, "hessian", (8, 64), tmp_path)
    with pytest.raises(quantkit.OutputError, match=r"measuring needs about \d+ MiB and has"):
        check_room(plan, units, 3, "hessian", (10**9, 64), tmp_path)
    with pytest.raises(quantkit.OutputError, match="memory: measuring needs"):
        check_room(plan, units, 3, "kl", (1, 10**12), tmp_path)
