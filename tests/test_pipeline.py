"""The streaming pipeline against a plain whole-model GPTQ, on every family; passes, activations, memory of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.arch import find_blocks, find_linears, is_transposed
from quantkit.checkpoint import Checkpoint
from quantkit.formats import CompressedTensors
from quantkit.grid import dequantize
from quantkit.qtensor import QuantizedTensor
from quantkit.run import execute, prepare
from quantkit.scheme import QuantScheme
from quantkit.stats import LayerStats, Stat

SCHEME = QuantScheme(4, 32)
RECIPE = {"scheme": "w4a16_g32", "method": "gptq"}


def decoded(
    path: Path, schemes: dict[str, QuantScheme], shapes: dict[str, tuple[int, int]]
) -> dict[str, QuantizedTensor]:
    """Every quantized layer of a directory whose tensors are named as its modules are."""
    checkpoint = Checkpoint(path)
    found = {}
    for name, scheme in schemes.items():
        own = [n for n in checkpoint.tensors if n.startswith(f"{name}.weight")]
        tensors = {n.removeprefix(f"{name}."): t for n, t in checkpoint.read(own).items()}
        found[name] = CompressedTensors().decode(name, tensors, scheme, shapes[name])
    return found


@torch.no_grad()
def whole_model_gptq(
    path: Path, samples: Sequence[Tensor], parts: Sequence[Sequence[str]] | None = None
) -> dict[str, QuantizedTensor]:
    """GPTQ as one would write it with the whole model in memory: every pass runs every block.

    ``parts``: the layers of a block, by name, that are measured and solved before the next ones are measured.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = find_blocks(model)
    assert found is not None
    solved = {}
    for index, block in enumerate(found.blocks):
        every = find_linears(block)
        for names in parts or [list(every)]:
            linears = {name: every[name] for name in names}
            for name, q in _solved(linears, _measured(model, linears, samples)).items():
                solved[f"{found.path}.{index}.{name}"] = q
    return solved


def _measured(model: nn.Module, linears: dict[str, nn.Module], samples: Sequence[Tensor]) -> dict[str, LayerStats]:
    stats = {n: LayerStats(_shape(m)[1], frozenset({Stat.HESSIAN}), torch.device("cpu")) for n, m in linears.items()}
    handles = [m.register_forward_pre_hook(_updates(stats[n])) for n, m in linears.items()]
    for sample in samples:
        model(input_ids=sample[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return stats


def _solved(linears: dict[str, nn.Module], stats: dict[str, LayerStats]) -> dict[str, QuantizedTensor]:
    solved = {}
    for name, module in linears.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows = weight.T if is_transposed(module) else weight
        q = quantkit.GPTQ().solve(rows.float(), SCHEME, stats[name], torch.float32).weight
        new = dequantize(q)
        weight.copy_(new.T if is_transposed(module) else new)
        solved[name] = q
    return solved


def _updates(stats: LayerStats) -> Callable[[nn.Module, Any], None]:
    def hook(_: nn.Module, args: Any) -> None:
        stats.update(args[0])

    return hook


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if is_transposed(module) else (rows, columns)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_equals_whole_model(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Masks, position embeddings and sliding windows reach every block as in the model itself."""
    quantkit.quantize(tiny(family), tmp_path / "out", recipe=RECIPE, tokens=tokens)
    assert_solved(tmp_path / "out", whole_model_gptq(tiny(family), tokens))


def assert_solved(path: Path, expected: dict[str, QuantizedTensor]) -> None:
    shapes = {name: (q.out_features, q.in_features) for name, q in expected.items()}
    found = decoded(path, dict.fromkeys(expected, SCHEME), shapes)
    for name, q in expected.items():
        # Stacked rows may be summed in another order, which can move a code that lies on the edge between two.
        differing = float((found[name].codes != q.codes).float().mean())
        assert differing < 2e-3, f"{name}: {differing:.2%} of the codes differ"
        torch.testing.assert_close(found[name].scale, q.scale, rtol=1e-3, atol=0)


_ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
SEQUENTIAL = {
    "llama": [*_ATTENTION, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]],
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    # Attention and MLP read the same hidden states side by side, and query_key_value runs first.
    "gpt_neox": [["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]],
}


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_true_sequential_equals_whole_model(
    family: str, tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Each input is measured behind the layers of its block that are quantized already."""
    expected = whole_model_gptq(tiny(family), tokens, SEQUENTIAL[family])
    prepared = prepare(tiny(family), tmp_path / "out", recipe={**RECIPE, "true_sequential": True}, tokens=tokens)
    calls: Counter[int] = Counter()
    for index, block in enumerate(prepared.plan.skeleton.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    execute(prepared)
    assert_solved(tmp_path / "out", expected)
    assert prepared.plan.forward_passes == len(SEQUENTIAL[family]) + 1
    assert calls[0] == prepared.plan.forward_passes * len(tokens) + 1  # and one sample to see who shares an input


def test_true_sequential_with_layers_that_measure_nothing(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    rules = [{"match": "*.layers.1.*", "skip": True}, {"match": "*.o_proj", "method": "rtn"}]
    recipe = {**RECIPE, "true_sequential": True, "rules": rules}
    result = quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=recipe, tokens=tokens)
    methods = {layer["name"]: layer["method"] for layer in result.report["layers"]}
    assert methods["model.layers.0.self_attn.o_proj"] == "rtn"
    assert methods["model.layers.2.mlp.down_proj"] == "gptq"
    assert len(methods) == 14


@pytest.mark.parametrize("family", FAMILIES)
def test_rtn_needs_no_data(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """RTN runs without tokens or a tokenizer, and quantizes exactly the linear layers of the blocks."""
    result = quantkit.quantize(tiny(family), tmp_path / "out", recipe={"scheme": "w4a16_g32_asym", "method": "rtn"})
    dense = Checkpoint(tiny(family)).tensors
    written = Checkpoint(tmp_path / "out").tensors
    names = {layer["name"] for layer in result.report["layers"]}
    stems = {n.rpartition(".")[0] for n in written if n.endswith(".weight_packed")}
    assert len(stems) == len(names) > 0
    assert {n for n in dense if n in written} == dense.keys() - {f"{stem}.weight" for stem in stems}
    assert result.report["forward_passes_per_block"] == 0


def test_two_passes_a_block(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    """One pass measures, one hands on; the last block hands nothing on."""
    prepared = prepare(tiny("gemma3_text"), tmp_path / "out", recipe=RECIPE, tokens=tokens)
    calls: Counter[int] = Counter()
    for index, block in enumerate(prepared.plan.skeleton.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    execute(prepared)
    assert calls == {0: 2 * len(tokens), 1: 2 * len(tokens), 2: len(tokens)}


def test_rtn_runs_no_block(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    prepared = prepare(tiny("llama"), tmp_path / "out", recipe={"scheme": "w4a16_g32", "method": "rtn"})
    for block in prepared.plan.skeleton.blocks:
        block.register_forward_pre_hook(lambda *_: pytest.fail("RTN ran a block"))
    execute(prepared)


def test_parameters_are_freed(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    """At any time at most one block holds weights."""
    prepared = prepare(tiny("qwen3"), tmp_path / "out", recipe=RECIPE, tokens=tokens)
    blocks = prepared.plan.skeleton.blocks
    held = []
    for block in blocks:
        block.register_forward_pre_hook(
            lambda *_: held.append(sum(not all(p.is_meta for p in b.parameters()) for b in blocks))
        )
    execute(prepared)
    assert set(held) == {1}
    assert all(p.is_meta for p in prepared.plan.skeleton.model.parameters())


def test_mapped_activations_give_the_same_bytes(
    tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path
) -> None:
    """Activations over the budget go to a file, which is gone afterwards, and change nothing."""
    quantkit.quantize(tiny("gemma2"), tmp_path / "memory", recipe=RECIPE, tokens=tokens)
    quantkit.quantize(tiny("gemma2"), tmp_path / "file", recipe={**RECIPE, "activation_memory": 0}, tokens=tokens)
    for shard in sorted((tmp_path / "memory").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "file" / shard.name).read_bytes()
    assert not list((tmp_path / "file").glob("activations*"))


def test_shared_inputs_share_statistics(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    """q, k and v are solved as one matrix, as gate and up are: their times are equal shares of one solve."""
    result = quantkit.quantize(tiny("llama"), tmp_path / "out", recipe=RECIPE, tokens=tokens)
    seconds = {layer["name"]: layer["seconds"] for layer in result.report["layers"]}
    prefix = "model.layers.1."
    assert len({seconds[f"{prefix}self_attn.{n}_proj"] for n in "qkv"}) == 1
    assert seconds[f"{prefix}mlp.gate_proj"] == seconds[f"{prefix}mlp.up_proj"]
    assert seconds[f"{prefix}self_attn.o_proj"] != seconds[f"{prefix}self_attn.q_proj"]


def test_gptq_beats_rtn_on_the_measured_loss(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    """On a block's first layers, whose inputs are the same in both runs, the output error is smaller."""
    gptq = quantkit.quantize(tiny("llama"), tmp_path / "gptq", recipe=RECIPE, tokens=tokens).report["layers"][0]
    rtn = quantkit.quantize(tiny("llama"), tmp_path / "rtn", recipe={**RECIPE, "method": "rtn"}).report["layers"][0]
    assert gptq["name"] == rtn["name"]
    assert gptq["sqnr_db"] < rtn["sqnr_db"]  # the weights move further …
    assert gptq["relative_error"] < rtn["relative_error"]  # … and the outputs less


def test_mixed_recipe(tiny: Callable[[str], Path], tokens: list[Tensor], tmp_path: Path) -> None:
    """Rules give layers of one block different schemes and methods, and keep others."""
    rules = [
        {"match": "*.layers.0.*", "skip": True},
        {"match": "*.down_proj", "scheme": "w8a16", "method": "rtn"},
        {"match": "re:.*k_proj", "scheme": "w3a16_g16_asym"},
        {"match": "lm_head", "scheme": "w8a16_g32", "method": "rtn"},
    ]
    result = quantkit.quantize(tiny("llama"), tmp_path / "out", recipe={**RECIPE, "rules": rules}, tokens=tokens)
    layers = {layer["name"]: layer for layer in result.report["layers"]}
    assert not any(".layers.0." in name for name in layers)
    assert layers["model.layers.1.mlp.down_proj"]["scheme"] == "w8a16_channel_sym"
    assert layers["model.layers.1.mlp.down_proj"]["method"] == "rtn"
    assert layers["model.layers.1.self_attn.k_proj"]["scheme"] == "w3a16_g16_asym"
    assert layers["model.layers.1.self_attn.q_proj"]["scheme"] == "w4a16_g32_sym"
    assert layers["lm_head"]["scheme"] == "w8a16_g32_sym"
    assert any("share one matrix in vLLM" in note for note in result.report["notes"])
